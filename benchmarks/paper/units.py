"""The attention units of the paper, and what each has to give, in float64 and step by step.

Every unit takes ``[B, N, D]``, but timm's ``LinearSelfAttention``, which takes ``[B, D, P, N]``.
"""

from __future__ import annotations

import copy

import torch
from linformer import LinformerSelfAttention
from torch import Tensor, nn

from benchmarks import models
from benchmarks.registry import LiteralSeparableAttention
from sep_attn import SeparableAttention, convert, reference

PROJECTED_TOKENS = 256  # p, in the paper's comparison


def is_attention(module: nn.Module) -> bool:
    """Whether it is a unit that this file knows."""
    return isinstance(module, (LinformerSelfAttention, *_SEPARABLE)) or _class(module) in (
        "Attention",
        "LinearSelfAttention",
    )


class TimmLiteralSeparableAttention(LiteralSeparableAttention):
    """Equation 3 in plain PyTorch, with the call of timm's ``Attention``; no masks."""

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("expected no attn_mask and is_causal=False: this layer has no masks")
        return super().forward(x)


_SEPARABLE = (LiteralSeparableAttention, SeparableAttention)


def _class(module: nn.Module) -> str:
    return type(module).__name__


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of a model by name, first to last."""
    return {name: module for name, module in model.named_modules() if is_attention(module)}


def expected_output(layer: nn.Module, x: Tensor) -> Tensor:
    """What a unit has to give, from its weights, without its code.

    Args:
        layer: a unit in float64.
        x: its input in float64.

    Raises:
        TypeError: ``layer`` is none of the units.
    """
    if isinstance(layer, LinformerSelfAttention):
        keys = layer.proj_k[: x.shape[1]].T @ layer.to_k(x)  # [B, p, D]
        values = layer.proj_v[: x.shape[1]].T @ layer.to_v(x)
        return layer.to_out(_attend(layer.to_q(x), keys, values, layer.heads))
    if _class(layer) == "Attention":
        return layer.proj(_attend(*layer.qkv(x).chunk(3, dim=-1), layer.num_heads))
    if isinstance(layer, _SEPARABLE) or _class(layer) == "LinearSelfAttention":
        return reference.separable_attention(
            x,
            layer.qkv_proj.weight.flatten(1),
            layer.qkv_proj.bias,
            layer.out_proj.weight.flatten(1),
            layer.out_proj.bias,
        )
    raise TypeError(f"{_class(layer)} is no attention unit of the paper")


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention, one head after the other."""
    attended = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (queries, keys, values)), strict=True):
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        attended.append(scores.softmax(-1) @ v)
    return torch.cat(attended, dim=-1)


class Oracle(nn.Module):
    """Gives :func:`expected_output` in the place of a unit."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        return expected_output(self.layer, x)


def replace(model: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """Puts modules in the place of others, by name; returns the model."""
    for name, module in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return model


def oracle(model: nn.Module) -> nn.Module:
    """A float64 copy of a model whose attention layers are :class:`Oracle`."""
    double = copy.deepcopy(model).double()
    layers = attention_layers(double)
    return replace(double, {name: Oracle(layer) for name, layer in layers.items()})


def with_linformer(model: nn.Module, tokens: dict[str, int]) -> nn.Module:
    """A copy of MobileViT with Linformer's attention, p = 256, as many heads as before.

    Args:
        model: timm's MobileViT with multi-head attention.
        tokens: N of each attention layer, to which Linformer's projections are bound.
    """
    made = {}
    for name, layer in attention_layers(model).items():
        dim = layer.qkv.in_features
        made[name] = LinformerSelfAttention(
            dim, tokens[name], k=PROJECTED_TOKENS, heads=layer.num_heads
        )
    return replace(copy.deepcopy(model), made).eval()


def with_separable(model: nn.Module) -> nn.Module:
    """A copy of MobileViT with this package's separable attention, freshly initialised."""
    converted = copy.deepcopy(model)
    convert(converted, init="fresh")
    return converted.eval()


def with_literal_separable(separable: nn.Module) -> nn.Module:
    """A copy of what :func:`with_separable` gave in plain PyTorch, with the same weights."""
    made = {}
    for name, layer in attention_layers(separable).items():
        made[name] = TimmLiteralSeparableAttention(layer.out_proj.out_features)
        made[name].load_state_dict(layer.state_dict())
    return replace(copy.deepcopy(separable), made).eval()


def timm_mobilevit(name: str = "mobilevit_s") -> nn.Module:
    """timm's first MobileViT in eval mode with random weights."""
    return models.timm_mobilevitv2(name)  # timm builds either by its name
