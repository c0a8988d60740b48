"""Fixtures: poisoned allocations, the device under test, the backends that serve it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "run the Triton kernels as compiled for sm_90 (tests/ptx), not in Triton's interpreter"
    parser.addoption("--ptx", action="store_true", help=help)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "compiled: too long for Triton's interpreter")
    torch.set_num_threads(2)
    # float32 is compared as such. PyTorch leaves TF32 to cuDNN's convolutions unless told.
    torch.backends.cudnn.allow_tf32 = False
    if config.getoption("ptx"):
        os.environ.pop("TRITON_INTERPRET", None)
    elif not HAS_GPU:
        # Triton reads this when it is imported: its kernels then run on CPU tensors.
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
        elif item.get_closest_marker("compiled") and not config.getoption("ptx"):
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine, nor --ptx"))


@pytest.fixture(autouse=True)
def compiled_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``--ptx``, what Triton's compiler makes of the kernels."""
    if not request.config.getoption("ptx"):
        yield
        return
    from ptx import running

    with running():
        yield


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    on_gpu = HAS_GPU and not request.config.getoption("ptx")
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture(autouse=True)
def nan_in_uninitialized_memory() -> Iterator[None]:
    """torch.empty gives NaN, and so do the native results: one left unwritten by a kernel shows."""
    from sep_attn import native

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if native.unavailable_reason() is None:
        native.poison_results(True)
    yield
    torch.use_deterministic_algorithms(False)
    if native.unavailable_reason() is None:
        native.poison_results(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
