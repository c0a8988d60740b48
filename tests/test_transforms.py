"""Transforms of torch.func and forward-mode derivatives give what they give of the reference, and a
kernel that knows nothing of them is never asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_layer import backend_or_skip
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

from sep_attn import SeparableAttention, backends
from sep_attn.functional import context_pool, gate

DIM = 6
SHAPES = {"[B, N, D]": (3, 5, DIM), "[B, D, P, N]": (3, DIM, 2, 4)}


def loss(layer: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(layer, parameters, (x,)).square().sum()


def per_sample(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    def of_one(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return loss(layer, parameters, one[None])

    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    return vmap(grad(of_one), in_dims=(None, 0))(parameters, x)


def dual(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos())))
        return out.primal.clone(), None if out.tangent is None else out.tangent.clone()


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad of the input": lambda layer, x: grad(lambda x: layer(x).square().sum())(x),
    "grad of the parameters": lambda layer, x: grad(lambda p: loss(layer, p, x))(
        {name: value.detach() for name, value in layer.named_parameters()}
    ),
    "vjp": lambda layer, x: vjp(layer, x)[1](x.sin()),
    "jvp": lambda layer, x: jvp(layer, (x,), (x.cos(),)),
    "vmap": lambda layer, x: vmap(lambda one: layer(one[None]))(x),
    "per-sample gradients": per_sample,
    "jacrev": lambda layer, x: jacrev(layer)(x),
    "jacfwd": lambda layer, x: jacfwd(layer)(x),
    "hessian": lambda layer, x: hessian(lambda x: layer(x).square().sum())(x[:1]),
    "dual numbers": dual,
    "forward-mode jacobian": lambda layer, x: torch.autograd.functional.jacobian(
        layer, x, vectorize=True, strategy="forward-mode"
    ),
}


def pair() -> tuple[SeparableAttention, SeparableAttention]:
    """A layer, and its copy that the reference serves."""
    layer = SeparableAttention(DIM, dtype=torch.float64)
    expected = copy.deepcopy(layer)
    expected.backend = "reference"
    return layer, expected


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_gives_what_the_reference_gives(name: str, training: bool, layout: str) -> None:
    layer, expected = pair()
    layer.train(training)
    x = torch.randn(SHAPES[layout], dtype=torch.float64)
    ours, theirs = (pytree.tree_leaves(TRANSFORMS[name](one, x)) for one in (layer, expected))
    assert len(ours) == len(theirs)
    for value, wanted in zip(ours, theirs, strict=True):
        assert wanted.abs().max() > 0.0
        torch.testing.assert_close(value, wanted)


def test_a_tangent_is_not_lost_without_gradients() -> None:
    layer, expected = pair()
    x = torch.randn(SHAPES["[B, N, D]"], dtype=torch.float64)
    with torch.no_grad():
        (_, tangent), (_, wanted) = dual(layer.eval(), x), dual(expected, x)
    torch.testing.assert_close(tangent, wanted)


def test_masks_x_prev_and_weights() -> None:
    layer, expected = pair()
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    x_prev = torch.randn(2, 7, DIM, dtype=torch.float64)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 3:] = True
    mask[1] = True

    def jacobians(one: SeparableAttention) -> Any:
        def both(x: Tensor, x_prev: Tensor) -> Any:
            return one(x, x_prev, key_padding_mask=mask, need_weights=True)

        return jacrev(both, argnums=(0, 1))(x, x_prev)

    torch.testing.assert_close(jacobians(layer), jacobians(expected))


def test_dropout_differs_between_the_samples_of_a_vmap() -> None:
    layer = SeparableAttention(DIM, attn_drop=0.5)
    x = torch.randn(1, 40, DIM).expand(8, 40, DIM)
    out = vmap(lambda one: layer(one[None]), randomness="different")(x)
    assert (out[0] - out[1]).abs().max() > 1e-3
    out = vmap(lambda one: layer(one[None]), randomness="same")(x)
    # Not to the last bit: a product may round its rows by their place.
    torch.testing.assert_close(out[0], out[1])


def test_pool_and_gate() -> None:
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    scores, context = x.sum(-1), x.sum(1)

    def jacobians(backend: str) -> tuple[Tensor, Tensor]:
        return (
            jacrev(lambda x: context_pool(x, scores, backend=backend))(x),
            jacfwd(lambda x: gate(x, context, backend=backend))(x),
        )

    torch.testing.assert_close(jacobians("auto"), jacobians("reference"))


def test_compiled() -> None:
    layer, expected = pair()
    x = torch.randn(SHAPES["[B, N, D]"], dtype=torch.float64)
    compiled = torch.compile(lambda x: per_sample(layer, x), backend="aot_eager")
    torch.testing.assert_close(compiled(x), per_sample(expected, x))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_backend_named_by_hand_is_refused(device: str) -> None:
    found: dict[str, str] = {}

    def resolve_all(x: Tensor) -> Tensor:
        for backend in ("auto", "reference"):
            found[backend] = backends.resolve(backend, torch.device(device), x.dtype)
        for backend in ("native", "triton"):
            with pytest.raises(RuntimeError, match=rf'"{backend}" .*torch\.func.*auto, reference'):
                backends.resolve(backend, torch.device(device), x.dtype)
        return x.sum()

    grad(resolve_all)(torch.ones(2))
    assert found == {"auto": "pooled", "reference": "reference"}
    assert backends.resolve("auto", torch.device("cpu"), torch.float32) == "native"


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_vmap_calls_a_backend_named_by_hand_for_every_sample(backend: str) -> None:
    backend_or_skip(backend, torch.device("cpu"), torch.float32)
    layer, expected = pair()
    layer.float().backend, x = backend, torch.randn(3, 5, DIM)
    out = vmap(lambda one: layer(one[None]))(x)
    torch.testing.assert_close(out[:, 0], expected.float()(x))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_tangent_of_the_gradient_is_refused(backend: str) -> None:
    """Of an output that was made before."""
    backend_or_skip(backend, torch.device("cpu"), torch.float32)
    x = torch.randn(2, 5, DIM, requires_grad=True)
    for options in ({}, {"need_weights": True}):  # the short way and the long one
        layer = SeparableAttention(DIM, backend=backend)
        out = layer(x, **options)
        out = out[0] if options else out

        def backward(gradient: Tensor, out: Tensor = out) -> Tensor:
            return torch.autograd.grad(out, x, gradient, retain_graph=True)[0]

        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            jvp(backward, (out.detach(),), (out.detach(),))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            backward(forward_ad.make_dual(out.detach(), out.detach()))
