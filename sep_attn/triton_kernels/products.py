# mypy: disallow-untyped-defs=False
"""Products of tokens with a weight whose epilogue does what else is to be done to the result, and
the gradients of the weights.

``token_product_kernel`` multiplies tokens by a weight, a tile of tokens and of columns a program.
Its epilogue adds the bias (output product), or the bias, activation and gate (value product of wide
layers), or the pool's terms ``p~_n dxbar + ds_n w_I`` (``dx = dv W_V + ...``).
A program that has all columns reads its tokens whole before it writes: dx then lies where dv did,
except in a traced program.
``value_gate_bwd_kernel`` makes ``v = x W_V^T + b_V`` again beside ``dy = g W_O`` and from both, in
one pass, ``dv``, the gated values, and the sums over tokens that give ``dc`` and the gradients of
the biases. ``weight_grad_kernel`` is ``a^T b`` over all tokens, split over programs; the parts are
added in a fixed order. torch's products would need copies where tokens or images lie apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sep_attn.triton_kernels.gating import activate
from sep_attn.triton_kernels.launch import VARYING, in_words
from sep_attn.triton_kernels.tiles import (
    draw_dropout,
    load_bias,
    load_columns,
    load_slice_columns,
    load_slice_row,
    load_values,
    load_weight,
    program_columns,
    row_offsets,
    row_slices,
    slice_sum,
    spread_slices,
    store_columns,
    tile_rows,
    unknown_zero,
)


@triton.jit(do_not_specialize=VARYING)
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
    EVEN_E: tl.constexpr = D % BLOCK_E == 0
    EVEN_K: tl.constexpr = D % BLOCK_K == 0
    tokens, width, _ = in_words(tokens, width, D, a_ptr, GROUPS, A_LAYOUT, OUT_LAYOUT)
    grid = (bands, tokens, width, patch_h, patch_w, band_tiles)
    i_tile, e = program_columns(D, BLOCK_E)  # e: [BLOCK_E]
    tile = tile_rows(i_tile, grid, BANDS, BLOCK_N)
    rows = row_offsets(a_ptr, a_strides, tile, UNIFORM, A_LAYOUT)

    acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for first in tl.range(0, D, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        a = load_columns(a_ptr, a_strides, tile, rows, k, D, EVEN_K, A_LAYOUT)
        if TRANSPOSED:
            b = load_weight(weight_ptr, e, k, D, EVEN_E, EVEN_K).T  # [BLOCK_K, BLOCK_E]
        else:
            b = load_weight(weight_ptr, k, e, D, EVEN_K, EVEN_E)  # [BLOCK_K, BLOCK_E]
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc += load_bias(bias_ptr, e, D)[None, :]
    first_slice, slots = row_slices(tile, BANDS, GROUPS)
    if EPILOGUE == "gate":
        acc = activate(acc, ACT) * load_slice_columns(
            slice_ptr, row_size, first_slice, slots, slices, e, D, BANDS * GROUPS
        )
    if EPILOGUE == "pool":
        weights = load_values(weights_ptr, weights_strides, tile, UNIFORM)  # [BLOCK_N]
        if seed_ptr is not None:
            _, _, band, n, _ = tile
            weights *= draw_dropout(seed_ptr, dropout_p, band, n)
        # Unrolled, the loop would take more registers than there are.
        for slot in range(0, BANDS * GROUPS + unknown_zero()):
            row = load_slice_row(slice_ptr, row_size, first_slice + slot, slices, e, D)
            felt = (slots == slot) & (weights != 0.0)  # a weight of 0 lets no NaN through
            acc += tl.where(felt[:, None], weights[:, None] * row[None, :], 0.0)
        grad_scores = load_values(grad_scores_ptr, grad_scores_strides, tile, UNIFORM)
        acc += grad_scores[:, None] * load_bias(score_weight_ptr, e, D)[None, :]
    # Where a program has all columns out may be a, of which other warps may still read.
    tl.debug_barrier()
    rows = row_offsets(out_ptr, out_strides, tile, UNIFORM, OUT_LAYOUT)
    store_columns(out_ptr, out_strides, tile, rows, acc, e, D, EVEN_E, OUT_LAYOUT)


@triton.jit
def gate_bwd_tile(
    v,  # [BLOCK_N, BLOCK_E]
    grad_gated,  # [BLOCK_N, BLOCK_E]
    e,  # [BLOCK_E]
    tile,
    statistics_ptr,  # [S, 2 D + 1]: pooled | context | sum of the dropped weights
    grad_v_ptr,
    grad_v_strides,
    partial_ptr,  # [tiles, ROWS, D], of which the first SLICES rows: gradient of each context
    slices,
    D: tl.constexpr,
    EVEN_E: tl.constexpr,
    GRAD_V_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    ACT: tl.constexpr,
):
    # Stores dv and the sums over each slice; gives the gated values and dv, both in float32.
    SLICES: tl.constexpr = BANDS * GROUPS
    first_slice, _ = row_slices(tile, BANDS, GROUPS)
    i_slice = first_slice + tl.arange(0, SLICES)  # [SLICES]
    inside = (i_slice < slices)[:, None]
    if not EVEN_E:
        inside = inside & (e < D)[None, :]
    context_ptrs = statistics_ptr + D + i_slice.to(tl.int64)[:, None] * (2 * D + 1) + e[None, :]
    context = tl.load(context_ptrs, mask=inside, other=0.0)  # [SLICES, BLOCK_E]
    if SLICES > 1:
        context = spread_slices(context, BANDS, GROUPS, v.shape[0])  # [BLOCK_N, BLOCK_E]
    active = activate(v, ACT)
    grad_v = grad_gated * context
    if ACT == "relu":
        grad_v = tl.where(v <= 0.0, 0.0, grad_v)
    rows = row_offsets(grad_v_ptr, grad_v_strides, tile, UNIFORM, GRAD_V_LAYOUT)
    store_columns(grad_v_ptr, grad_v_strides, tile, rows, grad_v, e, D, EVEN_E, GRAD_V_LAYOUT)
    _, i_tile, _, _, _ = tile
    i_row = i_tile.to(tl.int64) * ROWS + tl.arange(0, SLICES)  # [SLICES]
    partial_ptrs = partial_ptr + i_row[:, None] * D + e[None, :]
    grad_context = slice_sum(grad_gated * active, BANDS, GROUPS)  # [SLICES, BLOCK_E]
    if EVEN_E:
        tl.store(partial_ptrs, grad_context)
    else:
        tl.store(partial_ptrs, grad_context, mask=(e < D)[None, :])
    return active * context, grad_v


@triton.jit(do_not_specialize=VARYING)
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
    EVEN_E: tl.constexpr = D % BLOCK_E == 0
    EVEN_K: tl.constexpr = D % BLOCK_K == 0
    tokens, width, _ = in_words(tokens, width, D, x_ptr, GROUPS, X_LAYOUT, GRAD_OUT_LAYOUT)
    grid = (bands, tokens, width, patch_h, patch_w, band_tiles)
    i_tile, e = program_columns(D, BLOCK_E)  # e: [BLOCK_E]
    tile = tile_rows(i_tile, grid, BANDS, BLOCK_N)
    x_rows = row_offsets(x_ptr, x_strides, tile, UNIFORM, X_LAYOUT)
    grad_rows = row_offsets(grad_out_ptr, grad_out_strides, tile, UNIFORM, GRAD_OUT_LAYOUT)

    v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    grad_gated = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for first in tl.range(0, D, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        x = load_columns(x_ptr, x_strides, tile, x_rows, k, D, EVEN_K, X_LAYOUT)
        value_weight = load_weight(
            qkv_weight_ptr + (1 + D) * D, e, k, D, EVEN_E, EVEN_K
        )  # [BLOCK_E, BLOCK_K]
        v = tl.dot(x, value_weight.T, v, input_precision=PRECISION)
        grad_out = load_columns(
            grad_out_ptr, grad_out_strides, tile, grad_rows, k, D, EVEN_K, GRAD_OUT_LAYOUT
        )
        out_weight = load_weight(out_weight_ptr, k, e, D, EVEN_K, EVEN_E)  # [BLOCK_K, BLOCK_E]
        grad_gated = tl.dot(grad_out, out_weight, grad_gated, input_precision=PRECISION)

    if qkv_bias_ptr is not None:
        v += load_bias(qkv_bias_ptr + 1 + D, e, D)[None, :]
    SLICES: tl.constexpr = BANDS * GROUPS
    gated, grad_v = gate_bwd_tile(
        v,
        grad_gated,
        e,
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
        SLICES + 2,
        ACT,
    )
    if gated_ptr is not None:
        rows = row_offsets(gated_ptr, gated_strides, tile, UNIFORM, GATED_LAYOUT)
        store_columns(gated_ptr, gated_strides, tile, rows, gated, e, D, EVEN_E, GATED_LAYOUT)
    own_grad_out = load_columns(
        grad_out_ptr, grad_out_strides, tile, grad_rows, e, D, EVEN_E, GRAD_OUT_LAYOUT
    )
    bias_ptrs = partial_ptr + (i_tile.to(tl.int64) * (SLICES + 2) + SLICES) * D + e  # [BLOCK_E]
    tl.store(bias_ptrs, tl.sum(grad_v, axis=0), mask=e < D)
    tl.store(bias_ptrs + D, tl.sum(own_grad_out.to(tl.float32), axis=0), mask=e < D)


@triton.jit(do_not_specialize=VARYING)
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
    EVEN_I: tl.constexpr = D % BLOCK_I == 0
    EVEN_J: tl.constexpr = D % BLOCK_J == 0
    tokens, width, _ = in_words(tokens, width, D, a_ptr, GROUPS, A_LAYOUT, B_LAYOUT)
    grid = (bands, tokens, width, patch_h, patch_w, band_tiles)
    pid = tl.program_id(0)
    i_columns = tl.cdiv(D, BLOCK_I)
    j_columns = tl.cdiv(D, BLOCK_J)
    i = pid % i_columns * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
    j = pid // i_columns % j_columns * BLOCK_J + tl.arange(0, BLOCK_J)  # [BLOCK_J]
    i_split = pid // i_columns // j_columns
    acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    last = tl.minimum((i_split + 1) * split_tiles, tiles)
    for i_tile in tl.range(i_split * split_tiles, last):
        tile = tile_rows(i_tile, grid, BANDS, BLOCK_N)
        rows = row_offsets(a_ptr, a_strides, tile, UNIFORM, A_LAYOUT)
        a = load_columns(a_ptr, a_strides, tile, rows, i, D, EVEN_I, A_LAYOUT)
        rows = row_offsets(b_ptr, b_strides, tile, UNIFORM, B_LAYOUT)
        b = load_columns(b_ptr, b_strides, tile, rows, j, D, EVEN_J, B_LAYOUT)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    offsets = i.to(tl.int64)[:, None] * D + j[None, :]
    partial_ptr += i_split.to(tl.int64) * (D * D)
    tl.store(partial_ptr + offsets, acc, mask=(i < D)[:, None] & (j < D)[None, :])


@triton.jit
def sum_block(
    i_block,
    partial_ptr,  # [splits, values]
    sums_ptr,  # [first_values]
    rest_ptr,  # [values - first_values]
    splits,
    values,
    first_values,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # In a fixed order, so that results are the same bit for bit from run to run.
    value = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = value < values
    acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        ptrs = partial_ptr + split.to(tl.int64)[:, None] * values + value[None, :]
        acc += tl.load(ptrs, mask=(split < splits)[:, None] & inside[None, :], other=0.0)
    sums = tl.sum(acc, axis=0).to(sums_ptr.dtype.element_ty)  # [BLOCK]
    tl.store(sums_ptr + value, sums, mask=value < first_values)
    if rest_ptr is not None:
        rest = value - first_values
        tl.store(rest_ptr + rest, sums, mask=(rest >= 0) & inside)


@triton.jit(do_not_specialize=VARYING)
def sum_parts_kernel(
    partial_ptr,  # [splits, values]
    sums_ptr,  # [first_values]
    rest_ptr,  # [values - first_values]
    splits,
    values,
    first_values,
    second_partial_ptr,  # as the first, or None
    second_sums_ptr,
    second_rest_ptr,
    second_splits,
    second_values,
    second_first_values,
    third_partial_ptr,
    third_sums_ptr,
    third_rest_ptr,
    third_splits,
    third_values,
    third_first_values,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program sums a block of one of up to three tensors.
    i_block = tl.program_id(0)
    blocks = tl.cdiv(values, BLOCK)
    if i_block < blocks:
        sum_block(
            i_block, partial_ptr, sums_ptr, rest_ptr, splits, values, first_values, BLOCK_S, BLOCK
        )
    elif second_partial_ptr is not None:
        i_block -= blocks
        blocks = tl.cdiv(second_values, BLOCK)
        if i_block < blocks:
            sum_block(
                i_block,
                second_partial_ptr,
                second_sums_ptr,
                second_rest_ptr,
                second_splits,
                second_values,
                second_first_values,
                BLOCK_S,
                BLOCK,
            )
        elif third_partial_ptr is not None:
            sum_block(
                i_block - blocks,
                third_partial_ptr,
                third_sums_ptr,
                third_rest_ptr,
                third_splits,
                third_values,
                third_first_values,
                BLOCK_S,
                BLOCK,
            )
