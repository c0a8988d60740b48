"""Separable self-attention in plain PyTorch, as the paper writes it: the oracle of every test.

Mehta and Rastegari, "Separable Self-attention for Mobile Vision Transformers" (2022), equation 3.
Nothing is fused, nothing is reordered; every dtype and device that PyTorch has is served.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sep_attn.layout import (
    accumulate_dtype,
    merge_slices,
    merge_token_slices,
    slice_view,
    token_shape,
    token_view,
)
from sep_attn.validation import (
    ACTIVATIONS,
    autocast_enabled,
    check_channels,
    check_choice,
    check_context_pool,
    check_gate,
    check_separable_attention,
    check_tokens,
)

__all__ = ["context_pool", "gate", "separable_attention"]


def dropout_scale(x: Tensor, dropout_p: float) -> Tensor:
    """Draws what attention dropout multiplies each token's weight by: 0 or ``1 / (1 - dropout_p)``.

    Args:
        x: ``[B, N, D]``, or ``[B, D, H, W]``: the source of the scores.
        dropout_p: probability of a zero.

    Returns:
        ``[B, N]`` or ``[B, H, W]``, float32 (float64 for float64 ``x``), from torch's generator of
        the device. The draw does not depend on the dtype.
    """
    keep = torch.rand(token_shape(x), device=x.device, dtype=torch.float32) >= dropout_p
    return keep.to(accumulate_dtype(x.dtype)) / (1.0 - dropout_p)


def masked_softmax(scores: Tensor, masked: Tensor | None) -> Tensor:
    """Softmax over the last axis; masked tokens get 0, also where a whole slice is masked."""
    if masked is None:
        return scores.softmax(-1)
    # Where nothing is left the fill is 0, so that neither the softmax nor its gradient is NaN.
    nothing_left = masked.all(-1, keepdim=True)
    scores = scores.masked_fill(masked, float("-inf")).masked_fill(nothing_left, 0.0)
    return scores.softmax(-1).masked_fill(masked, 0.0)


def softmax_over_slices(scores: Tensor, masked: Tensor | None) -> Tensor:
    """:func:`masked_softmax` over the last two axes."""
    flat_mask = None if masked is None else masked.flatten(-2)
    return masked_softmax(scores.flatten(-2), flat_mask).view(scores.shape)


def activation(value: Tensor, act: str) -> Tensor:
    return F.relu(value) if act == "relu" else value


def separable_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    x_prev: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    value_act: str = "relu",
    patch_size: int | tuple[int, int] | None = None,
    need_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Literal equation 3; arguments, results and errors of
    :func:`sep_attn.functional.separable_attention`."""
    patch_h, patch_w = check_separable_attention(
        x,
        qkv_weight,
        qkv_bias,
        out_weight,
        out_bias,
        x_prev=x_prev,
        key_padding_mask=key_padding_mask,
        dropout_p=dropout_p,
        value_act=value_act,
        patch_size=patch_size,
        mixed_dtypes=isinstance(x, Tensor) and autocast_enabled(x.device.type),
    )
    source = x if x_prev is None else x_prev
    scale = None
    if dropout_p > 0.0:
        scale = token_view(dropout_scale(source, dropout_p), patch_h, patch_w)

    tokens, source_tokens, masked = _slices(x, source, key_padding_mask, patch_h, patch_w)
    dim = tokens.shape[-1]
    score_weight, key_weight, value_weight = qkv_weight.split([1, dim, dim])
    score_bias, key_bias, value_bias = (
        (None, None, None) if qkv_bias is None else qkv_bias.split([1, dim, dim])
    )
    scores = F.linear(source_tokens, score_weight, score_bias).squeeze(-1)
    keys = F.linear(source_tokens, key_weight, key_bias)
    values = F.linear(tokens, value_weight, value_bias)

    weights = softmax_over_slices(scores, masked)
    kept = weights if scale is None else weights * scale.to(weights.dtype)
    out = merge_slices(F.linear(_gated(values, kept, keys, value_act), out_weight, out_bias), x)
    if need_weights:
        return out, merge_token_slices(weights, token_shape(source)).to(out.dtype)
    return out


def separable_attention_of_modules(
    x: Tensor,
    qkv_proj: Callable[[Tensor], Tensor],
    out_proj: Callable[[Tensor], Tensor],
    attn_drop: Callable[[Tensor], Tensor],
    *,
    embed_dim: int,
    x_prev: Tensor | None,
    key_padding_mask: Tensor | None,
    value_act: str,
    patch_size: int | tuple[int, int] | None,
    need_weights: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Equation 3 by calls of the projections and of the dropout, whatever they are.

    Args:
        qkv_proj: ``[..., D]`` to ``[..., 1 + 2 D]``: score, keys and values.
        out_proj: ``[..., D]`` to ``[..., D]``.
        attn_drop: of the softmax weights, one a token.
        embed_dim: D.

    All others, results and errors are those of :func:`sep_attn.functional.separable_attention`.
    """
    check_choice("value_act", value_act, ACTIVATIONS)
    patch_h, patch_w = check_tokens(
        x,
        x_prev,
        key_padding_mask,
        patch_size,
        mixed_dtypes=isinstance(x, Tensor) and autocast_enabled(x.device.type),
    )
    check_channels(x, embed_dim)
    source = x if x_prev is None else x_prev
    tokens, source_tokens, masked = _slices(x, source, key_padding_mask, patch_h, patch_w)
    sizes = [1, embed_dim, embed_dim]
    scores, keys, values = qkv_proj(source_tokens).split(sizes, -1)
    if x_prev is not None or key_padding_mask is not None:
        _, _, values = qkv_proj(tokens).split(sizes, -1)
    weights = softmax_over_slices(scores.squeeze(-1), masked)
    out = merge_slices(out_proj(_gated(values, attn_drop(weights), keys, value_act)), x)
    if need_weights:
        return out, merge_token_slices(weights, token_shape(source)).to(out.dtype)
    return out


def _slices(
    x: Tensor, source: Tensor, key_padding_mask: Tensor | None, patch_h: int, patch_w: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens of x and of the source, ``[B, ph, pw, NH, NW, D]``, masked ones of the source 0,
    and the mask, ``[B, ph, pw, NH, NW]``."""
    tokens, source_tokens = slice_view(x, patch_h, patch_w), slice_view(source, patch_h, patch_w)
    if key_padding_mask is None:
        return tokens, source_tokens, None
    masked = token_view(key_padding_mask, patch_h, patch_w)
    return tokens, source_tokens.masked_fill(masked[..., None], 0.0), masked


def _gated(values: Tensor, weights: Tensor, keys: Tensor, value_act: str) -> Tensor:
    context = (weights[..., None] * keys).sum((3, 4), keepdim=True)  # [B, ph, pw, 1, 1, D]
    return activation(values, value_act) * context


def context_pool(x: Tensor, scores: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
    """``sum_n softmax(scores)_n x_n``; see :func:`sep_attn.functional.context_pool`."""
    check_context_pool(x, scores, key_padding_mask, "reference")
    if key_padding_mask is not None:
        x = x.masked_fill(key_padding_mask[..., None], 0.0)
        key_padding_mask = key_padding_mask[:, None]
    weights = softmax_over_slices(scores[:, None], key_padding_mask)[:, 0]
    return (weights[..., None] * x).sum(1).to(x.dtype)


def gate(v: Tensor, context: Tensor, *, act: str = "relu") -> Tensor:
    """``act(v) * context``; see :func:`sep_attn.functional.gate`."""
    check_gate(v, context, act, "reference")
    return (activation(v, act) * context[:, None]).to(v.dtype)
