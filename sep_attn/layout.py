"""Token grids: how every input layout is seen as slices of tokens, without moving data.

A tensor of rank 3 is ``[B, N, D]``. A tensor of rank 4 is ``[B, D, H, W]`` with a patch size
``(patch_h, patch_w)``: pixel ``(y, x)`` belongs to group ``(y % patch_h) * patch_w + x % patch_w``.
``[B, D, P, N]`` is the same with ``H = P``, ``W = N`` and the patch ``(P, 1)``. One *slice* is one
group of one image; the softmax runs over the tokens of a slice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def default_patch_size(x: Tensor) -> tuple[int, int]:
    """The patch of ``[B, N, D]`` and of ``[B, D, P, N]``, which need no ``patch_size``."""
    return (1, 1) if x.dim() == 3 else (x.shape[2], 1)


def token_shape(x: Tensor) -> tuple[int, ...]:
    """The shape of one value a token: ``[B, N]``, or ``[B, H, W]`` for a tensor of rank 4."""
    return tuple(x.shape[:2]) if x.dim() == 3 else (x.shape[0], x.shape[2], x.shape[3])


def num_channels(x: Tensor) -> int:
    return x.shape[2] if x.dim() == 3 else x.shape[1]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def keeps_values(x: Tensor) -> bool:
    """Whether the C++ forward pass keeps act's argument, the values, for the backward pass.

    Reading it back is faster than its product at every size measured, D = 64 to 768; in half
    precision it would be rounded, and a ragged D does not fill the kernels' vectors: both compute
    it again.
    """
    return accumulate_dtype(x.dtype) == x.dtype and num_channels(x) % 16 == 0


VALUES_HEADER, VALUES_WIDTH = 16, 32  # as in csrc/torch_ops.cpp and csrc/kernels/kernels.h


def kept_values_size(x: Tensor) -> int:
    """How many elements the kept values take, ``N D`` and a little.

    They lie as ``x`` does, as rows of channels or on the vector lanes by panels of 32 tokens; a
    header says which.
    """
    channels = num_channels(x)
    panels = (x.numel() // channels + VALUES_WIDTH - 1) // VALUES_WIDTH
    return VALUES_HEADER + panels * VALUES_WIDTH * channels


def slice_view(x: Tensor, patch_h: int, patch_w: int) -> Tensor:
    """Views ``x`` as ``[B, patch_h, patch_w, H / patch_h, W / patch_w, D]``; never copies."""
    if x.dim() == 3:
        return x[:, None, None, None]
    batch, channels, height, width = x.shape
    grid = x.view(batch, channels, height // patch_h, patch_h, width // patch_w, patch_w)
    return grid.permute(0, 3, 5, 2, 4, 1)


def token_view(values: Tensor, patch_h: int, patch_w: int) -> Tensor:
    """Views one value a token as ``[B, patch_h, patch_w, H / patch_h, W / patch_w]``."""
    if values.dim() == 2:
        return values[:, None, None, None]
    batch, height, width = values.shape
    grid = values.view(batch, height // patch_h, patch_h, width // patch_w, patch_w)
    return grid.permute(0, 2, 4, 1, 3)


def merge_slices(sliced: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`slice_view`: ``[B, ph, pw, NH, NW, D]`` to the shape of ``like``."""
    if like.dim() == 3:
        return sliced.reshape(like.shape)
    return sliced.permute(0, 5, 3, 1, 4, 2).reshape(like.shape)


def merge_token_slices(sliced: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`token_view`: ``[B, ph, pw, NH, NW]`` back to a token shape."""
    if len(shape) == 2:
        return sliced.reshape(shape)
    return sliced.permute(0, 3, 1, 4, 2).reshape(shape)
