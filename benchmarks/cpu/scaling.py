"""How time grows with the tokens, and how it shrinks with the threads; forward, float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import measure, report
from benchmarks.cpu.workload import FLOOR, LAYOUTS, TIMM, Workload
from benchmarks.registry import LayerShape
from benchmarks.token_sweep import fit_exponent

THREAD_SHAPES = (
    LayerShape(1, 16384, 128),
    LayerShape(1, 4096, 512),
    LayerShape(1, 197, 768),
    LayerShape(4, 256, 128),
)
TOKEN_DIM = 64
TOKENS = tuple(2**power for power in range(10, 21))
TOKEN_LAYERS = ("sep_attn", "sep_attn_patches")  # at one slice [B, D, H, W] is [B, D, P, N]
EXPONENT_GOAL = 1.03  # at most
SPEEDUP_GOAL = (LayerShape(1, 16384, 128), 4, 3.5)  # shape, threads, at least


def thread_counts(most: int) -> list[int]:
    """Every number of threads up to eight, then powers of two, and the most."""
    return [count for count in range(1, most) if count < 8 or count & (count - 1) == 0] + [most]


def _on_threads(call: Callable[[], object], count: int) -> None:
    if torch.get_num_threads() != count:  # true in the sample that opens a turn, which is not timed
        torch.set_num_threads(count)
    call()


@torch.no_grad()
def measure_threads(
    counts: Sequence[int], shapes: Sequence[LayerShape], *, seconds: float
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each shape: every number of threads takes its turns in one run."""
    for shape in shapes:
        work = Workload(shape)
        calls = {name: work.checked_call(name) for name in (TIMM, *LAYOUTS)}
        calls[FLOOR] = work.floor()
        with measure.threads(1):  # puts the number back in the end
            timings = measure.interleaved(
                {
                    f"{name} {count}": partial(_on_threads, call, count)
                    for name, call in calls.items()
                    for count in counts
                },
                seconds=seconds,
            )
        yield [
            {
                "slices": shape.slices,
                "tokens": shape.tokens,
                "dim": shape.dim,
                "contender": name,
                "threads": count,
                "milliseconds": timings[f"{name} {count}"].median * 1e3,
                "speedup": timings[f"{name} {counts[0]}"].ratio_to(timings[f"{name} {count}"]),
            }
            for name in calls
            for count in counts
        ]


@torch.no_grad()
def measure_tokens(
    counts: Sequence[int],
    tokens: Sequence[int],
    *,
    seconds: float,
    memory_limit: int,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each number of tokens, as long as the float64 oracle fits in memory."""
    for count in tokens:
        shape = LayerShape(1, count, TOKEN_DIM)
        work = Workload(shape)
        if 24 * 4 * count * TOKEN_DIM > memory_limit:  # the oracle's double products and their like
            yield []
            continue
        calls = {name: work.checked_call(name) for name in TOKEN_LAYERS}
        calls[FLOOR] = work.floor()
        del work.expected, work.plain
        rows = []
        for threads in counts:
            with measure.threads(threads):
                timings = measure.interleaved(calls, seconds=seconds)
            rows += [
                {
                    "tokens": count,
                    "dim": TOKEN_DIM,
                    "threads": threads,
                    "contender": name,
                    "milliseconds": timing.median * 1e3,
                    "floor_ratio": timing.ratio_to(timings[FLOOR]),
                }
                for name, timing in timings.items()
            ]
        yield rows


def exponents(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exponent of time against the tokens, fitted over all of them."""
    fitted = []
    for (threads, name), group in report.grouped(rows, "threads", "contender"):
        tokens = [row["tokens"] for row in group]
        exponent = fit_exponent(tokens, [row["milliseconds"] for row in group], octaves=None)
        fitted.append({"threads": threads, "contender": name, "exponent": exponent})
    return fitted


def label(name: str) -> str:
    return {TIMM: "timm", FLOOR: "two torch.mm"}.get(name) or f"sep_attn {LAYOUTS[name]}"


def threads_to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The section of the report on threads."""
    lines = []
    columns = ("slices", "tokens", "dim", "contender")
    for (*shape, name), group in report.grouped(rows, *columns):
        line = {"shape": ", ".join(map(str, shape)), "layer": label(name)}
        for row in group:
            line[f"speedup {row['threads']}"] = row["speedup"]
            line[f"time {row['threads']}"] = f"{row['milliseconds']:.4g}"
        lines.append(line)
    counts = list(dict.fromkeys(row["threads"] for row in rows))
    headings = {"shape": "slices, N, D", "layer": "layer"}
    headings |= {f"time {count}": f"{report.threads(count)}, ms" for count in counts}
    headings |= {f"speedup {count}": f"speed-up on {count}" for count in counts[1:]}
    goal_shape, threads, goal = SPEEDUP_GOAL
    return "\n\n".join(
        [
            "## Threads",
            f"Forward, float32. Goal: {goal} times as fast on {threads} threads at "
            f"({goal_shape.slices}, {goal_shape.tokens}, {goal_shape.dim}).",
            report.markdown(lines, headings),
        ]
    )


def tokens_to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The section of the report on tokens."""
    fitted = exponents(rows)
    series = [key for key, _ in report.grouped(rows, "threads", "contender")]
    columns = {"tokens": "N"}
    columns |= {
        f"{threads} {name}": f"{label(name)}, {report.threads(threads)}" for threads, name in series
    }
    lines: list[dict[str, Any]] = []
    for (tokens,), group in report.grouped(rows, "tokens"):
        line: dict[str, Any] = {"tokens": f"{tokens:,}"}
        for row in group:
            line[f"{row['threads']} {row['contender']}"] = f"{row['milliseconds']:.4g}"
        lines.append(line)
    last: dict[str, Any] = {"tokens": "exponent"}
    for fit in fitted:
        if fit["exponent"] is not None:
            last[f"{fit['threads']} {fit['contender']}"] = f"{fit['exponent']:.3f}"
    return "\n\n".join(
        [
            "## Tokens",
            f"Forward, float32, one slice, D = {rows[0]['dim']}, milliseconds, and the exponent of "
            f"time against N fitted over all of them. Goal: at most {EXPONENT_GOAL}. `torch.mm` "
            "writes into memory that is there; a layer's output is new at every call, and from "
            "32 MiB on glibc takes and returns its pages each time (the package asks for large "
            "ones).",
            report.markdown([*lines, last], columns),
        ]
    )
