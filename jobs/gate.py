"""`cellray gate MODEL`: a runtime and dtype beside segment_anything's float32 on real images; a table and verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.resources import files

from tqdm import tqdm

from cluster.errors import InvalidInput, InvalidSettings
from cluster.settings import Settings
from cluster.storage import Storage
from serve_app import models
from serve_app.model import decoder, encoder, gate, preprocess
from serve_app.model.checkpoint import ModelCard
from serve_app.model.gate import Measures, Model, Report
from serve_app.model.preprocess import ModelImage

SAMPLES = ("cell.png", "coins.png", "rocket.jpg", "coffee.png")  # of scikit-image, grey and colour
STRIP = slice(200, 220)  # rows of the last one, 600 × 20: nearly all of that input is padding


def run(settings: Settings, model: str, runtime: str, device: str, dtype: str, paths: Sequence[str]) -> Report:
    """A model of the settings, or a checkpoint, on images (files or `s3://…`; none means scikit-image's).

    Raises:
        CellrayError: no such model, runtime, dtype or image, or one that cannot be used here.
    """
    device = encoder.check_device(device)
    encoder.check_dtype(dtype, device)
    with models.opened(settings, model) as folder:
        images = list(_images(settings, paths, ModelCard.read(folder).architecture.image_size))
        decoder_runtime = "reference" if runtime == "reference" else "auto"  # the other names are the encoder's
        candidate = Model(
            encoder.load(folder, runtime, device, dtype), decoder.load(folder, decoder_runtime, device, dtype)
        )
        reference = Model(encoder.load(folder, "reference", device), decoder.load(folder, "reference", device))
        return gate.run(reference, candidate, tqdm(images, unit="img", disable=None), dtype)


def _images(settings: Settings, paths: Sequence[str], size: int) -> Iterator[tuple[str, ModelImage]]:
    for name, data in _named(settings, paths) if paths else _samples():
        try:
            pixels = preprocess.decode(data, settings.limits.image_pixels)
        except InvalidInput as error:
            raise type(error)(f"{name}: {error}") from error
        yield name, preprocess.resize(pixels, size)
    if not paths:
        yield f"strip of {name}", preprocess.resize(pixels[STRIP], size)


def _named(settings: Settings, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    storage = Storage(settings.storage)
    return ((path, storage.read(path, settings.limits.image_bytes)) for path in paths)


def _samples() -> Iterator[tuple[str, bytes]]:
    try:
        folder = files("skimage.data")
    except ModuleNotFoundError as error:
        raise InvalidSettings(
            "the sample images are not installed: pip install 'cellray[samples]', or --image"
        ) from error
    return ((name, (folder / name).read_bytes()) for name in SAMPLES)


def show(report: Report) -> None:
    """Print a line an image, then a line a rule."""
    weights_are = "trained" if report.trained else "random"
    print(f"{report.candidate}; beside segment_anything in float32, weights {weights_are}\n")
    print(f"{'':28}{'embedding':>10}{'cosine of tokens':>25}{'logits':>18}{'predicted IoU':>18}{'masks':>16}")
    print(f"{'image':28}{'error':>10}{'mean':>11}{'worst':>11}{'no padding':>11}", end="")
    print(f"{'error':>10}{'error':>10}{'largest':>10}{'IoU':>9}{'least':>9}")
    for row in report.rows:
        _line(row.image, row.candidate)
        if row.peer:
            _line("  torch's bfloat16", row.peer)
    print()
    for verdict in report.verdicts:
        sign, number = ("≥", ".6f") if verdict.at_least else ("≤", ".2e")
        values = f"{verdict.found:{number}} {sign} {verdict.limit:{number}}"
        print(f"{'PASS' if verdict.passed else 'FAIL'}  {verdict.rule:34}{values}  ({verdict.image})")


def _line(name: str, one: Measures) -> None:
    print(
        f"{name[-27:]:28}{one.embedding_error:10.1e}{one.cosine:11.6f}{one.worst:11.6f}{one.worst_inside:11.6f}", end=""
    )
    print(f"{one.logits_error:10.1e}{one.scores_error:10.1e}{one.score_difference:10.1e}", end="")
    print(f"{one.iou:9.5f}{one.iou_least:9.4f}")


def as_json(report: Report) -> str:
    """One line; what is no number is null."""
    verdicts = [{**asdict(verdict), "passed": verdict.passed} for verdict in report.verdicts]
    text = json.dumps({**asdict(report), "verdicts": verdicts, "passed": report.passed})
    return json.dumps(json.loads(text, parse_constant=lambda _: None))
