"""The machine code of every kernel of the fused layer, in every configuration that can be picked.

``python -m benchmarks.compile_report [--json FILE]`` compiles for sm_80, sm_90, sm_100 and gfx942;
no GPU is needed. It prints a row each and fails if one breaks the rules of :func:`broken_rules`.

``config`` names the dtype, D, the layout of tokens in memory and the tile; ``registers`` are those
of a thread; ``hgmma`` counts the instructions of sm_90's tensor cores, and is null elsewhere
(products in float32 have none, for they are not rounded to TF32 unless torch allows it);
``disturbed`` those instructions that touch registers of a product under way (:mod:`.hazards`);
``load_128`` and ``load_narrow`` count global loads of 16 bytes and of fewer.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import math
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks import environment, report
from sep_attn.triton_kernels import configs

# Triton decides when it is imported whether kernels are compiled: only the workers import it.
if TYPE_CHECKING:
    from benchmarks.machine_code import Launch, LayerCase

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
KEYS = (
    "kernel",
    "config",
    "target",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "hgmma",
    "disturbed",
    "load_128",
    "load_narrow",
    "products",
)
# Bytes of shared memory a program can have, and threads of a warp.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
WARP = {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 64}
DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by the bytes of a value
# An open row of a table holds for every larger D; it is compiled at this many more channels.
BEYOND = 256
SIDE_BY_SIDE = (16, 64)  # tokens of slices of which a tile holds several
SHARES = 8  # of a target's kernels, each a process's work
# Shared memory of a multiprocessor of sm_90, and what each program takes of it besides its own.
MEMORY, OVERHEAD = 228 * 1024, 1024
# Kernels whose products are of float32 sums, whatever the dtype of the layer.
FLOAT32_PRODUCTS = ("context_bwd_kernel", "key_weight_bwd_kernel")
# What it means that a kernel is not given something.
ABSENT = {
    "gated_ptr": "gated values not stored",
    "grad_context_ptr": "no weights' gradients",
    "rest_ptr": "one result",
    "grad_source_ptr": "no gradient of x_prev",
    "bias_ptr": "no bias",
}
# Up to this D a program moves more than it multiplies: another is to multiply meanwhile.
MOST_SIDE_BY_SIDE = 128

Row = dict[str, Any]


class Share(NamedTuple):
    """Every ``count``-th kernel of a target, from ``index`` on."""

    target: str
    index: int
    count: int
    kernels: tuple[str, ...]
    channels: tuple[int, ...]


def channels_of(target: str, itemsize: int) -> list[int]:
    """The numbers of channels that together pick every row of the target's tables."""
    channels = set()
    for choice in configs.every_config((target,)):
        if choice.itemsize == itemsize:
            open_end = max(choice.channels_from - 1, 512) + BEYOND
            channels.add(choice.channels_to or open_end)
    return sorted(channels)


def layer_cases(target: str, channels: Sequence[int] = ()) -> Iterator[LayerCase]:
    """Calls of the layer that together pick every row, on tokens as ViTs and as MobileViTv2 lay
    them out; ``channels`` leaves only these D."""
    from benchmarks.machine_code import LayerCase

    for itemsize, dtype in DTYPES.items():
        for dim in channels_of(target, itemsize):
            if channels and dim not in channels:
                continue
            fused = dim <= configs.MOST_FUSED_CHANNELS[itemsize]
            if itemsize == 2:
                for tokens in SIDE_BY_SIDE:
                    path = "short" if fused else ""
                    yield LayerCase((2, tokens, dim), dtype, path)
                    yield LayerCase((2, dim, 4, tokens), dtype, path, patch=(4, 1))
                # A gradient of x_prev; and tiles of fewer tokens than a word holds, in patches.
                yield LayerCase((2, dim, 4, 1024), dtype, "", patch=(4, 1), cross=True)
                if not fused:
                    yield LayerCase((2, dim, 16, 64), dtype, "", patch=(2, 2))
            for shape, patch in (((2, 2048, dim), (1, 1)), ((2, dim, 4, 1024), (4, 1))):
                if itemsize == 4 and patch != (1, 1):
                    continue
                if fused:
                    yield LayerCase(shape, dtype, "short", patch=patch, backward=False)
                yield LayerCase(shape, dtype, "long" if fused else "", patch=patch)
                # Without gradients of weights, as in a model of which only a part is trained.
                yield LayerCase(shape, dtype, "", patch=patch, need_weight_grad=False)


def programs_side_by_side(row: Row) -> int:
    """How many programs of a kernel fit on a multiprocessor of sm_90."""
    warps = int(row["config"].split("warps=")[1].split()[0])
    threads = configs.WARP * warps
    by_registers = configs.REGISTERS // (math.ceil(row["registers"] / 8) * 8 * threads)
    return min(by_registers, MEMORY // (row["shared_bytes"] + OVERHEAD))


def _is_half(name: str) -> bool:
    return name.startswith(("bfloat16", "float16"))


def _has_words(config: str) -> bool:
    """Whether 16 bytes that lie together in memory belong to one tile: a narrow tile of tokens in
    ``[B, D, P, N]`` has fewer."""
    if "tokens_wide" in config:
        tokens = re.search(r"BLOCK_N=(\d+)", config)
        return tokens is not None and int(tokens[1]) * (2 if _is_half(config) else 4) >= 16
    return "channels_wide" in config


def _moves_most(row: Row) -> bool:
    if row["kernel"] not in configs.WHOLE_TOKEN_KERNELS:
        return False
    dim = re.search(r"D=(\d+)", row["config"])
    return dim is not None and int(dim[1]) <= MOST_SIDE_BY_SIDE


def describe_config(case: LayerCase, launch: Launch) -> str:
    """``"bfloat16 [B,N,D] D=128 channels_wide BLOCK_N=128 ... warps=8 stages=3"``."""
    constants = launch.constexprs
    dimensions = "[B,D,P,N]" if case.patch[1] == 1 else "[B,D,H,W]"
    if len(case.shape) == 3:
        dimensions = "[B,N,D]"
    parts = [str(case.dtype).removeprefix("torch."), dimensions]
    if "D" in constants:
        parts.append(f"D={constants['D']}")
    layouts = [value for name, value in constants.items() if name.endswith("LAYOUT")]
    parts += dict.fromkeys(layout for layout in layouts if layout)
    for name, value in constants.items():
        unusual = name in ("GROUPS", "BANDS", "SLICES", "TRANSPOSED") and value not in (1, False)
        if unusual or name == "EPILOGUE" or name.startswith("BLOCK"):
            parts.append(f"{name}={value}")
    for name, words in ABSENT.items():
        if constants.get(name, launch) is None:
            parts.append(words)
    unaligned = [
        name
        for place, name in enumerate(launch.kernel.arg_names)
        if (name == "values" or str(launch.signature[name]).startswith("*"))
        and not any("tt.divisibility" in one for one in launch.attributes.get((place,), ()))
    ]
    parts += [f"unaligned={','.join(unaligned)}"] if unaligned else []
    parts += [f"warps={launch.options['num_warps']}", f"stages={launch.options['num_stages']}"]
    return " ".join(parts)


def find_launches(
    target: str, kernels: Sequence[str] = (), channels: Sequence[int] = ()
) -> list[tuple[str, Launch]]:
    """Every distinct kernel of :func:`layer_cases`, with its configuration in words."""
    from benchmarks import machine_code

    found: dict[Launch, str] = {}
    for case in layer_cases(target, channels):
        with machine_code.recording(machine_code.TARGETS[target]) as launches:
            machine_code.launch_layer(case, target)
        for launch in launches:
            if not kernels or launch.name in kernels:
                found.setdefault(launch, describe_config(case, launch))
    return [(config, launch) for launch, config in found.items()]


def compile_share(share: Share) -> list[Row]:
    """The rows of one process's work."""
    from benchmarks import machine_code

    torch.set_num_threads(1)
    target = machine_code.TARGETS[share.target]
    rows = []
    launches = find_launches(share.target, share.kernels, share.channels)
    for config, launch in launches[share.index :: share.count]:
        found = machine_code.resources(machine_code.compile_launch(launch, target), target)
        loads = found["loads"]
        rows.append(
            {
                "kernel": launch.name,
                "config": config,
                "target": share.target,
                "registers": found["registers"],
                "spill_bytes": found["spilled"],
                "shared_bytes": found["shared"],
                "hgmma": found["hgmma"],
                "disturbed": None if found["disturbed"] is None else len(found["disturbed"]),
                "load_128": loads.get("128", 0),
                "load_narrow": sum(count for width, count in loads.items() if width != "128"),
                "products": found["products"],
            }
        )
    return rows


def compile_rows(shares: Sequence[Share], *, processes: int) -> list[Row]:
    """The rows of all shares, sorted by target, kernel and configuration.

    ``TRITON_INTERPRET`` must not be set: a worker's kernels would be interpreted.
    """
    context = multiprocessing.get_context("spawn")
    rows: list[Row] = []
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(compile_share, share) for share in shares]
        done = concurrent.futures.as_completed(futures)
        for future in tqdm(done, total=len(futures), desc="compile", unit="share"):
            rows += future.result()
    unique = {(row["target"], row["kernel"], row["config"]): row for row in rows}
    if len(unique) < len(rows):
        raise RuntimeError("two kernels have one name and configuration: describe_config must tell")
    order = {target: place for place, target in enumerate(TARGETS)}
    return sorted(rows, key=lambda row: (order[row["target"]], row["kernel"], row["config"]))


def broken_rules(rows: Iterable[Row]) -> list[str]:
    """What is wrong with a report, a line each; empty for a good one.

    On sm_90 nothing spills, every product in half precision runs on HGMMA, nothing disturbs one,
    and up to D = 128 two programs of the fused forward fit on a multiprocessor. On every target
    shared memory is within a program's limit, and where tokens and tile have whole words of 16
    bytes along the axis that is contiguous in memory, some load takes 16 bytes.
    """
    broken = []
    for row in rows:
        faults = []
        if row["shared_bytes"] > SHARED_MEMORY[row["target"]]:
            limit = SHARED_MEMORY[row["target"]]
            faults.append(f"{row['shared_bytes']} bytes of shared memory, {limit} are the limit")
        if _has_words(row["config"]) and row["load_128"] == 0:
            faults.append(f"none of its {row['load_narrow']} loads takes 16 bytes")
        if row["target"] == "sm_90":
            if row["spill_bytes"] > 0:
                faults.append(f"{row['spill_bytes']} bytes spilled")
            half = _is_half(row["config"]) and row["kernel"] not in FLOAT32_PRODUCTS
            if row["products"] and half and row["hgmma"] == 0:
                faults.append("a product in half precision without HGMMA")
            if row["disturbed"] > 0:
                faults.append(f"{row['disturbed']} instructions disturb a product under way")
            if _moves_most(row) and programs_side_by_side(row) < 2:
                faults.append("only one program fits on a multiprocessor")
        broken += [f"{row['target']} {row['kernel']} {row['config']}: {fault}" for fault in faults]
    return broken


def print_table(rows: Sequence[Row]) -> None:
    print(report.table(rows, {key: key.replace("_", "\n") for key in KEYS}))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--kernels", nargs="+", default=(), help="only kernels of these names")
    parser.add_argument("--channels", nargs="+", type=int, default=(), help="only these D")
    parser.add_argument("--processes", type=int, default=environment.usable_cores())
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        raise SystemExit(
            "benchmarks.compile_report needs Triton, which is not installed: pip install triton"
        )
    os.environ.pop("TRITON_INTERPRET", None)
    kernels, channels = tuple(options.kernels), tuple(options.channels)
    shares = [
        Share(target, index, SHARES, kernels, channels)
        for target in options.targets
        for index in range(SHARES)
    ]
    rows = compile_rows(shares, processes=options.processes)
    print_table(rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=0) + "\n")
    broken = broken_rules(rows)
    print("\n".join([f"\n{len(rows)} kernels, {len(broken)} rules broken", *broken]))
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
