"""What the paths of `jobs.finetune` come to: labels matched with embeddings or images, and what is held out of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from cluster.errors import InvalidInput, NotFound
from cluster.storage import Storage
from jobs import images, labels
from jobs.labels import Labels
from jobs.training_data import SYNTHETIC, Embeddings, Files, Generated, Images, Labelled, Source, held_out
from jobs.training_loop import Request
from serve_app import contract, dataset
from serve_app.model import preprocess
from serve_app.model.checkpoint import ModelCard

READERS = 4
Found = tuple[str, str, preprocess.Size, str, int]  # image id, image URI, (height, width), file, row


def source(request: Request, card: ModelCard) -> tuple[Source, str]:
    """What to train on, and a word on it.

    Raises:
        InvalidInput: embeddings of another encoder, a label of another size than its image, nothing left to train on.
        NotFound: the images and the labels have nothing in common.
    """
    sizes, seed, limits = card.architecture, request.plan.seed, request.settings.limits
    unit = sizes.patch * max(1, sizes.window)
    crops = partial(Images, image_size=sizes.image_size, patch=sizes.patch, unit=unit, seed=seed)
    if request.input == SYNTHETIC:
        made = Generated(seed, scratch=not card.trained)
        return crops(made), f"{SYNTHETIC} fields, {made.kept} for validation"
    storage = Storage(request.settings.storage)
    found = labels.read(storage, str(request.masks), limits)
    there = _images(request, storage) if request.plan.encoder else _embeddings(request, storage, card)
    chosen = matched(found, there, request)
    kept = [one for one in chosen if held_out(one.image_id, request.validation)]
    trained = [one for one in chosen if not held_out(one.image_id, request.validation)]
    if not trained:
        raise InvalidInput(f"all {len(chosen)} labelled images are held out: lower --validation, or label more")
    skipped = sum(one.objects.skipped for one in chosen)
    note = (
        f"{sum(len(one.objects.counts) for one in chosen)} objects in {len(chosen)} of {len(there)} images, "
        f"{len(kept)} of them for validation; {skipped} empty or one-pixel objects skipped"
    )
    if request.plan.encoder:
        return crops(Files(storage, limits, trained, kept)), note
    return Embeddings(storage, sizes, trained, kept, seed), note


def _embeddings(request: Request, storage: Storage, card: ModelCard) -> list[Found]:
    data = dataset.open(request.input, storage)
    rows: list[Found] = []
    for uri, record in data.files(dataset.EMBEDDINGS):
        if record.encoder_sha256 != card.encoder_sha256:
            raise InvalidInput(
                f"{data.uri} was made by another encoder ({record.encoder_sha256[:12]}…) than that of {request.model} "
                f"({card.encoder_sha256[:12]}…): embed the images with {request.model} first"
            )
        table = data.read(uri, ["image_id", "image_uri", "height", "width", "dtype"]).to_pylist()
        if any(one["dtype"] is None for one in table):
            raise InvalidInput(f"{data.uri} holds no embeddings: {dataset.POOLED_ONLY}")
        stands = data.stands(record, [one["image_uri"] for one in table])
        for row, (one, current) in enumerate(zip(table, stands, strict=True)):
            if current:
                rows.append((one["image_id"], one["image_uri"], (one["height"], one["width"]), uri, row))
    return rows


def _images(request: Request, storage: Storage) -> list[Found]:
    limits = request.settings.limits

    def one(file: images.File) -> Found:
        data = storage.read(file.uri, limits.image_bytes)
        pixels = preprocess.decode(data, limits.image_pixels)
        return contract.image_id(data), file.uri, (pixels.shape[0], pixels.shape[1]), file.uri, 0

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(one, images.files(storage, request.input)))


def matched(found: Labels, there: list[Found], request: Request) -> list[Labelled]:
    """The images that hold objects, each once. Raises what `source` raises."""
    chosen = {}
    for image_id, image_uri, size, uri, row in there:
        objects = found.find(image_id, image_uri)
        if objects is None:
            continue
        if objects.size != size:
            raise InvalidInput(
                f"{image_uri} has {size[1]} × {size[0]} pixels, its labels in {found.uri} "
                f"{objects.size[1]} × {objects.size[0]}: label the image itself, not a resized one"
            )
        chosen[image_id] = Labelled(uri, row, image_id, objects)
    if full := [one for one in chosen.values() if one.objects.counts]:
        return full
    if chosen:
        raise InvalidInput(f"the labels in {found.uri} hold no object of two pixels or more")
    raise NotFound(
        f"none of the {len(there)} images of {request.input} (like {there[0][1] if there else 'nothing'}) is labelled "
        f"in {found.uri} (like {found.example()})"
    )
