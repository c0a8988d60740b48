"""How a separable layer begins that takes the place of a trained multi-head one.

The two are different functions, so a start is a choice of what to keep. ``v_n = W_V x_n + b_V`` and
``W_O``, ``b_O`` are the multi-head layer's; its heads need no merging, both projections hold them one
after the other. ``p`` is the softmax over the tokens, uniform or, where a row says so, that of the mean
query: the scores ``q_mean . k_m / sqrt(head dim)``, averaged over the heads, with ``b_Q`` for ``q_mean``
(the mean of ``W_Q x_n + b_Q`` for tokens of mean zero). Where queries or keys are normalised, or there
is no ``b_Q``, that is uniform too.

==================== =========================================================================
``constant_context`` ``out_n = W_O act(v_n) + b_O``: the context is 1 through its bias alone
``near_constant``    ``out_n = W_O (act(v_n) * (1 + mean_m(k_m) / 10)) + b_O``, k the old keys
``mean_query``       the same, with p of the mean query
``pooled_values``    ``out_n = W_O sum_m p_m v_m + b_O``, p of the mean query: the old layer, were
                     every query the mean query. The gate is 1, the values are in the context
``own_and_mean``     ``out_n = W_O (v_n + mean_m(v_m)) / 2 + b_O``, but for a term of second order
==================== =========================================================================

``own_and_mean`` has a sum out of a product: per channel ``(g + v_n / 2g) (g + mean(v) / 2g) = g^2 +
(v_n + mean(v)) / 2 + v_n mean(v) / 4g^2``. ``g^2`` is a constant, which ``b_O`` takes off, and
four times the size of ``v`` that ``W_V`` and ``b_V`` would give for tokens of variance 1 (they come from
a LayerNorm), so that the gate stays positive, where relu is linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sep_attn.layout import accumulate_dtype
from sep_attn.module import SeparableAttention

FROM_MHA = "from_mha"
FRESH = "fresh"
# Chosen on scikit-learn's digits: benchmarks/convert_init.py
CHOSEN = "own_and_mean"


@dataclass(frozen=True)
class MultiHeadWeights:
    """The projections of a multi-head layer: weights ``[D, D]`` in ``nn.Linear`` order, biases ``[D]``.

    ``normalized`` says whether queries or keys pass a norm before their product.
    """

    query_weight: Tensor
    query_bias: Tensor | None
    key_weight: Tensor
    key_bias: Tensor | None
    value_weight: Tensor
    value_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    num_heads: int
    normalized: bool = False

    def accumulation(self) -> MultiHeadWeights:
        """In float32 at least, every bias a tensor."""
        tensors = {}
        for name in ("query", "key", "value", "out"):
            weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
            dtype = accumulate_dtype(weight.dtype)
            if bias is None:
                bias = weight.new_zeros(weight.shape[0])
            tensors[f"{name}_weight"] = weight.detach().to(dtype)
            tensors[f"{name}_bias"] = bias.detach().to(dtype)
        return MultiHeadWeights(**tensors, num_heads=self.num_heads, normalized=self.normalized)


@dataclass(frozen=True)
class _Start:
    """What a separable layer's projections are set to; the score's weight is ``[D]``."""

    score: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


def _mean_query_scores(old: MultiHeadWeights) -> Tensor:
    """``w_I`` of the scores ``q_mean . k_m``; ``b_I`` drops out of the softmax."""
    if old.normalized:
        return torch.zeros_like(old.query_bias)
    head_dim = old.query_bias.shape[0] // old.num_heads
    return old.query_bias @ old.key_weight / (head_dim**0.5 * old.num_heads)


def _with_values(old: MultiHeadWeights, score: Tensor, key_scale: float) -> _Start:
    return _Start(
        score=score,
        key_weight=key_scale * old.key_weight,
        key_bias=torch.ones_like(old.key_bias) + key_scale * old.key_bias,
        value_weight=old.value_weight,
        value_bias=old.value_bias,
        out_weight=old.out_weight,
        out_bias=old.out_bias,
    )


def _constant_context(old: MultiHeadWeights) -> _Start:
    return _with_values(old, torch.zeros_like(old.query_bias), 0.0)


def _near_constant(old: MultiHeadWeights) -> _Start:
    return _with_values(old, torch.zeros_like(old.query_bias), 0.1)


def _mean_query(old: MultiHeadWeights) -> _Start:
    return _with_values(old, _mean_query_scores(old), 0.1)


def _pooled_values(old: MultiHeadWeights) -> _Start:
    return _Start(
        score=_mean_query_scores(old),
        key_weight=old.value_weight,
        key_bias=old.value_bias,
        value_weight=torch.zeros_like(old.value_weight),
        value_bias=torch.ones_like(old.value_bias),
        out_weight=old.out_weight,
        out_bias=old.out_bias,
    )


def _own_and_mean(old: MultiHeadWeights) -> _Start:
    size = (old.value_weight.square().sum(1) + old.value_bias.square()).sqrt()
    size = size.maximum(0.1 * size.mean()).clamp(min=1e-3)  # no channel is divided by nothing
    root = (4.0 * size).sqrt()  # g
    weight = old.value_weight / (2.0 * root[:, None])
    bias = root + old.value_bias / (2.0 * root)
    return _Start(
        score=torch.zeros_like(old.query_bias),
        key_weight=weight,
        key_bias=bias,
        value_weight=weight,
        value_bias=bias,
        out_weight=old.out_weight,
        out_bias=old.out_bias - old.out_weight @ root.square(),
    )


STARTS: dict[str, Callable[[MultiHeadWeights], _Start]] = {
    "constant_context": _constant_context,
    "near_constant": _near_constant,
    "mean_query": _mean_query,
    "pooled_values": _pooled_values,
    "own_and_mean": _own_and_mean,
}
INITS = (FROM_MHA, FRESH, *STARTS)


@torch.no_grad()
def initialize(layer: SeparableAttention, old: MultiHeadWeights, init: str) -> None:
    """Sets the parameters of ``layer``, which has biases, by the start that ``init`` names.

    Args:
        layer: of ``old``'s D; its parameters may be uninitialised, or on ``meta``.
        old: the multi-head layer's projections.
        init: one of :data:`INITS`. ``"fresh"`` is ``nn.Linear``'s own, for training from scratch.
    """
    if init == FRESH:
        layer.qkv_proj.reset_parameters()
        layer.out_proj.reset_parameters()
        return
    start = STARTS[CHOSEN if init == FROM_MHA else init](old.accumulation())
    weight = torch.cat([start.score[None], start.key_weight, start.value_weight])
    bias = torch.cat([start.score.new_zeros(1), start.key_bias, start.value_bias])
    layer.qkv_proj.weight.copy_(weight)
    layer.qkv_proj.bias.copy_(bias)
    layer.out_proj.weight.copy_(start.out_weight)
    layer.out_proj.bias.copy_(start.out_bias)
