"""The machine code of every Triton kernel, made without a GPU: registers, access, recompiles.

Each test runs :mod:`triton_compile` in a process of its own, for Triton decides when it is imported
whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parent

KERNELS = {
    "context_pool_fwd_kernel",
    "context_pool_combine_kernel",
    "context_pool_bwd_kernel",
    "context_pool_bwd_weights_kernel",
    "gate_fwd_kernel",
    "gate_bwd_kernel",
    "gate_bwd_combine_kernel",
}
# Bytes of shared memory a program can have, and threads of the four warps that run it.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
THREADS = {"sm_80": 128, "sm_90": 128, "gfx942": 256}
LOADED = {"X_LAYOUT", "V_LAYOUT", "GRAD_Y_LAYOUT"}


def run_without_interpreter(tmp_path: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment["OMP_NUM_THREADS"] = "1"
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def check_resources(row: dict[str, Any]) -> None:
    assert row["spilled"] == 0
    assert row["shared"] <= SHARED_MEMORY[row["target"]]


def check_memory_access(row: dict[str, Any]) -> None:
    """Tiles are addressed in 64 bits; where a layout is wide, every thread's share of the tile is
    loaded and stored in words of 128 bits."""
    if not row["layouts"]:
        return
    assert row["tile_offsets"] == ["i64"]
    tile_bytes = row["tile"][0] * row["tile"][1] * row["itemsize"]
    words = tile_bytes // (16 * THREADS[row["target"]])
    for kind, tensors in (
        ("loads", row["layouts"].keys() & LOADED),
        ("stores", row["layouts"].keys() - LOADED),
    ):
        wide = [name for name in tensors if row["layouts"][name].endswith("_wide")]
        assert row[kind].get("128", 0) >= words * len(wide)


@pytest.mark.parametrize(
    "target, dtype, cases",
    [
        ("sm_90", "bfloat16", ["wide", "narrow"]),
        ("sm_90", "float32", ["few", "narrow"]),
        ("sm_90", "float64", ["few"]),
        ("sm_80", "bfloat16", ["few"]),
        ("sm_80", "float32", ["few"]),
        ("gfx942", "bfloat16", ["few"]),
        ("gfx942", "float32", ["few"]),
    ],
)
def test_compiled_kernels(target: str, dtype: str, cases: list[str], tmp_path: Path) -> None:
    script = str(TESTS / "triton_compile.py")
    output = run_without_interpreter(tmp_path, script, target, dtype, *cases)
    rows = [json.loads(line) for line in output.splitlines()]
    assert {row["kernel"] for row in rows} == KERNELS
    assert "tokens_wide" in str(rows) and "channels_wide" in str(rows)
    for row in rows:
        try:
            check_resources(row)
            check_memory_access(row)
        except AssertionError as error:
            raise AssertionError(f"{row}") from error


RECOMPILES = """
import json, torch
from triton_compile import CompileCase, count_variants

options = dict(masked=True, dropout=True, grad_weights=True)
counts = {
    "[B, N, D]": count_variants(
        CompileCase((batch, tokens, 96), torch.bfloat16, **options)
        for batch in (1, 2, 16) for tokens in (1, 16, 17, 197, 256, 5000)
    ),
    "[B, D, P, N]": count_variants(
        CompileCase((batch, 64, 4, tokens), torch.bfloat16, patch=(4, 1))
        for batch in (1, 2, 16) for tokens in (3, 16, 49, 64, 1000, 2048)
    ),
    "[B, D, H, W]": count_variants(
        CompileCase((1, 64, height, width), torch.bfloat16, patch=(2, 2))
        for height in (4, 14, 64) for width in (6, 16, 66, 128)
    ),
}
print(json.dumps(counts))
"""


def test_a_new_length_compiles_nothing_new(tmp_path: Path) -> None:
    counts = json.loads(run_without_interpreter(tmp_path, "-c", RECOMPILES))
    assert counts["[B, N, D]"] == dict.fromkeys(KERNELS, 1)
    # Where tokens are contiguous, a length of whole 16-byte words takes the wide kernel, any other
    # length the narrow one: two in all.
    for layout in ("[B, D, P, N]", "[B, D, H, W]"):
        assert max(counts[layout].values()) == 2, counts
        assert counts[layout]["context_pool_combine_kernel"] == 1
