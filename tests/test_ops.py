"""The operators: pool and gate against float64, and what PyTorch asks of an operator."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import distance
from test_layer import backend_or_skip, device_of
from torch import Tensor

from sep_attn import functional, native, ops, reference
from sep_attn.layout import kept_values_size

BACKENDS = ["native", "triton"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def operator(name: str, backend: str) -> Any:
    return getattr(torch.ops.sep_attn, f"{name}_{backend}").default


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [value.detach().requires_grad_() for value in inputs]
    result = function(*leaves)
    direction = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view(result.shape)
    loss = (result * direction.to(result)).sum()
    return [result.detach(), *torch.autograd.grad(loss, leaves)]


def assert_close_to_oracle(
    function: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor
) -> None:
    oracle = gradients(plain, *(value.double() for value in inputs))
    in_dtype = gradients(plain, *inputs)
    for result, expected, baseline in zip(
        gradients(function, *inputs), oracle, in_dtype, strict=True
    ):
        assert result.dtype == inputs[0].dtype
        assert distance(result, expected) <= 2 * distance(baseline, expected) + 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 70, 24), (1, 1, 5), (3, 130, 33), (0, 7, 4)])
def test_context_pool(
    shape: tuple[int, int, int],
    masked: bool,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, dtype)
    x = torch.randn(shape, device=device).to(dtype)
    scores = (3 * torch.randn(shape[:2], device=device)).to(dtype)
    mask = torch.rand(shape[:2], device=device) < 0.5 if masked else None
    if mask is not None and shape[0] > 1:
        mask[0] = True
    assert_close_to_oracle(
        lambda x, s: functional.context_pool(x, s, key_padding_mask=mask, backend=backend),
        lambda x, s: reference.context_pool(x, s, key_padding_mask=mask),
        x,
        scores,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["relu", "identity"])
@pytest.mark.parametrize("shape", [(2, 70, 24), (1, 1, 5), (3, 130, 33), (0, 7, 4)])
def test_gate(
    shape: tuple[int, int, int],
    act: str,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, dtype)
    v = torch.randn(shape, device=device).to(dtype)
    context = torch.randn(shape[0], shape[2], device=device).to(dtype)
    assert_close_to_oracle(
        lambda v, c: functional.gate(v, c, act=act, backend=backend),
        lambda v, c: reference.gate(v, c, act=act),
        v,
        context,
    )


def pool_arguments(device: torch.device, grad: bool = True) -> tuple[Any, ...]:
    x = torch.randn(1, 3, 4, 6, device=device, requires_grad=grad)
    scores = torch.randn(1, 4, 6, device=device, requires_grad=grad)
    mask = torch.rand(1, 4, 6, device=device) < 0.3
    scale = reference.dropout_scale(x.detach(), 0.2)
    return x, scores, mask, scale, 2, 2


def gate_arguments(device: torch.device, grad: bool = True) -> tuple[Any, ...]:
    v = torch.randn(2, 9, 5, device=device, requires_grad=grad)
    context = torch.randn(2, 5, device=device, requires_grad=grad)
    return v, context, "relu", 1, 1


def layer_arguments(device: torch.device, grad: bool = True, dim: int = 6) -> tuple[Any, ...]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=grad)

    x, x_prev = leaf(2, dim, 4, 10), leaf(2, dim, 4, 8)
    mask = torch.rand(2, 4, 8, device=device) < 0.3
    scale = reference.dropout_scale(x_prev.detach(), 0.2)
    weights = leaf(1 + 2 * dim, dim), leaf(1 + 2 * dim), leaf(dim, dim), leaf(dim)
    return x, x_prev, *weights, mask, scale, "relu", 4, 1, True


def layer_arguments_with_kept_values(device: torch.device, grad: bool = True) -> tuple[Any, ...]:
    return layer_arguments(device, grad, dim=16)


def triton_layer_arguments(
    device: torch.device, grad: bool = True, dim: int = 6
) -> tuple[Any, ...]:
    *arguments, _, act, patch_h, patch_w, _ = layer_arguments(device, grad, dim)
    seed = torch.randint(2**31 - 1, (1,), device=device)
    return *arguments, seed, 0.2, act, patch_h, patch_w


LAYERS = {"native": layer_arguments, "triton": triton_layer_arguments}
FORWARDS = [
    ("context_pool", "native", pool_arguments),
    ("context_pool", "triton", pool_arguments),
    ("gate", "native", gate_arguments),
    ("gate", "triton", gate_arguments),
    ("separable_attention", "native", layer_arguments),
    ("separable_attention", "native", layer_arguments_with_kept_values),
    ("separable_attention", "triton", triton_layer_arguments),
]


def traced_tolerance(device: torch.device) -> dict[str, float]:
    """On a GPU a traced program adds in another order, and sums of a thousand nearly cancel."""
    return {"rtol": 1e-5, "atol": 1e-3} if device.type == "cuda" else {}


@pytest.mark.parametrize("name, backend, arguments", FORWARDS)
def test_opcheck(
    name: str, backend: str, arguments: Callable[..., tuple[Any, ...]], device: torch.device
) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    for grad in (True, False):
        torch.library.opcheck(
            operator(name, backend), arguments(device, grad=grad), **traced_tolerance(device)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_inference(backend: str, device: torch.device) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    arguments = LAYERS[backend](device, grad=False)
    of_inference = arguments[:-1] if backend == "native" else arguments
    inference = operator("separable_attention_inference", backend)
    torch.library.opcheck(inference, of_inference)
    assert torch.equal(
        inference(*of_inference), operator("separable_attention", backend)(*arguments)[0]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_has_the_gradients_of_the_layer(backend: str, device: torch.device) -> None:
    """For a program that was traced under no_grad and is differentiated all the same."""
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    arguments = LAYERS[backend](device, dim=16)
    of_inference = arguments[:-1] if backend == "native" else arguments
    torch.library.opcheck(operator("separable_attention_inference", backend), of_inference)
    leaves = [each for each in arguments[:6] if each is not arguments[3]]  # all but one bias
    arguments[3].requires_grad_(False)
    out = operator("separable_attention_inference", backend)(*of_inference)
    grad_out = torch.randn_like(out)
    expected = operator("separable_attention", backend)(*arguments)[0]
    found = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    wanted = torch.autograd.grad(expected, leaves, grad_out)
    assert all(map(torch.equal, found, wanted))
    (twice,) = torch.autograd.grad(out, leaves[:1], grad_out.requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        twice.sum().backward()


@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "convolution"])
def test_opcheck_of_the_packed_form(convolution: bool) -> None:
    backend_or_skip("native", torch.device("cpu"), torch.float32)
    x, _, *weights = layer_arguments(torch.device("cpu"), grad=False, dim=16)[:6]
    x = x.flatten(2).mT.repeat(2, 1, 1)
    packed = operator("separable_attention_packed", "native")
    memory = torch.zeros(native.packed_weights_bytes(torch.float32, 16), dtype=torch.uint8)
    expected = packed(x, *weights, memory, True, 0, 0)
    if convolution:
        weights = [each[:, :, None, None] if each.dim() == 2 else each for each in weights]
    arguments = (x, *weights, memory, True, 0, 0)
    # What the memory holds is no result: only the fake and the schema's aliases are checked.
    torch.library.opcheck(
        packed,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    assert torch.equal(packed(*arguments), expected)
    decomposed = ops.DECOMPOSITIONS[packed](*arguments)
    torch.testing.assert_close(decomposed, expected, atol=1e-4, rtol=1e-4)


def test_values_are_kept_for_a_backward_pass_only() -> None:
    backend_or_skip("native", torch.device("cpu"), torch.float32)
    layer = operator("separable_attention", "native")
    for dim, for_backward, kept in ((16, True, True), (16, False, False), (6, True, False)):
        arguments = layer_arguments(torch.device("cpu"), grad=False, dim=dim)
        values = layer(*arguments[:-1], for_backward)[3]
        assert values.numel() == (kept_values_size(arguments[0]) if kept else 0)


def test_kept_values_say_how_they_lie() -> None:
    # A compiler may hand x to the backward pass in other strides than it had in the forward pass,
    # and may have replaced the forward pass by its decomposition.
    backend_or_skip("native", torch.device("cpu"), torch.float32)
    layer = operator("separable_attention", "native")
    backward = operator("separable_attention_backward", "native")
    arguments = [
        argument.double()
        if isinstance(argument, Tensor) and argument.is_floating_point()
        else argument
        for argument in layer_arguments(torch.device("cpu"), grad=False, dim=16)
    ]
    channels_first, x_prev, qkv_weight, qkv_bias, out_weight, out_bias, mask, scale, *options = (
        arguments
    )
    channels_last = channels_first.to(memory_format=torch.channels_last)
    results = []
    for forward, x in itertools.product(
        (layer, ops.DECOMPOSITIONS[layer]), (channels_first, channels_last)
    ):
        out, *saved = forward(
            x, x_prev, qkv_weight, qkv_bias, out_weight, out_bias, mask, scale, *options
        )
        grad_out = torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)
        results += [
            backward(
                grad_out,
                None,
                given,
                x_prev,
                qkv_weight,
                qkv_bias,
                out_weight,
                scale,
                *saved,
                *options[:-1],
                True,
                True,
            )
            for given in (channels_first, channels_last)
        ]
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_backwards(backend: str, device: torch.device) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    x, scores, mask, scale, patch_h, patch_w = pool_arguments(device, grad=False)
    pooled, weight_sum, weights = operator("context_pool", backend)(
        x, scores, mask, scale, patch_h, patch_w
    )
    torch.library.opcheck(
        operator("context_pool_backward", backend),
        (
            torch.randn_like(pooled),
            torch.randn_like(weight_sum),
            torch.randn_like(weights),
            x,
            pooled,
            weight_sum,
            weights,
            scale,
            patch_h,
            patch_w,
        ),
    )
    v, context, *layout = gate_arguments(device, grad=False)
    torch.library.opcheck(
        operator("gate_backward", backend), (torch.randn_like(v), v, context, *layout)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("need_input_grad", [False, True])
@pytest.mark.parametrize("need_weight_grad", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("dim", [6, 16])
def test_opcheck_of_the_layers_backward(
    dim: int,
    cross: bool,
    need_weight_grad: bool,
    need_input_grad: bool,
    backend: str,
    device: torch.device,
) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    arguments = list(LAYERS[backend](device, grad=False, dim=dim))
    if not cross:
        arguments[1] = arguments[6] = arguments[7] = None
    x, x_prev, qkv_weight, qkv_bias, out_weight, _, _, dropout, *options = arguments
    if backend == "native":
        options.pop()  # for_backward
    out, weights, statistics, *values = operator("separable_attention", backend)(*arguments)
    torch.library.opcheck(
        operator("separable_attention_backward", backend),
        (
            torch.randn_like(out),
            torch.randn_like(weights),
            x,
            x_prev,
            qkv_weight,
            qkv_bias,
            out_weight,
            dropout,
            weights,
            statistics,
            *values,
            *options,
            need_input_grad,
            need_weight_grad,
        ),
        **traced_tolerance(device),
    )


# The Triton operator of the whole layer takes no float64.
@pytest.mark.parametrize("name, backend, arguments", FORWARDS[:-1])
def test_gradcheck(
    name: str, backend: str, arguments: Callable[..., tuple[Any, ...]], device: torch.device
) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float64)
    inputs = [
        value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for value in arguments(device)
    ]
    # The statistics of the layer are no differentiable output.
    kept = {"context_pool": 3, "gate": 1, "separable_attention": 2}[name]

    def function(*leaves: Any) -> Any:
        result = operator(name, backend)(*leaves)
        return result[:kept] if isinstance(result, (tuple, list)) else result

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend: str, device: torch.device) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    v = torch.randn(2, 5, 4, device=device, requires_grad=True)
    context = torch.randn(2, 4, device=device, requires_grad=True)
    y = functional.gate(v, context, backend=backend)
    (grad,) = torch.autograd.grad(y.square().sum(), v, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_every_operator_has_a_schema_in_one_place() -> None:
    names = {name for name in dir(torch.ops.sep_attn) if name.endswith(("_native", "_triton"))}
    for name in names:
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.sep_attn, name).default.tags
    assert callable(ops.context_pool)
