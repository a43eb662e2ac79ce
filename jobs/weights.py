"""`cellray weights`: which models there are, and whether this node has them."""

from __future__ import annotations

import argparse
import getpass
import os
import sys

from cluster import deepcell, weights
from cluster import settings as settings_module
from cluster.errors import CellrayError, Forbidden, InvalidInput
from cluster.settings import Settings
from serve_app import models
from serve_app.model import checkpoint

PARTS = (checkpoint.ENCODER, checkpoint.DECODER, checkpoint.DETECTOR)


def run(arguments: argparse.Namespace) -> int:
    settings = settings_module.load(arguments.config)
    return ACTIONS[arguments.action](settings, arguments.models)


def listed(settings: Settings, names: list[str]) -> int:
    print(f"{'model':18} {'here':5} {'licence':12} source")
    for name in names or sorted(settings.models):
        model = models.find(settings, name)
        licence = model.licence if len(model.licence) <= 12 else f"{model.licence[:11]}…"
        print(
            f"{name:18} {'yes' if _here(settings, name) else 'no':5} {licence:12} {weights.public_source(model.source)}"
        )
    return 0


def fetched(settings: Settings, names: list[str]) -> int:
    for name in _named(names):
        model = models.find(settings, name)
        print(f"{name}: licence {model.licence}", flush=True)
        if deepcell.is_deepcell(model.source) and not _here(settings, name):
            _ask()
        folder = models.prepare(settings, name)
        card = checkpoint.ModelCard.read(folder)
        print(f"{name}: {card.family}, in {folder}")
    return 0


def _ask() -> None:
    """For a token, where there is none and somebody to ask; it stays in this process."""
    try:
        deepcell.token()
    except Forbidden:
        if not sys.stdin.isatty():
            raise
        os.environ[deepcell.TOKEN] = getpass.getpass("DeepCell access token (not shown): ")


def verified(settings: Settings, names: list[str]) -> int:
    bad = 0
    for name in names or [name for name in sorted(settings.models) if _here(settings, name)]:
        try:
            folder = models.folder(settings, name)
            card = checkpoint.ModelCard.read(folder)
            parts = [part for part in PARTS if card.sha256(part)]
            for part in parts:
                checkpoint.load_half(folder, part, card)
            print(f"{name}: {', '.join(parts)} as they were written, in {folder}")
        except CellrayError as error:
            bad += 1
            print(f"{name}: {error}", file=sys.stderr)
    return 1 if bad else 0


def where(settings: Settings, names: list[str]) -> int:
    missing = [name for name in _named(names) if not _here(settings, name)]
    for name in names:
        print(models.folder(settings, name))
    return 1 if missing else 0


def _named(names: list[str]) -> list[str]:
    if not names:
        raise InvalidInput("which MODEL? `cellray weights list` has their names")
    return names


def _here(settings: Settings, name: str) -> bool:
    return (models.folder(settings, name) / "model.json").exists()


ACTIONS = {"list": listed, "fetch": fetched, "verify": verified, "where": where}
