"""The tables measured on a GPU, their logic run on a CPU at small sizes."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu_tables, measure, registry, roofline
from benchmarks.gpu_tables import Settings
from benchmarks.registry import CONTENDERS, OURS, LayerShape

CPU = Settings(torch.device("cpu"), torch.float32, seconds=0.0)
TIMM = [LayerShape(8, 16, 32)] * 2 + [LayerShape(8, 4, 64)]
HEADER: dict[str, Any] = {"gpu": "a GPU", "torch": "2", "date": "2026-01-01"}


def test_floor_is_held_against_the_measured_rates() -> None:
    shapes = [LayerShape(4, 32, 32), LayerShape(1, 2048, 32)]
    settings = dataclasses.replace(CPU, rates=roofline.GpuRates(1e30, 1e9))
    short, long = gpu_tables.floor_rows(settings, shapes)
    assert (short["path"], long["path"]) == ("short", "long")
    assert short["floor us"] == pytest.approx(2 * 4 * 32 * 32 * 4 / 1e3)
    assert long["floor us"] == pytest.approx(3 * 2048 * 32 * 4 / 1e3)
    for row in (short, long):
        assert row["status"] == "timed" and row["target"] == 1.25
        assert row["times floor"] == row["us"] / row["floor us"]
        assert row["launches us"] > row["floor us"]


def test_timm_means_count_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {(16, "timm_eager"): 6.0, (4, "timm_eager"): 24.0}

    def measured(
        settings: Settings, shape: LayerShape, contenders: Any, *, mode: str
    ) -> tuple[dict[str, measure.Timing], dict[str, str]]:
        times = {c.key: seconds.get((shape.tokens, c.key), 3.0) for c in contenders}
        shapes = {c.layout.from_tokens(torch.zeros(8, 2, 3)).shape for c in contenders}
        assert shapes == {(2, 3, 4, 2)}
        timings = {key: measure.Timing(value, value, value, 1) for key, value in times.items()}
        return timings, dict.fromkeys(times, "timed")

    monkeypatch.setattr(gpu_tables, "measured", measured)
    rows = list(gpu_tables.timm_rows(CPU, TIMM))
    assert len({tuple(row) for row in rows}) == 1  # one set of columns
    means = [row for row in rows if row["target"] is not None]
    # What takes minutes to compile comes last.
    assert [(row["rival"], row["mode"]) for row in means] == [
        *(("timm_eager", mode) for mode in registry.MODES),
        *(("timm_max_autotune", mode) for mode in registry.MODES),
    ]
    assert [row["target"] for row in means] == [6.0, 4.0, 2.5, 1.8]
    # Two layers of ratio 2 and one of ratio 8; the compiled module takes as long as ours.
    for row in means[:2]:
        assert row["rival / sep_attn"] == pytest.approx((2 * 2 * 8) ** (1 / 3))
    for row in means[2:]:
        assert row["rival / sep_attn"] == pytest.approx(1.0)
    assert means[0]["status"] == "geomean over 3 of 3 layers"


def test_timm_is_compared_in_its_own_layout() -> None:
    with torch.compiler.set_stance("force_eager"):  # compiling takes half a minute
        rows = list(gpu_tables.timm_rows(CPU, TIMM[:1]))
    timed = [row for row in rows if row["target"] is None]
    assert [row["mode"] for row in timed] == ["forward", "training"] * 2
    assert all(row["status"] == "timed" for row in timed)
    assert all(row["rival / sep_attn"] > 0 for row in timed)


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of memory\nand more")


@pytest.mark.parametrize(
    "layer, state",
    [(Wrong(), "refused: timm LinearSelfAttention"), (Failing(), "failed: RuntimeError: out of")],
)
def test_a_wrong_or_failing_layer_is_not_timed(
    layer: nn.Module, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = dataclasses.replace(CONTENDERS["timm_eager"], build=lambda weights: layer)
    monkeypatch.setitem(CONTENDERS, "timm_eager", bad)
    rows = list(gpu_tables.timm_rows(CPU, TIMM[:1], rivals=("timm_eager",)))
    assert rows[0]["rival us"] is None and rows[0]["rival / sep_attn"] is None
    assert rows[0]["sep_attn us"] > 0
    assert f"timm_eager: {state}" in rows[0]["status"]
    assert rows[1]["rival / sep_attn"] is None
    assert rows[1]["status"] == "geomean over 0 of 1 layers"


def test_a_layer_that_fails_while_it_is_timed_costs_no_other_row() -> None:
    class Tiring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("out of memory")
            return CONTENDERS[OURS].build(weights)(x)

    weights = registry.SEPARABLE.weights(32).to("cpu", torch.float32)
    tiring = dataclasses.replace(CONTENDERS[OURS], build=lambda _: Tiring())
    timings, states = gpu_tables.measured(CPU, LayerShape(2, 16, 32), [tiring], mode="forward")
    assert timings == {} and states == {OURS: "failed: RuntimeError: out of memory"}


def test_attention_alone_and_in_a_batch() -> None:
    rows = list(gpu_tables.attention_rows(CPU, tokens=(64, 16), dim=128, work=64))
    assert [(row["batch"], row["tokens"]) for row in rows] == [(1, 64), (1, 16), (4, 16)]
    for row in rows:
        assert row["heads"] == 2 and row["target"] == 1.0 and row["status"] == "timed"
        assert row["sdpa_block / sep_attn"] == row["sdpa_block us"] / row["sep_attn us"]
    assert registry.num_heads(gpu_tables.ATTENTION_DIM) == 8
    assert set(gpu_tables.ATTENTION_TARGETS) <= set(gpu_tables.ATTENTION_TOKENS)


def test_latency_off_a_gpu_has_only_host_times() -> None:
    ours, timm = gpu_tables.latency_rows(CPU, LayerShape(1, 16, 32))
    assert (ours["contender"], timm["contender"]) == (OURS, "timm_eager")
    for row in (ours, timm):
        assert row["host us"] > 0 and row["launches"] is None and row["graph us"] is None


def test_host_time_is_taken_while_the_device_works() -> None:
    events: list[str] = []
    gpu_tables.host_microseconds(
        lambda: events.append("call"), lambda: events.append("wait"), rounds=2
    )
    calls = ["call"] * gpu_tables.HOST_CALLS
    assert events == ["wait", *calls, "wait", *calls, "wait"]


def test_a_figure_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that cannot capture a graph and has no profiler, the rest is still written."""

    def no_graph(*_: Any) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    gpu_settings = dataclasses.replace(CPU, device=torch.device("cuda"))
    real_measured, real_build = gpu_tables.measured, gpu_tables.build
    monkeypatch.setattr(gpu_tables, "measured", lambda _, *a, **k: real_measured(CPU, *a, **k))
    monkeypatch.setattr(gpu_tables, "build", lambda _, *a: real_build(CPU, *a))
    draw = registry.draw_tokens
    monkeypatch.setattr(
        registry, "draw_tokens", lambda b, n, d, _, dtype: draw(b, n, d, "cpu", dtype)
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_tables, "count_launches", lambda call: None)
    monkeypatch.setattr(gpu_tables, "graph_replay", no_graph)
    ours, timm = gpu_tables.latency_rows(gpu_settings, LayerShape(1, 16, 32))
    for row, key in ((ours, OURS), (timm, "timm_eager")):
        assert row["us"] > 0 and row["host us"] > 0
        assert row["launches"] is None and row["graph us"] is None
        assert row["status"].startswith(f"graph us of {key}: failed: RuntimeError: operation not")


def test_memory_of_one_is_written_where_the_other_fails() -> None:
    peaks = iter([0, 150])

    def peak(call: measure.Call) -> int:
        found = next(peaks)
        if not found:
            raise torch.OutOfMemoryError("out of memory")
        return found * 1_000_000

    (row,) = gpu_tables.memory_rows(CPU, TIMM[:1], peak)
    assert row["sep_attn MB"] == 150 and row["timm_eager MB"] is None
    assert row["sep_attn / timm_eager"] is None
    assert row["status"] == "timm_eager: failed: OutOfMemoryError: out of memory"


def test_memory_is_that_of_a_training_step() -> None:
    peaks = iter([600, 150, 900, 300])

    def peak(call: measure.Call) -> int:
        grad_x, *grads = call()
        assert grad_x.dim() == 4 and len(grads) == 4
        return next(peaks) * 1_000_000

    first, second = gpu_tables.memory_rows(CPU, [*TIMM[:2], LayerShape(1, 32, 16)], peak)
    assert (first["slices"], second["slices"]) == (8, 1)
    assert first["timm_eager MB"] == 600 and first["sep_attn / timm_eager"] == 0.25
    assert second["sep_attn / timm_eager"] == pytest.approx(1 / 3)
    assert first["sep_attn / x"] == 150e6 / (8 * 16 * 32 * 4)


def test_a_table_is_written_row_by_row(tmp_path: Path) -> None:
    row = {
        **{"slices": 1, "tokens": 16, "dim": 64, "path": "short", "us": 2.0, "floor us": 1.0},
        **{"launches us": 1.5, "times floor": 2.0, "target": 1.25, "status": "timed"},
    }

    def rows() -> Any:
        yield row
        assert len(json.loads((tmp_path / "floor.json").read_text())["rows"]) == 1
        yield row | {"us": None, "times floor": None, "status": "failed: out of memory"}

    gpu_tables.write_table("floor", rows(), HEADER, roofline.H100, tmp_path)
    result = json.loads((tmp_path / "floor.json").read_text())
    assert result["environment"] == HEADER and result["rates"]["flops"] == roofline.H100.flops
    lines = (tmp_path / "floor.csv").read_text().splitlines()
    found = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [line["status"] for line in found] == ["timed", "failed: out of memory"]
    assert (tmp_path / "floor.png").stat().st_size > 1000


def test_attention_has_a_picture_and_latency_has_none(tmp_path: Path) -> None:
    rows = gpu_tables.attention_rows(CPU, tokens=(16, 32), dim=64, work=32)
    gpu_tables.write_table("attention", rows, HEADER, roofline.H100, tmp_path)
    assert (tmp_path / "attention.png").stat().st_size > 1000
    rows = gpu_tables.latency_rows(CPU, LayerShape(1, 16, 32))
    gpu_tables.write_table("latency", rows, HEADER, roofline.H100, tmp_path)
    assert (tmp_path / "latency.json").exists() and not (tmp_path / "latency.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tables_are_refused_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu_tables.main(["floor", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
