"""The paper's Figure 1: one layer of each attention unit against the number of tokens k.

d = 512, 8 heads, p = 256 for Linformer, one thread, as in the paper; and the operators in which
PyTorch spends most time at k = 256.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from linformer import LinformerSelfAttention
from torch import Tensor, nn

from benchmarks import measure, registry
from benchmarks.paper import units

DIM = 512
PROFILED_TOKENS = 256
TOP_OPERATORS = 5
# The batch-wise products in which the paper sees the bottleneck; the second is fused with softmax.
BATCHED = ("aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu")
PROJECTIONS = ("aten::mm", "aten::addmm")
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)


def _linformer(tokens: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = registry.num_heads(DIM)
        return LinformerSelfAttention(DIM, tokens, k=units.PROJECTED_TOKENS, heads=heads).eval()


def _registered(key: str, tokens: int) -> nn.Module:
    contender = registry.CONTENDERS[key]
    weights = contender.family.weights(DIM).to("cpu", torch.float32)
    return contender.build(weights).eval()


@dataclass(frozen=True)
class Unit:
    """A line of the figure; ``build`` takes k."""

    key: str
    label: str
    color: str
    marker: str
    build: Callable[[int], nn.Module]


def _unit(key: str, label: str) -> Unit:
    contender = registry.CONTENDERS[key]
    build = functools.partial(_registered, key)
    return Unit(key, label, contender.color, contender.marker, build)


UNITS = (
    _unit("multihead_attention", "multi-head: nn.MultiheadAttention"),
    _unit("sdpa_block", "multi-head: scaled_dot_product_attention"),
    Unit("linformer", "Linformer, p = 256", "#0072B2", "^", _linformer),
    _unit("literal_eager", "separable, plain PyTorch"),
    _unit("sep_attn", "separable, sep_attn"),
)


def _check(unit: Unit, module: nn.Module, x: Tensor) -> float:
    """Holds a layer against float64; see ``registry.verify``."""
    if unit.key in registry.CONTENDERS:
        contender = registry.CONTENDERS[unit.key]
        weights = contender.family.weights(DIM).to("cpu", torch.float32)
        expected = registry.expected_results(contender.family, weights, x, mode="forward")
        return registry.verify(contender, module, x, expected, mode="forward")
    expected = units.expected_output(copy.deepcopy(module).double(), x.double())
    return measure.check(unit.label, [module(x)], [expected])


@torch.no_grad()
def measure_tokens(tokens: int, *, seconds: float) -> list[dict[str, Any]]:
    """Checks, then times every unit at one k, batch 1, one thread.

    Raises:
        benchmarks.measure.WrongResultError: one is wrong; nothing is timed then.
    """
    x = registry.draw_tokens(1, tokens, DIM, "cpu", torch.float32)
    with measure.threads(1):
        modules = {unit.key: unit.build(tokens) for unit in UNITS}
        errors = {unit.key: _check(unit, modules[unit.key], x) for unit in UNITS}
        timings = measure.interleaved(
            {key: functools.partial(module, x) for key, module in modules.items()},
            seconds=seconds,
        )
    return [
        {
            "tokens": tokens,
            "unit": key,
            "milliseconds": timing.median * 1e3,
            "lower_quartile": timing.lower_quartile * 1e3,
            "upper_quartile": timing.upper_quartile * 1e3,
            "samples": timing.samples,
            "times_sep_attn": timing.ratio_to(timings["sep_attn"]),
            "error": errors[key],
        }
        for key, timing in timings.items()
    ]


@torch.no_grad()
def profile(unit: Unit, *, calls: int, tokens: int = PROFILED_TOKENS) -> dict[str, Any]:
    """Where the CPU time of one layer goes, by operator, each without those that it calls.

    Returns:
        ``top``, the ``TOP_OPERATORS`` with most time, largest first; ``batched_share`` and
        ``projection_share``, of all time, in ``BATCHED`` and in ``PROJECTIONS``.

    Raises:
        benchmarks.measure.WrongResultError: the layer is wrong.
    """
    x = registry.draw_tokens(1, tokens, DIM, "cpu", torch.float32)
    with measure.threads(1):
        module = unit.build(tokens)
        _check(unit, module, x)
        for _ in range(3):
            module(x)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(calls):
                module(x)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)  # microseconds
    largest = sorted(events, key=lambda event: event.self_cpu_time_total, reverse=True)

    def share(names: Sequence[str]) -> float:
        return sum(event.self_cpu_time_total for event in events if event.key in names) / total

    return {
        "unit": unit.key,
        "tokens": tokens,
        "batched_share": share(BATCHED),
        "projection_share": share(PROJECTIONS),
        "top": [
            {
                "operator": event.key,
                "calls": event.count / calls,
                "microseconds": event.self_cpu_time_total / calls,
                "share": event.self_cpu_time_total / total,
            }
            for event in largest[:TOP_OPERATORS]
        ],
    }
