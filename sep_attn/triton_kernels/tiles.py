# mypy: disallow-untyped-defs=False, disable-error-code=assignment
"""Tiles of whole tokens, as every kernel of the fused layer sees them.

A tile has BLOCK_N rows, one a token, and D channels in pieces (*chunks*) whose widths are powers of
two. Its tokens are of one band (:mod:`sep_attn.triton_kernels.launch`), or, where bands are short,
of BANDS bands side by side, each padded to BLOCK_N / BANDS rows. It holds SLICES = BANDS * GROUPS
slices; slice ``s`` of the call is slot ``s % SLICES`` of tile ``s // SLICES``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sep_attn.triton_kernels.launch import (
    TokenGrid,
    band_offset,
    stride_of,
    token_offsets,
)

# The weights, 1 + 2 D rows of D, are addressed in 32 bits.
MOST_CHANNELS = 32_000
# Bands are put side by side down to this many rows each.
FEWEST_ROWS = 16


class Tiling(NamedTuple):
    """How a call's tokens are cut: ``tiles`` in all, ``band_tiles`` of them a band."""

    tiles: int
    band_tiles: int
    bands: int  # side by side in a tile
    slices: int  # in a tile


def tiling(grid: TokenGrid, block_tokens: int) -> Tiling:
    """Cuts bands into tiles of ``block_tokens`` rows, or puts short bands side by side."""
    rows = block_tokens
    while rows // 2 >= FEWEST_ROWS and statically_known_true(grid.tokens <= rows // 2):
        rows //= 2
    bands = block_tokens // rows
    band_tiles = triton.cdiv(grid.tokens, rows)
    tiles = triton.cdiv(grid.bands, bands) * band_tiles
    return Tiling(tiles, band_tiles, bands, bands * grid.groups)


@triton.constexpr_function
def chunk_width(chunks, i):
    return chunks[i]


@triton.constexpr_function
def chunk_start(chunks, i):
    return sum(chunks[:i])


@triton.constexpr_function
def chunk_even(chunks, i, channels):
    # Whether all of its channels are below D.
    return sum(chunks[: i + 1]) <= channels


@triton.jit
def chunk_channels(CHUNKS: tl.constexpr, i: tl.constexpr):
    return chunk_start(CHUNKS, i) + tl.arange(0, chunk_width(CHUNKS, i))


@triton.jit
def in_words(tokens, width, WIDE: tl.constexpr, WORD: tl.constexpr, GROUPS: tl.constexpr):
    # Changes nothing: says that rows hold whole groups, and that wide runs hold whole words.
    width = width // GROUPS * GROUPS
    if WIDE:
        tokens = tokens // WORD * WORD
        width = width // WORD * WORD
    return tokens, width


@triton.jit
def tile_rows(i_tile, band_tiles, bands, tokens, BANDS: tl.constexpr, BLOCK_N: tl.constexpr):
    # The band and the token of every row, and whether there is such a token.
    i = tl.arange(0, BLOCK_N)
    if BANDS == 1:
        band = i_tile // band_tiles
        n = i_tile % band_tiles * BLOCK_N + i
        return band, n, n < tokens
    else:
        band = i_tile * BANDS + i // (BLOCK_N // BANDS)
        n = i % (BLOCK_N // BANDS)
        return band, n, (n < tokens) & (band < bands)


@triton.jit
def row_slots(BANDS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr):
    # The slot of every row's slice.
    i = tl.arange(0, BLOCK_N)
    return i // (BLOCK_N // BANDS) * GROUPS + i % GROUPS


@triton.jit
def row_offsets(
    band,
    n,  # [BLOCK_N]
    strides,
    width,
    patch_h,
    patch_w,
    UNIFORM: tl.constexpr,
    LAYOUT: tl.constexpr,
    WORD: tl.constexpr,
):
    # Dividing and multiplying by RUN changes nothing: it shows the compiler a multiple.
    RUN: tl.constexpr = WORD if LAYOUT == "channels_wide" or LAYOUT == "tokens_wide" else 1
    start = band_offset(band, strides, patch_h, patch_w) // RUN * RUN
    if LAYOUT == "tokens" or LAYOUT == "tokens_wide":
        if UNIFORM:
            return start + n
        else:
            # A run of RUN tokens lies in one row; side by side, the compiler does not see it.
            lines = tl.max_constancy(n // width, RUN)
            columns = tl.multiple_of(tl.max_contiguous(n % width, RUN), RUN)
            return start + lines.to(tl.int64) * stride_of(strides, 3, RUN) + columns
    else:
        return start + token_offsets(n, strides, width, UNIFORM, RUN)


@triton.jit
def channel_offsets(d, strides, LAYOUT: tl.constexpr, WORD: tl.constexpr):
    if LAYOUT == "channels" or LAYOUT == "channels_wide":
        return d.to(tl.int64)
    elif LAYOUT == "tokens_wide":
        return d.to(tl.int64) * stride_of(strides, 5, WORD)
    else:
        return d.to(tl.int64) * stride_of(strides, 5, 1)


@triton.jit
def load_columns(
    ptr,
    rows,  # [BLOCK_N], offsets
    inside,  # [BLOCK_N]
    d,  # [WIDTH]
    strides,
    D: tl.constexpr,
    EVEN: tl.constexpr,  # every d is below D
    LAYOUT: tl.constexpr,
    WORD: tl.constexpr,
):
    offsets = rows[:, None] + channel_offsets(d, strides, LAYOUT, WORD)[None, :]
    mask = inside[:, None]
    if not EVEN:
        mask = mask & (d < D)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)  # [BLOCK_N, WIDTH]


@triton.jit
def store_columns(
    ptr,
    values,  # [BLOCK_N, WIDTH]
    rows,  # [BLOCK_N], offsets
    inside,  # [BLOCK_N]
    d,  # [WIDTH]
    strides,
    D: tl.constexpr,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    WORD: tl.constexpr,
):
    offsets = rows[:, None] + channel_offsets(d, strides, LAYOUT, WORD)[None, :]
    mask = inside[:, None]
    if not EVEN:
        mask = mask & (d < D)[None, :]
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_tokens(
    ptr,
    rows,  # [BLOCK_N], offsets
    inside,  # [BLOCK_N]
    strides,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    LAYOUT: tl.constexpr,
    WORD: tl.constexpr,
    first=0,
):
    # Whole tokens: a tuple of [BLOCK_N, width of the chunk].
    chunks = ()
    for i in tl.static_range(len(CHUNKS)):
        d = first + chunk_channels(CHUNKS, i)
        chunks = chunks + (
            load_columns(ptr, rows, inside, d, strides, D, chunk_even(CHUNKS, i, D), LAYOUT, WORD),
        )
    return chunks


@triton.jit
def load_weight(
    ptr,  # [.., D], contiguous
    rows,  # [R]
    columns,  # [C]
    D: tl.constexpr,
    ROWS_EVEN: tl.constexpr,  # every row is below D
    COLUMNS_EVEN: tl.constexpr,
):
    offsets = rows[:, None] * D + columns[None, :]  # 32 bits: see MOST_CHANNELS
    if ROWS_EVEN and COLUMNS_EVEN:
        return tl.load(ptr + offsets)
    elif ROWS_EVEN:
        return tl.load(ptr + offsets, mask=(columns < D)[None, :], other=0.0)
    elif COLUMNS_EVEN:
        return tl.load(ptr + offsets, mask=(rows < D)[:, None], other=0.0)
    else:
        return tl.load(ptr + offsets, mask=(rows < D)[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def load_bias(ptr, d, D: tl.constexpr):
    # [WIDTH], in float32; 0 where there is no bias.
    if ptr is None:
        return tl.zeros(d.shape, tl.float32)
    else:
        return tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def slice_sum(values, BANDS: tl.constexpr, GROUPS: tl.constexpr):
    # Over the rows of each slice: [BLOCK_N] to [SLICES], or [BLOCK_N, WIDTH] to [SLICES, WIDTH].
    ROWS: tl.constexpr = values.shape[0] // (BANDS * GROUPS)
    if len(values.shape) == 1:
        sums = tl.sum(tl.reshape(values, (BANDS, ROWS, GROUPS)), axis=1)
        return tl.reshape(sums, (BANDS * GROUPS,))
    elif BANDS * GROUPS == 1:
        return tl.sum(values, axis=0)[None, :]
    else:
        WIDTH: tl.constexpr = values.shape[1]
        sums = tl.sum(tl.reshape(values, (BANDS, ROWS, GROUPS, WIDTH)), axis=1)
        return tl.reshape(sums, (BANDS * GROUPS, WIDTH))


@triton.jit
def slice_max(values, BANDS: tl.constexpr, GROUPS: tl.constexpr):
    ROWS: tl.constexpr = values.shape[0] // (BANDS * GROUPS)
    maxima = tl.max(tl.reshape(values, (BANDS, ROWS, GROUPS)), axis=1)
    return tl.reshape(maxima, (BANDS * GROUPS,))


@triton.jit
def spread_slices(values, BANDS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr):
    # From one value (or one row) a slice to one a token.
    ROWS: tl.constexpr = BLOCK_N // (BANDS * GROUPS)
    if len(values.shape) == 1:
        apart = tl.reshape(values, (BANDS, 1, GROUPS))
        return tl.reshape(tl.broadcast_to(apart, (BANDS, ROWS, GROUPS)), (BLOCK_N,))
    elif BANDS * GROUPS == 1:
        return tl.broadcast_to(values, (BLOCK_N, values.shape[1]))
    else:
        WIDTH: tl.constexpr = values.shape[1]
        apart = tl.reshape(values, (BANDS, 1, GROUPS, WIDTH))
        apart = tl.broadcast_to(apart, (BANDS, ROWS, GROUPS, WIDTH))
        return tl.reshape(apart, (BLOCK_N, WIDTH))


@triton.jit
def load_slice_row(ptr, row_size, i_slice, slices, d, D: tl.constexpr):
    offset = i_slice.to(tl.int64) * row_size
    return tl.load(ptr + offset + d, mask=(d < D) & (i_slice < slices), other=0.0)


@triton.jit
def load_slice_columns(
    ptr,  # [S, row_size]
    row_size,
    first_slice,
    slices,
    slots,  # [BLOCK_N]
    d,  # [WIDTH]
    D: tl.constexpr,
    SLICES: tl.constexpr,
    UNROLL: tl.constexpr,  # inside a loop that is to be pipelined
):
    # Every row's slice, at these channels: [BLOCK_N, WIDTH], or [1, WIDTH] where all share one.
    if SLICES == 1:
        offset = first_slice.to(tl.int64) * row_size
        return tl.load(ptr + offset + d, mask=d < D, other=0.0)[None, :]
    else:
        values = tl.zeros((slots.shape[0], d.shape[0]), tl.float32)
        if UNROLL:
            for slot in tl.static_range(SLICES):
                row = load_slice_row(ptr, row_size, first_slice + slot, slices, d, D)
                values = tl.where((slots == slot)[:, None], row[None, :], values)
        else:
            for slot in range(0, SLICES):
                row = load_slice_row(ptr, row_size, first_slice + slot, slices, d, D)
                values = tl.where((slots == slot)[:, None], row[None, :], values)
        return values


@triton.jit
def activate(v, ACT: tl.constexpr):
    if ACT == "relu":
        v = tl.where(v <= 0.0, 0.0, v)  # NaN stays NaN
    return v


@triton.jit
def draw_dropout(seed_ptr, dropout_p, band, n):
    # What attention dropout multiplies the weights of these tokens by: 0 or 1 / (1 - dropout_p).
    # Philox, counted by token and band: every kernel of a call draws the same.
    seed = tl.load(seed_ptr)
    zero = n * 0
    bits, _, _, _ = tl.philox(seed, n, band + zero, zero, zero)
    return tl.where(tl.uint_to_uniform_float(bits) >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)
