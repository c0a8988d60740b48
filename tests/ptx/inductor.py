"""Programs of ``torch.compile``, their kernels compiled and run by :class:`.machine.Machine`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from inductor_kernels import WrittenKernel
from torch._inductor.async_compile import AsyncCompile

from .assembly import parse
from .launch import Ran, run_programs


class _Kernel(WrittenKernel):
    """What a program has in a kernel's place."""

    ran: list[Ran]

    def run(self, *arguments: Any, stream: Any) -> None:
        if self.is_ours:
            *arguments, x, y, z = arguments
            grid = (x, y, z)
        else:
            sizes = dict(zip(self.passed, arguments, strict=True))
            grid = (-(-int(sizes["xnumel"]) // self.constants["XBLOCK"]), 1, 1)
        given = []
        for name, value in zip(self.passed, arguments, strict=True):
            kind = self.signature[name]
            if kind != "constexpr":
                given.append((name, value, kind))
            elif self.constants.get(name) is not None and self.constants[name] != value:
                raise AssertionError(f"{name} was compiled as {self.constants[name]}, not {value}")
        assembly = parse(self.compiled.asm["ptx"])
        shared_bytes = self.compiled.metadata.shared
        self.ran.append(run_programs(assembly, given, grid, shared_bytes))


@contextlib.contextmanager
def running_programs() -> Iterator[tuple[list[_Kernel], list[Ran]]]:
    """Runs the kernels of programs that Inductor writes inside it; lists the kernels and what ran.
    Inductor must be told to write Triton (``inductor_trace.as_on_a_gpu``)."""
    kernels: list[_Kernel] = []
    ran: list[Ran] = []

    def keep(self: AsyncCompile, name: str, source: str, device_str: str) -> _Kernel:
        kernel = _Kernel(name, source)
        kernel.ran = ran
        kernels.append(kernel)
        return kernel

    with mock.patch.object(AsyncCompile, "triton", keep):
        yield kernels, ran
