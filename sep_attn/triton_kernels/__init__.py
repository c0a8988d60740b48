"""The Triton backend: the whole layer, context pool and gate, forward and backward, on GPUs.

Importing this package imports no Triton: the kernels' files are imported at the first call. The
launchers have the signatures of the operators (:mod:`sep_attn.ops`) and trust their arguments,
which :mod:`sep_attn.validation` has checked.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Sources",
    "context_pool",
    "context_pool_backward",
    "gate",
    "gate_backward",
    "separable_attention",
    "separable_attention_backward",
    "separable_attention_inference",
    "traces",
    "tracing_launches",
    "unavailable_reason",
]


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(f"sep_attn.triton_kernels.{name}")


def context_pool(
    x: Tensor,
    scores: Tensor,
    key_padding_mask: Tensor | None,
    dropout_scale: Tensor | None,
    patch_h: int,
    patch_w: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sep_attn.triton_kernels.pooling.context_pool`."""
    return _module("pooling").context_pool(
        x, scores, key_padding_mask, dropout_scale, patch_h, patch_w
    )


def context_pool_backward(
    grad_pooled: Tensor,
    grad_weight_sum: Tensor | None,
    grad_weights: Tensor | None,
    x: Tensor,
    pooled: Tensor,
    weight_sum: Tensor,
    weights: Tensor,
    dropout_scale: Tensor | None,
    patch_h: int,
    patch_w: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`sep_attn.triton_kernels.pooling.context_pool_backward`."""
    return _module("pooling").context_pool_backward(
        grad_pooled,
        grad_weight_sum,
        grad_weights,
        x,
        pooled,
        weight_sum,
        weights,
        dropout_scale,
        patch_h,
        patch_w,
    )


def gate(v: Tensor, context: Tensor, act: str, patch_h: int, patch_w: int) -> Tensor:
    """See :func:`sep_attn.triton_kernels.gating.gate`."""
    return _module("gating").gate(v, context, act, patch_h, patch_w)


def gate_backward(
    grad_y: Tensor, v: Tensor, context: Tensor, act: str, patch_h: int, patch_w: int
) -> tuple[Tensor, Tensor]:
    """See :func:`sep_attn.triton_kernels.gating.gate_backward`."""
    return _module("gating").gate_backward(grad_y, v, context, act, patch_h, patch_w)


def separable_attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sep_attn.triton_kernels.attention.separable_attention`."""
    return _module("attention").separable_attention(*arguments)


def separable_attention_inference(*arguments: Any) -> Tensor:
    """See :func:`sep_attn.triton_kernels.attention.separable_attention_inference`."""
    return _module("attention").separable_attention_inference(*arguments)


def separable_attention_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`sep_attn.triton_kernels.attention.separable_attention_backward`."""
    return _module("attention").separable_attention_backward(*arguments)


def traces(device: torch.device) -> bool:
    """Whether launches on ``device`` can be nodes of a graph; the interpreter's cannot."""
    return device.type in ("cuda", "xpu") and os.environ.get("TRITON_INTERPRET") != "1"


def tracing_launches() -> contextlib.AbstractContextManager[None]:
    """See :func:`sep_attn.triton_kernels.tracing.active`."""
    active: contextlib.AbstractContextManager[None] = _module("tracing").active()
    return active


class Sources:
    """What the launchers are made of, as ``torch`` asks for it: in the form of Triton kernels."""

    def __iter__(self) -> Iterator[Any]:
        if os.environ.get("TRITON_INTERPRET") != "1":
            yield _module("tracing").fingerprint()


def unavailable_reason(device: torch.device) -> str | None:
    """Why Triton cannot serve tensors on ``device``; None when it can.

    CUDA, ROCm and XPU devices are served where Triton imports; CPU tensors only by Triton's
    interpreter, under ``TRITON_INTERPRET=1`` (set before Triton is imported).
    """
    if device.type not in ("cuda", "xpu", "cpu"):
        return f"Triton compiles for CUDA, ROCm and XPU devices, not for {device.type}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton has no CPU target; TRITON_INTERPRET=1 runs its interpreter, for tests only"
    missing = _import_error()
    if missing is None and device.type == "cuda":
        return _too_old(device.index)
    return missing


@functools.cache
def _import_error() -> str | None:
    try:
        importlib.import_module("triton.language")
    except ImportError as error:
        return f"triton does not import ({error}); install triton 3.6 or later"
    return None


@functools.cache
def _too_old(device_index: int | None) -> str | None:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device_index)
    if capability >= (7, 0):
        return None
    name = torch.cuda.get_device_name(device_index)
    return f"Triton needs compute capability 7.0 or later; {name} has {capability}"
