# mypy: disallow-untyped-defs=False
"""Products of tokens with a weight whose epilogue does what else is to be done to the result, and
the gradients of the weights.

``token_product_kernel`` multiplies tokens by a weight, a tile of tokens and of columns a program.
Its epilogue adds the bias (output product), or the bias, activation and gate (value product of wide
layers), or the pool's terms ``p~_n dxbar + ds_n w_I`` (``dx = dv W_V + ...``).
``value_gate_bwd_kernel`` makes ``v = x W_V^T + b_V`` again beside ``dy = g W_O`` and from both, in
one pass, ``dv``, the gated values, and the sums over tokens that give ``dc`` and the gradients of
the biases. ``weight_grad_kernel`` is ``a^T b`` over all tokens, split over programs; the parts are
added in a fixed order. torch's products would need copies where tokens or images lie apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sep_attn.triton_kernels.launch import band_offset, token_offsets
from sep_attn.triton_kernels.tiles import (
    activate,
    draw_dropout,
    in_words,
    load_bias,
    load_columns,
    load_slice_columns,
    load_slice_row,
    load_weight,
    row_offsets,
    row_slots,
    store_columns,
    tile_rows,
)

_VARYING = (
    "bands",
    "tokens",
    "width",
    "tiles",
    "band_tiles",
    "slices",
    "splits",
    "split_tiles",
    "row_size",
    "a_strides",
    "b_strides",
    "x_strides",
    "out_strides",
    "weights_strides",
    "grad_scores_strides",
    "grad_out_strides",
    "gated_strides",
    "grad_v_strides",
)


@triton.jit(do_not_specialize=_VARYING)
def token_product_kernel(
    a_ptr,
    a_strides,
    weight_ptr,  # [D, D], row e of column k (TRANSPOSED) or row k of column e
    bias_ptr,
    slice_ptr,  # "gate": the context; "pool": the gradient of the pooled source; row_size a slice
    row_size,
    weights_ptr,  # "pool": softmax weights
    weights_strides,
    grad_scores_ptr,  # "pool"
    grad_scores_strides,
    score_weight_ptr,  # "pool": [D]
    seed_ptr,
    dropout_p,
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
    A_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    WORD: tl.constexpr = 128 // a_ptr.dtype.element_ty.primitive_bitwidth
    EVEN_E: tl.constexpr = D % BLOCK_E == 0
    EVEN_K: tl.constexpr = D % BLOCK_K == 0
    WIDE: tl.constexpr = A_LAYOUT == "tokens_wide" or OUT_LAYOUT == "tokens_wide"
    tokens, width = in_words(tokens, width, WIDE, WORD, GROUPS)
    columns = tl.cdiv(D, BLOCK_E)
    i_tile = tl.program_id(0) // columns
    e = tl.program_id(0) % columns * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
    band, n, inside = tile_rows(i_tile, band_tiles, bands, tokens, BANDS, BLOCK_N)
    rows = row_offsets(band, n, a_strides, width, patch_h, patch_w, UNIFORM, A_LAYOUT, WORD)

    acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for first in tl.range(0, D, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        a = load_columns(a_ptr, rows, inside, k, a_strides, D, EVEN_K, A_LAYOUT, WORD)
        if TRANSPOSED:
            b = load_weight(weight_ptr, e, k, D, EVEN_E, EVEN_K).T  # [BLOCK_K, BLOCK_E]
        else:
            b = load_weight(weight_ptr, k, e, D, EVEN_K, EVEN_E)  # [BLOCK_K, BLOCK_E]
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc += load_bias(bias_ptr, e, D)[None, :]
    first_slice = i_tile // band_tiles * (BANDS * GROUPS)
    slots = row_slots(BANDS, GROUPS, BLOCK_N)  # [BLOCK_N]
    if EPILOGUE == "gate":
        acc = activate(acc, ACT)
        for slot in range(0, BANDS * GROUPS):
            row = load_slice_row(slice_ptr, row_size, first_slice + slot, slices, e, D)
            acc = tl.where((slots == slot)[:, None], acc * row[None, :], acc)
    if EPILOGUE == "pool":
        offsets = band_offset(band, weights_strides, patch_h, patch_w)
        offsets += token_offsets(n, weights_strides, width, UNIFORM)
        weights = tl.load(weights_ptr + offsets, mask=inside, other=0.0)  # [BLOCK_N]
        if seed_ptr is not None:
            weights *= draw_dropout(seed_ptr, dropout_p, band, n)
        for slot in range(0, BANDS * GROUPS):
            row = load_slice_row(slice_ptr, row_size, first_slice + slot, slices, e, D)
            felt = (slots == slot) & (weights != 0.0)  # a weight of 0 lets no NaN through
            acc += tl.where(felt[:, None], weights[:, None] * row[None, :], 0.0)
        offsets = band_offset(band, grad_scores_strides, patch_h, patch_w)
        offsets += token_offsets(n, grad_scores_strides, width, UNIFORM)
        grad_scores = tl.load(grad_scores_ptr + offsets, mask=inside, other=0.0)
        acc += grad_scores[:, None] * load_bias(score_weight_ptr, e, D)[None, :]
    rows = row_offsets(band, n, out_strides, width, patch_h, patch_w, UNIFORM, OUT_LAYOUT, WORD)
    store_columns(out_ptr, acc, rows, inside, e, out_strides, D, EVEN_E, OUT_LAYOUT, WORD)


@triton.jit
def gate_bwd_tile(
    v,  # [BLOCK_N, BLOCK_E]
    grad_gated,  # [BLOCK_N, BLOCK_E]
    e,  # [BLOCK_E]
    band,
    n,  # [BLOCK_N]
    inside,  # [BLOCK_N]
    i_tile,
    band_tiles,
    slices,
    width,
    patch_h,
    patch_w,
    grad_out_ptr,
    grad_rows,  # [BLOCK_N], offsets
    grad_out_strides,
    statistics_ptr,  # [S, 2 D + 1]: pooled | context | sum of the dropped weights
    gated_ptr,
    gated_strides,
    grad_v_ptr,
    grad_v_strides,
    partial_ptr,  # [tiles, SLICES + 2, D]: gradient of each context | of b_V | of b_O
    D: tl.constexpr,
    GRAD_OUT_LAYOUT: tl.constexpr,
    GATED_LAYOUT: tl.constexpr,
    GRAD_V_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    WORD: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNROLL: tl.constexpr,  # inside a loop that is to be pipelined
):
    # Stores dv, the tile's sums and, where they are wanted, the gated values; gives these and dv.
    SLICES: tl.constexpr = BANDS * GROUPS
    EVEN_E: tl.constexpr = D % BLOCK_E == 0
    slots = row_slots(BANDS, GROUPS, BLOCK_N)
    first_slice = i_tile // band_tiles * SLICES
    context = load_slice_columns(
        statistics_ptr + D, 2 * D + 1, first_slice, slices, slots, e, D, SLICES, UNROLL
    )  # [BLOCK_N or 1, BLOCK_E]
    active = activate(v, ACT)
    if gated_ptr is not None:
        rows = row_offsets(
            band, n, gated_strides, width, patch_h, patch_w, UNIFORM, GATED_LAYOUT, WORD
        )
        gated = active * context
        store_columns(
            gated_ptr, gated, rows, inside, e, gated_strides, D, EVEN_E, GATED_LAYOUT, WORD
        )
    grad_v = grad_gated * context
    if ACT == "relu":
        grad_v = tl.where(v <= 0.0, 0.0, grad_v)
    stored_grad_v = grad_v.to(grad_v_ptr.dtype.element_ty)
    rows = row_offsets(
        band, n, grad_v_strides, width, patch_h, patch_w, UNIFORM, GRAD_V_LAYOUT, WORD
    )
    store_columns(
        grad_v_ptr, stored_grad_v, rows, inside, e, grad_v_strides, D, EVEN_E, GRAD_V_LAYOUT, WORD
    )
    partial_ptr += i_tile.to(tl.int64) * ((SLICES + 2) * D)
    grad_context = grad_gated * active
    for slot in tl.static_range(SLICES):
        own = grad_context
        if SLICES > 1:
            own = tl.where((slots == slot)[:, None], grad_context, 0.0)
        tl.store(partial_ptr + slot * D + e, tl.sum(own, axis=0), mask=e < D)
    tl.store(partial_ptr + SLICES * D + e, tl.sum(grad_v, axis=0), mask=e < D)
    grad_out = load_columns(
        grad_out_ptr, grad_rows, inside, e, grad_out_strides, D, EVEN_E, GRAD_OUT_LAYOUT, WORD
    )
    grad_bias = tl.sum(grad_out.to(tl.float32), axis=0)
    tl.store(partial_ptr + (SLICES + 1) * D + e, grad_bias, mask=e < D)
    return (active * context).to(grad_v_ptr.dtype.element_ty), stored_grad_v


@triton.jit(do_not_specialize=_VARYING)
def value_gate_bwd_kernel(
    grad_out_ptr,
    grad_out_strides,
    x_ptr,
    x_strides,
    qkv_weight_ptr,  # [1 + 2 D, D]
    qkv_bias_ptr,
    out_weight_ptr,  # [D, D]
    statistics_ptr,  # [S, 2 D + 1]: pooled | context | sum of the dropped weights
    gated_ptr,
    gated_strides,
    grad_v_ptr,
    grad_v_strides,
    partial_ptr,  # [tiles, SLICES + 2, D]: gradient of each context | of b_V | of b_O
    bands,
    tokens,
    width,
    patch_h,
    patch_w,
    tiles,
    band_tiles,
    slices,
    D: tl.constexpr,
    GRAD_OUT_LAYOUT: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    GATED_LAYOUT: tl.constexpr,
    GRAD_V_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    WORD: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    EVEN_E: tl.constexpr = D % BLOCK_E == 0
    EVEN_K: tl.constexpr = D % BLOCK_K == 0
    WIDE: tl.constexpr = X_LAYOUT == "tokens_wide" or GRAD_OUT_LAYOUT == "tokens_wide"
    tokens, width = in_words(tokens, width, WIDE, WORD, GROUPS)
    columns = tl.cdiv(D, BLOCK_E)
    i_tile = tl.program_id(0) // columns
    e = tl.program_id(0) % columns * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
    band, n, inside = tile_rows(i_tile, band_tiles, bands, tokens, BANDS, BLOCK_N)
    x_rows = row_offsets(band, n, x_strides, width, patch_h, patch_w, UNIFORM, X_LAYOUT, WORD)
    grad_rows = row_offsets(
        band, n, grad_out_strides, width, patch_h, patch_w, UNIFORM, GRAD_OUT_LAYOUT, WORD
    )

    v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    grad_gated = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for first in tl.range(0, D, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        x = load_columns(x_ptr, x_rows, inside, k, x_strides, D, EVEN_K, X_LAYOUT, WORD)
        value_weight = load_weight(
            qkv_weight_ptr + (1 + D) * D, e, k, D, EVEN_E, EVEN_K
        )  # [BLOCK_E, BLOCK_K]
        v = tl.dot(x, value_weight.T, v, input_precision=PRECISION)
        grad_out = load_columns(
            grad_out_ptr, grad_rows, inside, k, grad_out_strides, D, EVEN_K, GRAD_OUT_LAYOUT, WORD
        )
        out_weight = load_weight(out_weight_ptr, k, e, D, EVEN_K, EVEN_E)  # [BLOCK_K, BLOCK_E]
        grad_gated = tl.dot(grad_out, out_weight, grad_gated, input_precision=PRECISION)

    if qkv_bias_ptr is not None:
        v += load_bias(qkv_bias_ptr + 1 + D, e, D)[None, :]
    gate_bwd_tile(
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
        gated_ptr,
        gated_strides,
        grad_v_ptr,
        grad_v_strides,
        partial_ptr,
        D,
        GRAD_OUT_LAYOUT,
        GATED_LAYOUT,
        GRAD_V_LAYOUT,
        UNIFORM,
        WORD,
        BANDS,
        GROUPS,
        ACT,
        BLOCK_N,
        BLOCK_E,
        False,
    )


@triton.jit(do_not_specialize=_VARYING)
def weight_grad_kernel(
    a_ptr,
    a_strides,
    b_ptr,
    b_strides,
    partial_ptr,  # [splits, D, D]: sum over the split of a^T b
    bands,
    tokens,
    width,
    patch_h,
    patch_w,
    tiles,
    band_tiles,
    split_tiles,
    D: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    WORD: tl.constexpr = 128 // a_ptr.dtype.element_ty.primitive_bitwidth
    EVEN_I: tl.constexpr = D % BLOCK_I == 0
    EVEN_J: tl.constexpr = D % BLOCK_J == 0
    WIDE: tl.constexpr = A_LAYOUT == "tokens_wide" or B_LAYOUT == "tokens_wide"
    tokens, width = in_words(tokens, width, WIDE, WORD, GROUPS)
    pid = tl.program_id(0)
    i_columns = tl.cdiv(D, BLOCK_I)
    j_columns = tl.cdiv(D, BLOCK_J)
    i = pid % i_columns * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
    j = pid // i_columns % j_columns * BLOCK_J + tl.arange(0, BLOCK_J)  # [BLOCK_J]
    i_split = pid // i_columns // j_columns
    acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    last = tl.minimum((i_split + 1) * split_tiles, tiles)
    for i_tile in tl.range(i_split * split_tiles, last):
        band, n, inside = tile_rows(i_tile, band_tiles, bands, tokens, BANDS, BLOCK_N)
        rows = row_offsets(band, n, a_strides, width, patch_h, patch_w, UNIFORM, A_LAYOUT, WORD)
        a = load_columns(a_ptr, rows, inside, i, a_strides, D, EVEN_I, A_LAYOUT, WORD)
        rows = row_offsets(band, n, b_strides, width, patch_h, patch_w, UNIFORM, B_LAYOUT, WORD)
        b = load_columns(b_ptr, rows, inside, j, b_strides, D, EVEN_J, B_LAYOUT, WORD)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    offsets = i.to(tl.int64)[:, None] * D + j[None, :]
    partial_ptr += i_split.to(tl.int64) * (D * D)
    tl.store(partial_ptr + offsets, acc, mask=(i < D)[:, None] & (j < D)[None, :])


@triton.jit(do_not_specialize=_VARYING)
def sum_parts_kernel(
    partial_ptr,  # [splits, values]
    sums_ptr,  # [values]
    splits,
    values,
    BLOCK: tl.constexpr,
):
    # In a fixed order, so that results are the same bit for bit from run to run.
    value = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = value < values
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, splits):
        acc += tl.load(partial_ptr + value, mask=inside, other=0.0)
        partial_ptr += values
    tl.store(sums_ptr + value, acc.to(sums_ptr.dtype.element_ty), mask=inside)
