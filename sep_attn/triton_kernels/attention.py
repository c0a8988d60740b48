# mypy: disallow-untyped-defs=False
"""The launchers of the fused layer: which kernels serve a call, with which arguments.

:func:`path_of` is the one place that chooses.

=========== ======================================================================================
``short``   one launch (:mod:`fused`): a program does whole slices. 2 N D e of memory traffic
``long``    scores and pool, combine (:mod:`scoring`), values, gate and output (:mod:`fused`): 3 N D e
``wide``    D above 512: scores and pool, combine, value product with bias, activation and gate as
            its epilogue, output product (:mod:`products`): 5 N D e, and the rate of the products
=========== ======================================================================================

float64 is served by :mod:`pooling`, :mod:`gating` and torch's products
(:mod:`sep_attn.functional`): tensor cores have no use for its accuracy.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sep_attn.layout import num_channels, token_shape
from sep_attn.triton_kernels import fused, scoring
from sep_attn.triton_kernels.configs import (
    MOST_FUSED_CHANNELS,
    architecture,
    chunk_widths,
    config_of,
)
from sep_attn.triton_kernels.launch import (
    PLANS,
    TokenGrid,
    grid_strides,
    is_uniform,
    memory_layout,
    on_device,
    shifted,
    token_grid,
)
from sep_attn.triton_kernels.pooling import WEIGHTS_BLOCK
from sep_attn.triton_kernels.tiles import tiling

# A band of up to SHORT_TOKENS tokens is a program's work, where there are SHORT_PROGRAMS of them or
# where it is one tile anyway.
SHORT_TOKENS = 1024
SHORT_PROGRAMS = 64
# Long bands are split over about this many programs.
SPLIT_PROGRAMS = 512
COMBINE_ROWS = 128
COMBINE_CHANNELS = 128
COMBINE_COLUMNS = 32


def path_of(bands: int, tokens: int, source_tokens: int, channels: int, tile_tokens: int) -> str:
    """``"short"``, ``"long"`` or ``"wide"``: see the table above.

    Args:
        bands: slices, or rows of slices, that lie apart (:mod:`sep_attn.triton_kernels.launch`).
        tokens, source_tokens: of a band, in x and where scores and keys come from.
        channels: D.
        tile_tokens: rows of a tile of the kernel for short slices.
    """
    if channels > MOST_FUSED_CHANNELS:
        return "wide"
    longest = max(tokens, source_tokens)
    if longest <= tile_tokens or (longest <= SHORT_TOKENS and bands >= SHORT_PROGRAMS):
        return "short"
    return "long"


class Launch(NamedTuple):
    """A kernel's programs and everything it is told but its tensors."""

    programs: int
    arguments: dict[str, Any]


class ForwardPlan(NamedTuple):
    """The launches of a path, and the size of its scratch memory: float32 values of the partial
    sums of the pool, and whether gated values pass through memory."""

    path: str
    launches: tuple[Launch, ...]
    partials: int
    gated: bool


def precision_of(dtype: torch.dtype) -> str:
    """How float32 products may be rounded: ``"tf32"`` only where torch has been told so."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


class Geometry(NamedTuple):
    """A tensor's grid and strides beside those of the tensor it works with."""

    grid: TokenGrid
    source: TokenGrid
    strides: dict[str, tuple[int, ...]]
    uniform: bool
    layouts: dict[str, str]


def geometry(
    itemsize: int,
    shape: tuple[int, ...],
    source_shape: tuple[int, ...],
    patch_h: int,
    patch_w: int,
    token_strides: dict[str, tuple[int, ...] | None],
    source_strides: dict[str, tuple[int, ...] | None],
) -> Geometry:
    """Strides and memory layouts of operands in the shape of x and in that of the source."""
    grid = token_grid(shape, patch_h, patch_w)
    source = token_grid(source_shape, patch_h, patch_w)
    strides: dict[str, tuple[int, ...]] = {}
    uniform = True
    layouts: dict[str, str] = {}
    for own_shape, own_grid, given in (
        (shape, grid, token_strides),
        (source_shape, source, source_strides),
    ):
        own = {
            name: grid_strides(own_shape, value, own_grid)
            for name, value in given.items()
            if value is not None
        }
        uniform = uniform and is_uniform(own_grid, own.values())
        strides |= own
    for name, value in strides.items():
        own_grid = grid if name in token_strides else source
        if len(value) == 6:
            layouts[name.replace("_strides", "_layout").upper()] = memory_layout(
                itemsize, own_grid, value, uniform
            )
    return Geometry(grid, source, strides, uniform, layouts)


@functools.lru_cache(maxsize=PLANS)
def _plan_forward(
    arch: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    source_shape: tuple[int, ...],
    patch_h: int,
    patch_w: int,
    act: str,
    precision: str,
    x_strides: tuple[int, ...],
    source_strides: tuple[int, ...],
    mask_strides: tuple[int, ...] | None,
    weights_strides: tuple[int, ...] | None,
    out_strides: tuple[int, ...],
) -> ForwardPlan:
    operands = geometry(
        dtype.itemsize,
        shape,
        source_shape,
        patch_h,
        patch_w,
        {"x_strides": x_strides, "out_strides": out_strides},
        {
            "source_strides": source_strides,
            "mask_strides": mask_strides,
            "weights_strides": weights_strides,
        },
    )
    grid, source, uniform, layouts = (
        operands.grid,
        operands.source,
        operands.uniform,
        operands.layouts,
    )
    channels, slices = grid.channels, grid.bands * grid.groups
    both = {
        "patch_h": grid.patch_h,
        "patch_w": grid.patch_w,
        "D": channels,
        "CHUNKS": chunk_widths(channels),
        "UNIFORM": uniform,
        "GROUPS": grid.groups,
    }

    def config(kernel: str) -> tuple[int, int, dict[str, int]]:
        tokens, columns, warps, stages = config_of(kernel, arch, dtype.itemsize, channels)
        return tokens, columns, {"num_warps": warps, "num_stages": stages}

    if channels <= MOST_FUSED_CHANNELS:
        tokens, columns, options = config("slice_fwd_kernel")
        if path_of(grid.bands, grid.tokens, source.tokens, channels, tokens) == "short":
            longest = max(grid, source, key=lambda one: one.tokens)
            tiles = tiling(longest, tokens)
            rows = tokens // tiles.bands
            arguments = {
                **both,
                **shifted(
                    operands.strides,
                    (
                        "x_strides",
                        "source_strides",
                        "mask_strides",
                        "weights_strides",
                        "out_strides",
                    ),
                ),
                **layouts,
                **options,
                "bands": grid.bands,
                "tokens": grid.tokens,
                "width": grid.width,
                "source_tokens": source.tokens,
                "source_width": source.width,
                "band_tiles": triton.cdiv(grid.tokens, rows),
                "source_band_tiles": triton.cdiv(source.tokens, rows),
                "slices": slices,
                "BANDS": tiles.bands,
                "ACT": act,
                "PRECISION": precision,
                "BLOCK_N": tokens,
                "BLOCK_E": columns,
            }
            programs = triton.cdiv(grid.bands, tiles.bands)
            return ForwardPlan("short", (Launch(programs, arguments),), 0, False)

    tokens, _, options = config("score_pool_fwd_kernel")
    tiles_of_band = triton.cdiv(source.tokens, tokens)
    split_tiles = triton.cdiv(
        tiles_of_band, max(1, min(tiles_of_band, SPLIT_PROGRAMS // grid.bands))
    )
    splits = triton.cdiv(tiles_of_band, split_tiles)
    pool = {
        **both,
        **shifted(operands.strides, ("source_strides", "mask_strides")),
        **options,
        "scores_strides": shifted(operands.strides, ("weights_strides",))["weights_strides"],
        "bands": source.bands,
        "tokens": source.tokens,
        "width": source.width,
        "splits": splits,
        "split_tiles": split_tiles,
        "SOURCE_LAYOUT": layouts["SOURCE_LAYOUT"],
        "BLOCK_N": tokens,
    }
    parts = max(
        triton.cdiv(channels, COMBINE_COLUMNS), triton.cdiv(source.tokens, 4 * WEIGHTS_BLOCK)
    )
    combine = {
        **shifted(operands.strides, ("mask_strides", "weights_strides")),
        **{name: value for name, value in both.items() if name != "CHUNKS"},
        "tokens": source.tokens,
        "width": source.width,
        "splits": splits,
        "parts": parts,
        "BLOCK_S": COMBINE_ROWS,
        "BLOCK_D": COMBINE_CHANNELS,
        "BLOCK_E": COMBINE_COLUMNS,
        "MOST_SPLITS": SPLIT_PROGRAMS,
        "WEIGHTS_BLOCK": WEIGHTS_BLOCK,
        "num_warps": 8,
    }
    launches = (Launch(source.bands * splits, pool), Launch(source.bands * parts, combine))
    partials = slices * splits * (channels + 3)
    if channels <= MOST_FUSED_CHANNELS:
        tokens, columns, options = config("value_gate_output_fwd_kernel")
        tiles = tiling(grid, tokens)
        arguments = {
            **both,
            **shifted(operands.strides, ("x_strides", "out_strides")),
            **options,
            **tiles.arguments(),
            "bands": grid.bands,
            "tokens": grid.tokens,
            "width": grid.width,
            "slices": slices,
            "X_LAYOUT": layouts["X_LAYOUT"],
            "OUT_LAYOUT": layouts["OUT_LAYOUT"],
            "ACT": act,
            "PRECISION": precision,
            "BLOCK_N": tokens,
            "BLOCK_E": columns,
        }
        return ForwardPlan("long", (*launches, Launch(tiles.count, arguments)), partials, False)
    raise NotImplementedError


def _forward(
    x: Tensor,
    x_prev: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_seed: Tensor | None,
    dropout_p: float,
    act: str,
    patch_h: int,
    patch_w: int,
    keep_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    source = x if x_prev is None else x_prev
    slices, channels = x.shape[0] * patch_h * patch_w, num_channels(x)
    out = torch.empty_like(x)
    weights = None
    if keep_weights:
        weights = x.new_empty(token_shape(source), dtype=torch.float32)
    statistics = x.new_empty((slices, 2 * channels + 1), dtype=torch.float32)
    if slices == 0:
        return out, weights, statistics
    qkv_weight, out_weight = qkv_weight.contiguous(), out_weight.contiguous()
    qkv_bias = None if qkv_bias is None else qkv_bias.contiguous()
    out_bias = None if out_bias is None else out_bias.contiguous()
    plan = _plan_forward(
        architecture(x.device),
        x.dtype,
        x.shape,
        source.shape,
        patch_h,
        patch_w,
        act,
        precision_of(x.dtype),
        x.stride(),
        source.stride(),
        None if key_padding_mask is None else key_padding_mask.stride(),
        None if weights is None else weights.stride(),
        out.stride(),
    )
    scoring_tensors = {
        "source_ptr": source,
        "qkv_weight_ptr": qkv_weight,
        "qkv_bias_ptr": qkv_bias,
        "mask_ptr": key_padding_mask,
        "seed_ptr": dropout_seed,
        "dropout_p": dropout_p,
    }
    value_tensors = {
        "x_ptr": x,
        "qkv_weight_ptr": qkv_weight,
        "qkv_bias_ptr": qkv_bias,
        "out_weight_ptr": out_weight,
        "out_bias_ptr": out_bias,
        "statistics_ptr": statistics,
        "out_ptr": out,
    }
    with on_device(x.device):
        if plan.path == "short":
            (launch,) = plan.launches
            fused.slice_fwd_kernel[(launch.programs,)](
                weights_ptr=weights, **(scoring_tensors | value_tensors), **launch.arguments
            )
            return out, weights, statistics
        pool, combine, last = plan.launches
        partial = statistics.new_empty(plan.partials)
        scoring.score_pool_fwd_kernel[(pool.programs,)](
            scores_ptr=weights, partial_ptr=partial, **scoring_tensors, **pool.arguments
        )
        scoring.context_combine_kernel[(combine.programs,)](
            partial_ptr=partial,
            qkv_weight_ptr=qkv_weight,
            qkv_bias_ptr=qkv_bias,
            mask_ptr=key_padding_mask,
            weights_ptr=weights,
            statistics_ptr=statistics,
            **combine.arguments,
        )
        fused.value_gate_output_fwd_kernel[(last.programs,)](**value_tensors, **last.arguments)
    return out, weights, statistics
