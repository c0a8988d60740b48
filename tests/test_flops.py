"""The FLOP counter counts what the operators compute: the products of the pooled form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models, real_model
from sep_attn import SeparableAttention, backends, functional, native, patch, pooled

needs_native = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=f"{native.unavailable_reason()}"
)
B, N, D = 2, 24, 32


def count(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def tokens(*, requires_grad: bool = False) -> Tensor:
    return torch.randn(B, N, D, requires_grad=requires_grad)


def in_pytorch(layer: SeparableAttention, x: Tensor) -> Tensor:
    """The pooled form of ``[B, N, D]``, every product of which the counter sees by itself."""
    parameters = (
        layer.qkv_proj.weight,
        layer.qkv_proj.bias,
        layer.out_proj.weight,
        layer.out_proj.bias,
    )
    return pooled.separable_attention(x, None, *parameters, None, None, "relu", 1, 1, False)[0]


@needs_native
def test_forward_counts_as_the_pooled_form_in_pytorch() -> None:
    layer, x = SeparableAttention(D).eval(), tokens()
    with torch.no_grad():
        expected = count(lambda: in_pytorch(layer, x))
        assert count(lambda: layer(x)) == expected  # the packed operator
        inference = count(lambda: layer(x, key_padding_mask=torch.zeros(B, N, dtype=torch.bool)))
    differentiated = count(lambda: layer(x))
    assert inference == differentiated == expected
    assert expected == B * (4 * N * D**2 + 4 * N * D + 2 * D**2)


@needs_native
@pytest.mark.parametrize("frozen", ["nothing", "weights", "input"])
def test_training_counts_as_the_pooled_form_in_pytorch(frozen: str) -> None:
    layer, x = SeparableAttention(D), tokens(requires_grad=frozen != "input")
    layer.requires_grad_(frozen != "weights")
    expected = count(lambda: in_pytorch(layer, x).sum().backward())
    assert count(lambda: layer(x).sum().backward()) == expected


@needs_native
def test_values_that_are_computed_again_count_again() -> None:
    kept, again = tokens(requires_grad=True), tokens().bfloat16().requires_grad_()
    layer = SeparableAttention(D)
    once = count(lambda: layer(kept).sum().backward())
    layer.bfloat16()
    assert count(lambda: layer(again).sum().backward()) == once + 2 * B * N * D**2


@needs_native
def test_every_layout_counts_the_same() -> None:
    layer = SeparableAttention(D).eval()
    pixels = SeparableAttention(D, patch_size=2).eval()
    slices, n = 4, 9
    with torch.no_grad():
        expected = count(lambda: layer(torch.randn(slices, n, D)))
        assert count(lambda: layer(torch.randn(1, D, slices, n))) == expected
        assert count(lambda: pixels(torch.randn(1, D, 6, 6))) == expected


@needs_native
def test_scores_and_pool_are_those_of_x_prev() -> None:
    layer, n_prev = SeparableAttention(D).eval(), 7
    with torch.no_grad():
        flops = count(lambda: layer(tokens(), torch.randn(B, n_prev, D)))
    assert flops == B * (4 * N * D**2 + 4 * n_prev * D + 2 * D**2)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_pool_counts_its_weighted_sum_and_the_gate_nothing(backend: str) -> None:
    reason = backends.unavailable_reason(backend, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    x, scores = tokens(requires_grad=True), torch.randn(B, N, requires_grad=True)
    literal = (torch.softmax(scores, 1)[:, None] @ x).squeeze(1)
    assert literal.shape == (B, D)
    forward = count(lambda: torch.bmm(torch.softmax(scores, 1)[:, None], x))
    both = count(lambda: torch.bmm(torch.softmax(scores, 1)[:, None], x).sum().backward())

    def pool() -> Tensor:
        return functional.context_pool(x, scores, backend=backend)

    assert count(pool) == forward == 2 * B * N * D
    assert count(lambda: pool().sum().backward()) == both
    assert count(lambda: functional.gate(x.detach(), literal.detach(), backend=backend)) == 0


@needs_native
def test_a_patched_model_saves_the_key_projection_of_every_token() -> None:
    model = models.timm_mobilevitv2("mobilevitv2_050")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        inputs = real_model.capture_attention_inputs(model, image)
        before = count(lambda: model(image))
        patch(model)
        after = count(lambda: model(image))
    saved = 0
    for x in inputs.values():
        _, dim, slices, n = x.shape
        saved += 2 * slices * n * dim**2  # what is left is a projection a slice, and the pool
        saved -= 2 * slices * dim**2 + 2 * slices * n * dim
    assert len(inputs) == 9 and before - after == saved > 0


def test_every_operator_with_products_has_a_formula() -> None:
    from torch.utils.flop_counter import flop_registry

    for name in dir(torch.ops.sep_attn):
        if name.endswith(("_native", "_triton")) and not name.startswith("gate"):
            assert getattr(torch.ops.sep_attn, name) in flop_registry, name
