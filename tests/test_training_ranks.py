"""Training by two processes on CPUs: the weights of one, errors of either, and checkpoints that one goes on from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from cluster.errors import Internal, Unavailable
from cluster.settings import Settings
from jobs import finetune
from jobs.finetune import prepared
from jobs.training_loop import Request, Training
from jobs.training_ranks import Ranks
from serve_app import models
from serve_app.model.training import Plan
from tests.conftest import App
from tests.test_finetune import Made
from tests.test_model_training import sample


def request(out: Path) -> Request:
    """In float64, as Adam divides by gradients that are zero but for their rounding."""
    plan = Plan(lr=1e-3, loss="bce", rounds=3, seed=1, encoder=True)
    settings = Settings.model_validate({"models": {"nano": {"source": "seeded:nano:3"}}})
    return Request(settings, "nano", "in", None, str(out), plan, 1, math.inf, 3, 0.1, None, "float64")


@pytest.fixture
def ranks(app: App, tmp_path: Path) -> Ranks:
    return Ranks(partial(prepared, request(tmp_path)), 2, gpus=0)


def test_two_processes_train_as_one(ranks: Ranks, tmp_path: Path) -> None:
    one = prepared(request(tmp_path))
    start = one.weights()
    samples = [sample(seed) for seed in range(4)]
    for progress, batch in ((0.1, samples[:3]), (0.2, []), (0.3, samples[3:])):  # shares of unlike sizes, and none
        alone, together = one.step(batch, progress), ranks.step(batch, progress)
        assert [together.loss, together.iou_loss, together.iou] == pytest.approx(
            [alone.loss, alone.iou_loss, alone.iou], rel=1e-5, nan_ok=True
        )
    assert ranks.step_count == one.step_count == 3
    for name, tensor in ranks.weights().items():
        expected = one.weights()[name]
        assert (tensor - expected).norm() <= 1e-4 * (expected - start[name]).norm(), name
    assert ranks.evaluate(iter(samples)) == pytest.approx(one.evaluate(samples), rel=1e-4)

    before = ranks.snapshot()
    bad = replace(samples[0], image=np.full((64, 64, 3), np.nan, np.float32))
    assert math.isnan(ranks.step([*samples[:3], bad], 0.4).loss)  # the second process's alone
    after = ranks.snapshot()
    assert after["step"] == ranks.step_count == 3
    assert all(torch.equal(tensor, after["state"][name]) for name, tensor in before["state"].items())
    with pytest.raises(Internal, match="failed with RuntimeError: permute"):  # likewise
        ranks.step([samples[0], replace(samples[1], image=np.zeros((9, 9), np.uint8))], 0.5)
    with pytest.raises(Unavailable, match="died"):
        ranks.step(samples, 0.5)


def test_a_process_that_dies_ends_all_and_one_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    class Pixels(Made):
        def batches(self, first: int, *_: object) -> Iterator[list[object]]:  # type: ignore[override]
            for step in range(first, 100):
                yield [sample(step + index) for index in range(3)]

        def held(self) -> Iterator[object]:  # type: ignore[override]
            yield sample(9)

    asked = request(tmp_path)
    folder = models.prepare(asked.settings, asked.model)
    (told,) = Training(asked, ranks, 9, Pixels(), lambda: True).run(folder)
    assert told.images == 3
    ray.kill(ranks.ranks[1])
    with pytest.raises(Unavailable, match=r"died.*goes on"):
        list(Training(asked, ranks, 9, Pixels(), lambda: False).run(folder))
    *_, last = Training(asked, prepared(asked), 9, Pixels(), lambda: False).run(folder)
    assert (last.images, last.line is not None) == (9, True)
    whole = replace(asked, out=str(tmp_path / "whole"))
    *_, alone = Training(whole, prepared(whole), 9, Pixels(), lambda: False).run(folder)
    assert last.loss == pytest.approx(alone.loss, rel=1e-4)


def test_more_gpus_than_there_are(app: App, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = finetune.main(
        [str(tmp_path), "--full", "synthetic", "--model", "nano", "--config", app.config, "--gpus", "99"]
    )
    assert code == 2
    assert "--gpus 99: the cluster has" in capsys.readouterr().err
