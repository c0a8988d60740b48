"""The layer at users' shapes against timm's module and against its matrix products alone.

At each shape the layer runs in its three layouts, ``[B, N, D]``, ``[B, D, P, N]`` and
``[B, D, H, W]`` with a patch size. Beside it, in turns within one run: timm's module in
``[B, D, P, N]``, eager and under ``torch.compile``, and the floor, which is the layer's products
by ``torch.mm`` and nothing else: ``[S N, D] x [D, D]`` twice for the forward pass; in training four
of those and two of ``[D, S N] x [S N, D]``. The floor writes into memory that is there before,
while every layer allocates what it gives, as it must for its users.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import measure, report
from benchmarks.cpu.calls import operator_call
from benchmarks.cpu.workload import COMPILED, FLOOR, LAYOUTS, TIMM, Workload
from benchmarks.registry import LAYER_SHAPES, MODES, LayerShape

# What is timed in which dtypes: half precision is for inference on a CPU.
DTYPES = {"forward": ("float32", "bfloat16", "float16"), "training": ("float32",)}
TITLES = {"forward": "Forward", "training": "Forward + backward"}
FLOORS = {"forward": "two torch.mm", "training": "six torch.mm"}


@dataclass(frozen=True)
class Goal:
    """What the geometric mean over all shapes, and the worst of them, are to reach."""

    timm: float  # timm's time / sep_attn's, at least
    floor: float  # sep_attn's time / the products', at most
    timm_worst: float | None = None
    compiled: float | None = None
    floor_worst: float | None = None


# By (mode, dtype): on one thread, and on all.
GOALS = {
    ("forward", "float32"): (
        Goal(2.5, 1.05, timm_worst=1.7, compiled=2.3, floor_worst=1.20),
        Goal(3.5, 1.05, timm_worst=2.0, compiled=2.5, floor_worst=1.25),
    ),
    ("forward", "bfloat16"): (Goal(4.0, 0.5), Goal(4.0, 0.5)),
    ("forward", "float16"): (Goal(4.0, 0.5), Goal(4.0, 0.5)),
    ("training", "float32"): (
        Goal(2.7, 1.15, compiled=2.3, floor_worst=1.35),
        Goal(3.5, 1.15, compiled=2.5, floor_worst=1.35),
    ),
}


@dataclass(frozen=True)
class Case:
    """One line of a table: what is computed, and on how many threads."""

    shape: LayerShape
    dtype: str
    mode: str
    threads: int


@dataclass(frozen=True)
class Settings:
    shapes: tuple[LayerShape, ...] = LAYER_SHAPES
    threads: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = DTYPES["forward"]
    modes: tuple[str, ...] = MODES
    compiled: bool = True
    seconds: float = 1.5  # spent on each case, compilation and checks left out

    def cases(self) -> Iterator[list[Case]]:
        """Those that share inputs and oracle, and differ by the number of threads, together."""
        for shape in self.shapes:
            for mode in self.modes:
                for dtype in DTYPES[mode]:
                    if dtype in self.dtypes:
                        yield [Case(shape, dtype, mode, count) for count in self.threads]


def measure_cases(cases: Sequence[Case], settings: Settings) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case. All share shape, dtype and mode, and so inputs and oracle."""
    mode, dtype = cases[0].mode, cases[0].dtype
    work = Workload(cases[0].shape, dtype=getattr(torch, dtype), mode=mode)
    # torch.compile is left out of half precision: minutes of compiling for the same products.
    compiled = [COMPILED] if settings.compiled and dtype == "float32" else []
    for case in cases:
        torch.compiler.reset()  # compiled code holds the number of threads
        calls: dict[str, measure.Call] = {FLOOR: work.floor()}
        errors: dict[str, float] = {}
        statuses: dict[str, str] = {}
        with measure.threads(case.threads):
            for name in (TIMM, *compiled, *LAYOUTS):
                try:
                    module = work.build(name)
                    errors[name] = work.verify(name, module)
                    calls[name] = work.call(name, module)
                    if name in LAYOUTS:
                        with work.gradients():
                            operators = operator_call(calls[name])
                        if operators is not None:
                            calls[_operators(name)] = operators
                    statuses[name] = "timed"
                except measure.WrongResultError as error:
                    statuses[name] = f"refused: {error}"
                except Exception as error:  # one layer's failure must not cost the others' figures
                    first_line = str(error).strip().partition("\n")[0]
                    statuses[name] = f"failed: {type(error).__name__}: {first_line}"
            with work.gradients():
                timings = measure.interleaved(calls, seconds=settings.seconds)
        statuses[FLOOR] = "timed"
        yield [
            _row(case, name, status, timings, errors.get(name), work.operations)
            for name, status in statuses.items()
        ]


def _operators(name: str) -> str:
    """What a layer's call comes down to in the dispatcher: without Python and autograd."""
    return f"{name}_operators"


def left_out(case: Case, reason: str) -> list[dict[str, Any]]:
    """The rows of a case that was not measured."""
    return [_row(case, name, f"left out: {reason}", {}, None, 0) for name in (TIMM, *LAYOUTS)]


def _row(
    case: Case,
    name: str,
    status: str,
    timings: dict[str, measure.Timing],
    error: float | None,
    operations: int,
) -> dict[str, Any]:
    timing = timings.get(name)

    def ratio(numerator: str, denominator: str) -> float | None:
        if numerator not in timings or denominator not in timings:
            return None
        return timings[numerator].ratio_to(timings[denominator])

    lower, median, upper = timing.ratios_to(timings[FLOOR]) if timing else (None, None, None)
    shape = case.shape
    return {
        "mode": case.mode,
        "dtype": case.dtype,
        "threads": case.threads,
        "slices": shape.slices,
        "tokens": shape.tokens,
        "dim": shape.dim,
        "contender": name,
        "milliseconds": timing and timing.median * 1e3,
        "lower_quartile": timing and timing.lower_quartile * 1e3,
        "upper_quartile": timing and timing.upper_quartile * 1e3,
        "samples": timing.samples if timing else 0,
        "rounds": len(timing.rounds) if timing else 0,
        "timm_ratio": ratio(TIMM, name),
        "compiled_ratio": ratio(COMPILED, name),
        "floor_ratio": median,
        "floor_ratio_lower": lower,
        "floor_ratio_upper": upper,
        "operators_ratio": ratio(_operators(name), FLOOR),
        "gflops": timing and operations / timing.median * 1e-9,
        "error": error,
        "status": status,
    }


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether the row is one of this package's layers that failed or was refused."""
    return row["contender"] in LAYOUTS and row["status"].startswith(("refused", "failed"))


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each mode, dtype, number of threads and layout: mean and worst ratios beside the goals.

    Means are geometric, over the shapes that were timed.
    """
    summary = []
    for (mode, dtype, threads), group in report.grouped(rows, "mode", "dtype", "threads"):
        goal = GOALS[mode, dtype][0 if threads == 1 else 1]
        for name, layout in LAYOUTS.items():
            ours = [row for row in group if row["contender"] == name]
            timm, compiled, floor, operators = (
                [row[column] for row in ours if row[column] is not None]
                for column in ("timm_ratio", "compiled_ratio", "floor_ratio", "operators_ratio")
            )
            summary.append(
                {
                    "mode": mode,
                    "dtype": dtype,
                    "threads": threads,
                    "layout": layout,
                    "shapes": len(floor),
                    "timm": _mean(timm),
                    "timm_goal": goal.timm,
                    "timm_worst": min(timm, default=None),
                    "timm_worst_goal": goal.timm_worst,
                    "compiled": _mean(compiled),
                    "compiled_goal": goal.compiled,
                    "floor": _mean(floor),
                    "floor_goal": goal.floor,
                    "floor_worst": max(floor, default=None),
                    "floor_worst_goal": goal.floor_worst,
                    "operators": _mean(operators),
                }
            )
    return summary


def _mean(values: Sequence[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None


_SUMMARY_COLUMNS = {
    "mode": "pass",
    "dtype": "dtype",
    "threads": "threads",
    "layout": "layout",
    "timm": "timm / sep_attn",
    "timm_goal": "goal, at least",
    "timm_worst": "worst shape",
    "timm_worst_goal": "goal, at least",
    "compiled": "compiled / sep_attn",
    "compiled_goal": "goal, at least",
    "floor": "sep_attn / torch.mm",
    "floor_goal": "goal, at most",
    "floor_worst": "worst shape",
    "floor_worst_goal": "goal, at most",
    "operators": "operators alone / torch.mm",
}


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The section of the report: over all shapes, then shape by shape."""
    sections = [
        "## Over all shapes",
        "Geometric means over the shapes below, and the worst of them. The operators alone are "
        "what the call comes down to in the dispatcher, without Python and autograd.",
        report.markdown(summarize(rows), _SUMMARY_COLUMNS),
        "## Shape by shape",
        f"Three figures in one place are the layouts {', '.join(LAYOUTS.values())}. The floor, "
        "`torch.mm`, writes into memory that is there before; every layer allocates its results.",
    ]
    for (mode, dtype, threads), group in report.grouped(rows, "mode", "dtype", "threads"):
        sections.append(f"### {TITLES[mode]}, {dtype}, {report.threads(threads)}")
        sections.append(_shape_table(mode, group))
    notes = [
        f"- {row['mode']}, {row['dtype']}, {report.threads(row['threads'])}, {row['slices']}, "
        f"{row['tokens']}, {row['dim']}, {row['contender']}: {row['status']}"
        for row in rows
        if row["status"] != "timed"
    ]
    if notes:
        sections += ["### Not timed", "\n".join(notes)]
    return "\n\n".join(sections)


def _shape_table(mode: str, rows: Sequence[dict[str, Any]]) -> str:
    floor = FLOORS[mode]
    columns = {
        "shape": "slices, N, D",
        TIMM: "timm ms",
        COMPILED: "compiled ms",
        FLOOR: f"{floor} ms",
        "sep_attn": "sep_attn ms",
        "timm_ratio": "timm / sep_attn",
        "compiled_ratio": "compiled / sep_attn",
        "floor_ratio": f"sep_attn / {floor}",
        "operators_ratio": f"operators / {floor}",
    }
    if all(row["contender"] != COMPILED for row in rows):
        del columns[COMPILED], columns["compiled_ratio"]
    lines = []
    for shape, cells in report.grouped(rows, "slices", "tokens", "dim"):
        by_name = {row["contender"]: row for row in cells}
        ours = [by_name.get(name) for name in LAYOUTS]
        line = {"shape": ", ".join(map(str, shape)), "sep_attn": _cell(ours, "milliseconds", ".4g")}
        for name in (TIMM, COMPILED, FLOOR):
            line[name] = _cell([by_name.get(name)], "milliseconds", ".4g")
        for column in ("timm_ratio", "compiled_ratio", "floor_ratio", "operators_ratio"):
            line[column] = _cell(ours, column, ".2f")
        lines.append(line)
    return report.markdown(lines, columns)


def _cell(rows: Sequence[dict[str, Any] | None], column: str, form: str) -> str:
    values = [row and row[column] for row in rows]
    if all(value is None for value in values):
        return ""
    return " / ".join("-" if value is None else format(value, form) for value in values)
