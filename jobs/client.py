"""`cellray client …`: the service from the shell."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cluster.errors import InvalidInput, NotFound
from serve_app.client import Client, Masks
from serve_app.contract import Embedding
from serve_app.model import masks

DEFAULT_URL = "http://127.0.0.1:8000"
ABOUT = """Ask a running service for models, embeddings and masks. Coordinates are pixels of the original image."""
EXAMPLES = """examples:
  cellray client models
  cellray client embed plates/*.tif --out embeddings
  cellray client segment cell.png --box 120,80,310,260 --out mask.png
  cellray client segment s3://in/plates/a1.tif --point 200,150 --off 20,30
  cellray client automask cell.png --option points_per_side=16 --out masks.json"""
SHA256 = re.compile("[0-9a-f]{64}")
IMAGE = "a file; or an image's URI, image_id or embedding_id in the service's data sets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help="the service; serve://APP within its cluster (%(default)s)")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="holds the key, where the service asks for one")
    parser.add_argument("--model", help="by name (default: the first one served)")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("models", help="list the models that are served").set_defaults(act=_models)
    embed = actions.add_parser("embed", help="write images' embeddings, FILE.npz each")
    embed.add_argument("images", metavar="FILE", nargs="+", type=Path)
    embed.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write to")
    embed.set_defaults(act=_embed)
    segment = actions.add_parser("segment", help="masks of one image from boxes and points, or of all its cells")
    segment.add_argument(
        "--box", action="append", type=_numbers(4), metavar="X0,Y0,X1,Y1", help="an object; may repeat"
    )
    segment.add_argument("--point", action="append", type=_numbers(2), metavar="X,Y", help="a point on the one object")
    segment.add_argument("--off", action="append", type=_numbers(2), metavar="X,Y", help="a point off it")
    segment.add_argument("--cells", action="store_true", help="every cell, by a CellSAM as --model")
    segment.add_argument("--multimask", action="store_true", help="three masks a prompt: whole, part, subpart")
    segment.set_defaults(act=_segment)
    automask = actions.add_parser("automask", help="masks of every object of one image")
    automask.add_argument(
        "--option", action="append", default=[], metavar="NAME=NUMBER", help="of SamAutomaticMaskGenerator; may repeat"
    )
    automask.set_defaults(act=_automask)
    for one in (segment, automask):
        one.add_argument("image", metavar="IMAGE", help=IMAGE)
        one.add_argument(
            "--out", type=Path, metavar="FILE", help=".json: COCO RLE, boxes, scores; .png or .tif: a label map, uint16"
        )


def run(arguments: argparse.Namespace) -> int:
    out = getattr(arguments, "out", None)
    if arguments.action in ("segment", "automask") and out and out.suffix not in (".json", ".png", ".tif"):
        raise InvalidInput(f"--out {out}: expected a name that ends in .json, .png or .tif")
    with Client(arguments.url, _key(arguments.key_file)) as client:
        act: Callable[[Client, Any], int] = arguments.act
        return act(client, arguments)


def _models(client: Client, _: Any) -> int:
    for one in client.models():
        trained = "trained" if one["trained"] else "untrained"
        print(f"{one['name']}\t{one['image_size']} px\t{one['licence']}\t{trained}\t{one['runtime']}")
        if one["warning"]:
            print(f"{one['name']}: {one['warning']}", file=sys.stderr)
    return 0


def _embed(client: Client, arguments: Any) -> int:
    images: list[Path] = arguments.images
    if len({path.name for path in images}) < len(images):
        raise InvalidInput("two of the files have the same name: embed them into different folders")
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tqdm(total=len(images), unit="image", disable=None) as bar:
        answers = client.embed_many(images, arguments.model)
        for path, (_, found) in zip(images, answers, strict=True):
            if isinstance(found, Embedding):
                _whole(arguments.out / f"{path.name}.npz", partial(_npz, found))
                bar.write(f"{path}\t{found.embedding_id}\t{found.original[1]} × {found.original[0]}", file=sys.stdout)
            else:
                failed += 1
                bar.write(f"{path}: {type(found).__name__}: {found}", file=sys.stderr)
            bar.update()
    print(f"{len(images) - failed} embeddings in {arguments.out}, {failed} images failed", file=sys.stderr)
    return 1 if failed else 0


def _segment(client: Client, arguments: Any) -> int:
    points = [*(arguments.point or []), *(arguments.off or [])]
    if arguments.cells:
        if arguments.box or points or arguments.multimask:
            raise InvalidInput("--cells finds them by itself: leave out boxes, points and --multimask")
        return _write(_asked(client.segment, arguments, {"prompts": "cells"}), arguments.out)
    if not arguments.box and not arguments.point:
        raise InvalidInput("nothing to segment: give --box or --point, or --cells")
    if points and len(arguments.box or [1]) > 1:
        raise InvalidInput("points belong to one object: give one --box with them, or none")
    labels = [1] * len(arguments.point or []) + [0] * len(arguments.off or [])
    prompts = {"boxes": arguments.box, "multimask": arguments.multimask}
    if points:
        prompts |= {"points": [points], "labels": [labels]}
    return _write(_asked(client.segment, arguments, prompts), arguments.out)


def _automask(client: Client, arguments: Any) -> int:
    return _write(_asked(client.automask, arguments, dict(map(_option, arguments.option))), arguments.out)


def _asked(call: Callable[..., Masks], arguments: Any, request: dict[str, Any]) -> Masks:
    """The image is a file to send, or what names one that is known."""
    text, request = arguments.image, {**request, "model": arguments.model}
    if Path(text).is_file():
        return call(Path(text), **request)
    if SHA256.fullmatch(text) and "prompts" in request:  # cells: the image counts, not the embedding
        return call(image_id=text, **request)
    if not SHA256.fullmatch(text):
        return call(image_uri=text, **request)
    try:
        return call(embedding_id=text, **request)
    except NotFound:
        return call(image_id=text, **request)


def _write(found: Masks, out: Path | None) -> int:
    kept = found.found
    rows = [
        {
            "segmentation": {"size": kept.size, "counts": kept.counts[index]},
            "bbox": kept.boxes[index].tolist(),
            "area": int(kept.areas[index]),
            "predicted_iou": float(kept.predicted_iou[index]),
            "stability_score": None if np.isnan(kept.stability[index]) else float(kept.stability[index]),
            "prompt_index": int(kept.prompt_index[index]),
        }
        for index in range(len(kept))
    ]
    for index, row in enumerate(rows, 1):
        box = " ".join(f"{number:g}" for number in row["bbox"])
        print(f"{index}\tscore {row['predicted_iou']:.3f}\t{row['area']} px\tbox {box}")
    if not found.trained:
        print(f"{found.model} is untrained: its numbers mean nothing", file=sys.stderr)
    if out is None:
        return 0
    if out.suffix == ".json":
        made = {"image_id": found.image_id, "embedding_id": found.embedding_id, "model": found.model, "masks": rows}
        _whole(out, lambda file: file.write(json.dumps(made).encode()))
    else:
        plane = masks.label_map(kept.counts, kept.areas.tolist(), list(range(1, len(kept) + 1)), kept.size)
        kind = "PNG" if out.suffix == ".png" else "TIFF"
        _whole(out, lambda file: Image.fromarray(plane).save(file, kind))
    print(out, file=sys.stderr)
    return 0


def _npz(one: Embedding, file: Any) -> None:
    np.savez(
        file, embedding=one.array, embedding_id=one.embedding_id, image_id=one.image_id, model=one.model,
        encoder_sha256=one.encoder_sha256, original_size=one.original, input_size=one.input,
    )  # fmt: skip


def _whole(path: Path, write: Callable[[Any], object]) -> None:
    """The file is there whole, or as it was."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                write(file)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror}") from error


def _key(path: Path | None) -> str | None:
    try:
        return path.read_text().strip() if path else None
    except (OSError, UnicodeDecodeError) as error:
        raise NotFound(f"the key file {path} cannot be read") from error


def _numbers(count: int) -> Callable[[str], list[float]]:
    def numbers(text: str) -> list[float]:
        values = [float(one) for one in text.split(",")]
        if len(values) != count:
            raise ValueError
        return values

    numbers.__name__ = f"{count} numbers"  # argparse says: invalid 4 numbers value
    return numbers


def _option(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError as error:
        raise InvalidInput(f"--option {text}: expected NAME=NUMBER, as points_per_side=16") from error
    return name, int(number) if number.is_integer() else number
