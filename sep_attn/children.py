"""Which children of a layer its kernels may bypass: those whose forward is all in their parameters.

The kernels read a projection's weight and a dropout's probability, and call neither. What was
wrapped, subclassed, quantised or hooked since does something else when it is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
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


def unreadable(name: str, child: nn.Module) -> str | None:
    """Why kernels cannot read the parameters of the child of this name, which torch's own operators
    can: quantised weights are tensors of another class, and so are distributed ones."""
    for kind, parameter in child._parameters.items():
        if parameter is None:
            continue
        cls = type(parameter)
        if cls not in (nn.Parameter, Tensor) and not isinstance(
            parameter, (FakeTensor, FunctionalTensor)
        ):
            dispatch: object = getattr(cls, "__torch_dispatch__", None)
            if dispatch is not getattr(Tensor, "__torch_dispatch__", None):
                return f"the {kind} of {name} is a {qualified_name(cls)}"
        if parameter.layout != torch.strided:
            return f"the {kind} of {name} has the layout {parameter.layout}"
    return None
