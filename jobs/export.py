"""`cellray export OUT --to coco|labels`: masks as other tools read them."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import tifffile

from cluster.errors import NotFound
from cluster.storage import absolute, join, mapped
from jobs.views import View
from serve_app.dataset import EMBEDDINGS, MASKS, Dataset
from serve_app.model import masks

CATEGORY = {"id": 1, "name": "object"}
COLUMNS = [
    "image_uri",
    "part",
    "image_id",
    "mask_index",
    "segmentation",
    "bbox",
    "area",
    "predicted_iou",
    "stability_score",
]
Row = dict[str, Any]


class Names:
    """Images' names relative to the last folder that all of them are in; what is in another file is below its name."""

    def __init__(self, uris: list[str]) -> None:
        plain = [uri.replace("#", "/") for uri in uris]
        folders = {os.path.dirname(uri) for uri in plain}
        common = len(os.path.commonprefix([folder.split("/") for folder in folders]))  # noqa: RUF071, of lists
        relative = ("/".join(uri.split("/")[common:]).lstrip("/") for uri in plain)
        self.names = dict(zip(uris, relative, strict=True))
        self.stems = Counter(map(self.stem, uris))

    def __getitem__(self, uri: str) -> str:
        return self.names[uri]

    def stem(self, uri: str) -> str:
        return os.path.splitext(self.names[uri])[0]

    def with_suffix(self, uri: str, suffix: str) -> str:
        """With another suffix; after its own, where images differ in that alone."""
        stem = self.stem(uri)
        return (self.names[uri] if self.stems[stem] > 1 else stem) + suffix


def coco(found: Dataset, names: Names, to: str, done: Callable[[], Any]) -> int:
    """Write one COCO file of instances, `to`; → how many images. `names` are of their `uris`; `done()` after each.

    Images without any mask are in it too, where their embeddings are in the data set. Raises
    Conflict where there is another file.
    """
    count = annotation = 0
    with (
        mapped(tempfile.gettempdir()),
        tempfile.TemporaryFile("w+") as images,
        tempfile.NamedTemporaryFile("w+") as out,
    ):
        out.write(json.dumps({"categories": [CATEGORY]})[:-1] + ', "annotations": [')
        for uri, (height, width), rows in _images(found):
            about = {"id": count, "file_name": names[uri], "width": width, "height": height, "image_uri": uri}
            images.write((", " if count else "") + json.dumps(about))
            for row in rows:
                made = {
                    "id": annotation,
                    "image_id": count,
                    "category_id": CATEGORY["id"],
                    "segmentation": row["segmentation"],
                    "bbox": row["bbox"],
                    "area": row["area"],
                    "iscrowd": 0,
                    "score": row["predicted_iou"],
                    "stability_score": row["stability_score"],
                }
                out.write((", " if annotation else "") + json.dumps(made))
                annotation += 1
            count += 1
            done()
        out.write('], "images": [')
        images.seek(0)
        shutil.copyfileobj(images, out)
        out.write("]}")
        out.flush()
        found.storage.publish(absolute(to), Path(out.name))
    return count


def labels(found: Dataset, names: Names, to: str, done: Callable[[], Any]) -> int:
    """Write a TIFF an image into the folder `to`: 0, and mask_index + 1 of the smallest mask at each pixel; → images.

    uint16, or uint32 from 65,535 masks on. Raises Conflict: there is another file of that name.
    """
    count = 0
    for uri, size, rows in _images(found):
        counts, areas, labels = (
            [row["segmentation"]["counts"] for row in rows],
            [row["area"] for row in rows],
            [row["mask_index"] + 1 for row in rows],
        )
        plane = masks.label_map(counts, areas, labels, size)
        content = io.BytesIO()
        tifffile.imwrite(content, plane, compression="zlib", metadata=None, software=False)
        found.storage.publish(join(absolute(to), names.with_suffix(uri, ".tif")), content.getvalue())
        count += 1
        done()
    return count


def uris(found: Dataset) -> list[str]:
    """The images that an export has: those with masks or an embedding. Raises NotFound: none has masks."""
    segmented = list(dict.fromkeys(map(_name, found.table(MASKS, ["image_uri", "part"]).to_pylist())))
    if not segmented:
        raise NotFound(f"{found.uri} holds no masks: run jobs.segment first")
    return list(dict.fromkeys(segmented + list(map(_name, found.table(EMBEDDINGS, ["image_uri", "part"]).to_pylist()))))


def _name(row: Row) -> str:
    """An image's URI; of a plane, or what else is a part of it, after that which part."""
    plane = str(replace(View.parse(row["part"]), xywh=""))
    return f"{row['image_uri']}#{plane}" if plane else str(row["image_uri"])


def _images(found: Dataset) -> Iterator[tuple[str, tuple[int, int], list[Row]]]:
    """(URI, (height, width), masks) of each image, a shard of them in memory at a time."""
    seen: set[str] = set()
    for name, columns in ((MASKS, COLUMNS), (EMBEDDINGS, ["image_uri", "part", "x", "y", "height", "width"])):
        for file, record in found.files(name):
            rows = found.read(file, columns).to_pylist()
            by_image: dict[str, list[Row]] = {}
            for row, stands in zip(rows, found.stands(record, [row["image_uri"] for row in rows]), strict=True):
                if stands and (uri := _name(row)) not in seen:
                    by_image.setdefault(uri, []).append(row)
            seen |= by_image.keys()
            for uri, own in by_image.items():
                first = own[0]
                if name == MASKS:
                    height, width = first["segmentation"]["size"]
                    yield uri, (height, width), own
                else:
                    yield (
                        uri,
                        (max(row["y"] + row["height"] for row in own), max(row["x"] + row["width"] for row in own)),
                        [],
                    )
