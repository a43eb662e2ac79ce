"""jobs.embed for the faults benchmark: an app whose encoder costs nothing, and drivers that start in no time.

`python -m tests.faulty_job ADDRESS LOG` imports what a driver needs and then forks one for every line of JSON, its
arguments; it answers with two lines, the driver's process id and how it ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve
from ray.serve import Application

from serve_app import contract
from serve_app.contract import ModelInfo
from tests.s3 import ROOT

MODEL, SIDE, CHANNELS = "faults", 32, 16
SHAPE = (CHANNELS, SIDE, SIDE)  # 32 KiB
PART_BYTES = 25 << 10  # a shard of two embeddings goes up in three parts, one of one in one piece
REPLICA, CALLS = "replica", "calls"  # files: the replica's process id; a line an image: when, and its `number`


def number(pixels: np.ndarray) -> int:
    """What tells images apart."""
    return zlib.crc32(pixels.tobytes())


def embedding(pixels: np.ndarray) -> np.ndarray:
    """[height, width, 3] uint8 → SHAPE float16: other numbers for other pixels."""
    return np.random.default_rng(number(pixels)).standard_normal(SHAPE, np.float32).astype(np.float16)


class NullEncoder:
    def __init__(self, folder: str) -> None:
        self.calls = os.open(Path(folder) / CALLS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        (Path(folder) / "new").write_text(str(os.getpid()))
        (Path(folder) / "new").replace(Path(folder) / REPLICA)

    def encode(self, images: list[np.ndarray], dtype: str) -> list[np.ndarray]:
        lines = "".join(f"{time.monotonic_ns()} {number(pixels)}\n" for pixels in images)
        os.write(self.calls, lines.encode())
        return [embedding(pixels).astype(dtype) for pixels in images]


class NullDecoder:
    def info(self) -> ModelInfo:
        digest = "0" * 64
        return ModelInfo(MODEL, MODEL, SIDE, 1, CHANNELS, digest, digest, "CC0", True, MODEL, "cpu", "float32")


class Front:
    def __init__(self, *_: Any) -> None: ...


def build(arguments: dict[str, Any]) -> Application:
    bound = serve.deployment(name=contract.encoder_deployment(MODEL))(NullEncoder).bind(arguments["folder"])
    other = serve.deployment(name=contract.decoder_deployment(MODEL))(NullDecoder).bind()
    return serve.deployment(name=contract.INGRESS)(Front).bind(bound, other)


def set_up() -> None:
    """In every worker: a name for its requests, and files that go up in parts though they are small."""
    from cluster import storage

    os.environ["AWS_SDK_UA_APP_ID"] = f"worker-{os.getpid()}"
    storage.PART_BYTES = PART_BYTES


def main(address: str, log: str) -> int:
    import ray
    import s3fs  # noqa: F401

    from jobs import embed

    print("ready", flush=True)
    for line in sys.stdin:
        driver = os.fork()
        if not driver:
            output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ["AWS_SDK_UA_APP_ID"] = f"driver-{os.getpid()}"
            environment = {
                "env_vars": {"PYTHONPATH": str(ROOT)},
                "worker_process_setup_hook": "tests.faulty_job.set_up",
            }
            # Ray goes on counting the tasks of a killed driver by their function's id, which drivers do not share.
            embed._shard._uuid = uuid.uuid4()  # type: ignore[attr-defined]
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
            return embed.main(json.loads(line))
        print(driver, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
