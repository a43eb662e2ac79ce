"""The app with replicas that say what they do, and that a test can hold, in a folder that both know.

`NAME.log` has a line for each batch that a replica begins: its process id and how many items; `NAME.left` one for each
call that was given up. While `NAME.hold` is there, no batch of it ends, nor its first while `NAME.first` is. NAMEs are
encoder, decoder and ingress.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from ray import serve
from ray.serve import Application

from cluster import settings
from serve_app import app, contract
from serve_app.deployments import IngressReplica, deployment
from serve_app.model import decoder, encoder
from serve_app.model_replicas import DecoderReplica, EncoderReplica

FOLDER, NAME, HASTY = "LOADED_APP", "loaded", "hasty"
POLL_S = 0.005


def note(file: str, *facts: int) -> None:
    line = " ".join(map(str, (os.getpid(), *facts))) + "\n"
    with open(Path(os.environ[FOLDER]) / file, "ab", buffering=0) as opened:
        opened.write(line.encode())


def watch(module: ModuleType, call: str, name: str) -> None:
    real: Callable[..., Any] = getattr(module, call)
    folder = Path(os.environ[FOLDER])
    holds = [folder / f"{name}.first", folder / f"{name}.hold"]

    def watched(model: Any, items: Sequence[Any], **options: Any) -> Any:
        note(f"{name}.log", len(items))
        while any(hold.exists() for hold in holds):
            time.sleep(POLL_S)
        del holds[:-1]
        return real(model, items, **options)

    setattr(module, call, watched)


class Encoder(EncoderReplica):
    def __init__(self, *arguments: Any) -> None:
        watch(encoder, "embed", "encoder")
        super().__init__(*arguments)

    async def encode(self, *arguments: Any, **options: Any) -> Any:
        answered = False
        try:
            answer = await super().encode(*arguments, **options)
            answered = True
            return answer
        finally:
            if not answered:
                note("encoder.left")


class Decoder(DecoderReplica):
    def __init__(self, *arguments: Any) -> None:
        watch(decoder, "segment", "decoder")
        super().__init__(*arguments)


class Ingress(IngressReplica):
    async def __init__(self, *arguments: Any) -> None:  # as Serve asks of a class below its own
        await super().__init__(*arguments)
        note("ingress.log", 0)


def build(args: dict[str, Any]) -> Application:
    """`config`, and whatever else shall make it another version."""
    with mock.patch.multiple(app, EncoderReplica=Encoder, DecoderReplica=Decoder, IngressReplica=Ingress):
        return app.build(app.AppArgs(config=args["config"]))


def build_hasty(args: dict[str, Any]) -> Application:
    """Another ingress over the same replicas, with the settings of its own `config`."""
    names = contract.encoder_deployment("nano"), contract.decoder_deployment("nano")
    handles = [serve.get_deployment_handle(name, NAME, _check_exists=False) for name in names]
    return deployment(IngressReplica, contract.INGRESS).bind(settings.load(args["config"]), ["nano"], *handles, None)
