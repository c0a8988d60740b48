"""The benchmark in ONNX Runtime: it runs, and judges before it times."""

from __future__ import annotations

import copy
import json
import types
from pathlib import Path

import pytest
import torch

from benchmarks import models
from sep_attn import patch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from benchmarks import export

SMALL = ["--seconds", "0.01", "--threads", "1", "--batches", "1"]


@pytest.fixture
def two_layers(monkeypatch: pytest.MonkeyPatch) -> export.Part:
    """Two attention layers in place of the model, whose export takes long."""
    before = export.AttentionLayers([models.timm_attention(8), models.timm_attention(12)]).eval()
    after = copy.deepcopy(before)
    assert patch(after) == 2
    example = torch.randn(2, 8, 4, 16), torch.randn(2, 12, 4, 9)
    part = export.Part(before, after, example)
    monkeypatch.setattr(export, "build_parts", lambda _: ({"attention": part}, 2))
    return part


@pytest.mark.usefixtures("two_layers")
def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["--out", str(tmp_path), *SMALL]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"export.csv", "export.json"}
    result = json.loads((tmp_path / "export.json").read_text())
    assert {"torch", "onnxruntime", "opset", "commit", "cpu"} <= result["environment"].keys()
    (row,) = result["rows"]
    assert row["part"] == "attention" and row["batch"] == 1 and row["threads"] == 1
    assert 0.0 < row["timm error"] < 1e-5 and 0.0 < row["timm, patched error"] < 1e-5
    assert row["speed_up"] == pytest.approx(row["unpatched_ms"] / row["patched_ms"])
    products = {key: counts["Conv"] for key, counts in result["operators"]["attention"].items()}
    # Before, one product for score, key and value and one for the output; now one for each.
    assert products == {"timm": 2 * 2, "timm, patched": 2 * 4}
    assert "speed-up" in capsys.readouterr().out


def test_a_wrong_export_is_refused_and_not_timed(
    two_layers: export.Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = types.SimpleNamespace(
        opset_import=[types.SimpleNamespace(version=20)], graph=types.SimpleNamespace(node=[])
    )
    monkeypatch.setattr(export, "to_onnx", lambda *_: proto)
    zeros = [torch.zeros(1, *x.shape[1:]).numpy() for x in two_layers.example]
    monkeypatch.setattr(export, "onnxruntime_call", lambda *_, **__: lambda: zeros)
    monkeypatch.setattr(export.measure, "interleaved", lambda *_, **__: pytest.fail("timed"))
    assert export.main(["--out", str(tmp_path), *SMALL]) == 1
    result = json.loads((tmp_path / "export.json").read_text())
    assert "export of timm: result 0" in result["refused"] and result["rows"] == []
