# mypy: disallow-untyped-defs=False, disable-error-code=assignment
"""Tiles of whole tokens, as every kernel of the fused layer sees them.

A tile has BLOCK_N rows, one a token, and D channels in pieces (*chunks*) whose widths are powers of
two. Its tokens are of one band (:mod:`sep_attn.triton_kernels.launch`), or, where bands are short,
of BANDS bands side by side, each padded to BLOCK_N / BANDS rows. It holds SLICES = BANDS * GROUPS
slices; slice ``s`` of the call is slot ``s % SLICES`` of tile ``s // SLICES``.

What kernels know of it they hand about in two tuples, plain ones, for Inductor writes a kernel's
helpers anew and knows no classes:

- ``grid``: ``bands``, ``tokens``, ``width``, ``patch_h`` and ``patch_w`` of
  :class:`~sep_attn.triton_kernels.launch.TokenGrid`, and ``band_tiles``, the tiles of a band;
- ``tile``: that grid, the tile's number, and of its rows the band (``[BLOCK_N]`` where bands lie
  side by side), the token ``n [BLOCK_N]`` and whether there is such a token, ``inside [BLOCK_N]``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sep_attn.triton_kernels.launch import (
    TokenGrid,
    band_offset,
    in_runs,
    run_of,
    runs_along,
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


@triton.jit
def unknown_zero():
    # 0, which the compiler does not know: no launch has a second program in this direction.
    return tl.program_id(1)


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
def zero_chunks(CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    chunks = ()
    for i in tl.static_range(len(CHUNKS)):
        chunks = chunks + (tl.zeros((ROWS, chunk_width(CHUNKS, i)), tl.float32),)
    return chunks


@triton.jit
def tile_rows(i_tile, grid, BANDS: tl.constexpr, BLOCK_N: tl.constexpr, zero=0):
    # ``zero`` is 0; where the compiler does not know it, rows are worked out for each tile anew.
    bands, tokens, _, _, _, band_tiles = grid
    i = tl.arange(0, BLOCK_N) + zero
    if BANDS == 1:
        band = i_tile // band_tiles
        n = i_tile % band_tiles * BLOCK_N + i
        return grid, i_tile, band, n, n < tokens
    else:
        band = i_tile * BANDS + i // (BLOCK_N // BANDS)
        n = i % (BLOCK_N // BANDS)
        return grid, i_tile, band, n, (n < tokens) & (band < bands)


@triton.jit
def within_bands(tile):
    # The same tile, with no row inside where there is no such band.
    grid, i_tile, band, n, inside = tile
    bands, _, _, _, _, _ = grid
    return grid, i_tile, band, n, inside & (band < bands)


@triton.jit
def row_slices(tile, BANDS: tl.constexpr, GROUPS: tl.constexpr):
    # The first slice of the tile, and the slot of every row's slice, [BLOCK_N].
    grid, i_tile, _, n, _ = tile
    _, _, _, _, _, band_tiles = grid
    first_band = i_tile // band_tiles if BANDS == 1 else i_tile * BANDS
    first_slice = first_band * GROUPS
    i = tl.arange(0, n.shape[0])
    return first_slice, i // (n.shape[0] // BANDS) * GROUPS + i % GROUPS


@triton.jit
def program_columns(D: tl.constexpr, BLOCK_E: tl.constexpr):
    # Columns change fastest: programs that read the same tokens run side by side. The columns of
    # this one, [BLOCK_E], and its number among those of these columns.
    columns = tl.cdiv(D, BLOCK_E)
    pid = tl.program_id(0)
    return pid // columns, pid % columns * BLOCK_E + tl.arange(0, BLOCK_E)


@triton.jit
def value_offsets(strides, tile, UNIFORM: tl.constexpr):
    # [BLOCK_N], where there is one value a token.
    grid, _, band, n, _ = tile
    _, _, width, patch_h, patch_w, _ = grid
    offset = band_offset(band, strides, patch_h, patch_w)
    return offset + token_offsets(n, strides, width, UNIFORM)


@triton.jit
def load_values(ptr, strides, tile, UNIFORM: tl.constexpr, other=0.0):
    _, _, _, _, inside = tile
    return tl.load(ptr + value_offsets(strides, tile, UNIFORM), mask=inside, other=other)


@triton.jit
def store_values(ptr, strides, tile, values, UNIFORM: tl.constexpr):
    _, _, _, _, inside = tile
    tl.store(ptr + value_offsets(strides, tile, UNIFORM), values, mask=inside)


@triton.jit
def load_kept(mask, tile, UNIFORM: tl.constexpr):
    # [BLOCK_N], the tokens that the mask leaves in; its pointer, which may be None, and strides.
    mask_ptr, mask_strides = mask
    _, _, _, _, inside = tile
    if mask_ptr is None:
        return inside
    else:
        return inside & (load_values(mask_ptr, mask_strides, tile, UNIFORM, 1) == 0)


@triton.jit
def row_offsets(ptr, strides, tile, UNIFORM: tl.constexpr, LAYOUT: tl.constexpr):
    # [BLOCK_N], of each token's channel 0.
    RUN: tl.constexpr = run_of(ptr.dtype, LAYOUT)
    grid, _, band, n, _ = tile
    _, _, width, patch_h, patch_w, _ = grid
    start = in_runs(band_offset(band, strides, patch_h, patch_w), RUN)
    if runs_along(LAYOUT, "tokens"):
        if UNIFORM:
            return start + n
        else:
            # A run of RUN tokens, or a tile of fewer, lies in one row; side by side, the compiler
            # does not see it.
            LINE: tl.constexpr = min(RUN, n.shape[0])
            lines = tl.max_constancy(n // width, LINE)
            columns = tl.multiple_of(tl.max_contiguous(n % width, LINE), LINE)
            return start + lines.to(tl.int64) * stride_of(strides, 3, RUN) + columns
    else:
        return start + token_offsets(n, strides, width, UNIFORM, RUN)


@triton.jit
def channel_offsets(ptr, strides, d, LAYOUT: tl.constexpr):
    if runs_along(LAYOUT, "channels"):
        return d.to(tl.int64)
    else:
        return d.to(tl.int64) * stride_of(strides, 5, run_of(ptr.dtype, LAYOUT))


@triton.jit
def column_mask(tile, d, D: tl.constexpr, EVEN: tl.constexpr):
    _, _, _, _, inside = tile
    mask = inside[:, None]
    if not EVEN:
        mask = mask & (d < D)[None, :]
    return mask


@triton.jit
def load_columns(
    ptr,
    strides,
    tile,
    rows,  # [BLOCK_N], of row_offsets
    d,  # [WIDTH]
    D: tl.constexpr,
    EVEN: tl.constexpr,  # every d is below D
    LAYOUT: tl.constexpr,
):
    offsets = rows[:, None] + channel_offsets(ptr, strides, d, LAYOUT)[None, :]
    return tl.load(ptr + offsets, mask=column_mask(tile, d, D, EVEN), other=0.0)


@triton.jit
def store_columns(
    ptr,
    strides,
    tile,
    rows,  # [BLOCK_N], of row_offsets
    values,  # [BLOCK_N, WIDTH]
    d,  # [WIDTH]
    D: tl.constexpr,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    offsets = rows[:, None] + channel_offsets(ptr, strides, d, LAYOUT)[None, :]
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=column_mask(tile, d, D, EVEN))


@triton.jit
def load_tokens(
    ptr,
    strides,
    tile,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIFORM: tl.constexpr,
    LAYOUT: tl.constexpr,
    first=0,
):
    # Whole tokens: a tuple of [BLOCK_N, width of the chunk].
    rows = row_offsets(ptr, strides, tile, UNIFORM, LAYOUT)
    chunks = ()
    for i in tl.static_range(len(CHUNKS)):
        d = first + chunk_channels(CHUNKS, i)
        chunks = chunks + (
            load_columns(ptr, strides, tile, rows, d, D, chunk_even(CHUNKS, i, D), LAYOUT),
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
def store_weight(
    ptr,  # [.., D], contiguous
    rows,  # [R]
    columns,  # [C]
    values,  # [R, C]
    D: tl.constexpr,
    ROWS_EVEN: tl.constexpr,
    COLUMNS_EVEN: tl.constexpr,
):
    offsets = rows[:, None] * D + columns[None, :]
    if ROWS_EVEN and COLUMNS_EVEN:
        tl.store(ptr + offsets, values)
    else:
        tl.store(ptr + offsets, values, mask=(rows < D)[:, None] & (columns < D)[None, :])


@triton.jit
def load_bias(ptr, d, D: tl.constexpr, EVEN: tl.constexpr = False):
    # [WIDTH], in float32; 0 where there is no bias.
    if ptr is None:
        return tl.zeros(d.shape, tl.float32)
    elif EVEN:
        return tl.load(ptr + d).to(tl.float32)
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
def fold_rows(values, DISTANCE: tl.constexpr):
    # [N, WIDTH] to [N / 2 DISTANCE, DISTANCE, WIDTH], the sums of rows that far apart: where one
    # thread holds both, nothing moves.
    FOLDS: tl.constexpr = values.shape[0] // (2 * DISTANCE)
    return tl.sum(tl.reshape(values, (FOLDS, 2, DISTANCE, values.shape[1])), axis=1)


@triton.jit
def sum_folds(folds):
    # [FOLDS, DISTANCE, WIDTH] to [WIDTH].
    return tl.sum(tl.sum(folds, axis=0), axis=0)


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
    slots,  # [BLOCK_N]
    slices,
    d,  # [WIDTH]
    D: tl.constexpr,
    SLICES: tl.constexpr,
):
    # Every row's slice, at these channels: [BLOCK_N, WIDTH], or [1, WIDTH] where all share one.
    if SLICES == 1:
        offset = first_slice.to(tl.int64) * row_size
        return tl.load(ptr + offset + d, mask=d < D, other=0.0)[None, :]
    else:
        values = tl.zeros((slots.shape[0], d.shape[0]), tl.float32)
        for slot in range(0, SLICES):
            row = load_slice_row(ptr, row_size, first_slice + slot, slices, d, D)
            values = tl.where((slots == slot)[:, None], row[None, :], values)
        return values


@triton.jit
def draw_dropout(seed_ptr, dropout_p, band, n):
    # What attention dropout multiplies the weights of these tokens by: 0 or 1 / (1 - dropout_p).
    # Philox, counted by token and band: every kernel of a call draws the same.
    seed = tl.load(seed_ptr)
    zero = n * 0
    bits, _, _, _ = tl.philox(seed, n, band + zero, zero, zero)
    return tl.where(tl.uint_to_uniform_float(bits) >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)
