"""Which children of a layer its kernels may bypass: those whose forward is all in their parameters.

The kernels read a projection's weight and a dropout's probability, and call neither. What was
wrapped, subclassed, quantised or hooked since does something else when it is called.
"""

from __future__ import annotations

from typing import Any

from torch.nn.utils.parametrize import type_before_parametrizations


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def not_plain(name: str, child: Any, kind: type) -> str | None:
    """Why the child of this name must be called; None where it is a plain ``kind``, perhaps
    parametrised."""
    if type(child) is not kind and type_before_parametrizations(child) is not kind:
        return f"{name} is a {qualified_name(type(child))}, expected {qualified_name(kind)}"
    state = child.__dict__
    if "forward" in state:
        return f"{name} has a forward of its own"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return f"{name} has hooks, which would not run"
    return None
