"""What is compiled ahead of the GPU tables is what they launch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

REPOSITORY = Path(__file__).parent.parent

# Compiles ahead, then calls the layer with a driver that launches nothing.
COMPILE_AND_CALL = """
import os
from pathlib import Path
import torch
from benchmarks import host_time, precompile, registry
from benchmarks.machine_code import TARGET, TARGETS, LayerCase
from sep_attn import SeparableAttention

def compiled():
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))

cases = [
    LayerCase((2, 32, 4, 16), torch.bfloat16, patch=(4, 1), inference=inference)
    for inference in (True, False)
]
count = precompile.compile_all(cases, TARGETS[TARGET], TARGET, processes=1)
ahead = compiled()
module = SeparableAttention(32, backend="triton", dtype=torch.bfloat16)
x = torch.zeros(2, 32, 4, 16, dtype=torch.bfloat16)
with host_time.launching_nothing():
    with torch.no_grad():
        module(x)
    registry.training_step(module)((x.clone().requires_grad_(), x))
print(count, ahead, compiled())
"""


def test_calls_find_every_kernel_compiled(tmp_path: Path) -> None:
    variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    variables.pop("TRITON_INTERPRET", None)
    variables["PYTHONPATH"] = str(REPOSITORY)
    result = subprocess.run(
        [sys.executable, "-c", COMPILE_AND_CALL], env=variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    count, ahead, afterwards = map(int, result.stdout.split())
    assert count == ahead == afterwards > 4


def test_every_table_has_its_calls() -> None:
    from benchmarks import gpu_tables, precompile, registry

    cases = list(precompile.cases(torch.bfloat16))
    shapes = {case.shape for case in cases if case.inference}
    for shape in (*registry.SHORT_SLICES, *registry.LONG_SLICES, gpu_tables.LATENCY_SHAPE):
        assert (shape.slices, shape.tokens, shape.dim) in shapes
    assert {(1, 65_536, 512), (16, 4096, 512), (256, 128, 4, 256)} <= shapes
    assert {case.patch for case in cases if not case.inference} == {(4, 1)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_nothing_is_compiled_without_a_gpu() -> None:
    from benchmarks import precompile

    with pytest.raises(SystemExit, match="finds none here"):
        precompile.main([])
