"""The benchmark on photographs: it runs, judges before it times, and draws scores in place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import models, real_model

SMALL = ["--model", "mobilevitv2_050", "--seconds", "0.01", "--threads", "1"]


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert real_model.main(["--out", str(tmp_path), *SMALL]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"real_model.csv", "real_model.json", "context_scores.png"}
    result = json.loads((tmp_path / "real_model.json").read_text())
    assert result["patched_layers"] == 9
    assert result["photographs"] == ["china", "flower"]
    assert {"torch", "timm", "commit", "date", "cpu"} <= result["environment"].keys()
    cases = [(row["part"], row["batch"], row["threads"]) for row in result["rows"]]
    assert cases == [("model", 1, 1), ("attention", 1, 1), ("model", 2, 1), ("attention", 2, 1)]
    for row in result["rows"]:
        assert 0.0 < row["logit_difference_share"] + row["attention_error"] < 1e-5
        assert row["before_ms"] > 0.0 and row["after_ms"] > 0.0
        assert row["speed_up"] == pytest.approx(row["before_ms"] / row["after_ms"])
    assert "random weights" in capsys.readouterr().out


def test_a_wrong_model_is_refused_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def patch_and_spoil(model: nn.Module) -> int:
        layers = models.attention_layers(model)
        for layer in layers.values():
            nn.init.zeros_(layer.out_proj.weight)
        return len(layers)

    monkeypatch.setattr(real_model, "patch", patch_and_spoil)
    monkeypatch.setattr(real_model.measure, "interleaved", lambda *_, **__: pytest.fail("timed"))
    assert real_model.main(["--out", str(tmp_path), *SMALL]) == 1
    assert "refused to time a wrong result" in capsys.readouterr().out
    result = json.loads((tmp_path / "real_model.json").read_text())
    assert "patched model" in result["refused"] and result["rows"] == []


def test_photographs_are_upright_colour_squares() -> None:
    images = real_model.photographs()
    assert list(images) == ["china", "flower"]
    for image in images.values():
        assert image.shape == (3, 256, 256)
        assert 0.0 <= image.min() < 0.1 and 0.9 < image.max() <= 1.0
    china = images["china"]
    assert china[:, :40].mean() > china[:, -40:].mean()  # the sky is above the trees
    assert china[2, :40].mean() > china[0, :40].mean()  # and blue


def test_every_attention_layer_is_captured_as_the_model_feeds_it() -> None:
    model = models.timm_mobilevitv2("mobilevitv2_100")
    with torch.no_grad():
        inputs = real_model.capture_attention_inputs(model, torch.rand(1, 3, 256, 256))
    shapes = [tuple(x.shape) for x in inputs.values()]
    expected = [(1, 128, 4, 256)] * 2 + [(1, 192, 4, 64)] * 4 + [(1, 256, 4, 16)] * 3
    assert shapes == expected
    assert not any(layer._forward_pre_hooks for layer in models.attention_layers(model).values())
    stages = [len(real_model.stage_layers(inputs, stage)) for stage in (1, 2, 3)]
    assert stages == [2, 4, 3]


def test_context_scores_lie_where_timm_took_the_pixels_from() -> None:
    """One pixel that draws all attention of its patch position must light up at its own place."""
    layer, side, row, column = models.timm_attention(8), 8, 5, 2
    with torch.no_grad():
        layer.qkv_proj.weight.zero_()
        layer.qkv_proj.weight[0, 0] = 50.0
        pixels = torch.zeros(1, 8, side, side)
        pixels[0, 0, row, column] = 1.0
        # timm's own way from [B, C, H, W] to [B, C, P, N], patches of 2 x 2
        grid = pixels.reshape(1, 8, side // 2, 2, side // 2, 2).permute(0, 1, 3, 5, 2, 4)
        scores = real_model.context_scores(layer, grid.reshape(1, 8, 4, side * side // 4))[0]
    assert scores.shape == (side, side)
    assert scores[row, column].item() == pytest.approx(side * side / 4)
    same_position = torch.zeros(side, side, dtype=torch.bool)
    same_position[row % 2 :: 2, column % 2 :: 2] = True
    torch.testing.assert_close(scores[~same_position], torch.ones(3 * side * side // 4))
    assert scores[same_position].sum().item() == pytest.approx(side * side / 4)
