"""The C++ kernels of this installation: whether they are there, and which instruction set runs.

Importing this module loads ``sep_attn._C`` once, which registers the ``*_native`` operators. It
never raises: :func:`unavailable_reason` tells what went wrong.
"""

from __future__ import annotations

import importlib.util
import types

import torch

from sep_attn.version import __version__


def _load() -> tuple[types.ModuleType | None, str | None]:
    if importlib.util.find_spec("sep_attn._C") is None:
        return None, (
            "the C++ kernels are not built (no sep_attn._C beside the package); install a C++ "
            "compiler (Debian: apt install g++), then reinstall without SEP_ATTN_SKIP_NATIVE, or "
            "in a clone run: python setup.py build_ext --inplace"
        )
    try:
        from sep_attn import _C

        version = _C.version()
    except Exception as error:  # a broken module may raise anything; the package works without it
        reason = f"the C++ kernels did not load: {error}"
        if "SEP_ATTN_CPU_CAPABILITY" not in reason:
            reason += (
                f"; they need torch 2.10 or later (this is {torch.__version__}): reinstall "
                "sep_attn, or in a clone run: python setup.py build_ext --inplace"
            )
        return None, reason
    if version != __version__:
        return None, (
            f"the C++ kernels were built for sep_attn {version} and this is {__version__}; "
            "rebuild them: python setup.py build_ext --inplace"
        )
    return _C, None


_module, _reason = _load()


def _loaded() -> types.ModuleType:
    if _module is None:
        raise RuntimeError(f"sep_attn's native backend is not available: {_reason}")
    return _module


def unavailable_reason() -> str | None:
    """Why the C++ kernels cannot serve CPU tensors; None when they can."""
    return _reason


def capability() -> str:
    """The instruction set in use, by default the best that the machine has: ``"baseline"``,
    ``"avx2"``, ``"avx512"``, ``"avx512_bf16"`` or ``"neon"``.

    ``"avx512_bf16"`` is ``"avx512"`` with the forward pass of bfloat16 layers in VDPBF16PS dot
    products. On AMD's processors they start at the rate of float32's multiply-adds, and do twice
    the work (Zen 4, measured); on Intel's at a quarter of it (Sapphire Rapids, measured), so that
    widening to float32 is faster and ``"avx512"`` the default.

    Raises:
        RuntimeError: the C++ kernels are not available (so do all functions below).
    """
    return _loaded().capability()


def capabilities() -> list[str]:
    """The instruction sets usable on this machine: worst first, and last ``"avx512_bf16"``."""
    return _loaded().capabilities()


def compiled_capabilities() -> list[str]:
    """The instruction sets this build holds, in the same order."""
    return _loaded().compiled_capabilities()


def set_capability(name: str) -> None:
    """Uses another instruction set from now on, in this process.

    Raises:
        ValueError: ``name`` is not among :func:`capabilities`.
    """
    _loaded().set_capability(name)


def kernel_calls() -> dict[str, int]:
    """How often each kernel ran since the last reset: ``{"gate_forward/avx512": 2}``."""
    return _loaded().kernel_calls()


def reset_kernel_calls() -> None:
    """Sets every count to 0."""
    _loaded().reset_kernel_calls()


def packed_weights_bytes(dtype: torch.dtype, dim: int) -> int:
    """Bytes in which the packed weights of a layer with ``dim`` channels are kept."""
    return _loaded().packed_weights_bytes(str(dtype).removeprefix("torch."), dim)


def poison_results(enabled: bool) -> None:
    """For tests: fills results with NaN before a kernel runs, so that a value left out shows."""
    _loaded().poison_results(enabled)
