"""The package's own part of the host's time for one small eager call, on a machine with no GPU.

``python -m benchmarks.host_time`` calls the layer at batch 1, N = 256, D = 128 on CPU tensors, with
a driver under Triton that launches nothing: kernels are compiled for sm_90 and handed to it. What
is left out is what a GPU adds: Triton's launcher in C and the driver's launch, 2 or 3 microseconds
each, the switch to the tensors' device and the allocator of its memory. So this is no measurement
of a GPU, only something to hold against the 30 microseconds of a call there, and to shorten.
Needs Triton, and ``TRITON_INTERPRET`` unset.
"""

from __future__ import annotations

import argparse
import contextlib
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import driver

from benchmarks import report
from benchmarks.gpu_tables import LATENCY_SHAPE, host_microseconds
from benchmarks.machine_code import TARGETS
from sep_attn import SeparableAttention, functional, ops, triton_kernels
from sep_attn.triton_kernels import attention

TARGET = "sm_90"
WARM_UP = 200


class LaunchNothing:
    """What Triton calls with a kernel's programs, stream and arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class QuietDriver:
    """All that Triton asks of a GPU."""

    launcher_cls = LaunchNothing
    utils = types.SimpleNamespace(
        load_binary=lambda *_: (1, 2, 0, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 232448},
    )

    def get_current_target(self) -> Any:
        return TARGETS[TARGET]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Inside, CPU tensors go to Triton's kernels, and nothing runs. The driver stays."""
    driver.set_active(QuietDriver())
    with (
        mock.patch.object(triton_kernels, "unavailable_reason", lambda _: None),
        mock.patch.object(attention, "architecture", lambda _: TARGET),
    ):
        yield


def calls(batch: int) -> dict[str, Callable[[], object]]:
    """The same call, from each of the rooms that it passes through."""
    module = SeparableAttention(LATENCY_SHAPE.dim, backend="triton", dtype=torch.bfloat16).eval()
    weights = [parameter.detach() for parameter in module.parameters()]
    x = torch.zeros(batch, LATENCY_SHAPE.tokens, LATENCY_SHAPE.dim, dtype=torch.bfloat16)
    arguments = (x, None, *weights, None, None, 0.0, "relu", 1, 1)

    def training(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return module(x)

    return {
        "module": partial(module, x),
        "functional": partial(functional.separable_attention, x, *weights, backend="triton"),
        "operator": partial(ops.separable_attention_inference, "triton", *arguments),
        "launcher": partial(triton_kernels.separable_attention_inference, *arguments),
        "module, with gradients": partial(training, x),
    }


def rows() -> Iterator[dict[str, Any]]:
    with torch.no_grad(), launching_nothing():
        for batch, launches in ((1, 3), (64, 1)):
            for name, call in calls(batch).items():
                for _ in range(WARM_UP):
                    call()
                yield {
                    "B": batch,
                    "N": LATENCY_SHAPE.tokens,
                    "D": LATENCY_SHAPE.dim,
                    "launches": launches,
                    "from": name,
                    "us": host_microseconds(call, lambda: None, rounds=100),
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
