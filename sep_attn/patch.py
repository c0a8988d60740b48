"""Serves the attention of timm's and Hugging Face's MobileViTv2 with this package's kernels.

Only methods of each attention *instance* are rebound: ``forward``, and ``train`` and ``_apply``,
which also release the weights that were packed for the kernels. Modules, parameters, hooks and
``state_dict`` stay as they are, and weights are read when the layer is called.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sep_attn.backends import warn
from sep_attn.children import not_plain, qualified_name
from sep_attn.functional import separable_attention, shortest_way
from sep_attn.packed_weights import PackedWeights
from sep_attn.validation import BACKENDS, check_choice

_CONV_LAYER = "MobileViTV2ConvLayer"  # Hugging Face's wrapper of a convolution


def patch(model: nn.Module, *, backend: str = "auto") -> int:
    """Rebinds the forward of every MobileViTv2 attention layer in ``model``, in place.

    Served are timm's ``LinearSelfAttention`` and Hugging Face's ``MobileViTV2LinearSelfAttention``,
    with their own signature and layout ``[B, C, P, N]``; timm's ``x_prev`` follows eq. 3.

    A layer is left alone, with a warning that says why, when a subclass redefines its forward or a
    child that the kernels bypass is not the plain 1 x 1 convolution or dropout its class makes. If
    one is hooked, wrapped or replaced later, the layer's own forward runs, with a warning. A
    forward set on the instance is replaced, with a warning, until :func:`unpatch`. ``train`` and
    ``_apply`` of the layer are bound too, to release what eval keeps for the kernels; where the
    instance has its own, that stays.

    Args:
        model: any module. Patching again is harmless, and may change the backend.
        backend: as in :func:`sep_attn.functional.separable_attention`.

    Returns:
        How many layers are served now, those of an earlier call among them.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: no layer of ``model`` can be served, or ``backend`` is unknown.
    """
    _check_model(model)
    check_choice("backend", backend, BACKENDS)
    served, left = 0, []
    for name, module in model.named_modules():
        base = _attention_class(module)
        if base is None:
            continue
        where = f"{name or 'the model'} ({type(module).__name__})"
        if reason := _redefined(type(module), base) or _changed(module):
            left.append(f"{where}: {reason}")
            continue
        own_forward = module.__dict__.get("forward")
        if _is_patched(module):
            own_forward = own_forward.args[1]
        elif own_forward is not None:
            warnings.warn(f"sep_attn.patch replaces the forward set on {where}", stacklevel=2)
        forward, packed = _FORWARDS[qualified_name(base)], PackedWeights()
        module.forward = functools.partial(forward, module, own_forward, backend, packed)
        for method, release in _RELEASING.items():
            if method not in module.__dict__ or _is_releasing(module, method):
                setattr(module, method, functools.partial(release, module, packed))
        served += 1
    if not served:
        found = sorted({type(module).__name__ for module in model.modules()})
        reasons = f"cannot serve {'; '.join(left)}" if left else f"found only {', '.join(found)}"
        raise ValueError(f"patch expected a model with {' or '.join(_FORWARDS)}, but {reasons}")
    if left:
        warnings.warn(f"sep_attn.patch leaves alone {'; '.join(left)}", stacklevel=2)
    return served


def unpatch(model: nn.Module) -> int:
    """Gives every patched layer of ``model`` the forward it had before.

    Returns:
        How many layers were restored; 0 when none was patched.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    _check_model(model)
    patched = [module for module in model.modules() if _is_patched(module)]
    for module in patched:
        own_forward = module.forward.args[1]
        del module.forward
        if own_forward is not None:
            module.forward = own_forward
        for method in _RELEASING:
            if _is_releasing(module, method):
                delattr(module, method)
    return len(patched)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


# The new methods are module-level functions bound by functools.partial, which survive pickle and
# deepcopy; a bound method would come back as that of the class.


def _timm_forward(
    module: Any,
    own_forward: Any,
    backend: str,
    packed: PackedWeights,
    x: Tensor,
    x_prev: Tensor | None = None,
) -> Tensor:
    if reason := _changed(module):
        return _step_aside(module, own_forward, backend, reason)(x, x_prev)
    children = module._modules
    projections = children["qkv_proj"], children["out_proj"]
    out = _attend(module, projections, children["attn_drop"], x, x_prev, backend, packed)
    out_drop = children["out_drop"]
    idle = not out_drop.training and _not_plain("out_drop", out_drop, nn.Dropout) is None
    return out if idle else out_drop(out)


def _hugging_face_forward(
    module: Any, own_forward: Any, backend: str, packed: PackedWeights, hidden_states: Tensor
) -> Tensor:
    if reason := _changed(module):
        return _step_aside(module, own_forward, backend, reason)(hidden_states)
    children = module._modules
    qkv_proj, out_proj = children["qkv_proj"].convolution, children["out_proj"].convolution
    dropout = children["attn_dropout"]
    return _attend(module, (qkv_proj, out_proj), dropout, hidden_states, None, backend, packed)


# Recognised by name: neither library is imported.
_FORWARDS: dict[str, Callable[..., Tensor]] = {
    "timm.models.mobilevit.LinearSelfAttention": _timm_forward,
    "transformers.models.mobilevitv2.modeling_mobilevitv2.MobileViTV2LinearSelfAttention": (
        _hugging_face_forward
    ),
}


def _train(module: nn.Module, packed: PackedWeights, mode: bool = True) -> nn.Module:
    if mode:
        packed.release()
    return type(module).train(module, mode)


def _apply(module: nn.Module, packed: PackedWeights, *args: Any, **kwargs: Any) -> nn.Module:
    packed.release()
    return type(module)._apply(module, *args, **kwargs)


_RELEASING: dict[str, Callable[..., nn.Module]] = {"train": _train, "_apply": _apply}


def _attend(
    module: nn.Module,
    projections: tuple[Any, Any],
    dropout: nn.Dropout,
    x: Tensor,
    x_prev: Tensor | None,
    backend: str,
    packed: PackedWeights,
) -> Tensor:
    if x.dim() != 4:
        raise ValueError(f"x has shape {list(x.shape)}, expected [B, C, P, N]")
    qkv_proj, out_proj = projections
    if x_prev is None and (dropout.p == 0.0 or not dropout.training):
        parameters = qkv_proj._parameters, out_proj._parameters
        kept = None if module.training else packed
        out = shortest_way(x, *parameters, "relu", None, backend, kept)
        if out is not None:
            return out
    return separable_attention(
        x,
        qkv_proj.weight.flatten(1),  # [1 + 2 D, D, 1, 1] -> [1 + 2 D, D]
        qkv_proj.bias,
        out_proj.weight.flatten(1),
        out_proj.bias,
        x_prev=x_prev,
        dropout_p=dropout.p if dropout.training else 0.0,
        backend=backend,
    )


def _step_aside(module: nn.Module, own_forward: Any, backend: str, reason: str) -> Any:
    """The forward of before patching, for a layer that was changed since."""
    message = f"sep_attn cannot serve this {type(module).__name__}: {reason}"
    if backend != "auto":
        raise RuntimeError(f'{message}; undo that, or patch with backend="auto"')
    if not torch.compiler.is_compiling():
        warn(f"{message}; its own forward runs")
    return own_forward or functools.partial(type(module).forward, module)


def _is_patched(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func in _FORWARDS.values()


def _is_releasing(module: nn.Module, method: str) -> bool:
    bound = module.__dict__.get(method)
    return isinstance(bound, functools.partial) and bound.func is _RELEASING[method]


def _attention_class(module: nn.Module) -> type | None:
    return next((c for c in type(module).__mro__ if qualified_name(c) in _FORWARDS), None)


def _redefined(cls: type, base: type) -> str | None:
    """Names what a subclass changed of the meaning of its attention class."""
    for subclass in cls.__mro__[: cls.__mro__.index(base)]:
        for name in vars(subclass):
            if name == "__call__" or ("forward" in name and name in vars(base)):
                return f"{qualified_name(subclass)} redefines {name}"
    return None


def _changed(module: Any) -> str | None:
    """Names the first child that the kernels must not bypass; None when all are plain."""
    children = module._modules
    dropout = "attn_drop" if "attn_drop" in children else "attn_dropout"
    for name, kind in (("qkv_proj", nn.Conv2d), ("out_proj", nn.Conv2d), (dropout, nn.Dropout)):
        child = children.get(name)
        if child is None:
            return f"it has no child {name}"
        if type(child).__name__ == _CONV_LAYER:
            if child.normalization is not None or child.activation is not None:
                return f"{name} does more than a convolution"
            if reason := _not_plain(name, child, type(child)):
                return reason
            child = child._modules["convolution"]
        if reason := _not_plain(name, child, kind):
            return reason
    return None


def _not_plain(name: str, child: Any, kind: type) -> str | None:
    if reason := not_plain(name, child, kind):
        return reason
    if kind is nn.Conv2d:
        geometry = (child.kernel_size, child.stride, child.padding, child.groups)
        if geometry != ((1, 1), (1, 1), (0, 0), 1):
            return f"{name} is no plain 1 x 1 convolution"
    if kind is nn.Dropout and child.p == 1.0:
        return f"{name} drops everything"
    return None
