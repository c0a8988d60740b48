"""The report on machine code: it covers the tables, and its rules hold over a part of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compile_report
from sep_attn.triton_kernels import configs

pytest.importorskip("triton")

REPOSITORY = Path(__file__).parent.parent

GOOD = {
    "kernel": "slice_fwd_kernel",
    "config": "bfloat16 [B,N,D] D=128 channels_wide BLOCK_N=128 warps=8 stages=3",
    "target": "sm_90",
    "registers": 128,
    "spill_bytes": 0,
    "shared_bytes": 98_304,
    "hgmma": 12,
    "disturbed": 0,
    "load_128": 32,
    "load_narrow": 9,
    "products": True,
}


def run_without_interpreter(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    variables.pop("TRITON_INTERPRET", None)
    variables["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.run(
        [sys.executable, *arguments], env=variables, capture_output=True, text=True
    )


def test_good_row_breaks_no_rule() -> None:
    assert tuple(GOOD) == compile_report.KEYS
    assert compile_report.broken_rules([GOOD]) == []


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"spill_bytes": 8}, "8 bytes spilled"),
        ({"hgmma": 0}, "a product in half precision without HGMMA"),
        ({"disturbed": 2}, "2 instructions disturb a product under way"),
        (
            {"shared_bytes": 300_000, "config": GOOD["config"].replace("D=128", "D=256")},
            "300000 bytes of shared memory",
        ),
        ({"registers": 130}, "only one program fits on a multiprocessor"),
        ({"shared_bytes": 120_000}, "only one program fits on a multiprocessor"),
        ({"load_128": 0}, "none of its 9 loads takes 16 bytes"),
        (
            {"load_128": 0, "config": "bfloat16 [B,D,P,N] D=512 tokens_wide BLOCK_N=8"},
            "none of its 9 loads takes 16 bytes",
        ),
    ],
)
def test_bad_rows_break_a_rule(change: dict[str, Any], fault: str) -> None:
    (broken,) = compile_report.broken_rules([GOOD | change])
    assert broken.startswith("sm_90 slice_fwd_kernel bfloat16") and fault in broken


@pytest.mark.parametrize(
    "change",
    [
        {"hgmma": 0, "config": GOOD["config"].replace("bfloat16", "float32")},
        {"hgmma": 0, "products": False},
        {"registers": 130, "config": GOOD["config"].replace("D=128", "D=192")},
        {"registers": 130, "kernel": "token_product_kernel"},
        {"hgmma": None, "spill_bytes": 16, "target": "sm_80"},
        {"load_128": 0, "config": GOOD["config"].replace("channels_wide", "channels")},
        {"load_128": 0, "config": "bfloat16 [B,D,P,N] D=1280 tokens_wide BLOCK_N=4", "hgmma": 1},
    ],
)
def test_rules_hold_where_they_apply(change: dict[str, Any]) -> None:
    assert compile_report.broken_rules([GOOD | change]) == []


PICKED = """
import json
from sep_attn.triton_kernels import attention, configs
from benchmarks import compile_report

real, picked = configs.config_of, []
def config_of(kernel, arch, itemsize, channels):
    picked.append((kernel, arch, itemsize, channels, real(kernel, arch, itemsize, channels)))
    return picked[-1][-1]
attention.config_of = config_of
found = {}
for target in compile_report.TARGETS:
    found[target] = [config for config, _ in compile_report.find_launches(target)]
print(json.dumps({"picked": picked, "found": found}))
"""


def test_every_row_of_every_table_is_compiled(tmp_path: Path) -> None:
    process = run_without_interpreter(tmp_path, "-c", PICKED)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    for target in compile_report.TARGETS:
        for choice in configs.every_config((target,)):
            served = _served(choice)
            if served is not None and choice.channels_from > served:
                continue
            assert any(
                kernel == choice.kernel
                and arch == target
                and itemsize == choice.itemsize
                and choice.channels_from <= channels <= (choice.channels_to or channels)
                and tuple(config) == choice.config
                for kernel, arch, itemsize, channels, config in result["picked"]
            ), choice
        assert result["found"][target]


def _served(choice: configs.Choice) -> int | None:
    """Up to how many channels the layer calls a kernel at all; None for every number."""
    if choice.kernel == "value_gate_weights_bwd_kernel":
        return configs.MOST_FUSED_BACKWARD_CHANNELS[choice.itemsize]
    if choice.kernel in ("slice_fwd_kernel", "value_gate_output_fwd_kernel"):
        return configs.MOST_FUSED_CHANNELS[choice.itemsize]
    return None


def test_report_on_a_part(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    arguments = ("-m", "benchmarks.compile_report", "--json", str(path), "--processes", "1")
    only = ("--targets", "sm_90", "--channels", "256", "--kernels")
    kernels = ("slice_fwd_kernel", "value_gate_weights_bwd_kernel")
    process = run_without_interpreter(tmp_path, *arguments, *only, *kernels)
    assert process.returncode == 0, process.stdout + process.stderr
    rows = json.loads(path.read_text())
    assert {row["kernel"] for row in rows} == set(kernels)
    assert all(tuple(row) == compile_report.KEYS for row in rows)
    assert any(row["hgmma"] for row in rows) and all(row["products"] for row in rows)
    # The layouts of ViTs and of MobileViTv2.
    assert "channels_wide" in process.stdout and "tokens_wide" in process.stdout
    assert "0 rules broken" in process.stdout


def test_committed_report_breaks_no_rule() -> None:
    rows = json.loads((REPOSITORY / "benchmarks/results/compile_report.json").read_text())
    assert {row["target"] for row in rows} == set(compile_report.TARGETS)
    assert all(tuple(row) == compile_report.KEYS for row in rows)
    assert compile_report.broken_rules(rows) == []
