"""Key padding masks out of the masks of other libraries.

Separable attention has one distribution a slice, so a mask can only leave tokens out for every
query alike. What says more than that is refused here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# exp of it is 0 in every dtype; libraries write "never" as -inf, as the dtype's minimum or as -1e4.
_NEVER = -1e4


def padding_from_additive(mask: Tensor, name: str) -> Tensor:
    """True where a float mask, to be added to scores, leaves a token out.

    Args:
        mask: any shape; 0 keeps a token, -1e4 or less (-inf, the dtype's minimum) leaves it out.
        name: of the argument, for the message.

    Raises:
        ValueError: any other value (``RuntimeError`` when compiled or exported, at run time).
    """
    masked = mask <= _NEVER
    _require(
        masked | (mask == 0),
        f"{name} adds to the scores; separable attention takes masks that keep a token (0) or "
        "leave it out (-inf), for every query alike",
    )
    return masked


def padding_from_attention_mask(mask: Any, batch: int, tokens: int, name: str) -> Tensor:
    """The key padding mask ``[batch, tokens]``, True leaves out, that an attention mask stands for.

    Args:
        mask: as for ``scaled_dot_product_attention``, broadcastable to ``[batch, heads, tokens,
            tokens]``: bool, True takes part; or float, added to the scores.
        batch: B.
        tokens: N.
        name: of the argument, for messages.

    Raises:
        TypeError: not a tensor, or of an integer dtype.
        ValueError: a shape that does not fit, or a mask that differs between heads or queries (as
            causal and window masks do), or that adds anything but 0 or -inf. Queries for which
            everything is left out do not count: they are padding.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating point, got {mask.dtype}")
    if mask.dim() not in (2, 3, 4) or any(
        size not in (1, full) for size, full in zip(mask.shape[-2:], (tokens, tokens), strict=True)
    ):
        raise ValueError(
            f"{name} has shape {list(mask.shape)}, expected one that broadcasts to "
            f"[{batch}, heads, {tokens}, {tokens}]"
        )
    keys = mask[(None,) * (4 - mask.dim())]  # [B or 1, heads or 1, N or 1, N or 1]
    differs = (
        "{} differs between {}, as causal and window masks do; separable attention can only leave "
        "tokens out for all of them (key padding)"
    )
    if keys.shape[1] > 1 and keys.stride(1) != 0:
        _require(keys == keys[:, :1], differs.format(name, "heads"))
    keys = keys[:, 0]
    if keys.stride(1) == 0:
        keys = keys[:, :1]
    masked = ~keys if keys.dtype == torch.bool else padding_from_additive(keys, name)
    if masked.shape[1] > 1:
        # Of a query that is padding itself some libraries write that it sees nothing.
        by_all = masked.all(1, keepdim=True)
        _require(masked == (by_all | masked.all(2, keepdim=True)), differs.format(name, "queries"))
        masked = by_all
    masked = masked[:, 0]
    if masked.shape[0] not in (1, batch):
        raise ValueError(f"{name} has batch {masked.shape[0]}, expected {batch}")
    return masked.expand(batch, tokens)


def _require(condition: Tensor, message: str) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(condition.all(), message)
    elif condition.device.type != "meta" and not condition.all():
        raise ValueError(message)
