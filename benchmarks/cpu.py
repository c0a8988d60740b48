"""The layer on this machine's CPU against timm's module and against its matrix products alone.

``python -m benchmarks.cpu --out DIR`` writes ``cpu.md`` (tables to read), ``cpu.csv`` and
``cpu.json`` (every measurement).

At each shape the layer runs in its three layouts, ``[B, N, D]``, ``[B, D, P, N]`` and
``[B, D, H, W]`` with a patch size. Beside it, in turns within one run: timm's module in
``[B, D, P, N]``, eager and under ``torch.compile``, and the floor, which is the layer's products
by ``torch.mm`` and nothing else: ``[S N, D] x [D, D]`` twice for the forward pass; in training four
of those and two of ``[D, S N] x [S N, D]``. The floor writes into memory that is there before,
while every layer allocates what it gives, as it must for its users.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import ceilings, environment, measure, registry, report
from benchmarks.registry import CONTENDERS, LAYER_SHAPES, MODES, Contender, LayerShape
from sep_attn import backends

TIMM, COMPILED, FLOOR = "timm_eager", "timm_compiled", "floor"
LAYOUTS = {
    "sep_attn": "[B, N, D]",
    "sep_attn_patches": "[B, D, P, N]",
    "sep_attn_image": "[B, D, H, W]",
}
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
    seconds: float = 1.0  # spent on each case, compilation and checks left out

    def cases(self) -> Iterator[list[Case]]:
        """Those that share inputs and oracle, and differ by the number of threads, together."""
        for shape in self.shapes:
            for mode in self.modes:
                for dtype in DTYPES[mode]:
                    if dtype in self.dtypes:
                        yield [Case(shape, dtype, mode, count) for count in self.threads]


def contenders(shape: LayerShape, dtype: str, *, compiled: bool) -> list[Contender]:
    """The layers of one case. ``torch.compile`` is left out of half precision, where its minutes
    would tell little: it calls the same products."""
    names = [TIMM, COMPILED] if compiled and dtype == "float32" else [TIMM]
    chosen = [CONTENDERS[name] for name in (*names, "sep_attn", "sep_attn_patches")]
    return [*chosen, registry.image_contender(shape)]


def measure_cases(cases: Sequence[Case], settings: Settings) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case. All share shape, dtype and mode, and so the oracle's results."""
    shape, mode, dtype = cases[0].shape, cases[0].mode, getattr(torch, cases[0].dtype)
    weights = registry.SEPARABLE.weights(shape.dim).to("cpu", dtype)
    x = registry.draw_tokens(shape.slices, shape.tokens, shape.dim, "cpu", dtype)
    expected = registry.expected_results(registry.SEPARABLE, weights, x, mode=mode)
    literal = CONTENDERS["literal_eager"]
    plain = registry.layer_results(literal, literal.build(weights), x, mode=mode)
    for case in cases:
        # Compiled code holds the number of threads, so each case compiles its own.
        torch.compiler.reset()
        with measure.threads(case.threads):
            calls: dict[str, measure.Call] = {}
            errors: dict[str, float] = {}
            statuses: dict[str, str] = {}
            for contender in contenders(shape, case.dtype, compiled=settings.compiled):
                module = contender.build(weights).train(mode == "training")
                ours = contender.key in LAYOUTS
                try:
                    errors[contender.key] = registry.verify(
                        contender, module, x, expected, mode=mode, plain=plain if ours else None
                    )
                    calls[contender.key] = _call(contender, module, x, mode)
                    statuses[contender.key] = "timed"
                except measure.WrongResultError as error:
                    statuses[contender.key] = f"refused: {error}"
            calls[FLOOR] = ceilings.cpu_products(x, mode=mode)
            statuses[FLOOR] = "timed"
            with torch.set_grad_enabled(mode == "training"):
                timings = measure.interleaved(calls, seconds=settings.seconds)
        yield [
            _row(case, name, status, timings, errors.get(name)) for name, status in statuses.items()
        ]


def _call(
    contender: Contender, module: Callable[[Tensor], Tensor], x: Tensor, mode: str
) -> measure.Call:
    x = contender.layout.from_tokens(x).detach()
    if mode == "forward":
        return partial(module, x)
    pair = (x.clone().requires_grad_(), torch.randn_like(x))
    return partial(registry.training_step, module, pair)


def _row(
    case: Case,
    name: str,
    status: str,
    timings: dict[str, measure.Timing],
    error: float | None,
) -> dict[str, Any]:
    timing = timings.get(name)

    def ratio(numerator: str, denominator: str) -> float | None:
        if numerator not in timings or denominator not in timings:
            return None
        return timings[numerator].ratio_to(timings[denominator])

    shape = case.shape
    operations = ceilings.PRODUCTS[case.mode] * 2 * shape.slices * shape.tokens * shape.dim**2
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
        "floor_ratio": ratio(name, FLOOR),
        "gflops": timing and operations / timing.median * 1e-9,
        "error": error,
        "status": status,
    }


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each mode, dtype, number of threads and layout: mean and worst ratios beside the goals.

    Means are geometric, over the shapes that were timed.
    """
    summary = []
    groups = dict.fromkeys((row["mode"], row["dtype"], row["threads"]) for row in rows)
    for mode, dtype, threads in groups:
        one, many = GOALS[mode, dtype]
        goal = one if threads == 1 else many
        for name, layout in LAYOUTS.items():
            group = [
                row
                for row in rows
                if (row["mode"], row["dtype"], row["threads"]) == (mode, dtype, threads)
                and row["contender"] == name
            ]

            def values(column: str, group: list[dict[str, Any]] = group) -> list[float]:
                return [row[column] for row in group if row[column] is not None]

            timm, compiled = values("timm_ratio"), values("compiled_ratio")
            floor = values("floor_ratio")
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
                }
            )
    return summary


def _mean(values: Sequence[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None


SUMMARY_COLUMNS = {
    "mode": "pass",
    "dtype": "dtype",
    "threads": "threads",
    "layout": "layout",
    "timm": "timm / sep_attn",
    "timm_goal": "goal, at least",
    "timm_worst": "worst shape",
    "timm_worst_goal": "goal, at least",
    "compiled": "compiled timm / sep_attn",
    "compiled_goal": "goal, at least",
    "floor": "sep_attn / torch.mm",
    "floor_goal": "goal, at most",
    "floor_worst": "worst shape",
    "floor_worst_goal": "goal, at most",
}


def shape_tables(rows: Sequence[dict[str, Any]]) -> str:
    """One Markdown table for each mode, dtype and number of threads: a line for each shape."""
    sections = []
    for mode, dtype, threads in dict.fromkeys(
        (row["mode"], row["dtype"], row["threads"]) for row in rows
    ):
        group = [
            row
            for row in rows
            if (row["mode"], row["dtype"], row["threads"]) == (mode, dtype, threads)
        ]
        lines = []
        for shape in dict.fromkeys((row["slices"], row["tokens"], row["dim"]) for row in group):
            cells = {
                row["contender"]: row
                for row in group
                if (row["slices"], row["tokens"], row["dim"]) == shape
            }
            lines.append(
                {
                    "shape": ", ".join(map(str, shape)),
                    **{
                        name: _cell([cells.get(name)], "milliseconds", ".4g")
                        for name in (TIMM, COMPILED, FLOOR)
                    },
                    "sep_attn": _cell([cells.get(name) for name in LAYOUTS], "milliseconds", ".4g"),
                    **{
                        column: _cell([cells.get(name) for name in LAYOUTS], column, ".2f")
                        for column in ("timm_ratio", "compiled_ratio", "floor_ratio")
                    },
                }
            )
        columns = {
            "shape": "slices, N, D",
            TIMM: "timm ms",
            COMPILED: "compiled ms",
            FLOOR: f"{FLOORS[mode]} ms",
            "sep_attn": "sep_attn ms",
            "timm_ratio": "timm / sep_attn",
            "compiled_ratio": "compiled / sep_attn",
            "floor_ratio": f"sep_attn / {FLOORS[mode]}",
        }
        if not any(line[COMPILED] for line in lines):
            del columns[COMPILED], columns["compiled_ratio"]
        plural = "thread" if threads == 1 else "threads"
        title = f"### {TITLES[mode]}, {dtype}, {threads} {plural}"
        sections.append(f"{title}\n\n{report.markdown(lines, columns)}")
    return "\n\n".join(sections)


def _cell(rows: Sequence[dict[str, Any] | None], column: str, form: str) -> str:
    values = [row and row[column] for row in rows]
    if all(value is None for value in values):
        return ""
    return " / ".join("-" if value is None else format(value, form) for value in values)


def to_markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    header = result["environment"]
    layouts = ", ".join(LAYOUTS.values())
    notes = [
        f"- {row['mode']}, {row['dtype']}, {row['threads']} threads, {row['slices']}, "
        f"{row['tokens']}, {row['dim']}, {row['contender']}: {row['status']}"
        for row in result["rows"]
        if row["status"] != "timed"
    ]
    parts = [
        "# The layer on a CPU",
        report.markdown(
            [{"name": name, "value": value} for name, value in header.items()],
            {"name": "", "value": ""},
        ),
        "Times are medians of interleaved turns; a ratio is the median of the rounds' ratios. "
        "Every result was compared with a float64 oracle before it was timed. The floor, "
        "`torch.mm`, writes into memory that is there before; every layer allocates what it gives.",
        "## Over all shapes",
        report.markdown(result["summary"], SUMMARY_COLUMNS),
        "## Shape by shape",
        f"Three figures in one place are the layouts {layouts}.",
        shape_tables(result["rows"]),
        *(["## Refused", "\n".join(notes)] if notes else []),
    ]
    return "\n\n".join(parts) + "\n"


def parse_shape(text: str) -> LayerShape:
    """``4x256x128``: slices, tokens, channels."""
    try:
        slices, tokens, dim = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; expected slices x tokens x channels such as 4x256x128"
        ) from None
    return LayerShape(slices, tokens, dim)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument(
        "--shapes",
        type=parse_shape,
        nargs="+",
        default=defaults.shapes,
        help="slices x tokens x channels, such as 4x256x128",
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()})
    )
    parser.add_argument("--dtypes", nargs="+", default=defaults.dtypes, choices=DTYPES["forward"])
    parser.add_argument("--passes", nargs="+", default=defaults.modes, choices=MODES)
    parser.add_argument(
        "--no-compiled", action="store_true", help="leave torch.compile out, which takes minutes"
    )
    parser.add_argument(
        "--seconds", type=float, default=defaults.seconds, help="time spent on each line"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a minute: the float32 forward pass, no torch.compile; writes cpu_quick.*",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.dtypes, options.passes = ("float32",), ("forward",)
        options.no_compiled = True
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    settings = Settings(
        shapes=tuple(options.shapes),
        threads=tuple(options.threads),
        dtypes=tuple(options.dtypes),
        modes=tuple(options.passes),
        compiled=not options.no_compiled,
        seconds=options.seconds,
    )
    header = {
        **environment.describe(),
        "threads": list(settings.threads),
        "backend": backends.resolve("auto", torch.device("cpu"), torch.float32),
    }
    stem = "cpu_quick" if options.quick else "cpu"
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"environment": header, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    groups = list(settings.cases())
    with tqdm(total=len(groups) * len(settings.threads), desc="cpu", unit="case") as progress:
        for cases in groups:
            progress.set_postfix_str(f"{cases[0].shape}, {cases[0].dtype}, {cases[0].mode}")
            for new in measure_cases(cases, settings):
                rows += new
                progress.update()
            result["summary"] = summarize(rows)
            report.write_csv(options.out / f"{stem}.csv", rows, header)
            report.write_json(options.out / f"{stem}.json", result)
    text = to_markdown(result)
    (options.out / f"{stem}.md").write_text(text)
    print(text)
    ours = [row for row in rows if row["contender"] in LAYOUTS]
    return 0 if all(row["status"] == "timed" for row in ours) else 1


if __name__ == "__main__":
    raise SystemExit(main())
