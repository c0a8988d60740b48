"""How much memory a call takes above its inputs and weights.

Two counts. *Tensors* are the bytes that torch's allocator hands out, from the profiler: the same at
every run. *Resident* is how far the process grows during one call, from the kernel of the operating
system, after all free memory was given back: it also holds what the C++ code takes for itself, the
pages of code that run for the first time, and is Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure, report
from benchmarks.cpu.workload import LAYOUTS, TIMM, Workload, contender
from benchmarks.registry import MODES, LayerShape

# The profiler's library reads this when it starts; it would print two lines a profile.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Result = TypeVar("Result")

SHAPES = (
    LayerShape(4, 256, 128),
    LayerShape(1, 4096, 128),
    LayerShape(1, 16384, 128),
    LayerShape(1, 4096, 512),
)


def tensor_bytes(function: Callable[[], Result]) -> tuple[Result, int, int]:
    """Runs a function and counts what torch's CPU allocator gives and takes back.

    Returns:
        Its result, the most bytes held at once above those held before, and the bytes still held
        at the end, the result's among them.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    recorded = profiler.profiler.kineto_results.events()
    changes = [
        (event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return result, peak, held


def resident_bytes(function: Callable[[], object]) -> int | None:
    """How far the process grows while a function runs; None where it cannot be known."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")  # the highest resident size starts anew
        before = _status_bytes(status, "VmRSS")
        function()
        return max(0, _status_bytes(status, "VmHWM") - before)
    except (OSError, AttributeError):  # no such file, no such function: not Linux, not glibc
        return None


def _status_bytes(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def measure_memory(shapes: Sequence[LayerShape], *, threads: int) -> list[dict[str, Any]]:
    """One row for each shape, pass and layer, float32, after a call that warms up."""
    rows = []
    for shape in shapes:
        for mode in MODES:
            work = Workload(shape, mode=mode)
            for name in (TIMM, *LAYOUTS):
                with measure.threads(threads), work.gradients():
                    rows.append(_measure_layer(work, name, threads))
    return rows


def _measure_layer(work: Workload, name: str, threads: int) -> dict[str, Any]:
    shape, mode = work.shape, work.mode
    module = work.build(name)
    work.verify(name, module)
    call = work.call(name, module)
    call()
    values = shape.slices * shape.tokens * shape.dim * work.x.element_size()
    _, peak, _ = tensor_bytes(call)
    kept = _kept_for_backward(work, name, module) if mode == "training" else None
    return {
        "mode": mode,
        "threads": threads,
        "slices": shape.slices,
        "tokens": shape.tokens,
        "dim": shape.dim,
        "contender": name,
        "input_bytes": values,
        "tensor_bytes": peak,
        "tensor_ratio": peak / values,
        "resident_bytes": resident_bytes(call),
        "kept_bytes": kept,
        "kept_ratio": None if kept is None else kept / values,
    }


def _kept_for_backward(work: Workload, name: str, module: nn.Module) -> int:
    """Bytes that stay between forward and backward besides input, output and weights."""
    x = contender(name, work.shape).layout.from_tokens(work.x).detach().requires_grad_()
    out, _, held = tensor_bytes(lambda: module(x))
    return held - out.untyped_storage().nbytes()


_COLUMNS = {
    "shape": "slices, N, D",
    "mode": "pass",
    "layer": "layer",
    "input_mib": "S N D values, MiB",
    "tensors": "tensors / S N D values",
    "kept": "kept for backward / S N D values",
    "resident_mib": "resident growth, MiB",
}


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The section of the report."""
    lines = [
        {
            "shape": f"{row['slices']}, {row['tokens']}, {row['dim']}",
            "mode": row["mode"],
            "layer": LAYOUTS.get(row["contender"], "timm"),
            "input_mib": row["input_bytes"] / 2**20,
            "tensors": row["tensor_ratio"],
            "kept": row["kept_ratio"],
            "resident_mib": row["resident_bytes"] and row["resident_bytes"] / 2**20,
        }
        for row in rows
    ]
    return "\n\n".join(
        [
            "## Memory",
            "The most that one call holds at once above its input and weights, float32, "
            f"{report.threads(rows[0]['threads'])}. Tensors are counted by torch's profiler: the "
            "output is 1.00 of them, in training the input's gradient another. *Kept for "
            "backward* lies between the passes besides input and output. *Resident growth* is "
            "that of the whole process, memory that C++ code takes for itself included.",
            report.markdown(lines, _COLUMNS),
        ]
    )
