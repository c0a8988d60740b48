"""Small calls: what a call costs above the work, at a shape where the work is microseconds.

The module is called from Python on one thread, in evaluation and without gradients. Its operator is
the call that the module makes to the dispatcher, found by watching one and then made again with the
same arguments. The same two with a batch of no images do everything but the work, so their
difference to the full call is the kernels' own time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure, report
from benchmarks.cpu.workload import FLOOR, LAYOUTS, TIMM, Workload, contender
from benchmarks.registry import LayerShape

SHAPE = LayerShape(4, 16, 64)
CALL_GOAL, OVERHEAD_GOAL = 25.0, 8.0  # microseconds, at most


class _OperatorCalls(TorchDispatchMode):
    """Keeps the package's operators that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[measure.Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "sep_attn":
            self.calls.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def operator_call(call: measure.Call) -> measure.Call | None:
    """The operators that ``call()`` calls, forward and backward, without the way to them and
    without autograd; None if it calls none."""
    with _OperatorCalls() as watched:
        call()
    return partial(_run_all, watched.calls) if watched.calls else None


@torch.no_grad()
def _run_all(calls: Sequence[measure.Call]) -> list[Any]:
    with torch._C._AutoDispatchBelowAutograd():  # as the layer calls them
        return [call() for call in calls]


@torch.no_grad()
def measure_calls(shape: LayerShape = SHAPE, *, seconds: float) -> list[dict[str, Any]]:
    """One row for each layout, in microseconds, with timm's module and the floor beside it."""
    work = Workload(shape)
    with measure.threads(1):
        calls = {FLOOR: work.floor(), TIMM: work.checked_call(TIMM)}
        for name in LAYOUTS:
            module = work.build(name)
            work.verify(name, module)
            x = contender(name, shape).layout.from_tokens(work.x)
            for size, tokens in (("full", x), ("empty", x[:0])):
                call = calls[f"{name} module {size}"] = partial(module, tokens)
                operator = operator_call(call)
                if operator is not None:
                    calls[f"{name} operator {size}"] = operator
        timings = measure.interleaved(calls, seconds=seconds)

    def microseconds(name: str) -> float | None:
        return timings[name].median * 1e6 if name in timings else None

    rows = []
    for name, layout in LAYOUTS.items():
        call, empty_call = microseconds(f"{name} module full"), microseconds(f"{name} module empty")
        operator = microseconds(f"{name} operator full")
        empty_operator = microseconds(f"{name} operator empty")
        kernels = (
            _difference(call, empty_call)
            if operator is None
            else _difference(operator, empty_operator)
        )
        rows.append(
            {
                "slices": shape.slices,
                "tokens": shape.tokens,
                "dim": shape.dim,
                "layout": layout,
                "call": call,
                "call_goal": CALL_GOAL,
                "operator": operator,
                "python": _difference(call, operator),
                "kernels": kernels,
                "overhead": _difference(call, kernels),
                "overhead_goal": OVERHEAD_GOAL,
                "empty_call": empty_call,
                "empty_operator": empty_operator,
                "timm": microseconds(TIMM),
                "floor": microseconds(FLOOR),
            }
        )
    return rows


def _difference(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None else whole - part


_COLUMNS = {
    "layout": "layout",
    "call": "call",
    "call_goal": "goal, at most",
    "operator": "operator",
    "python": "call - operator",
    "kernels": "kernels",
    "overhead": "call - kernels",
    "overhead_goal": "goal, at most",
    "empty_call": "call, no images",
    "empty_operator": "operator, no images",
    "timm": "timm",
    "floor": "two torch.mm",
}


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The section of the report."""
    shape = rows[0]
    return "\n\n".join(
        [
            "## Small calls",
            f"One call at ({shape['slices']}, {shape['tokens']}, {shape['dim']}) in evaluation, "
            "float32, 1 thread, in microseconds. The operator is what the module calls in the "
            "dispatcher, with the same arguments; the kernels' time is the operator's less the "
            "operator's on a batch of no images.",
            report.markdown(rows, _COLUMNS),
        ]
    )
