"""``python -m sep_attn``: what this machine has, and which backend serves which device."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from sep_attn import __version__, native, triton_kernels
from sep_attn.backends import unavailable_reason


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        devices += [
            torch.device(accelerator.type, index)
            for index in range(torch.accelerator.device_count())
        ]
    return devices


def _missing() -> list[str]:
    """What this installation lacks, and how to get it."""
    missing = []
    if reason := native.unavailable_reason():
        missing.append(
            f"CPU kernels: {reason}. Until then CPU tensors are computed in plain PyTorch"
        )
    if reason := triton_kernels.unavailable_reason(torch.device("cuda")):
        missing.append(
            f'GPU kernels: {reason} (on Linux: pip install "sep_attn[triton]"). '
            "Until then GPU tensors are computed in plain PyTorch"
        )
    return missing


def main() -> None:
    print(f"sep_attn {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, triton {_version('triton')}")
    reason = native.unavailable_reason()
    if reason is None:
        print(
            f"CPU instruction set: {native.capability()} "
            f"(this machine has {', '.join(native.capabilities())}; "
            "SEP_ATTN_CPU_CAPABILITY picks another)"
        )
    for device in _devices():
        print(f"{device}:")
        for backend in ("native", "triton", "reference"):
            reason = unavailable_reason(backend, device, torch.float32)
            print(f"  {backend:<10} {'yes' if reason is None else 'no: ' + reason}")
    for line in _missing():
        print(f"missing: {line}")


if __name__ == "__main__":
    main()
