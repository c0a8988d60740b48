"""Launches of Triton kernels, compiled for an NVIDIA GPU and run by :class:`.machine.Machine`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

from benchmarks.machine_code import TARGET, TARGETS, bind, compile_launch, forget_plans
from sep_attn import triton_kernels
from sep_attn.triton_kernels import attention

from .assembly import Assembly, parse
from .machine import Machine
from .memory import GlobalMemory


@dataclasses.dataclass(frozen=True)
class Ran:
    """A launch that was run: its kernel, its programs, and the instructions that they took."""

    kernel: str
    grid: tuple[int, int, int]
    instructions: int


def _flat(value: Any, kind: Any) -> Iterator[tuple[Any, str]]:
    """Of an argument what is not compiled into the kernel; tuples in pieces."""
    if isinstance(kind, tuple):
        for one, of in zip(value, kind, strict=True):
            yield from _flat(one, of)
    elif kind != "constexpr":
        yield value, kind


def _bits(value: Any, kind: str) -> Any:
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"the machine runs on tensors of the CPU, not of {value.device}")
        return np.uint64(value.data_ptr())
    if kind == "fp32":
        return np.uint32(struct.unpack("I", struct.pack("f", value))[0])
    if kind == "fp64":
        return np.uint64(struct.unpack("Q", struct.pack("d", value))[0])
    size, word = (64, np.uint64) if kind.endswith("64") else (32, np.uint32)
    return word(int(value) % 2**size)


def run_programs(
    assembly: Assembly,
    given: Sequence[tuple[str, Any, str]],
    grid: Sequence[int],
    shared_bytes: int,
) -> Ran:
    """Runs a launch; ``given`` are names, values and Triton's types of a kernel's arguments."""
    # After these come pointers to scratch memory, of which the kernels ask for none.
    words = [*(_bits(value, kind) for _, value, kind in given), np.uint64(0), np.uint64(0)]
    parameters = dict(zip(assembly.parameters, words, strict=True))
    tensors = {name: value for name, value, _ in given if isinstance(value, Tensor)}
    machine = Machine(assembly, parameters, GlobalMemory(tensors), shared_bytes)
    sizes = (*grid, 1, 1)[:3]
    programs = [program[::-1] for program in itertools.product(*map(range, sizes[::-1]))]
    with np.errstate(all="ignore"):
        for index, program in enumerate(programs):
            machine.run(program, sizes, index)
    return Ran(assembly.name, sizes, machine.executed)


@contextlib.contextmanager
def running() -> Iterator[list[Ran]]:
    """Runs what is launched inside it on tensors in the CPU's memory, and lists it. The Triton
    backend then serves such tensors. Needs ``TRITON_INTERPRET`` unset.

    Raises:
        Fault: see :mod:`ptx`.
        RuntimeError: Triton's interpreter is to run the kernels.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is set: Triton would compile nothing; unset it")
    target = TARGETS[TARGET]
    backend = make_backend(target)
    compiled: dict[Any, Any] = {}
    ran: list[Ran] = []

    def run(kernel: JITFunction, *args: Any, grid: Sequence[int], warmup: bool, **kw: Any) -> None:
        arguments, launch = bind(kernel, backend, grid, *args, **kw)
        key = launch, str(launch.options)
        if key not in compiled:
            made = compile_launch(launch, target)
            compiled[key] = parse(made.asm["ptx"]), made.metadata.shared
        assembly, shared_bytes = compiled[key]
        given = [
            (name, value, kind)
            for name, whole in arguments.items()
            for value, kind in _flat(whole, launch.signature[name])
        ]
        ran.append(run_programs(assembly, given, grid, shared_bytes))

    forget_plans()
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(attention, "architecture", lambda _: TARGET),
        mock.patch.object(triton_kernels, "unavailable_reason", lambda _: None),
    ):
        try:
            yield ran
        finally:
            forget_plans()
