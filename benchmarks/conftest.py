"""Puts the machine, the versions and the commit into pytest-benchmark's result files."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import environment


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.update(environment.describe("cuda" if torch.cuda.is_available() else "cpu"))
