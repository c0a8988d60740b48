"""The package's own part of the host's time for one small eager call, on a machine with no GPU.

``python -m benchmarks.host_time`` calls the layer at batch 1, D = 128 on CPU tensors, with a driver
under Triton that launches nothing: kernels are compiled for sm_90 and handed to it. What is left
out is what a GPU adds: Triton's launcher in C and the driver's launch, 2 or 3 microseconds each,
the switch to the tensors' device and the allocator of its memory. So this is no measurement of a
GPU, only something to hold against the 30 microseconds of a call there, and to shorten.
Needs Triton, and ``TRITON_INTERPRET`` unset.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import driver

from benchmarks import report
from benchmarks.gpu_tables import LATENCY_SHAPE, host_microseconds
from benchmarks.machine_code import TARGET, LaunchNothing, QuietDriver
from benchmarks.registry import LayerShape
from sep_attn import SeparableAttention, functional, ops, triton_kernels
from sep_attn.triton_kernels import attention, launch

WARM_UP = 200
GPU = torch.device("cuda", 0)
SHAPES = (LATENCY_SHAPE, replace(LATENCY_SHAPE, tokens=1024))  # one launch, and three


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Inside, CPU tensors go to Triton's kernels, and nothing runs. The driver stays."""
    driver.set_active(QuietDriver())
    current_stream = launch.current_stream
    with (
        mock.patch.object(triton_kernels, "unavailable_reason", lambda _: None),
        mock.patch.object(attention, "architecture", lambda _: TARGET),
        mock.patch.object(launch, "current_stream", lambda _: current_stream(GPU)),
    ):
        yield


def calls(shape: LayerShape) -> dict[str, Callable[[], object]]:
    """The same call, from each of the rooms that it passes through."""
    module = SeparableAttention(shape.dim, backend="triton", dtype=torch.bfloat16).eval()
    weights = [parameter.detach() for parameter in module.parameters()]
    x = torch.zeros(shape.slices, shape.tokens, shape.dim, dtype=torch.bfloat16)
    arguments = (x, None, *weights, None, None, 0.0, "relu", 1, 1)

    gradient, wanted = torch.zeros_like(x), list(module.parameters())

    def training(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return module(x)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        x.requires_grad_()
        gradients = torch.autograd.grad(training(x), [x, *wanted], gradient)
        x.requires_grad_(False)
        return gradients

    return {
        "module": partial(module, x),
        "functional": partial(functional.separable_attention, x, *weights, backend="triton"),
        "operator": partial(ops.separable_attention_inference, "triton", *arguments),
        "launcher": partial(triton_kernels.separable_attention_inference, *arguments),
        "module, with gradients": partial(training, x),
        "module, forward and backward": partial(step, x),
    }


def count_launches(call: Callable[[], object]) -> int:
    with mock.patch.object(LaunchNothing, "__call__") as launched:
        call()
    return launched.call_count


def rows(rounds: int = 100) -> Iterator[dict[str, Any]]:
    with torch.no_grad(), launching_nothing():
        for shape in SHAPES:
            for name, call in calls(shape).items():
                for _ in range(WARM_UP):
                    call()
                yield {
                    "B": shape.slices,
                    "N": shape.tokens,
                    "D": shape.dim,
                    "launches": count_launches(call),
                    "from": name,
                    "us": host_microseconds(call, lambda: None, rounds=rounds),
                }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    torch.set_num_threads(1)
    found = list(rows())
    print(report.table(found, {key: key for key in found[0]}))


if __name__ == "__main__":
    main()
