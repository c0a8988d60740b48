# mypy: disallow-untyped-defs=False
"""The gate in Triton: ``y = act(v) * context``, every token by the context of its slice.

Equation 3 of Mehta and Rastegari (2022), its last product. Backward reads ``grad_y`` and ``v``
once. Where there are few slices their tokens are split over programs; the parts of grad_context are
added in a fixed order, so results are the same bit for bit from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sep_attn.layout import accumulate_dtype, num_channels
from sep_attn.triton_kernels.launch import (
    ACCUMULATE,
    COMBINE_CHANNELS,
    COMBINE_ROWS,
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
)


@triton.jit
def load_context(
    context_ptr,
    context_strides,
    i_band,
    d,  # [BLOCK_D]
    d_inside,  # [BLOCK_D]
    GROUPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_slice = i_band * GROUPS + tl.arange(0, GROUPS)  # [GROUPS]
    offsets = matrix_offsets(i_slice, d, context_strides)  # [GROUPS, BLOCK_D]
    context = tl.load(context_ptr + offsets, mask=d_inside[None, :], other=0.0).to(ACC)
    return spread(context, BLOCK_N)  # [BLOCK_N, BLOCK_D]


@triton.jit
def activate(v, ACT: tl.constexpr):
    if ACT == "relu":
        v = tl.where(v <= 0.0, 0.0, v)  # NaN stays NaN
    return v


@triton.jit(do_not_specialize=VARYING)
def gate_fwd_kernel(
    v_ptr,
    v_strides,
    context_ptr,
    context_strides,
    y_ptr,
    y_strides,
    bands,
    tokens,
    width,
    channels,
    patch_h,
    patch_w,
    V_LAYOUT: tl.constexpr,
    Y_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    GROUPS: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    i_band = pid % bands
    channel_tiles = tl.cdiv(channels, BLOCK_D)
    tokens, width, channels = in_words(tokens, width, channels, v_ptr, GROUPS, V_LAYOUT, Y_LAYOUT)

    d = pid // bands % channel_tiles * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    n = pid // bands // channel_tiles * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    d_inside = d < channels
    tile_mask = (n < tokens)[:, None] & d_inside[None, :]
    context = load_context(
        context_ptr, context_strides, i_band, d, d_inside, GROUPS, ACC, BLOCK_N
    )  # [BLOCK_N, BLOCK_D]
    v_offset = band_offset(i_band, v_strides, patch_h, patch_w)
    v_offsets = tile_offsets(v_ptr, v_offset, n, d, v_strides, width, UNIFORM, V_LAYOUT)
    v = tl.load(v_ptr + v_offsets, mask=tile_mask, other=0.0).to(ACC)  # [BLOCK_N, BLOCK_D]
    y = (activate(v, ACT) * context).to(y_ptr.dtype.element_ty)
    y_offset = band_offset(i_band, y_strides, patch_h, patch_w)
    y_offsets = tile_offsets(y_ptr, y_offset, n, d, y_strides, width, UNIFORM, Y_LAYOUT)
    tl.store(y_ptr + y_offsets, y, mask=tile_mask)


@planned
def _plan_forward(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    patch_h: int,
    patch_w: int,
    act: str,
    context_strides: tuple[int, ...],
    **strides: tuple[int, ...],
) -> Launch:
    operands = Operands(dtype.itemsize, patch_h, patch_w, (shape, strides))
    grid = operands.grid
    block_n, block_d = tile_shape(dtype.itemsize, operands.layouts["v"], grid.channels)
    arguments = {
        **grid.arguments(),
        **operands.of_tensors(*strides),
        "context_strides": shifted(context_strides),
        "UNIFORM": operands.uniform,
        "ACT": act,
        "ACC": ACCUMULATE[accumulate_dtype(dtype)],
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
    }
    tiles = triton.cdiv(grid.tokens, block_n) * triton.cdiv(grid.channels, block_d)
    return Launch(gate_fwd_kernel, grid.bands * tiles, arguments)


def gate(v: Tensor, context: Tensor, act: str, patch_h: int, patch_w: int) -> Tensor:
    """``act(v) * context[slice]``, computed in the accumulation dtype.

    Args:
        v: ``[B, N, D]`` or ``[B, D, H, W]``, any strides.
        context: ``[S, D]``, any floating dtype and strides.
        act: ``"relu"`` or ``"identity"``.
        patch_h, patch_w: the patch of ``[B, D, H, W]``; 1, 1 for ``[B, N, D]``.

    Returns:
        A tensor in the shape, dtype and, where ``v`` is dense, the strides of ``v``.

    Raises:
        ValueError: a slice of more tokens than an int32 index counts.
    """
    y = torch.empty_like(v)
    if v.shape[0] == 0:
        return y
    launch = _plan_forward(
        v.dtype,
        v.shape,
        patch_h,
        patch_w,
        act,
        context.stride(),
        v=v.stride(),
        y=y.stride(),
    )
    run((launch,), v.device, {"v_ptr": v, "context_ptr": context, "y_ptr": y})
    return y


@triton.jit(do_not_specialize=VARYING)
def gate_bwd_kernel(
    grad_y_ptr,
    grad_y_strides,
    v_ptr,
    v_strides,
    context_ptr,
    context_strides,
    grad_v_ptr,
    grad_v_strides,
    partial_ptr,  # [bands, splits, GROUPS, D]: sum over the split of grad_y * act(v)
    bands,
    tokens,
    width,
    channels,
    patch_h,
    patch_w,
    splits,
    split_tiles,
    GRAD_Y_LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    GRAD_V_LAYOUT: tl.constexpr,
    UNIFORM: tl.constexpr,
    GROUPS: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    i_band = pid % bands
    i_split = pid // bands % splits
    i_tile = pid // bands // splits
    tokens, width, channels = in_words(
        tokens, width, channels, v_ptr, GROUPS, V_LAYOUT, GRAD_Y_LAYOUT, GRAD_V_LAYOUT
    )

    d = i_tile * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    d_inside = d < channels
    context = load_context(
        context_ptr, context_strides, i_band, d, d_inside, GROUPS, ACC, BLOCK_N
    )  # [BLOCK_N, BLOCK_D]
    grad_y_offset = band_offset(i_band, grad_y_strides, patch_h, patch_w)
    v_offset = band_offset(i_band, v_strides, patch_h, patch_w)
    grad_v_offset = band_offset(i_band, grad_v_strides, patch_h, patch_w)

    acc = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    last = tl.minimum((i_split + 1) * split_tiles, tl.cdiv(tokens, BLOCK_N))
    for i_block in range(i_split * split_tiles, last):
        n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        tile_mask = (n < tokens)[:, None] & d_inside[None, :]
        grad_y_offsets = tile_offsets(
            grad_y_ptr, grad_y_offset, n, d, grad_y_strides, width, UNIFORM, GRAD_Y_LAYOUT
        )
        grad_y = tl.load(grad_y_ptr + grad_y_offsets, mask=tile_mask, other=0.0)
        v_offsets = tile_offsets(v_ptr, v_offset, n, d, v_strides, width, UNIFORM, V_LAYOUT)
        v = tl.load(v_ptr + v_offsets, mask=tile_mask, other=0.0).to(ACC)  # [BLOCK_N, BLOCK_D]
        grad_y = grad_y.to(ACC)
        acc += grad_y * activate(v, ACT)
        grad_v = grad_y * context
        if ACT == "relu":
            grad_v = tl.where(v <= 0.0, 0.0, grad_v)
        grad_v_offsets = tile_offsets(
            grad_v_ptr, grad_v_offset, n, d, grad_v_strides, width, UNIFORM, GRAD_V_LAYOUT
        )
        grad_v = grad_v.to(grad_v_ptr.dtype.element_ty)
        tl.store(grad_v_ptr + grad_v_offsets, grad_v, mask=tile_mask)

    row = (i_band.to(tl.int64) * splits + i_split) * GROUPS + tl.arange(0, GROUPS)  # [GROUPS]
    partial = tl.sum(by_group(acc, GROUPS), axis=0)  # [GROUPS, BLOCK_D]
    partial_offsets = row[:, None] * channels + d[None, :]
    tl.store(partial_ptr + partial_offsets, partial, mask=d_inside[None, :])


@triton.jit(do_not_specialize=VARYING)
def gate_bwd_combine_kernel(
    partial_ptr,  # [bands, splits, GROUPS, D]
    grad_context_ptr,  # [S, D]
    bands,
    channels,
    splits,
    GROUPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    i_band = (pid % bands).to(tl.int64)
    d = pid // bands * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    d_inside = (d < channels)[None, :]
    rows = splits * GROUPS  # row r is of group r % GROUPS
    acc = tl.zeros((BLOCK_S, BLOCK_D), ACC)
    for first in range(0, rows, BLOCK_S):
        row = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        offsets = (i_band * rows + row)[:, None] * channels + d[None, :]
        mask = (row < rows)[:, None] & d_inside
        acc += tl.load(partial_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_D]
    grad_context = tl.sum(by_group(acc, GROUPS), axis=0)  # [GROUPS, BLOCK_D]
    i_slice = i_band * GROUPS + tl.arange(0, GROUPS)  # [GROUPS]
    offsets = i_slice[:, None] * channels + d[None, :]
    tl.store(grad_context_ptr + offsets, grad_context, mask=d_inside)


@planned
def _plan_backward(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    patch_h: int,
    patch_w: int,
    act: str,
    context_strides: tuple[int, ...],
    **strides: tuple[int, ...],
) -> Plan:
    operands = Operands(dtype.itemsize, patch_h, patch_w, (shape, strides))
    grid = operands.grid
    block_n, block_d = tile_shape(dtype.itemsize, operands.layouts["v"], grid.channels)
    channel_tiles = triton.cdiv(grid.channels, block_d)
    splits, split_tiles = split_tokens(grid.bands * channel_tiles, grid.tokens, block_n)
    backward = {
        **grid.arguments(),
        **operands.of_tensors(*strides),
        "context_strides": shifted(context_strides),
        "splits": splits,
        "split_tiles": split_tiles,
        "UNIFORM": operands.uniform,
        "ACT": act,
        "ACC": ACCUMULATE[accumulate_dtype(dtype)],
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
    }
    combine = {
        "bands": grid.bands,
        "channels": grid.channels,
        "splits": splits,
        "GROUPS": grid.groups,
        "ACC": ACCUMULATE[accumulate_dtype(dtype)],
        "BLOCK_S": COMBINE_ROWS,
        "BLOCK_D": COMBINE_CHANNELS,
    }
    launches = [Launch(gate_bwd_kernel, grid.bands * splits * channel_tiles, backward)]
    # How many parts there are decides nothing else: a traced program combines even one.
    if not statically_known_true(splits == 1):
        parts = triton.cdiv(grid.channels, COMBINE_CHANNELS)
        launches.append(Launch(gate_bwd_combine_kernel, grid.bands * parts, combine))
    return Plan(splits, tuple(launches))


def gate_backward(
    grad_y: Tensor, v: Tensor, context: Tensor, act: str, patch_h: int, patch_w: int
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`gate` with respect to ``v`` and ``context``.

    Args:
        grad_y: in the shape and dtype of ``v``, any strides, 0 among them.
        v, context, act, patch_h, patch_w: as given to :func:`gate`.

    Returns:
        ``grad_v`` in the dtype and, where ``v`` is dense, the strides of ``v``; ``grad_context``
        ``[S, D]`` in the accumulation dtype, contiguous.

    Raises:
        ValueError: a slice of more tokens than an int32 index counts.
    """
    dtype = accumulate_dtype(v.dtype)
    slices, channels = v.shape[0] * patch_h * patch_w, num_channels(v)
    grad_v = torch.empty_like(v)
    grad_context = v.new_empty((slices, channels), dtype=dtype)
    if slices == 0:
        return grad_v, grad_context

    plan = _plan_backward(
        v.dtype,
        v.shape,
        patch_h,
        patch_w,
        act,
        context.stride(),
        grad_y=grad_y.stride(),
        v=v.stride(),
        grad_v=grad_v.stride(),
    )
    partial = grad_context
    if len(plan.launches) > 1:
        partial = v.new_empty((slices * plan.splits, channels), dtype=dtype)
    tensors = {
        "grad_y_ptr": grad_y,
        "v_ptr": v,
        "context_ptr": context,
        "grad_v_ptr": grad_v,
        "partial_ptr": partial,
        "grad_context_ptr": grad_context,
    }
    run(plan.launches, v.device, tensors)
    return grad_v, grad_context
