"""The one dispatcher: which backend serves a call, and why another cannot."""

from __future__ import annotations

import functools
import sys
import warnings

import torch
from torch.autograd import forward_ad

from sep_attn import native, triton_kernels
from sep_attn.validation import BACKENDS

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unavailable_reason(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` ("native", "triton" or "reference") cannot serve tensors of this device and
    dtype; None when it can."""
    if backend == "reference":
        return None
    if dtype not in KERNEL_DTYPES:
        return f"its kernels take float32, float64, bfloat16 and float16, not {dtype}"
    if backend == "triton":
        return triton_kernels.unavailable_reason(device)
    if device.type != "cpu":
        return f"it serves CPU tensors, not {device.type}"
    return native.unavailable_reason()


_innermost_transform = torch._C._functorch.peek_interpreter_stack
_VMAP = torch._C._functorch.TransformType.Vmap


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or a forward-mode derivative is under way. Kernels see
    neither a batch that ``vmap`` hides nor a tangent, which would be lost without a word."""
    return forward_ad._current_level >= 0 or _innermost_transform() is not None


def _is_differentiated_by_transform() -> bool:
    """Whether one under way is another than ``vmap``, which calls an operator for every sample."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(level.key() != _VMAP for level in stack)


def is_observed() -> bool:
    """Whether a dispatch mode (fake tensors, FLOP counters), a profiler or torch.jit's tracer is to
    see the operators that are called."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values lie where it begins. Those of a sparse, batched or zero tensor do
    not, nor those that are yet to be negated, as of ``z.conj().imag``."""
    return (
        torch._C._has_storage(tensor) and not tensor.is_neg() and not torch._is_zerotensor(tensor)
    )


def warn(message: str) -> None:
    """Warns at the line that called torch or this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("sep_attn", "torch")


@functools.cache
def _warn_once(message: str) -> None:
    warn(message)


@torch.compiler.assume_constant_result
def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns the backend that serves a call: "native", "triton", "reference" or "pooled".

    ``"auto"`` takes the C++ kernels for CPU tensors and Triton for any other device, and falls back
    to the reference with one warning that names the cause. During ``torch.onnx.export`` every
    backend but the reference gives way to "pooled", the kernels' computation in PyTorch's own
    operators, since an ONNX file can hold no others; and so does ``"auto"`` within a transform of
    ``torch.func`` and for a forward-mode derivative, which only those operators know.

    Raises:
        RuntimeError: a backend named by hand cannot serve the call; the message says why.
    """
    if backend != "reference" and torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "pooled"
    if is_transformed() and backend == "auto":
        return "pooled"
    if backend != "reference" and _is_differentiated_by_transform():
        raise RuntimeError(
            f'backend="{backend}" cannot serve a derivative of torch.func or in forward mode: its '
            "kernels have none of either. Usable here: auto, reference"
        )
    if backend != "auto":
        reason = unavailable_reason(backend, device, dtype)
        if reason is not None:
            usable = [
                name for name in BACKENDS[1:] if unavailable_reason(name, device, dtype) is None
            ]
            raise RuntimeError(
                f'backend="{backend}" cannot serve {dtype} tensors on {device}: {reason}. '
                f"Usable here: {', '.join(usable)}"
            )
        return backend
    if device.type == "meta":
        return "reference"
    preferred = "native" if device.type == "cpu" else "triton"
    reason = unavailable_reason(preferred, device, dtype)
    if reason is None:
        return preferred
    _warn_once(
        f"sep_attn computes {dtype} tensors on {device.type} in plain PyTorch: the {preferred} "
        f"backend cannot serve them ({reason})"
    )
    return "reference"
