"""The dispatcher: who serves what, what is said when a backend is missing, and `python -m`."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import sep_attn
from sep_attn import backends, functional, native

CPU = torch.device("cpu")


def layer_arguments(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = [(1, 9, 4), (9, 4), (9,), (4, 4), (4,)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def test_auto_serves_cpu_tensors_with_the_native_kernels() -> None:
    assert native.unavailable_reason() is None, "the tests need the C++ kernels: build them"
    assert backends.resolve("auto", CPU, torch.float32) == "native"
    native.reset_kernel_calls()
    functional.separable_attention(*layer_arguments())
    assert native.kernel_calls() == {f"separable_attention_forward/{native.capability()}": 1}


def test_one_launch_forward_one_backward() -> None:
    arguments = [value.requires_grad_() for value in layer_arguments()]
    native.reset_kernel_calls()
    functional.separable_attention(*arguments).sum().backward()
    assert native.kernel_calls() == {
        f"separable_attention_forward/{native.capability()}": 1,
        f"separable_attention_backward/{native.capability()}": 1,
    }


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: "it was taken away")
    backends._warn_once.cache_clear()


@pytest.mark.usefixtures("without_native")
def test_auto_falls_back_with_one_warning_that_names_the_cause() -> None:
    with pytest.warns(UserWarning, match=r"plain PyTorch.*it was taken away"):
        first = functional.separable_attention(*layer_arguments())
    assert first.shape == (1, 9, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.separable_attention(*layer_arguments())


@pytest.mark.usefixtures("without_native")
def test_a_backend_named_by_hand_never_falls_back() -> None:
    with pytest.raises(RuntimeError, match=r'backend="native" cannot serve .*it was taken away'):
        functional.separable_attention(*layer_arguments(), backend="native")


def test_the_error_names_what_is_usable() -> None:
    reason = backends.unavailable_reason("native", torch.device("cuda"), torch.float32)
    assert reason == "it serves CPU tensors, not cuda"
    with pytest.raises(RuntimeError, match=r"Usable here: .*reference"):
        backends.resolve("native", torch.device("cuda"), torch.float32)
    reason = backends.unavailable_reason("native", CPU, torch.float8_e4m3fn)
    assert reason is not None and "float8_e4m3fn" in reason


def test_command_line_says_what_serves_what() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sep_attn"], capture_output=True, text=True, check=True
    )
    assert f"sep_attn {sep_attn.__version__}" in result.stdout
    assert "CPU instruction set" in result.stdout
    assert "native     yes" in result.stdout


def test_import_needs_neither_kernels_nor_triton() -> None:
    """With `_C` and triton out of reach, import works and the reference serves."""
    program = """
import sys, warnings
sys.modules["sep_attn._C"] = None
sys.modules["triton"] = None
import torch, sep_attn
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = sep_attn.SeparableAttention(8)(torch.randn(2, 5, 8))
assert out.shape == (2, 5, 8)
assert len(caught) == 1 and "plain PyTorch" in str(caught[0].message), caught
assert sep_attn.backends.unavailable_reason("triton", torch.device("cuda"), torch.float32)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
