"""Offline tuning: measures configurations of the fused layer's kernels and writes their table.

``make tune``, or ``python -m benchmarks.tune --json FILE [--kernels ..] [--channels ..]``, on the
GPU whose table in ``sep_attn/triton_kernels/configs.py`` is to be written; ``--dry-run`` prints the
rows and writes no table. All kernels at all D are some 12,000 compilations, hours; the table is
written after each kernel, and ``--kernels`` and ``--channels`` take a part. A kernel's last row
reaches as far as the layer calls it, whatever D were measured.

A candidate is timed by the whole pass that its kernel is part of, in turns with the others, after
its result was held against float64. Where several numbers of channels do as well with one
configuration, within ``SLACK``, they share a row.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import environment, measure, registry, report
from benchmarks.registry import CONTENDERS, OURS, LayerShape
from sep_attn import functional
from sep_attn.triton_kernels import configs
from sep_attn.triton_kernels.configs import Config

TABLE_FILE = Path(configs.__file__)
SLACK = 0.02  # configurations this close to the fastest are as good
HOPEFUL = 1.3  # times the fastest of a short look: what is measured for longer
CHANNELS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
DTYPES = {2: torch.bfloat16, 4: torch.float32}
SHORT, LONG = 256, 65_536  # tokens of a slice

# By kernel: the pass it is part of, and the tokens of a slice that lead to it. "inputs" is forward
# and backward to x alone.
WORKLOADS = {
    "slice_fwd_kernel": ("forward", SHORT),
    "score_pool_fwd_kernel": ("forward", LONG),
    "value_gate_output_fwd_kernel": ("forward", LONG),
    "token_product_kernel": ("inputs", SHORT),
    "value_gate_bwd_kernel": ("inputs", SHORT),
    "value_gate_weights_bwd_kernel": ("training", SHORT),
    "weight_grad_kernel": ("training", SHORT),
    "source_bwd_kernel": ("inputs", SHORT),
}
POOL_KERNELS = ("score_pool_fwd_kernel", "source_bwd_kernel")  # their tiles hold every column
POOL_VALUES = (1024, 16_384)  # of a tile, at least and at most
# Programs that hold whole tokens are tried two to a multiprocessor too, where Triton can limit the
# registers.
SIDE_BY_SIDE = torch.version.hip is None
LEAST_VALUES = {8: 2048, 16: 16_384}  # of a tile, by warps

Timings = Mapping[Config, float]
Winners = dict[int | None, Config]


def reach(kernel: str, itemsize: int) -> int | None:
    """The largest D that the layer calls a kernel for; None where there is no such limit."""
    if kernel in configs.WHOLE_TOKEN_KERNELS:
        return configs.MOST_FUSED_CHANNELS[itemsize]
    if kernel == "value_gate_weights_bwd_kernel":
        return configs.MOST_FUSED_BACKWARD_CHANNELS[itemsize]
    return None


def serves(kernel: str, itemsize: int, channels: int) -> bool:
    """Whether the layer calls a kernel at all for D = ``channels``."""
    if kernel == "weight_grad_kernel":
        return channels > configs.MOST_FUSED_BACKWARD_CHANNELS[itemsize]
    end = reach(kernel, itemsize)
    return end is None or channels <= end


def candidates(kernel: str, channels: int) -> list[Config]:
    """What is tried; a candidate that does not fit into the GPU drops out when it is compiled."""
    if kernel in POOL_KERNELS:
        least, most = POOL_VALUES
        return [
            Config(tokens, 0, warps, stages)
            for tokens, warps, stages in itertools.product(
                (4, 8, 16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
            )
            if least <= tokens * channels <= most
        ]
    tokens, columns = (16, 32, 64, 128), (16, 32, 64, 128, 256)
    found = [
        Config(*values)
        for values in itertools.product(tokens, columns, (4, 8, 16), (1, 2, 3, 4))
        # Wider than the layer is the same as as wide; small tiles leave many warps no work.
        if values[1] < 2 * max(16, channels)
        and (values[2] == 4 or values[0] * values[1] >= LEAST_VALUES[values[2]])
    ]
    if kernel in configs.WHOLE_TOKEN_KERNELS and SIDE_BY_SIDE:
        pairs = [config._replace(programs=2) for config in found if config.warps == 8]
        found += pairs
    return found


def as_good_as_the_best(timings: Timings, *, slack: float = SLACK) -> dict[Config, float]:
    """Configurations within ``slack`` of the fastest, and how many times its time they take.

    Raises:
        ValueError: there are no timings.
    """
    if not timings:
        raise ValueError("no candidate ran: widen benchmarks.tune.candidates for this kernel")
    best = min(timings.values())
    return {config: t / best for config, t in timings.items() if t <= best * (1 + slack)}


def choose_rows(
    measured: Mapping[int, Timings],
    *,
    current: Callable[[int], Config | None] = lambda _: None,
    end: int | None,
    slack: float = SLACK,
) -> Winners:
    """The rows of a table: as few as serve every measured D within ``slack`` of its fastest.

    Among configurations that do so, the one picked until now is kept; else the fastest over the
    row's D together.

    Args:
        measured: D -> configuration -> seconds.
        current: what is picked for a D now, if anything.
        end: the D that the last row is to reach; None for every larger D.
    """
    rows: Winners = {}
    group: list[int] = []
    good: list[dict[Config, float]] = []

    def close() -> None:
        shared = set.intersection(*map(set, good))
        kept = [config for config in map(current, group) if config in shared]
        # Ties go to the smaller configuration, so that the same timings give the same table.
        fastest = min(shared, key=lambda config: (sum(one[config] for one in good), config))
        rows[group[-1]] = kept[0] if kept else fastest

    for channels in sorted(measured):
        own = as_good_as_the_best(measured[channels], slack=slack)
        if group and not set.intersection(set(own), *map(set, good)):
            close()
            group, good = [], []
        group.append(channels)
        good.append(own)
    if group:
        close()
        rows[end] = rows.pop(group[-1])
    return rows


def rows_text(rows: Winners) -> str:
    """The rows as they stand in the table."""
    lines = []
    for channels, config in rows.items():
        lines.append(f"{channels}: {tuple(config) if config.programs else tuple(config)[:-1]}")
    if len(lines) == 1:
        return "{" + lines[0] + "}"
    return "{\n" + "".join(f"        {line},\n" for line in lines) + "    }"


def with_table(source: str, architecture: str, tuned: Mapping[str, Winners]) -> str:
    """The text of ``configs.py`` with these rows in the table of an architecture.

    Args:
        source: the text now.
        architecture: the key of ``TABLES``; a table is made where there is none.
        tuned: rows by kernel, ``"<kernel>.float32"`` for values of 4 bytes. Other kernels keep
            theirs.
    """
    assigned = {
        node.target.id: node
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    tables = assigned["TABLES"]
    assert isinstance(tables.value, ast.Dict)
    names = {
        ast.literal_eval(key): value.id
        for key, value in zip(tables.value.keys, tables.value.values, strict=True)
        if key is not None and isinstance(value, ast.Name)
    }
    name = names.get(architecture, architecture.upper())
    entries: dict[str, str] = {}
    old = assigned.get(name)
    if old is not None:
        assert isinstance(old.value, ast.Dict)
        for key, value in zip(old.value.keys, old.value.values, strict=True):
            entries[ast.literal_eval(key)] = ast.get_source_segment(source, value) or ""
    entries |= {kernel: rows_text(rows) for kernel, rows in tuned.items()}
    body = "".join(f'    "{kernel}": {rows},\n' for kernel, rows in entries.items())
    block = f"{name}: Mapping[str, Rows] = {{\n{body}}}\n"
    lines = source.splitlines(keepends=True)
    names[architecture] = name
    listed = ", ".join(f'"{key}": {value}' for key, value in names.items())
    new_tables = f"TABLES: Mapping[str, Mapping[str, Rows]] = {{{listed}}}\n"
    lines[tables.lineno - 1 : tables.end_lineno] = [new_tables]  # last in the file: done first
    if old is None:
        lines.insert(tables.lineno - 1, block + "\n")
    else:
        lines[old.lineno - 1 : old.end_lineno] = [block]
    return "".join(lines)


def write_table(path: Path, architecture: str, tuned: Mapping[str, Winners]) -> None:
    """Writes rows into ``configs.py`` and formats it, where ruff is at hand."""
    path.write_text(with_table(path.read_text(), architecture, tuned))
    if shutil.which("ruff"):
        subprocess.run(["ruff", "format", "--quiet", str(path)], check=True)
    print(f"{path}: the table of {architecture} is written; make test and compile_report check it")


# On a GPU: every candidate has plans of its own, so that candidates can take turns.


PLANNERS = ("_plan_forward", "_plan_backward")


def planners(
    kernel: str, config: Config, plans: Mapping[str, Callable[..., Any]]
) -> dict[str, Callable[..., Any]]:
    """The launchers' own planning functions ``plans``, by name, with ``config`` for ``kernel``."""
    from sep_attn.triton_kernels import attention

    def config_of(name: str, *arguments: Any) -> Config:
        return config if name == kernel else configs.config_of(name, *arguments)

    def planner(plan: Callable[..., Any]) -> Callable[..., Any]:
        @functools.cache
        def planned(*arguments: Any) -> Any:
            with mock.patch.object(attention, "config_of", config_of):
                return plan(*arguments)

        return planned

    return {name: planner(plan) for name, plan in plans.items()}


def with_planners(plans: Mapping[str, Callable[..., Any]], call: measure.Call) -> measure.Call:
    from sep_attn.triton_kernels import attention

    served: dict[Any, Any] = {}  # what the layer knows of its calls, plans among it

    def planned() -> Any:
        functional._SERVED = served
        for name, plan in plans.items():
            setattr(attention, name, plan)
        return call()

    return planned


def run_pass(mode: str, module: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """The results of a pass: out, or gradients of x, and of the parameters for "training"."""
    if mode == "forward":
        with torch.no_grad():
            return [module(x)]
    wanted = [x, *module.parameters()] if mode == "training" else [x]
    return list(torch.autograd.grad(module(x), wanted, gradient))


def workload(kernel: str, channels: int) -> LayerShape:
    tokens = WORKLOADS[kernel][1]
    return LayerShape(-(-registry.LARGE // (tokens * channels)), tokens, channels)


def measure_candidates(
    kernel: str, itemsize: int, shape: LayerShape, device: torch.device, *, seconds: float
) -> dict[Config, float]:
    """Seconds of the pass with each candidate that fits and is right."""
    from sep_attn.triton_kernels import attention

    mode, dtype = WORKLOADS[kernel][0], DTYPES[itemsize]
    x = registry.draw_tokens(shape.slices, shape.tokens, shape.dim, device, dtype)
    gradient = torch.randn_like(x)
    weights = CONTENDERS[OURS].family.weights(shape.dim).to(device, dtype)
    oracle_module = CONTENDERS["literal_eager"].build(weights.to(device, torch.float64))
    module = CONTENDERS[OURS].build(weights)
    if mode == "inputs":
        module.requires_grad_(False)
    expected = run_pass(mode, oracle_module, x.double().requires_grad_(), gradient.double())
    x.requires_grad_()
    before, served = {name: getattr(attention, name) for name in PLANNERS}, functional._SERVED
    plans = {name: plan.__wrapped__ for name, plan in before.items()}  # nothing remembered
    calls: dict[Config, measure.Call] = {}
    try:
        for config in candidates(kernel, shape.dim):
            call = with_planners(
                planners(kernel, config, plans),
                functools.partial(run_pass, mode, module, x, gradient),
            )
            try:
                measure.check(f"{kernel} {config}", call(), expected)
            except Exception as error:  # too large for the GPU, or wrong: say so, and go on
                tqdm.write(f"left out: {kernel} {tuple(config)}: {str(error).splitlines()[0]}")
                continue
            calls[config] = call
        del expected
        sample = measure.sampler_for(device)
        named = {str(tuple(config)): call for config, call in calls.items()}
        first = measure.interleaved(named, seconds=0.0, min_rounds=2, sample=sample)
        best = min((timing.median for timing in first.values()), default=0.0)
        hopeful = {n: named[n] for n, timing in first.items() if timing.median <= HOPEFUL * best}
        timings = measure.interleaved(hopeful, seconds=seconds, sample=sample)
        return {Config(*ast.literal_eval(name)): t.median for name, t in timings.items()}
    finally:
        functional._SERVED = served
        for name, plan in before.items():
            setattr(attention, name, plan)


def tune(
    kernels: Sequence[str],
    channels: Sequence[int],
    itemsizes: Sequence[int],
    arch: str,
    measure_one: Callable[[str, int, LayerShape], Timings],
    *,
    keep: Callable[[dict[str, Any]], object] = lambda _: None,
) -> dict[str, Winners]:
    """The rows of each kernel; ``keep`` is given every figure as soon as it is known."""
    tuned: dict[str, Winners] = {}
    for kernel, itemsize in tqdm(list(itertools.product(kernels, itemsizes)), desc="tune"):
        measured: dict[int, Timings] = {}
        for dim in channels:
            if not serves(kernel, itemsize, dim):
                continue
            timings = measure_one(kernel, itemsize, workload(kernel, dim))
            if not timings:
                tqdm.write(f"{kernel}, {itemsize} bytes, D = {dim}: no candidate ran")
                continue
            measured[dim] = timings
            for config, seconds in timings.items():
                figures = {"kernel": kernel, "itemsize": itemsize, "dim": dim}
                keep(figures | {"config": tuple(config), "microseconds": seconds * 1e6})
        if measured:
            current = functools.partial(_current, kernel, arch, itemsize)
            name = kernel if itemsize == 2 else f"{kernel}.float32"
            tuned[name] = choose_rows(measured, current=current, end=reach(kernel, itemsize))
    return tuned


def _current(kernel: str, arch: str, itemsize: int, channels: int) -> Config | None:
    try:
        return configs.config_of(kernel, arch, itemsize, channels)
    except ValueError:  # no row holds so many channels
        return None


def _write_figures(path: Path, header: dict[str, Any], rows: list[Any], row: Any) -> None:
    rows.append(row)
    report.write_json(path, {"environment": header, "rows": rows})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, help="write every figure here")
    parser.add_argument("--kernels", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--channels", nargs="+", type=int, default=CHANNELS, metavar="D")
    parser.add_argument("--itemsizes", nargs="+", type=int, choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=1.0, help="timing, a kernel and D")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, write no table")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks.tune measures on a GPU and torch finds none here; the tables in "
            f"{TABLE_FILE} stay as they are. Without one: python -m benchmarks.compile_report"
        )
    device = torch.device("cuda")
    arch = configs.architecture(device)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    keep = functools.partial(_write_figures, options.json, environment.describe(device), [])
    measure_one = functools.partial(measure_one_on, device, options.seconds)
    for kernel in options.kernels:
        dims, itemsizes = sorted(options.channels), options.itemsizes
        tuned = tune([kernel], dims, itemsizes, arch, measure_one, keep=keep)
        print("".join(f'"{name}": {rows_text(rows)}\n' for name, rows in tuned.items()))
        if not options.dry_run:
            write_table(TABLE_FILE, arch, tuned)
    return 0


def measure_one_on(
    device: torch.device, seconds: float, kernel: str, itemsize: int, shape: LayerShape
) -> Timings:
    return measure_candidates(kernel, itemsize, shape, device, seconds=seconds)


if __name__ == "__main__":
    raise SystemExit(main())
