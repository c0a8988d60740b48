"""The benchmark that compares the starts of a converted layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import convert_init
from sep_attn.initialization import FRESH, STARTS
from sep_attn.validation import ACTIVATIONS


def few_digits(seed: int) -> convert_init.Digits:
    data = all_digits(seed)
    return convert_init.Digits(
        data.train_images[:70], data.train_labels[:70], data.test_images, data.test_labels
    )


all_digits = convert_init.digits


def test_the_scans_are_split_by_digit() -> None:
    data = all_digits(0)
    assert data.train_images.shape == (1347, 1, 8, 8) and data.test_images.shape == (450, 1, 8, 8)
    assert data.train_images.min() == -1.0 and data.train_images.max() == 1.0
    for digit in range(10):
        share = (data.test_labels == digit).sum() / (
            (data.test_labels == digit).sum() + (data.train_labels == digit).sum()
        )
        assert 0.24 < share < 0.26
    assert not torch.equal(data.test_labels, all_digits(1).test_labels)


def test_training_lowers_the_loss() -> None:
    data, model = few_digits(0), convert_init.digits_vit(0, pool="avg")
    losses = list(convert_init.train(model, data, epochs=6, learning_rate=1e-3, seed=0))
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert 0.0 <= convert_init.evaluate(model, data)["accuracy"] <= 100.0


def test_every_start_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert_init, "digits", few_digits)
    arguments = ["--seeds", "1", "--epochs", "1", "--tune-epochs", "1", "--pool", "token"]
    assert convert_init.main(["--out", str(tmp_path), *arguments]) == 0
    lines = [
        line
        for line in (tmp_path / "convert_init_token.csv").read_text().splitlines()
        if not line.startswith("#")
    ]
    names = [convert_init.MULTI_HEAD, FRESH, *STARTS]
    measured = [tuple(line.split(",")[1:4]) for line in lines[1:]]
    models = [(convert_init.MULTI_HEAD, "")] + [
        (name, value_act) for value_act in ACTIVATIONS for name in (FRESH, *STARTS)
    ]
    assert measured == [(*model, epoch) for model in models for epoch in ("0", "1")]
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
