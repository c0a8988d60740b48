# mypy: disallow-untyped-defs=False
"""Forward of the whole layer where a program can hold whole tokens (D up to 512).

A tile of x is multiplied by W_V a few columns at a time; these are gated in registers and multiplied
by W_O into sums that never leave them, so the gated values do not pass through memory:
``out += (act(x W_V^T + b_V) * c)[:, columns] W_O[:, columns]^T``. Short slices run the scores, the
softmax and the context in the same launch: x is read from memory once (the second time from the
cache) and out is written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sep_attn.triton_kernels.launch import band_offset, token_offsets
from sep_attn.triton_kernels.scoring import LOWEST, pool_tile, score_tile, start_pool
from sep_attn.triton_kernels.tiles import (
    activate,
    draw_dropout,
    load_bias,
    load_slice_columns,
    load_tokens,
    load_weight,
    row_offsets,
    row_slots,
    spread_slices,
    store_columns,
    tile_rows,
)

_VARYING = (
    "bands",
    "tokens",
    "width",
    "source_tokens",
    "source_width",
    "tiles",
    "band_tiles",
    "source_band_tiles",
    "slices",
    "x_strides",
    "source_strides",
    "mask_strides",
    "weights_strides",
    "out_strides",
)


@triton.jit
def value_gate_output(
    chunks,  # tuple of [BLOCK_N, width of the chunk]: x
    qkv_weight_ptr,  # [1 + 2 D, D]
    qkv_bias_ptr,
    out_weight_ptr,  # [D, D]
    context_ptr,  # [S, 2 D + 1], at the context
    first_slice,
    slices,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # act(x W_V^T + b_V) * c, times W_O^T: a tuple of [BLOCK_N, width of the chunk].
    slots = row_slots(BANDS, GROUPS, BLOCK_N)
    value_weight_ptr = qkv_weight_ptr + (1 + D) * D
    value_bias_ptr = qkv_bias_ptr
    if qkv_bias_ptr is not None:
        value_bias_ptr = qkv_bias_ptr + 1 + D
    out = ()
    for i in tl.static_range(len(CHUNKS)):
        out = out + (tl.zeros((BLOCK_N, tl.constexpr(CHUNKS[i])), tl.float32),)
    for first_e in tl.range(0, D, BLOCK_E):
        e = first_e + tl.arange(0, BLOCK_E)  # [BLOCK_E]
        v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        first = 0
        for i in tl.static_range(len(CHUNKS)):
            d = first + tl.arange(0, tl.constexpr(CHUNKS[i]))
            value_weight = load_weight(
                value_weight_ptr, e, d, D, D % BLOCK_E == 0, first + CHUNKS[i] <= D
            )  # [BLOCK_E, width]
            v = tl.dot(chunks[i], value_weight.T, v, input_precision=PRECISION)
            first = first + CHUNKS[i]
        v += load_bias(value_bias_ptr, e, D)[None, :]
        context = load_slice_columns(
            context_ptr, 2 * D + 1, first_slice, slices, slots, e, D, BANDS * GROUPS
        )
        gated = (activate(v, ACT) * context).to(chunks[0].dtype)  # [BLOCK_N, BLOCK_E]
        new_out = ()
        first = 0
        for i in tl.static_range(len(CHUNKS)):
            d = first + tl.arange(0, tl.constexpr(CHUNKS[i]))
            out_weight = load_weight(
                out_weight_ptr, d, e, D, first + CHUNKS[i] <= D, D % BLOCK_E == 0
            )  # [width, BLOCK_E]
            new_out = new_out + (
                tl.dot(gated, out_weight.T, out[i], input_precision=PRECISION),
            )
            first = first + CHUNKS[i]
        out = new_out
    return out


@triton.jit
def value_gate_output_tile(
    i_tile,
    x_ptr,
    x_strides,
    qkv_weight_ptr,
    qkv_bias_ptr,
    out_weight_ptr,
    out_bias_ptr,
    statistics_ptr,
    out_ptr,
    out_strides,
    bands,
    tokens,
    width,
    patch_h,
    patch_w,
    band_tiles,
    slices,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    WORD: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    band, n, inside = tile_rows(i_tile, band_tiles, bands, tokens, BANDS, BLOCK_N)
    rows = row_offsets(band, n, x_strides, width, patch_h, patch_w, UNIFORM, X_LAYOUT, WORD)
    chunks = load_tokens(x_ptr, rows, inside, x_strides, D, CHUNKS, X_LAYOUT, WORD)
    out = value_gate_output(
        chunks,
        qkv_weight_ptr,
        qkv_bias_ptr,
        out_weight_ptr,
        statistics_ptr + D,
        i_tile // band_tiles * (BANDS * GROUPS),
        slices,
        BLOCK_N,
        BLOCK_E,
        D,
        CHUNKS,
        BANDS,
        GROUPS,
        ACT,
        PRECISION,
    )
    rows = row_offsets(band, n, out_strides, width, patch_h, patch_w, UNIFORM, OUT_LAYOUT, WORD)
    first = 0
    for i in tl.static_range(len(CHUNKS)):
        d = first + tl.arange(0, tl.constexpr(CHUNKS[i]))
        result = out[i] + load_bias(out_bias_ptr, d, D)[None, :]
        if first + CHUNKS[i] <= D:
            store_columns(
                out_ptr, result, rows, inside, d, out_strides, D, True, OUT_LAYOUT, WORD
            )
        else:
            store_columns(
                out_ptr, result, rows, inside, d, out_strides, D, False, OUT_LAYOUT, WORD
            )
        first = first + CHUNKS[i]


@triton.jit(do_not_specialize=_VARYING)
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
    CHUNKS: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    WORD: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    # Says to the compiler that rows hold whole groups, and that wide runs hold whole words.
    width = width // GROUPS * GROUPS
    if X_LAYOUT == "tokens_wide" or OUT_LAYOUT == "tokens_wide":
        tokens = tokens // WORD * WORD
        width = width // WORD * WORD
    # Last tiles first: they were read last, and may still lie in the cache.
    value_gate_output_tile(
        tiles - 1 - tl.program_id(0),
        x_ptr,
        x_strides,
        qkv_weight_ptr,
        qkv_bias_ptr,
        out_weight_ptr,
        out_bias_ptr,
        statistics_ptr,
        out_ptr,
        out_strides,
        bands,
        tokens,
        width,
        patch_h,
        patch_w,
        band_tiles,
        slices,
        D,
        CHUNKS,
        X_LAYOUT,
        OUT_LAYOUT,
        UNIFORM,
        BANDS,
        GROUPS,
        ACT,
        PRECISION,
        BLOCK_N,
        BLOCK_E,
    )


@triton.jit(do_not_specialize=_VARYING)
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
    source_band_tiles,
    slices,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
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
):
    WORD: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    SLICES: tl.constexpr = BANDS * GROUPS
    # Says to the compiler that rows hold whole groups, and that wide runs hold whole words.
    width = width // GROUPS * GROUPS
    source_width = source_width // GROUPS * GROUPS
    if X_LAYOUT == "tokens_wide" or OUT_LAYOUT == "tokens_wide":
        tokens = tokens // WORD * WORD
        width = width // WORD * WORD
    if SOURCE_LAYOUT == "tokens_wide":
        source_tokens = source_tokens // WORD * WORD
        source_width = source_width // WORD * WORD
    pid = tl.program_id(0)
    first_slice = pid * SLICES
    i_slice = (first_slice + tl.arange(0, SLICES)).to(tl.int64)  # [SLICES]
    slice_inside = i_slice < slices
    statistics = i_slice * (2 * D + 1)

    maximum, total, dropped_total, pooled = start_pool(CHUNKS, SLICES)
    for i_tile in range(0, source_band_tiles):
        band, n, inside = tile_rows(
            pid * source_band_tiles + i_tile,
            source_band_tiles,
            bands,
            source_tokens,
            BANDS,
            BLOCK_N,
        )
        rows = row_offsets(
            band, n, source_strides, source_width, patch_h, patch_w, UNIFORM, SOURCE_LAYOUT, WORD
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
            band,
            n,
            inside,
            source_width,
            patch_h,
            patch_w,
            D,
            CHUNKS,
            UNIFORM,
        )
        if weights_ptr is not None:
            offsets = band_offset(band, weights_strides, patch_h, patch_w)
            offsets += token_offsets(n, weights_strides, source_width, UNIFORM)
            tl.store(weights_ptr + offsets, scores, mask=inside)
        dropout = None
        if seed_ptr is not None:
            dropout = draw_dropout(seed_ptr, dropout_p, band, n)
        maximum, total, dropped_total, pooled = pool_tile(
            maximum,
            total,
            dropped_total,
            pooled,
            chunks,
            scores,
            kept,
            dropout,
            CHUNKS,
            BANDS,
            GROUPS,
        )
    if seed_ptr is None:
        dropped_total = total
    divisor = tl.where(maximum == float("-inf"), 1.0, total)  # [SLICES]
    tl.store(statistics_ptr + statistics + 2 * D, dropped_total / divisor, mask=slice_inside)
    first = 0
    for i in tl.static_range(len(CHUNKS)):
        d = first + tl.arange(0, tl.constexpr(CHUNKS[i]))
        tl.store(
            statistics_ptr + statistics[:, None] + d[None, :],
            pooled[i] / divisor[:, None],
            mask=slice_inside[:, None] & (d < D)[None, :],
        )
        first = first + CHUNKS[i]
    tl.debug_barrier()  # what other threads of the program have stored is read from here on

    if weights_ptr is not None:
        row_shift = spread_slices(tl.maximum(maximum, LOWEST), BANDS, GROUPS, BLOCK_N)
        row_divisor = spread_slices(divisor, BANDS, GROUPS, BLOCK_N)
        for i_tile in range(0, source_band_tiles):
            band, n, inside = tile_rows(
                pid * source_band_tiles + i_tile,
                source_band_tiles,
                bands,
                source_tokens,
                BANDS,
                BLOCK_N,
            )
            kept = inside
            if mask_ptr is not None:
                offsets = band_offset(band, mask_strides, patch_h, patch_w)
                offsets += token_offsets(n, mask_strides, source_width, UNIFORM)
                kept = inside & (tl.load(mask_ptr + offsets, mask=inside, other=1) == 0)
            offsets = band_offset(band, weights_strides, patch_h, patch_w)
            offsets += token_offsets(n, weights_strides, source_width, UNIFORM)
            scores = tl.load(weights_ptr + offsets, mask=inside, other=float("-inf"))
            weights = tl.where(kept, tl.exp(scores - row_shift) / row_divisor, 0.0)
            tl.store(weights_ptr + offsets, weights, mask=inside)

    for first_e in range(0, D, BLOCK_E):
        e = first_e + tl.arange(0, BLOCK_E)  # [BLOCK_E]
        key_weights = ()
        first = 0
        for i in tl.static_range(len(CHUNKS)):
            d = first + tl.arange(0, tl.constexpr(CHUNKS[i]))
            key_weight = load_weight(
                qkv_weight_ptr + D, e, d, D, D % BLOCK_E == 0, first + CHUNKS[i] <= D
            )  # [BLOCK_E, width]
            key_weights = key_weights + (key_weight,)
            first = first + CHUNKS[i]
        key_bias = tl.zeros((BLOCK_E,), tl.float32)
        if qkv_bias_ptr is not None:
            key_bias = load_bias(qkv_bias_ptr + 1, e, D)
        for slot in tl.static_range(SLICES):
            inside_slice = first_slice + slot < slices
            slot_ptr = statistics_ptr + (first_slice + slot).to(tl.int64) * (2 * D + 1)
            weight_sum = tl.load(slot_ptr + 2 * D, mask=inside_slice, other=0.0)
            context = weight_sum * key_bias  # [BLOCK_E]
            first = 0
            for i in tl.static_range(len(CHUNKS)):
                d = first + tl.arange(0, tl.constexpr(CHUNKS[i]))
                row = tl.load(slot_ptr + d, mask=(d < D) & inside_slice, other=0.0)
                context += tl.sum(key_weights[i].to(tl.float32) * row[None, :], axis=1)
                first = first + CHUNKS[i]
            tl.store(slot_ptr + D + e, context, mask=(e < D) & inside_slice)
    tl.debug_barrier()

    for i_tile in range(0, band_tiles):
        value_gate_output_tile(
            pid * band_tiles + band_tiles - 1 - i_tile,  # the one read last is still near
            x_ptr,
            x_strides,
            qkv_weight_ptr,
            qkv_bias_ptr,
            out_weight_ptr,
            out_bias_ptr,
            statistics_ptr,
            out_ptr,
            out_strides,
            bands,
            tokens,
            width,
            patch_h,
            patch_w,
            band_tiles,
            slices,
            D,
            CHUNKS,
            X_LAYOUT,
            OUT_LAYOUT,
            UNIFORM,
            BANDS,
            GROUPS,
            ACT,
            PRECISION,
            BLOCK_N,
            BLOCK_E,
        )
