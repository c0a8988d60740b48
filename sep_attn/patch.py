"""Serves the attention of timm's and Hugging Face's MobileViTv2 with this package's kernels.

A patched layer has another class, made from its own: the layer stays the same object, and its
parameters, children, hooks and ``state_dict`` are what they were. All layers of a class share that
other class, so that a compiler sees one forward, not one a layer. Weights are read when the layer
is called.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sep_attn.backends import warn
from sep_attn.children import not_plain, qualified_name, unreadable
from sep_attn.functional import separable_attention, shortest_way
from sep_attn.packed_weights import PackedWeights
from sep_attn.validation import BACKENDS, check_choice

_CONV_LAYER = "MobileViTV2ConvLayer"  # Hugging Face's wrapper of a convolution


def patch(model: nn.Module, *, backend: str = "auto") -> int:
    """Gives every MobileViTv2 attention layer in ``model`` another forward, in place.

    Served are timm's ``LinearSelfAttention`` and Hugging Face's ``MobileViTV2LinearSelfAttention``,
    with their own signature and layout ``[B, C, P, N]``; timm's ``x_prev`` follows eq. 3.

    A layer is left alone, with a warning that says why, when a subclass redefines its forward or a
    child that the kernels bypass is not the plain 1 x 1 convolution or dropout its class makes. If
    one is hooked, wrapped or replaced later, the layer's own forward runs, with a warning. A
    forward set on the instance is replaced, with a warning, until :func:`unpatch`; one that is set
    on a patched layer stays.

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
        cls: Any = type(module)
        base = _attention_class(cls)
        if base is None:
            continue
        where = f"{name or 'the model'} ({cls.__name__})"
        if reason := _redefined(cls, base) or _changed(module):
            left.append(f"{where}: {reason}")
            continue
        own_forward, packed = None, PackedWeights()
        if _is_patched(module):
            own_forward = module._sep_attn.own_forward
        elif own_forward := module.__dict__.pop("forward", None):
            warnings.warn(f"sep_attn.patch replaces the forward set on {where}", stacklevel=2)
        if not isinstance(module, _Patched):
            module.__class__ = _patched_class(cls)
        module._sep_attn = _Service(backend, own_forward, packed)
        served += 1
    if not served:
        found = sorted({type(module).__name__ for module in model.modules()})
        reasons = f"cannot serve {'; '.join(left)}" if left else f"found only {', '.join(found)}"
        raise ValueError(f"patch expected a model with {' or '.join(_PATCHED)}, but {reasons}")
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
        own_forward = module.__dict__.pop("_sep_attn").own_forward
        if own_forward is not None:
            module.__dict__.setdefault("forward", own_forward)
        if (cls := _class_before(type(module))) is not None:
            module.__class__ = cls
    return len(patched)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


_NEW = object.__reduce_ex__(object(), 2)[0]  # with which pickle makes an object without state


@dataclasses.dataclass(slots=True)
class _Service:
    """What :func:`patch` was told, and found, of a layer.

    Attributes:
        backend: as in :func:`patch`.
        own_forward: the forward that was set on the instance.
        packed: what eval keeps for the kernels.
    """

    backend: str
    own_forward: Any
    packed: PackedWeights


class _Patched(nn.Module):
    """Comes before the class of a patched layer. Under another class that some library put before
    both, it stays there without a service when the layer is unpatched."""

    _sep_attn: _Service | None = None

    def train(self, mode: bool = True) -> Any:
        if mode and self._sep_attn is not None:
            self._sep_attn.packed.release()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        if self._sep_attn is not None:
            self._sep_attn.packed.release()
        return super()._apply(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle looks for classes by name.
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        cls = _class_before(type(self))
        if cls is None or reduced[:2] != (_NEW, (type(self),)):
            return reduced
        return _new_patched, (cls,), *reduced[2:]


class _PatchedOfTimm(_Patched):
    def forward(self: Any, x: Tensor, x_prev: Tensor | None = None) -> Tensor:
        if own_forward := _step_aside(self, _changed(self)):
            return own_forward(x, x_prev)
        children = self._modules
        projections = children["qkv_proj"], children["out_proj"]
        out = _attend(self, projections, children["attn_drop"], x, x_prev)
        out_drop = children["out_drop"]
        idle = not out_drop.training and _not_plain("out_drop", out_drop, nn.Dropout) is None
        return out if idle else out_drop(out)


class _PatchedOfHuggingFace(_Patched):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if own_forward := _step_aside(self, _changed(self)):
            return own_forward(hidden_states)
        children = self._modules
        projections = children["qkv_proj"].convolution, children["out_proj"].convolution
        return _attend(self, projections, children["attn_dropout"], hidden_states, None)


# Recognised by name: neither library is imported.
_PATCHED: dict[str, type[_Patched]] = {
    "timm.models.mobilevit.LinearSelfAttention": _PatchedOfTimm,
    "transformers.models.mobilevitv2.modeling_mobilevitv2.MobileViTV2LinearSelfAttention": (
        _PatchedOfHuggingFace
    ),
}


@functools.cache
def _patched_class(cls: Any) -> Any:
    """The class of a patched layer whose own is ``cls``."""
    base = _attention_class(cls)
    assert base is not None
    bases = (_PATCHED[qualified_name(base)], cls)
    # Of the same name: some look for layers by it.
    return type(cls.__name__, bases, {"__module__": __name__, "_sep_attn_before": cls})


def _class_before(cls: Any) -> Any:
    """The class that a patched one was made from; None for any other."""
    return vars(cls).get("_sep_attn_before")


def _new_patched(cls: Any) -> Any:
    patched = _patched_class(cls)
    return patched.__new__(patched)


def _attend(
    module: Any,
    projections: tuple[Any, Any],
    dropout: nn.Dropout,
    x: Tensor,
    x_prev: Tensor | None,
) -> Tensor:
    if x.dim() != 4:
        raise ValueError(f"x has shape {list(x.shape)}, expected [B, C, P, N]")
    qkv_proj, out_proj = projections
    backend = module._sep_attn.backend
    if x_prev is None and (dropout.p == 0.0 or not dropout.training):
        parameters = qkv_proj._parameters, out_proj._parameters
        kept = None if module.training else module._sep_attn.packed
        out = shortest_way(x, *parameters, "relu", None, backend, kept)
        if out is not None:
            return out
    if reason := unreadable("qkv_proj", qkv_proj) or unreadable("out_proj", out_proj):
        own_forward = _step_aside(module, reason)
        return own_forward(x) if x_prev is None else own_forward(x, x_prev)
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


def _is_patched(module: nn.Module) -> bool:
    return isinstance(module, _Patched) and "_sep_attn" in module.__dict__


def _step_aside(module: nn.Module, reason: str | None) -> Any:
    """The forward of before patching, for a layer that was changed since, or that is no longer
    patched: who wrapped its forward meanwhile still calls this one. None for any other."""
    service = getattr(module, "_sep_attn", None)
    if service is not None:
        if reason is None:
            return None
        message = f"sep_attn cannot serve this {type(module).__name__}: {reason}"
        if service.backend != "auto":
            raise RuntimeError(f'{message}; undo that, or patch with backend="auto"')
        if not torch.compiler.is_compiling():
            warn(f"{message}; its own forward runs")
        if service.own_forward is not None:
            return service.own_forward
    if isinstance(module, _Patched):
        return super(_Patched, module).forward
    return functools.partial(type(module).forward, module)


def _attention_class(cls: type) -> type | None:
    return next((c for c in cls.__mro__ if qualified_name(c) in _PATCHED), None)


def _redefined(cls: type, base: type) -> str | None:
    """Names what a subclass changed of the meaning of its attention class."""
    for subclass in cls.__mro__[: cls.__mro__.index(base)]:
        if issubclass(subclass, _Patched):
            continue
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
