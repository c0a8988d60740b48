# mypy: disallow-untyped-defs=False
"""Context pool in Triton: the softmax of the scores and the weighted sum of the tokens, one pass.

Equation 3 of Mehta and Rastegari (2022) in the pooled form: with ``p = softmax(scores)`` over the
tokens of a slice and ``p~ = p * dropout_scale``, ``pooled = sum_n p~_n x_n`` and
``weight_sum = sum_n p~_n``. Where there are few slices their tokens are split over programs; the
parts are combined in a fixed order, so results are the same bit for bit from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sep_attn.layout import accumulate_dtype, num_channels
from sep_attn.triton_kernels import tracing
from sep_attn.triton_kernels.launch import (
    ACCUMULATE,
    COMBINE_CHANNELS,
    COMBINE_ROWS,
    PROGRAMS,
    VARYING,
    Launch,
    Operands,
    Plan,
    band_offset,
    by_group,
    in_words,
    matrix_offsets,
    planned,
    run,
    shifted,
    split_tokens,
    spread,
    tile_offsets,
    tile_shape,
    token_offsets,
)

# Tokens whose weights a program normalises at a time: at least one for each of its threads, so that
# where weights take the place of scores the thread that stores one has read the other.
WEIGHTS_BLOCK = 1024


@triton.jit
def load_scores(
    scores_ptr,
    scores_strides,
    mask_ptr,
    mask_strides,
    n,  # [BLOCK_N]
    inside,  # [BLOCK_N]
    width,
    UNIFORM: tl.constexpr,
    ACC: tl.constexpr,
):
    offsets = token_offsets(n, scores_strides, width, UNIFORM)
    scores = tl.load(scores_ptr + offsets, mask=inside, other=0.0).to(ACC)  # [BLOCK_N]
    kept = inside
    if mask_ptr is not None:
        offsets = token_offsets(n, mask_strides, width, UNIFORM)
        kept = inside & (tl.load(mask_ptr + offsets, mask=inside, other=1) == 0)  # [BLOCK_N]
    return tl.where(kept, scores, float("-inf")), kept


@triton.jit
def write_weights(
    weights_ptr,
    weights_strides,
    scores_ptr,
    scores_strides,
    mask_ptr,
    mask_strides,
    shift,  # [GROUPS]
    divisor,  # [GROUPS]
    first,
    step,
    tokens,
    width,
    UNIFORM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    shift = spread(shift, BLOCK)
    divisor = spread(divisor, BLOCK)
    for i_block in range(first, tl.cdiv(tokens, BLOCK), step):
        n = i_block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        inside = n < tokens
        scores, kept = load_scores(
            scores_ptr,
            scores_strides,
            mask_ptr,
            mask_strides,
            n,
            inside,
            width,
            UNIFORM,
            ACC,
        )
        weights = tl.where(kept, tl.exp(scores - shift) / divisor, 0.0)
        offsets = token_offsets(n, weights_strides, width, UNIFORM)
        tl.store(weights_ptr + offsets, weights, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def context_pool_fwd_kernel(
    x_ptr,
    x_strides,
    scores_ptr,
    scores_strides,
    mask_ptr,
    mask_strides,
    dropout_ptr,
    dropout_strides,
    pooled_ptr,  # [S, D]
    weight_sum_ptr,  # [S]
    weights_ptr,
    weights_strides,
    partial_ptr,  # [bands, splits, GROUPS, D + 3]: sum | maximum | total | dropped total
    bands,
    tokens,
    width,
    channels,
    patch_h,
    patch_w,
    splits,
    split_tiles,
    X_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    GROUPS: tl.constexpr,
    ACC: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WEIGHTS_BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    i_band = pid % bands
    i_split = pid // bands % splits
    i_tile = pid // bands // splits
    channel_tiles = tl.cdiv(channels, BLOCK_D)
    tokens, width, channels = in_words(tokens, width, channels, x_ptr, GROUPS, X_LAYOUT)

    x_offset = band_offset(i_band, x_strides, patch_h, patch_w)
    scores_ptr += band_offset(i_band, scores_strides, patch_h, patch_w)
    if mask_ptr is not None:
        mask_ptr += band_offset(i_band, mask_strides, patch_h, patch_w)
    if dropout_ptr is not None:
        dropout_ptr += band_offset(i_band, dropout_strides, patch_h, patch_w)
    d = i_tile * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    d_inside = d < channels

    # Every row of the tile runs a softmax of its own: threads exchange nothing inside the loop.
    maximum = tl.full((BLOCK_N,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    dropped_total = tl.zeros((BLOCK_N,), ACC)
    acc = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    last = tl.minimum((i_split + 1) * split_tiles, tl.cdiv(tokens, BLOCK_N))
    for i_block in range(i_split * split_tiles, last):
        n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        inside = n < tokens
        x_offsets = tile_offsets(x_ptr, x_offset, n, d, x_strides, width, UNIFORM, X_LAYOUT)
        x_mask = inside[:, None] & d_inside[None, :]
        x = tl.load(x_ptr + x_offsets, mask=x_mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        scores, kept = load_scores(
            scores_ptr,
            scores_strides,
            mask_ptr,
            mask_strides,
            n,
            inside,
            width,
            UNIFORM,
            ACC,
        )
        # A maximum of -inf says that no token was kept; a kept score of -inf counts as LOWEST.
        candidate = tl.where(kept, tl.maximum(scores, LOWEST), float("-inf"))
        new_maximum = tl.maximum(maximum, candidate)
        shift = tl.maximum(new_maximum, LOWEST)
        rescale = tl.exp(maximum - shift)
        weights = tl.exp(scores - shift)  # [BLOCK_N]
        maximum = new_maximum
        total = total * rescale + weights
        if dropout_ptr is not None:
            dropout_offsets = token_offsets(n, dropout_strides, width, UNIFORM)
            weights *= tl.load(dropout_ptr + dropout_offsets, mask=inside, other=0.0)
            dropped_total = dropped_total * rescale + weights
        if mask_ptr is not None:
            x = tl.where(kept[:, None], x, 0.0)
        acc = acc * rescale[:, None] + weights[:, None] * x.to(ACC)

    split_maximum = tl.max(by_group(maximum, GROUPS), axis=0)  # [GROUPS]
    shift = tl.maximum(split_maximum, LOWEST)
    rescale = tl.exp(maximum - spread(shift, BLOCK_N))  # [BLOCK_N]
    split_total = tl.sum(by_group(total * rescale, GROUPS), axis=0)  # [GROUPS]
    split_dropped_total = split_total
    if dropout_ptr is not None:
        split_dropped_total = tl.sum(by_group(dropped_total * rescale, GROUPS), axis=0)
    pooled = tl.sum(by_group(acc * rescale[:, None], GROUPS), axis=0)  # [GROUPS, BLOCK_D]

    group = tl.arange(0, GROUPS)
    if splits == 1:
        divisor = tl.where(split_maximum == float("-inf"), 1.0, split_total)
        i_slice = (i_band * GROUPS + group).to(tl.int64)  # [GROUPS]
        pooled_offsets = i_slice[:, None] * channels + d[None, :]
        tl.store(pooled_ptr + pooled_offsets, pooled / divisor[:, None], mask=d_inside[None, :])
        if i_tile == 0:
            tl.store(weight_sum_ptr + i_slice, split_dropped_total / divisor)
        weights_ptr += band_offset(i_band, weights_strides, patch_h, patch_w)
        write_weights(
            weights_ptr,
            weights_strides,
            scores_ptr,
            scores_strides,
            mask_ptr,
            mask_strides,
            shift,
            divisor,
            i_tile,
            channel_tiles,
            tokens,
            width,
            UNIFORM,
            ACC,
            WEIGHTS_BLOCK,
        )
    else:
        row = (i_band.to(tl.int64) * splits + i_split) * GROUPS + group  # [GROUPS]
        row_offsets = row * (channels + 3)
        partial_offsets = row_offsets[:, None] + d[None, :]
        tl.store(partial_ptr + partial_offsets, pooled, mask=d_inside[None, :])
        if i_tile == 0:
            statistics_ptr = partial_ptr + channels
            tl.store(statistics_ptr + row_offsets, split_maximum)
            tl.store(statistics_ptr + 1 + row_offsets, split_total)
            tl.store(statistics_ptr + 2 + row_offsets, split_dropped_total)


@triton.jit(do_not_specialize=VARYING)
def context_pool_combine_kernel(
    partial_ptr,  # [bands, splits, GROUPS, D + 3]
    scores_ptr,
    scores_strides,
    mask_ptr,
    mask_strides,
    pooled_ptr,  # [S, D]
    weight_sum_ptr,  # [S]
    weights_ptr,
    weights_strides,
    bands,
    tokens,
    width,
    channels,
    patch_h,
    patch_w,
    splits,
    parts,
    UNIFORM: tl.constexpr,
    GROUPS: tl.constexpr,
    ACC: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    WEIGHTS_BLOCK: tl.constexpr,
):
    if splits == 1:
        return  # nothing is left to do
    pid = tl.program_id(0)
    i_band = pid % bands
    i_part = pid // bands
    columns = channels.to(tl.int64) + 3
    partial_ptr += i_band * (splits * GROUPS * columns)
    rows = splits * GROUPS  # row r is of group r % GROUPS
    group = tl.arange(0, GROUPS)
    i_slice = (i_band * GROUPS + group).to(tl.int64)  # [GROUPS]

    row = tl.arange(0, MOST_SPLITS * GROUPS)
    statistics_ptr = partial_ptr + channels + row * columns
    row_maximum = tl.load(statistics_ptr, mask=row < rows, other=float("-inf"))
    maximum = tl.max(by_group(row_maximum, GROUPS), axis=0)  # [GROUPS]
    shift = tl.maximum(maximum, LOWEST)
    rescale = tl.exp(row_maximum - spread(shift, MOST_SPLITS * GROUPS))
    row_total = tl.load(statistics_ptr + 1, mask=row < rows, other=0.0)
    total = tl.sum(by_group(row_total * rescale, GROUPS), axis=0)  # [GROUPS]
    divisor = tl.where(maximum == float("-inf"), 1.0, total)
    if i_part == 0:
        row_dropped_total = tl.load(statistics_ptr + 2, mask=row < rows, other=0.0)
        dropped_total = tl.sum(by_group(row_dropped_total * rescale, GROUPS), axis=0)
        tl.store(weight_sum_ptr + i_slice, dropped_total / divisor)

    if i_part * BLOCK_D < channels:
        d = i_part * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        acc = tl.zeros((BLOCK_S, BLOCK_D), ACC)
        block_shift = spread(shift, BLOCK_S)  # [BLOCK_S]
        for first in range(0, rows, BLOCK_S):
            r = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
            row_offsets = r * columns
            block_maximum = tl.load(
                partial_ptr + channels + row_offsets, mask=r < rows, other=float("-inf")
            )
            partial_mask = (r < rows)[:, None] & (d < channels)[None, :]
            partial_offsets = row_offsets[:, None] + d[None, :]
            partial = tl.load(partial_ptr + partial_offsets, mask=partial_mask, other=0.0)
            acc += partial * tl.exp(block_maximum - block_shift)[:, None]  # [BLOCK_S, BLOCK_D]
        pooled = tl.sum(by_group(acc, GROUPS), axis=0) / divisor[:, None]  # [GROUPS, BLOCK_D]
        pooled_offsets = i_slice[:, None] * channels + d[None, :]
        tl.store(pooled_ptr + pooled_offsets, pooled, mask=(d < channels)[None, :])

    scores_ptr += band_offset(i_band, scores_strides, patch_h, patch_w)
    if mask_ptr is not None:
        mask_ptr += band_offset(i_band, mask_strides, patch_h, patch_w)
    weights_ptr += band_offset(i_band, weights_strides, patch_h, patch_w)
    write_weights(
        weights_ptr,
        weights_strides,
        scores_ptr,
        scores_strides,
        mask_ptr,
        mask_strides,
        shift,
        divisor,
        i_part,
        parts,
        tokens,
        width,
        UNIFORM,
        ACC,
        WEIGHTS_BLOCK,
    )


@planned
def _plan_forward(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    patch_h: int,
    patch_w: int,
    **strides: tuple[int, ...] | None,
) -> Plan:
    operands = Operands(dtype.itemsize, patch_h, patch_w, (shape, strides))
    grid = operands.grid
    block_n, block_d = tile_shape(dtype.itemsize, operands.layouts["x"], grid.channels)
    channel_tiles = triton.cdiv(grid.channels, block_d)
    splits, split_tiles = split_tokens(grid.bands * channel_tiles, grid.tokens, block_n)
    parts = torch.sym_max(
        triton.cdiv(grid.channels, COMBINE_CHANNELS),
        triton.cdiv(grid.tokens, 4 * WEIGHTS_BLOCK),
    )
    accumulate = accumulate_dtype(dtype)
    both = {
        **grid.arguments(),
        "splits": splits,
        "UNIFORM": operands.uniform,
        "ACC": ACCUMULATE[accumulate],
        "LOWEST": torch.finfo(accumulate).min,
        "WEIGHTS_BLOCK": WEIGHTS_BLOCK,
    }
    forward = {
        **both,
        **operands.of_tensors(*strides),
        "split_tiles": split_tiles,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
    }
    combine = {
        **both,
        **operands.of_tensors("scores", "mask", "weights"),
        "parts": parts,
        "BLOCK_S": COMBINE_ROWS,
        "BLOCK_D": COMBINE_CHANNELS,
        "MOST_SPLITS": PROGRAMS,
    }
    launches = [Launch(context_pool_fwd_kernel, grid.bands * splits * channel_tiles, forward)]
    # How many parts there are decides nothing else: a traced program combines even one.
    if not statically_known_true(splits == 1):
        launches.append(Launch(context_pool_combine_kernel, grid.bands * parts, combine))
    return Plan(splits, tuple(launches))


def context_pool(
    x: Tensor,
    scores: Tensor,
    key_padding_mask: Tensor | None,
    dropout_scale: Tensor | None,
    patch_h: int,
    patch_w: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of the scores over each slice's tokens, and the weighted sum of the tokens.

    Args:
        x: ``[B, N, D]`` or ``[B, D, H, W]``, any strides.
        scores: ``[B, N]`` or ``[B, H, W]``, any floating dtype.
        key_padding_mask: bool, in the shape of ``scores``; True leaves a token out.
        dropout_scale: in the shape of ``scores``, in the accumulation dtype.
        patch_h, patch_w: the patch of ``[B, D, H, W]``; 1, 1 for ``[B, N, D]``.

    Returns:
        ``pooled [S, D]``, ``weight_sum [S]`` and the softmax weights in the shape of ``scores``,
        all in the accumulation dtype; all zero for a slice with nothing left in.

    Raises:
        ValueError: a slice of more tokens than an int32 index counts.
    """
    dtype = accumulate_dtype(x.dtype)
    slices, channels = x.shape[0] * patch_h * patch_w, num_channels(x)
    pooled = x.new_empty((slices, channels), dtype=dtype)
    weight_sum = x.new_empty(slices, dtype=dtype)
    weights = x.new_empty(scores.shape, dtype=dtype)
    if slices == 0:
        return pooled, weight_sum, weights

    plan = _plan_forward(
        x.dtype,
        x.shape,
        patch_h,
        patch_w,
        x=x.stride(),
        scores=scores.stride(),
        mask=None if key_padding_mask is None else key_padding_mask.stride(),
        dropout=None if dropout_scale is None else dropout_scale.stride(),
        weights=weights.stride(),
    )
    partial = pooled
    if len(plan.launches) > 1 or tracing.is_active():  # see attention.separable_attention_backward
        partial = x.new_empty((slices * plan.splits, channels + 3), dtype=dtype)
    tensors = {
        "x_ptr": x,
        "scores_ptr": scores,
        "mask_ptr": key_padding_mask,
        "dropout_ptr": dropout_scale,
        "pooled_ptr": pooled,
        "weight_sum_ptr": weight_sum,
        "weights_ptr": weights,
        "partial_ptr": partial,
    }
    run(plan.launches, x.device, tensors)
    return pooled, weight_sum, weights


@triton.jit(do_not_specialize=VARYING)
def context_pool_bwd_weights_kernel(
    grad_weights_ptr,
    grad_weights_strides,
    weights_ptr,
    weights_strides,
    partial_ptr,  # [bands, splits, GROUPS]: sum over the split of weights * grad_weights
    bands,
    tokens,
    width,
    channels,
    patch_h,
    patch_w,
    splits,
    split_tiles,
    UNIFORM: tl.constexpr,
    GROUPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    i_band = pid % bands
    i_split = pid // bands
    grad_weights_ptr += band_offset(i_band, grad_weights_strides, patch_h, patch_w)
    weights_ptr += band_offset(i_band, weights_strides, patch_h, patch_w)
    acc = tl.zeros((BLOCK_N,), ACC)
    last = tl.minimum((i_split + 1) * split_tiles, tl.cdiv(tokens, BLOCK_N))
    for i_block in range(i_split * split_tiles, last):
        n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        offsets = token_offsets(n, weights_strides, width, UNIFORM)
        weights = tl.load(weights_ptr + offsets, mask=n < tokens, other=0.0)
        offsets = token_offsets(n, grad_weights_strides, width, UNIFORM)
        grad_weights = tl.load(grad_weights_ptr + offsets, mask=n < tokens, other=0.0).to(ACC)
        acc += tl.where(weights == 0.0, 0.0, weights * grad_weights)
    row = (i_band.to(tl.int64) * splits + i_split) * GROUPS + tl.arange(0, GROUPS)
    tl.store(partial_ptr + row, tl.sum(by_group(acc, GROUPS), axis=0))


@triton.jit(do_not_specialize=VARYING)
def context_pool_bwd_kernel(
    grad_pooled_ptr,
    grad_pooled_strides,
    grad_weight_sum_ptr,
    grad_weight_sum_stride,
    grad_weights_ptr,
    grad_weights_strides,
    x_ptr,
    x_strides,
    pooled_ptr,
    pooled_strides,
    weight_sum_ptr,
    weight_sum_stride,
    weights_ptr,
    weights_strides,
    dropout_ptr,
    dropout_strides,
    partial_ptr,  # [bands, splits, GROUPS], with grad_weights
    grad_x_ptr,
    grad_x_strides,
    grad_scores_ptr,
    grad_scores_strides,
    bands,
    tokens,
    width,
    channels,
    patch_h,
    patch_w,
    splits,
    X_LAYOUT: tl.constexpr,
    GRAD_X_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    GROUPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    pid = tl.program_id(0)
    i_band = pid % bands
    i_block = pid // bands
    tokens, width, channels = in_words(
        tokens, width, channels, x_ptr, GROUPS, X_LAYOUT, GRAD_X_LAYOUT
    )

    n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside = n < tokens
    weights_ptr += band_offset(i_band, weights_strides, patch_h, patch_w)
    offsets = token_offsets(n, weights_strides, width, UNIFORM)
    weights = tl.load(weights_ptr + offsets, mask=inside, other=0.0)  # [BLOCK_N]
    dropped = weights
    if dropout_ptr is not None:
        dropout_ptr += band_offset(i_band, dropout_strides, patch_h, patch_w)
        offsets = token_offsets(n, dropout_strides, width, UNIFORM)
        dropout = tl.load(dropout_ptr + offsets, mask=inside, other=0.0)
        dropped = weights * dropout

    i_slice = (i_band * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)  # [GROUPS]
    x_offset = band_offset(i_band, x_strides, patch_h, patch_w)
    grad_x_offset = band_offset(i_band, grad_x_strides, patch_h, patch_w)
    product = tl.zeros((BLOCK_N, BLOCK_D), ACC)  # x * grad_pooled
    slice_product = tl.zeros((GROUPS, BLOCK_D), ACC)  # pooled * grad_pooled
    for i_tile in range(0, tl.cdiv(channels, BLOCK_D)):
        d = i_tile * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        d_inside = (d < channels)[None, :]
        tile_mask = inside[:, None] & d_inside
        x_offsets = tile_offsets(x_ptr, x_offset, n, d, x_strides, width, UNIFORM, X_LAYOUT)
        x = tl.load(x_ptr + x_offsets, mask=tile_mask, other=0.0).to(ACC)  # [BLOCK_N, BLOCK_D]
        slice_offsets = matrix_offsets(i_slice, d, grad_pooled_strides)  # [GROUPS, BLOCK_D]
        grad_pooled = tl.load(grad_pooled_ptr + slice_offsets, mask=d_inside, other=0.0).to(ACC)
        slice_offsets = matrix_offsets(i_slice, d, pooled_strides)
        pooled = tl.load(pooled_ptr + slice_offsets, mask=d_inside, other=0.0)
        slice_product += pooled * grad_pooled  # [GROUPS, BLOCK_D]
        token_grad_pooled = spread(grad_pooled, BLOCK_N)  # [BLOCK_N, BLOCK_D]
        product += x * token_grad_pooled
        grad_x = tl.where(weights[:, None] == 0.0, 0.0, dropped[:, None] * token_grad_pooled)
        grad_x_offsets = tile_offsets(
            grad_x_ptr, grad_x_offset, n, d, grad_x_strides, width, UNIFORM, GRAD_X_LAYOUT
        )
        tl.store(
            grad_x_ptr + grad_x_offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=tile_mask
        )

    grad = tl.sum(product, axis=1)  # [BLOCK_N], of the dropped weights
    delta = tl.sum(slice_product, axis=1)  # [GROUPS]
    if grad_weight_sum_ptr is not None:
        grad_weight_sum = tl.load(grad_weight_sum_ptr + i_slice * grad_weight_sum_stride).to(ACC)
        weight_sum = tl.load(weight_sum_ptr + i_slice * weight_sum_stride)
        grad += spread(grad_weight_sum, BLOCK_N)
        delta += weight_sum * grad_weight_sum
    if dropout_ptr is not None:
        grad *= dropout
    if grad_weights_ptr is not None:
        grad_weights_ptr += band_offset(i_band, grad_weights_strides, patch_h, patch_w)
        offsets = token_offsets(n, grad_weights_strides, width, UNIFORM)
        grad += tl.load(grad_weights_ptr + offsets, mask=inside, other=0.0).to(ACC)
        rows = splits * GROUPS
        row = tl.arange(0, MOST_SPLITS * GROUPS)
        partial_ptr += i_band.to(tl.int64) * rows
        partial = tl.load(partial_ptr + row, mask=row < rows, other=0.0)
        delta += tl.sum(by_group(partial, GROUPS), axis=0)
    # A weight of 0 gives and takes no gradient: a masked token or its slice may hold NaN.
    grad_scores = tl.where(weights == 0.0, 0.0, weights * (grad - spread(delta, BLOCK_N)))
    grad_scores_ptr += band_offset(i_band, grad_scores_strides, patch_h, patch_w)
    offsets = token_offsets(n, grad_scores_strides, width, UNIFORM)
    tl.store(grad_scores_ptr + offsets, grad_scores, mask=inside)


@planned
def _plan_backward(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    patch_h: int,
    patch_w: int,
    pooled_strides: tuple[int, ...],
    grad_pooled_strides: tuple[int, ...],
    weight_sum_stride: int,
    grad_weight_sum_stride: int,
    **strides: tuple[int, ...] | None,
) -> Plan:
    operands = Operands(dtype.itemsize, patch_h, patch_w, (shape, strides))
    grid = operands.grid
    block_n, block_d = tile_shape(dtype.itemsize, operands.layouts["x"], grid.channels)
    splits, split_tiles = split_tokens(grid.bands, grid.tokens, WEIGHTS_BLOCK)
    both = {
        **grid.arguments(),
        "splits": splits,
        "UNIFORM": operands.uniform,
        "ACC": ACCUMULATE[accumulate_dtype(dtype)],
    }
    backward = {
        **both,
        **operands.of_tensors(*strides),
        "pooled_strides": shifted(pooled_strides),
        "grad_pooled_strides": shifted(grad_pooled_strides),
        "weight_sum_stride": weight_sum_stride,
        "grad_weight_sum_stride": grad_weight_sum_stride,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "MOST_SPLITS": PROGRAMS,
    }
    weights = {
        **both,
        **operands.of_tensors("grad_weights", "weights"),
        "split_tiles": split_tiles,
        "BLOCK_N": WEIGHTS_BLOCK,
    }
    programs = grid.bands * triton.cdiv(grid.tokens, block_n)
    launches = [Launch(context_pool_bwd_kernel, programs, backward)]
    if "grad_weights" in operands.strides:
        of_weights = Launch(context_pool_bwd_weights_kernel, grid.bands * splits, weights)
        launches.insert(0, of_weights)
    return Plan(splits, tuple(launches))


def context_pool_backward(
    grad_pooled: Tensor,
    grad_weight_sum: Tensor | None,
    grad_weights: Tensor | None,
    x: Tensor,
    pooled: Tensor,
    weight_sum: Tensor,
    weights: Tensor,
    dropout_scale: Tensor | None,
    patch_h: int,
    patch_w: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`context_pool` with respect to ``x`` and ``scores``.

    Args:
        grad_pooled, grad_weight_sum, grad_weights: gradients of the three results, any strides;
            None where there is none.
        x, dropout_scale, patch_h, patch_w: as given to :func:`context_pool`.
        pooled, weight_sum, weights: what :func:`context_pool` returned.

    Returns:
        ``grad_x`` in the dtype and, where ``x`` is dense, the strides of ``x``; ``grad_scores`` in
        the shape and dtype of ``weights``, contiguous.

    Raises:
        ValueError: a slice of more tokens than an int32 index counts.
    """
    grad_x = torch.empty_like(x)
    grad_scores = weights.new_empty(weights.shape)
    slices = pooled.shape[0]
    if slices == 0:
        return grad_x, grad_scores

    plan = _plan_backward(
        x.dtype,
        x.shape,
        patch_h,
        patch_w,
        pooled.stride(),
        grad_pooled.stride(),
        weight_sum.stride(0),
        0 if grad_weight_sum is None else grad_weight_sum.stride(0),
        x=x.stride(),
        grad_x=grad_x.stride(),
        weights=weights.stride(),
        dropout=None if dropout_scale is None else dropout_scale.stride(),
        grad_weights=None if grad_weights is None else grad_weights.stride(),
        grad_scores=grad_scores.stride(),
    )
    partial = None
    if grad_weights is not None:
        partial = weights.new_empty(slices * plan.splits)
    tensors = {
        "grad_pooled_ptr": grad_pooled,
        "grad_weight_sum_ptr": grad_weight_sum,
        "grad_weights_ptr": grad_weights,
        "x_ptr": x,
        "pooled_ptr": pooled,
        "weight_sum_ptr": weight_sum,
        "weights_ptr": weights,
        "dropout_ptr": dropout_scale,
        "partial_ptr": partial,
        "grad_x_ptr": grad_x,
        "grad_scores_ptr": grad_scores,
    }
    run(plan.launches, x.device, tensors)
    return grad_x, grad_scores
