"""What a call holds: the output and tiles, and for a backward pass at most twice the input."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.cpu.memory import resident_bytes, tensor_bytes
from sep_attn import SeparableAttention, native

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason="the C++ kernels are not built"
)

LAYOUTS = {"[B, N, D]": (1, 4096, 64), "[B, D, P, N]": (1, 64, 4, 1024)}
TILES = 4 << 20  # bytes: what threads take for themselves, whatever N is


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_inference_allocates_the_output_alone(layout: str) -> None:
    layer, x = SeparableAttention(64).eval(), torch.randn(LAYOUTS[layout])
    layer(x)
    out, peak, held = tensor_bytes(lambda: layer(x))
    assert peak == held == out.nbytes


@torch.no_grad()
def test_the_kernels_own_memory_does_not_grow_with_tokens() -> None:
    layer = SeparableAttention(64).eval()
    layer(torch.randn(1, 1024, 64))
    for tokens in (1 << 15, 1 << 17):
        x = torch.randn(1, tokens, 64)
        grown = resident_bytes(lambda x=x: layer(x))
        if grown is None:
            pytest.skip("the resident size cannot be known here")
        assert grown <= x.nbytes + TILES


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, values", [(torch.float32, 1), (torch.bfloat16, 0)])
def test_training_keeps_input_and_values(layout: str, dtype: torch.dtype, values: int) -> None:
    layer = SeparableAttention(64, dtype=dtype)
    x = torch.randn(LAYOUTS[layout], dtype=dtype, requires_grad=True)
    layer(x)
    out, _, held = tensor_bytes(lambda: layer(x))
    kept = held - out.nbytes  # the input is kept, but it was there before
    small = 8 * (4096 + 4 * (2 * 64 + 1) + 64)  # a weight a token, statistics a slice
    assert values * x.nbytes <= kept <= values * x.nbytes + small


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="not a Linux with smaps")
@torch.no_grad()
def test_large_results_ask_for_large_pages() -> None:
    layer = SeparableAttention(64).eval()
    large, small = layer(torch.randn(1, 1 << 18, 64)), layer(torch.randn(1, 1 << 12, 64))
    if not advised(large.data_ptr() + large.nbytes // 2, Path("/proc/self/smaps").read_text()):
        pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        if not pages.exists():
            pytest.skip("the kernel has no large pages")
        raise AssertionError(f"64 MiB without MADV_HUGEPAGE ({pages.read_text().strip()})")
    assert not advised(small.data_ptr(), Path("/proc/self/smaps").read_text())


def advised(address: int, smaps: str) -> bool:
    """Whether the mapping that holds an address has been advised to use large pages."""
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)[1:]:
        begin, end = (int(edge, 16) for edge in mapping.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            return " hg" in mapping[mapping.index("VmFlags:") :]
    raise AssertionError(f"nothing is mapped at {address:#x}")
