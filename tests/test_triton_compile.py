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

from benchmarks.compile_report import SHARED_MEMORY, WARP
from sep_attn.triton_kernels.configs import weight_rows

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
LAYER_KERNELS = {
    "slice_fwd_kernel",
    "score_pool_fwd_kernel",
    "context_combine_kernel",
    "value_gate_output_fwd_kernel",
    "token_product_kernel",
    "value_gate_bwd_kernel",
    "value_gate_weights_bwd_kernel",
    "context_bwd_kernel",
    "key_weight_bwd_kernel",
    "source_bwd_kernel",
    "weight_grad_kernel",
    "sum_parts_kernel",
}
IN_THREE_PARTS = {"key_weight_bwd_kernel"}
LOADED = {"X_LAYOUT", "V_LAYOUT", "GRAD_Y_LAYOUT"}


def run_without_interpreter(tmp_path: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
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
    words = tile_bytes // (16 * WARP[row["target"]] * row["warps"])
    for kind, tensors in (
        ("loads", row["layouts"].keys() & LOADED),
        ("stores", row["layouts"].keys() - LOADED),
    ):
        wide = [name for name in tensors if row["layouts"][name].endswith("_wide")]
        assert row[kind].get("128", 0) >= words * len(wide)


@pytest.mark.parametrize(
    "target, dtype, cases",
    [
        ("sm_90", "bfloat16", ["few", "narrow"]),
        ("sm_90", "float64", ["few"]),
        ("sm_80", "bfloat16", ["few"]),
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


def fused_backward_instructions(config: dict[str, Any], warps: int) -> int:
    """The instructions of one warp for a tile's four products, where none repeats what another
    does: each takes 64 rows of four warps, and 16 of the inner dimension."""
    rows, depth = 64, 16
    groups = warps // 4
    pieces = weight_rows(config["D"])
    forth = max(1, config["BLOCK_N"] // rows // groups) * (sum(pieces) // depth)
    back = sum(max(1, piece // rows // groups) for piece in pieces) * config["BLOCK_N"] // depth
    return 2 * (forth + back)


def check_layer_resources(row: dict[str, Any]) -> None:
    """Nothing spilled, HGMMA for every half-precision product and 128-bit loads of x on sm_90."""
    assert row["shared"] <= SHARED_MEMORY[row["target"]]
    if row["layouts"]:
        assert "i64" in row["tile_offsets"]  # tokens; weights are addressed in 32 bits
        assert row["loads"].get("128", 0) > 0
    if row["target"] != "sm_90":
        return
    assert row["spilled"] == 0
    assert row["lone_buffers"] == []
    # Beside half precision the tensor cores take the product for W_K, of float32 in three parts.
    in_three_parts = row["kernel"] in IN_THREE_PARTS and row["itemsize"] == 2
    assert (row["hgmma"] > 0) == (row["half_products"] or in_three_parts)
    if row["hgmma_columns"]:
        # Below 64 columns an instruction reads longer than it multiplies, unless its rows lie in
        # registers.
        assert min(row["hgmma_columns"]) >= 32
    if row["kernel"] == "value_gate_weights_bwd_kernel" and row["config"]["D"] >= 64:
        assert row["loads_ahead"]
        assert row["hgmma"] == fused_backward_instructions(row["config"], row["warps"])
    if row["layouts"]:
        config = row["config"]
        depth = config.get("BLOCK_K", config["D"])
        if row["kernel"] == "weight_grad_kernel":
            depth = config["BLOCK_I"]
        tile_bytes = config.get("BLOCK_P", config["BLOCK_N"]) * depth * row["itemsize"]
        assert row["loads"]["128"] >= tile_bytes // (16 * WARP["sm_90"] * row["warps"])


@pytest.mark.parametrize(
    "target, dtype, cases",
    [
        ("sm_90", "bfloat16", ["layer"]),
        ("sm_90", "float32", ["layer_few"]),
        ("sm_80", "float16", ["layer_few"]),
        ("sm_100", "bfloat16", ["layer_few"]),
        ("gfx942", "bfloat16", ["layer_few"]),
    ],
)
def test_compiled_layer(target: str, dtype: str, cases: list[str], tmp_path: Path) -> None:
    script = str(TESTS / "triton_compile.py")
    output = run_without_interpreter(tmp_path, script, target, dtype, *cases)
    rows = [json.loads(line) for line in output.splitlines()]
    kernels = {row["kernel"] for row in rows}
    fused = {"value_gate_output_fwd_kernel", "value_gate_weights_bwd_kernel"}
    assert kernels == (LAYER_KERNELS - fused if dtype == "float32" else LAYER_KERNELS)
    for row in rows:
        try:
            check_layer_resources(row)
        except AssertionError as error:
            raise AssertionError(f"{row}") from error


RECOMPILES = """
import json, torch
from triton_compile import CompileCase, LayerCase, count_variants

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
    "layer": count_variants(
        LayerCase((batch, tokens, 96), torch.bfloat16, masked=True, dropout=True)
        for batch in (1, 3, 200) for tokens in (65, 197, 256, 1000, 5000)
    ),
    "layer of short slices": count_variants(
        LayerCase((batch, tokens, 96), torch.bfloat16, masked=True, dropout=True)
        for batch in (1, 3, 200) for tokens in (1, 16, 17, 49, 64)
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
    assert counts["layer"].keys() < LAYER_KERNELS
    # The sums of both weights, and those of everything else.
    assert counts["layer"].pop("sum_parts_kernel") == 2
    assert set(counts["layer"].values()) == {1}
    # Slices of at most half a tile lie side by side, 2, 4 or 8 in a tile of 128 tokens.
    assert max(counts["layer of short slices"].values()) <= 3, counts


GLOBALS = """
import importlib, pkgutil
from triton.language.core import constexpr
from triton.runtime.jit import JITCallable, JITFunction
from sep_attn import triton_kernels

kernels = 0
for module in pkgutil.iter_modules(triton_kernels.__path__, "sep_attn.triton_kernels."):
    for name, function in vars(importlib.import_module(module.name)).items():
        if isinstance(function, JITCallable):
            assert function.cache_key
            for (used, _), (value, _) in function.used_global_vals.items():
                assert isinstance(value, constexpr), (name, used)
            kernels += isinstance(function, JITFunction)
assert kernels > 20
print("ok")
"""


def test_the_key_of_tritons_cache_holds_every_global(tmp_path: Path) -> None:
    """Triton leaves out those that are no ``constexpr``, and a later version of the package would
    be served the kernels of an earlier one."""
    assert run_without_interpreter(tmp_path, "-c", GLOBALS).strip() == "ok"


LAUNCHES = """
import torch
from benchmarks.machine_code import LaunchNothing, QuietDriver
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton import knobs
from sep_attn.triton_kernels import attention, launch, pooling

launched, through_triton = [], []

class Launcher(LaunchNothing):
    def __call__(self, *arguments):
        launched.append(arguments)

class Driver(QuietDriver):
    launcher_cls = Launcher
    def get_current_stream(self, device):
        return 7

driver.set_active(Driver())
run = JITFunction.run
def counted(self, *args, **kwargs):
    through_triton.append(self.fn.__name__)
    return run(self, *args, **kwargs)
JITFunction.run = counted

def call(x):
    launched.clear(), through_triton.clear()
    weights = torch.zeros(33, 16).bfloat16(), torch.zeros(33).bfloat16()
    out = torch.zeros(16, 16).bfloat16(), None
    attention.separable_attention(x, None, *weights, *out, None, None, 0.0, "relu", 1, 1)
    ((*first, stream, _, _, _, _, _), arguments) = launched[0][:9], launched[0][9:]
    assert len(launched) == 1 and first == [1, 1, 1] and stream == 7
    return list(arguments)

def same(later, first):  # tensors are passed by where they begin
    assert through_triton == [] and later[0] == x.data_ptr() and len(later) == len(first)
    return all(
        type(value) is int if isinstance(before, torch.Tensor) else value == before
        for value, before in zip(later, first)
    )

x = torch.zeros(1, 40, 16).bfloat16()
first = call(x)
assert through_triton == ["slice_fwd_kernel"]
assert same(call(x), first)
asked, launch.current_stream = launch.current_stream, lambda device: 7
assert same(call(x), first)
x = x.clone()
assert same(call(x), first)
moved = torch.zeros(641).bfloat16()[1:].view(1, 40, 16)  # begins at no multiple of 16 bytes
call(moved)
assert through_triton == ["slice_fwd_kernel"]

through_triton.clear()
for dtype in (torch.float32, torch.bfloat16, torch.float32):  # scores may have a dtype of their own
    pooling.context_pool(x, torch.zeros(1, 40, dtype=dtype), None, None, 1, 1)
assert through_triton == ["context_pool_fwd_kernel"] * 2

gpu = torch.device("cuda", 0)
assert asked(gpu) == 7 and asked(torch.device("cpu")) is None
knobs.runtime.launch_enter_hook.add(print)  # Triton calls it, where it is asked to launch
assert asked(gpu) is None
knobs.runtime.launch_enter_hook.remove(print)
assert asked(gpu) == 7
print("ok")
"""


def test_later_launches_pass_the_same_without_triton(tmp_path: Path) -> None:
    """With a driver that only writes down what it is to launch."""
    assert run_without_interpreter(tmp_path, "-c", LAUNCHES).strip() == "ok"


def test_the_hosts_time_is_taken_on_the_way_to_as_many_launches(tmp_path: Path) -> None:
    code = (
        "import json; from benchmarks.host_time import rows; print(json.dumps([*rows(rounds=1)]))"
    )
    rows = json.loads(run_without_interpreter(tmp_path, "-c", code))
    assert [row["launches"] for row in rows] == [1] * 5 + [8] + [3] * 5 + [10]
    assert all(row["us"] > 0 for row in rows)
