# mypy: disallow-untyped-defs=False, disable-error-code=assignment
"""The whole layer where a program can hold whole tokens (``MOST_FUSED_CHANNELS``).

A tile of x is multiplied by W_V and gated. The gated values, in the dtype of x, stay in registers
until all are there, half the registers that the sums of the output would take, and are multiplied
by W_O, a few columns at a time: they do not pass through memory. Short slices run the scores, the
softmax and the context in the same launch: x is read from memory once (then from a cache) and out
is written once. Where slices are too few for a program each, a few share one.

In backward a program keeps a few columns of W_V and W_O and the sums of both gradients, and of both
biases', for them, and goes over tiles of x and of the output's gradient, from which it makes values
and gate again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sep_attn.triton_kernels.configs import WIDEST_PRODUCT
from sep_attn.triton_kernels.contexts import slice_context, slice_context_products
from sep_attn.triton_kernels.gating import activate
from sep_attn.triton_kernels.launch import VARYING, in_words, runs_along, word_of
from sep_attn.triton_kernels.products import gate_bwd_tile
from sep_attn.triton_kernels.tiles import (
    chunk_channels,
    chunk_even,
    chunk_start,
    chunk_width,
    fold_rows,
    load_bias,
    load_columns,
    load_slice_columns,
    load_tokens,
    load_weight,
    program_columns,
    row_offsets,
    row_slices,
    store_columns,
    store_weight,
    sum_folds,
    tile_rows,
    unknown_zero,
)

# A global of another kind would not be in the key of Triton's cache.
MOST_SUMS = tl.constexpr(WIDEST_PRODUCT)  # columns of the values that a program sums at once


@triton.jit
def value_products(
    x_ptr,
    x_strides,
    tile,
    rows,  # [BLOCK_N], of row_offsets
    weight_ptr,  # [D, D]
    bias_ptr,
    no_channels,
    end,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    FIRST_CHUNK: tl.constexpr,
    COUNT: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # b + x W_V^T for some of the chunks, in one pass over x: a tuple of [BLOCK_N, width of the
    # chunk].
    EVEN_K: tl.constexpr = D % BLOCK_K == 0
    sums = ()
    for i in tl.static_range(COUNT):
        bias = load_bias(bias_ptr, chunk_channels(CHUNKS, FIRST_CHUNK + i) + no_channels, D)
        bias = tl.broadcast_to(bias[None, :], (BLOCK_N, chunk_width(CHUNKS, FIRST_CHUNK + i)))
        sums = sums + (bias,)
    for first in tl.range(0, end, BLOCK_K):
        k = first + no_channels + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        x = load_columns(x_ptr, x_strides, tile, rows, k, D, EVEN_K, X_LAYOUT)
        new_sums = ()
        for i in tl.static_range(COUNT):
            d = chunk_channels(CHUNKS, FIRST_CHUNK + i) + no_channels
            weight = load_weight(
                weight_ptr, d, k, D, chunk_even(CHUNKS, FIRST_CHUNK + i, D), EVEN_K
            )  # [width, BLOCK_K]
            new_sums = new_sums + (tl.dot(x, weight.T, sums[i], input_precision=PRECISION),)
        sums = new_sums
    return sums


@triton.jit
def value_gate_output_tile(
    i_tile,
    zero,
    x_ptr,
    x_strides,
    qkv_weight_ptr,  # [1 + 2 D, D]
    qkv_bias_ptr,
    out_weight_ptr,  # [D, D]
    out_bias_ptr,
    statistics_ptr,  # [S, 2 D + 1]
    out_ptr,
    out_strides,
    grid,
    slices,
    D: tl.constexpr,
    VALUE_CHUNKS: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # act(x W_V^T + b_V) * c, times W_O^T, plus b_O, for a tile of whole tokens.
    EVEN_E: tl.constexpr = D % BLOCK_E == 0
    # Chunks whose sums fit into registers together are made in one pass over x.
    FITS: tl.constexpr = chunk_start(VALUE_CHUNKS, len(VALUE_CHUNKS)) <= MOST_SUMS
    AT_ONCE: tl.constexpr = len(VALUE_CHUNKS) if FITS else 1
    # ``zero`` is another unknown zero. The compiler then works out anew what zero was added to,
    # where it would keep more than there are registers; does not unroll the loops, which takes
    # registers too; and makes the gated values at once, for a branch that is never taken reads
    # them: else it would make them where the output needs them, and keep all that they are made of
    # until then.
    no_channels = 0
    end = D + zero
    if len(VALUE_CHUNKS) > 1:
        no_channels = zero * word_of(x_ptr.dtype)
        end = D + unknown_zero()
    tile = tile_rows(i_tile, grid, BANDS, BLOCK_N)
    rows = row_offsets(x_ptr, x_strides, tile, UNIFORM, X_LAYOUT)
    first_slice, slots = row_slices(tile, BANDS, GROUPS)
    value_bias_ptr = qkv_bias_ptr
    if qkv_bias_ptr is not None:
        value_bias_ptr = qkv_bias_ptr + 1 + D
    gated = ()
    for first_chunk in tl.static_range(0, len(VALUE_CHUNKS), AT_ONCE):
        sums = value_products(
            x_ptr,
            x_strides,
            tile,
            rows,
            qkv_weight_ptr + (1 + D) * D,
            value_bias_ptr if FITS else None,
            no_channels,
            end,
            D,
            VALUE_CHUNKS,
            first_chunk,
            AT_ONCE,
            X_LAYOUT,
            PRECISION,
            BLOCK_N,
            BLOCK_K,
        )
        for i in tl.static_range(first_chunk, first_chunk + AT_ONCE):
            d = chunk_channels(VALUE_CHUNKS, i) + no_channels
            v = sums[i - first_chunk]
            if not FITS:
                v += load_bias(value_bias_ptr, d, D)[None, :]
            v = activate(v, ACT)
            context = load_slice_columns(
                statistics_ptr + D,
                2 * D + 1,
                first_slice,
                slots,
                slices,
                d,
                D,
                BANDS * GROUPS,
            )
            own = (v * context).to(x_ptr.dtype.element_ty)
            if zero != 0:
                tl.store(statistics_ptr, tl.sum(own.to(tl.float32)))
            gated = gated + (own,)
    tile = tile_rows(i_tile + zero, grid, BANDS, BLOCK_N)
    rows = row_offsets(out_ptr, out_strides, tile, UNIFORM, OUT_LAYOUT)
    for first_e in tl.range(0, end, BLOCK_E):
        e = first_e + no_channels + tl.arange(0, BLOCK_E)  # [BLOCK_E]
        out = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        if FITS:
            out += load_bias(out_bias_ptr, e, D)[None, :]
        for i in tl.static_range(len(VALUE_CHUNKS)):
            d = chunk_channels(VALUE_CHUNKS, i) + no_channels
            out_weight = load_weight(
                out_weight_ptr, e, d, D, EVEN_E, chunk_even(VALUE_CHUNKS, i, D)
            )  # [BLOCK_E, width]
            out = tl.dot(gated[i], out_weight.T, out, input_precision=PRECISION)
        if not FITS:
            out += load_bias(out_bias_ptr, e, D)[None, :]
        store_columns(out_ptr, out_strides, tile, rows, out, e, D, EVEN_E, OUT_LAYOUT)


@triton.jit(do_not_specialize=VARYING)
def value_gate_output_fwd_kernel(
    x_ptr,
    x_strides,
    qkv_weight_ptr,  # [1 + 2 D, D]
    qkv_bias_ptr,
    out_weight_ptr,  # [D, D]
    out_bias_ptr,
    statistics_ptr,  # [S, 2 D + 1]: pooled | context | sum of the dropped weights
    out_ptr,
    out_strides,
    bands,
    tokens,
    width,
    patch_h,
    patch_w,
    tiles,
    band_tiles,
    slices,
    D: tl.constexpr,
    VALUE_CHUNKS: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tokens, width, _ = in_words(tokens, width, D, x_ptr, GROUPS, X_LAYOUT, OUT_LAYOUT)
    # Last tiles first: they were read last, and may still lie in the cache.
    value_gate_output_tile(
        tiles - 1 - tl.program_id(0),
        unknown_zero(),
        x_ptr,
        x_strides,
        qkv_weight_ptr,
        qkv_bias_ptr,
        out_weight_ptr,
        out_bias_ptr,
        statistics_ptr,
        out_ptr,
        out_strides,
        (bands, tokens, width, patch_h, patch_w, band_tiles),
        slices,
        D,
        VALUE_CHUNKS,
        X_LAYOUT,
        OUT_LAYOUT,
        UNIFORM,
        BANDS,
        GROUPS,
        ACT,
        PRECISION,
        BLOCK_N,
        BLOCK_E,
        BLOCK_K,
    )


@triton.jit(do_not_specialize=VARYING)
def slice_fwd_kernel(
    x_ptr,
    x_strides,
    source_ptr,
    source_strides,
    qkv_weight_ptr,  # [1 + 2 D, D]
    qkv_bias_ptr,
    out_weight_ptr,  # [D, D]
    out_bias_ptr,
    mask_ptr,
    mask_strides,
    seed_ptr,
    dropout_p,
    weights_ptr,
    weights_strides,
    statistics_ptr,  # [S, 2 D + 1]: pooled | context | sum of the dropped weights
    out_ptr,
    out_strides,
    bands,
    tokens,
    width,
    source_tokens,
    source_width,
    patch_h,
    patch_w,
    band_tiles,
    split_tiles,
    slices,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    VALUE_CHUNKS: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    SOURCE_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    POOL_STAGES: tl.constexpr,
):
    SLICES: tl.constexpr = BANDS * GROUPS
    tokens, width, _ = in_words(tokens, width, D, x_ptr, GROUPS, X_LAYOUT, OUT_LAYOUT)
    source_tokens, source_width, _ = in_words(
        source_tokens, source_width, D, source_ptr, GROUPS, SOURCE_LAYOUT
    )
    source_grid = (bands, source_tokens, source_width, patch_h, patch_w)
    source = (
        (source_ptr, source_strides),
        (qkv_weight_ptr, qkv_bias_ptr),
        (mask_ptr, mask_strides),
        (seed_ptr, dropout_p),
        (weights_ptr, weights_strides),
    )
    # Programs that share a slice each make its context, and gate a part of its tokens. What several
    # of them store is the same, bit for bit; the weights, which stand where the scores stood, only
    # the first stores.
    i_side = tl.program_id(0)
    i_split = tl.program_id(2) if BANDS == 1 else 0
    first_slice = i_side * SLICES
    slices_of_program = (first_slice, slices, i_split == 0)
    PRODUCTS: tl.constexpr = source_ptr.dtype.element_ty != tl.float32
    finite = False
    if PRODUCTS:
        finite = slice_context_products(
            slices_of_program,
            source,
            source_grid,
            statistics_ptr,
            D,
            CHUNKS,
            SOURCE_LAYOUT,
            UNIFORM,
            BANDS,
            GROUPS,
            BLOCK_N,
            BLOCK_P,
            BLOCK_C,
            POOL_STAGES,
        )
    if not finite:
        tl.debug_barrier()
        slice_context(
            slices_of_program,
            source,
            source_grid,
            statistics_ptr,
            D,
            CHUNKS,
            SOURCE_LAYOUT,
            UNIFORM,
            BANDS,
            GROUPS,
            BLOCK_N,
            16 if PRODUCTS else BLOCK_P,
            16 if PRODUCTS else BLOCK_C,
            1 if PRODUCTS else POOL_STAGES,
        )
    tl.debug_barrier()

    # The tile read last is still near.
    first_tile = i_side
    out_tiles = 1
    if BANDS == 1:
        first_tile = i_side * band_tiles + i_split * split_tiles
        out_tiles = tl.minimum(split_tiles, band_tiles - i_split * split_tiles)
    for i_tile in tl.range(0, out_tiles, disable_licm=True):
        zero = i_tile // out_tiles if BANDS == 1 else unknown_zero()
        value_gate_output_tile(
            first_tile + out_tiles - 1 - i_tile,
            zero,
            x_ptr,
            x_strides,
            qkv_weight_ptr + zero * word_of(x_ptr.dtype),
            qkv_bias_ptr,
            out_weight_ptr + zero * word_of(x_ptr.dtype),
            out_bias_ptr,
            statistics_ptr,
            out_ptr,
            out_strides,
            (bands, tokens, width, patch_h, patch_w, band_tiles),
            slices,
            D,
            VALUE_CHUNKS,
            X_LAYOUT,
            OUT_LAYOUT,
            UNIFORM,
            BANDS,
            GROUPS,
            ACT,
            PRECISION,
            BLOCK_N,
            BLOCK_E,
            BLOCK_K,
        )


@triton.jit
def add_products(acc, chunks, weights, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    # To acc the product of tokens with a weight, both in pieces.
    for i in tl.static_range(len(chunks)):
        weight = weights[i].T if TRANSPOSED else weights[i]
        # Both branches are the same, and become one: the condition says nothing, but that it is
        # another each time, for Triton joins branches of one condition. Without them it sees a
        # product that feeds a product and gives each warp whole rows: of eight warps, four would
        # repeat 64 rows.
        if unknown_zero() == (2 * i + 1 if TRANSPOSED else 2 * i):
            acc = tl.dot(chunks[i], weight, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(chunks[i], weight, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=VARYING)
def value_gate_weights_bwd_kernel(
    grad_out_ptr,
    grad_out_strides,
    x_ptr,
    x_strides,
    qkv_weight_ptr,  # [1 + 2 D, D]
    qkv_bias_ptr,
    out_weight_ptr,  # [D, D]
    statistics_ptr,  # [S, 2 D + 1]: pooled | context | sum of the dropped weights
    grad_v_ptr,
    grad_v_strides,
    partial_ptr,  # [tiles, SLICES, D]: gradient of each context
    weight_partial_ptr,  # [splits, 2, D, D]: gradient of W_V | of W_O
    token_bias_partial_ptr,  # [splits, 2, D]: gradient of b_V | of b_O
    bands,
    tokens,
    width,
    patch_h,
    patch_w,
    tiles,
    band_tiles,
    split_tiles,
    slices,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    GRAD_OUT_LAYOUT: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    GRAD_V_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    EVEN_E: tl.constexpr = D % BLOCK_E == 0
    tokens, width, _ = in_words(tokens, width, D, x_ptr, GROUPS, X_LAYOUT, GRAD_OUT_LAYOUT)
    grid = (bands, tokens, width, patch_h, patch_w, band_tiles)
    i_split, e = program_columns(D, BLOCK_E)  # e: [BLOCK_E]
    value_weights = ()
    out_weights = ()
    grad_value_weights = ()
    grad_out_weights = ()
    for i in tl.static_range(len(CHUNKS)):
        d = chunk_channels(CHUNKS, i)
        value_weight = load_weight(
            qkv_weight_ptr + (1 + D) * D, e, d, D, EVEN_E, chunk_even(CHUNKS, i, D)
        )  # [BLOCK_E, width]
        value_weights = value_weights + (value_weight,)
        out_weight = load_weight(
            out_weight_ptr, d, e, D, chunk_even(CHUNKS, i, D), EVEN_E
        )  # [width, BLOCK_E]
        out_weights = out_weights + (out_weight,)
        zeros = tl.zeros((chunk_width(CHUNKS, i), BLOCK_E), tl.float32)
        grad_value_weights = grad_value_weights + (zeros,)
        grad_out_weights = grad_out_weights + (zeros,)
    # Rows that a thread holds are added tile by tile, all others at the end: of a product's sums it
    # holds rows 8 apart, of what it loads rows half a tile apart or, along tokens, side by side.
    ALONG_TOKENS: tl.constexpr = runs_along(GRAD_OUT_LAYOUT, "tokens")
    LOADED_APART: tl.constexpr = 1 if ALONG_TOKENS else BLOCK_N // 2
    grad_value_bias = tl.zeros((BLOCK_N // 16, 8, BLOCK_E), tl.float32)
    grad_out_bias = tl.zeros((BLOCK_N // 2 // LOADED_APART, LOADED_APART, BLOCK_E), tl.float32)

    first_tile = i_split * split_tiles
    steps = tl.minimum(split_tiles, tiles - first_tile)
    for i_step in tl.range(0, steps, num_stages=STAGES, disable_licm=True):
        # Always 0, which the compiler does not know: what it is added to is worked out for each
        # tile anew, where offsets of every row and channel would be kept.
        zero = tl.multiple_of(i_step >> 30, 16)
        columns = e + zero  # [BLOCK_E]
        tile = tile_rows(first_tile + i_step, grid, BANDS, BLOCK_N, zero)
        x = load_tokens(x_ptr, x_strides, tile, D, CHUNKS, UNIFORM, X_LAYOUT, zero)
        grad_out = load_tokens(
            grad_out_ptr, grad_out_strides, tile, D, CHUNKS, UNIFORM, GRAD_OUT_LAYOUT, zero
        )
        # Always taken. The compiler puts a branch after the loads for the next tile, which are then
        # under way meanwhile, and work that is in none before them.
        if unknown_zero() < 1:
            v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
            grad_gated = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
            grad_gated = add_products(grad_gated, grad_out, out_weights, False, PRECISION)
            v = add_products(v, x, value_weights, True, PRECISION)
            if qkv_bias_ptr is not None:
                v += load_bias(qkv_bias_ptr + 1 + D, columns, D, EVEN_E)[None, :]
            # Rows beyond the tokens hold act(b_V), but their x and gradients are 0.
            gated, grad_v = gate_bwd_tile(
                v,
                grad_gated,
                columns,
                tile,
                statistics_ptr,
                grad_v_ptr,
                grad_v_strides,
                partial_ptr,
                slices,
                D,
                EVEN_E,
                GRAD_V_LAYOUT,
                UNIFORM,
                BANDS,
                GROUPS,
                BANDS * GROUPS,
                ACT,
            )
            grad_value_bias += fold_rows(grad_v, 8)
            rows = row_offsets(grad_out_ptr, grad_out_strides, tile, UNIFORM, GRAD_OUT_LAYOUT)
            own_grad_out = load_columns(
                grad_out_ptr, grad_out_strides, tile, rows, columns, D, EVEN_E, GRAD_OUT_LAYOUT
            )
            grad_out_bias += fold_rows(own_grad_out.to(tl.float32), LOADED_APART)
            if x_ptr.dtype.element_ty == tl.float16:
                # What those rows hold may be infinite there, and infinity times 0 is not 0.
                _grid, _i_tile, _band, _n, inside = tile
                gated = tl.where(inside[:, None], gated, 0.0)
            gated = gated.to(x_ptr.dtype.element_ty)
            grad_v = grad_v.to(x_ptr.dtype.element_ty)
            new_value_weights = ()
            new_out_weights = ()
            for i in tl.static_range(len(CHUNKS)):
                new_value_weights = new_value_weights + (
                    tl.dot(x[i].T, grad_v, grad_value_weights[i], input_precision=PRECISION),
                )
                new_out_weights = new_out_weights + (
                    tl.dot(grad_out[i].T, gated, grad_out_weights[i], input_precision=PRECISION),
                )
            grad_value_weights = new_value_weights
            grad_out_weights = new_out_weights

    # Worked out anew, where the compiler would keep it through the loop.
    no_channels = unknown_zero() * word_of(x_ptr.dtype)
    i_split, e = program_columns(D, BLOCK_E)
    e += no_channels
    token_bias_partial_ptr += i_split.to(tl.int64) * (2 * D)
    tl.store(token_bias_partial_ptr + e, sum_folds(grad_value_bias), mask=e < D)
    tl.store(token_bias_partial_ptr + D + e, sum_folds(grad_out_bias), mask=e < D)
    weight_partial_ptr += i_split.to(tl.int64) * (2 * D * D)
    for i in tl.static_range(len(CHUNKS)):
        d = chunk_channels(CHUNKS, i) + no_channels
        even = chunk_even(CHUNKS, i, D)
        store_weight(weight_partial_ptr, e, d, grad_value_weights[i].T, D, EVEN_E, even)
        store_weight(weight_partial_ptr + D * D, d, e, grad_out_weights[i], D, even, EVEN_E)
