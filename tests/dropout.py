"""Attention dropout as the Triton kernels draw it, for an oracle that has to draw the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from sep_attn import reference
from sep_attn.layout import token_shape
from sep_attn.triton_kernels.launch import (
    band_offset,
    grid_strides,
    on_device,
    shifted,
    token_grid,
    token_offsets,
)
from sep_attn.triton_kernels.tiles import draw_dropout


@triton.jit
def dropout_scale_kernel(
    seed_ptr,
    dropout_p,
    scale_ptr,
    scale_strides,
    tokens,
    width,
    patch_h,
    patch_w,
    BLOCK_N: tl.constexpr,
):
    i_band = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offsets = band_offset(i_band, scale_strides, patch_h, patch_w)
    offsets += token_offsets(n, scale_strides, width, False)
    scale = draw_dropout(seed_ptr, dropout_p, i_band, n)
    tl.store(scale_ptr + offsets, scale, mask=n < tokens)


def dropout_scale(
    seed: Tensor, dropout_p: float, source: Tensor, patch_h: int, patch_w: int
) -> Tensor:
    """What the kernels multiply each token's weight by: 0 or ``1 / (1 - dropout_p)``, float32."""
    scale = source.new_empty(token_shape(source), dtype=torch.float32)
    if scale.numel() == 0:
        return scale
    grid = token_grid(source.shape, patch_h, patch_w)
    with on_device(source.device):
        dropout_scale_kernel[(grid.bands, triton.cdiv(grid.tokens, 64))](
            seed,
            dropout_p,
            scale,
            shifted(grid_strides(source.shape, scale.stride(), grid)),
            tokens=grid.tokens,
            width=grid.width,
            patch_h=grid.patch_h,
            patch_w=grid.patch_w,
            BLOCK_N=64,
        )
    return scale


@contextlib.contextmanager
def drawn_by_triton(patch_h: int, patch_w: int) -> Iterator[None]:
    """Within it the reference draws its dropout from torch's generator as the fused layer does."""

    def draw(x: Tensor, dropout_p: float) -> Tensor:
        seed = torch.randint(2**31 - 1, (1,), device=x.device)
        scale = dropout_scale(seed, dropout_p, x, patch_h, patch_w)
        return scale.to(torch.float64) if x.dtype == torch.float64 else scale

    with mock.patch.object(reference, "dropout_scale", draw):
        yield
