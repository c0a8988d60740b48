"""What the paper's tables and figures show, measured on this machine.

``python -m benchmarks.paper --out DIR`` writes ``paper.md`` (the report), ``paper.json`` (every
figure), ``paper_latency.csv``, ``paper_tokens.csv`` and two pictures. It takes about a quarter of
an hour on four cores that do nothing else, most of it in ``torch.compile``: 48 modules. What would
begin to compile after twenty minutes is left out, and the report says so at its place.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import environment, measure, models, report
from benchmarks.paper import features, latency, plots, sizes, units_over_tokens
from benchmarks.paper.document import document

PARTS = ("sizes", "features", "figure", "latency")
TIME_LIMIT = 1200  # seconds, after which nothing more is compiled


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    cores = environment.usable_cores()
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(4, cores)}))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 32))
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time spent on each case, warm-up left out"
    )
    parser.add_argument(
        "--time-limit", type=float, default=TIME_LIMIT, help="seconds; then nothing is compiled"
    )
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a look: small images, few tokens, one thread, batch 2, nothing compiled",
    )
    options = parser.parse_args(arguments)
    options.image_size, options.published = models.IMAGE_SIZE, sizes.PUBLISHED
    options.tokens, options.tasks = units_over_tokens.TOKENS, features.TASKS
    if options.quick:
        options.threads, options.batches, options.seconds = (1,), (2,), 0.02
        options.no_compiled, options.image_size = True, 64
        options.published, options.tokens = sizes.PUBLISHED[:1], (64, 256)
        options.tasks = features.TASKS[:1]
    return options


def run(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measures the chosen parts into ``result``, which is written as it grows.

    Raises:
        benchmarks.measure.WrongResultError: something is wrong; it is not timed then.
    """
    start = time.perf_counter()
    steps = _steps(options, result, start + options.time_limit)
    for label, step in (progress := tqdm(steps, desc="paper", unit="step")):
        progress.set_postfix_str(label)
        step()
        result["seconds"] = time.perf_counter() - start
        write(options.out, result)


def _steps(options: argparse.Namespace, result: dict[str, Any], until: float) -> list[Any]:
    def sizes_step(published: sizes.Published) -> None:
        result["sizes"].append(sizes.measure_sizes(published))

    def features_step(task: features.Task) -> None:
        result["features"] += features.measure_task(
            task, threads=options.threads, seconds=options.seconds
        )

    def tokens_step(tokens: int) -> None:
        result["figure"] += units_over_tokens.measure_tokens(tokens, seconds=options.seconds)

    def profile_step(unit: units_over_tokens.Unit) -> None:
        calls = 3 if options.quick else 50
        result["profiles"].append(units_over_tokens.profile(unit, calls=calls))

    contenders: dict[str, torch.nn.Module] = {}
    compiler = None if options.no_compiled else latency.Compiler(until)

    def build_step() -> None:
        contenders.update(latency.build(options.image_size))
        result["models"] = latency.describe(contenders, options.image_size)

    def latency_step(batch: int, threads: int, part: str) -> None:
        generator = torch.Generator().manual_seed(models.SEED)
        size = options.image_size
        images = torch.rand(batch, 3, size, size, generator=generator)
        result["latency"] += latency.measure_case(
            contenders, images, part, threads=threads, seconds=options.seconds, compiler=compiler
        )

    steps: list[Any] = []
    if "sizes" in options.parts:
        steps += [(p.model, functools.partial(sizes_step, p)) for p in options.published]
    if "features" in options.parts:
        steps += [(task.name, functools.partial(features_step, task)) for task in options.tasks]
    if "figure" in options.parts:
        steps += [(f"k = {k}", functools.partial(tokens_step, k)) for k in options.tokens]
        steps += [
            (f"profile {unit.key}", functools.partial(profile_step, unit))
            for unit in units_over_tokens.UNITS
        ]
    if "latency" in options.parts:
        steps.append(("models", build_step))
        for batch, threads, part in latency.cases(options.batches, options.threads):
            label = f"{part}, batch {batch}, {report.threads(threads)}"
            steps.append((label, functools.partial(latency_step, batch, threads, part)))
    return steps


def write(directory: Path, result: dict[str, Any]) -> None:
    header = result["environment"]
    report.write_json(directory / "paper.json", result)
    if result["latency"]:
        report.write_csv(directory / "paper_latency.csv", result["latency"], header)
        plots.latencies(result, directory / "paper_latency.png")
    if result["figure"]:
        report.write_csv(directory / "paper_tokens.csv", result["figure"], header)
    if len(result["profiles"]) == len(units_over_tokens.UNITS):
        plots.tokens(result, directory / "paper_tokens.png")
        (directory / "paper.md").write_text(document(result))
    elif not result["figure"]:
        (directory / "paper.md").write_text(document(result))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    header = {
        **environment.describe(),
        "threads": options.threads,
        "linformer": importlib.metadata.version("linformer"),
    }
    result: dict[str, Any] = {
        "environment": header,
        "image_size": options.image_size,
        "sizes": [],
        "models": [],
        "latency": [],
        "figure": [],
        "profiles": [],
        "features": [],
    }
    try:
        run(options, result)
    except measure.WrongResultError as error:
        report.write_json(options.out / "paper.json", {**result, "refused": str(error)})
        print(f"refused to time a wrong result: {error}")
        return 1
    print(document(result))
    print(f"{result['seconds']:.0f} s; results in {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
