"""The `cellray` command as users type it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cluster import settings
from jobs import cli
from serve_app import dataset, models
from serve_app.commit import ShardWriter
from serve_app.contract import Embedding
from serve_app.model import checkpoint, masks, modules, onnx
from serve_app.model.checkpoint import ModelCard
from serve_app.model.masks import MaskSet
from tests import cellsam_oracle


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save(modules.seeded("nano", 3), path)
    return path


def test_extract_says_where_every_parameter_went(
    nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["extract", str(nano), str(tmp_path / "out"), "--licence", "CC0"]) == 0
    printed = capsys.readouterr().out
    encoder, decoder = (load_file(tmp_path / "out" / f"{half}.safetensors") for half in ("encoder", "decoder"))
    state = modules.seeded("nano", 3)
    assert encoder.keys() | decoder.keys() == state.keys()
    assert not encoder.keys() & decoder.keys()
    assert all(name.startswith("image_encoder.") for name in encoder)
    card = json.loads((tmp_path / "out" / "model.json").read_text())
    assert (card["family"], card["licence"], card["trained"]) == ("nano", "CC0", True)
    assert card["encoder_sha256"] in printed
    parameters = sum(
        int(line.split()[3].replace(",", ""))
        for line in printed.splitlines()[1:]
        if line[:3] in ("enc", "dec") and "sha256" not in line
    )
    assert parameters == sum(tensor.numel() for tensor in state.values())


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.marker,))


def test_extract_refuses_what_is_no_checkpoint(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "code-was-run"
    files = {
        "cut.pth": nano.read_bytes()[:100_000],
        "text.pth": b"hello, this is no checkpoint",
        "empty.pth": b"",
        "evil.pth": pickle.dumps({"image_encoder.x": Evil(marker)}),
        "cut.safetensors": b"\x10\x00\x00\x00\x00\x00\x00\x00{",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"layer1.weight": torch.ones(3, 3)}, tmp_path / "other.pth")
    for name in [*files, "other.pth", "missing.pth"]:
        code = cli.main(["extract", str(tmp_path / name), str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert code in (1, 2), name
        assert error.count("\n") == 1, error
        assert name in error or "not a Segment Anything model" in error
        assert not (tmp_path / "out").exists()
    assert not marker.exists()


def test_extract_takes_folders_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = modules.seeded("nano", 3)
    folder = tmp_path / "saved"
    folder.mkdir()
    halves = [dict(list(state.items())[index::2]) for index in range(2)]
    for index, half in enumerate(halves):
        torch.save({f"module.{name}": tensor for name, tensor in half.items()}, folder / f"{index}.bin")
    files = {f"module.{name}": f"{index}.bin" for index, half in enumerate(halves) for name in half}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert cli.main(["extract", str(folder), str(tmp_path / "out")]) == 0
    assert load_file(tmp_path / "out" / "decoder.safetensors").keys() | load_file(
        tmp_path / "out" / "encoder.safetensors"
    ).keys() == set(state)
    torch.save({name: state[name] for name in state if name.startswith("image_encoder.")}, tmp_path / "half.pth")
    assert cli.main(["extract", str(tmp_path / "half.pth"), str(tmp_path / "half")]) == 0
    assert "no decoder: the checkpoint is an image encoder alone" in capsys.readouterr().out
    assert cli.main(["export-onnx", str(tmp_path / "half.pth"), str(tmp_path / "half.onnx")]) == 2
    assert "give the whole checkpoint" in capsys.readouterr().err
    (tmp_path / "file").write_bytes(b"")
    assert cli.main(["extract", str(folder), str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_export_onnx(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decoder.onnx"
    assert cli.main(["export-onnx", str(nano), str(out), "--licence", "CC0"]) == 0
    printed = capsys.readouterr().out
    said = onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map
    assert (said["model"], said["licence"], said["trained"]) == ("nano.pth", "CC0", "true")
    assert str(out) in printed
    assert said["decoder_sha256"] in printed
    before = out.read_bytes()
    assert cli.main(["export-onnx", str(nano), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["export-onnx", str(nano), str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert cli.main(["export-onnx", str(tmp_path / "missing.pth"), str(tmp_path / "b.onnx")]) == 1
    assert "missing.pth" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["decoder.onnx"]


@pytest.mark.parametrize("source", ["a name", "a folder by extract"])
def test_export_onnx_of(source: str, nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which model is exported; the export itself is another test's."""
    exported: list[ModelCard] = []

    def export(folder: Path, out: Path, name: str) -> dict[str, str]:
        exported.append(ModelCard.read(folder))
        out.write_bytes(b"")
        return {}

    monkeypatch.setattr(onnx, "export", export)
    (tmp_path / "a.onnx").write_bytes(b"before")
    card = checkpoint.extract(modules.seeded("nano", 0), tmp_path / "split", source="seeded:nano:0", source_sha256="")
    if source == "a name":
        card = ModelCard.read(models.prepare(settings.load(environ={}), "nano"))
    model = "nano" if source == "a name" else str(tmp_path / "split")
    assert cli.main(["export-onnx", model, str(tmp_path / "a.onnx"), "--overwrite"]) == 0
    assert [one.decoder_sha256 for one in exported] == [card.decoder_sha256]


def test_export_onnx_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["export-onnx", "--help"])
    printed = capsys.readouterr().out
    for name in ("image_embeddings", "point_coords", "point_labels", "has_mask_input", "orig_im_size", "low_res_masks"):
        assert name in printed


def test_show_draws_images_masks_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "grey.png"
    Image.fromarray(np.full((60, 80), 128, np.uint8)).save(image)
    mask = np.zeros((1, 60, 80), bool)
    mask[0, 10:30, 20:60] = True
    counts = masks.encode(mask)
    areas, boxes = masks.areas_and_boxes(counts, (60, 80))
    one = np.ones(1, np.float32)
    found = MaskSet((60, 80), counts, boxes, areas, one, one, np.zeros(1, np.int32), np.zeros((1, 4), np.float32))
    embedding = Embedding("e", "i", "nano", "h", (60, 80), (192, 256), np.zeros((4, 2, 2), np.float16))
    metadata = {"fingerprint": "f", "encoder_sha256": "h", "model": "nano", "trained": "false"}
    out = str(tmp_path / "out")
    from cluster.storage import Storage

    with ShardWriter(Storage(), out, "segment", 0, metadata) as writer:
        writer.add(dataset.MASKS, dataset.mask_rows(found, [embedding], str(image), "", "d", "box", ["{}"]))
        writer.add(dataset.ERRORS, dataset.error_row(str(tmp_path / "<b>.png"), "read", ValueError("cut short")))
        writer.commit()
    assert cli.main(["show", out, "--to", str(tmp_path / "sheet")]) == 0
    page = (tmp_path / "sheet" / "index.html").read_text()
    assert "80 × 60, 1 mask" in page
    assert "cut short" in page
    assert "untrained" in page
    assert "<b>.png" not in page
    sheet = np.asarray(Image.open(tmp_path / "sheet" / "contact.png").convert("RGB")).astype(int)
    coloured = (np.ptp(sheet, axis=2) > 60).sum()  # the picture is grey: what is coloured is the mask and red text
    assert coloured > 0.5 * 20 * 40 * (288 / 80) ** 2
    assert cli.main(["show", str(tmp_path / "nothing"), "--to", str(tmp_path)]) == 1
    assert "no data set" in capsys.readouterr().err


def test_inspect_and_extract_a_cellsam(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tree says who holds what, and counts every parameter; a modelconfig that does not fit is refused."""
    theirs = cellsam_oracle.renamed(modules.seeded("nano_cellsam", 0), 2)
    torch.save(theirs, tmp_path / "cellsam.pt")
    assert cli.main(["inspect", str(tmp_path / "cellsam.pt")]) == 0
    shown = capsys.readouterr().out
    lines = [line.split(maxsplit=3) for line in shown.splitlines() if "held by" in line]
    held = {line[3]: int(line[0].replace(",", "")) for line in lines}
    assert list(held) == ["Encoder", "Decoder", "CellFinder", "model.json", "nobody"]
    assert sum(held.values()) == 1 + sum(tensor.numel() for tensor in theirs.values())
    assert "0, 1, 3, 4\n" in shown  # blocks that are built alike
    assert "qkv  weight [576, 192]  bias [576]" in shown

    (tmp_path / "fits.yaml").write_text("nheads: 4\nenc_layers: 2\ndropout: 0.0\n")
    out = tmp_path / "out"
    arguments = ["extract", str(tmp_path / "cellsam.pt"), str(out), "--modelconfig", str(tmp_path / "fits.yaml")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "in advanced mode: model_cp is the Segment Anything model that counts" in shown
    card = checkpoint.ModelCard.read(out)
    assert card.detector is not None
    assert (card.detector.heads, card.detector_sha256 in shown) == (4, True)
    for text, message in (
        ("num_query_position: 3500", "modelconfig says num_query_position: 3500; the checkpoint has 150"),
        (
            "attention_type: nn.MultiheadAttention",
            "says attention_type: nn.MultiheadAttention; the checkpoint has RCDA",
        ),
        ("nheads: 5", "modelconfig says nheads: 5; expected a divisor of 64"),
        ("nheads: many", "modelconfig says nheads: many"),
    ):
        (tmp_path / "other.yaml").write_text(text)
        arguments = ["extract", str(tmp_path / "cellsam.pt"), str(tmp_path / "no"), "--modelconfig"]
        assert cli.main([*arguments, str(tmp_path / "other.yaml")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no" / "model.json").exists()
