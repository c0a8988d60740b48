"""The functional API: checks, layout, and one way to the operator of a backend."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from sep_attn import native, ops, pooled, reference, triton_kernels
from sep_attn.backends import (
    has_memory,
    is_observed,
    is_transformed,
    resolve,
    unavailable_reason,
)
from sep_attn.layout import default_patch_size, token_shape
from sep_attn.packed_weights import PackedWeights
from sep_attn.validation import (
    ACTIVATIONS,
    autocast_enabled,
    check_context_pool,
    check_gate,
    check_separable_attention,
)

__all__ = ["context_pool", "gate", "separable_attention"]


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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Separable self-attention, ``O(N)`` in the number of tokens.

    For every slice of tokens, with ``x' = x_prev`` if given, else ``x``::

        p   = dropout(softmax(x' w_I + b_I))
        c   = sum_n p_n (x'_n W_K^T + b_K)
        out = (act(x W_V^T + b_V) * c) W_O^T + b_O

    Mehta and Rastegari 2022, "Separable Self-attention for Mobile Vision Transformers", eq. 3.

    Args:
        x: ``[B, N, D]`` (one slice an image), ``[B, D, P, N]`` (softmax over the last axis), or
            ``[B, D, H, W]`` with ``patch_size``. Any strides; no layout is copied.
        qkv_weight: ``[1 + 2 D, D]``: row 0 the score, rows 1 to D the keys, the rest the values.
        qkv_bias: ``[1 + 2 D]`` or None.
        out_weight: ``[D, D]``.
        out_bias: ``[D]`` or None.
        x_prev: where scores and keys come from: the layout, batch and channels of ``x``; the number
            of tokens may differ.
        key_padding_mask: bool, True leaves a token of ``x_prev`` (else ``x``) out: ``[B, N]``,
            ``[B, P, N]`` or ``[B, H, W]``. A slice with nothing left gives ``out = out_bias``.
        dropout_p: attention dropout in ``[0, 1)``, applied after the softmax whenever it is above
            0, with no renormalisation.
        value_act: ``"relu"`` or ``"identity"``.
        patch_size: ``(patch_h, patch_w)``: pixel ``(y, x)`` of ``[B, D, H, W]`` is in slice
            ``(y % patch_h) * patch_w + x % patch_w``.
        need_weights: also return the softmax weights, before dropout.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Returns:
        The output in the shape and dtype of ``x`` (autocast's dtype under autocast), or
        ``(output, weights)`` with the weights in the shape that ``key_padding_mask`` has.

    Raises:
        TypeError: an argument of the wrong type, or mixed dtypes outside autocast.
        ValueError: a shape, device, probability or choice that does not fit.
        RuntimeError: ``backend`` was named and cannot serve the call.
    """
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    autocast = isinstance(x, Tensor) and autocast_enabled(device.type)
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
        backend=backend,
        mixed_dtypes=autocast and x.dtype != torch.float64,
    )
    source = x if x_prev is None else x_prev
    guard: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
        guard = torch.autocast(device.type, enabled=False)
        x, qkv_weight, out_weight = x.to(dtype), qkv_weight.to(dtype), out_weight.to(dtype)
        x_prev = None if x_prev is None else x_prev.to(dtype)
        qkv_bias = None if qkv_bias is None else qkv_bias.to(dtype)
        out_bias = None if out_bias is None else out_bias.to(dtype)

    chosen = resolve(backend, device, x.dtype)
    with guard:
        if chosen == "reference":
            return reference.separable_attention(
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
                need_weights=need_weights,
            )
        tensors = (x, x_prev, qkv_weight, qkv_bias, out_weight, out_bias)
        if chosen == "triton" and x.dtype != torch.float64:
            dropout: tuple[Tensor | float | None, ...] = (None, 0.0)
            if dropout_p > 0.0:  # the kernels draw, and backward draws the same again
                dropout = (torch.randint(2**31 - 1, (1,), device=device), dropout_p)
        else:
            dropout = (reference.dropout_scale(source, dropout_p) if dropout_p > 0.0 else None,)
        arguments = (*tensors, key_padding_mask, *dropout, value_act, patch_h, patch_w)
        if chosen == "triton" and x.dtype == torch.float64:
            out, weights = _pooled_form(*arguments)
        elif (differentiated := _differentiated(tensors)) or need_weights:
            # Only the C++ kernels keep values for the backward pass.
            kept = () if chosen == "triton" else (differentiated and chosen == "native",)
            out, weights, *_ = ops.separable_attention(chosen, *arguments, *kept)
        else:
            return ops.separable_attention_inference(chosen, *arguments)
        return (out, weights.to(x.dtype)) if need_weights else out


def shortest_way(
    x: Tensor,
    qkv_proj: Mapping[str, Any],
    out_proj: Mapping[str, Any],
    value_act: str,
    patch_size: tuple[int, int] | None,
    backend: str,
    packed: PackedWeights | None,
) -> Tensor | None:
    """The shortest way through :func:`separable_attention`, for calls of a layer from Python.

    It has no dropout, mask or ``x_prev``.

    Args:
        x: the layer's input.
        qkv_proj: holds ``weight``, also in the shape of a 1 x 1 convolution, and ``bias``.
        out_proj: as ``qkv_proj``.
        value_act: as in :func:`separable_attention`.
        patch_size: as in :func:`separable_attention`.
        backend: as in :func:`separable_attention`.
        packed: where weights are kept packed while no gradient is wanted; None in training.

    Returns:
        The output, or None when the call cannot be served: the reference was named, a tensor is not
        a plain one, autocast, a compiler or a transform is at work, a projection is parametrised,
        or an argument does not fit. :func:`separable_attention` then serves it or says what is
        wrong.
    """
    if (
        type(x) is not Tensor
        or torch.compiler.is_compiling()
        or is_transformed()
        or torch._C._get_tracing_state() is not None  # of torch.jit
        or value_act not in ACTIVATIONS
    ):
        return None
    try:
        qkv_weight, qkv_bias = qkv_proj["weight"], qkv_proj["bias"]
        out_weight, out_bias = out_proj["weight"], out_proj["bias"]
    except KeyError:  # a parametrisation holds the weight
        return None
    tensors = (x, qkv_weight, qkv_bias, out_weight, out_bias)
    if x.is_cpu and backend in ("auto", "native"):
        return _shortest_native_way(tensors, value_act, patch_size, packed)
    if backend in ("auto", "triton") and (x.is_cuda or x.is_xpu or x.is_cpu):
        return _shortest_triton_way(tensors, value_act, patch_size)
    return None


# x, qkv_weight, qkv_bias, out_weight, out_bias
_LayerTensors = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]


def _shortest_native_way(
    tensors: _LayerTensors,
    value_act: str,
    patch_size: tuple[int, int] | None,
    packed: PackedWeights | None,
) -> Tensor | None:
    """One operator checks the arguments and computes."""
    if native.unavailable_reason() is not None:  # kernels of another version may be there
        return None
    x, qkv_weight, _, out_weight, _ = tensors
    differentiated = torch.is_grad_enabled()
    if (packed is None and not differentiated) or torch.is_autocast_enabled("cpu"):
        return None
    try:
        if differentiated and (qkv_weight.requires_grad or _differentiated(tensors)):
            if (
                type(qkv_weight) is not Parameter
                or type(out_weight) is not Parameter
                or x.numel() == 0
                or (patch_size is not None and x.dim() == 3)
            ):
                return None
            patch_h, patch_w = patch_size or default_patch_size(x)
        else:
            # A mode may be tracing: its program is no place for what this layer keeps.
            if packed is None or torch._C._len_torch_dispatch_stack() > 0:
                return None
            patch_h, patch_w = patch_size or (0, 0)
            return ops.separable_attention_packed(
                *tensors,
                packed.memory if packed.memory is not None else packed.allocate(qkv_weight),
                value_act == "relu",
                patch_h,
                patch_w,
            )
    except ops.REFUSALS:
        return None
    try:
        return ops.native_self_attention(*tensors, value_act, patch_h, patch_w)
    except ops.Refused:
        return None


_NO_SUBCLASSES = {Parameter, Tensor, type(None)}


@dataclasses.dataclass(slots=True)
class _Served:
    """What was found out about calls that Triton served: the patch, and what the launchers keep."""

    patch: tuple[int, int]
    known: dict[Any, Any] = dataclasses.field(default_factory=dict)


_SERVED: dict[tuple[Any, ...], _Served] = {}
_MOST_SERVED = 1024


def _shortest_triton_way(
    tensors: _LayerTensors, value_act: str, patch_size: tuple[int, int] | None
) -> Tensor | None:
    """The launchers are called at once, without the operator, and arguments checked once for all
    calls of a kind: both take as long as a small layer's kernels."""
    x = tensors[0]
    if (
        x.dtype == torch.float64
        or torch._C._is_any_autocast_enabled()
        or is_observed()
        or not has_memory(x)
        or not _NO_SUBCLASSES.issuperset(map(type, tensors))
    ):
        return None
    kind = (
        value_act,
        patch_size and tuple(patch_size),
        x.stride(),
        *[
            None if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.is_neg())
            for tensor in tensors
        ],
    )
    served = _SERVED.get(kind)
    if served is None:
        patch = _check_for_triton(tensors, value_act, patch_size)
        if patch is None:
            return None
        if len(_SERVED) >= _MOST_SERVED:
            _SERVED.clear()
        served = _SERVED[kind] = _Served(patch)
    if _differentiated(tensors):
        # Gradients have the shapes of matrices; forward, all that counts is where weights begin.
        matrices = [
            tensor.flatten(1) if tensor is not None and tensor.dim() == 4 else tensor
            for tensor in tensors[1:]
        ]
        return ops.triton_self_attention(x, *matrices, 0.0, value_act, *served.patch, served.known)
    others = (None, None, 0.0, value_act, *served.patch)  # no mask and no dropout
    return triton_kernels.separable_attention_inference(
        x, None, *tensors[1:], *others, served.known
    )


def _check_for_triton(
    tensors: _LayerTensors, value_act: str, patch_size: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The patch of a call that fits and that Triton can serve, else None."""
    x, qkv_weight, qkv_bias, out_weight, out_bias = tensors
    if qkv_weight is None or out_weight is None:
        return None
    if not all(tensor is None or has_memory(tensor) for tensor in tensors):
        return None
    try:
        patch = check_separable_attention(
            x,
            qkv_weight.flatten(1),  # also of a 1 x 1 convolution
            qkv_bias,
            out_weight.flatten(1),
            out_bias,
            x_prev=None,
            key_padding_mask=None,
            dropout_p=0.0,
            value_act=value_act,
            patch_size=patch_size,
        )
    except (IndexError, TypeError, ValueError):
        return None
    return patch if unavailable_reason("triton", x.device, x.dtype) is None else None


def _differentiated(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def _pooled_form(
    x: Tensor,
    x_prev: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_scale: Tensor | None,
    value_act: str,
    patch_h: int,
    patch_w: int,
) -> tuple[Tensor, Tensor]:
    """The layer in float64 from Triton's pool and gate and torch's products, for which tensor cores
    have no use: c = W_K pooled + sigma b_K."""
    source = x if x_prev is None else x_prev
    score, (key_weight, key_bias), value = pooled.projections(qkv_weight, qkv_bias)
    scores = pooled.project(source, *score).reshape(token_shape(source))
    rows, weight_sum, weights = ops.context_pool(
        "triton", source, scores, key_padding_mask, dropout_scale, patch_h, patch_w
    )
    context = F.linear(rows, key_weight)
    if key_bias is not None:
        context = torch.addcmul(context, weight_sum[:, None], key_bias)
    gated = ops.gate("triton", pooled.project(x, *value), context, value_act, patch_h, patch_w)
    return pooled.project(gated, out_weight, out_bias), weights


def context_pool(
    x: Tensor, scores: Tensor, *, key_padding_mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """The sum of the tokens, weighted by the softmax of their scores, in one pass.

    ``pooled = sum_n softmax(scores)_n x_n``, with statistics and sums in float32. Replaces
    ``(scores.softmax(-1)[..., None] * x).sum(1)``. It is the sum of Mehta and Rastegari's eq. 3
    (2022), taken before the key projection, which is linear and moves past it.

    Args:
        x: ``[B, N, D]``, any strides.
        scores: ``[B, N]``, any floating dtype.
        key_padding_mask: bool ``[B, N]``, True leaves a token out; a slice with nothing left
            gives zeros.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``[B, D]`` in the dtype of ``x``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`separable_attention`.
    """
    check_context_pool(x, scores, key_padding_mask, backend)
    chosen = resolve(backend, x.device, x.dtype)
    if chosen == "reference":
        return reference.context_pool(x, scores, key_padding_mask=key_padding_mask)
    rows, _, _ = ops.context_pool(chosen, x, scores, key_padding_mask, None, 1, 1)
    return rows.to(x.dtype)


def gate(v: Tensor, context: Tensor, *, act: str = "relu", backend: str = "auto") -> Tensor:
    """``act(v) * context``: every token's values gated by the context of its slice.

    Replaces ``F.relu(v) * context[:, None]``. It is the last step of Mehta and Rastegari's eq. 3
    (2022) before the output projection.

    Args:
        v: ``[B, N, D]``, any strides.
        context: ``[B, D]``, any floating dtype.
        act: ``"relu"`` or ``"identity"``.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``[B, N, D]`` in the dtype of ``v``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`separable_attention`.
    """
    check_gate(v, context, act, backend)
    chosen = resolve(backend, v.device, v.dtype)
    if chosen == "reference":
        return reference.gate(v, context, act=act)
    return ops.gate(chosen, v, context, act, 1, 1)
