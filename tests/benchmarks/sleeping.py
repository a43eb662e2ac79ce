"""The real app with replicas that sleep: a GPU's time without a GPU.

All models are the packaged one. An encoder answers with the first embedding that it computed; a decoder computes, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

from ray.serve import Application

from serve_app import app
from serve_app.model import decoder, encoder
from serve_app.model_replicas import DecoderReplica, EncoderReplica

ENCODE, DECODE = "SLEEP_ENCODE_S", "SLEEP_DECODE_S"  # seconds an image, and a request; in the replicas' environment


class Encoder(EncoderReplica):
    def __init__(self, *arguments: Any) -> None:
        real, seconds = encoder.embed, float(os.environ[ENCODE])
        known: list[Any] = []

        def embed(model: Any, images: Sequence[Any], **options: Any) -> list[Any]:
            known.extend(real(model, images[:1], **options) if not known else [])
            time.sleep(seconds * len(images))
            return known * len(images)

        encoder.embed = embed
        super().__init__(*arguments)


class Decoder(DecoderReplica):
    def __init__(self, *arguments: Any) -> None:
        real, seconds = decoder.segment, float(os.environ[DECODE])

        def segment(model: Any, requests: Sequence[Any]) -> list[Any]:
            time.sleep(seconds * len(requests))
            return real(model, requests)

        decoder.segment = segment
        super().__init__(*arguments)


def build(args: dict[str, Any]) -> Application:
    """`args` as of deploy/*.yaml."""
    with mock.patch.multiple(app, EncoderReplica=Encoder, DecoderReplica=Decoder):
        return app.build(app.AppArgs(**args))


def environment(root: str, encode_s: float, decode_s: float) -> dict[str, str]:
    return {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", ENCODE: str(encode_s), DECODE: str(decode_s)}


def models(names: Sequence[str]) -> dict[str, dict[str, str | None]]:
    """Settings of models, by name."""
    return {name: {"source": "packaged:nano", "sha256": None, "runtime": "reference"} for name in names}
