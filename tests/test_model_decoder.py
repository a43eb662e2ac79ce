"""Prompts in, masks out: what is refused and stays alone, chunks, RLE."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from segment_anything.modeling import Sam
from segment_anything.utils.amg import calculate_stability_score

from cluster.errors import CellrayError, Internal, InvalidEmbedding, InvalidInput, InvalidPrompt, InvalidSettings
from serve_app.model import checkpoint, decoder, encoder, masks, preprocess
from serve_app.model.decoder import Decoded, Decoder
from serve_app.model.masks import MaskSet
from serve_app.model.prompts import DecodeRequest, Prompts, point_grid
from tests import weights_of_sam
from tests.weights_of_sam import relative

pytest.importorskip("skimage")

SIZE = 200, 300  # height, width of the image asked about
BOX = np.array([[10, 20, 110, 120]], np.float32)
POINT = np.array([[[50, 60]]], np.float32)
ONE = np.ones((1, 1), np.int32)
PLANE = np.ones((1, 128, 128), np.float32)  # logits


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    path = files("skimage.data") / "coffee.png"
    return np.array(Image.open(str(path)).convert("RGB"))[: SIZE[0], : SIZE[1]]


@pytest.fixture(scope="module")
def state() -> checkpoint.State:
    return weights_of_sam.smooth_nano(3)


@pytest.fixture(scope="module")
def folder(state: checkpoint.State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_of_sam.extracted(state, tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def sam(state: checkpoint.State) -> Sam:
    return weights_of_sam.filled("nano", state)


@pytest.fixture(scope="module", params=["reference", "fast", "openvino"])
def nano(request: pytest.FixtureRequest, folder: Path) -> Decoder:
    """Every test runs on all decoders."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return decoder.load(folder, request.param)


@pytest.fixture(scope="module")
def embedding(folder: Path, image: np.ndarray) -> np.ndarray:
    """[256, 32, 32] float32."""
    return encoder.load(folder).encode([preprocess.resize(image, 256).pixels])[0].numpy()


@pytest.fixture(scope="module")
def request_(embedding: np.ndarray) -> DecodeRequest:
    """Three boxes."""
    boxes = np.array([[10, 20, 110, 120], [0, 0, 300, 200], [200.5, 50, 290, 180.25]], np.float32)
    return DecodeRequest(embedding, SIZE, Prompts(boxes=boxes))


def grid(side: int) -> Prompts:
    points = point_grid(side, SIZE)
    return Prompts(points=points, labels=np.ones(points.shape[:2], np.int32))


def found(answer: MaskSet | CellrayError) -> MaskSet:
    assert isinstance(answer, MaskSet), answer
    return answer


def assert_same(first: MaskSet, second: MaskSet) -> None:
    """But for rounding, which depends on the size of a batch."""
    assert len(first) == len(second)
    assert first.prompt_index.tolist() == second.prompt_index.tolist()
    assert min(map(masks.iou, first.decode(), second.decode())) > 0.99
    assert relative(first.predicted_iou, second.predicted_iou) < 1e-3
    assert relative(first.object_embeddings, second.object_embeddings) < 1e-2


# What is refused


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (Prompts(), "no prompt"),
        (Prompts(boxes=BOX[:, [2, 1, 0, 3]]), r"box 0 is inverted.*110\.0, 20\.0, 10\.0"),
        (Prompts(boxes=BOX[:, [0, 3, 2, 1]]), "box 0 is inverted"),
        (Prompts(boxes=BOX[:, [0, 1, 0, 3]]), "box 0 is inverted or empty"),
        (Prompts(boxes=np.concatenate([BOX, BOX + 190])), "box 1 .* leaves the image of 300 × 200"),
        (Prompts(boxes=BOX - 11), "box 0 .* leaves the image"),
        (Prompts(boxes=BOX * np.nan), "box 0 is not finite"),
        (Prompts(boxes=BOX * np.inf), "box 0 is not finite"),
        (Prompts(boxes=BOX[0]), r"boxes must be \[N, 4\].*found \[4\]"),
        (Prompts(boxes=BOX[:, :3]), r"found \[1, 3\]"),
        (Prompts(points=POINT), "points and labels go together"),
        (Prompts(boxes=BOX, labels=ONE), "points and labels go together"),
        (Prompts(points=POINT[0], labels=ONE), r"points must be \[N, K, 2\].*found \[1, 2\] and \[1, 1\]"),
        (Prompts(points=POINT, labels=ONE[0]), r"labels \[N, K\], found \[1, 1, 2\] and \[1\]"),
        (Prompts(points=POINT, labels=2 * ONE), "labels must be 1"),
        (Prompts(points=POINT, labels=-ONE), "all padding"),
        (Prompts(points=POINT * np.nan, labels=ONE), "not finite"),
        (Prompts(points=POINT + 300, labels=ONE), r"point \[350\.0, 360\.0\] lies outside the image of 300 × 200"),
        (Prompts(points=-POINT, labels=ONE), "lies outside"),
        (Prompts(boxes=np.repeat(BOX, 2, 0), points=POINT, labels=ONE), "2 boxes but 1 sets of points"),
        (Prompts(masks=PLANE[0]), r"masks must be \[N, h, w\] .*found \[128, 128\]"),
        (Prompts(boxes=np.repeat(BOX, 2, 0), masks=PLANE), r"with N = 2, found \[1, 128, 128\]"),
        (Prompts(masks=PLANE > 0), "finite floating-point logits"),
        (Prompts(masks=PLANE * np.nan), "finite floating-point logits"),
    ],
)
def test_prompts_that_do_not_fit(prompts: Prompts, expected: str) -> None:
    with pytest.raises(InvalidPrompt, match=expected) as caught:
        prompts.check(SIZE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prompts",
    [
        Prompts(boxes=np.array([[0, 0, 300, 200]], np.float32)),
        Prompts(points=np.array([[[300, 200], [-9, 999]]], np.float32), labels=np.array([[0, -1]])),
        Prompts(boxes=BOX, points=POINT, labels=-ONE),
        Prompts(boxes=BOX, points=POINT[:, :0], labels=ONE[:, :0]),
        Prompts(points=POINT[:, :0], labels=ONE[:, :0], masks=PLANE),
        Prompts(masks=PLANE.astype(np.float16)),
    ],
    ids=["whole image", "padding outside", "box with padding", "box, no points", "mask, no points", "float16 mask"],
)
def test_prompts_at_the_edge_of_what_fits(prompts: Prompts, nano: Decoder, request_: DecodeRequest) -> None:
    prompts.check(SIZE)
    assert len(found(decoder.segment(nano, [replace(request_, prompts=prompts)])[0])) == 1


def test_padding_points_change_nothing(nano: Decoder, request_: DecodeRequest) -> None:
    """segment_anything itself ends points without a box with one padding point, so here there are two."""
    points = np.concatenate([POINT, POINT + 30, POINT * 0 - 5], axis=1)
    first = Prompts(points=points, labels=np.array([[1, 0, -1]]))
    other = Prompts(points=points * [[[1], [1], [7]]], labels=np.array([[1, 0, -1]]))
    one, two = decoder.segment(nano, [replace(request_, prompts=asked) for asked in (first, other)])
    assert found(one).counts == found(two).counts


def test_what_is_not_there(folder: Path) -> None:
    for module in (encoder, decoder):
        with pytest.raises(InvalidSettings, match=r"no .*runtime 'slow'; there are .*reference"):
            module.load(folder, runtime="slow")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidSettings, match="no device 'cuda' here"):
            decoder.load(folder, device="cuda")


def test_no_such_device(folder: Path) -> None:
    with pytest.raises(InvalidSettings, match="gpu"):
        decoder.load(folder, device="gpu")


# One by one


def test_a_bad_request_fails_alone(nano: Decoder, request_: DecodeRequest) -> None:
    other = replace(request_, prompts=Prompts(points=POINT, labels=ONE), multimask=True)
    bad = [
        (replace(request_, prompts=Prompts(boxes=BOX * np.nan)), InvalidPrompt, "not finite"),
        (replace(request_, embedding=request_.embedding[:, :9]), InvalidEmbedding, "[256, 32, 32], found [256, 9, 32]"),
        (replace(request_, embedding=np.zeros(9, np.float32)), InvalidEmbedding, "made by another model?"),
        (
            replace(request_, prompts=Prompts(masks=PLANE[:, :9])),
            InvalidPrompt,
            "[N, 128, 128] logits, found [1, 9, 128]",
        ),
        (replace(request_, original=(0, 9)), InvalidInput, "image size (height, width) in pixels, found (0, 9)"),
    ]
    answers = decoder.segment(nano, [request_, *(wrong for wrong, _, _ in bad), other])
    for answer, (_, error, expected) in zip(answers[1:-1], bad, strict=True):
        assert type(answer) is error
        assert expected in str(answer)
    for asked, answer in ((request_, answers[0]), (other, answers[-1])):
        (alone,) = decoder.segment(nano, [asked])
        assert found(alone).counts == found(answer).counts


BAD_EMBEDDINGS = {
    "not finite": lambda good: np.full_like(good, np.nan),
    "whole numbers": lambda good: good.astype(np.int16),
    "objects": lambda good: good.astype(object),
    "other byte order": lambda good: good.astype(">f2"),
}


@pytest.mark.parametrize("kind", BAD_EMBEDDINGS)
def test_a_bad_embedding_fails_alone(kind: str, nano: Decoder, request_: DecodeRequest) -> None:
    bad = replace(request_, embedding=BAD_EMBEDDINGS[kind](request_.embedding))
    assert [type(answer) for answer in decoder.segment(nano, [bad, request_])] == [InvalidEmbedding, MaskSet]


class Failing:
    """A decoder that runs out of memory on several requests, and on two prompts."""

    def __init__(self, inner: Decoder) -> None:
        self.inner, self.card, self.chunk = inner, inner.card, inner.chunk

    def decode(self, requests: list[DecodeRequest]) -> list[Decoded]:
        if len(requests) > 1 or len(requests[0].prompts) == 2:
            raise torch.OutOfMemoryError("out of memory:\nsecrets")
        return self.inner.decode(requests)


def test_a_failure_of_ours_fails_alone_too(nano: Decoder, request_: DecodeRequest) -> None:
    two = replace(request_, prompts=request_.prompts.take(slice(2)))
    answers = decoder.segment(Failing(nano), [request_, two, request_])
    assert [type(answer) for answer in answers] == [MaskSet, Internal, MaskSet]
    assert "secrets" not in str(answers[1])


class FailingEncoder:
    """Runs out of memory on more than two images, and on black ones."""

    def __init__(self, inner: encoder.Encoder) -> None:
        self.inner, self.card, self.batches = inner, inner.card, []

    def encode(self, images: list[np.ndarray]) -> torch.Tensor:
        self.batches.append(len(images))
        if len(images) > 2 or not all(image.any() for image in images):
            raise torch.OutOfMemoryError("out of memory")
        return self.inner.encode(images)


def test_images_fail_alone_too(folder: Path) -> None:
    good, black = np.full((256, 99, 3), 50, np.uint8), np.zeros((256, 99, 3), np.uint8)
    wrong = [good[:99], good.astype(float), good[..., 0], good[..., [0, 1, 2, 2]], good[:, :0]]
    failing = FailingEncoder(encoder.load(folder))
    answers = encoder.embed(failing, [good, wrong[0], good, *wrong[1:], black, good], max_batch=4)
    kinds = ["ndarray", "InvalidImage", "ndarray", *["InvalidImage"] * 4, "Internal", "ndarray"]
    assert [type(answer).__name__ for answer in answers] == kinds
    assert max(failing.batches) == 4
    assert encoder.embed(failing, []) == []


def test_an_embedding_that_float16_cannot_hold_is_an_error(folder: Path) -> None:
    class Loud(FailingEncoder):
        def encode(self, images: list[np.ndarray]) -> torch.Tensor:
            return self.inner.encode(images) * torch.tensor([1.0, 1e6]).view(2, 1, 1, 1)

    answers = encoder.embed(Loud(encoder.load(folder)), [np.full((256, 99, 3), 50, np.uint8)] * 2)
    assert [type(answer) for answer in answers] == [np.ndarray, InvalidEmbedding]


def test_no_prompts_give_no_masks(nano: Decoder, request_: DecodeRequest) -> None:
    assert len(found(decoder.segment(nano, [replace(request_, prompts=Prompts(masks=PLANE[:0]))])[0])) == 0
    empty = found(decoder.segment(nano, [replace(request_, prompts=Prompts(boxes=BOX[:0]))])[0])
    assert len(empty) == 0
    assert empty.decode().shape == (0, *SIZE)
    assert (empty.boxes.shape, empty.object_embeddings.shape) == ((0, 4), (0, 256))
    full = found(decoder.segment(nano, [request_])[0])
    for field in ("boxes", "areas", "predicted_iou", "stability", "prompt_index", "object_embeddings"):
        assert getattr(empty, field).dtype == getattr(full, field).dtype
    assert decoder.segment(nano, []) == []


@pytest.mark.parametrize("limit", ["prompts", "pixels"])
def test_more_prompts_than_a_chunk(
    limit: str, nano: Decoder, request_: DecodeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one by one, to where rounding differs."""
    many = replace(request_, prompts=grid(5), multimask=True)
    parts = decoder.segment(nano, [replace(many, prompts=many.prompts.take(slice(i, i + 1))) for i in range(25)])
    alone = MaskSet.join(SIZE, [found(part) for part in parts], 256)
    alone = replace(alone, prompt_index=np.repeat(np.arange(25, dtype=np.int32), 3))
    if limit == "prompts":
        monkeypatch.setattr(nano, "chunk", 7)
    else:
        monkeypatch.setattr(decoder, "PIXELS_A_CHUNK", 5 * SIZE[0] * SIZE[1])
    assert_same(found(decoder.segment(nano, [many])[0]), alone)
    logits, scores = nano.logits(many)
    assert (logits.shape, scores.shape) == ((25, 3, 128, 128), (25, 3))


def test_float16_embeddings_are_taken_as_they_are(nano: Decoder, request_: DecodeRequest) -> None:
    half = request_.embedding.astype(np.float16)
    requests = [
        replace(request_, embedding=array) for array in (half, half.astype(np.float32), np.asfortranarray(half))
    ]
    first, *others = decoder.segment(nano, requests)
    for other in others:
        assert found(first).counts == found(other).counts
        assert np.array_equal(found(first).object_embeddings, found(other).object_embeddings)


# The columns of a mask set


@pytest.fixture(scope="module")
def sixteen(nano: Decoder, embedding: np.ndarray) -> tuple[DecodeRequest, MaskSet]:
    request = DecodeRequest(embedding, SIZE, grid(4), multimask=True)
    return request, found(decoder.segment(nano, [request])[0])


def test_columns_describe_the_masks(sixteen: tuple[DecodeRequest, MaskSet], nano: Decoder) -> None:
    request, answer = sixteen
    planes = answer.decode()
    assert planes.shape == (48, *SIZE)
    assert {0} < set(answer.areas.tolist()), "some masks are empty, most are not"
    assert answer.areas.tolist() == planes.sum((1, 2)).tolist()
    assert answer.boxes.tolist() == [box_of(plane) for plane in planes]
    logits, scores = nano.logits(request)
    full = decoder.upscale(logits.flatten(0, 1), SIZE, 256)
    assert np.array_equal(planes, (full > 0).numpy())
    assert np.array_equal(answer.predicted_iou, scores.flatten().numpy())
    expected = torch.nan_to_num(calculate_stability_score(full, 0.0, 1.0))  # theirs is 0 / 0 for nothing
    assert torch.equal(torch.from_numpy(answer.stability), expected)


def test_object_embedding_is_the_mean_under_the_mask(sixteen: tuple[DecodeRequest, MaskSet], nano: Decoder) -> None:
    request, answer = sixteen
    logits = nano.logits(request)[0].flatten(0, 1).numpy()
    rows = -(-preprocess.input_size(SIZE, 256)[0] // 2)  # two input pixels a logit
    for index in range(48):
        covered = logits[index] > 0
        covered[rows:] = False
        share = covered.reshape(32, 4, 32, 4).mean((1, 3))
        expected = np.zeros(256) if not share.any() else (request.embedding * share).sum((1, 2)) / share.sum()
        np.testing.assert_allclose(answer.object_embeddings[index], expected, rtol=1e-3, atol=1e-4)


@given(arrays(np.float32, (3, 7, 9), elements=st.floats(-4, 4, width=16)))
def test_stability_is_segment_anythings(logits: np.ndarray) -> None:
    expected = torch.nan_to_num(calculate_stability_score(torch.from_numpy(logits), 0.0, 1.0))
    assert torch.equal(decoder.stability(torch.from_numpy(logits)), expected)


def box_of(plane: np.ndarray) -> list[float]:
    """[x, y, w, h]; zeros of nothing."""
    y, x = np.nonzero(plane)
    if not len(y):
        return [0.0] * 4
    return [float(v) for v in (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1)]


PLANES = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)).flatmap(
    lambda shape: st.one_of(arrays(bool, shape), arrays(bool, shape, elements=st.booleans(), fill=st.just(False)))
)


@settings(deadline=None)
@given(PLANES)
def test_masks_survive_their_encoding(planes: np.ndarray) -> None:
    size = planes.shape[1:]
    counts = masks.encode(planes)
    assert np.array_equal(masks.decode(counts, size), planes)
    areas, boxes = masks.areas_and_boxes(counts, size)
    assert areas.tolist() == planes.sum((1, 2)).tolist()
    assert boxes.tolist() == [box_of(plane) for plane in planes]
    assert (areas.dtype, boxes.dtype) == (np.int64, np.float32)


def test_a_large_mask_survives_its_encoding() -> None:
    planes = np.zeros((1, 5000, 3000), bool)
    planes[0, 2500:, 10:] = True
    assert np.array_equal(masks.decode(masks.encode(planes), (5000, 3000)), planes)
    assert masks.areas_and_boxes(masks.encode(planes), (5000, 3000))[0] == planes.sum()


def test_no_masks_are_encoded_as_none() -> None:
    assert masks.encode(np.zeros((0, 4, 5), bool)) == []
    assert masks.decode([], (4, 5)).shape == (0, 4, 5)
    assert [column.shape for column in masks.areas_and_boxes([], (4, 5))] == [(0,), (0, 4)]


@pytest.mark.parametrize(("text", "size"), [("hello world", (20, 30)), ("é", (20, 30)), (None, (10, 30))])
def test_what_is_no_rle_is_refused(text: str | None, size: tuple[int, int]) -> None:
    text = text or masks.encode(np.ones((1, 20, 30), bool))[0]
    with pytest.raises(InvalidInput, match=f"{size[0]} × {size[1]} pixels"):
        masks.decode([text], size)


@pytest.mark.parametrize("text", ["", masks.encode(np.eye(20, dtype=bool)[None])[0]])
def test_an_rle_that_is_too_short_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="40 × 30 pixels"):
        masks.decode([text], (40, 30))


def test_take_and_join() -> None:
    rng = np.random.default_rng(0)

    def some(number: int) -> MaskSet:
        planes = rng.random((number, 6, 7)) > 0.5
        counts = masks.encode(planes)
        areas, boxes = masks.areas_and_boxes(counts, (6, 7))
        iou, stability = rng.random((2, number), np.float32)
        order, embeddings = np.arange(number, dtype=np.int32), rng.random((number, 4))
        return MaskSet((6, 7), counts, boxes, areas, iou, stability, order, embeddings)

    parts = [some(2), some(0), some(3)]
    joined = MaskSet.join((6, 7), parts, 4)
    assert np.array_equal(joined.decode(), np.concatenate([part.decode() for part in parts]))
    taken = joined.take(np.array([4, 0]))
    assert np.array_equal(taken.decode(), joined.decode()[[4, 0]])
    assert taken.areas.tolist() == joined.areas[[4, 0]].tolist()
    assert np.array_equal(taken.object_embeddings, joined.object_embeddings[[4, 0]])
    assert len(joined.take(np.array([], int))) == 0


def test_iou() -> None:
    one, two = np.zeros((2, 4, 4), bool)
    assert masks.iou(one, two) == 1.0
    one[:2], two[1:3] = True, True
    assert masks.iou(one, two) == pytest.approx(1 / 3)
