"""The short way to the kernels with gradients: what takes it, what does not, and that it gives bit
for bit what the long way gives."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from test_layer import backend_or_skip, device_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models
from sep_attn import SeparableAttention, functional, module

DIM = 16
patch_module = importlib.import_module("sep_attn.patch")  # the package names the function so


@pytest.fixture(params=["native", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """What serves a layer of these tests; tensors are made on its device."""
    name: str = request.param
    place = device_of(name, device)
    backend_or_skip(name, place, torch.float32)
    with place:
        yield name


@pytest.fixture
def layer(backend: str) -> SeparableAttention:
    return SeparableAttention(DIM, backend=backend)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way each call of a module takes from now on."""
    taken: list[str] = []

    def short(*args: object) -> Tensor | None:
        out = functional.shortest_way(*args)
        if out is not None:
            taken.append("short")
        return out

    def long(*args: object, **kwargs: object) -> Tensor | tuple[Tensor, Tensor]:
        taken.append("long")
        return functional.separable_attention(*args, **kwargs)

    monkeypatch.setattr(module, "shortest_way", short)
    monkeypatch.setattr(module, "separable_attention", long)
    return taken


def gradients(layer: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
    out = layer(x)
    wanted = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, gradient)]


LAYOUTS = [((3, 20, DIM), None), ((2, DIM, 4, 9), None), ((2, DIM, 8, 6), 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "patch_size"), LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", [True, False])
def test_same_bits_as_the_long_way(
    shape: tuple[int, ...],
    patch_size: int | None,
    dtype: torch.dtype,
    bias: bool,
    mode: bool,
    backend: str,
    ways: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "triton" and (dtype != torch.float32 or not mode):
        pytest.skip(
            "float64 takes the long way, bfloat16 is the compiled kernels', eval is as train"
        )
    options = {"bias": bias, "patch_size": patch_size, "dtype": dtype, "backend": backend}
    layer = SeparableAttention(DIM, **options).train(mode)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    gradient = torch.randn(shape, dtype=dtype)
    short = gradients(layer, x, gradient)
    monkeypatch.setattr(module, "shortest_way", lambda *_: None)
    long = gradients(layer, x, gradient)
    assert ways == ["short", "long"]
    for ours, expected in zip(short, long, strict=True):
        assert torch.equal(ours, expected)


def test_gradients_of_what_is_not_frozen(layer: SeparableAttention, ways: list[str]) -> None:
    x = torch.randn(2, 10, DIM, requires_grad=True)
    gradient = torch.randn(2, 10, DIM)
    wanted = dict(
        zip(["x", *dict(layer.named_parameters())], gradients(layer, x, gradient)[1:], strict=True)
    )
    for frozen in ("x", "qkv_proj.weight", "qkv_proj.bias", "out_proj.weight", "out_proj.bias"):
        partly, own = copy.deepcopy(layer), x.detach().clone().requires_grad_(frozen != "x")
        if frozen != "x":
            partly.get_parameter(frozen).requires_grad_(False)
        got = gradients(partly, own, gradient)[1:]
        expected = [value for name, value in wanted.items() if name != frozen]
        assert len(got) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), frozen
    assert ways == ["short"] * 6


def test_strides_of_the_gradient(layer: SeparableAttention, ways: list[str]) -> None:
    x = torch.randn(2, 10, DIM, requires_grad=True)
    layer(x).sum().backward()  # a gradient of stride 0
    summed = x.grad
    (expected,) = torch.autograd.grad(layer(x), x, torch.ones(2, 10, DIM))
    assert ways == ["short"] * 2 and torch.equal(summed, expected)


def test_projection_dropout(layer: SeparableAttention, ways: list[str]) -> None:
    layer.proj_drop.p = 0.5
    x = torch.randn(2, 10, DIM, requires_grad=True)
    torch.manual_seed(0)
    out = layer(x)
    torch.manual_seed(0)
    expected = nn.functional.dropout(layer.eval()(x), 0.5)
    assert ways == ["short"] * 2 and torch.equal(out, expected)
    assert 0 < (out == 0).sum() < out.numel()


class _Subclass(torch.Tensor):
    pass


def _autocast(layer: SeparableAttention, x: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        layer(x)


LONG: dict[str, Callable[[SeparableAttention, Tensor], object]] = {
    "attention dropout": lambda layer, x: setattr(layer.attn_drop, "p", 0.5) or layer(x),
    "x_prev": lambda layer, x: layer(x, torch.randn(2, 7, DIM)),
    "mask": lambda layer, x: layer(x, key_padding_mask=torch.zeros(2, 10, dtype=torch.bool)),
    "need_weights": lambda layer, x: layer(x, need_weights=True),
    "autocast": _autocast,
    "subclass": lambda layer, x: layer(x.detach().as_subclass(_Subclass)),
    "parametrization": lambda layer, x: (
        nn.utils.parametrizations.weight_norm(layer.out_proj) and layer(x)
    ),
}


@pytest.mark.parametrize("case", LONG)
def test_takes_the_long_way(case: str, layer: SeparableAttention, ways: list[str]) -> None:
    LONG[case](layer, torch.randn(2, 10, DIM, requires_grad=True))
    assert ways == ["long"]


def test_nothing_to_differentiate_in_training(
    layer: SeparableAttention, backend: str, ways: list[str]
) -> None:
    layer(torch.randn(0, 10, DIM, requires_grad=True))
    layer.requires_grad_(False)(torch.randn(2, 10, DIM))
    # The C++ kernels keep no packed weights in training, without which their operator is as fast.
    assert ways == ["long" if backend == "native" else "short"] * 2


BAD: dict[str, tuple[Callable[[], Tensor], int | None]] = {
    "channels": (lambda: torch.randn(2, 10, DIM + 1), None),
    "rank": (lambda: torch.randn(10, DIM), None),
    "dtype": (lambda: torch.randn(2, 10, DIM, dtype=torch.float64), None),
    "integers": (lambda: torch.ones(2, 10, DIM, dtype=torch.int64), None),
    "no tokens": (lambda: torch.randn(2, 0, DIM), None),
    "patch size of tokens": (lambda: torch.randn(2, 10, DIM), 2),
    "no multiple of the patch": (lambda: torch.randn(2, DIM, 5, 6), 2),
}


def test_a_parameter_on_meta_is_refused(layer: SeparableAttention, ways: list[str]) -> None:
    layer.out_proj.to("meta")
    with pytest.raises(ValueError, match="meta"):
        layer(torch.randn(2, 10, DIM))
    assert ways == ["long"]


@pytest.mark.parametrize("case", BAD)
def test_errors_are_those_of_the_long_way(
    case: str, backend: str, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, patch_size = BAD[case]
    layer, x = SeparableAttention(DIM, patch_size=patch_size, backend=backend), make()
    with pytest.raises((TypeError, ValueError)) as with_short_way:
        layer(x)
    monkeypatch.setattr(module, "shortest_way", lambda *_: None)
    with pytest.raises((TypeError, ValueError)) as without:
        layer(x)
    assert ways == ["long"] * 2
    assert str(with_short_way.value) == str(without.value)


def test_a_second_derivative_is_refused(layer: SeparableAttention, ways: list[str]) -> None:
    x = torch.randn(2, 10, DIM, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()
    assert ways == ["short"]


@pytest.mark.parametrize("changed", ["x", "qkv_proj.weight", "out_proj.weight"])
def test_a_change_before_backward_is_noticed(
    changed: str, layer: SeparableAttention, ways: list[str]
) -> None:
    x = torch.randn(2, 10, DIM)
    out = layer(x)
    with torch.no_grad():
        (x if changed == "x" else layer.get_parameter(changed)).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    assert ways == ["short"]


def test_saved_tensors_can_be_packed(layer: SeparableAttention, ways: list[str]) -> None:
    x = torch.randn(2, 10, DIM, requires_grad=True)
    gradient = torch.randn(2, 10, DIM)
    expected = gradients(layer, x, gradient)
    packed: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        got = gradients(layer, x, gradient)
    assert ways == ["short"] * 2 and x.shape in packed
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_what_packing_raises_is_raised_at_once(layer: SeparableAttention) -> None:
    packed: list[Tensor] = []

    def fail(tensor: Tensor) -> None:
        packed.append(tensor)
        raise RuntimeError("the disk is full")

    with (
        torch.autograd.graph.saved_tensors_hooks(fail, lambda tensor: tensor),
        pytest.raises(RuntimeError, match="the disk is full"),
    ):
        layer(torch.randn(2, 10, DIM))
    assert len(packed) == 1


def test_patched_layers_take_it_too(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timm_layer = models.timm_attention(DIM)
    layer = copy.deepcopy(timm_layer)
    patch_module.patch(layer, backend=backend)
    x = torch.randn(2, DIM, 4, 9, requires_grad=True)
    gradient = torch.randn(2, DIM, 4, 9)
    taken: list[bool] = []

    def short(*args: object) -> Tensor | None:
        out = functional.shortest_way(*args)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(patch_module, "shortest_way", short)
    got = gradients(layer.train(), x, gradient)
    monkeypatch.setattr(patch_module, "shortest_way", lambda *_: None)
    expected = gradients(layer, x, gradient)
    assert taken == [True]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for ours, theirs in zip(got, gradients(timm_layer, x, gradient), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_batch_of_gradients(layer: SeparableAttention, ways: list[str]) -> None:
    x = torch.randn(2, 10, DIM, requires_grad=True)
    out, batch = layer(x), torch.randn(3, 2, 10, DIM)
    (together,) = torch.autograd.grad(out, x, batch, is_grads_batched=True, retain_graph=True)
    for gradient, got in zip(batch, together, strict=True):
        (expected,) = torch.autograd.grad(out, x, gradient, retain_graph=True)
        assert torch.equal(got, expected)
    assert ways == ["short"]


def test_tensors_whose_values_lie_elsewhere(layer: SeparableAttention) -> None:
    """Yet to be negated, as complex numbers leave them, or zeros without memory."""
    negative = torch.randn(2, 10, DIM, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    with torch.no_grad():
        for training in (True, False):
            layer.train(training)
            assert torch.equal(layer(negative), layer(negative.clone()))
    x = torch.randn(2, 10, DIM, requires_grad=True)
    out = layer.train()(x)
    for gradient in (negative, torch._efficientzerotensor(out.shape, device=out.device)):
        dense = gradient.clone() if gradient.is_neg() else torch.zeros_like(out)
        (got,) = torch.autograd.grad(out, x, gradient, retain_graph=True)
        (expected,) = torch.autograd.grad(out, x, dense, retain_graph=True)
        assert torch.equal(got, expected)
    bias = layer.qkv_proj.bias
    layer.qkv_proj.bias = nn.Parameter(torch.complex(bias, -bias).conj().imag.detach())
    assert layer.qkv_proj.bias.is_neg()
    assert torch.equal(layer(x), out)


def test_parameters_of_a_subclass(layer: SeparableAttention, ways: list[str]) -> None:
    subclass = layer.out_proj.weight.detach().as_subclass(_Subclass)
    layer.out_proj.weight = nn.Parameter(subclass)
    assert type(layer.out_proj.weight) is _Subclass
    layer(torch.randn(2, 10, DIM, requires_grad=True))
    assert ways == ["long"]


def test_meta_tensors_are_refused_as_on_the_long_way(
    layer: SeparableAttention, backend: str, ways: list[str]
) -> None:
    x = torch.empty(2, 10, DIM, device="meta")
    with pytest.raises(ValueError, match=r"qkv_weight is on .* but x is on meta"):
        layer(x)
    with pytest.raises(RuntimeError, match=f'"{backend}" cannot serve .*meta'):
        layer.to("meta")(x)
    assert ways == ["long"] * 2


def test_a_patch_size_set_later(layer: SeparableAttention) -> None:
    x = torch.randn(2, DIM, 4, 6)
    layer.patch_size = [2, 2]
    out = layer(x)
    layer.patch_size = (2, 2)
    assert torch.equal(layer(x), out)


def test_triton_without_gradients_gives_the_same_bits(
    layer: SeparableAttention, backend: str, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "native":
        pytest.skip("tests/test_packed_weights.py")
    x = torch.randn(2, 10, DIM)
    with torch.no_grad():
        short = [layer(x), layer.eval()(x), layer(x[:, ::2])]
        monkeypatch.setattr(module, "shortest_way", lambda *_: None)
        long = [layer(x), layer(x), layer(x[:, ::2])]
    assert ways == ["short"] * 3 + ["long"] * 3
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_who_looks_at_operators_sees_them(
    layer: SeparableAttention, backend: str, ways: list[str]
) -> None:
    x = torch.randn(2, 10, DIM)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            layer.eval()(x)
        with torch.profiler.profile() as profile:
            layer(x)
        observed = len(ways)
        traced = torch.jit.trace(layer, x)
        larger = torch.randn(3, 10, DIM)
        torch.testing.assert_close(traced(larger), layer(larger))
    y = x.clone().requires_grad_()
    out = layer.train()(y)
    with FlopCounterMode(display=False) as backward_counter:
        out.sum().backward()
    assert counter.get_total_flops() > 0
    assert backward_counter.get_total_flops() > counter.get_total_flops()
    assert any("sep_attn::separable_attention" in event.name for event in profile.events())
    assert "sep_attn::separable_attention" in str(traced.inlined_graph)
    # The C++ operator hides nothing from a profiler, but a mode may be tracing.
    assert ways[:observed] == ["long", "long" if backend == "triton" else "short"]
    assert "long" in ways[observed:]  # the tracer
    assert ways[-1] == "short"
