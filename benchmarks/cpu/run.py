"""The layer on this machine's CPU beside its peers and its floor.

``python -m benchmarks.cpu --out DIR`` writes ``cpu.md`` (all tables), ``cpu.json`` (every figure),
``cpu.csv`` (the rows of the large table) and ``cpu_roofline.png``, ``cpu_threads.png`` and
``cpu_tokens.png``. It takes at most a quarter of an hour on four cores, most of it in
``torch.compile``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import ceilings, environment, report, token_sweep
from benchmarks.cpu import calls, memory, plots, scaling, table
from benchmarks.registry import MODES, LayerShape
from sep_attn import backends

PARTS = ("calls", "memory", "threads", "tokens", "table")
TIME_LIMIT = 800  # seconds, after which no further line of the table is begun


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
    defaults = table.Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=sorted({1, torch.get_num_threads()}),
        help="numbers of threads; by default one and all",
    )
    parser.add_argument(
        "--seconds", type=float, default=defaults.seconds, help="time spent on each line"
    )
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="in seconds")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a minute: the float32 forward pass of the table, no torch.compile; cpu_quick.*",
    )
    group = parser.add_argument_group("the table")
    group.add_argument(
        "--shapes",
        type=parse_shape,
        nargs="+",
        default=defaults.shapes,
        help="slices x tokens x channels, such as 4x256x128",
    )
    group.add_argument(
        "--dtypes", nargs="+", default=defaults.dtypes, choices=table.DTYPES["forward"]
    )
    group.add_argument("--passes", nargs="+", default=MODES, choices=MODES)
    group.add_argument(
        "--no-compiled", action="store_true", help="leave torch.compile out, which takes minutes"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.parts, options.dtypes, options.passes = ("table",), ("float32",), ("forward",)
        options.no_compiled = True
    return options


_PEAKS = {
    "fma_peaks": "float32 multiply-adds",
    "bf16_dot_peaks": "bfloat16 dot products (VDPBF16PS)",
}


def _peaks(threads: Sequence[int]) -> dict[str, dict[int, float]]:
    peaks = ceilings.cpu_peaks(threads)
    return {"fma_peaks": peaks.multiply_adds, "bf16_dot_peaks": peaks.bf16_dot_products}


class Report:
    """What has been measured so far, and the files that hold it."""

    def __init__(self, out: Path, stem: str, threads: Sequence[int]) -> None:
        self.out, self.stem = out, stem
        self.result: dict[str, Any] = {
            "environment": {
                **environment.describe(),
                "threads": list(threads),
                "backend": backends.resolve("auto", torch.device("cpu"), torch.float32),
            },
            **_peaks(threads),
        }
        out.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, rows: Sequence[dict[str, Any]]) -> None:
        """Keeps rows and writes all files that hold figures."""
        self.result.setdefault(part, []).extend(rows)
        if "rows" in self.result:
            self.result["summary"] = table.summarize(self.result["rows"])
            header = self.result["environment"]
            report.write_csv(self.out / f"{self.stem}.csv", self.result["rows"], header)
        report.write_json(self.out / f"{self.stem}.json", self.result)

    def measure_peaks(self) -> None:
        """Measures the peaks again: what disturbed them once may be over by now."""
        for name, again in _peaks(list(self.result["fma_peaks"])).items():
            peaks = self.result[name]
            peaks.update({count: max(peak, peaks[count]) for count, peak in again.items()})
        report.write_json(self.out / f"{self.stem}.json", self.result)

    def draw(self) -> None:
        for part, draw, name in (
            ("rows", plots.roofline, "roofline"),
            ("thread_rows", plots.thread_scaling, "threads"),
            ("token_rows", plots.token_scaling, "tokens"),
        ):
            rows = self.result.get(part, ())
            if any(
                row["milliseconds"] and row.get("dtype", plots.DTYPE) == plots.DTYPE for row in rows
            ):
                draw(self.result, self.out / f"{self.stem}_{name}.png")

    def to_markdown(self) -> str:
        result = self.result
        lines = [{"name": name, "value": value} for name, value in result["environment"].items()]
        for peaks, name in _PEAKS.items():
            for count, peak in result[peaks].items():
                gflops = f"{peak * 1e-9:.0f} GFLOP/s"
                lines.append({"name": f"{name}, {report.threads(count)}", "value": gflops})
        sections = [
            "# The layer on a CPU",
            report.markdown(lines, {"name": "", "value": ""}),
            "Times are medians of interleaved turns; a ratio is the median of the rounds' ratios. "
            "Every layer's result was compared with a float64 oracle before it was timed.",
        ]
        for part, to_markdown in (
            ("rows", table.to_markdown),
            ("call_rows", calls.to_markdown),
            ("memory_rows", memory.to_markdown),
            ("thread_rows", scaling.threads_to_markdown),
            ("token_rows", scaling.tokens_to_markdown),
        ):
            if result.get(part):
                sections.append(to_markdown(result[part]))
        return "\n\n".join(sections) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    start = time.perf_counter()
    settings = table.Settings(
        shapes=tuple(options.shapes),
        threads=tuple(options.threads),
        dtypes=tuple(options.dtypes),
        modes=tuple(options.passes),
        compiled=not options.no_compiled,
        seconds=options.seconds,
    )
    written = Report(options.out, "cpu_quick" if options.quick else "cpu", options.threads)
    groups = list(settings.cases()) if "table" in options.parts else []
    most, seconds = max(options.threads), options.seconds
    steps = len(groups) * len(settings.threads)
    steps += len(scaling.THREAD_SHAPES) * ("threads" in options.parts)
    steps += len(scaling.TOKENS) * ("tokens" in options.parts)
    steps += ("calls" in options.parts) + ("memory" in options.parts)

    with tqdm(total=steps, desc="cpu", unit="step") as progress:

        def add(part: str, rows: Sequence[dict[str, Any]], done: str) -> None:
            written.add(part, rows)
            progress.set_postfix_str(done)
            progress.update()

        if "calls" in options.parts:
            add("call_rows", calls.measure_calls(seconds=2 * seconds), "small calls")
        if "memory" in options.parts:
            add("memory_rows", memory.measure_memory(memory.SHAPES, threads=most), "memory")
        if "threads" in options.parts:
            counts = scaling.thread_counts(most)
            for rows in scaling.measure_threads(counts, scaling.THREAD_SHAPES, seconds=3 * seconds):
                add("thread_rows", rows, "threads")
        if "tokens" in options.parts:
            limit = token_sweep.default_memory_limit(torch.device("cpu"))
            for rows in scaling.measure_tokens(
                options.threads, scaling.TOKENS, seconds=seconds, memory_limit=limit
            ):
                add("token_rows", rows, "tokens")
        for cases in groups:
            name = f"{cases[0].shape}, {cases[0].dtype}, {cases[0].mode}"
            if time.perf_counter() - start > options.time_limit:
                reason = f"the {options.time_limit:.0f} s were over"
                for case in cases:
                    add("rows", table.left_out(case, reason), name)
                continue
            for rows in table.measure_cases(cases, settings):
                add("rows", rows, name)
    written.measure_peaks()
    written.draw()
    text = written.to_markdown()
    (options.out / f"{written.stem}.md").write_text(text)
    print(text)
    return 1 if any(table.is_wrong(row) for row in written.result.get("rows", ())) else 0
