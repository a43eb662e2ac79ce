"""The gate: the rules hold for what is right, and each one fails for what is wrong."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster import settings
from cluster.errors import InvalidInput, InvalidSettings
from jobs import cli
from jobs import gate as command
from serve_app import contract, model_replicas
from serve_app.model import decoder, encoder, gate, modules, preprocess
from serve_app.model.decoder import Decoder
from serve_app.model.encoder import Encoder
from serve_app.model.gate import Model, Report
from serve_app.model.preprocess import ModelImage
from serve_app.model.prompts import DecodeRequest
from serve_app.model_replicas import DecoderReplica, EncoderReplica
from tests.weights_of_sam import extracted

pytest.importorskip("skimage")
openvino = pytest.importorskip("openvino")

from serve_app.model import openvino as runtime  # noqa: E402

needs_bf16 = pytest.mark.skipif(not runtime.supports_bfloat16(), reason="this processor has no bfloat16 arithmetic")
Images = list[tuple[str, ModelImage]]
Change = Callable[[torch.Tensor], torch.Tensor]
FLOAT32 = ["embedding", "logits", "scores"]
LESS = ["cosine of tokens, mean", "cosine of tokens, worst", "IoU of masks, mean"]


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class ChangedEncoder:
    """The inner encoder's answers, [B, C, g, g], spoilt."""

    def __init__(self, inner: Encoder, change: Change) -> None:
        self.inner, self.card, self.runtime, self.change = inner, inner.card, "spoilt", change

    def encode(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        return self.change(self.inner.encode(images).clone())


class ChangedDecoder:
    """The inner decoder's logits and scores, spoilt."""

    def __init__(self, inner: Decoder, logits: Change = same, scores: Change = same) -> None:
        self.inner, self.card, self.runtime, self.changes = inner, inner.card, "spoilt", (logits, scores)

    def logits(self, request: DecodeRequest) -> tuple[torch.Tensor, torch.Tensor]:
        logits, scores = self.inner.logits(request)
        return self.changes[0](logits.clone()), self.changes[1](scores.clone())

    def accepted(self, request: DecodeRequest, above: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise NotImplementedError


def noise(share: float) -> Change:
    """Adds noise whose norm is that share of the tensor's."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        return tensor + share * drawn * tensor.norm() / drawn.norm()

    return change


def one_token(tensor: torch.Tensor) -> torch.Tensor:
    """Turns the last token a little: one of padding, in an image that is not square."""
    tensor[:, :, -1, -1] = noise(0.3)(tensor[:, :, -1, -1])
    return tensor


@pytest.fixture(autouse=True)
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding is what takes the time."""
    monkeypatch.setattr(gate, "GRID", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extracted(modules.seeded("nano", 5), tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Model:
    model = Model(encoder.load(folder), decoder.load(folder))
    model.encoder.encode = once(model.encoder.encode)  # type: ignore[method-assign]
    model.decoder.logits = once(model.decoder.logits)  # type: ignore[method-assign]
    return model


def once(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Most tests ask the reference the same."""
    known: dict[tuple[bytes, bool], Any] = {}

    def ask(asked: Any) -> Any:
        key = pickle.dumps(asked), torch.is_autocast_enabled("cpu")
        if key not in known:
            known[key] = answer(asked)
        return known[key]

    return ask


@pytest.fixture(scope="module")
def trained(reference: Model) -> Model:
    """The same, taken for trained weights: rules with fixed limits."""
    return Model(SimpleEncoder(reference.encoder), reference.decoder)


class SimpleEncoder(ChangedEncoder):
    def __init__(self, inner: Encoder) -> None:
        super().__init__(inner, same)
        self.card = replace(inner.card, trained=True)


@pytest.fixture(scope="module")
def images() -> Images:
    pixels = preprocess.decode((files("skimage.data") / "coffee.png").read_bytes(), 10**8)
    return [
        ("coffee", preprocess.resize(pixels[100:250, 200:425], 256)),
        ("strip", preprocess.resize(pixels[200:220], 256)),
    ]


def broken(report: Report) -> list[str]:
    assert report.passed is not any(not one.passed for one in report.verdicts)
    return [one.rule.removeprefix("relative error of the ") for one in report.verdicts if not one.passed]


def test_faster_runtimes_pass_in_float32(folder: Path, reference: Model, images: Images) -> None:
    candidate = Model(encoder.load(folder, "openvino"), decoder.load(folder, "auto"))
    report = gate.run(reference, candidate, images, "float32")
    assert report.passed
    assert [row.image for row in report.rows] == ["coffee", "strip"]
    assert [row.candidate.masks for row in report.rows] == [(3 + 1 + 3 + 3) * 4] * 2
    assert all(0 < verdict.found <= verdict.limit == 1e-5 for verdict in report.verdicts)
    assert all(row.peer is None and row.candidate.iou > 0.9999 for row in report.rows)
    assert report.candidate.startswith("encoder openvino float32 on cpu, decoder ")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda e, d: Model(ChangedEncoder(e, noise(1e-3)), d), FLOAT32),
        (lambda e, d: Model(e, ChangedDecoder(d, logits=noise(1e-3))), ["logits"]),
        (lambda e, d: Model(e, ChangedDecoder(d, scores=noise(1e-3))), ["scores"]),
        (lambda e, d: Model(ChangedEncoder(e, lambda x: x * torch.nan), d), FLOAT32),
        (lambda e, d: Model(e, ChangedDecoder(d, torch.zeros_like, torch.zeros_like)), ["logits", "scores"]),
        (lambda e, d: Model(e, d), []),
    ],
    ids=["encoder", "logits", "scores", "nan", "zeros", "itself"],
)
def test_each_rule_of_float32_can_fail(
    reference: Model, images: Images, spoil: Callable[[Encoder, Decoder], Model], says: list[str]
) -> None:
    assert broken(gate.run(reference, spoil(reference.encoder, reference.decoder), images[:1], "float32")) == says


@pytest.mark.parametrize("table", ["rel_pos_h", "rel_pos_w", "pos_embed"])
def test_position_left_out_breaks_every_rule(reference: Model, images: Images, tmp_path: Path, table: str) -> None:
    state = modules.seeded("nano", 5)
    state |= {name: torch.zeros_like(tensor) for name, tensor in state.items() if name.endswith(table)}
    candidate = Model(encoder.load(extracted(state, tmp_path)), reference.decoder)
    assert broken(gate.run(reference, candidate, images[:1], "float32")) == FLOAT32
    assert broken(gate.run(reference, candidate, images[:1], "bfloat16")) == LESS


def test_limits_of_trained_weights(trained: Model, images: Images) -> None:
    for dtype, least in (("bfloat16", 0.99), ("float16", 0.99), ("int8", 0.98)):
        report = gate.run(trained, trained, images[:1], dtype)
        assert [verdict.limit for verdict in report.verdicts] == [0.999, 0.99, least]
        assert report.passed
        assert report.rows[0].peer is None


@pytest.mark.parametrize("weights", ["trained", "random"])
def test_each_rule_of_less_than_float32_can_fail(
    request: pytest.FixtureRequest, reference: Model, images: Images, weights: str
) -> None:
    stands: Model = request.getfixturevalue("trained") if weights == "trained" else reference

    def breaks(candidate: Model) -> list[str]:
        return broken(gate.run(stands, candidate, images[:1], "bfloat16"))

    assert breaks(stands) == []
    assert breaks(Model(ChangedEncoder(stands.encoder, one_token), stands.decoder)) == [LESS[1]]
    assert breaks(Model(stands.encoder, ChangedDecoder(stands.decoder, logits=noise(0.3)))) == [LESS[2]]
    assert LESS[0] in breaks(Model(ChangedEncoder(stands.encoder, noise(0.06)), stands.decoder))
    nan = Model(ChangedEncoder(stands.encoder, lambda x: x * torch.nan), stands.decoder)
    assert breaks(nan) == LESS


def test_the_worst_token_counts_wherever_it_is(trained: Model, images: Images) -> None:
    """The decoder attends to padding as well."""
    candidate = Model(ChangedEncoder(trained.encoder, one_token), trained.decoder)
    (row,) = gate.run(trained, candidate, images[:1], "bfloat16").rows
    assert row.candidate.worst < 0.99
    assert row.candidate.worst_inside > 0.999999


@needs_bf16
def test_bfloat16_passes_beside_that_of_torch(folder: Path, reference: Model, images: Images) -> None:
    candidate = Model(encoder.load(folder, "openvino", dtype="bfloat16"), decoder.load(folder, "auto"))
    report = gate.run(reference, candidate, images, "bfloat16")
    assert report.passed, report.verdicts
    for row in report.rows:
        assert row.peer is not None
        assert 1e-4 < 1 - row.peer.cosine < 1e-2  # it was bfloat16 that ran
        assert 1e-4 < 1 - row.candidate.cosine < 1e-2
    assert not gate.run(reference, candidate, images[:1], "float32").passed


def test_refusals(reference: Model, images: Images) -> None:
    with pytest.raises(InvalidSettings, match="no rules for dtype 'int4'; there are float32, bfloat16"):
        gate.run(reference, reference, images, "int4")
    with pytest.raises(InvalidInput, match="no images"):
        gate.run(reference, reference, [], "float32")


# The command


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "coins.png"
    path.write_bytes((files("skimage.data") / "coins.png").read_bytes())
    return str(path)


def test_the_command_as_users_type_it(tmp_path: Path, picture: str) -> None:
    path = tmp_path / "nano.pth"
    torch.save(modules.seeded("nano", 1), path)
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "gate", str(path), "--runtime", "reference", "--json", "--image", picture],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    found = json.loads(last)
    assert [row["image"] for row in found["rows"]] == [picture]
    assert found["passed"] is found["trained"] is True
    assert all(verdict["passed"] for verdict in found["verdicts"])
    assert sum(line.startswith("PASS") for line in table) == 3
    assert "weights trained" in table[0]


def test_the_samples_are_of_many_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict(command._images(settings.load(environ={}), [], 256))
    assert [*found] == ["cell.png", "coins.png", "rocket.jpg", "coffee.png", "strip of coffee.png"]
    assert len({image.original for image in found.values()}) == 5
    assert found["strip of coffee.png"].pixels.shape == (9, 256, 3)
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(InvalidSettings, match=r"pip install 'cellray\[samples\]', or --image"):
        list(command._images(settings.load(environ={}), [], 256))


def test_the_command_fails_what_is_wrong(
    picture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = encoder.RUNTIMES["reference"]
    nothing = lambda x: x * torch.nan  # noqa: E731
    monkeypatch.setitem(encoder.RUNTIMES, "flash", lambda *given: ChangedEncoder(load(*given), nothing))
    monkeypatch.setattr(decoder, "find_spec", lambda name: None)
    arguments = ["gate", "nano", "--runtime", "flash", "--device", "cpu", "--image", picture, "--json"]
    assert cli.main(arguments) == 1
    *table, last = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("FAIL") for line in table) == 3
    verdict = json.loads(last)["verdicts"][0]
    assert (verdict["passed"], verdict["found"], verdict["image"]) == (False, None, picture)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sam_vit_x"], "no checkpoint at"),
        (["nano", "--dtype", "bfloat16", "--runtime", "reference"], "runtime 'reference' computes in float32"),
        (["nano", "--dtype", "int4"], "no dtype 'int4'"),
        (["nano", "--runtime", "onnx"], "no runtime 'onnx'"),
        (["nano", "--device", "cuda:9"], "no device 'cuda:9'"),
        (["nano", "--image", "TEXT"], "not an image of"),
        (["nano", "--image", "MISSING"], "missing.png"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    (tmp_path / "notes.png").write_text("no image")
    paths = {"TEXT": str(tmp_path / "notes.png"), "MISSING": str(tmp_path / "missing.png")}
    assert cli.main(["gate", *(paths.get(one, one) for one in arguments)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("cellray gate: ")
    assert error.count("\n") == 1
    if "--image" in arguments:
        assert paths[arguments[-1]] in error


# The setting


class NoBfloat16:
    def get_property(self, *_: str) -> list[str]:
        return ["FP32", "INT8"]


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas can be made outside Ray."""
    monkeypatch.setattr(model_replicas, "_use_cores", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def nano(**fields: str) -> settings.Settings:
    return settings.load(environ={}, models={"nano": fields})


@needs_bf16
@pytest.mark.usefixtures("replica")
def test_replicas_compute_in_the_dtype_of_the_settings(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "ray.serve"):
        made = EncoderReplica(nano(dtype="bfloat16"), "nano")
        decodes = DecoderReplica(nano(dtype="bfloat16"), "nano")
    logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert made.encoder.runtime == "openvino bfloat16 on cpu"
    assert made.info().dtype == decodes.info().dtype == "bfloat16"
    assert "decoder nano: openvino bfloat16 on cpu, ready" in caplog.text
    assert "openvino bfloat16 on cpu (auto: OpenVINO is the fastest on a CPU)" in caplog.text
    assert EncoderReplica(nano(), "nano").info().dtype == "float32"


@pytest.mark.usefixtures("replica")
def test_replicas_refuse_what_would_be_slow_or_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InvalidSettings, match=r"'reference' computes in float32, not in bfloat16: set dtype to 'float3"
    ):
        EncoderReplica(nano(dtype="bfloat16", runtime="reference"), "nano")
    with monkeypatch.context() as patched:
        patched.setattr(encoder, "find_spec", lambda name: None)
        with pytest.raises(InvalidSettings, match=r"pip install 'cellray\[cpu\]'"):
            EncoderReplica(nano(dtype="bfloat16"), "nano")
    monkeypatch.setattr(runtime, "_core", NoBfloat16)
    with pytest.raises(InvalidSettings, match="needs a processor with AVX512-BF16 or AMX; use 'float32' here"):
        EncoderReplica(nano(dtype="bfloat16"), "nano")


def test_a_dtype_that_no_model_can_have() -> None:
    with pytest.raises(InvalidSettings, match=r"models\.nano\.dtype: .*'float32' or 'bfloat16'"):
        nano(dtype="float16")


def test_embeddings_of_two_dtypes_share_no_id() -> None:
    ids = {contract.embedding_id("image", "encoder", dtype) for dtype in ("float32", "bfloat16", "int8")}
    assert len(ids) == 3
