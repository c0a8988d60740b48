"""What no correct program can beat, measured in the run that reports the distance to it.

The layer keeps two products a token in the forward pass and six in training, ``2 D^2`` operations
each. On a CPU the ceiling is those products by ``torch.mm`` and nothing else. On a GPU it is the
slower of the operations at the rate of one large product and the least memory traffic at the rate
of one large copy. Above both stands what the processor's multiply-add units do on registers alone.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.registry import SEPARABLE

PRODUCTS = {"forward": 2, "training": 6}
# Passes over [B, N, D] that remain while a slice stays on chip. Forward: read x, write out.
# Training adds: read x and the gradient of out, write the gradient of x.
PASSES = {"forward": 2, "training": 5}


@dataclass(frozen=True)
class GpuRates:
    """The rates of the device at hand."""

    flops: float  # operations a second of a large product
    bandwidth: float  # bytes a second, read plus written, of a large copy
    cache: float = math.inf  # bytes a second between the L2 and shared memory; infinite: not known
    operands: float = math.inf  # bytes a second that tensor cores read from shared memory


def gpu_rates(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5) -> GpuRates:
    """Measures a product of 8192 x 8192 matrices of random values (4096 from 4 bytes an element)
    and a copy of 1 GiB."""
    size = 8192 if dtype.itemsize < 4 else 4096
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(left)
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timings = measure.interleaved(
        {
            "product": lambda: torch.mm(left, right, out=product),
            "copy": lambda: target.copy_(source),
        },
        seconds=seconds,
        sample=measure.sampler_for(device),
    )
    return GpuRates(
        2 * size**3 / timings["product"].median, 2 * source.numel() / timings["copy"].median
    )


def gpu_floor(
    rates: GpuRates, batch: int, tokens: int, dim: int, itemsize: int, *, mode: str
) -> float:
    """The least seconds a call can take on a GPU of these rates."""
    operations = PRODUCTS[mode] * 2 * batch * tokens * dim**2
    traffic = PASSES[mode] * batch * tokens * dim * itemsize
    return max(operations / rates.flops, traffic / rates.bandwidth)


def cpu_products(x: Tensor, *, mode: str) -> measure.Call:
    """A call of the ``torch.mm`` alone that the layer needs on ``x`` [B, N, D], into memory that
    is there before."""
    dim = x.shape[-1]
    tokens = x.reshape(-1, dim)
    weights = SEPARABLE.weights(dim).to(x.device, x.dtype)
    value_weight, out_weight = weights.in_weight[1 + dim :], weights.out_weight
    values, out = torch.empty_like(tokens), torch.empty_like(tokens)
    if mode == "forward":

        def forward() -> None:
            torch.mm(tokens, value_weight.t(), out=values)
            torch.mm(values, out_weight.t(), out=out)

        return forward

    grad_out, grad_y, grad_x = torch.randn_like(out), torch.empty_like(out), torch.empty_like(out)
    grad_weight = torch.empty_like(out_weight)

    def training() -> None:
        torch.mm(tokens, value_weight.t(), out=values)
        torch.mm(values, out_weight.t(), out=out)
        torch.mm(grad_out, out_weight, out=grad_y)
        torch.mm(grad_out.t(), values, out=grad_weight)
        torch.mm(grad_y, value_weight, out=grad_x)
        torch.mm(grad_y.t(), tokens, out=grad_weight)

    return training


@dataclass(frozen=True)
class CpuPeaks:
    """The most operations a second of one instruction on registers alone, by number of threads."""

    multiply_adds: dict[int, float]  # float32
    bf16_dot_products: dict[int, float]  # of pairs, into float32; empty where there are none


def cpu_peaks(threads: Sequence[int]) -> CpuPeaks:
    """The best of twenty runs of ``fma_peak.cpp``, compiled here with all that this processor has.
    Empty where there is no compiler."""
    peaks = CpuPeaks({}, {})
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return peaks
    with tempfile.TemporaryDirectory() as directory:
        program = str(Path(directory) / "fma_peak")
        source = str(Path(__file__).with_name("fma_peak.cpp"))
        options = ["-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-pthread"]
        subprocess.run([compiler, *options, source, "-o", program], check=True)
        for count in threads:
            printed = subprocess.run([program, str(count)], check=True, capture_output=True).stdout
            multiply_adds, *dot_products = map(float, printed.split())
            peaks.multiply_adds[count] = multiply_adds
            if dot_products:
                peaks.bf16_dot_products[count] = dot_products[0]
    return peaks
