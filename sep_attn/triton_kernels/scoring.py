# mypy: disallow-untyped-defs=False, disable-error-code=assignment
"""Scores, softmax and context of the fused layer: ``p = softmax(x' w_I + b_I)``, after dropout
``p~``, ``xbar = sum_n p~_n x'_n``, ``sigma = sum_n p~_n`` and ``c = W_K xbar + sigma b_K``.

Short slices do this inside :mod:`sep_attn.triton_kernels.fused`, with
:mod:`sep_attn.triton_kernels.contexts`.
For the others the tokens of a band are split over programs (one read of x'), and a second kernel
combines the parts in a fixed order and applies W_K. Backward goes from the context to the pooled
x', the softmax and W_K, one row a slice, and reads x' once more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sep_attn.triton_kernels.contexts import LOWEST, pool_tile, start_pool
from sep_attn.triton_kernels.launch import VARYING, band_offset, by_group, in_words, spread
from sep_attn.triton_kernels.pooling import write_weights
from sep_attn.triton_kernels.tiles import (
    chunk_channels,
    chunk_even,
    draw_dropout,
    load_bias,
    load_tokens,
    load_values,
    load_weight,
    program_columns,
    row_offsets,
    row_slices,
    spread_slices,
    store_columns,
    store_values,
    tile_rows,
    unknown_zero,
    zero_chunks,
)


@triton.jit(do_not_specialize=VARYING)
def score_pool_fwd_kernel(
    source_ptr,
    source_strides,
    qkv_weight_ptr,  # [1 + 2 D, D]
    qkv_bias_ptr,
    mask_ptr,
    mask_strides,
    seed_ptr,
    dropout_p,
    scores_ptr,  # the scores, where the weights will stand
    scores_strides,
    partial_ptr,  # [bands, splits, GROUPS, D + 3]: sum | maximum | total | dropped total
    tokens,
    width,
    patch_h,
    patch_w,
    splits,
    split_tiles,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    SOURCE_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POOL_STAGES: tl.constexpr,
):
    tokens, width, _ = in_words(tokens, width, D, source_ptr, GROUPS, SOURCE_LAYOUT)
    i_band = tl.program_id(0) // splits
    i_split = tl.program_id(0) % splits
    source = (
        (source_ptr, source_strides),
        (qkv_weight_ptr, qkv_bias_ptr),
        (mask_ptr, mask_strides),
        (seed_ptr, dropout_p),
        (scores_ptr, scores_strides),
    )
    pool = start_pool(CHUNKS, GROUPS)
    band_tiles = tl.cdiv(tokens, BLOCK_N)
    last = tl.minimum((i_split + 1) * split_tiles, band_tiles)
    grid = (tl.num_programs(0) // splits, tokens, width, patch_h, patch_w, band_tiles)
    for i_tile in tl.range(i_split * split_tiles, last, num_stages=POOL_STAGES):
        n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        pool = pool_tile(
            pool,
            (grid, i_tile, i_band, n, n < tokens),
            source,
            True,
            D,
            CHUNKS,
            SOURCE_LAYOUT,
            UNIFORM,
            1,
            GROUPS,
        )
    maximum, total, dropped_total, pooled = pool
    if seed_ptr is None:
        dropped_total = total
    part = (i_band.to(tl.int64) * splits + i_split) * GROUPS + tl.arange(0, GROUPS)  # [GROUPS]
    part_offsets = part * (D + 3)
    for i in tl.static_range(len(CHUNKS)):
        d = chunk_channels(CHUNKS, i)
        offsets = part_offsets[:, None] + d[None, :]
        tl.store(partial_ptr + offsets, pooled[i], mask=(d < D)[None, :])
    tl.store(partial_ptr + D + part_offsets, maximum)
    tl.store(partial_ptr + D + 1 + part_offsets, total)
    tl.store(partial_ptr + D + 2 + part_offsets, dropped_total)


@triton.jit(do_not_specialize=VARYING)
def context_combine_kernel(
    partial_ptr,  # [bands, splits, GROUPS, D + 3]
    qkv_weight_ptr,  # [1 + 2 D, D]
    qkv_bias_ptr,
    mask_ptr,
    mask_strides,
    weights_ptr,  # scores on entry
    weights_strides,
    statistics_ptr,  # [S, 2 D + 1]: pooled | context | sum of the dropped weights
    tokens,
    width,
    patch_h,
    patch_w,
    splits,
    parts,
    D: tl.constexpr,
    UNIFORM: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    WEIGHTS_BLOCK: tl.constexpr,
):
    i_band = (tl.program_id(0) // parts).to(tl.int64)
    i_part = tl.program_id(0) % parts
    partial_ptr += i_band * splits * GROUPS * (D + 3)
    rows = splits * GROUPS  # row r is of group r % GROUPS
    i_slice = i_band * GROUPS + tl.arange(0, GROUPS)  # [GROUPS]

    row = tl.arange(0, MOST_SPLITS * GROUPS)
    row_offsets = row.to(tl.int64) * (D + 3)
    row_maximum = tl.load(partial_ptr + D + row_offsets, mask=row < rows, other=float("-inf"))
    maximum = tl.max(by_group(row_maximum, GROUPS), axis=0)  # [GROUPS]
    shift = tl.maximum(maximum, LOWEST)
    rescale = tl.exp(row_maximum - spread(shift, MOST_SPLITS * GROUPS))
    row_total = tl.load(partial_ptr + D + 1 + row_offsets, mask=row < rows, other=0.0)
    total = tl.sum(by_group(row_total * rescale, GROUPS), axis=0)  # [GROUPS]
    divisor = tl.where(maximum == float("-inf"), 1.0, total)
    row_total = tl.load(partial_ptr + D + 2 + row_offsets, mask=row < rows, other=0.0)
    weight_sum = tl.sum(by_group(row_total * rescale, GROUPS), axis=0) / divisor  # [GROUPS]
    if i_part == 0:
        tl.store(statistics_ptr + i_slice * (2 * D + 1) + 2 * D, weight_sum)

    if i_part * BLOCK_E < D:
        first_e = i_part * BLOCK_E
        e = first_e + tl.arange(0, BLOCK_E)  # [BLOCK_E]
        context = tl.zeros((GROUPS, BLOCK_E), tl.float32)
        block_shift = spread(shift, BLOCK_S)  # [BLOCK_S]
        for first_d in range(0, D, BLOCK_D):
            d = first_d + tl.arange(0, BLOCK_D)  # [BLOCK_D]
            acc = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
            for first in range(0, rows, BLOCK_S):
                r = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
                offsets = r.to(tl.int64) * (D + 3)
                block_maximum = tl.load(
                    partial_ptr + D + offsets, mask=r < rows, other=float("-inf")
                )
                partial = tl.load(
                    partial_ptr + offsets[:, None] + d[None, :],
                    mask=(r < rows)[:, None] & (d < D)[None, :],
                    other=0.0,
                )
                acc += partial * tl.exp(block_maximum - block_shift)[:, None]
            pooled = tl.sum(by_group(acc, GROUPS), axis=0) / divisor[:, None]  # [GROUPS, BLOCK_D]
            own = (d >= first_e) & (d < first_e + BLOCK_E) & (d < D)
            offsets = i_slice[:, None] * (2 * D + 1) + d[None, :]
            tl.store(statistics_ptr + offsets, pooled, mask=own[None, :])
            key_weight = load_weight(
                qkv_weight_ptr + D, e, d, D, D % BLOCK_E == 0, D % BLOCK_D == 0
            ).to(tl.float32)  # [BLOCK_E, BLOCK_D]
            context += tl.sum(key_weight[None, :, :] * pooled[:, None, :], axis=2)
        if qkv_bias_ptr is not None:
            context += weight_sum[:, None] * load_bias(qkv_bias_ptr + 1, e, D)[None, :]
        offsets = i_slice[:, None] * (2 * D + 1) + D + e[None, :]
        tl.store(statistics_ptr + offsets, context, mask=(e < D)[None, :])

    if weights_ptr is not None:
        weights_ptr += band_offset(i_band, weights_strides, patch_h, patch_w)
        if mask_ptr is not None:
            mask_ptr += band_offset(i_band, mask_strides, patch_h, patch_w)
        write_weights(
            weights_ptr,
            weights_strides,
            weights_ptr,
            weights_strides,
            mask_ptr,
            mask_strides,
            shift,
            divisor,
            i_part,
            parts,
            tokens,
            width,
            UNIFORM,
            tl.float32,
            WEIGHTS_BLOCK,
        )


# Tiles whose sums are under way together: each is a wait for memory.
TILES_AT_ONCE = tl.constexpr(4)


@triton.jit
def sum_tiles(ptrs, mask, band_tiles, step):
    # Of what lies at ``ptrs`` in the first tile of a band, and ``step`` values further in the next.
    total = tl.zeros(ptrs.shape, tl.float32)
    for first_tile in range(0, band_tiles, TILES_AT_ONCE):
        for i in tl.static_range(TILES_AT_ONCE):
            i_tile = first_tile + i
            total += tl.load(ptrs + i_tile * step, mask=mask & (i_tile < band_tiles), other=0.0)
    return total


@triton.jit(do_not_specialize=VARYING)
def context_bwd_kernel(
    partial_ptr,  # [tiles, ROWS, D]: gradient of each context | and, if SLICES + 2, b_V | b_O
    statistics_ptr,  # [S, 2 D + 1]: pooled | context | sum of the dropped weights
    qkv_weight_ptr,  # [1 + 2 D, D]
    qkv_bias_ptr,
    weights_delta_ptr,  # [S]: sum over the slice of p and its own gradient
    grad_context_ptr,  # [S, D], where a weight wants a gradient
    grad_pooled_ptr,  # [S, D]
    slice_grads_ptr,  # [S, 2]: b_K . dc | sum over the slice of p dp
    bias_partial_ptr,  # [programs / columns, 1 + ROWS - SLICES, D]: gradient of b_K | b_V | b_O
    band_tiles,
    slices,
    D: tl.constexpr,
    SLICES: tl.constexpr,  # of a tile
    ROWS: tl.constexpr,  # SLICES, or two more
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # A program sums the tiles of BLOCK_S slices, which are those of whole tiles, and multiplies by
    # some columns of W_K. The sum of p dp is c . dc, for c is W_K xbar + sigma b_K; how the product
    # is rounded it does not feel.
    EVEN: tl.constexpr = D % BLOCK_E == 0
    i_block, d = program_columns(D, BLOCK_E)  # d: [BLOCK_E]
    i_slice = i_block.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    inside = i_slice < slices
    row_ptrs = partial_ptr + (i_slice // SLICES * band_tiles * ROWS + i_slice % SLICES) * D
    slice_ptrs = statistics_ptr + i_slice * (2 * D + 1)  # [BLOCK_S]

    grad_pooled = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    bias_grad = tl.zeros((BLOCK_S,), tl.float32)
    delta = tl.zeros((BLOCK_S,), tl.float32)
    # Unrolled, the loop would take more registers than there are.
    for first_e in range(0, D + unknown_zero(), BLOCK_E):
        e = first_e + tl.arange(0, BLOCK_E)  # [BLOCK_E]
        mask = inside[:, None] & (e < D)[None, :]
        grad_context = sum_tiles(row_ptrs[:, None] + e[None, :], mask, band_tiles, ROWS * D)
        context = tl.load(slice_ptrs[:, None] + D + e[None, :], mask=mask, other=0.0)
        delta += tl.sum(grad_context * context, axis=1)
        if qkv_bias_ptr is not None:
            bias_grad += tl.sum(grad_context * load_bias(qkv_bias_ptr + 1, e, D)[None, :], axis=1)
        key_weight = load_weight(qkv_weight_ptr + D, e, d, D, EVEN, EVEN).to(tl.float32)
        grad_pooled = tl.dot(grad_context, key_weight, grad_pooled, input_precision=PRECISION)
    columns_inside = d < D
    mask = inside[:, None] & columns_inside[None, :]
    own = i_slice[:, None] * D + d[None, :]  # [BLOCK_S, BLOCK_E]
    tl.store(grad_pooled_ptr + own, grad_pooled, mask=mask)
    if tl.program_id(0) % tl.cdiv(D, BLOCK_E) == 0:
        if weights_delta_ptr is not None:
            delta += tl.load(weights_delta_ptr + i_slice, mask=inside, other=0.0)
        tl.store(slice_grads_ptr + i_slice * 2, bias_grad, mask=inside)
        tl.store(slice_grads_ptr + i_slice * 2 + 1, delta, mask=inside)

    if grad_context_ptr is not None:
        grad_context = sum_tiles(row_ptrs[:, None] + d[None, :], mask, band_tiles, ROWS * D)
        tl.store(grad_context_ptr + own, grad_context, mask=mask)
        weight_sum = tl.load(slice_ptrs + 2 * D, mask=inside, other=0.0)  # [BLOCK_S]
        grad_key_bias = tl.sum(weight_sum[:, None] * grad_context, axis=0)
        BIASES: tl.constexpr = 1 + ROWS - SLICES
        bias_partial_ptr += i_block.to(tl.int64) * (BIASES * D)
        tl.store(bias_partial_ptr + d, grad_key_bias, mask=columns_inside)
        # The other biases have one row a tile, however many of its slices there are.
        side = i_block.to(tl.int64) * (BLOCK_S // SLICES) + tl.arange(0, BLOCK_S // SLICES)
        side_mask = (side * SLICES < slices)[:, None] & columns_inside[None, :]
        for i in tl.static_range(1, BIASES):
            side_ptrs = partial_ptr + (side * band_tiles * ROWS + SLICES + i - 1) * D
            grad_bias = sum_tiles(side_ptrs[:, None] + d[None, :], side_mask, band_tiles, ROWS * D)
            tl.store(bias_partial_ptr + i * D + d, tl.sum(grad_bias, axis=0), mask=columns_inside)


@triton.jit(do_not_specialize=VARYING)
def key_weight_bwd_kernel(
    grad_context_ptr,  # [S, D]
    statistics_ptr,  # [S, 2 D + 1]: pooled | context | sum of the dropped weights
    partial_ptr,  # [splits, D, D]: gradient of W_K
    slices,
    split_tiles,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # The sum over slices of each context's gradient times the slice's pooled tokens.
    columns = tl.cdiv(D, BLOCK_E)
    i_rest, e = program_columns(D, BLOCK_E)  # e: [BLOCK_E], rows of W_K
    d = i_rest % columns * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
    i_split = i_rest // columns
    acc = tl.zeros((BLOCK_E, BLOCK_E), tl.float32)
    last = tl.minimum((i_split + 1) * split_tiles, tl.cdiv(slices, BLOCK_S))
    for i_tile in tl.range(i_split * split_tiles, last):
        i_slice = (i_tile * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)  # [BLOCK_S]
        inside = i_slice < slices
        grad_context = tl.load(
            grad_context_ptr + i_slice[None, :] * D + e[:, None],
            mask=inside[None, :] & (e < D)[:, None],
            other=0.0,
        )  # [BLOCK_E, BLOCK_S]
        pooled = tl.load(
            statistics_ptr + i_slice[:, None] * (2 * D + 1) + d[None, :],
            mask=inside[:, None] & (d < D)[None, :],
            other=0.0,
        )  # [BLOCK_S, BLOCK_E]
        acc = tl.dot(grad_context, pooled, acc, input_precision=PRECISION)
    partial_ptr += i_split.to(tl.int64) * (D * D)
    offsets = e[:, None] * D + d[None, :]  # 32 bits: see MOST_CHANNELS
    tl.store(partial_ptr + offsets, acc, mask=(e < D)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=VARYING)
def source_bwd_kernel(
    source_ptr,
    source_strides,
    score_weight_ptr,  # [D]
    weights_ptr,
    weights_strides,
    seed_ptr,
    dropout_p,
    grad_weights_ptr,
    grad_weights_strides,
    grad_pooled_ptr,  # [S, D]
    slice_grads_ptr,  # [S, 2]: b_K . dc | sum over the slice of p dp
    grad_scores_ptr,
    grad_scores_strides,
    grad_source_ptr,  # where the source is x_prev
    grad_source_strides,
    partial_ptr,  # [programs, D + 1]: sum of ds x' | of ds
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
    SOURCE_LAYOUT: tl.constexpr,
    GRAD_SOURCE_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POOL_STAGES: tl.constexpr,
):
    SLICES: tl.constexpr = BANDS * GROUPS
    tokens, width, _ = in_words(
        tokens, width, D, source_ptr, GROUPS, SOURCE_LAYOUT, GRAD_SOURCE_LAYOUT
    )
    grid = (bands, tokens, width, patch_h, patch_w, band_tiles)
    pid = tl.program_id(0)
    grad_bias = tl.zeros((1,), tl.float32)
    grad_score_weight = zero_chunks(CHUNKS, 1)
    last = tl.minimum((pid + 1) * split_tiles, tiles)
    for i_tile in tl.range(pid * split_tiles, last, num_stages=POOL_STAGES):
        tile = tile_rows(i_tile, grid, BANDS, BLOCK_N)
        weights = load_values(weights_ptr, weights_strides, tile, UNIFORM)  # [BLOCK_N]
        # A weight of 0 takes no gradient, whatever its token holds: a masked one may hold NaN.
        felt = weights != 0.0
        x = load_tokens(source_ptr, source_strides, tile, D, CHUNKS, UNIFORM, SOURCE_LAYOUT)
        felt_x = ()
        for i in tl.static_range(len(CHUNKS)):
            felt_x = felt_x + (tl.where(felt[:, None], x[i], 0.0),)
        first_slice, slots = row_slices(tile, BANDS, GROUPS)
        slice_grads = slice_grads_ptr + (first_slice + slots).to(tl.int64) * 2
        _, _, band, n, inside = tile
        grad = tl.load(slice_grads, mask=inside, other=0.0)  # [BLOCK_N]
        delta = tl.load(slice_grads + 1, mask=inside, other=0.0)
        i_slice = first_slice + tl.arange(0, SLICES)  # [SLICES]
        grad_rows = ()
        for i in tl.static_range(len(CHUNKS)):
            d = chunk_channels(CHUNKS, i)
            grad_pooled = tl.load(
                grad_pooled_ptr + i_slice.to(tl.int64)[:, None] * D + d[None, :],
                mask=(i_slice < slices)[:, None] & (d < D)[None, :],
                other=0.0,
            )  # [SLICES, width]
            grad_row = grad_pooled  # one for all tokens, or one a token
            if SLICES > 1:
                grad_row = spread_slices(grad_pooled, BANDS, GROUPS, BLOCK_N)
            grad += tl.sum(felt_x[i].to(tl.float32) * grad_row, axis=1)
            grad_rows = grad_rows + (grad_row,)
        dropped = weights
        if seed_ptr is not None:
            dropout = draw_dropout(seed_ptr, dropout_p, band, n)
            dropped = weights * dropout
            grad *= dropout
        if grad_weights_ptr is not None:
            grad_weights = load_values(grad_weights_ptr, grad_weights_strides, tile, UNIFORM)
            grad += grad_weights.to(tl.float32)
        grad_scores = tl.where(felt, weights * (grad - delta), 0.0)  # [BLOCK_N]
        store_values(grad_scores_ptr, grad_scores_strides, tile, grad_scores, UNIFORM)
        grad_bias += tl.sum(grad_scores, axis=0)
        # Before the sums over tokens: after them Triton 3.6 takes a value before it is there, and
        # refuses the kernel, where tokens are contiguous and D is cut into 256 and 128.
        if grad_source_ptr is not None:
            rows = row_offsets(
                grad_source_ptr, grad_source_strides, tile, UNIFORM, GRAD_SOURCE_LAYOUT
            )
            for i in tl.static_range(len(CHUNKS)):
                d = chunk_channels(CHUNKS, i)
                score_weight = load_bias(score_weight_ptr, d, D)
                grad_source = tl.where(felt[:, None], dropped[:, None] * grad_rows[i], 0.0)
                grad_source += grad_scores[:, None] * score_weight[None, :]
                store_columns(
                    grad_source_ptr,
                    grad_source_strides,
                    tile,
                    rows,
                    grad_source,
                    d,
                    D,
                    chunk_even(CHUNKS, i, D),
                    GRAD_SOURCE_LAYOUT,
                )
        new_grad = ()
        for i in tl.static_range(len(CHUNKS)):
            products = tl.sum(grad_scores[:, None] * felt_x[i].to(tl.float32), axis=0)[None, :]
            new_grad = new_grad + (grad_score_weight[i] + products,)
        grad_score_weight = new_grad
    partial_ptr += pid.to(tl.int64) * (D + 1)
    for i in tl.static_range(len(CHUNKS)):
        d = chunk_channels(CHUNKS, i)
        tl.store(partial_ptr + d[None, :], grad_score_weight[i], mask=(d < D)[None, :])
    tl.store(partial_ptr + D + tl.arange(0, 1), grad_bias)
