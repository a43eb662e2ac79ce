"""What training reads: batches of samples that are a function of seed and step, from embeddings or from images."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from cluster.settings import Limits
from cluster.storage import Storage
from jobs.labels import Objects
from serve_app import dataset
from serve_app.model import masks, preprocess, training_samples
from serve_app.model.architectures import Architecture
from serve_app.model.training_samples import Sample

OBJECTS = 12  # prompted for in one image and step
MOST_VALIDATED = 64  # images
SYNTHETIC = "synthetic"
FIELD_PX = 512
FIRST_SEED = 1_000_000  # of synthetic fields to train on; those below are never trained on
VALIDATION_SEED, VALIDATION_FIELDS = 900_000, 24
SYNTHETIC_EPOCH = 1000  # images
EASY, EASY_FIELDS = "nuclei", 600  # from scratch, ever fewer of the first fields are of this kind alone: where objects
# and background differ least from image to image an encoder learns to look; from all kinds at once, only to fill boxes
FIELDS_HELD, CROPS_A_FIELD = 24, 16  # a field is read once for several crops, of which neighbours in time are few
SMALL_WINDOWS = 0.75  # of the training, in which most windows are a half of the input: four times as fast
LEAST_LOGITS = 4.0  # that an object covers in a crop: of smaller ones nothing is learnt
ACROSS = 12, 56  # input pixels: how large a crop's zoom makes the image's typical object
ZOOM = 0.5, 4.0  # input pixels a pixel of the image, at least and at most
LONGEST = 2.0  # long side over short one, of crops that do not fill the input


class Clock:
    """Progress of a training that ends after some steps, some seconds, or what comes first."""

    def __init__(self, steps: float, seconds: float, spent: float = 0.0) -> None:
        self.steps, self.seconds, self.started = steps, seconds, time.time() - spent

    @property
    def spent(self) -> float:
        return time.time() - self.started

    def progress(self, step: int) -> float:
        """0 to 1; 1 is the end."""
        return min(1.0, max(step / self.steps, self.spent / self.seconds if math.isfinite(self.seconds) else 0.0))


class Source(Protocol):
    """Deterministic: the same step (and progress) gives the same batch."""

    images: int  # an epoch

    def batch(self, step: int, size: int, progress: float) -> list[Sample]:
        """Up to `size` samples of one window."""

    def held(self, first: int, count: int) -> list[Sample]:
        """Samples of some of the images (or of a crop of each) for validation, always the same; [] past the last."""


def held_out(image_id: str, share: float) -> bool:
    """Whether an image is for validation: by its id alone, so that it stays there whatever comes beside it."""
    return int(hashlib.sha256(image_id.encode()).hexdigest()[:8], 16) < share * 2**32


@dataclass(frozen=True)
class Labelled:
    """An image (a file, or a row of a file of embeddings) and the objects in it."""

    uri: str
    row: int
    image_id: str
    objects: Objects


class Embeddings:
    """Rows of a data set of embeddings, file by file in a shuffled order: one row a read, none is kept."""

    def __init__(
        self, storage: Storage, sizes: Architecture, chosen: Sequence[Labelled], kept: Sequence[Labelled], seed: int
    ) -> None:
        """`kept` are for validation."""
        self.storage, self.sizes, self.chosen, self.kept, self.seed = storage, sizes, chosen, kept, seed
        self.images = len(chosen)

    def batch(self, step: int, size: int, progress: float) -> list[Sample]:
        epoch, index = divmod(step, math.ceil(self.images / size))
        order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
        rng = np.random.default_rng((self.seed, epoch, index))
        chosen = [self.chosen[at] for at in order[index * size : (index + 1) * size]]
        return [sample for one in chosen if (sample := self._sample(one, rng)) is not None]

    def held(self, first: int, count: int) -> list[Sample]:
        rng = np.random.default_rng(first)
        chosen = self.kept[:MOST_VALIDATED][first : first + count]
        return [found for one in chosen if (found := self._sample(one, rng)) is not None]

    def _sample(self, one: Labelled, rng: np.random.Generator) -> Sample | None:
        (embedding,) = dataset.open_embeddings(self.storage, one.uri, [one.row])
        counts = one.objects.counts
        picked = rng.permutation(len(counts))[:OBJECTS]
        found = masks.decode([counts[at] for at in picked], one.objects.size)
        return training_samples.sample(one.image_id, embedding.array, self.sizes.image_size, self.sizes.patch, found)


@dataclass(frozen=True)
class LabelledImage:
    """`pixels` [h, w, 3] uint8, and `labels` [h, w] int32: 0, or the object a pixel belongs to."""

    image_id: str
    pixels: np.ndarray
    labels: np.ndarray


class Generated:
    """Fields of `jobs.synthetic`, none twice. `complete`: every object is labelled."""

    epoch, kept, complete = SYNTHETIC_EPOCH, VALIDATION_FIELDS, True

    def __init__(self, seed: int, scratch: bool = False) -> None:
        self.first, self.scratch = FIRST_SEED * (1 + seed), scratch

    def train(self, number: int) -> LabelledImage:
        seed = self.first + number
        easy = self.scratch and np.random.default_rng(seed).random() * EASY_FIELDS >= number
        return _generated(seed, FIELD_PX, EASY if easy else None)

    def validate(self, number: int) -> LabelledImage:
        return _generated(VALIDATION_SEED + number, FIELD_PX // (1 + number % 2))


def _generated(seed: int, side: int, kind: str | None = None) -> LabelledImage:
    from jobs import synthetic

    made = synthetic.field(seed, (side, side), kind)
    return LabelledImage(f"{SYNTHETIC}:{seed}", made.image, made.labels)


class Files:
    """Image files and their objects; where objects overlap, a pixel belongs to the last."""

    complete = False  # for all that we know

    def __init__(self, storage: Storage, limits: Limits, chosen: Sequence[Labelled], kept: Sequence[Labelled]) -> None:
        self.storage, self.limits, self.chosen, self.validated = storage, limits, chosen, kept[:MOST_VALIDATED]
        self.epoch, self.kept = len(chosen), len(self.validated)

    def train(self, number: int) -> LabelledImage:
        epoch, index = divmod(number, self.epoch)
        return self._read(self.chosen[np.random.default_rng(epoch).permutation(self.epoch)[index]])

    def validate(self, number: int) -> LabelledImage:
        return self._read(self.validated[number])

    def _read(self, one: Labelled) -> LabelledImage:
        pixels = preprocess.decode(self.storage.read(one.uri, self.limits.image_bytes), self.limits.image_pixels)
        labels = np.zeros(one.objects.size, np.int32)
        for index, counts in enumerate(one.objects.counts):
            labels[masks.decode([counts], one.objects.size)[0]] = index + 1
        return LabelledImage(one.image_id, pixels, labels)


class Images:
    """Crops of labelled images, turned and with other contrast: for training with the encoder."""

    def __init__(self, fields: Generated | Files, image_size: int, patch: int, unit: int, seed: int) -> None:
        """`unit`: what the side of a window must be a multiple of, in pixels."""
        self.fields, self.image_size, self.patch, self.seed = fields, image_size, patch, seed
        half = image_size // 2
        self.small = half if half % unit == 0 else image_size
        self.images = fields.epoch

    @cached_property
    def field(self) -> Callable[[int], LabelledImage]:
        return lru_cache(FIELDS_HELD)(self.fields.train)

    @cached_property
    def validated(self) -> Callable[[int], Sample | None]:
        return lru_cache(MOST_VALIDATED)(self._validated)

    def batch(self, step: int, size: int, progress: float) -> list[Sample]:
        rng = np.random.default_rng((self.seed, step))
        whole = rng.random() < (0.1 if progress < SMALL_WINDOWS else 0.9)
        window = self.image_size if whole else self.small
        made = []
        for index in range(step * size, (step + 1) * size):
            block, place = divmod(index, FIELDS_HELD * CROPS_A_FIELD)
            made.append(self._crop(self.field(block * FIELDS_HELD + place % FIELDS_HELD), window, rng))
        return [one for one in made if one is not None]

    def held(self, first: int, count: int) -> list[Sample]:
        found = [self.validated(number) for number in range(first, min(first + count, self.fields.kept))]
        return [one for one in found if one is not None]

    def _validated(self, number: int) -> Sample | None:
        one, rng = self.fields.validate(number), np.random.default_rng(number)
        return self._sample(one, *self._part(one, self.image_size, rng), self.image_size, rng)

    def _crop(self, one: LabelledImage, window: int, rng: np.random.Generator) -> Sample | None:
        pixels, labels = self._part(one, window, rng)
        return self._sample(one, *_turned(_relit(pixels, rng), labels, rng), window, rng)

    def _part(self, one: LabelledImage, window: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and labels of a square, or in a whole input at times less than that; at a random zoom."""
        areas = np.bincount(one.labels.ravel())[1:]
        across = math.sqrt(np.median(areas[areas > 0])) if areas.any() else 1.0
        zoom = np.clip(math.exp(rng.uniform(*np.log(ACROSS))) / across, *ZOOM)
        limit = min(one.labels.shape)
        sides = [min(round(window / zoom), limit)] * 2
        if window == self.image_size and rng.random() < 0.3:
            shorter = rng.integers(2)
            sides[shorter] = max(1, round(sides[shorter] / rng.uniform(1, LONGEST)))
        y, x = (rng.integers(0, length - side + 1) for length, side in zip(one.labels.shape, sides, strict=True))
        part = slice(y, y + sides[0]), slice(x, x + sides[1])
        return one.pixels[part], one.labels[part]

    def _sample(
        self, one: LabelledImage, pixels: np.ndarray, labels: np.ndarray, window: int, rng: np.random.Generator
    ) -> Sample | None:
        areas = np.bincount(labels.ravel())
        there = 1 + np.flatnonzero(areas[1:] > 1)
        if not len(there):
            return None
        picked = rng.permutation(there)[:OBJECTS]
        resized = preprocess.resize(pixels, window).pixels
        found = labels == picked[:, None, None]
        background = labels == 0 if self.fields.complete else None
        return training_samples.sample(one.image_id, resized, window, self.patch, found, LEAST_LOGITS, background)


def _turned(pixels: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    turns, flip = int(rng.integers(4)), rng.random() < 0.5
    turned = [np.rot90(plane, turns) for plane in (pixels, labels)]
    first, second = (np.ascontiguousarray(plane[:, ::-1] if flip else plane) for plane in turned)
    return first, second


def _relit(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another gamma and contrast, channels in another order, sometimes grey or inverted."""
    levels: Any = (np.arange(256) / 255) ** math.exp(rng.uniform(-0.5, 0.5))
    levels = (levels - 0.5) * rng.uniform(0.6, 1.2) + 0.5 + rng.uniform(-0.1, 0.1)
    levels = 1 - levels if rng.random() < 0.1 else levels
    relit = (levels.clip(0, 1) * 255 + 0.5).astype(np.uint8)[pixels]
    if rng.random() < 0.2:
        return np.repeat(relit.mean(2, keepdims=True).astype(np.uint8), 3, axis=2)
    return relit[..., rng.permutation(3)] if rng.random() < 0.3 else relit
