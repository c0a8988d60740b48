"""``python -m sep_attn``: what this machine has, and which backend serves which device."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from sep_attn import __version__, native
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


if __name__ == "__main__":
    main()
