"""How a separable layer begins that takes the place of a trained multi-head one.

The two are different functions, so a start is a choice of what to keep. ``W_V``, ``b_V``, ``W_O``,
``b_O`` and ``k_m = W_K x_m + b_K`` are the multi-head layer's; its heads need no merging, the
projections hold them one after the other. ``v_n = W_V x_n + b_V``, and ``p`` is the softmax over
the tokens of scores whose weights are drawn as in ``nn.Linear``, unless the row says otherwise.

==================== =========================================================================
``old_keys``         ``out_n = W_O (act(v_n) * sum_m p_m k_m) + b_O``: all weights but the queries'
``old_keys_small``   the same with ``W_O / 10``: the blocks begin nearly without attention
``fresh_context``    the same with ``W_O``, and keys drawn as in ``nn.Linear`` too
``constant_context`` ``out_n = W_O act(v_n) + b_O``: the context is 1 through its bias alone
``pooled_values``    ``out_n = W_O sum_m p_m v_m + b_O`` with p of the mean query: the old layer,
                     were every query the mean query. The gate is 1, the context has the values
``own_and_mean``     ``out_n = W_O (v_n + mean_m(v_m)) / 2 + b_O``, but for a second-order term
==================== =========================================================================

The mean query's scores are ``b_Q . k_m / sqrt(head dim)``, averaged over the heads: ``b_Q`` is the
mean of ``W_Q x_n + b_Q`` for tokens of mean zero. Where queries or keys are normalised, or there is
no ``b_Q``, they are zero.

``own_and_mean`` has a sum out of a product: per channel ``(g + v_n / 2g) (g + mean(v) / 2g) = g^2 +
(v_n + mean(v)) / 2 + v_n mean(v) / 4g^2``. ``g^2`` is a constant, which ``b_O`` takes off, and four
times the size of ``v`` that ``W_V`` and ``b_V`` would give for tokens of variance 1 (they come from
a LayerNorm), so that the gate stays positive, where relu is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sep_attn.layout import accumulate_dtype
from sep_attn.module import SeparableAttention

FROM_MHA = "from_mha"
FRESH = "fresh"
# Chosen on scikit-learn's digits: benchmarks/convert_init.py
CHOSEN = "old_keys"


@dataclass(frozen=True)
class MultiHeadWeights:
    """A multi-head layer's projections: weights ``[D, D]`` in ``nn.Linear`` order, biases ``[D]``.

    ``normalized`` says whether queries or keys pass a norm before their product.
    """

    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    num_heads: int
    normalized: bool = False

    @classmethod
    def of(
        cls,
        projections: Sequence[tuple[Tensor, Tensor | None]],
        num_heads: int,
        *,
        normalized: bool = False,
    ) -> MultiHeadWeights:
        """From weight and bias of query, key, value and output; a bias of None becomes zeros."""
        tensors = {}
        for name, (weight, bias) in zip(("query", "key", "value", "out"), projections, strict=True):
            tensors[f"{name}_weight"] = weight.detach()
            tensors[f"{name}_bias"] = (
                weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
            )
        return cls(**tensors, num_heads=num_heads, normalized=normalized)

    def widened(self) -> MultiHeadWeights:
        """In float32 at least."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        wide = {name: value.to(accumulate_dtype(value.dtype)) for name, value in tensors.items()}
        return replace(self, **wide)


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


def _drawn(like: Tensor, dim: int) -> Tensor:
    """As ``nn.Linear`` draws weights and biases for ``dim`` inputs."""
    return torch.empty_like(like).uniform_(-(dim**-0.5), dim**-0.5)


def _with_values(
    old: MultiHeadWeights, score: Tensor, key_weight: Tensor, key_bias: Tensor, out_scale: float = 1
) -> _Start:
    return _Start(
        score=score,
        key_weight=key_weight,
        key_bias=key_bias,
        value_weight=old.value_weight,
        value_bias=old.value_bias,
        out_weight=out_scale * old.out_weight,
        out_bias=old.out_bias,
    )


def _old_keys(old: MultiHeadWeights, out_scale: float = 1.0) -> _Start:
    score = _drawn(old.query_bias, len(old.query_bias))
    return _with_values(old, score, old.key_weight, old.key_bias, out_scale)


def _old_keys_small(old: MultiHeadWeights) -> _Start:
    return _old_keys(old, out_scale=0.1)


def _fresh_context(old: MultiHeadWeights) -> _Start:
    like = (old.query_bias, old.key_weight, old.key_bias)
    return _with_values(old, *(_drawn(each, len(old.query_bias)) for each in like))


def _constant_context(old: MultiHeadWeights) -> _Start:
    zero = torch.zeros_like(old.query_bias)
    return _with_values(old, zero, torch.zeros_like(old.key_weight), torch.ones_like(zero))


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
    "old_keys": _old_keys,
    "old_keys_small": _old_keys_small,
    "fresh_context": _fresh_context,
    "constant_context": _constant_context,
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
    start = STARTS[CHOSEN if init == FROM_MHA else init](old.widened())
    weight = torch.cat([start.score[None], start.key_weight, start.value_weight])
    bias = torch.cat([start.score.new_zeros(1), start.key_bias, start.value_bias])
    layer.qkv_proj.weight.copy_(weight)
    layer.qkv_proj.bias.copy_(bias)
    layer.out_proj.weight.copy_(start.out_weight)
    layer.out_proj.bias.copy_(start.out_bias)
