"""The machine, the versions and the commit behind a figure: the header of every result file."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Everything a reader needs to repeat a measurement made on ``device``.

    Args:
        device: where the timed work ran; a GPU is named only when the work ran on it.

    Returns:
        A flat dictionary of strings, numbers and ``None``, ready for JSON.
    """
    device = torch.device(device)
    commit, dirty = _commit()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "cpu_capability": _cpu_capability(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "transformers": _version("transformers"),
        "sep_attn": _version("sep_attn"),
    }


def usable_cores() -> int:
    """The processor cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_line(environment: dict[str, Any]) -> str:
    """One line that names the hardware and the torch behind a figure, for captions."""
    where = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    return f"{where}, torch {environment['torch']}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_capability() -> str | None:
    """The instruction set the native kernels run with; None where they are not built."""
    try:
        from sep_attn import native
    except ImportError:
        return None
    return native.capability() if native.unavailable_reason() is None else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "sep_attn":  # imported from the tree, not installed
            import sep_attn

            return getattr(sep_attn, "__version__", None)
        return None


def _commit() -> tuple[str | None, bool | None]:
    """The commit of this tree and whether files differ from it; (None, None) outside git."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        # A tree copied to another machine without its history can still say where it came from.
        return os.environ.get("SEP_ATTN_COMMIT"), None
    return commit, bool(changed)


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()
