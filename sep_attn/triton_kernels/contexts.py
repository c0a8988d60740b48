# mypy: disallow-untyped-defs=False, disable-error-code=assignment
"""Softmax, pool and context inside a program: a running softmax over tiles of tokens, and from it
the contexts of a program's slices.

In half precision both are products on the tensor cores (:func:`slice_context_products`): attention
with a query for each slice, all of them w_I. In float32, and where a pooled value is not finite,
they are sums on the CUDA cores (:func:`slice_context`): a NaN or an infinity in a token times the
weight 0 of another slice is not 0.

What is pooled they hand about in a tuple of pairs, ``source``: pointer and strides of the tokens;
``qkv_weight_ptr [1 + 2 D, D]`` and ``qkv_bias_ptr``; pointer and strides of the mask; the seed of
dropout and its probability; pointer and strides of the scores, where the weights will stand.
Pointers may be None, but those of the tokens and of the weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sep_attn.triton_kernels.tiles import (
    chunk_channels,
    chunk_even,
    draw_dropout,
    load_bias,
    load_kept,
    load_tokens,
    load_values,
    load_weight,
    row_slices,
    slice_max,
    slice_sum,
    spread_slices,
    store_values,
    tile_rows,
    value_offsets,
    within_bands,
    zero_chunks,
)

# float32's; a maximum of -inf says that no token was kept, a kept score of -inf counts as this.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def start_pool(CHUNKS: tl.constexpr, SLICES: tl.constexpr):
    # A running softmax: maximum, total and total after dropout (0 where there is none) of each
    # slice, [SLICES], and its tokens' sum, a tuple of [SLICES, width of the chunk].
    maximum = tl.full((SLICES,), float("-inf"), tl.float32)
    zeros = tl.zeros((SLICES,), tl.float32)
    return maximum, zeros, zeros, zero_chunks(CHUNKS, SLICES)


@triton.jit
def pool_tile(
    pool,  # of start_pool
    tile,
    source,
    stores_scores,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    SOURCE_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # One step of the running softmax: the tile's scores, stored where they are wanted, and its
    # tokens added to the pool.
    tokens_at, qkv, mask, dropout, scores_at = source
    source_ptr, source_strides = tokens_at
    qkv_weight_ptr, qkv_bias_ptr = qkv
    mask_ptr, _ = mask
    seed_ptr, dropout_p = dropout
    scores_ptr, scores_strides = scores_at
    maximum, total, dropped_total, pooled = pool
    grid, i_tile, band, n, inside = tile
    BLOCK_N: tl.constexpr = n.shape[0]
    x = load_tokens(source_ptr, source_strides, tile, D, CHUNKS, UNIFORM, SOURCE_LAYOUT)
    scores = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.static_range(len(CHUNKS)):
        score_weight = load_bias(qkv_weight_ptr, chunk_channels(CHUNKS, i), D)
        scores += tl.sum(x[i].to(tl.float32) * score_weight[None, :], axis=1)
    if qkv_bias_ptr is not None:
        scores += tl.load(qkv_bias_ptr).to(tl.float32)
    kept = load_kept(mask, tile, UNIFORM)
    if mask_ptr is not None:
        masked = ()
        for i in tl.static_range(len(CHUNKS)):
            masked = masked + (tl.where(kept[:, None], x[i], 0.0),)
        x = masked
    scores = tl.where(kept, scores, float("-inf"))
    if scores_ptr is not None:
        stored = (grid, i_tile, band, n, inside & stores_scores)
        store_values(scores_ptr, scores_strides, stored, scores, UNIFORM)

    candidate = tl.where(kept, tl.maximum(scores, LOWEST), float("-inf"))
    new_maximum = tl.maximum(maximum, slice_max(candidate, BANDS, GROUPS))  # [SLICES]
    shift = tl.maximum(new_maximum, LOWEST)
    rescale = tl.exp(maximum - shift)
    weights = tl.exp(scores - spread_slices(shift, BANDS, GROUPS, BLOCK_N))  # [BLOCK_N]
    total = total * rescale + slice_sum(weights, BANDS, GROUPS)
    if seed_ptr is not None:
        weights *= draw_dropout(seed_ptr, dropout_p, band, n)
        dropped_total = dropped_total * rescale + slice_sum(weights, BANDS, GROUPS)
    new_pooled = ()
    for i in tl.static_range(len(CHUNKS)):
        tile_pooled = slice_sum(weights[:, None] * x[i].to(tl.float32), BANDS, GROUPS)
        new_pooled = new_pooled + (pooled[i] * rescale[:, None] + tile_pooled,)
    return new_maximum, total, dropped_total, new_pooled


@triton.constexpr_function
def slots_of(slices):
    # Rows of the products that make a tile's pool: at least as many as an instruction takes.
    return max(16, slices)


@triton.constexpr_function
def weight_scale(dtype):
    # Keeps the lower halves of small weights above what float16 holds.
    return 2.0**15 if dtype == tl.float16 else 1.0


@triton.jit
def pool_products(
    pool,  # of start_pool, of slots_of(SLICES) slices
    tile,
    first_slot,  # the slot of the tile's first slice
    source,
    score_weights,  # a tuple of [SLOTS, width of the chunk], every row w_I
    stores_scores,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    SOURCE_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # What pool_tile does, in half precision on the tensor cores: attention with a query for each
    # slice. The weights are the sum of two values, a hundred times nearer to them than one. The
    # tokens' sums are ``weight_scale`` times as large, and come before dropout's
    # 1 / (1 - dropout_p). A product carries a NaN or an infinity in a token, a masked one too, to
    # other slices than its own, so that all who read its channel hear of it.
    tokens_at, qkv, mask, dropout, scores_at = source
    source_ptr, source_strides = tokens_at
    _, qkv_bias_ptr = qkv
    seed_ptr, dropout_p = dropout
    scores_ptr, scores_strides = scores_at
    maximum, total, dropped_total, pooled = pool
    _, _, band, n, inside = tile
    SLOTS: tl.constexpr = maximum.shape[0]
    x = load_tokens(source_ptr, source_strides, tile, D, CHUNKS, UNIFORM, SOURCE_LAYOUT)
    scores = tl.zeros((SLOTS, n.shape[0]), tl.float32)
    for i in tl.static_range(len(CHUNKS)):
        scores = tl.dot(score_weights[i], x[i].T, scores)
    if qkv_bias_ptr is not None:
        scores += tl.load(qkv_bias_ptr).to(tl.float32)
    slot = tl.arange(0, SLOTS)
    if scores_ptr is not None:
        ptrs = scores_ptr + value_offsets(scores_strides, tile, UNIFORM)
        tl.store(
            tl.broadcast_to(ptrs[None, :], scores.shape),
            scores,
            mask=(slot == 0)[:, None] & (inside & stores_scores)[None, :],
        )
    kept = load_kept(mask, tile, UNIFORM)
    _, slots = row_slices(tile, BANDS, GROUPS)
    own = kept[None, :] & (slots[None, :] + first_slot == slot[:, None])
    scores = tl.where(own, scores, float("-inf"))

    candidate = tl.where(own, tl.maximum(scores, LOWEST), float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(candidate, axis=1))  # [SLOTS]
    shift = tl.maximum(new_maximum, LOWEST)
    rescale = tl.exp(maximum - shift)
    weights = tl.exp(scores - shift[:, None])  # [SLOTS, BLOCK_N]
    total = total * rescale + tl.sum(weights, axis=1)
    if seed_ptr is not None:
        drawn = draw_dropout(seed_ptr, dropout_p, band, n)
        weights = tl.where((drawn > 0.0)[None, :], weights, 0.0)
        dropped_total = dropped_total * rescale + tl.sum(weights, axis=1)
    weights *= weight_scale(source_ptr.dtype.element_ty)
    high = weights.to(source_ptr.dtype.element_ty)
    low = (weights - high.to(tl.float32)).to(source_ptr.dtype.element_ty)
    new_pooled = ()
    for i in tl.static_range(len(CHUNKS)):
        chunk = tl.dot(high, x[i], pooled[i] * rescale[:, None])
        new_pooled = new_pooled + (tl.dot(low, x[i], chunk),)
    return new_maximum, total, dropped_total, new_pooled


@triton.constexpr_function
def bands_of(rows, block_n, bands):
    # Whole bands in so many rows of a tile, or 1 where they are a part of one.
    return max(1, rows * bands // block_n)


@triton.jit
def part_rows(i_tile, grid, BANDS: tl.constexpr, PART_BANDS: tl.constexpr, ROWS: tl.constexpr):
    # A part of a program's tile of BANDS bands. The last program may have fewer bands, which a tile
    # of a single one does not ask.
    tile = tile_rows(i_tile, grid, PART_BANDS, ROWS)
    if BANDS > 1 and PART_BANDS == 1:
        tile = within_bands(tile)
    return tile


@triton.jit
def store_weights(
    tile,
    shift,  # [BLOCK_P]
    divisor,  # [BLOCK_P]
    source,
    UNIFORM: tl.constexpr,
):
    # The weights in place of the scores.
    _, _, mask, _, scores_at = source
    weights_ptr, weights_strides = scores_at
    kept = load_kept(mask, tile, UNIFORM)
    scores = load_values(weights_ptr, weights_strides, tile, UNIFORM, float("-inf"))
    # Several threads have read each score before one puts a weight in its place.
    tl.debug_barrier()
    weights = tl.where(kept, tl.exp(scores - shift) / divisor, 0.0)
    store_values(weights_ptr, weights_strides, tile, weights, UNIFORM)


@triton.jit
def slice_context(
    slices_of_program,  # first slice, slices of the call, whether the program stores the weights
    source,
    source_grid,
    statistics_ptr,  # [S, 2 D + 1]: pooled | context | sum of the dropped weights
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    SOURCE_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Softmax, pool and context of a program's slices on the CUDA cores, one part of its bands after
    # the other: in float32, and where a pooled value is not finite.
    _tokens_at, qkv, _mask, dropout, scores_at = source
    qkv_weight_ptr, qkv_bias_ptr = qkv
    seed_ptr, _dropout_p = dropout
    weights_ptr, _strides = scores_at
    first_slice, slices, stores_weights = slices_of_program
    bands, tokens, width, patch_h, patch_w = source_grid
    POOL_BANDS: tl.constexpr = bands_of(BLOCK_P, BLOCK_N, BANDS)
    pool_tiles = tl.cdiv(tokens, BLOCK_P // POOL_BANDS)
    source_grid = (bands, tokens, width, patch_h, patch_w, pool_tiles)
    POOL_SLICES: tl.constexpr = POOL_BANDS * GROUPS
    for part in range(0, BANDS // POOL_BANDS):
        i_part = first_slice // POOL_SLICES + part
        i_slice = (i_part * POOL_SLICES + tl.arange(0, POOL_SLICES)).to(tl.int64)
        slice_inside = i_slice < slices
        pool = start_pool(CHUNKS, POOL_SLICES)
        first_tile = i_part * pool_tiles
        for i_tile in tl.range(0, pool_tiles, num_stages=STAGES):
            tile = part_rows(first_tile + i_tile, source_grid, BANDS, POOL_BANDS, BLOCK_P)
            pool = pool_tile(
                pool,
                tile,
                source,
                stores_weights,
                D,
                CHUNKS,
                SOURCE_LAYOUT,
                UNIFORM,
                POOL_BANDS,
                GROUPS,
            )
        maximum, total, dropped_total, pooled = pool
        if seed_ptr is None:
            dropped_total = total
        divisor = tl.where(maximum == float("-inf"), 1.0, total)  # [POOL_SLICES]
        statistics = i_slice * (2 * D + 1)
        tl.store(statistics_ptr + statistics + 2 * D, dropped_total / divisor, mask=slice_inside)
        for i in tl.static_range(len(CHUNKS)):
            d = chunk_channels(CHUNKS, i)
            tl.store(
                statistics_ptr + statistics[:, None] + d[None, :],
                pooled[i] / divisor[:, None],
                mask=slice_inside[:, None] & (d < D)[None, :],
            )
        # What other threads of the program have stored is read from here on.
        tl.debug_barrier()
        if weights_ptr is not None and stores_weights:
            shift = spread_slices(tl.maximum(maximum, LOWEST), POOL_BANDS, GROUPS, BLOCK_P)
            row_divisor = spread_slices(divisor, POOL_BANDS, GROUPS, BLOCK_P)
            for i_tile in range(0, pool_tiles):
                tile = part_rows(first_tile + i_tile, source_grid, BANDS, POOL_BANDS, BLOCK_P)
                store_weights(tile, shift, row_divisor, source, UNIFORM)

    for first_e in tl.range(0, D, BLOCK_C, num_stages=STAGES):
        e = first_e + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        key_weights = ()
        for i in tl.static_range(len(CHUNKS)):
            d = chunk_channels(CHUNKS, i)
            key_weight = load_weight(
                qkv_weight_ptr + D, e, d, D, D % BLOCK_C == 0, chunk_even(CHUNKS, i, D)
            )  # [BLOCK_C, width]
            key_weights = key_weights + (key_weight,)
        key_bias = tl.zeros((BLOCK_C,), tl.float32)
        if qkv_bias_ptr is not None:
            key_bias = load_bias(qkv_bias_ptr + 1, e, D)
        for slot in range(0, BANDS * GROUPS):
            inside_slice = first_slice + slot < slices
            slot_ptr = statistics_ptr + (first_slice + slot).to(tl.int64) * (2 * D + 1)
            weight_sum = tl.load(slot_ptr + 2 * D, mask=inside_slice, other=0.0)
            context = weight_sum * key_bias  # [BLOCK_C]
            for i in tl.static_range(len(CHUNKS)):
                d = chunk_channels(CHUNKS, i)
                row = tl.load(slot_ptr + d, mask=(d < D) & inside_slice, other=0.0)
                context += tl.sum(key_weights[i].to(tl.float32) * row[None, :], axis=1)
            tl.store(slot_ptr + D + e, context, mask=(e < D) & inside_slice)


@triton.jit
def slice_context_products(
    slices_of_program,  # first slice, slices of the call, whether the program stores the weights
    source,
    source_grid,
    statistics_ptr,  # [S, 2 D + 1]: pooled | context | sum of the dropped weights
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    SOURCE_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The same on the tensor cores, for all of a program's slices together. Whether all is finite;
    # where it is not, nothing has been stored but scores.
    tokens_at, qkv, _mask, dropout, scores_at = source
    source_ptr, _strides = tokens_at
    qkv_weight_ptr, qkv_bias_ptr = qkv
    seed_ptr, dropout_p = dropout
    weights_ptr, _strides = scores_at
    first_slice, slices, stores_weights = slices_of_program
    bands, tokens, width, patch_h, patch_w = source_grid
    POOL_BANDS: tl.constexpr = bands_of(BLOCK_P, BLOCK_N, BANDS)
    pool_tiles = tl.cdiv(tokens, BLOCK_P // POOL_BANDS)
    source_grid = (bands, tokens, width, patch_h, patch_w, pool_tiles)
    POOL_SLICES: tl.constexpr = POOL_BANDS * GROUPS
    SLOTS: tl.constexpr = slots_of(BANDS * GROUPS)
    first_tile = first_slice // POOL_SLICES * pool_tiles
    # A tile of several whole bands has all of their tokens.
    steps = 1 if POOL_BANDS == BANDS and BANDS > 1 else BANDS // POOL_BANDS * pool_tiles
    slot = tl.arange(0, SLOTS)
    score_weights = ()
    for i in tl.static_range(len(CHUNKS)):
        d = chunk_channels(CHUNKS, i)
        score_weight = load_weight(
            qkv_weight_ptr, slot * 0, d, D, True, chunk_even(CHUNKS, i, D)
        )  # [SLOTS, width]
        score_weights = score_weights + (score_weight,)
    pool = start_pool(CHUNKS, SLOTS)
    for step in tl.range(0, steps, num_stages=STAGES):
        tile = part_rows(first_tile + step, source_grid, BANDS, POOL_BANDS, BLOCK_P)
        pool = pool_products(
            pool,
            tile,
            step // pool_tiles * POOL_SLICES,
            source,
            score_weights,
            stores_weights,
            D,
            CHUNKS,
            SOURCE_LAYOUT,
            UNIFORM,
            POOL_BANDS,
            GROUPS,
        )
    maximum, total, dropped_total, pooled = pool
    check = tl.zeros((SLOTS,), tl.float32)
    for i in tl.static_range(len(CHUNKS)):
        check += tl.sum(pooled[i] * 0.0, axis=1)
    finite = tl.sum(check, axis=0) == 0.0
    if finite:
        scale = 1.0
        if seed_ptr is None:
            dropped_total = total
        else:
            # As draw_dropout; of a probability that float32 takes for 1, not infinity times 0.
            scale = 1.0 / tl.maximum(1.0 - dropout_p, 2.0**-24)
        i_slice = (first_slice + slot).to(tl.int64)  # [SLOTS]
        inside = (slot < BANDS * GROUPS) & (i_slice < slices)
        row_ptrs = statistics_ptr + i_slice * (2 * D + 1)
        divisor = tl.where(maximum == float("-inf"), 1.0, total)  # [SLOTS]
        weight_sum = dropped_total / divisor * scale
        tl.store(row_ptrs + 2 * D, weight_sum, mask=inside)
        share = 1.0 / (divisor * weight_scale(source_ptr.dtype.element_ty))
        high = ()
        low = ()
        for i in tl.static_range(len(CHUNKS)):
            d = chunk_channels(CHUNKS, i)
            chunk = pooled[i] * share[:, None]
            tl.store(
                row_ptrs[:, None] + d[None, :],
                chunk * scale,
                mask=inside[:, None] & (d < D)[None, :],
            )
            rounded = chunk.to(source_ptr.dtype.element_ty)
            high = high + (rounded,)
            low = low + ((chunk - rounded.to(tl.float32)).to(source_ptr.dtype.element_ty),)
        for first_e in tl.range(0, D, BLOCK_C, num_stages=STAGES):
            e = first_e + tl.arange(0, BLOCK_C)  # [BLOCK_C]
            context = tl.zeros((SLOTS, BLOCK_C), tl.float32)
            for i in tl.static_range(len(CHUNKS)):
                d = chunk_channels(CHUNKS, i)
                key_weight = load_weight(
                    qkv_weight_ptr + D, e, d, D, D % BLOCK_C == 0, chunk_even(CHUNKS, i, D)
                ).T  # [width, BLOCK_C]
                context = tl.dot(high[i], key_weight, context)
                context = tl.dot(low[i], key_weight, context)
            context *= scale
            if qkv_bias_ptr is not None:
                context += weight_sum[:, None] * load_bias(qkv_bias_ptr + 1, e, D)[None, :]
            tl.store(
                row_ptrs[:, None] + D + e[None, :],
                context,
                mask=inside[:, None] & (e < D)[None, :],
            )
        # What other threads of the program have stored is read from here on.
        tl.debug_barrier()
        if weights_ptr is not None and stores_weights:
            shift = tl.maximum(maximum, LOWEST)
            for step in range(0, steps):
                tile = part_rows(first_tile + step, source_grid, BANDS, POOL_BANDS, BLOCK_P)
                _, slots = row_slices(tile, POOL_BANDS, GROUPS)
                first_slot = step // pool_tiles * POOL_SLICES
                own = slots[None, :] + first_slot == slot[:, None]  # [SLOTS, BLOCK_P]
                store_weights(
                    tile,
                    tl.sum(tl.where(own, shift[:, None], 0.0), axis=0),
                    tl.sum(tl.where(own, divisor[:, None], 0.0), axis=0),
                    source,
                    UNIFORM,
                )
    return finite
