"""Separable attention behind the call signatures of timm's and Hugging Face's attention layers.

:func:`sep_attn.convert` puts them in; parameters and constructor are those of
:class:`sep_attn.SeparableAttention`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sep_attn.masks import padding_from_attention_mask
from sep_attn.module import SeparableAttention


class TimmSeparableAttention(SeparableAttention):
    """In place of ``timm.layers.Attention``."""

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``.

        Args:
            x: ``[B, N, D]``.
            attn_mask: as in timm, broadcastable to ``[B, heads, N, N]``, bool (True takes part) or
                float (added to scores), the same for every head and query.
            is_causal: must be False.

        Raises:
            ValueError: ``is_causal``, or an ``attn_mask`` that is no key padding mask.
            TypeError: an ``attn_mask`` of another type.
        """
        if is_causal:
            raise ValueError("is_causal must be False: separable attention sees the whole slice")
        if attn_mask is None:
            return super().forward(x)
        padding = padding_from_attention_mask(attn_mask, x.shape[0], x.shape[1], "attn_mask")
        return super().forward(x, key_padding_mask=padding)


class HuggingFaceSeparableAttention(SeparableAttention):
    """In place of Hugging Face's ``ViTAttention`` and ``DeiTAttention``."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """``[B, N, D]`` to ``([B, N, D], None)``, as with Hugging Face's fused attention.

        Args:
            hidden_states: ``[B, N, D]``.
            attention_mask: what the model makes of its own ``attention_mask``: ``[B, N]``, or
                broadcastable to ``[B, heads, N, N]``, the same for every head and query.
            kwargs: what the model passes on; ``output_attentions`` and ``is_causal`` must not be
                set.

        Raises:
            ValueError: ``output_attentions`` or ``is_causal``, or an ``attention_mask`` that is no
                key padding mask.
            TypeError: an ``attention_mask`` of another type.
        """
        if kwargs.get("is_causal"):
            raise ValueError("is_causal must be False: separable attention sees the whole slice")
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions must be False: separable attention has no N x N map; "
                "SeparableAttention's need_weights=True returns its weights"
            )
        padding = None
        if attention_mask is not None:
            batch, tokens = hidden_states.shape[:2]
            if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
                attention_mask = attention_mask.bool()[:, None, None]  # flash attention's: 1 keeps
            padding = padding_from_attention_mask(attention_mask, batch, tokens, "attention_mask")
        return super().forward(hidden_states, key_padding_mask=padding), None


class MobileViTSeparableAttention(SeparableAttention):
    """In place of Hugging Face's ``MobileViTAttention``."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, N, D]`` to ``[B, N, D]``; MobileViT puts a patch's pixels on the batch axis."""
        return super().forward(hidden_states)
