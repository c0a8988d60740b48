"""What PyTorch's FLOP counter counts for the operators of this package.

``torch.utils.flop_counter.FlopCounterMode`` counts matrix products and convolutions, two FLOPs a
multiply-add, and sees nothing of what happens inside a custom operator. These formulas count the
products of the pooled form (``sep_attn.pooled``): scores, weighted sum of the tokens, key
projection of each slice, value and output projection of each token, and their gradients.
``gate`` and its backward have no products: they count as nothing, as all pointwise work does.

The arguments of a formula are those of its operator, with a shape in place of each tensor.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import sep_attn.ops  # noqa: F401  defines the operators

Shape = tuple[int, ...]


def _register(*operators: str) -> Any:
    return register_flop_formula([getattr(torch.ops.sep_attn, name) for name in operators])


def _channels(x: Shape) -> int:
    return x[2] if len(x) == 3 else x[1]


def _tokens(x: Shape) -> int:
    return prod(x) // _channels(x)


def _slices(x: Shape, patch_h: int, patch_w: int) -> int:
    return x[0] * patch_h * patch_w


@_register("context_pool_native", "context_pool_triton")
def context_pool_flops(x: Shape, *_: Any, **__: Any) -> int:
    """Each token, weighted, added to its slice's sum."""
    return 2 * prod(x)


@_register("context_pool_backward_native", "context_pool_backward_triton")
def context_pool_backward_flops(
    grad_pooled: Shape,
    grad_weight_sum: Shape | None,
    grad_weights: Shape | None,
    x: Shape,
    *_: Any,
    **__: Any,
) -> int:
    """Each token times the gradient of its slice's sum, for its weight, and the token's own."""
    return 4 * prod(x)


def _forward(x: Shape, x_prev: Shape | None, patch_h: int, patch_w: int) -> int:
    dim, source = _channels(x), x if x_prev is None else x_prev
    scores = pool = 2 * _tokens(source) * dim
    keys = 2 * _slices(x, patch_h, patch_w) * dim**2
    values = out = 2 * _tokens(x) * dim**2
    return scores + pool + keys + values + out


@_register("separable_attention_native", "separable_attention_inference_native")
def separable_attention_flops(
    x: Shape,
    x_prev: Shape | None,
    qkv_weight: Shape,
    qkv_bias: Shape | None,
    out_weight: Shape,
    out_bias: Shape | None,
    key_padding_mask: Shape | None,
    dropout_scale: Shape | None,
    act: str,
    patch_h: int,
    patch_w: int,
    *_: Any,
    **__: Any,
) -> int:
    """``4 N D^2`` and what is linear in ``N D``, for each slice of N tokens."""
    return _forward(x, x_prev, patch_h, patch_w)


@_register("separable_attention_packed_native")
def separable_attention_packed_flops(
    x: Shape,
    qkv_weight: Shape,
    qkv_bias: Shape | None,
    out_weight: Shape,
    out_bias: Shape | None,
    packed_weights: Shape,
    relu: bool,
    patch_h: int,
    patch_w: int,
    **_: Any,
) -> int:
    """As :func:`separable_attention_flops`; a patch of 0 stands for the layout's own."""
    if patch_h == 0:
        patch_h, patch_w = (1, 1) if len(x) == 3 else (x[2], 1)
    return _forward(x, None, patch_h, patch_w)


@_register("separable_attention_backward_native")
def separable_attention_backward_flops(
    grad_out: Shape,
    grad_weights: Shape | None,
    x: Shape,
    x_prev: Shape | None,
    qkv_weight: Shape,
    qkv_bias: Shape | None,
    out_weight: Shape,
    dropout_scale: Shape | None,
    weights: Shape,
    statistics: Shape,
    values: Shape,
    act: str,
    patch_h: int,
    patch_w: int,
    need_input_grad: bool,
    need_weight_grad: bool,
    **_: Any,
) -> int:
    """``8 N D^2`` for all gradients, and ``2 N D^2`` where the values were not kept."""
    dim = _channels(x)
    projection = 2 * _tokens(x) * dim**2
    key_projection = 2 * _slices(x, patch_h, patch_w) * dim**2
    per_token = 2 * _tokens(x if x_prev is None else x_prev) * dim  # one number, or one row
    flops = projection + key_projection + per_token  # to y, to the pooled tokens, to the weights
    if prod(values) == 0:
        flops += projection
    if need_input_grad:
        flops += projection + 2 * per_token  # through the values; through the scores and the pool
    if need_weight_grad:
        flops += 2 * projection + key_projection + per_token
    return flops


@_register("separable_attention_triton", "separable_attention_inference_triton")
def separable_attention_triton_flops(
    x: Shape, x_prev: Shape | None, *arguments: Any, **_: Any
) -> int:
    """As :func:`separable_attention_flops`."""
    *_arguments, patch_h, patch_w = arguments
    return _forward(x, x_prev, patch_h, patch_w)


@_register("separable_attention_backward_triton")
def separable_attention_backward_triton_flops(*arguments: Any, **_: Any) -> int:
    """As :func:`separable_attention_backward_flops`, with the values computed again."""
    *tensors, _dropout_p, act, patch_h, patch_w, need_input_grad, need_weight_grad = arguments
    return separable_attention_backward_flops(
        *tensors, (0,), act, patch_h, patch_w, need_input_grad, need_weight_grad
    )
