"""Launches as nodes of a graph: what ``torch.compile`` sees of the kernels.

While a program is traced, a launch becomes a ``triton_kernel_wrapper`` node, as
``torch.library.triton_op`` and ``wrap_triton`` make them. Inductor, which turns the nodes into
launches again, takes no tuples among a kernel's arguments, and compiles an int that is always 1
into the kernel, whatever ``do_not_specialize`` says. So a node holds the kernel in another form, a
few lines around the same kernel, made here: strides come one by one, and numbers shifted as
:mod:`sep_attn.triton_kernels.launch` shifts strides, so that none of them is 1.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import linecache
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bits by which numbers are shifted.
SHIFT = 4


class _State(threading.local):
    active = False


_state = _State()


def is_active() -> bool:
    """Whether this thread traces a program."""
    return _state.active


@contextlib.contextmanager
def active() -> Iterator[None]:
    """Inside it launches are traced."""
    before, _state.active = is_active(), True
    try:
        yield
    finally:
        _state.active = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    tensors: Mapping[str, Tensor | None],
) -> None:
    """Puts a launch into the traced graph: a kernel, its grid, everything it is told but its
    tensors, and these, by its names."""
    passed: dict[str, Any] = dict(tensors)
    changed: dict[str, int | str] = {}
    for name, value in arguments.items():
        if name == "maxnreg":
            continue  # Inductor takes it for one of the kernel's own arguments
        if isinstance(value, tuple) and name.endswith("strides"):
            passed |= {f"{name}_{axis}": stride for axis, stride in enumerate(value)}
            changed[name] = len(value)
        elif name in _varying(kernel) and value is not None:
            passed[name] = value * 2**SHIFT
            changed[name] = "shifted"
        else:
            passed[name] = value
            if isinstance(value, float):
                changed[name] = "float"
    form = in_scalars(kernel, tuple(changed.items()))
    torch.library.wrap_triton(form)[grid](**passed)


def _varying(kernel: Any) -> tuple[str, ...]:
    """What is not to be compiled anew for a value; the interpreter's kernels keep it elsewhere."""
    found = getattr(kernel, "do_not_specialize", None)
    return kernel.kwargs.get("do_not_specialize", ()) if found is None else found


@functools.cache
def in_scalars(kernel: Any, changed: tuple[tuple[str, int | str], ...]) -> Any:
    """The kernel with arguments passed otherwise: a tuple as that many scalars, ``name_0``,
    ``name_1``, ...; a number ``"shifted"``; or a ``"float"`` in the precision that Inductor
    likes."""
    how = dict(changed)
    parameters, passed = [], []
    for name, parameter in inspect.signature(kernel.fn).parameters.items():
        form = how.get(name)
        if isinstance(form, int):
            parts = [f"{name}_{axis}" for axis in range(form)]
            parameters += parts
            passed.append(f"({', '.join(parts)})")
            continue
        constexpr = "constexpr" in str(parameter.annotation)
        parameters.append(f"{name}: tl.constexpr" if constexpr else name)
        if form == "float":
            passed.append(f"tl.cast({name}, tl.float32)")
        elif form == "shifted":
            # A stride may need 64 bits.
            wide = name.endswith("stride")
            passed.append(f"{name} >> {SHIFT}" if wide else f"tl.cast({name} >> {SHIFT}, tl.int32)")
        else:
            passed.append(name)
    own_name = kernel.fn.__name__
    return _jit(
        f"{own_name}_in_scalars",
        [f"    {own_name}(", *(f"        {value}," for value in passed), "    )"],
        parameters,
        {own_name: kernel},
    )


def _jit(name: str, body: list[str], parameters: list[str], namespace: dict[str, Any]) -> Any:
    signature = [f"def {name}(", *(f"    {parameter}," for parameter in parameters), "):"]
    source = "\n".join([*signature, *body]) + "\n"
    # Triton and Inductor read a kernel's source: this is where Python looks for it.
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    file = f"<{__name__} {name} {digest}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    namespace = {"tl": tl, "__name__": __name__, **namespace}
    exec(compile(source, file, "exec"), namespace)
    return triton.jit(namespace[name])


@functools.cache
def fingerprint() -> Any:
    """A kernel that does nothing, and whose source changes with any file of this package."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return _jit("fingerprint", [f"    # {digest.hexdigest()}", "    pass"], [], {})
