"""From a model's name in the settings to its split checkpoint on this node."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import deepcell, weights
from cluster import settings as settings_module
from cluster.errors import CellrayError, InvalidCheckpoint, InvalidSettings, NotFound
from cluster.settings import ModelSettings, Settings, WeightsSettings
from cluster.storage import Storage, join, mapped
from serve_app.contract import ModelInfo
from serve_app.model import checkpoint, modules, state

log = logging.getLogger(__name__)

CARD = "model.json"
PACKAGED = "packaged:"  # and a folder of serve_app/weights
PACKAGE = Path(__file__).parent / "weights"


def find(settings: Settings, name: str) -> ModelSettings:
    """The model's entry. Raises NotFound, naming those there are."""
    if name not in settings.models:
        raise NotFound(f"no model {name!r} in the settings; there are {', '.join(sorted(settings.models))}")
    return settings.models[name]


def prepare(settings: Settings, name: str) -> Path:
    """The folder with the model's two halves and `model.json`, fetched and split on first use, then kept.

    Raises:
        NotFound, Forbidden, Unavailable, InvalidCheckpoint, InvalidSettings
    """
    return _prepared(settings, name, find(settings, name))


def prepare_decoder(settings: Settings, name: str, chosen: WeightsSettings | None) -> Path:
    """The folder of the model's own halves, or, where one is `chosen`, of a checkpoint with the same encoder and
    another decoder, as jobs.finetune writes it.

    Raises:
        InvalidSettings: its encoder is another one. InvalidCheckpoint: it has no decoder. And as `prepare`.
    """
    own = prepare(settings, name)
    if chosen is None:
        return own
    folder = _prepared(settings, name, find(settings, name).model_copy(update=chosen.model_dump()))
    before, after = checkpoint.ModelCard.read(own), checkpoint.ModelCard.read(folder)
    if before.encoder_sha256 != after.encoder_sha256:
        raise InvalidSettings(
            f"{weights.public_source(chosen.source)} has another encoder ({after.encoder_sha256[:12]}…) than {name} "
            f"({before.encoder_sha256[:12]}…): only a decoder for the same embeddings can take its place"
        )
    if not after.decoder_sha256:
        raise checkpoint.no_decoder()
    return folder


def folder(settings: Settings, name: str) -> Path:
    """Where `prepare` keeps the model, whether it is there or not."""
    return weights.cache_folder(settings.weights_dir, name, _identity(find(settings, name)))


def _prepared(settings: Settings, name: str, model: ModelSettings) -> Path:
    folder = weights.cache_folder(settings.weights_dir, name, _identity(model))
    with weights.lock(folder.with_suffix(".lock")):
        if (folder / CARD).exists():
            return folder
        mirror = join(settings.weights_mirror, folder.name) if settings.weights_mirror and _remote(model) else None
        storage = Storage(settings.storage)
        if mirror and _is_there(storage, mirror):
            _pull(storage, mirror, folder)
            return folder
        split(settings, model, folder)
        if mirror:
            _push(storage, folder, mirror)
    return folder


def _remote(model: ModelSettings) -> bool:
    return "://" in model.source or deepcell.is_deepcell(model.source)


def _is_there(storage: Storage, mirror: str) -> bool:
    try:
        return storage.exists(join(mirror, CARD))
    except CellrayError as error:
        log.warning(f"{mirror} cannot be read, the weights are fetched from where they come from: {error}")
        return False


def _pull(storage: Storage, mirror: str, folder: Path) -> None:
    """What another node has split; checked, then put in place, the card last."""
    with mapped(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pulled-") as name:
            made = Path(name)
            storage.fetch(join(mirror, CARD), made / CARD)
            files = checkpoint.ModelCard.read(made).files()
            for file, sha256 in files.items():
                found = storage.fetch(join(mirror, file), made / file)
                if found != sha256:
                    raise InvalidCheckpoint(
                        f"{join(mirror, file)} has sha256 {found[:12]}…, its card says {sha256[:12]}…: delete "
                        f"{mirror}, and it is fetched and split anew"
                    )
            for file in (*files, CARD):
                os.replace(made / file, folder / file)


def _push(storage: Storage, folder: Path, mirror: str) -> None:
    """For the other nodes. One that cannot be reached is no reason not to serve here."""
    try:
        for file in (*checkpoint.ModelCard.read(folder).files(), CARD):
            storage.publish(join(mirror, file), folder / file)
    except CellrayError as error:
        log.warning(f"{mirror} does not get the weights, the other nodes fetch them too: {error}")


def split(
    settings: Settings, model: ModelSettings, out: Path, float16: bool = False
) -> tuple[checkpoint.ModelCard, checkpoint.State]:
    """Write a model's halves and `model.json` to the folder `out` → its card and the tensors they were made of.
    `float16`: whatever they were, which halves the files of a float32 model."""
    tensors, digest, trained = read(model, settings)
    if float16:
        tensors = {name: one if name in checkpoint.BESIDE else one.half() for name, one in tensors.items()}
    config = settings_module.read_mapping(model.modelconfig, settings.storage) if model.modelconfig else None
    source = weights.public_source(model.source)
    with mapped(str(out)):
        card = checkpoint.extract(
            tensors, out, source=source, source_sha256=digest, licence=model.licence, trained=trained, config=config
        )
    return card, tensors


@contextmanager
def opened(settings: Settings, name: str, licence: str = "unknown") -> Iterator[Path]:
    """The folder of a split model: one of the settings by name, one by `cellray extract`, or a checkpoint's, of that
    licence, which is split while it is needed.

    Raises:
        NotFound, Forbidden, Unavailable, InvalidCheckpoint, InvalidSettings
    """
    if name in settings.models:
        yield prepare(settings, name)
    elif (Path(name) / "model.json").is_file():
        yield Path(name)
    else:
        with tempfile.TemporaryDirectory(prefix="cellray-") as folder:
            split(settings, ModelSettings(source=name, licence=licence), Path(folder))
            yield Path(folder)


def read(model: ModelSettings, settings: Settings) -> tuple[checkpoint.State, str, bool]:
    """(tensors, sha256 of the source, whether trained) of a model's whole checkpoint."""
    if model.source.startswith(PACKAGED):
        folder = _packaged(model.source)
        card = checkpoint.ModelCard.read(folder)
        halves = (checkpoint.load_half(folder, half, card) for half in (checkpoint.ENCODER, checkpoint.DECODER))
        return {name: tensor for half in halves for name, tensor in half.items()}, card.source_sha256, card.trained
    if weights.is_seeded(model.source):
        made = modules.seeded(*weights.seed_of(model.source))
        return made, hashlib.sha256(model.source.encode()).hexdigest(), False
    kept = Path(settings.weights_dir).expanduser()
    with weights.fetched(model, Storage(settings.storage), kept) as (path, digest):
        return state.read(path), digest, True


def _packaged(source: str) -> Path:
    folder = PACKAGE / source.removeprefix(PACKAGED)
    if folder.parent != PACKAGE or not (folder / "model.json").is_file():
        there = ", ".join(sorted(PACKAGED + path.parent.name for path in PACKAGE.glob("*/model.json")))
        raise NotFound(f"no weights {source!r} come with this package; there are {there}")
    return folder


def _identity(model: ModelSettings) -> str:
    """What the cached split depends on; a local file that was replaced, or one in a folder, is another one."""
    local = not _remote(model) and not weights.is_seeded(model.source)
    path = _packaged(model.source) if model.source.startswith(PACKAGED) else Path(model.source).expanduser()
    files = weights.files(path) if local else []
    files += weights.files(Path(model.modelconfig).expanduser()) if model.modelconfig else []
    stamps = [f"{path.name} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in files]
    configured = [model.modelconfig] if model.modelconfig else []
    return "\n".join((model.source, model.sha256 or "", model.licence, *configured, *stamps))


def describe(name: str, card: checkpoint.ModelCard, runtime: str, device: str, dtype: str) -> ModelInfo:
    sizes = card.architecture
    return ModelInfo(
        name=name,
        family=card.family,
        image_size=sizes.image_size,
        patch=sizes.patch,
        channels=sizes.channels,
        encoder_sha256=card.encoder_sha256,
        decoder_sha256=card.decoder_sha256,
        detector_sha256=card.detector_sha256,
        licence=card.licence,
        trained=card.trained,
        runtime=runtime,
        device=device,
        dtype=dtype,
    )
