# mypy: disallow-untyped-defs=False, disable-error-code=assignment
"""Scores, softmax and context of the fused layer: ``p = softmax(x' w_I + b_I)``, after dropout
``p~``, ``xbar = sum_n p~_n x'_n``, ``sigma = sum_n p~_n`` and ``c = W_K xbar + sigma b_K``.

Short slices do this inside :mod:`sep_attn.triton_kernels.fused`, from the device functions here.
For the others the tokens of a band are split over programs (one read of x'), and a second kernel
combines the parts in a fixed order and applies W_K. Backward reads x' once more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sep_attn.triton_kernels.launch import band_offset, by_group, spread, token_offsets
from sep_attn.triton_kernels.pooling import write_weights
from sep_attn.triton_kernels.tiles import (
    chunk_channels,
    chunk_even,
    chunk_width,
    draw_dropout,
    in_words,
    load_bias,
    load_tokens,
    load_weight,
    row_offsets,
    row_slots,
    slice_max,
    slice_sum,
    spread_slices,
    store_columns,
    tile_rows,
)

# float32's; a maximum of -inf says that no token was kept, a kept score of -inf counts as this.
LOWEST = tl.constexpr(-3.4028234663852886e38)

_VARYING = (
    "bands",
    "tokens",
    "width",
    "tiles",
    "band_tiles",
    "splits",
    "split_tiles",
    "parts",
    "slices",
    "source_strides",
    "mask_strides",
    "weights_strides",
    "grad_scores_strides",
    "grad_weights_strides",
    "grad_source_strides",
)


@triton.jit
def score_tile(
    chunks,
    score_weight_ptr,  # [D]
    score_bias_ptr,
    mask_ptr,
    mask_strides,
    band,
    n,  # [BLOCK_N]
    inside,  # [BLOCK_N]
    width,
    patch_h,
    patch_w,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    # The scores, -inf for tokens left out; which are kept; x with 0 for those left out.
    scores = tl.zeros(n.shape, tl.float32)
    for i in tl.static_range(len(CHUNKS)):
        d = chunk_channels(CHUNKS, i)
        score_weight = load_bias(score_weight_ptr, d, D)
        scores += tl.sum(chunks[i].to(tl.float32) * score_weight[None, :], axis=1)
    if score_bias_ptr is not None:
        scores += tl.load(score_bias_ptr).to(tl.float32)
    kept = inside
    if mask_ptr is not None:
        offsets = band_offset(band, mask_strides, patch_h, patch_w)
        offsets += token_offsets(n, mask_strides, width, UNIFORM)
        kept = inside & (tl.load(mask_ptr + offsets, mask=inside, other=1) == 0)
        masked = ()
        for i in tl.static_range(len(CHUNKS)):
            masked = masked + (tl.where(kept[:, None], chunks[i], 0.0),)
        chunks = masked
    return tl.where(kept, scores, float("-inf")), kept, chunks


@triton.jit
def start_pool(CHUNKS: tl.constexpr, SLICES: tl.constexpr):
    pooled = ()
    for i in tl.static_range(len(CHUNKS)):
        pooled = pooled + (tl.zeros((SLICES, chunk_width(CHUNKS, i)), tl.float32),)
    maximum = tl.full((SLICES,), float("-inf"), tl.float32)
    return maximum, tl.zeros((SLICES,), tl.float32), tl.zeros((SLICES,), tl.float32), pooled


@triton.jit
def pool_tile(
    maximum,  # [SLICES]
    total,  # [SLICES]
    dropped_total,  # [SLICES]
    pooled,  # tuple of [SLICES, width of the chunk]
    chunks,  # tuple of [BLOCK_N, width of the chunk]
    scores,  # [BLOCK_N]
    kept,  # [BLOCK_N]
    dropout,  # [BLOCK_N] or None
    CHUNKS: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # One step of the running softmax.
    BLOCK_N: tl.constexpr = scores.shape[0]
    candidate = tl.where(kept, tl.maximum(scores, LOWEST), float("-inf"))
    new_maximum = tl.maximum(maximum, slice_max(candidate, BANDS, GROUPS))  # [SLICES]
    shift = tl.maximum(new_maximum, LOWEST)
    rescale = tl.exp(maximum - shift)
    weights = tl.exp(scores - spread_slices(shift, BANDS, GROUPS, BLOCK_N))  # [BLOCK_N]
    total = total * rescale + slice_sum(weights, BANDS, GROUPS)
    if dropout is not None:
        weights *= dropout
        dropped_total = dropped_total * rescale + slice_sum(weights, BANDS, GROUPS)
    new_pooled = ()
    for i in tl.static_range(len(CHUNKS)):
        tile_pooled = slice_sum(weights[:, None] * chunks[i].to(tl.float32), BANDS, GROUPS)
        new_pooled = new_pooled + (pooled[i] * rescale[:, None] + tile_pooled,)
    return new_maximum, total, dropped_total, new_pooled


@triton.jit(do_not_specialize=_VARYING)
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
    WORD: tl.constexpr = 128 // source_ptr.dtype.element_ty.primitive_bitwidth
    WIDE: tl.constexpr = SOURCE_LAYOUT == "tokens_wide"
    tokens, width = in_words(tokens, width, WIDE, WORD, GROUPS)
    i_band = tl.program_id(0) // splits
    i_split = tl.program_id(0) % splits
    maximum, total, dropped_total, pooled = start_pool(CHUNKS, GROUPS)
    last = tl.minimum((i_split + 1) * split_tiles, tl.cdiv(tokens, BLOCK_N))
    for i_tile in tl.range(i_split * split_tiles, last, num_stages=POOL_STAGES):
        n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        inside = n < tokens
        rows = row_offsets(
            i_band, n, source_strides, width, patch_h, patch_w, UNIFORM, SOURCE_LAYOUT, WORD
        )
        chunks = load_tokens(
            source_ptr, rows, inside, source_strides, D, CHUNKS, SOURCE_LAYOUT, WORD
        )
        scores, kept, chunks = score_tile(
            chunks,
            qkv_weight_ptr,
            qkv_bias_ptr,
            mask_ptr,
            mask_strides,
            i_band,
            n,
            inside,
            width,
            patch_h,
            patch_w,
            D,
            CHUNKS,
            UNIFORM,
        )
        if scores_ptr is not None:
            offsets = band_offset(i_band, scores_strides, patch_h, patch_w)
            offsets += token_offsets(n, scores_strides, width, UNIFORM)
            tl.store(scores_ptr + offsets, scores, mask=inside)
        dropout = None
        if seed_ptr is not None:
            dropout = draw_dropout(seed_ptr, dropout_p, i_band, n)
        maximum, total, dropped_total, pooled = pool_tile(
            maximum, total, dropped_total, pooled, chunks, scores, kept, dropout, CHUNKS, 1, GROUPS
        )
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


@triton.jit(do_not_specialize=_VARYING)
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


@triton.jit(do_not_specialize=_VARYING)
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
    WORD: tl.constexpr = 128 // source_ptr.dtype.element_ty.primitive_bitwidth
    SLICES: tl.constexpr = BANDS * GROUPS
    WIDE: tl.constexpr = SOURCE_LAYOUT == "tokens_wide" or GRAD_SOURCE_LAYOUT == "tokens_wide"
    tokens, width = in_words(tokens, width, WIDE, WORD, GROUPS)
    pid = tl.program_id(0)
    _, _, grad_bias, grad_score_weight = start_pool(CHUNKS, 1)
    last = tl.minimum((pid + 1) * split_tiles, tiles)
    for i_tile in tl.range(pid * split_tiles, last, num_stages=POOL_STAGES):
        band, n, inside = tile_rows(i_tile, band_tiles, bands, tokens, BANDS, BLOCK_N)
        first_slice = i_tile // band_tiles * SLICES
        offsets = band_offset(band, weights_strides, patch_h, patch_w)
        offsets += token_offsets(n, weights_strides, width, UNIFORM)
        weights = tl.load(weights_ptr + offsets, mask=inside, other=0.0)  # [BLOCK_N]
        # A weight of 0 takes no gradient, whatever its token holds: a masked one may hold NaN.
        felt = weights != 0.0
        rows = row_offsets(
            band, n, source_strides, width, patch_h, patch_w, UNIFORM, SOURCE_LAYOUT, WORD
        )
        chunks = load_tokens(
            source_ptr, rows, inside, source_strides, D, CHUNKS, SOURCE_LAYOUT, WORD
        )
        i_slice = first_slice + row_slots(BANDS, GROUPS, BLOCK_N)  # [BLOCK_N]
        slice_grads = slice_grads_ptr + i_slice.to(tl.int64) * 2
        grad = tl.load(slice_grads, mask=inside, other=0.0)  # [BLOCK_N]
        delta = tl.load(slice_grads + 1, mask=inside, other=0.0)
        slot = first_slice + tl.arange(0, SLICES)  # [SLICES]
        grad_rows = ()
        for i in tl.static_range(len(CHUNKS)):
            d = chunk_channels(CHUNKS, i)
            grad_pooled = tl.load(
                grad_pooled_ptr + slot.to(tl.int64)[:, None] * D + d[None, :],
                mask=(slot < slices)[:, None] & (d < D)[None, :],
                other=0.0,
            )  # [SLICES, width]
            grad_row = grad_pooled  # one for all tokens, or one a token
            if SLICES > 1:
                grad_row = spread_slices(grad_pooled, BANDS, GROUPS, BLOCK_N)
            grad += tl.sum(chunks[i].to(tl.float32) * grad_row, axis=1)
            grad_rows = grad_rows + (grad_row,)
        dropped = weights
        if seed_ptr is not None:
            dropout = draw_dropout(seed_ptr, dropout_p, band, n)
            dropped = weights * dropout
            grad *= dropout
        if grad_weights_ptr is not None:
            offsets = band_offset(band, grad_weights_strides, patch_h, patch_w)
            offsets += token_offsets(n, grad_weights_strides, width, UNIFORM)
            grad += tl.load(grad_weights_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        grad_scores = tl.where(felt, weights * (grad - delta), 0.0)  # [BLOCK_N]
        offsets = band_offset(band, grad_scores_strides, patch_h, patch_w)
        offsets += token_offsets(n, grad_scores_strides, width, UNIFORM)
        tl.store(grad_scores_ptr + offsets, grad_scores, mask=inside)
        grad_bias += tl.sum(grad_scores, axis=0)
        new_grad = ()
        for i in tl.static_range(len(CHUNKS)):
            x = tl.where(felt[:, None], chunks[i], 0.0).to(tl.float32)
            products = tl.sum(grad_scores[:, None] * x, axis=0)[None, :]
            new_grad = new_grad + (grad_score_weight[i] + products,)
        grad_score_weight = new_grad
        if grad_source_ptr is not None:
            rows = row_offsets(
                band,
                n,
                grad_source_strides,
                width,
                patch_h,
                patch_w,
                UNIFORM,
                GRAD_SOURCE_LAYOUT,
                WORD,
            )
            for i in tl.static_range(len(CHUNKS)):
                d = chunk_channels(CHUNKS, i)
                score_weight = load_bias(score_weight_ptr, d, D)
                grad_source = tl.where(felt[:, None], dropped[:, None] * grad_rows[i], 0.0)
                grad_source += grad_scores[:, None] * score_weight[None, :]
                store_columns(
                    grad_source_ptr,
                    grad_source,
                    rows,
                    inside,
                    d,
                    grad_source_strides,
                    D,
                    chunk_even(CHUNKS, i, D),
                    GRAD_SOURCE_LAYOUT,
                    WORD,
                )
    partial_ptr += pid.to(tl.int64) * (D + 1)
    for i in tl.static_range(len(CHUNKS)):
        d = chunk_channels(CHUNKS, i)
        tl.store(partial_ptr + d[None, :], grad_score_weight[i], mask=(d < D)[None, :])
    tl.store(partial_ptr + D + tl.arange(0, 1), grad_bias)
