"""Tuning: which rows made-up timings give, and the table that is written."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import measure, tune
from benchmarks.registry import CONTENDERS, OURS, LayerShape
from sep_attn import SeparableAttention
from sep_attn.triton_kernels import configs
from sep_attn.triton_kernels.configs import Config

A, B, C = Config(64, 32, 4, 2), Config(128, 64, 8, 3, 2), Config(128, 128, 8, 2)


def test_the_fastest_wins() -> None:
    rows = tune.choose_rows({64: {A: 2.0, B: 1.0}, 256: {A: 1.0, B: 2.0}}, end=512)
    assert rows == {64: B, 512: A}


def test_rows_are_shared_where_one_configuration_does_as_well() -> None:
    measured = {
        64: {A: 1.00, B: 1.01, C: 1.30},
        128: {A: 1.50, B: 1.00, C: 1.01},
        256: {A: 1.50, B: 1.01, C: 1.00},
        512: {A: 1.00, B: 1.50, C: 1.50},
    }
    assert tune.choose_rows(measured, end=None) == {256: B, None: A}
    assert tune.choose_rows(measured, end=None, slack=0.0) == {64: A, 128: B, 256: C, None: A}


def test_what_was_picked_until_now_stays_where_it_is_as_good() -> None:
    measured = {64: {A: 1.00, B: 1.01}, 128: {A: 1.00, B: 1.01}}
    assert tune.choose_rows(measured, end=None) == {None: A}
    assert tune.choose_rows(measured, current=lambda _: B, end=None) == {None: B}
    assert tune.choose_rows(measured, current=lambda _: C, end=None) == {None: A}


def test_ties_do_not_depend_on_order() -> None:
    for timings in ({A: 1.0, B: 1.0}, {B: 1.0, A: 1.0}):
        assert tune.choose_rows({64: timings}, end=64) == {64: A}


def test_nothing_measured() -> None:
    assert tune.choose_rows({}, end=None) == {}
    with pytest.raises(ValueError, match="no candidate ran"):
        tune.choose_rows({64: {}}, end=None)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("written_configs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "gfx942"])
def test_the_table_is_written_and_read_again(arch: str, tmp_path: Path) -> None:
    source = tune.TABLE_FILE.read_text()
    tuned: dict[str, tune.Winners] = {
        "token_product_kernel": {64: A, None: B},
        "weight_grad_kernel.float32": {None: C},
    }
    written = tune.with_table(source, arch, tuned)
    path = tmp_path / "configs.py"
    path.write_text(written)
    module = load(path)
    assert module.config_of("token_product_kernel", arch, 2, 64) == A
    assert module.config_of("token_product_kernel", arch, 2, 65) == B
    assert module.config_of("weight_grad_kernel", arch, 4, 64) == C
    written_for = {("token_product_kernel", arch, 2), ("weight_grad_kernel", arch, 4)}
    for choice in configs.every_config():
        place = choice.kernel, choice.architecture, choice.itemsize
        if place not in written_for:
            assert module.config_of(*place, choice.channels_from) == choice.config
    assert set(module.TABLES) == {*configs.TABLES, arch}
    # A second writing changes nothing, nor does formatting.
    assert tune.with_table(written, arch, tuned) == written
    tune.write_table(path, arch, tuned)
    assert path.read_text() == written
    assert max(map(len, written.splitlines())) <= 100


def test_every_kernel_of_the_table_can_be_tuned() -> None:
    assert set(tune.WORKLOADS) == {name for name in configs.OTHER if "." not in name}
    for kernel in tune.WORKLOADS:
        served = [dim for dim in tune.CHANNELS if tune.serves(kernel, 2, dim)]
        assert served
        for dim in served:
            found = tune.candidates(kernel, dim)
            assert len(set(found)) == len(found) > 1
            assert tune.workload(kernel, dim).dim == dim
        rows = configs.rows_of(kernel, "other", 2)
        assert list(rows)[-1] == tune.reach(kernel, 2)
    for choice in configs.every_config(("sm_90",)):
        channels = choice.channels_to or choice.channels_from + 256
        assert choice.config in tune.candidates(choice.kernel, channels)


def test_tuning_measures_what_is_called_and_keeps_every_figure() -> None:
    asked: list[tuple[str, int, int]] = []

    def measure_one(kernel: str, itemsize: int, shape: LayerShape) -> tune.Timings:
        asked.append((kernel, itemsize, shape.dim))
        return {} if shape.dim == 128 else {A: 2.0, B: 1.0}

    kept: list[dict[str, Any]] = []
    kernels = ("slice_fwd_kernel", "token_product_kernel")
    tuned = tune.tune(kernels, (64, 128, 768), (2, 4), "any", measure_one, keep=kept.append)
    assert tuned == {
        "slice_fwd_kernel": {512: B},
        "slice_fwd_kernel.float32": {64: B},
        "token_product_kernel": {None: B},
        "token_product_kernel.float32": {None: B},
    }
    assert ("slice_fwd_kernel", 2, 768) not in asked and ("slice_fwd_kernel", 4, 128) not in asked
    assert len(kept) == 12 and kept[0]["microseconds"] == 2e6
    json.dumps(kept)


@pytest.mark.parametrize(
    "kernel, shape",
    [
        ("slice_fwd_kernel", LayerShape(2, 12, 16)),
        ("token_product_kernel", LayerShape(2, 20, 16)),
        ("value_gate_weights_bwd_kernel", LayerShape(1, 40, 16)),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter")
def test_candidates_take_turns_with_their_own_plans(
    kernel: str, shape: LayerShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from sep_attn.triton_kernels import attention

    small = [Config(16, 16, 4, 1), Config(32, 16, 4, 1)]
    launched: list[int] = []
    launch = attention.Launch.__call__
    plans = attention._plan_forward, attention._plan_backward

    def launch_and_note(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.kernel.fn.__name__ == kernel:
            launched.append(self.arguments["BLOCK_N"])
        launch(self, *args, **kwargs)

    def build(weights: Any) -> torch.nn.Module:
        module = SeparableAttention(weights.dim, backend="triton").to(weights.in_weight.dtype)
        for parameter, value in zip(module.parameters(), weights.tensors(), strict=True):
            parameter.data.copy_(value)
        return module

    def interleaved(calls: Any, **_: Any) -> dict[str, measure.Timing]:
        for name, call in [*calls.items(), *calls.items()]:
            launched.clear()
            call()
            assert set(launched) == {ast.literal_eval(name)[0]}
        times = {name: float(ast.literal_eval(name)[0]) for name in calls}
        return {name: measure.Timing(t, t, t, 1) for name, t in times.items()}

    monkeypatch.setattr(attention.Launch, "__call__", launch_and_note)
    monkeypatch.setattr(tune, "candidates", lambda *_: [*small, Config(16, 0, 4, 1)])
    monkeypatch.setattr(tune, "DTYPES", {2: torch.float16})
    monkeypatch.setattr(tune, "HOPEFUL", 3.0)
    monkeypatch.setattr(measure, "interleaved", interleaved)
    monkeypatch.setitem(CONTENDERS, OURS, dataclasses.replace(CONTENDERS[OURS], build=build))
    timings = tune.measure_candidates(kernel, 2, shape, torch.device("cpu"), seconds=0.0)
    # A tile of no columns cannot be: it drops out, and the others are timed.
    assert timings == {small[0]: 16.0, small[1]: 32.0}
    assert (attention._plan_forward, attention._plan_backward) == plans


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tuning_is_refused_without_a_gpu(tmp_path: Path) -> None:
    before = tune.TABLE_FILE.read_text()
    with pytest.raises(SystemExit, match="torch finds none here; the tables in"):
        tune.main(["--json", str(tmp_path / "out" / "tune.json")])
    assert not (tmp_path / "out").exists() and tune.TABLE_FILE.read_text() == before
