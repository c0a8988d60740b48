"""Compiles what the tables of :mod:`benchmarks.gpu_tables` launch, on all cores at once.

Triton compiles a kernel where it is first launched, one after another and seconds each: over a
table that is a minute in which the GPU waits. ``python -m benchmarks.precompile`` leaves the same
kernels in Triton's cache on disk beforehand, where each table's process finds them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks import environment, gpu_tables, machine_code, registry
from benchmarks.machine_code import Launch, LayerCase
from benchmarks.registry import LayerShape
from sep_attn.triton_kernels import launch as launching
from sep_attn.triton_kernels.configs import architecture


def cases(dtype: torch.dtype) -> Iterator[LayerCase]:
    """The calls of our layer in every table, those of the first tables first."""

    def in_patches(shape: LayerShape, inference: bool) -> LayerCase:
        patches = math.gcd(shape.slices, registry.MOBILEVITV2_PATCHES)
        images = shape.slices // patches
        layout = (images, shape.dim, patches, shape.tokens)
        return LayerCase(layout, dtype, patch=(patches, 1), inference=inference)

    attention = [
        LayerShape(batch, tokens, gpu_tables.ATTENTION_DIM)
        for tokens in gpu_tables.ATTENTION_TOKENS
        for batch in {1, max(1, gpu_tables.ATTENTION_WORK // tokens)}
    ]
    for shape in (
        *registry.SHORT_SLICES,
        *registry.LONG_SLICES,
        gpu_tables.LATENCY_SHAPE,
        *attention,
    ):
        yield LayerCase((shape.slices, shape.tokens, shape.dim), dtype, inference=True)
    layers = dict.fromkeys(registry.MOBILEVITV2_LAYERS)
    yield from (in_patches(shape, True) for shape in layers)
    yield from (in_patches(shape, False) for shape in (*layers, *gpu_tables.LONG_IN_MEMORY))


def find_launches(todo: Sequence[LayerCase], target: Any, name: str) -> list[Launch]:
    """Every distinct kernel of these calls for Triton's ``target``, which the tables call ``name``.
    The calls' tensors have no memory: some would not fit."""
    with (
        mock.patch.object(launching, "on_device", lambda _: contextlib.nullcontext()),
        torch.device("meta"),
        machine_code.recording(target) as launches,
    ):
        for case in todo:
            machine_code.launch_layer(case, name)
    return list(dict.fromkeys(launches))


def compile_share(todo: Sequence[LayerCase], target: Any, name: str, index: int, count: int) -> int:
    """Compiles every ``count``-th kernel from ``index`` on; gives their number."""
    torch.set_num_threads(1)
    share = find_launches(todo, target, name)[index::count]
    for launch in share:
        machine_code.compile_launch(launch, target)
    return len(share)


def compile_all(todo: Sequence[LayerCase], target: Any, name: str, *, processes: int) -> int:
    """Compiles every kernel of these calls; gives their number."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        shares = [
            pool.submit(compile_share, todo, target, name, index, processes)
            for index in range(processes)
        ]
        return sum(share.result() for share in shares)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precompile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--processes", type=int, default=environment.usable_cores())
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks.precompile compiles for the GPU at hand; torch finds none here"
        )
    from triton.runtime import driver

    target = driver.active.get_current_target()
    todo = list(cases(getattr(torch, options.dtype)))
    name = architecture(torch.device("cuda"))
    count = compile_all(todo, target, name, processes=options.processes)
    print(f"{count} kernels for {name}, {options.processes} at a time")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
