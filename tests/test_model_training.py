"""Training: the modules' own answers, targets, prompts, losses, and steps that learn, repeat and resume."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidInput
from serve_app.model import checkpoint, decoder, encoder, losses, modules, preprocess, training, training_samples
from serve_app.model.prompts import DecodeRequest, Prompts
from serve_app.model.training import Plan, Trainer
from serve_app.model.training_samples import DrawnPrompts, Sample
from tests.weights_of_sam import extracted, relative

PLAN = Plan(lr=1e-3, loss="bce", rounds=2, seed=1, encoder=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extracted(modules.seeded("nano", 3), tmp_path_factory.mktemp("nano"))


def discs(seed: int, window: int = 64, number: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Bright discs on dark ground: pixels [w, w, 3] uint8 and masks [N, w, w] bool."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:window, :window]
    centres, radii = rng.uniform(10, window - 10, (number, 2)), rng.uniform(5, 9, number)
    found = np.stack([(y - cy) ** 2 + (x - cx) ** 2 < r**2 for (cy, cx), r in zip(centres, radii, strict=True)])
    pixels = np.where(found.any(0), 200, 40) + rng.normal(0, 8, (window, window))
    return np.repeat(pixels.clip(0, 255).astype(np.uint8)[..., None], 3, 2), found


def sample(seed: int, window: int = 64) -> Sample:
    pixels, found = discs(seed, window)
    made = training_samples.sample(f"disc-{seed}", pixels, window, 8, found)
    assert made is not None
    return made


def embedded(seed: int) -> Sample:
    image = np.random.default_rng(seed).normal(size=(256, 32, 32)).astype(np.float16)
    made = training_samples.sample(f"embedding-{seed}", image, 256, 8, discs(seed, 200)[1])
    assert made is not None
    return made


def batch(step: int) -> list[Sample]:
    return [sample(2 * step), sample(2 * step + 1)]


def trained(folder: Path, steps: int, plan: Plan = PLAN) -> tuple[Trainer, list[float]]:
    trainer = Trainer(folder, plan)
    return trainer, [trainer.step(batch(step), step / 10).loss for step in range(steps)]


def test_modules_answer_as_the_references(folder: Path) -> None:
    trainer = Trainer(folder, Plan(1e-3, "focal", 1, 0))
    pixels, _ = discs(0, 256)
    reference = encoder.load(folder)
    trainer.network.encoder = reference.module  # type: ignore[attr-defined]
    normal = encoder.normalise([pixels], 256)
    with torch.no_grad():
        ours = trainer.network.encode(normal, (0, 0))
    expected = reference.encode([pixels])
    assert relative(ours, expected) < 1e-5
    boxes = np.array([[10, 20, 90, 120], [50, 60, 200, 220]], np.float32)
    one = Sample("x", expected[0].numpy(), 256, boxes, np.zeros((2, 128, 128), np.uint8))
    with torch.no_grad():
        prompts = DrawnPrompts(trainer.network, one, (0, 0), boxes=True)
        logits, scores = trainer.network.decode(expected.clone(), (0, 0), *training_samples.embedded([prompts]))
    request = DecodeRequest(expected[0].numpy(), (256, 256), Prompts(boxes=boxes))
    for outputs, multimask in ((slice(0, 1), False), (slice(1, None), True)):
        asked = DecodeRequest(request.embedding, request.original, request.prompts, multimask)
        masks, predicted = decoder.load(folder).logits(asked)
        assert relative(logits[:, outputs], masks) < 1e-4
        assert relative(scores[:, outputs], predicted) < 1e-4


@pytest.mark.parametrize(("loss", "learn"), [("focal", 1), ("bce", 3)])
def test_how_many_outputs_an_object_teaches(folder: Path, loss: str, learn: int) -> None:
    """Of the three for what may be whole, part or subpart: the best alone, or all, so that none finds parts."""
    trainer = Trainer(folder, Plan(1e-3, loss, 1, 0))
    made = embedded(0)
    trainer.step([replace(made, boxes=made.boxes[:1], masks=made.masks[:1])], 0.5)
    heads = (f"mask_decoder.output_hypernetworks_mlps.{index}.layers.0.weight" for index in (1, 2, 3))
    gradients = [trainer.network.working[name].grad for name in heads]
    assert sum(one is not None and bool(one.any()) for one in gradients) == learn


def test_windows_see_the_positions_of_their_place(folder: Path) -> None:
    """With attention in windows alone and no padding, a window of the image is encoded as if the rest were there."""
    trainer = Trainer(folder, PLAN)
    trainer.restore({**trainer.snapshot(), "state": modules.seeded("nano", 5)})
    for block in trainer.network.encoder.blocks:
        block.window_size = 8
        block.attn.rel_pos_h.data, block.attn.rel_pos_w.data = torch.randn(2, 15, 64)
    pixels = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        whole = trainer.network.encode(pixels, (0, 0))
        part = trainer.network.encode(pixels[..., 64:192, 128:256], (8, 16))
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # the neck looks one token far
    assert relative(part[inner], whole[..., 8:24, 16:32][inner]) < 1e-4


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([64, 128, 256]))
def test_coverage_keeps_to_the_image(height: int, width: int, window: int) -> None:
    """An image that is all object covers its share of the padded input, and nothing of the padding."""
    side = window // 2
    (covered,) = training_samples.coverage(np.ones((1, height, width), bool), window, side)
    high, wide = preprocess.input_size((height, width), window)
    assert covered[: high // 2, : wide // 2].min(initial=4) == 4
    assert not covered[-(-high // 2) :].any()
    assert not covered[:, -(-wide // 2) :].any()


def test_coverage_is_exact_where_pixels_and_samples_meet() -> None:
    found = np.random.default_rng(0).random((3, 64, 48)) < 0.5
    covered = training_samples.coverage(found, 64, 32)
    expected = np.zeros((3, 64, 64), int)
    expected[:, :, :48] = found
    np.testing.assert_array_equal(covered, expected.reshape(3, 32, 2, 32, 2).sum((2, 4)))


def test_objects_that_the_decoder_cannot_show_are_left_out() -> None:
    found = np.zeros((2, 2000, 2000), bool)
    found[0, 7, 7] = True  # between the places that are looked at
    assert training_samples.sample("x", np.zeros((256, 32, 32), np.float16), 256, 8, found) is None
    found[1, 500:900, 500:1000] = True
    made = training_samples.sample("x", np.zeros((256, 32, 32), np.float16), 256, 8, found)
    assert made is not None
    np.testing.assert_allclose(made.boxes, [[64, 64, 128, 115.2]], rtol=1e-5)


@pytest.mark.parametrize("plan", [PLAN, Plan(1e-3, "focal", 2, 1, True)])
def test_steps_reduce_the_loss_and_find_the_masks(folder: Path, plan: Plan) -> None:
    trainer = Trainer(folder, plan)
    same = batch(0)
    losses = [trainer.step(same, 0.1).loss for _ in range(25)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_decoder_alone_learns_and_leaves_the_encoder(folder: Path) -> None:
    trainer = Trainer(folder, Plan(1e-3, "focal", 3, 0))
    assert not any(name.startswith("image_encoder.") for name in trainer.weights())
    before = trainer.weights()
    losses = [trainer.step([embedded(0), embedded(1)], 0.1).loss for _ in range(6)]
    assert losses[-1] < losses[0]
    fixed = {name for name, tensor in trainer.weights().items() if torch.equal(tensor, before[name])}
    assert "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix" in fixed
    spared = ("gaussian_matrix", "k_proj.bias", "hypernetworks", "point_embed", "not_a_point", "mask_downscaling")
    assert all(any(part in name for part in spared) for name in fixed)  # a key's bias moves no softmax


def test_a_seed_repeats_and_another_does_not(folder: Path) -> None:
    first, again = trained(folder, 3)[1], trained(folder, 3)[1]
    assert first == again
    assert first != trained(folder, 3, Plan(1e-3, "bce", 2, 2, True))[1]


def test_resumed_training_equals_uninterrupted(folder: Path) -> None:
    whole, losses = trained(folder, 5)
    half, _ = trained(folder, 3)
    resumed = Trainer(folder, PLAN)
    resumed.restore(half.snapshot())
    assert [resumed.step(batch(step), step / 10).loss for step in (3, 4)] == losses[3:]
    assert all(torch.equal(tensor, resumed.weights()[name]) for name, tensor in whole.weights().items())


def test_no_weight_changes_where_the_loss_is_no_number(folder: Path) -> None:
    trainer = Trainer(folder, Plan(1e-3, "focal", 1, 0))
    good = embedded(0)
    bad = Sample("bad", np.full_like(good.image, np.nan), 256, good.boxes, good.masks)
    before = trainer.weights()
    assert np.isnan(trainer.step([good, bad], 0.5).loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.weights().items())
    assert np.isfinite(trainer.step([good], 0.5).loss)


def test_random_weights_start_afresh_with_the_encoder(folder: Path) -> None:
    state = Trainer(folder, PLAN).weights()
    assert not state["image_encoder.pos_embed"].any()
    assert torch.equal(
        Trainer(folder, Plan(1e-3, "bce", 1, 0)).weights()["mask_decoder.iou_token.weight"],
        modules.seeded("nano", 3)["mask_decoder.iou_token.weight"],
    )


@pytest.mark.parametrize("start", ["afresh", "decoder alone", "restored"])
def test_what_is_trained_is_what_the_result_computes(folder: Path, tmp_path: Path, start: str) -> None:
    trainer = Trainer(folder, PLAN if start != "decoder alone" else Plan(1e-3, "bce", 1, 1))
    trainer.step([embedded(0)] if start == "decoder alone" else batch(0), 0.1)
    if start == "restored":
        (before, trainer) = trainer, Trainer(folder, Plan(1e-3, "bce", 1, 2, True))
        trainer.restore(before.snapshot())
    card = checkpoint.extract(
        modules.seeded("nano", 3) | trainer.weights(), tmp_path, source="trained", source_sha256="0" * 64
    )
    pixels, found = discs(8, 256)
    array = encoder.load(tmp_path).encode([pixels])
    one = training_samples.sample("x", array[0].numpy(), 256, 8, found)
    assert one is not None
    with torch.no_grad():
        if trainer.network.encoder is not None:
            normal = encoder.normalise([pixels], 256, card.pixel_mean, card.pixel_std)
            assert relative(trainer.network.encode(normal, (0, 0)), array) < 1e-5
        prompts = DrawnPrompts(trainer.network, one, (0, 0), boxes=True)
        logits, _ = trainer.network.decode(array.clone(), (0, 0), *training_samples.embedded([prompts]))
    asked = DecodeRequest(one.image, (256, 256), Prompts(boxes=one.boxes))
    assert relative(logits[:, :1], decoder.load(tmp_path).logits(asked)[0]) < 1e-4


def test_clicks_lie_where_they_are_said_to(folder: Path) -> None:
    trainer = Trainer(folder, PLAN)
    one = sample(4)
    target = one.target("cpu")
    prompts = DrawnPrompts(trainer.network, one, (2, 1), False, torch.Generator())
    prompts.correct(torch.where(target > 0.5, -1.0, -2.0))  # all of it was missed
    prompts.correct(torch.ones_like(target))  # all the rest was taken in
    assert prompts.labels.tolist() == [[1, 1, 0]] * len(target)
    places = ((prompts.points + 0.5 - torch.tensor([8.0, 16.0])) / 2).floor().long()
    for own, points in zip(target, places, strict=True):
        assert [(own[y, x] > 0.5).item() for x, y in points.tolist()] == [True, True, False]


def with_background(seed: int, background: np.ndarray | None = None) -> Sample:
    pixels, found = discs(seed)
    clear = ~found.any(0) if background is None else background
    made = training_samples.sample(f"disc-{seed}", pixels, 64, 8, found, background=clear)
    assert made is not None
    return made


def test_clicks_beside_all_objects_lie_in_the_background(folder: Path) -> None:
    trainer, one = Trainer(folder, PLAN), with_background(4)
    count, target = len(one.boxes), one.target("cpu")
    assert one.background is not None
    prompts = DrawnPrompts(trainer.network, one, (2, 1), False, torch.Generator(), training_samples.NOWHERE)
    assert prompts.counted.tolist() == [True] * count + [False] * training_samples.NOWHERE
    assert prompts.labels.tolist() == [[1]] * (count + training_samples.NOWHERE)
    places = ((prompts.points[:, 0] + 0.5 - torch.tensor([8.0, 16.0])) / 2).floor().long().tolist()
    assert all(own[y, x] >= 0.5 for own, (x, y) in zip(target, places[:count], strict=True))
    assert [one.background[y, x] for x, y in places[count:]] == [
        training_samples.SUBSAMPLES**2
    ] * training_samples.NOWHERE
    prompts.correct(torch.full_like(prompts.targets, -1.0))
    assert prompts.points.shape == (count, 2, 2)


@pytest.mark.parametrize("why", ["boxes", "validation", "not all is labelled", "objects everywhere"])
def test_no_clicks_beside_objects(folder: Path, why: str) -> None:
    nothing = np.zeros((64, 64), bool)
    one = {"not all is labelled": sample(4), "objects everywhere": with_background(4, nothing)}.get(
        why, with_background(4)
    )
    trainer = Trainer(folder, PLAN)
    generator, nowhere = (None, 0) if why == "validation" else (torch.Generator(), training_samples.NOWHERE)
    prompts = DrawnPrompts(trainer.network, one, (0, 0), why == "boxes", generator, nowhere)
    assert prompts.counted.tolist() == [True] * len(one.boxes)


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_training_with_a_background_is_finite(folder: Path, loss: str) -> None:
    trainer = Trainer(folder, Plan(1e-3, loss, 2, 1, True))
    found = [trainer.step([with_background(0), with_background(1)], 0.1) for _ in range(5)]
    assert np.isfinite([(one.loss, one.iou_loss) for one in found]).all()


def test_what_is_found_beside_all_objects_has_an_iou_of_0(folder: Path) -> None:
    """Of a decoder that predicts an IoU of 100 for whatever it is asked, each click there is as wrong as can be."""
    trainer, one = Trainer(folder, Plan(1e-9, "focal", 1, 0)), with_background(4)
    fine = {name: getattr(one, name).repeat(4, -1).repeat(4, -2) for name in ("masks", "background")}
    given = replace(one, image=embedded(0).image, window=256, boxes=4 * one.boxes, **fine)
    state, head = trainer.weights(), "mask_decoder.iou_prediction_head.layers.2."
    state[head + "weight"][:], state[head + "bias"][:] = 0, 100
    trainer.restore({**trainer.snapshot(), "state": state})
    clicks = 1 + training_samples.NOWHERE / len(one.boxes)
    found = {round(trainer.step([given], 0.5).iou_loss / 100**2, 1) for _ in range(8)}
    assert found == {1.0, round(clicks, 1)}  # of boxes, and of clicks


@pytest.mark.parametrize("plan", [Plan(0, "bce", 1, 0), Plan(1e-3, "l2", 1, 0), Plan(1e-3, "bce", 0, 0)])
def test_plans_out_of_range_are_refused(folder: Path, plan: Plan) -> None:
    with pytest.raises(InvalidInput, match=r"expected|there are"):
        Trainer(folder, plan)


def test_the_rate_warms_up_and_falls() -> None:
    rates = [PLAN.rate(progress) for progress in np.linspace(0, 1, 101)]
    assert rates[0] < 0.1 * PLAN.lr < 0.9 * PLAN.lr < max(rates) <= PLAN.lr
    assert rates[-1] == pytest.approx(training.LAST_RATE * PLAN.lr)
    assert all(a >= b for a, b in pairwise(rates[5:]))
