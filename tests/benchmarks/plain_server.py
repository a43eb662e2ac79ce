"""The usual SAM server, as well as its authors would write it: FastAPI, one SamPredictor, threads, a cache of features.

    python -m tests.benchmarks.plain_server --checkpoint vit_b.pth --dtype float32 --port 8100

POST /segment takes what Cellray's /v1/segment does: JSON with an `embedding_id`, or multipart with `image` and
`request`, and answers masks as COCO RLE with box, area and score. The predictor is stateful, so that one request at a
time has it; features are kept by the image's sha256, as many bytes as Cellray's cache holds.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from PIL import Image
from pycocotools import mask as coco
from segment_anything import SamPredictor, sam_model_registry
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from cluster.settings import Limits


class Server:
    def __init__(self, checkpoint: str, dtype: str) -> None:
        self.predictor = SamPredictor(sam_model_registry["vit_b"](checkpoint).eval())
        self.cast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        self.lock = threading.Lock()
        self.cache: OrderedDict[str, tuple[torch.Tensor, tuple[int, int], tuple[int, int]]] = OrderedDict()
        self.held = 0

    def segment(self, image: bytes | None, body: dict[str, Any]) -> dict[str, Any]:
        identity = hashlib.sha256(image).hexdigest() if image else body["embedding_id"]
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) if image else None
        predictor = self.predictor
        with self.lock, torch.inference_mode(), self.cast:
            if identity in self.cache:
                self.cache.move_to_end(identity)
                predictor.features, predictor.original_size, predictor.input_size = self.cache[identity]
                predictor.is_image_set = True
            elif pixels is None:
                raise HTTPException(404, "no such image")
            else:
                predictor.set_image(pixels)
                self.keep(identity)
            found = [self.predict(np.array(points)) for points in body["points"]]
        rows = []
        for mask, score in found:
            rle = coco.encode(np.asfortranarray(mask))
            rows.append(
                {
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "bbox": coco.toBbox(rle).tolist(),
                    "area": int(coco.area(rle)),
                    "predicted_iou": score,
                }
            )
        return {"embedding_id": identity, "masks": rows}

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, float]:
        """As SamPredictor.predict, which cannot give NumPy its scores in bfloat16."""
        predictor = self.predictor
        coordinates = torch.as_tensor(predictor.transform.apply_coords(points, predictor.original_size)).float()
        labels = torch.ones(1, len(points), dtype=torch.int)
        masks, scores, _ = predictor.predict_torch(coordinates[None], labels, multimask_output=False)
        return masks[0, 0].numpy(), float(scores[0, 0])

    def keep(self, identity: str) -> None:
        predictor = self.predictor
        self.cache[identity] = predictor.features, predictor.original_size, predictor.input_size
        self.held += predictor.features.nbytes
        while self.held > Limits().cache_bytes:
            self.held -= self.cache.popitem(last=False)[1][0].nbytes


def create_app(server: Server) -> FastAPI:
    app = FastAPI()

    @app.post("/segment")
    async def segment(request: Request) -> dict[str, Any]:
        if request.headers["content-type"].startswith("multipart/"):
            form = await request.form()
            image, text = form["image"], form["request"]
            assert isinstance(image, UploadFile)
            assert isinstance(text, str)
            return await run_in_threadpool(server.segment, await image.read(), json.loads(text))
        return await run_in_threadpool(server.segment, None, await request.json())

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    server = Server(arguments.checkpoint, arguments.dtype)
    uvicorn.run(create_app(server), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
