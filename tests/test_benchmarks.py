"""The benchmarks themselves: fair turns, refusal of wrong results, fits, and small runs."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import (
    ceilings,
    environment,
    gpu,
    gpu_tables,
    measure,
    plots,
    registry,
    report,
    token_sweep,
)
from benchmarks.cpu import calls, memory, run, scaling, table, workload
from benchmarks.registry import CONTENDERS, MODES, OURS

CPU = torch.device("cpu")


class FakeClock:
    """A sampler that runs the call and says it took the next of the given seconds."""

    def __init__(self, **seconds: list[float]) -> None:
        self.left = {name: list(values) for name, values in seconds.items()}
        self.order: list[str] = []

    def call(self, name: str) -> measure.Call:
        return lambda: self.order.append(name)

    def sample(self, call: measure.Call, repeats: int) -> float:
        for _ in range(repeats):
            call()
        values = self.left[self.order[-1]]
        return values.pop(0) if len(values) > 1 else values[0]


def test_contenders_take_turns_and_the_median_counts() -> None:
    clock = FakeClock(a=[9.0, 0.1, 0.9, 0.2], b=[9.0, 0.3, 0.4, 5.0])
    timings = measure.interleaved(
        {"a": clock.call("a"), "b": clock.call("b")},
        seconds=0.0,
        min_rounds=3,
        sample=clock.sample,
        warmup_seconds=1e-9,  # one call each: of 9 s, so that no turn has a lead-in
    )
    assert clock.order[:2] == ["a", "b"]
    turns = [clock.order[start : start + 2] for start in (2, 4, 6)]
    assert all(sorted(turn) == ["a", "b"] for turn in turns)
    quartiles = (pytest.approx(0.15), pytest.approx(0.55))
    assert timings["a"] == measure.Timing(0.2, *quartiles, 3, (0.1, 0.9, 0.2))
    assert timings["b"].median == 0.4


def test_no_contender_always_follows_the_same_one() -> None:
    clock = FakeClock(a=[0.5], b=[0.5], c=[0.5])
    measure.interleaved(
        {name: clock.call(name) for name in "abc"},
        seconds=0.0,
        min_rounds=20,
        sample=clock.sample,
        warmup_seconds=0.0,
    )
    assert {"ab", "ac", "ba", "bc", "ca", "cb"} <= set(
        map("".join, itertools.pairwise(clock.order))
    )


def test_a_turn_opens_with_a_sample_that_does_not_count() -> None:
    clock = FakeClock(a=[0.03, 9.0, 0.03, 9.0, 0.05])  # warm-up, then twice a cold and a warm one
    timings = measure.interleaved(
        {"a": clock.call("a")},
        seconds=0.0,
        min_rounds=2,
        sample=clock.sample,
        warmup_seconds=0.01,
    )
    assert timings["a"].rounds == (0.03, 0.05)


def test_ratios_are_taken_within_a_round() -> None:
    mine = measure.Timing(2.0, 2.0, 2.0, 3, rounds=(2.0, 8.0, 2.2))
    theirs = measure.Timing(1.0, 1.0, 1.0, 3, rounds=(1.0, 4.0, 1.0))
    assert mine.ratio_to(theirs) == 2.0
    assert mine.ratios_to(theirs) == pytest.approx((2.0, 2.0, 2.1))


def test_a_fast_contender_is_sampled_more_often_in_its_turn() -> None:
    clock = FakeClock(fast=[1e-4], slow=[0.5])
    timings = measure.interleaved(
        {"fast": clock.call("fast"), "slow": clock.call("slow")},
        seconds=0.0,
        min_rounds=1,
        sample=clock.sample,
        warmup_seconds=1e-3,
    )
    samples = round(measure.TURN_SECONDS / measure.SAMPLE_SECONDS)
    assert timings["fast"].samples == pytest.approx(samples, abs=1)
    assert timings["slow"].samples == 1
    # Ten warm-up calls of 0.1 ms, then ten calls within each sample of 1 ms, the first not counted.
    assert clock.order.count("fast") == 10 + 10 * (1 + timings["fast"].samples)


def test_rounds_go_on_until_the_time_is_spent() -> None:
    clock = FakeClock(a=[0.1])
    timings = measure.interleaved(
        {"a": clock.call("a")}, seconds=1.05, sample=clock.sample, warmup_seconds=0.0
    )
    assert timings["a"].samples == 11


def test_no_round_is_an_error() -> None:
    with pytest.raises(ValueError, match="min_rounds is 0"):
        measure.interleaved({}, seconds=1.0, min_rounds=0)


def test_wall_clock_waits_for_the_device() -> None:
    order: list[str] = []
    sample = measure.wall_clock(lambda: order.append("wait"))
    assert sample(lambda: order.append("call"), 2) > 0
    assert order == ["wait", "call", "call", "wait"]


class FakeEvent:
    """A CUDA event on a clock that the timed calls move on."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.time - self.time


def test_events_time_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def call() -> None:
        FakeEvent.now += 3.0  # milliseconds

    sample = measure.sampler_for(torch.device("cuda"))
    assert sample(call, 4) == pytest.approx(3e-3)


def test_inputs_rotate_through_more_than_the_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for size in (1000, 2**20, 2**30):
        copies = measure.copies_beyond_cache(size, torch.device("cuda"))
        assert copies >= 2 and copies * size >= 2 * properties.L2_cache_size
    assert measure.copies_beyond_cache(1000, CPU) == 1
    seen: list[int] = []
    call = measure.rotated(seen.append, [1, 2, 3])
    for _ in range(4):
        call()
    assert seen == [1, 2, 3, 1]


def test_check_refuses_wrong_results() -> None:
    oracle = torch.linspace(-2, 2, 50, dtype=torch.float64)
    right = oracle.float()
    assert measure.check("right", [right], [oracle]) < 1e-6
    for wrong in (right * 1.01, right.masked_fill(oracle > 1.9, float("nan")), right[:-1]):
        with pytest.raises(measure.WrongResultError, match="wrong one: result 0"):
            measure.check("wrong one", [wrong], [oracle])


def test_check_allows_twice_the_error_of_plain_pytorch() -> None:
    oracle = torch.ones(4, dtype=torch.float64)
    plain = (oracle * (1 + 1e-2)).bfloat16()
    error = measure.check("plain", [plain], [oracle])
    assert measure.check("twice", [(oracle + 2 * error).bfloat16()], [oracle], [plain]) > error
    with pytest.raises(measure.WrongResultError, match="at most"):
        measure.check("four times", [(oracle + 4 * error).bfloat16()], [oracle], [plain])


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_fit_recovers_the_exponent_of_the_largest_tokens(exponent: float) -> None:
    tokens = [2**power for power in range(6, 15)]
    overhead = [1e-3 if n < 1024 else 0.0 for n in tokens]  # small N are flat and must not count
    seconds = [1e-7 * n**exponent + extra for n, extra in zip(tokens, overhead, strict=True)]
    assert token_sweep.fit_exponent(tokens, seconds) == pytest.approx(exponent)


def test_fit_can_take_every_point() -> None:
    tokens = [2**power for power in range(10, 21)]
    seconds = [1e-7 * n if n < 2**16 else 1e-7 * n**1.5 / 256 for n in tokens]
    assert token_sweep.fit_exponent(tokens, seconds) == pytest.approx(1.5)
    fitted = token_sweep.fit_exponent(tokens, seconds, octaves=None)
    assert fitted is not None and 1.0 < fitted < 1.5


def test_fit_needs_three_points() -> None:
    assert token_sweep.fit_exponent([64, 128], [1.0, 2.0]) is None
    assert token_sweep.fit_exponent([1, 2, 1024, 2048], [1.0, 1.0, 1.0, 1.0]) is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_matches_its_oracle(name: str, mode: str) -> None:
    contender = CONTENDERS[name]
    weights = contender.family.weights(128).to(CPU, torch.float32)
    x = registry.draw_tokens(2, 100, 128, CPU, torch.float32)
    module = contender.build(weights).train(mode == "training")
    expected = registry.expected_results(contender.family, weights, x, mode=mode)
    with torch.compiler.set_stance("force_eager"):  # compiling takes half a minute
        assert registry.verify(contender, module, x, expected, mode=mode) < 1e-5


def test_the_families_differ() -> None:
    x = registry.draw_tokens(1, 20, 64, CPU, torch.float32)
    attention = CONTENDERS["sdpa_block"]
    weights = registry.SEPARABLE.weights(64).to(CPU, torch.float32)
    expected = registry.expected_results(registry.SEPARABLE, weights, x, mode="forward")
    module = attention.build(registry.ATTENTION.weights(64).to(CPU, torch.float32))
    with pytest.raises(measure.WrongResultError):
        registry.verify(attention, module, x, expected, mode="forward")


class WrongLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * x


def test_a_wrong_contender_is_refused_and_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = WrongLayer()
    monkeypatch.setitem(
        CONTENDERS,
        "sdpa_block",
        dataclasses.replace(CONTENDERS["sdpa_block"], build=lambda weights: wrong),
    )
    settings = token_sweep.Settings(
        dim=16, tokens=(8, 16), contenders=("sdpa_block", OURS), seconds=0.0
    )
    sweep = token_sweep.Sweep(settings)
    sweep.run()
    rows = [row for row in sweep.rows if row["contender"] == "sdpa_block"]
    assert len(rows) == 2 * len(MODES)
    for row in rows:
        assert row["status"].startswith("refused: scaled_dot_product_attention block: result 0")
        assert row["milliseconds"] is None
        assert row["samples"] == 0
    assert wrong.calls == len(MODES)  # the check at the first N, and nothing after it
    assert all(row["samples"] > 0 for row in sweep.rows if row["contender"] == OURS)


def test_a_contender_stops_before_a_call_over_the_limit() -> None:
    settings = token_sweep.Settings(
        dim=16, tokens=(8, 16), contenders=("sdpa_block", OURS), seconds=0.0, call_limit=1e-9
    )
    sweep = token_sweep.Sweep(settings)
    sweep.run()
    by_tokens = {row["tokens"]: row for row in sweep.rows if row["contender"] == OURS}
    assert by_tokens[8]["status"] == "timed"
    assert by_tokens[16]["status"].startswith("stopped: a call at N = 16 would take about")


def test_a_contender_stops_before_its_memory_limit() -> None:
    quadratic, linear = CONTENDERS["multihead_attention"], CONTENDERS[OURS]
    sizes = [
        (c.peak_bytes(1, n, 64, "cpu", 4), n) for c in (quadratic, linear) for n in (2**12, 2**13)
    ]
    assert sizes[1][0] / sizes[0][0] > 3
    assert sizes[3][0] / sizes[2][0] == 2
    settings = token_sweep.Settings(
        dim=16, tokens=(8,), contenders=(OURS,), seconds=0.0, memory_limit=1024
    )
    sweep = token_sweep.Sweep(settings)
    sweep.run()
    assert sweep.rows[0]["status"].startswith("stopped: a call at N = 8 may take")


def test_token_sweep_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["multihead_attention", "sdpa_block", "literal_eager", OURS]
    arguments = ["--out", str(tmp_path), "--dim", "16", "--seconds", "0.01", "--threads", "1"]
    arguments += ["--tokens", "16", "32", "64", "--contenders", *names]
    assert token_sweep.main(arguments) == 0

    result = json.loads((tmp_path / "token_sweep.json").read_text())
    assert {"commit", "date", "cpu", "torch", "backend"} <= result["environment"].keys()
    assert len(result["rows"]) == 3 * len(MODES) * (len(names) + 1)
    for mode in MODES:
        assert set(result["exponents"][mode]) == {*names, "floor"}
    ours = [row for row in result["rows"] if row["contender"] == OURS]
    assert all(row["times_sep_attn"] == 1.0 and row["error"] < 1e-5 for row in ours)

    with (tmp_path / "token_sweep.csv").open() as file:
        lines = file.readlines()
    header = [line for line in lines if line.startswith("# ")]
    assert any(line.startswith("# torch: ") for line in header)
    assert len(list(csv.DictReader(lines[len(header) :]))) == len(result["rows"])

    picture = (tmp_path / "token_sweep.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert "exponent" in capsys.readouterr().out

    again = tmp_path / "again.png"
    assert plots.main([str(tmp_path / "token_sweep.json"), str(again)]) == 0
    assert again.stat().st_size > 10_000


def test_token_sweep_against_the_rates_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "copies_beyond_cache", lambda size, device: 3)
    settings = token_sweep.Settings(
        dim=16, tokens=(8, 16, 32), contenders=("timm_eager", OURS), seconds=0.0
    )
    sweep = token_sweep.Sweep(settings)
    sweep.rates = ceilings.GpuRates(flops=1e9, bandwidth=1e12)
    sweep.run(directory=tmp_path)
    floors = [r for r in sweep.rows if r["contender"] == "floor" and r["mode"] == "forward"]
    expected = [4 * n * 16**2 / 1e6 for n in (8, 16, 32)]
    assert [row["milliseconds"] for row in floors] == pytest.approx(expected)
    for row in sweep.rows:
        assert row["status"] == "timed"
        assert row["times_floor"] == pytest.approx(
            1.0 if row["contender"] == "floor" else row["milliseconds"] / _floor_of(row, sweep)
        )
    plots.token_sweep(sweep.result(), tmp_path / "token_sweep.png")


def _floor_of(row: dict[str, Any], sweep: token_sweep.Sweep) -> float:
    key = (row["mode"], row["tokens"], "floor")
    rows = {(r["mode"], r["tokens"], r["contender"]): r["milliseconds"] for r in sweep.rows}
    return rows[key]


def test_token_sweep_ends_in_time(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--tokens", "16", "--time-limit", "0"]
    assert token_sweep.main([*arguments, "--contenders", OURS, "--threads", "1"]) == 0
    rows = json.loads((tmp_path / "token_sweep.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"left out: the sweep's 0 s were over"}
    assert not (tmp_path / "token_sweep.png").exists()


SMALL = registry.LayerShape(4, 12, 16)


@pytest.mark.parametrize("shape", [SMALL, registry.LayerShape(1, 7, 8), registry.LAYER_SHAPES[0]])
def test_layouts_hold_the_same_slices(shape: registry.LayerShape) -> None:
    x = registry.draw_tokens(shape.slices, shape.tokens, shape.dim, CPU, torch.float32)
    image = registry.image_contender(shape).layout
    for layout in (registry.TOKENS, registry.PATCHES, image):
        taken = layout.from_tokens(x)
        assert taken.is_contiguous() and taken.numel() == x.numel()
        assert torch.equal(layout.to_tokens(taken), x)
    patches = registry.PATCHES.from_tokens(x)
    assert patches.shape == (1, shape.dim, shape.slices, shape.tokens)
    # timm's unfolding of the image gives timm's layout.
    pixels = image.from_tokens(x)
    patch_h, patch_w = shape.patch_size
    unfolded = F.unfold(pixels.transpose(0, 1), (patch_h, patch_w), stride=(patch_h, patch_w))
    assert torch.equal(unfolded.unsqueeze(0), patches)


def test_cpu_goals_cover_all_that_is_timed() -> None:
    assert set(table.GOALS) == {(mode, dtype) for mode in MODES for dtype in table.DTYPES[mode]}


def test_cpu_summary_is_the_mean_and_the_worst_over_shapes() -> None:
    case = table.Case(SMALL, "float32", "forward", 1)

    def timing(seconds: float) -> measure.Timing:
        return measure.Timing(seconds, seconds, seconds, 1, (seconds,))

    rows = []
    for ours in (1.0, 4.0):
        timings = {"timm_eager": timing(8.0), "floor": timing(2.0), "sep_attn": timing(ours)}
        operations = workload.Workload(SMALL).operations
        rows.append(table._row(case, "sep_attn", "timed", timings, 0.0, operations))
    tokens, *others = table.summarize(rows)
    assert (tokens["timm"], tokens["timm_worst"]) == (pytest.approx(4.0), 2.0)
    assert (tokens["floor"], tokens["floor_worst"]) == (pytest.approx(1.0), 2.0)
    assert tokens["compiled"] is None
    assert tokens["timm_goal"] == 2.5 and tokens["floor_worst_goal"] == 1.2
    assert all(line["timm"] is None for line in others)
    assert rows[0]["gflops"] == pytest.approx(4 * 4 * 12 * 16**2 * 1e-9)


def test_cpu_table_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--shapes", "4x12x16", "--seconds", "0"]
    with torch.compiler.set_stance("force_eager"):  # compiling takes a minute
        assert run.main([*arguments, "--threads", "1", "--parts", "table"]) == 0
    result = json.loads((tmp_path / "cpu.json").read_text())
    rows = result["rows"]
    lines = {(row["mode"], row["dtype"]) for row in rows}
    assert len(lines) == 4  # three dtypes forward and one in training
    for row in rows:
        assert row["status"] == "timed" and row["milliseconds"] > 0 and row["floor_ratio"] > 0
        assert row["contender"] == "floor" or row["error"] < 5e-2
    ours = [row for row in rows if row["contender"] in workload.LAYOUTS]
    assert len(ours) == 3 * len(lines)
    assert all((row["compiled_ratio"] is None) == (row["dtype"] != "float32") for row in ours)
    assert len(result["summary"]) == 3 * len(lines)
    text = (tmp_path / "cpu.md").read_text()
    assert text in capsys.readouterr().out
    for heading in (
        "### Forward, bfloat16, 1 thread",
        "### Forward + backward, float32, 1 thread",
    ):
        assert heading in text
    assert "| 4, 12, 16 " in text and f"| {torch.__version__}" in text
    with (tmp_path / "cpu.csv").open() as file:
        csv_rows = [line for line in file if not line.startswith("# ")]
    assert len(list(csv.DictReader(csv_rows))) == len(rows)
    assert is_picture(tmp_path / "cpu_roofline.png")


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_cpu_refuses_a_wrong_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = WrongLayer()
    monkeypatch.setitem(
        CONTENDERS, OURS, dataclasses.replace(CONTENDERS[OURS], build=lambda weights: wrong)
    )
    arguments = ["--out", str(tmp_path), "--shapes", "4x12x16", "--seconds", "0", "--quick"]
    assert run.main([*arguments, "--threads", "1"]) == 1
    result = json.loads((tmp_path / "cpu_quick.json").read_text())
    rows = {row["contender"]: row for row in result["rows"]}
    assert rows[OURS]["status"].startswith("refused: sep_attn.SeparableAttention: result 0")
    assert rows[OURS]["milliseconds"] is None and rows[OURS]["floor_ratio"] is None
    assert rows["sep_attn_image"]["milliseconds"] > 0
    assert wrong.calls == 1
    assert "refused: sep_attn" in capsys.readouterr().out


def test_cpu_draws_no_picture_of_half_precision_alone(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--shapes", "4x12x16", "--seconds", "0"]
    chosen = ["--parts", "table", "--dtypes", "bfloat16", "--passes", "forward"]
    assert run.main([*arguments, *chosen, "--threads", "1"]) == 0
    assert "### Forward, bfloat16, 1 thread" in (tmp_path / "cpu.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_cpu_leaves_out_what_no_time_is_left_for(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--shapes", "4x12x16", "--quick", "--time-limit", "0"]
    assert run.main([*arguments, "--threads", "1"]) == 0
    rows = json.loads((tmp_path / "cpu_quick.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"left out: the 0 s were over"}
    assert "left out" in (tmp_path / "cpu_quick.md").read_text()


def test_cpu_shapes_are_three_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.parse_shape("4x256x128") == registry.LayerShape(4, 256, 128)
    with pytest.raises(SystemExit):
        run.parse(["--out", "x", "--shapes", "4x256"])
    assert "'4x256' is no shape; expected" in capsys.readouterr().err


def test_cpu_parts_beside_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "TOKENS", (16, 32, 64))
    monkeypatch.setattr(memory, "SHAPES", (SMALL,))
    arguments = ["--out", str(tmp_path), "--seconds", "0", "--threads", "1"]
    assert run.main([*arguments, "--parts", "calls", "memory", "tokens"]) == 0
    result = json.loads((tmp_path / "cpu.json").read_text())
    for row in result["call_rows"]:
        assert row["call"] > 0
        if row["operator"] is not None:
            assert row["python"] == pytest.approx(row["call"] - row["operator"])
            assert row["overhead"] == pytest.approx(row["call"] - row["kernels"])
    assert len(result["memory_rows"]) == len(MODES) * 4
    assert {row["tokens"] for row in result["token_rows"]} == {16, 32, 64}
    text = (tmp_path / "cpu.md").read_text()
    for heading in ("## Small calls", "## Memory", "## Tokens"):
        assert heading in text
    assert is_picture(tmp_path / "cpu_tokens.png")


def test_cpu_thread_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "THREAD_SHAPES", (SMALL,))
    before = torch.get_num_threads()
    arguments = ["--out", str(tmp_path), "--seconds", "0", "--threads", "1", "2"]
    assert run.main([*arguments, "--parts", "threads"]) == 0
    assert torch.get_num_threads() == before
    rows = json.loads((tmp_path / "cpu.json").read_text())["thread_rows"]
    assert [row["speedup"] for row in rows if row["threads"] == 1] == [1.0] * 5
    assert all(row["speedup"] > 0 for row in rows)
    assert "speed-up on 2 |" in (tmp_path / "cpu.md").read_text()
    assert is_picture(tmp_path / "cpu_threads.png")


def test_cpu_thread_counts_end_with_all() -> None:
    assert scaling.thread_counts(1) == [1]
    assert scaling.thread_counts(4) == [1, 2, 3, 4]
    assert scaling.thread_counts(24) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 24]


def test_the_operators_are_called_as_the_module_calls_them() -> None:
    work = workload.Workload(SMALL)
    module = work.build(OURS)
    with torch.no_grad():
        operator = calls.operator_call(lambda: module(work.x))
        assert operator is not None
        (out,) = operator()
        assert torch.equal(out, module(work.x))
    assert calls.operator_call(lambda: nn.ReLU()(work.x)) is None
    step = workload.Workload(SMALL, mode="training").checked_call(OURS)
    operators = calls.operator_call(step)
    assert operators is not None
    forward, backward = operators()
    assert not forward[0].requires_grad
    grad_x, _, *grads = backward
    assert all(torch.equal(a, b) for a, b in zip((grad_x, *grads), step(), strict=True))


def test_memory_counts_what_is_held_at_once() -> None:
    x = torch.ones(1000)

    def twice_then_once() -> Tensor:
        first = x + 1
        second = first * 2
        del first
        return second - 1

    result, peak, held = memory.tensor_bytes(twice_then_once)
    assert held == 4000 and 8000 <= peak < 8100  # numbers become tensors of 4 bytes on the way
    assert result.shape == x.shape
    grown = memory.resident_bytes(lambda: torch.ones(2**22))
    assert grown is None or 15 * 2**20 < grown < 2**25  # of 16 MiB; the kernel counts in batches


def test_memory_of_timm_holds_what_its_backward_needs() -> None:
    work = workload.Workload(registry.LayerShape(4, 64, 32), mode="training")
    with work.gradients():
        row = memory._measure_layer(work, workload.TIMM, 1)
    # [B, 2 D + 1, P, N] of scores, keys and values, the activation and the gated values.
    assert 3 < row["kept_ratio"] < 5
    assert row["tensor_ratio"] > row["kept_ratio"] + 1


def test_cpu_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert ceilings.cpu_peaks([1]) == ceilings.CpuPeaks({}, {})
    monkeypatch.delenv("CXX")
    peaks = ceilings.cpu_peaks([1, 2])
    assert list(peaks.multiply_adds) == [1, 2]
    assert list(peaks.bf16_dot_products) in ([], [1, 2])
    for kind in (peaks.multiply_adds, peaks.bf16_dot_products):
        assert all(peak > 1e9 for peak in kind.values())


def test_floors() -> None:
    x = registry.draw_tokens(2, 8, 16, CPU, torch.float32)
    for mode in MODES:
        ceilings.cpu_products(x, mode=mode)()
    rates = ceilings.GpuRates(flops=1e12, bandwidth=1e9)
    assert ceilings.gpu_floor(rates, 1, 10, 4, 2, mode="forward") == 2 * 10 * 4 * 2 / 1e9
    rates = ceilings.GpuRates(flops=1e3, bandwidth=1e9)
    assert ceilings.gpu_floor(rates, 1, 10, 4, 2, mode="training") == 12 * 10 * 4**2 / 1e3


def test_environment_names_the_machine() -> None:
    described = environment.describe()
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["gpu"] is None
    assert all(described[key] for key in ("cpu", "cores", "python", "date", "sep_attn"))
    assert str(described["cpu"]) in environment.machine_line(described)
    json.dumps(described)


def test_report_of_no_rows(tmp_path: Path) -> None:
    report.write_csv(tmp_path / "empty.csv", [], {"torch": "2"})
    assert (tmp_path / "empty.csv").read_text() == "# torch: 2\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_refuses_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a GPU that torch can use"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="torch finds no GPU here"):
        token_sweep.main(["--out", str(tmp_path / "out"), "--device", "cuda"])


def test_gpu_steps_fail_and_end_on_their_own(tmp_path: Path) -> None:
    sleep = "import subprocess; subprocess.run(['sleep', '60'])"
    todo = [
        gpu.Step("good", ("-c", "print('all is well')"), 30),
        gpu.Step("bad", ("-c", "raise SystemExit('what went wrong')"), 30),
        gpu.Step("long", ("-c", sleep), 1),
        gpu.Step("last", ("-c", "import os; print('TRITON_INTERPRET' in os.environ)"), 30),
    ]
    said: list[str] = []
    outcomes = gpu.run(todo, tmp_path, time_limit=100, say=said.append)
    statuses = [outcome.status for outcome in outcomes]
    assert statuses == ["passed", "failed (exit 1)", "out of time", "passed"]
    assert any("what went wrong" in line for line in said)
    assert outcomes[2].seconds < 20
    log = (tmp_path / "log.txt").read_text()
    assert "all is well" in log and log.rstrip().endswith("False")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [step["status"] for step in summary["steps"]] == statuses
    assert summary["environment"]["torch"] == torch.__version__


def test_gpu_steps_cut_off_leave_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An interrupt comes first, on which pytest writes its report as this program does.
    monkeypatch.setattr(gpu, "LAST_WORDS", 60.0)  # they end the wait, however busy the machine is
    program = (
        "import pathlib, sys, time\n"
        "try:\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(0.2)\n"
        "    pathlib.Path(sys.argv[1]).write_text('test_a passed')\n"
    )
    report = tmp_path / "tests.xml"
    step = gpu.Step("tests", ("-c", program, str(report)), 6)
    (outcome,) = gpu.run([step], tmp_path, time_limit=60, say=print)
    assert outcome.status == "out of time"
    assert report.read_text() == "test_a passed"


def test_gpu_leaves_out_what_no_time_is_left_for(tmp_path: Path) -> None:
    outcomes = gpu.run([gpu.Step("any", ("-c", ""), 30)], tmp_path, time_limit=1, say=print)
    assert outcomes[0].status == "left out: no time was left"


def test_gpu_leaves_out_a_step_whose_program_is_missing(tmp_path: Path) -> None:
    step = gpu.Step("any", ("-c", ""), 30, under=("no-such-sanitizer",))
    (outcome,) = gpu.run([step], tmp_path, time_limit=100, say=print)
    assert outcome.status == "left out: no no-such-sanitizer here"
    given = gpu.Step("env", ("-c", ""), 30, ("env", "-u", "FIRST"), {"FIRST": "1", "SECOND": "2"})
    given = dataclasses.replace(
        given, arguments=("-c", "import os; print(os.environ.get('FIRST'), os.environ['SECOND'])")
    )
    (outcome,) = gpu.run([given], tmp_path, time_limit=100, say=print)
    assert outcome.status == "passed"
    assert (tmp_path / "log.txt").read_text().rstrip().endswith("None 2")


def test_gpu_steps_are_in_order_and_in_time(tmp_path: Path) -> None:
    names = [step.name for step in gpu.steps(tmp_path)]
    assert names == [
        *("build", "describe", "compile", "floor", "tests", "latency", "memory"),
        *("timm", "attention", "sanitizer", "token_sweep", "microbench"),
    ]
    assert set(gpu_tables.TABLES) <= set(names)
    assert gpu.TIME_LIMIT < 9 * 60
    for test_file in gpu.TESTS:
        assert (environment.REPOSITORY / test_file).exists()


def test_microbenchmarks_are_right() -> None:
    """Runs the microbenchmarks of one shape untimed; each compares its kernel with float64."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--benchmark-disable"]
    process = subprocess.run(
        [*command, "-k", "4x256x128", "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=environment.REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-3000:]
    assert "passed" in process.stdout
