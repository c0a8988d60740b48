"""What each kernel of the fused layer must move and compute, and the time that implies.

``python -m benchmarks.roofline`` prints it for the GPU workloads of :mod:`benchmarks.registry`, at
the ceilings of an H100 or at those given. A kernel's time is the larger of its bytes at the rate of
a copy and its operations at the rate of a product: every tensor is counted once, as if whatever is
read again came from a cache, and every operation runs on tensor cores. Where the rates of the L2
and of shared memory are known too, the time is also at least what the products move there
(:mod:`benchmarks.onchip`): with the L2's rate, which is another program's and not a ceiling, an
estimate, without it a bound from below.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks import onchip, registry, report
from benchmarks.ceilings import GpuRates
from benchmarks.registry import LayerShape
from sep_attn.triton_kernels.configs import MOST_FUSED_BACKWARD_CHANNELS, MOST_FUSED_CHANNELS

# Measured on an H100 (80 GB, SXM): a product in bfloat16, and a copy, read plus written. The L2
# gives at least what a product in tiles of 128 x 256 draws at 672e12 operations a second, which
# https://github.com/facebookexperimental/triton/pull/1065 reports; 132 multiprocessors read 128
# bytes of shared memory a cycle, at 1.755 GHz.
H100 = GpuRates(flops=798e12, bandwidth=3.0e12, cache=7.9e12, operands=29.7e12)

FLOAT32 = 4  # bytes of a statistic
# Passes over [S, N, D] that the paths of sep_attn.triton_kernels.attention cannot save.
FORWARD_PASSES = {"short": 2, "long": 3, "wide": 5}
NOTHING = onchip.Traffic()
SHORT_TOKENS = 1024  # a slice of up to so many tokens is to be read once


@dataclass(frozen=True)
class Work:
    """What one launch moves and computes; a multiplication and an addition are two operations."""

    kernel: str
    bytes: int
    operations: int
    on_chip: onchip.Traffic = NOTHING

    def bounds(self, rates: GpuRates) -> dict[str, float]:
        """The seconds that each of the rates asks for."""
        return {
            "bytes": self.bytes / rates.bandwidth,
            "operations": self.operations / rates.flops,
            "L2": self.on_chip.cache / rates.cache,
            "operands": self.on_chip.operands / rates.operands,
        }

    def seconds(self, rates: GpuRates) -> float:
        return max(self.bounds(rates).values())


def path_of(shape: LayerShape, itemsize: int) -> str:
    """``"short"``, ``"long"`` or ``"wide"``: the path that fits a shape of many slices or tokens.

    The launchers also send a few slices of up to 1,024 tokens and many values through ``"long"``,
    and few tokens of more than 256 channels through ``"wide"``, where a program a slice would leave
    the GPU idle.
    """
    if shape.dim > MOST_FUSED_CHANNELS[itemsize]:
        return "wide"
    return "short" if shape.tokens <= SHORT_TOKENS else "long"


def forward_floor(shape: LayerShape, itemsize: int, rates: GpuRates) -> float:
    """The least seconds of a forward pass: 2 S N D values moved while a slice stays on chip,
    3 S N D when it does not, 5 S N D where D > 512; or 4 S N D^2 operations."""
    values = shape.slices * shape.tokens * shape.dim
    moved = FORWARD_PASSES[path_of(shape, itemsize)] * values * itemsize
    return max(moved / rates.bandwidth, 4 * values * shape.dim / rates.flops)


def forward_work(
    shape: LayerShape, itemsize: int, *, path: str | None = None, keep_weights: bool = False
) -> list[Work]:
    """The launches of a forward pass.

    Args:
        shape: S slices of N tokens with D channels.
        itemsize: bytes of a value.
        path: of the launches; by default :func:`path_of`.
        keep_weights: whether the softmax weights are stored, as training needs them.
    """
    tokens, slices, dim = shape.slices * shape.tokens, shape.slices, shape.dim
    values, matrix = tokens * dim * itemsize, dim * dim * itemsize
    statistics = slices * (2 * dim + 1) * FLOAT32
    weights = tokens * FLOAT32 if keep_weights else 0
    pool_operations, context_operations = 4 * tokens * dim, 2 * slices * dim * dim
    # In half precision scores and pool of short slices are three products of so few rows.
    short_pool_operations = (
        6 * onchip.FEWEST_ROWS * tokens * dim if itemsize == 2 else pool_operations
    )
    product = 2 * tokens * dim * dim
    path = path or path_of(shape, itemsize)
    if path == "short":
        return [
            Work(
                "slice_fwd_kernel",
                2 * values + 3 * matrix + weights + statistics,
                2 * product + short_pool_operations + context_operations,
            )
        ]
    # One partial sum a slice at least; those of further splits are small and may stay in a cache.
    partials = slices * (dim + 3) * FLOAT32
    launches = [
        Work("score_pool_fwd_kernel", values + weights + partials, pool_operations),
        # Scores become weights.
        Work(
            "context_combine_kernel",
            matrix + partials + statistics + 2 * weights,
            context_operations,
        ),
    ]
    context = slices * dim * FLOAT32
    if path == "long":
        bytes_moved = 2 * values + 2 * matrix + context
        launches.append(Work("value_gate_output_fwd_kernel", bytes_moved, 2 * product))
    else:
        launches.append(Work("token_product_kernel", 2 * values + matrix + context, product))
        launches.append(Work("token_product_kernel", 2 * values + matrix, product))
    return launches


def backward_work(shape: LayerShape, itemsize: int) -> list[Work]:
    """The launches of a backward pass to x and all weights, the sums of vectors left out."""
    tokens, slices, dim = shape.slices * shape.tokens, shape.slices, shape.dim
    values, matrix = tokens * dim * itemsize, dim * dim * itemsize
    weight_grad = dim * dim * FLOAT32
    row, weights = slices * dim * FLOAT32, tokens * FLOAT32
    product = 2 * tokens * dim * dim
    if dim <= MOST_FUSED_BACKWARD_CHANNELS[itemsize]:
        # Reads x and the gradient of out, writes that of v; the four products are value, dy, and
        # the two gradients of weights.
        launches = [
            Work(
                "value_gate_weights_bwd_kernel",
                3 * values + 2 * matrix + 2 * row + 2 * weight_grad,
                4 * product,
            ),
            Work("sum_parts_kernel", 2 * weight_grad + 2 * matrix, 2 * dim * dim),
        ]
    else:
        # Writes the gated values too.
        launches = [
            Work("value_gate_bwd_kernel", 4 * values + 2 * matrix + 2 * row, 2 * product),
        ]
        for _ in ("output", "value"):
            launches.append(Work("weight_grad_kernel", 2 * values + weight_grad, product))
            launches.append(Work("sum_parts_kernel", weight_grad + matrix, dim * dim))
    # Reads the gradient of the context and the context, writes that and the pooled source's.
    launches.append(Work("context_bwd_kernel", 4 * row + matrix, 2 * slices * dim * dim))
    launches.append(Work("source_bwd_kernel", values + 2 * weights + row, 4 * tokens * dim))
    # The product that gives dx, and the pool's two rank-one terms.
    launches.append(
        Work(
            "token_product_kernel",
            2 * values + matrix + 2 * weights + row,
            product + 4 * tokens * dim,
        )
    )
    # The gradient of W_K, from that of the context and the pooled source.
    launches.append(
        Work("key_weight_bwd_kernel", 2 * row + weight_grad, 2 * slices * dim * dim),
    )
    launches.append(Work("sum_parts_kernel", weight_grad + matrix, dim * dim))
    return launches


def layer_work(shape: LayerShape, itemsize: int, *, mode: str) -> list[Work]:
    """All launches of a call, forward or forward and backward (``"training"``)."""
    if mode == "forward":
        return with_traffic(forward_work(shape, itemsize), shape, itemsize)
    forward = forward_work(shape, itemsize, keep_weights=True)
    return with_traffic(forward + backward_work(shape, itemsize), shape, itemsize)


def with_traffic(launches: Sequence[Work], shape: LayerShape, itemsize: int) -> list[Work]:
    """The same, with what the launches' products move on the chip, where that is known."""
    if itemsize != onchip.ITEMSIZE:
        return list(launches)
    return [
        dataclasses.replace(work, on_chip=onchip.traffic(work.kernel, shape) or work.on_chip)
        for work in launches
    ]


def layer_seconds(shape: LayerShape, itemsize: int, rates: GpuRates, *, mode: str) -> float:
    """What the launches of a call take at these rates, one after another."""
    return math.fsum(work.seconds(rates) for work in layer_work(shape, itemsize, mode=mode))


def forward_ratio(shape: LayerShape, itemsize: int, rates: GpuRates) -> float:
    """How many times its floor a forward pass takes at these rates."""
    seconds = layer_seconds(shape, itemsize, rates, mode="forward")
    return seconds / forward_floor(shape, itemsize, rates)


def rows(
    shapes: Sequence[LayerShape], itemsize: int, rates: GpuRates
) -> list[dict[str, str | int | float | None]]:
    """A row for each launch at each shape and in each mode."""
    return [
        {
            "slices": shape.slices,
            "tokens": shape.tokens,
            "dim": shape.dim,
            "pass": direction,
            "kernel": work.kernel,
            "megabytes": work.bytes / 1e6,
            "gigaoperations": work.operations / 1e9,
            "L2 megabytes": work.on_chip.cache / 1e6,
            "operand megabytes": work.on_chip.operands / 1e6,
            "microseconds": work.seconds(rates) * 1e6,
            "bound": max(bounds, key=bounds.__getitem__),
            "pass / floor": ratio,
        }
        for shape in shapes
        for direction, launches, ratio in (
            ("forward", forward_work(shape, itemsize), forward_ratio(shape, itemsize, rates)),
            ("backward", backward_work(shape, itemsize), None),
        )
        for work in with_traffic(launches, shape, itemsize)
        for bounds in [work.bounds(rates)]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument(
        "--flops", type=float, default=H100.flops, help="operations a second of a product"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=H100.bandwidth, help="bytes a second of a copy"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    options = parser.parse_args(arguments)
    rates = dataclasses.replace(H100, flops=options.flops, bandwidth=options.bandwidth)
    shapes = dict.fromkeys(
        (*registry.SHORT_SLICES, *registry.LONG_SLICES, *registry.MOBILEVITV2_LAYERS)
    )
    found = rows(list(shapes), getattr(torch, options.dtype).itemsize, rates)
    print(report.table(found, {name: name.replace(" ", chr(10)) for name in found[0]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
