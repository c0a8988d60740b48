# mypy: disallow-untyped-defs=False, disable-error-code=assignment
"""The whole layer where a program can hold whole tokens (``MOST_FUSED_CHANNELS``).

A tile of x is multiplied by W_V, a few columns at a time; these are gated in registers and
multiplied by W_O into sums that never leave them: the gated values do not pass through memory.
Short slices run the scores, the softmax and the context in the same launch: x is read from memory
once (the second time from a cache) and out is written once.

In backward a program keeps a few columns of W_V and W_O and the sums of both gradients for them,
and goes over tiles of x and of the output's gradient, from which it makes values and gate again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sep_attn.triton_kernels.launch import band_offset, token_offsets
from sep_attn.triton_kernels.products import gate_bwd_tile
from sep_attn.triton_kernels.scoring import LOWEST, pool_tile, score_tile, start_pool
from sep_attn.triton_kernels.tiles import (
    activate,
    chunk_channels,
    chunk_even,
    chunk_width,
    draw_dropout,
    in_words,
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
    "pool_tiles",
    "slices",
    "split_tiles",
    "grad_out_strides",
    "grad_v_strides",
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
        out = out + (tl.zeros((BLOCK_N, chunk_width(CHUNKS, i)), tl.float32),)
    for first_e in tl.range(0, D, BLOCK_E):
        e = first_e + tl.arange(0, BLOCK_E)  # [BLOCK_E]
        v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        for i in tl.static_range(len(CHUNKS)):
            d = chunk_channels(CHUNKS, i)
            value_weight = load_weight(
                value_weight_ptr, e, d, D, D % BLOCK_E == 0, chunk_even(CHUNKS, i, D)
            )  # [BLOCK_E, width]
            v = tl.dot(chunks[i], value_weight.T, v, input_precision=PRECISION)
        v += load_bias(value_bias_ptr, e, D)[None, :]
        context = load_slice_columns(
            context_ptr, 2 * D + 1, first_slice, slices, slots, e, D, BANDS * GROUPS, True
        )
        gated = (activate(v, ACT) * context).to(chunks[0].dtype)  # [BLOCK_N, BLOCK_E]
        new_out = ()
        for i in tl.static_range(len(CHUNKS)):
            d = chunk_channels(CHUNKS, i)
            out_weight = load_weight(
                out_weight_ptr, d, e, D, chunk_even(CHUNKS, i, D), D % BLOCK_E == 0
            )  # [width, BLOCK_E]
            new_out = new_out + (tl.dot(gated, out_weight.T, out[i], input_precision=PRECISION),)
        out = new_out
    return out


@triton.jit
def value_gate_output_tile(
    i_tile,
    zero,
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
    chunks = load_tokens(x_ptr, rows, inside, x_strides, D, CHUNKS, X_LAYOUT, WORD, zero * WORD)
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
    band, n, inside = tile_rows(i_tile + zero, band_tiles, bands, tokens, BANDS, BLOCK_N)
    rows = row_offsets(band, n, out_strides, width, patch_h, patch_w, UNIFORM, OUT_LAYOUT, WORD)
    for i in tl.static_range(len(CHUNKS)):
        d = chunk_channels(CHUNKS, i) + zero * WORD
        result = out[i] + load_bias(out_bias_ptr, d, D)[None, :]
        store_columns(
            out_ptr,
            result,
            rows,
            inside,
            d,
            out_strides,
            D,
            chunk_even(CHUNKS, i, D),
            OUT_LAYOUT,
            WORD,
        )


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
    WIDE: tl.constexpr = X_LAYOUT == "tokens_wide" or OUT_LAYOUT == "tokens_wide"
    tokens, width = in_words(tokens, width, WIDE, WORD, GROUPS)
    # Last tiles first: they were read last, and may still lie in the cache.
    value_gate_output_tile(
        tiles - 1 - tl.program_id(0),
        0,
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
    pool_tiles,
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
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    POOL_STAGES: tl.constexpr,
):
    WORD: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    SLICES: tl.constexpr = BANDS * GROUPS
    WIDE: tl.constexpr = X_LAYOUT == "tokens_wide" or OUT_LAYOUT == "tokens_wide"
    tokens, width = in_words(tokens, width, WIDE, WORD, GROUPS)
    WIDE_SOURCE: tl.constexpr = SOURCE_LAYOUT == "tokens_wide"
    source_tokens, source_width = in_words(source_tokens, source_width, WIDE_SOURCE, WORD, GROUPS)
    pid = tl.program_id(0)
    first_slice = pid * SLICES

    # The softmax runs over tiles of BLOCK_P rows, of one band or of several whole ones.
    ROWS: tl.constexpr = BLOCK_N // BANDS
    POOL_BANDS: tl.constexpr = BLOCK_P // ROWS if BLOCK_P > ROWS else 1
    POOL_SLICES: tl.constexpr = POOL_BANDS * GROUPS
    for part in range(0, BANDS // POOL_BANDS):
        i_part = pid * (BANDS // POOL_BANDS) + part
        i_slice = (i_part * POOL_SLICES + tl.arange(0, POOL_SLICES)).to(tl.int64)
        slice_inside = i_slice < slices
        maximum, total, dropped_total, pooled = start_pool(CHUNKS, POOL_SLICES)
        for i_tile in tl.range(0, pool_tiles, num_stages=POOL_STAGES):
            band, n, inside = tile_rows(
                i_part * pool_tiles + i_tile, pool_tiles, bands, source_tokens, POOL_BANDS, BLOCK_P
            )
            rows = row_offsets(
                band,
                n,
                source_strides,
                source_width,
                patch_h,
                patch_w,
                UNIFORM,
                SOURCE_LAYOUT,
                WORD,
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
                POOL_BANDS,
                GROUPS,
            )
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
        if weights_ptr is not None:
            shift = spread_slices(tl.maximum(maximum, LOWEST), POOL_BANDS, GROUPS, BLOCK_P)
            row_divisor = spread_slices(divisor, POOL_BANDS, GROUPS, BLOCK_P)
            for i_tile in range(0, pool_tiles):
                band, n, inside = tile_rows(
                    i_part * pool_tiles + i_tile,
                    pool_tiles,
                    bands,
                    source_tokens,
                    POOL_BANDS,
                    BLOCK_P,
                )
                kept = inside
                if mask_ptr is not None:
                    offsets = band_offset(band, mask_strides, patch_h, patch_w)
                    offsets += token_offsets(n, mask_strides, source_width, UNIFORM)
                    kept = inside & (tl.load(mask_ptr + offsets, mask=inside, other=1) == 0)
                offsets = band_offset(band, weights_strides, patch_h, patch_w)
                offsets += token_offsets(n, weights_strides, source_width, UNIFORM)
                scores = tl.load(weights_ptr + offsets, mask=inside, other=float("-inf"))
                weights = tl.where(kept, tl.exp(scores - shift) / row_divisor, 0.0)
                tl.store(weights_ptr + offsets, weights, mask=inside)

    for first_e in tl.range(0, D, BLOCK_C, num_stages=POOL_STAGES):
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
        for slot in tl.static_range(SLICES):
            inside_slice = first_slice + slot < slices
            slot_ptr = statistics_ptr + (first_slice + slot).to(tl.int64) * (2 * D + 1)
            weight_sum = tl.load(slot_ptr + 2 * D, mask=inside_slice, other=0.0)
            context = weight_sum * key_bias  # [BLOCK_C]
            for i in tl.static_range(len(CHUNKS)):
                d = chunk_channels(CHUNKS, i)
                row = tl.load(slot_ptr + d, mask=(d < D) & inside_slice, other=0.0)
                context += tl.sum(key_weights[i].to(tl.float32) * row[None, :], axis=1)
            tl.store(slot_ptr + D + e, context, mask=(e < D) & inside_slice)
    tl.debug_barrier()

    if BANDS > 1:
        value_gate_output_tile(
            pid,
            0,
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
        return
    for i_tile in range(0, band_tiles):
        # Always 0, which the compiler does not know: addresses of weights and of out are worked out
        # anew where they are needed, for kept until then they do not fit into registers.
        zero = i_tile // band_tiles
        value_gate_output_tile(
            pid * band_tiles + band_tiles - 1 - i_tile,  # the one read last is still near
            zero,
            x_ptr,
            x_strides,
            qkv_weight_ptr + zero * WORD,
            qkv_bias_ptr,
            out_weight_ptr + zero * WORD,
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
    partial_ptr,  # [tiles, SLICES + 2, D]: gradient of each context | of b_V | of b_O
    weight_partial_ptr,  # [splits, 2, D, D]: gradient of W_V | of W_O, transposed both
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
):
    WORD: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    EVEN_E: tl.constexpr = D % BLOCK_E == 0
    WIDE: tl.constexpr = X_LAYOUT == "tokens_wide" or GRAD_OUT_LAYOUT == "tokens_wide"
    tokens, width = in_words(tokens, width, WIDE, WORD, GROUPS)
    # Columns change fastest: the programs of a split read the same tokens, from the cache.
    columns = tl.cdiv(D, BLOCK_E)
    i_split = tl.program_id(0) // columns
    e = tl.program_id(0) % columns * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
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
    value_bias = tl.zeros((BLOCK_E,), tl.float32)
    if qkv_bias_ptr is not None:
        value_bias = load_bias(qkv_bias_ptr + 1 + D, e, D)

    first_tile = i_split * split_tiles
    for i in tl.range(0, tl.minimum(split_tiles, tiles - first_tile)):
        i_tile = first_tile + i
        band, n, inside = tile_rows(i_tile, band_tiles, bands, tokens, BANDS, BLOCK_N)
        rows = row_offsets(band, n, x_strides, width, patch_h, patch_w, UNIFORM, X_LAYOUT, WORD)
        x = load_tokens(x_ptr, rows, inside, x_strides, D, CHUNKS, X_LAYOUT, WORD)
        grad_rows = row_offsets(
            band, n, grad_out_strides, width, patch_h, patch_w, UNIFORM, GRAD_OUT_LAYOUT, WORD
        )
        grad_out = load_tokens(
            grad_out_ptr, grad_rows, inside, grad_out_strides, D, CHUNKS, GRAD_OUT_LAYOUT, WORD
        )
        v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        grad_gated = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        for i in tl.static_range(len(CHUNKS)):
            v = tl.dot(x[i], value_weights[i].T, v, input_precision=PRECISION)
            grad_gated = tl.dot(grad_out[i], out_weights[i], grad_gated, input_precision=PRECISION)
        v += value_bias[None, :]
        # Rows beyond the tokens hold act(b_V), but their x and gradients are 0.
        gated, grad_v = gate_bwd_tile(
            v,
            grad_gated,
            e,
            band,
            n,
            inside,
            i_tile,
            band_tiles,
            slices,
            width,
            patch_h,
            patch_w,
            grad_out_ptr,
            grad_rows,
            grad_out_strides,
            statistics_ptr,
            None,
            None,
            grad_v_ptr,
            grad_v_strides,
            partial_ptr,
            D,
            GRAD_OUT_LAYOUT,
            "",
            GRAD_V_LAYOUT,
            UNIFORM,
            WORD,
            BANDS,
            GROUPS,
            ACT,
            BLOCK_N,
            BLOCK_E,
            True,
        )
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

    weight_partial_ptr += i_split.to(tl.int64) * (2 * D * D)
    for i in tl.static_range(len(CHUNKS)):
        d = chunk_channels(CHUNKS, i)
        mask = (d < D)[:, None] & (e < D)[None, :]
        offsets = d[:, None] * D + e[None, :]
        tl.store(weight_partial_ptr + offsets, grad_value_weights[i], mask=mask)
        tl.store(weight_partial_ptr + D * D + offsets, grad_out_weights[i], mask=mask)
