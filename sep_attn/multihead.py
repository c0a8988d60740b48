"""Separable attention behind the interface of ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sep_attn.masks import padding_from_additive
from sep_attn.module import SeparableAttention
from sep_attn.validation import check_probability

_ONE_DISTRIBUTION = (
    "separable attention has one softmax over the tokens, the same for every query, "
    "so only whole tokens can be left out: use key_padding_mask"
)


class SeparableMultiheadAttention(SeparableAttention):
    """Separable self-attention for code that constructs ``torch.nn.MultiheadAttention``.

    The arguments, their order, the layouts and the results are that class's; the mathematics is
    eq. 3 of Mehta and Rastegari 2022, of which heads are no part: ``num_heads`` only shapes the
    weights that ``average_attn_weights=False`` returns. Parameters are those of
    :class:`sep_attn.SeparableAttention`, so a state dict of ``nn.MultiheadAttention`` does not fit;
    :func:`sep_attn.convert` makes this layer from one.

    ``in_proj_weight`` and ``in_proj_bias`` are None, which keeps ``nn.TransformerEncoderLayer`` off
    its inference fast path: that would run multi-head attention on the weights it finds.

    Args:
        embed_dim: D, the number of channels.
        num_heads: must divide ``embed_dim``.
        dropout: of the softmax weights while training, no renormalisation.
        bias: whether the projections have biases.
        add_bias_kv: must be False: there is no key to add one to.
        add_zero_attn: must be False, likewise.
        kdim: None or ``embed_dim``.
        vdim: None or ``embed_dim``.
        batch_first: batched inputs are ``[B, L, D]`` if True, ``[L, B, D]`` if False.
        device: of the parameters.
        dtype: of the parameters.
        value_act: ``"relu"`` (paper) or ``"identity"``.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: an argument out of range or one that separable attention has no place for.
        AssertionError: ``num_heads`` does not divide ``embed_dim``, as in that class.
    """

    in_proj_weight: None = None
    in_proj_bias: None = None
    bias_k: None = None
    bias_v: None = None
    add_zero_attn = False
    _qkv_same_embed_dim = True  # torch.nn.TransformerEncoder asks

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        value_act: str = "relu",
        backend: str = "auto",
    ) -> None:
        if embed_dim <= 0 or num_heads <= 0:
            raise ValueError(
                "embed_dim and num_heads must be greater than 0, "
                f"got embed_dim={embed_dim} and num_heads={num_heads}"
            )
        if embed_dim % num_heads:
            raise AssertionError(
                f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}"
            )
        check_probability("dropout", dropout)
        if add_bias_kv or add_zero_attn:
            raise ValueError(
                "add_bias_kv and add_zero_attn append a key and a value token; in separable "
                "attention values are never summed over tokens, so leave both False"
            )
        for name, dim in (("kdim", kdim), ("vdim", vdim)):
            if dim not in (None, embed_dim):
                raise ValueError(
                    f"{name} must be None or embed_dim ({embed_dim}), got {dim}: one projection "
                    "serves scores, keys and values"
                )
        super().__init__(
            embed_dim,
            dropout,
            bias=bias,
            value_act=value_act,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = self.vdim = embed_dim
        self.batch_first = batch_first
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """As in ``nn.MultiheadAttention``: Xavier's uniform input projections, biases of zero."""
        nn.init.xavier_uniform_(self.qkv_proj.weight)
        for projection in (self.qkv_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    @property
    def dropout(self) -> float:
        """Probability of a zero among the softmax weights while training."""
        return self.attn_drop.p

    @dropout.setter
    def dropout(self, p: float) -> None:
        self.attn_drop.p = p

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Gates the values of ``query``'s tokens with the context of ``key``'s.

        Args:
            query: ``[L, D]``, ``[L, B, D]``, or ``[B, L, D]`` with ``batch_first``. Has the values.
            key: ``[S, D]``, ``[S, B, D]`` or ``[B, S, D]``. Has the scores and the context's keys.
                Pass the same tensor as ``query`` for self-attention.
            value: the same tensor object as ``key``; eq. 3 has no third input.
            key_padding_mask: ``[S]`` or ``[B, S]``. Bool: True leaves a token out. Float: 0 keeps
                it, -inf leaves it out. A slice with nothing left gives ``out_proj.bias``.
            need_weights: also return the softmax weights, before dropout.
            attn_mask: must be None.
            average_attn_weights: see below.
            is_causal: must be False.

        Returns:
            The output in the shape of ``query``, and None or the weights ``[L, S]`` or
            ``[B, L, S]``; with ``average_attn_weights=False`` ``[num_heads, L, S]`` or
            ``[B, num_heads, L, S]``. All queries and heads have the same weights, so they are
            expanded views of one ``[B, S]``: clone before writing.

        Raises:
            AssertionError: a shape or mask dtype that ``nn.MultiheadAttention`` refuses too.
            ValueError: ``key is not value``, ``attn_mask``, ``is_causal``, a float mask with other
                values, a nested tensor, or batches that differ.
            TypeError: mixed dtypes outside autocast.
        """
        if attn_mask is not None:
            raise ValueError(f"attn_mask must be None: {_ONE_DISTRIBUTION}")
        if is_causal:
            raise ValueError(f"is_causal must be False: {_ONE_DISTRIBUTION}")
        self._check_shapes(query, key, value)
        if key is not value:
            raise ValueError(
                "key and value must be the same tensor object: in separable attention the values "
                "are query's own tokens, and the context is made of key's alone. What copies or "
                "wraps each argument (FSDP's cast of inputs, torch.func.vmap, torch.jit.trace) is "
                "for the module around this one"
            )
        batched = query.dim() == 3
        if key_padding_mask is not None:
            key_padding_mask = self._padding(key_padding_mask, key, batched)
        x, source = (self._batch_first(each, batched) for each in (query, key))
        if x.shape[0] != source.shape[0]:
            raise ValueError(f"key has batch {source.shape[0]} but query has {x.shape[0]}")
        result: Any = super().forward(
            x,
            None if key is query else source,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
        )
        out, weights = result if need_weights else (result, None)
        if weights is not None:
            heads = () if average_attn_weights else (self.num_heads,)
            for _ in (*heads, "queries"):
                weights = weights.unsqueeze(1)
            weights = weights.expand(-1, *heads, x.shape[1], -1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _batch_first(self, tokens: Tensor, batched: bool) -> Tensor:
        if not batched:
            return tokens.unsqueeze(0)
        return tokens if self.batch_first else tokens.transpose(0, 1)

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if any(tensor.is_nested for tensor in (query, key, value)):
            raise ValueError(
                "nested tensors are not taken: pad them and pass key_padding_mask; in a "
                "torch.nn.TransformerEncoder set use_nested_tensor = False"
            )
        if query.dim() not in (2, 3):
            raise AssertionError(
                f"query must be [L, D] or batched, of rank 3, got shape {list(query.shape)}"
            )
        if key.dim() != query.dim() or value.dim() != query.dim():
            raise AssertionError(
                f"query has rank {query.dim()}, so key and value need it too, "
                f"got {key.dim()} and {value.dim()}"
            )
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.shape[-1] != self.embed_dim:
                raise AssertionError(
                    f"{name} has {tensor.shape[-1]} channels, expected embed_dim={self.embed_dim}"
                )
        if key.shape != value.shape:
            raise AssertionError(
                f"key shape {list(key.shape)} does not match value shape {list(value.shape)}"
            )

    def _padding(self, mask: Tensor, key: Tensor, batched: bool) -> Tensor:
        """The mask as bool ``[B, S]``."""
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(
                f"key_padding_mask must be bool or floating point, got {mask.dtype}"
            )
        if not batched:
            expected = key.shape[:1]
        else:
            expected = key.shape[:2] if self.batch_first else (key.shape[1], key.shape[0])
        if tuple(mask.shape) != tuple(expected):
            raise AssertionError(
                f"key_padding_mask has shape {list(mask.shape)}, expected {list(expected)}"
            )
        if mask.dtype != torch.bool:
            mask = padding_from_additive(mask, "key_padding_mask")
        return mask if batched else mask.unsqueeze(0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_heads={self.num_heads}, batch_first={self.batch_first}"
