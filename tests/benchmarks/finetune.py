"""Fine-tuning the decoder from stored embeddings: what it wins back on images of another look, and what not running
the encoder saves.

python -m tests.benchmarks.finetune [--source FILE] [--minutes 4] [--only recovered vs_with_encoder]

recovered: the small model, fields of 256² px of all kinds that it was never trained on, and the same fields as another
microscope might show them: in relief, grey, inverted. Those are embedded by jobs.embed and learnt by jobs.finetune, as
many of them as a person might label. On others, held out, IoU from exact boxes at full resolution, tuned and untuned:
recovered is (tuned − untuned) / (untuned on the original look − untuned). It is left out where the look costs less than
0.05 of IoU; the whole part, where nano has random weights. finetune_total_s is embedding and tuning, the service up
already.

vs_with_encoder: ViT-B with random weights, a step of 6 images, 12 objects each, one round of prompts: once from the
embeddings' Parquet, once through our fastest encoder from pixels at hand. Both are otherwise the same step, turn by
turn; both make their targets in their time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median

import numpy as np
import torch
import yaml
from PIL import Image
from scipy import ndimage

from cluster import memory, serve_config, session, settings
from cluster.settings import ModelSettings, Settings
from cluster.storage import Storage
from jobs import embed, finetune, synthetic
from serve_app import contract, dataset, models
from serve_app.commit import ShardWriter
from serve_app.contract import Embedding
from serve_app.model import checkpoint, encoder, modules, training_samples
from serve_app.model.checkpoint import ModelCard
from serve_app.model.prompts import Prompts
from serve_app.model.training import Plan, Trainer
from serve_app.model.training_samples import Sample
from tests.benchmarks.nano import MODEL, Model, Scene, report

WANTED = {"finetune_recovered": 0.5, "finetune_total_s": 300.0, "finetune_vs_with_encoder": 1.7}
SERVE_CONFIG = Path("deploy/serve.local.yaml")
SIDE = 256  # px, of fields
LABELLED, HELD_OUT = 150, 60  # fields
FIRST_LABELLED, FIRST_HELD_OUT = 600_000, 650_000  # seeds; the model's own training takes 1 000 000 and all above
SIGMA, GAMMA = 1.5, 0.7  # px, of the blur; of the grey levels
LEAST_LOST = 0.05  # IoU, on the changed look: of less there is no share worth the name
ARCH, SEED = "sam_vit_b", 7
BATCH, OBJECTS, ROUNDS = 6, 12, 5  # images a step, as jobs.finetune takes them; objects an image; timed turns

Look = Callable[[np.ndarray], np.ndarray]


def same(pixels: np.ndarray) -> np.ndarray:
    return pixels


def relief(pixels: np.ndarray) -> np.ndarray:
    """[h, w, 3] uint8 → the same shape, grey: how steeply it falls to the lower right, inverted."""
    slope = sum(ndimage.gaussian_filter(pixels.mean(2), SIGMA, order) for order in ((1, 0), (0, 1)))
    low, high = np.percentile(slope, (1, 99))
    levels = 1 - ((slope - low) / max(high - low, 1e-6)).clip(0, 1) ** GAMMA
    return np.repeat((255 * levels + 0.5).astype(np.uint8)[..., None], 3, axis=2)


def fields(first: int, number: int) -> Iterator[synthetic.Field]:
    """Of all kinds with objects."""
    seed = first
    while number:
        made = synthetic.field(seed, (SIDE, SIDE))
        seed += 1
        if made.labels.any():
            number -= 1
            yield made


def write(folder: Path, look: Look, number: int) -> None:
    """Folders `images` and `labels` of PNGs of the same names."""
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for index, one in enumerate(fields(FIRST_LABELLED, number)):
        Image.fromarray(look(one.image)).save(folder / f"images/{index:04d}.png")
        Image.fromarray(one.labels.astype(np.uint16)).save(folder / f"labels/{index:04d}.png")


def box_iou(model: Model, look: Look, number: int) -> float:
    """The mean over the held-out fields' objects."""
    scenes = (Scene.of(one.kind, look(one.image), one.labels) for one in fields(FIRST_HELD_OUT, number))
    found = [one.iou(model.segment(one, Prompts(one.boxes))[0]).diagonal() for one in scenes if one.objects]
    return float(np.concatenate(found).mean())


def recovered(known: Settings, chosen: ModelSettings, minutes: float) -> dict[str, float]:
    """`chosen`: the nano to tune."""
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as temporary:
        folder = Path(temporary)
        own = known.model_copy(update={"models": {MODEL: chosen}, "weights_dir": str(folder / "weights")})
        untuned = models.prepare(own, MODEL)
        if not ModelCard.read(untuned).trained:
            print(f"{chosen.source} is random weights: `recovered` is left out", file=sys.stderr)
            return {}
        write(folder, relief, LABELLED)
        (folder / "cellray.yaml").write_text(yaml.safe_dump(own.model_dump(mode="json")))
        with redirect_stdout(sys.stderr):
            embed_s, finetune_s = tune(folder, minutes)
        with models.opened(own, str(folder / "tuned/model.safetensors")) as tuned:
            pair = Model(untuned, chosen), Model(tuned, chosen)
            (original, forgotten), (lost, won) = (
                [box_iou(one, look, HELD_OUT) for one in pair] for look in (same, relief)
            )
    share = {"finetune_recovered": (won - lost) / (original - lost)} if original - lost >= LEAST_LOST else {}
    if not share:
        print(f"the look costs {original - lost:.3f} of IoU, not {LEAST_LOST}: no share of it", file=sys.stderr)
    return share | {
        "finetune_total_s": embed_s + finetune_s,
        "finetune_embed_s": embed_s,
        "finetune_s": finetune_s,
        "finetune_iou_original": original,
        "finetune_iou_original_tuned": forgotten,
        "finetune_iou_new": lost,
        "finetune_iou_new_tuned": won,
    }


def tune(folder: Path, minutes: float) -> tuple[float, float]:
    """folder/images and labels → folder/tuned; how many seconds jobs.embed and jobs.finetune took."""
    images, labels, stored, tuned = (str(folder / name) for name in ("images", "labels", "stored", "tuned"))
    words = ["--model", MODEL, "--config", str(folder / "cellray.yaml")]
    served = serve_config.read(SERVE_CONFIG)
    served["applications"][0]["args"]["config"] = words[-1]
    with session.local(served, print):
        return (
            seconds(embed.main, [images, stored, *words]),
            seconds(finetune.main, [stored, labels, tuned, "--minutes", str(minutes), *words]),
        )


def seconds(job: Callable[[list[str]], int], words: list[str]) -> float:
    start = time.perf_counter()
    if job(words):
        raise SystemExit(f"a job failed: {' '.join(words)}")
    return time.perf_counter() - start


def vs_with_encoder() -> dict[str, float]:
    device = encoder.check_device("auto")
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported()
    dtype = "bfloat16" if fast else "float32"
    with tempfile.TemporaryDirectory(prefix="cellray-bench-") as temporary:
        folder, out = Path(temporary) / "model", str(Path(temporary) / "out")
        state = modules.seeded(ARCH, SEED)
        card = checkpoint.extract(state, folder, source="seeded", source_sha256="0" * 64, trained=False)
        del state
        return compare(folder, card, out, device, dtype)


def compare(folder: Path, card: ModelCard, out: str, device: str, dtype: str) -> dict[str, float]:
    """A step from the Parquet at `out`, written here, against one through the encoder."""
    size, patch, rng = card.architecture.image_size, card.architecture.patch, np.random.default_rng(SEED)
    images = list(rng.integers(0, 256, (BATCH, size, size, 3), np.uint8))
    found = [boxes(rng, size) for _ in images]
    ours = encoder.load(folder, "auto", device, dtype)
    uri, storage = store(out, card, encode(ours, images), dtype), Storage()
    plan = Plan(lr=1e-4, loss="focal", rounds=1, seed=SEED)
    trainers = [Trainer(folder, plan, device, dtype) for _ in range(2)]  # alike: the same prompts in the same turn

    def stored() -> list[np.ndarray]:
        return [one.array for one in dataset.open_embeddings(storage, uri, list(range(len(images))))]

    def through_encoder() -> list[np.ndarray]:
        return encode(ours, images)

    def samples(arrays: list[np.ndarray]) -> list[Sample]:
        made = [training_samples.sample(f"{at}", array, size, patch, found[at]) for at, array in enumerate(arrays)]
        return [one for one in made if one is not None]

    def step(trainer: Trainer, arrays: Callable[[], list[np.ndarray]]) -> tuple[float, float]:
        """Seconds an image: of getting the embeddings, and of the whole."""
        start = time.perf_counter()
        given = arrays()
        got = time.perf_counter()
        if not np.isfinite(trainer.step(samples(given), 0.5).loss):
            raise SystemExit("the loss is no number")
        end = time.perf_counter()
        return (got - start) / len(images), (end - start) / len(images)

    ways = [(trainers[0], stored), (trainers[1], through_encoder)]
    times: list[list[tuple[float, float]]] = [[], []]
    for turn in range(ROUNDS + 1):
        for way in (0, 1)[:: (-1) ** turn]:  # there and back: none always follows the other
            times[way].append(step(*ways[way]))
    (reads, stored_s), (encodes, encoder_s) = (zip(*own[1:], strict=True) for own in times)  # the first also allocates
    print(f"{ours.runtime}: {median(encodes):.3f} s an image to encode, {median(reads):.3f} to read")
    return {
        "finetune_vs_with_encoder": median(map(np.divide, encoder_s, stored_s)),
        "finetune_stored_s_an_image": median(stored_s),
        "finetune_with_encoder_s_an_image": median(encoder_s),
    }


def encode(ours: encoder.Encoder, images: list[np.ndarray]) -> list[np.ndarray]:
    """[C, g, g] float16 each."""
    answers = encoder.embed(ours, images)
    failed = [one for one in answers if isinstance(one, Exception)]
    if failed:
        raise failed[0]
    return [one for one in answers if isinstance(one, np.ndarray)]


def boxes(rng: np.random.Generator, size: int) -> np.ndarray:
    """[OBJECTS, size, size] bool: rectangles that may overlap."""
    found = np.zeros((OBJECTS, size, size), bool)
    for plane in found:
        (y, x), (height, width) = rng.integers(0, size // 2, 2), rng.integers(size // 16, size // 2, 2)
        plane[y : y + height, x : x + width] = True
    return found


def store(out: str, card: ModelCard, arrays: list[np.ndarray], dtype: str) -> str:
    """Embeddings as jobs.embed writes them → the Parquet file's URI."""
    size = (card.architecture.image_size,) * 2
    metadata = {"fingerprint": "f" * 64, "encoder_sha256": card.encoder_sha256}
    with ShardWriter(Storage(), out, embed.NAME, 0, metadata) as writer:
        for index, array in enumerate(arrays):
            image = contract.image_id(b"%d" % index)
            own = contract.embedding_id(image, card.encoder_sha256, dtype)
            made = Embedding(own, image, card.family, card.encoder_sha256, size, size, array)
            row = dataset.embedding_row(made, f"{index}.png", made.pooled(card.architecture.patch))
            writer.add(dataset.EMBEDDINGS, row)
        record = writer.commit()
    return str(Path(out) / record.files[0].path)


def main() -> None:
    parts: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
        "recovered": lambda asked: recovered(known, chosen, asked.minutes),
        "vs_with_encoder": lambda _: vs_with_encoder(),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="a nano's checkpoint (default: that of the settings)")
    parser.add_argument("--minutes", type=float, default=4.0, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="(default: both)")
    arguments = parser.parse_args()
    known = settings.load()
    chosen = ModelSettings(source=os.path.abspath(arguments.source)) if arguments.source else models.find(known, MODEL)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    memory.keep()
    figures: dict[str, float] = {}
    for name in arguments.only:
        figures |= parts[name](arguments)
    report("finetune", figures, WANTED)


if __name__ == "__main__":
    main()
