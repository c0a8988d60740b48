"""Microbenchmarks of every kernel beside the same in eager PyTorch.

``python -m pytest benchmarks --benchmark-only``: the C++ kernels, or Triton's where there is a
GPU. What a kernel gives is compared with float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import measure, registry
from sep_attn import backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = "triton" if DEVICE.type == "cuda" else "native"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]
SHAPES = (  # (batch, tokens, channels)
    [(4, 256, 128), (1, 4096, 128), (1, 4096, 512)]
    if DEVICE.type == "cpu"
    else [(64, 256, 128), (8, 4096, 512), (1, 262144, 128)]
)

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason(BACKEND, DEVICE, torch.float32) is not None,
    reason=f"{BACKEND}: {backends.unavailable_reason(BACKEND, DEVICE, torch.float32)}",
)

Inputs = dict[str, Tensor]
Compute = Callable[[Inputs], Sequence[Tensor]]


@dataclass(frozen=True)
class Kernel:
    """An operator and the PyTorch that it replaces, on the same inputs."""

    operator: Compute
    eager: Compute
    outputs: int  # the leading outputs that both give


def operator(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.sep_attn, f"{name}_{BACKEND}").default


def pool(t: Inputs) -> Sequence[Tensor]:
    return operator("context_pool")(t["x"], t["scores"], None, None, 1, 1)


def pool_eager(t: Inputs) -> Sequence[Tensor]:
    weights = t["scores"].softmax(-1)
    return [(weights[..., None] * t["x"]).sum(1), weights.sum(-1), weights]


def pool_backward(t: Inputs) -> Sequence[Tensor]:
    return operator("context_pool_backward")(
        t["grad_context"],
        None,
        None,
        t["x"],
        t["pooled"],
        t["weight_sum"],
        t["weights"],
        None,
        1,
        1,
    )


def pool_backward_eager(t: Inputs) -> Sequence[Tensor]:
    weights, gradient = t["weights"].to(t["x"].dtype), t["grad_context"].to(t["x"].dtype)
    grad_weights = (t["x"] * gradient[:, None]).sum(-1)
    delta = (weights * grad_weights).sum(-1, keepdim=True)
    return [weights[..., None] * gradient[:, None], weights * (grad_weights - delta)]


def gate(t: Inputs) -> Sequence[Tensor]:
    return [operator("gate")(t["x"], t["context"], "relu", 1, 1)]


def gate_eager(t: Inputs) -> Sequence[Tensor]:
    return [F.relu(t["x"]) * t["context"][:, None]]


def gate_backward(t: Inputs) -> Sequence[Tensor]:
    return operator("gate_backward")(t["grad"], t["x"], t["context"], "relu", 1, 1)


def gate_backward_eager(t: Inputs) -> Sequence[Tensor]:
    grad_relu = t["grad"] * t["context"][:, None]
    return [grad_relu * (t["x"] > 0), (t["grad"] * F.relu(t["x"])).sum(1)]


def layer(t: Inputs) -> Sequence[Tensor]:
    return operator("separable_attention")(
        t["x"],
        None,
        t["in_weight"],
        t["in_bias"],
        t["out_weight"],
        t["out_bias"],
        None,
        None,
        "relu",
        1,
        1,
        True,
    )


def layer_eager(t: Inputs) -> Sequence[Tensor]:
    dim = t["x"].shape[-1]
    scores, keys, values = F.linear(t["x"], t["in_weight"], t["in_bias"]).split([1, dim, dim], -1)
    context = (scores.softmax(1) * keys).sum(1, keepdim=True)
    return [F.linear(F.relu(values) * context, t["out_weight"], t["out_bias"])]


def layer_backward(t: Inputs) -> Sequence[Tensor]:
    grad_x, _, *grads = operator("separable_attention_backward")(
        t["grad"],
        None,
        t["x"],
        None,
        t["in_weight"],
        t["in_bias"],
        t["out_weight"],
        None,
        t["layer_weights"],
        t["statistics"],
        t["values"],
        "relu",
        1,
        1,
        True,
        True,
    )
    return [grad_x, *grads]


def layer_backward_eager(t: Inputs) -> Sequence[Tensor]:
    """Backward alone: the graph of one forward pass is kept and gone through each time."""
    if "graph" not in t:
        names = ("x", "in_weight", "in_bias", "out_weight", "out_bias")
        leaves = {name: t[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            t["graph"] = layer_eager(leaves)[0]
        t["leaves"] = tuple(leaves.values())  # type: ignore[assignment]
    return torch.autograd.grad(t["graph"], t["leaves"], t["grad"], retain_graph=True)


KERNELS = {
    "context_pool": Kernel(pool, pool_eager, outputs=3),
    "context_pool_backward": Kernel(pool_backward, pool_backward_eager, outputs=2),
    "gate": Kernel(gate, gate_eager, outputs=1),
    "gate_backward": Kernel(gate_backward, gate_backward_eager, outputs=2),
}
if BACKEND == "native":  # on a GPU the layer is these kernels and torch's products
    KERNELS["separable_attention"] = Kernel(layer, layer_eager, outputs=1)
    KERNELS["separable_attention_backward"] = Kernel(
        layer_backward, layer_backward_eager, outputs=5
    )


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
    """Random inputs of every kernel, and the statistics that its forward pass leaves."""
    batch, tokens, dim = shape
    weights = registry.SEPARABLE.weights(dim).to(DEVICE, dtype)
    inputs = {
        "x": registry.draw_tokens(*shape, DEVICE, dtype),
        "grad": registry.draw_tokens(*shape, DEVICE, dtype, seed=2),
        "scores": registry.draw_tokens(1, batch, tokens, DEVICE, dtype, seed=3)[0],
        "context": registry.draw_tokens(1, batch, dim, DEVICE, dtype, seed=4)[0],
        "grad_context": registry.draw_tokens(1, batch, dim, DEVICE, torch.float32, seed=5)[0],
        "in_weight": weights.in_weight,
        "in_bias": weights.in_bias,
        "out_weight": weights.out_weight,
        "out_bias": weights.out_bias,
    }
    inputs["pooled"], inputs["weight_sum"], inputs["weights"] = pool(inputs)
    if BACKEND == "native":
        _, inputs["layer_weights"], inputs["statistics"], inputs["values"] = layer(inputs)
    return inputs


@pytest.fixture(autouse=True)
def without_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("contender", ["kernel", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", KERNELS)
def test_kernel(
    name: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    contender: str,
    benchmark: BenchmarkFixture,
) -> None:
    kernel, inputs = KERNELS[name], make_inputs(shape, dtype)
    oracle = kernel.eager({name: tensor.double() for name, tensor in inputs.items()})
    eager = kernel.eager(inputs)
    if contender == "kernel":
        results = kernel.operator(inputs)[: kernel.outputs]
        for result, expected, plain in zip(results, oracle, eager, strict=True):
            measure.check(name, [result.to(dtype)], [expected], [plain])

    compute = kernel.operator if contender == "kernel" else kernel.eager

    def call() -> None:
        compute(inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name} {shape} {str(dtype).removeprefix('torch.')}"
    benchmark.name = contender
    benchmark.extra_info.update(device=str(DEVICE), backend=BACKEND)
    benchmark(call)
