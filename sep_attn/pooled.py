"""The pooled form of every forward operator in ordinary PyTorch: what an export holds.

The key projection is linear, so it moves past the sum: ``sum_n p_n (x_n W_K^T + b_K)``
is ``W_K (sum_n p_n x_n) + sum_n p_n b_K``. That is what the kernels compute, with a third less
arithmetic than the literal equation of :mod:`sep_attn.reference`, which stays the oracle of both.
Every function has the signature and the results of its operator in :mod:`sep_attn.ops`, strides
included, so that a program can be rewritten in terms of them.

No tensor of the size of ``x`` is brought into another layout. Inside this file a value a slice is
``[B, 1, D]`` beside ``[B, N, D]``, and an image of slices ``[B, D, patch_h, patch_w]`` beside
``[B, D, H, W]``, so that one projection serves tokens and slices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sep_attn.layout import (
    VALUES_HEADER,
    accumulate_dtype,
    default_patch_size,
    keeps_values,
    kept_values_size,
    merge_token_slices,
    token_view,
)
from sep_attn.reference import activation, masked_softmax


def separable_attention(
    x: Tensor,
    x_prev: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_scale: Tensor | None,
    act: str,
    patch_h: int,
    patch_w: int,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``out``, ``weights``, ``statistics`` and ``values`` of operator ``separable_attention``."""
    source = x if x_prev is None else x_prev
    score, (key_weight, key_bias), value = projections(qkv_weight, qkv_bias)
    scores = project(source, *score).squeeze(_channel_axis(x))
    pooled, weight_sum, weights = _pool(
        source, scores, key_padding_mask, dropout_scale, patch_h, patch_w
    )
    key_weight, key_bias = _to(pooled.dtype, key_weight), _to(pooled.dtype, key_bias)
    if key_padding_mask is None and dropout_scale is None:  # the weights sum to 1
        context = project(pooled, key_weight, key_bias)
    else:
        context = project(pooled, key_weight, None)
        if key_bias is not None:
            context = context + weight_sum * _beside_slices(key_bias, x)
    values = project(x, *value)
    out = project(_gate(values, context, act, patch_h, patch_w), out_weight, out_bias)
    statistics = torch.cat([_slice_rows(value) for value in (pooled, context, weight_sum)], dim=1)
    kept = _keep(x, values) if for_backward and keeps_values(x) else weights.new_empty(0)
    return _in_memory_as(x, out), weights, statistics, kept


def separable_attention_packed(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    packed_weights: Tensor,
    relu: bool,
    patch_h: int,
    patch_w: int,
) -> Tensor:
    """The result of operator ``separable_attention_packed``; nothing is packed.

    The operator takes weights as a 1 x 1 convolution has them, too.
    """
    if patch_h == 0:
        patch_h, patch_w = default_patch_size(x)
    act = "relu" if relu else "identity"
    weights = (qkv_weight.flatten(1), qkv_bias, out_weight.flatten(1), out_bias)
    return separable_attention(x, None, *weights, None, None, act, patch_h, patch_w, False)[0]


def _keep(x: Tensor, values: Tensor) -> Tensor:
    """``values`` as the operator keeps them: as rows of channels, which a header of zeros says."""
    rows = (values if x.dim() == 3 else values.permute(0, 2, 3, 1)).flatten()
    return F.pad(rows, (VALUES_HEADER, kept_values_size(x) - VALUES_HEADER - rows.shape[0]))


def context_pool(
    x: Tensor,
    scores: Tensor,
    key_padding_mask: Tensor | None,
    dropout_scale: Tensor | None,
    patch_h: int,
    patch_w: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``pooled``, ``weight_sum`` and ``weights`` of operator ``context_pool``."""
    pooled, weight_sum, weights = _pool(
        x, scores, key_padding_mask, dropout_scale, patch_h, patch_w
    )
    return _slice_rows(pooled), _slice_rows(weight_sum).squeeze(1), weights


def gate(v: Tensor, context: Tensor, act: str, patch_h: int, patch_w: int) -> Tensor:
    """The result of operator ``gate``."""
    if v.dim() == 3:
        context = context[:, None]
    else:
        image = (v.shape[0], patch_h, patch_w, v.shape[1])
        context = context.view(image).permute(0, 3, 1, 2)
    return _in_memory_as(v, _gate(v, context, act, patch_h, patch_w))


def projections(
    qkv_weight: Tensor, qkv_bias: Tensor | None
) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """Weight and bias of the scores, of the keys and of the values."""
    dim = qkv_weight.shape[1]
    return tuple(
        # Slices fold into constants in the runtimes; a split, with its many results, does not.
        (qkv_weight[start:end], None if qkv_bias is None else qkv_bias[start:end])
        for start, end in ((0, 1), (1, 1 + dim), (1 + dim, 1 + 2 * dim))
    )


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map of the channels: for rank 4 the 1 x 1 convolution that runtimes know best."""
    if x.dim() == 3:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight[:, :, None, None], bias)


def _pool(
    x: Tensor,
    scores: Tensor,
    key_padding_mask: Tensor | None,
    dropout_scale: Tensor | None,
    patch_h: int,
    patch_w: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``context_pool``, with pooled tokens and weight sums as this file keeps slices."""
    dtype = accumulate_dtype(x.dtype)
    channels = _channel_axis(x)
    if key_padding_mask is not None:
        x = x.masked_fill(key_padding_mask.unsqueeze(channels), 0.0)
    weights = _softmax(scores.to(dtype), key_padding_mask, patch_h, patch_w)
    kept = weights if dropout_scale is None else weights * dropout_scale.to(dtype)
    if x.dim() == 3:
        pooled = torch.matmul(kept[:, None], x.to(dtype))  # [B, 1, N] x [B, N, D]
    else:
        pooled = _sum_tokens(x * kept[:, None], patch_h, patch_w)
    return pooled, _sum_tokens(kept.unsqueeze(channels), patch_h, patch_w), weights


def _softmax(scores: Tensor, masked: Tensor | None, patch_h: int, patch_w: int) -> Tensor:
    """Softmax over each slice of ``[B, N]`` or ``[B, H, W]``."""
    if scores.dim() == 2 or _rows_are_slices(scores.shape[1], patch_h, patch_w):
        return masked_softmax(scores, masked)
    sliced = token_view(scores, patch_h, patch_w)  # [B, ph, pw, NH, NW]
    if masked is not None:
        masked = token_view(masked, patch_h, patch_w).flatten(-2)
    weights = masked_softmax(sliced.flatten(-2), masked).view(sliced.shape)
    return merge_token_slices(weights, tuple(scores.shape))


def _sum_tokens(x: Tensor, patch_h: int, patch_w: int) -> Tensor:
    """The sum over the tokens of each slice: ``[B, 1, D]`` or ``[B, D, patch_h, patch_w]``."""
    if x.dim() == 3:
        return x.sum(1, keepdim=True)
    if _rows_are_slices(x.shape[2], patch_h, patch_w):
        return x.sum(3, keepdim=True)
    # One axis at a time: ONNX Runtime is slow with both at once.
    return _grid(x, patch_h, patch_w).sum(4).sum(2)


def _gate(v: Tensor, context: Tensor, act: str, patch_h: int, patch_w: int) -> Tensor:
    """``act(v) * context`` in v's dtype, with the context as this file keeps slices."""
    v_dtype, v = v.dtype, activation(v, act)
    if v.dim() == 3 or _rows_are_slices(v.shape[2], patch_h, patch_w):
        return (v * context).to(v_dtype)
    gated = _grid(v, patch_h, patch_w) * context[:, :, None, :, None]
    return gated.reshape(v.shape).to(v_dtype)


def _rows_are_slices(height: int, patch_h: int, patch_w: int) -> bool:
    """Whether each row of ``[.., H, W]`` is a slice, as in ``[B, D, P, N]``."""
    # Asked in this way, an exported height stays free.
    return statically_known_true(patch_w == 1) and statically_known_true(patch_h == height)


def _grid(x: Tensor, patch_h: int, patch_w: int) -> Tensor:
    """``[B, D, H, W]`` as ``[B, D, H / patch_h, patch_h, W / patch_w, patch_w]``."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels, height // patch_h, patch_h, width // patch_w, patch_w)


def _channel_axis(x: Tensor) -> int:
    return 2 if x.dim() == 3 else 1


def _to(dtype: torch.dtype, value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(dtype)


def _beside_slices(bias: Tensor, x: Tensor) -> Tensor:
    """``[D]`` so that it adds to the slices of x."""
    return bias if x.dim() == 3 else bias[:, None, None]


def _slice_rows(value: Tensor) -> Tensor:
    """What this file keeps of slices, as the operators give it: ``[S, D]``."""
    if value.dim() == 3:
        return value.squeeze(1)
    return value.permute(0, 2, 3, 1).flatten(0, 2)


def _in_memory_as(x: Tensor, result: Tensor) -> Tensor:
    """``result`` with its axes in the order in memory that ``torch.empty_like(x)`` has.

    The operators promise that order, and an exported program may hold a view that relies on it.
    """
    strides = torch.empty_like(x).stride()  # leaves no trace in an exported program
    if result.stride() == strides:
        return result
    order = sorted(range(x.dim()), key=lambda axis: strides[axis], reverse=True)
    inverse = [order.index(axis) for axis in range(x.dim())]
    return result.permute(order).contiguous().permute(inverse)
