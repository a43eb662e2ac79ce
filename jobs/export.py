"""`cellray export OUT --to coco`: masks as other tools read them, and images' names in all exports."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.storage import absolute, mapped
from jobs import instances
from serve_app.dataset import Dataset

CATEGORY = {"id": 1, "name": "object"}


class Names:
    """Images' names relative to the last folder that all of them are in; what is in another file is below its name."""

    def __init__(self, uris: list[str]) -> None:
        plain = [uri.replace("#", "/") for uri in uris]
        folders = {os.path.dirname(uri) for uri in plain}
        common = len(os.path.commonprefix([folder.rstrip("/").split("/") for folder in folders]))  # noqa: RUF071, of lists
        relative = ("/".join(uri.split("/")[common:]).lstrip("/") for uri in plain)
        self.names = dict(zip(uris, relative, strict=True))
        self.stems = Counter(map(self.stem, uris))

    def __getitem__(self, uri: str) -> str:
        return self.names[uri]

    def __contains__(self, uri: str) -> bool:
        return uri in self.names

    def stem(self, uri: str) -> str:
        return os.path.splitext(self.names[uri])[0]

    def with_suffix(self, uri: str, suffix: str) -> str:
        """With another suffix; after its own, where images differ in that alone."""
        stem = self.stem(uri)
        return (self.names[uri] if self.stems[stem] > 1 else stem) + suffix


def coco(found: Dataset, names: Names, to: str, done: Callable[[], Any]) -> int:
    """Write one COCO file of instances, `to`; → how many images. `names` are of their `uris`; `done()` after each.

    Images without any mask are in it too, where their embeddings are in the data set. Of one with tiles that failed,
    they are its `holes`. Raises Conflict where there is another file.
    """
    count = annotation = 0
    with (
        mapped(tempfile.gettempdir()),
        tempfile.TemporaryFile("w+") as images,
        tempfile.NamedTemporaryFile("w+") as out,
    ):
        out.write(json.dumps({"categories": [CATEGORY]})[:-1] + ', "annotations": [')
        for image in instances.images(found):
            height, width = image.size
            about: dict[str, Any] = {"id": count, "file_name": names[image.uri], "width": width, "height": height}
            about["image_uri"] = image.uri
            if image.holes:
                about["holes"] = image.holes
            images.write((", " if count else "") + json.dumps(about))
            for row in (row for batch in image.batches() for row in batch.to_pylist()):
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
