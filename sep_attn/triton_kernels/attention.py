# mypy: disallow-untyped-defs=False
"""The launchers of the fused layer: which kernels serve a call, with which arguments.

:func:`_plan_forward` is the one place that chooses; e is the size of a value in bytes.

========= =========================================================================================
``short`` one launch (:mod:`fused`), a program does whole slices, or, where they are few, makes
          the context and gates a part of the tokens: 2 N D e of memory traffic
``long``  scores and pool, combine (:mod:`scoring`), values with gate and output (:mod:`fused`):
          3 N D e
``wide``  scores and pool, combine, value product with bias, activation and gate as its epilogue,
          output product (:mod:`products`): 5 N D e. For more channels than
          ``MOST_FUSED_CHANNELS``, and for few tokens of more than ``MOST_LONE_CHANNELS``
========= =========================================================================================

Backward is the same for all: value and gate, and the gradients of both weights, in one kernel up to
``MOST_FUSED_BACKWARD_CHANNELS`` (:mod:`fused`), else in one and two (:mod:`products`); what has one
row a slice, and scores (:mod:`scoring`); the product that gives dx, with the pool's terms as its
epilogue; the gradient of W_K, from one row a slice; and sums of the parts of small gradients. 3 or
8, and 1, and 2 N D e.

float64 is served by :mod:`pooling`, :mod:`gating` and torch's products
(:mod:`sep_attn.functional`): tensor cores have no use for its accuracy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sep_attn.layout import num_channels, token_shape, token_view
from sep_attn.triton_kernels import fused, products, scoring, tracing
from sep_attn.triton_kernels.configs import (
    MOST_FUSED_BACKWARD_CHANNELS,
    MOST_FUSED_CHANNELS,
    TABLES,
    WIDE_PRODUCT_ROWS,
    Config,
    architecture,
    chunk_widths,
    config_of,
    padded_width,
    value_widths,
    weight_rows,
)
from sep_attn.triton_kernels.launch import (
    NO_PARTS,
    Launch,
    Operands,
    Part,
    Parts,
    Strides,
    TokenGrid,
    kind_of,
    planned,
    run,
    split_tiles,
)
from sep_attn.triton_kernels.pooling import WEIGHTS_BLOCK
from sep_attn.triton_kernels.tiles import MOST_CHANNELS, tiling

# A band of up to SHORT_TOKENS tokens is a program's work where there are SHORT_PROGRAMS of them.
# Where there are fewer, so is one of up to SHARED_VALUES values, or of a single tile: that several
# programs read all of it costs less than two launches. As many share one as make SHARED_PROGRAMS.
SHORT_TOKENS = 1024
SHORT_PROGRAMS = 64
SHARED_VALUES = 2**16
SHARED_PROGRAMS = 132
# With more channels a tile of whole tokens leaves few registers for addresses: products take half
# as many at a time.
MOST_ROOMY_CHANNELS = 384
# A tile of whole tokens with more channels than this takes long: where there are fewer than
# SHORT_PROGRAMS tiles, each is shared out among programs by its columns.
MOST_LONE_CHANNELS = 256
# A tile of the softmax in the kernel for short slices, and one of W_K: at most so many rows, or
# columns, and so many values in all programs that are to fit on a multiprocessor, a quarter
# where an architecture has no table. With LONE_POOL_STAGES a tile is loaded while the one before is
# worked on (not where tokens are contiguous: such a tile passes through registers); with two a
# program waits for each, and another works meanwhile.
POOL_ROWS = 128
KEY_COLUMNS = 128
POOL_VALUES = 32768
LONE_POOL_STAGES = 3
# Long bands are split over about this many programs.
SPLIT_PROGRAMS = 512
COMBINE_ROWS = 128
COMBINE_CHANNELS = 128
COMBINE_COLUMNS = 32
# The tokens are split until about this many programs of weight_grad_kernel run, and programs of
# about this many warps of value_gate_weights_bwd_kernel: eight fill one of an H100's 132
# multiprocessors.
WEIGHT_PROGRAMS = 264
WEIGHT_WARPS = 1056
# What one row a slice needs in backward: slices and columns of a program, and tiles of a slice that
# it sums; more are summed before. For W_K, slices that are multiplied at a time, and programs.
CONTEXT_SLICES = 16
CONTEXT_COLUMNS = 64
MOST_TILES_SUMMED = 16
KEY_SLICES = 32
KEY_PROGRAMS = 132
# A tile of the parts that a sum has: more rows where there are few values, more values otherwise.
SUM_VALUES = 2048
SUM_ROWS = 32
FEW_VALUES = 2**17
FLOAT32 = torch.float32.itemsize  # of statistics, sums and scratch
SCRATCH_RUN = 32  # float32 values that lie side by side in memory: where one tensor ends, 128 bytes


def path_of(
    channels: int, itemsize: int, bands: int, tokens: int, source_tokens: int, tile_tokens: int
) -> str:
    """``"short"``, ``"long"`` or ``"wide"``: see the table above.

    Args:
        channels: D.
        itemsize: bytes of a value.
        bands: slices, or rows of slices, that lie apart (:mod:`sep_attn.triton_kernels.launch`).
        tokens, source_tokens: of a band, in x and where scores and keys come from.
        tile_tokens: rows of a tile of the kernels that hold whole tokens.
    """
    if channels > MOST_FUSED_CHANNELS[itemsize]:
        return "wide"
    # While a program is traced these comparisons are all that depends on the number of tokens.
    if channels > MOST_LONE_CHANNELS and bands * tokens < SHORT_PROGRAMS * tile_tokens:
        return "wide"
    shared = min(SHORT_TOKENS, SHARED_VALUES // channels)
    most = max(tile_tokens, SHORT_TOKENS if bands >= SHORT_PROGRAMS else shared)
    return "short" if torch.sym_max(tokens, source_tokens) <= most else "long"


class Call(NamedTuple):
    """What a plan depends on besides strides."""

    arch: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]
    patch_h: int
    patch_w: int
    act: str
    precision: str
    dropout_p: float = 0.0

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def config(self, kernel: str, channels: int) -> Config:
        return config_of(kernel, self.arch, self.itemsize, channels)

    def operands(self, of_x: Strides, of_source: Strides) -> Operands:
        sides = (_known_channels(self.shape), of_x), (_known_channels(self.source_shape), of_source)
        return Operands(self.itemsize, self.patch_h, self.patch_w, *sides)


def _known_channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with D as a number: kernels are compiled for it, and a traced program may have it
    as a symbol."""
    axis = 2 if len(shape) == 3 else 1
    return (*shape[:axis], int(shape[axis]), *shape[axis + 1 :])


def call_of(
    x: Tensor, source: Tensor, act: str, patch_h: int, patch_w: int, dropout_p: float = 0.0
) -> Call:
    allowed = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return Call(
        architecture(x.device),
        x.dtype,
        x.shape,
        source.shape,
        patch_h,
        patch_w,
        act,
        "tf32" if allowed else "ieee",
        dropout_p,
    )


def _of_call(operands: Operands, grid: TokenGrid) -> dict[str, Any]:
    """What every kernel is told."""
    return {
        "tokens": grid.tokens,
        "width": grid.width,
        "patch_h": grid.patch_h,
        "patch_w": grid.patch_w,
        "D": grid.channels,
        "UNIFORM": operands.uniform,
        "GROUPS": grid.groups,
    }


def _options(config: Config) -> dict[str, int]:
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if config.registers is not None:
        options["maxnreg"] = config.registers
    return options


def _tiles_of(operands: Operands, grid: TokenGrid, block_tokens: int) -> dict[str, Any]:
    cut = tiling(grid, block_tokens)
    return {
        "bands": grid.bands,
        "tiles": cut.tiles,
        "band_tiles": cut.band_tiles,
        "BANDS": cut.bands,
        "BLOCK_N": block_tokens,
    }


def _product(
    call: Call, operands: Operands, a: str, out: str, epilogue: str, transposed: bool, **names: str
) -> Launch:
    """The launch of a product of tokens; ``names`` says what its operands are among the call's
    tensors, and those of its pointers that it does not name are None."""
    config = call.config("token_product_kernel", operands.channels)
    tiles = _tiles_of(operands, operands.grid, config.tokens)
    columns = min(config.columns, padded_width(operands.channels))
    row_size = {"gate": 2 * operands.channels + 1, "pool": operands.channels}
    optional = ("bias", "slice", "weights", "grad_scores", "score_weight", "seed")
    of_tokens = ("weights", "grad_scores") if epilogue == "pool" else ()
    arguments = {
        **{f"{name}_ptr": None for name in optional if f"{name}_ptr" not in names},
        **_of_call(operands, operands.grid),
        **operands.of_tensors(a=a, out=out),
        **dict.fromkeys(("weights_strides", "grad_scores_strides")),
        **operands.of_tensors(*of_tokens),
        **tiles,
        **_options(config),
        "dropout_p": call.dropout_p,
        "slices": operands.slices,
        "row_size": row_size.get(epilogue, 0),
        "TRANSPOSED": transposed,
        "EPILOGUE": epilogue,
        "ACT": call.act,
        "PRECISION": call.precision,
        "BLOCK_E": columns,
        "BLOCK_K": _depth(call, operands.channels),
    }
    programs = tiles["tiles"] * triton.cdiv(operands.channels, columns)
    return Launch(products.token_product_kernel, programs, arguments, **names)


def _depth(call: Call, channels: int) -> int:
    """Channels that a product takes at a time: 128 bytes of a row."""
    return min(128 // call.itemsize, padded_width(channels))


class ForwardPlan(NamedTuple):
    """The launches of a path; which parts of tensors they take; the float32 values of the pool's
    partial sums."""

    path: str
    launches: tuple[Launch, ...]
    parts: Parts
    partials: int


@planned
def _plan_forward(
    call: Call,
    x_strides: tuple[int, ...],
    source_strides: tuple[int, ...],
    mask_strides: tuple[int, ...] | None,
    weights_strides: tuple[int, ...] | None,
    out_strides: tuple[int, ...],
) -> ForwardPlan:
    operands = call.operands(
        {"x": x_strides, "out": out_strides},
        {"source": source_strides, "mask": mask_strides, "weights": weights_strides},
    )
    grid, source, channels = operands.grid, operands.source, operands.channels
    most = MOST_FUSED_CHANNELS[call.itemsize]
    tile_tokens = call.config("slice_fwd_kernel", min(channels, most)).tokens
    path = path_of(channels, call.itemsize, grid.bands, grid.tokens, source.tokens, tile_tokens)
    if path == "short":
        return ForwardPlan(path, (_slice_launch(call, operands),), NO_PARTS, 0)

    config = call.config("score_pool_fwd_kernel", channels)
    source_tiles = triton.cdiv(source.tokens, config.tokens)
    splits, part_tiles = split_tiles(source_tiles, SPLIT_PROGRAMS // source.bands)
    pool = {
        **_of_call(operands, source),
        **operands.of_tensors("source", "mask", scores="weights"),
        **_options(config),
        "dropout_p": call.dropout_p,
        "splits": splits,
        "split_tiles": part_tiles,
        "CHUNKS": chunk_widths(channels),
        "BLOCK_N": config.tokens,
        "POOL_STAGES": config.stages,
    }
    combine_parts = torch.sym_max(
        triton.cdiv(channels, COMBINE_COLUMNS), triton.cdiv(source.tokens, 4 * WEIGHTS_BLOCK)
    )
    combine = {
        **_of_call(operands, source),
        **operands.of_tensors("mask", "weights"),
        "splits": splits,
        "parts": combine_parts,
        "BLOCK_S": COMBINE_ROWS,
        "BLOCK_D": min(COMBINE_CHANNELS, padded_width(channels)),
        "BLOCK_E": COMBINE_COLUMNS,
        "MOST_SPLITS": SPLIT_PROGRAMS,
        "WEIGHTS_BLOCK": WEIGHTS_BLOCK,
        "num_warps": 8,
    }
    launches = [
        Launch(
            scoring.score_pool_fwd_kernel, source.bands * splits, pool, scores_ptr="weights_ptr"
        ),
        Launch(scoring.context_combine_kernel, source.bands * combine_parts, combine),
    ]
    parts: Parts = NO_PARTS
    if path == "long":
        config = call.config("value_gate_output_fwd_kernel", channels)
        tiles = _tiles_of(operands, grid, config.tokens)
        arguments = {
            **_of_call(operands, grid),
            **operands.of_tensors("x", "out"),
            **tiles,
            **_options(config),
            **_value_gate_output(call, config, channels, tiles["BANDS"] * grid.groups),
            "slices": operands.slices,
        }
        launches.append(Launch(fused.value_gate_output_fwd_kernel, tiles["tiles"], arguments))
    else:
        parts = {
            "context_ptr": Part("statistics_ptr", channels * FLOAT32),
            "value_weight_ptr": Part("qkv_weight_ptr", (1 + channels) * channels * call.itemsize),
            "value_bias_ptr": Part("qkv_bias_ptr", (1 + channels) * call.itemsize),
        }
        # The gated values lie in memory as out does.
        values = {"weight_ptr": "value_weight_ptr", "bias_ptr": "value_bias_ptr"}
        names = {**values, "a_ptr": "x_ptr", "slice_ptr": "context_ptr", "out_ptr": "gated_ptr"}
        launches.append(_product(call, operands, "x", "out", "gate", True, **names))
        names = {"weight_ptr": "out_weight_ptr", "bias_ptr": "out_bias_ptr", "a_ptr": "gated_ptr"}
        launches.append(_product(call, operands, "out", "out", "bias", True, **names))
    partials = operands.slices * splits * (channels + 3)
    return ForwardPlan(path, tuple(launches), parts, partials)


def _value_gate_output(call: Call, config: Config, channels: int, slices: int) -> dict[str, Any]:
    """What the kernels are told that hold whole tokens, of ``slices`` slices a tile."""
    depth = _depth(call, channels)
    return {
        "VALUE_CHUNKS": value_widths(channels, slices),
        "ACT": call.act,
        "PRECISION": call.precision,
        "BLOCK_E": min(config.columns, padded_width(channels)),
        "BLOCK_K": depth if channels <= MOST_ROOMY_CHANNELS else depth // 2,
    }


def _slice_launch(call: Call, operands: Operands) -> Launch:
    grid, source, channels = operands.grid, operands.source, operands.channels
    config = call.config("slice_fwd_kernel", channels)
    longest = grid._replace(tokens=torch.sym_max(grid.tokens, source.tokens))
    cut = tiling(longest, config.tokens)
    rows = config.tokens // cut.bands
    sides = triton.cdiv(grid.bands, cut.bands)
    band_tiles = triton.cdiv(grid.tokens, rows)
    splits, part_tiles = split_tiles(band_tiles, torch.sym_max(1, SHARED_PROGRAMS // sides))
    alone = config.programs < 2  # else one program loads while the other works
    chunks = chunk_widths(channels)
    most_values = POOL_VALUES // max(1, config.programs)
    if call.arch not in TABLES:
        most_values //= 4
    fitting = max(16, 1 << (most_values // sum(chunks)).bit_length() - 1)
    arguments = {
        **_of_call(operands, grid),
        **operands.of_tensors("x", "source", "mask", "weights", "out"),
        **_options(config),
        **_value_gate_output(call, config, channels, cut.slices),
        "dropout_p": call.dropout_p,
        "bands": grid.bands,
        "source_tokens": source.tokens,
        "source_width": source.width,
        "band_tiles": band_tiles,
        "split_tiles": part_tiles,
        "slices": operands.slices,
        "CHUNKS": chunks,
        "BANDS": cut.bands,
        "BLOCK_N": config.tokens,
        "BLOCK_P": min(config.tokens, POOL_ROWS, fitting),
        "BLOCK_C": min(KEY_COLUMNS, padded_width(channels), fitting),
        "POOL_STAGES": LONE_POOL_STAGES if alone else 2,
    }
    return Launch(fused.slice_fwd_kernel, sides, arguments, splits)


# Plans, and kinds of tensors, of the passes of one kind of call: one whose tensors agree in shapes,
# strides, dtypes and device. To work them out takes the host as long as a small layer takes the
# GPU. How products in float32 are rounded depends on a setting of torch's too: not for them.
Known = dict[Hashable, tuple[Any, object]]


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
    known: Known | None = None,
    *,
    keep_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    source = x if x_prev is None else x_prev
    slices, channels = x.shape[0] * patch_h * patch_w, num_channels(x)
    _check(x.dtype, channels)
    out = torch.empty_like(x)
    weights = None
    if keep_weights:
        weights = x.new_empty(token_shape(source), dtype=torch.float32)
    # The size not as a tuple: that would take PyTorch nearly a microsecond more.
    statistics = x.new_empty(slices, 2 * channels + 1, dtype=torch.float32)
    if slices == 0:
        return out, weights, statistics
    plan, kind = (known or {}).get(keep_weights, (None, None))
    if plan is None:
        plan = _plan_forward(
            call_of(x, source, act, patch_h, patch_w, dropout_p),
            x.stride(),
            source.stride(),
            None if key_padding_mask is None else key_padding_mask.stride(),
            None if weights is None else weights.stride(),
            out.stride(),
        )
    tensors: dict[str, Tensor | None] = {
        "x_ptr": x,
        "source_ptr": source,
        "qkv_weight_ptr": qkv_weight.contiguous(),
        "qkv_bias_ptr": None if qkv_bias is None else qkv_bias.contiguous(),
        "out_weight_ptr": out_weight.contiguous(),
        "out_bias_ptr": None if out_bias is None else out_bias.contiguous(),
        "mask_ptr": key_padding_mask,
        "seed_ptr": dropout_seed,
        "weights_ptr": weights,
        "statistics_ptr": statistics,
        "out_ptr": out,
    }
    if plan.path != "short":
        tensors["partial_ptr"] = statistics.new_empty(plan.partials)
    if plan.path == "wide":
        tensors["gated_ptr"] = torch.empty_like(out)
    if kind is None:
        kind = kind_of(x.device, tensors)
        if known is not None and x.dtype != torch.float32:
            known[keep_weights] = plan, kind
    run(plan.launches, x.device, tensors, plan.parts, kind)
    return out, weights, statistics


def _check(dtype: torch.dtype, channels: int) -> None:
    if dtype == torch.float64:
        raise TypeError(
            "the fused layer takes float32, bfloat16 and float16; float64 goes through "
            "sep_attn.functional.separable_attention, which composes it of smaller kernels"
        )
    if channels > MOST_CHANNELS:
        raise ValueError(
            f"the Triton kernels take up to {MOST_CHANNELS} channels, this layer has {channels}"
        )


def separable_attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output and what its backward needs.

    Args:
        x, x_prev: ``[B, N, D]`` or ``[B, D, H, W]``, any strides; x_prev None or of another N.
        qkv_weight, qkv_bias, out_weight, out_bias: as in ``nn.Linear``; biases may be None.
        key_padding_mask: bool, one value a token of the source, True leaves it out; or None.
        dropout_seed: int64 ``[1]`` on the device, or None for no dropout.
        dropout_p: probability of a zero.
        act: ``"relu"`` or ``"identity"``.
        patch_h, patch_w: the patch of ``[B, D, H, W]``; 1, 1 for ``[B, N, D]``.
        known: what earlier calls found out, if all agree in shapes, strides, dtypes and device of
            their tensors and in all that is no tensor; filled here.

    Returns:
        ``out`` like x; the softmax weights in float32, one a token of the source;
        ``statistics [S, 2 D + 1]`` in float32: pooled source, context and sum of the dropped
        weights of each slice.

    Raises:
        ValueError: more tokens a slice, or more channels, than the kernels count.
    """
    out, weights, statistics = _forward(*arguments, keep_weights=True)
    assert weights is not None
    return out, weights, statistics


def separable_attention_inference(*arguments: Any) -> Tensor:
    """The output alone; see :func:`separable_attention`."""
    return _forward(*arguments, keep_weights=False)[0]


def _weight_grad(
    call: Call, operands: Operands, a: str, b: str, **names: str
) -> tuple[int, int, Launch]:
    """Into how many parts ``a^T b`` is split, how many there is to be room for, and the launch."""
    config = call.config("weight_grad_kernel", operands.channels)
    tiles = _tiles_of(operands, operands.grid, config.tokens)
    columns = min(config.columns, padded_width(operands.channels))
    blocks = triton.cdiv(operands.channels, columns) ** 2
    most = max(1, WEIGHT_PROGRAMS // blocks)
    splits, part_tiles = split_tiles(tiles["tiles"], most)
    arguments = {
        **_of_call(operands, operands.grid),
        **operands.of_tensors(a=a, b=b),
        **tiles,
        **_options(config),
        "split_tiles": part_tiles,
        "PRECISION": call.precision,
        "BLOCK_I": columns,
        "BLOCK_J": columns,
    }
    launch = Launch(products.weight_grad_kernel, blocks * splits, arguments, **names)
    return splits, _most(splits, most), launch


def _value_gate_weights(call: Call, operands: Operands) -> tuple[int, int, Launch]:
    """Into how many parts the tokens are split, how many there is to be room for, and the
    launch."""
    config = call.config("value_gate_weights_bwd_kernel", operands.channels)
    tiles = _tiles_of(operands, operands.grid, config.tokens)
    block = min(config.columns, padded_width(operands.channels))
    columns = triton.cdiv(operands.channels, block)
    most = max(1, WEIGHT_WARPS // config.warps // columns)
    splits, part_tiles = split_tiles(tiles["tiles"], most)
    pieces = weight_rows(operands.channels)
    arguments = {
        **_of_call(operands, operands.grid),
        **operands.of_tensors("grad_out", "x", grad_v="like"),
        **tiles,
        **_options(config),
        "split_tiles": part_tiles,
        "slices": operands.slices,
        "CHUNKS": pieces,
        "ACT": call.act,
        "PRECISION": call.precision,
        "BLOCK_E": block,
        # Of narrower pieces not all products are sm_90's widest, which read shared memory. Where
        # others want tokens in registers too, Triton (3.6, 3.7.1) has a single buffer for both, and
        # loads the next tile into it while these still read.
        "STAGES": config.stages if min(pieces) >= WIDE_PRODUCT_ROWS else 1,
    }
    launch = Launch(fused.value_gate_weights_bwd_kernel, columns * splits, arguments)
    return splits, _most(splits, most), launch


def _most(count: int, most: int) -> int:
    """``count``; where it is a symbol, the ``most`` that it can be."""
    return count if isinstance(count, int) else most


class BackwardPlan(NamedTuple):
    """The launches of a backward pass, before and after the tiles of each slice,
    ``partial_shape[1]``, are summed where that is not the kernels' work.

    ``scratch`` are the float32 values of each tensor that only these launches use, by name, and
    ``scratch_values`` those of the one that holds them all, in ``parts``. ``in_place``: dx may take
    the place of dv, for a program reads all channels of its tokens before it writes them.
    ``at_once``: the first launch makes the gradients of both weights, and of their biases.
    """

    before_sums: tuple[Launch, ...]
    partial_shape: tuple[int, ...]
    sum_tiles: bool
    after_sums: tuple[Launch, ...]
    scratch: Mapping[str, int]
    scratch_values: int
    parts: Parts
    at_once: bool
    in_place: bool


class Partials(NamedTuple):
    """A sum of ``partial [splits, values]``: the first values go to ``sums``, the others to
    ``rest``, all three by the names that the call's tensors have."""

    partial_ptr: str
    splits: int
    values: int
    sums_ptr: str
    first_values: int
    rest_ptr: str | None = None


def _sum_parts(*given: Partials) -> Launch:
    """The launch that takes up to three sums."""
    values = max(partials.values for partials in given)
    rows = SUM_ROWS if values <= FEW_VALUES else SUM_ROWS // 4
    columns = SUM_VALUES // rows
    arguments: dict[str, Any] = {"BLOCK_S": rows, "BLOCK": columns}
    names: dict[str, str] = {}
    for place, partials in itertools.zip_longest(("", "second_", "third_"), given):
        fields = partials._asdict() if partials else dict.fromkeys(Partials._fields)
        for name, value in fields.items():
            if isinstance(value, str):
                names[f"{place}{name}"] = value
            else:
                arguments[f"{place}{name}"] = value
    programs = sum(triton.cdiv(partials.values, columns) for partials in given)
    return Launch(products.sum_parts_kernel, programs, arguments, **names)


def _partial_shape(first: Launch, tile_slices: int, at_once: bool) -> tuple[int, ...]:
    """Of the sums that a backward pass's first launch leaves for each tile: tiles side by side;
    tiles of a band; slices of a tile and, unless ``at_once``, a row for each of b_V and b_O;
    channels."""
    tiles = first.arguments
    sides = triton.cdiv(tiles["bands"], tiles["BANDS"])
    return sides, tiles["band_tiles"], tile_slices + (0 if at_once else 2), tiles["D"]


def _context(
    call: Call,
    operands: Operands,
    partial_shape: tuple[int, ...],
    tile_slices: int,
    need_weight_grad: bool,
) -> tuple[Launch, int, bool]:
    """The launch that takes the gradient of each context from the sums of the first launch; how
    many blocks of slices it has; whether the tiles of a slice are to be summed before."""
    _, band_tiles, rows, channels = partial_shape
    sum_tiles = not statically_known_true(band_tiles <= MOST_TILES_SUMMED)
    block_slices = max(CONTEXT_SLICES, tile_slices)
    columns = min(CONTEXT_COLUMNS, padded_width(channels))
    arguments = {
        "band_tiles": 1 if sum_tiles else band_tiles,
        "slices": operands.slices,
        "D": channels,
        "SLICES": tile_slices,
        "ROWS": rows,
        "PRECISION": _slice_precision(call),
        "BLOCK_S": block_slices,
        "BLOCK_E": columns,
    }
    if not need_weight_grad:
        arguments |= dict.fromkeys(("grad_context_ptr", "bias_partial_ptr"))
    blocks = triton.cdiv(operands.slices, block_slices)
    programs = blocks * triton.cdiv(channels, columns)
    names = {"partial_ptr": "summed_ptr"} if sum_tiles else {}
    return Launch(scoring.context_bwd_kernel, programs, arguments, **names), blocks, sum_tiles


def _key_weight(call: Call, operands: Operands) -> tuple[int, int, Launch]:
    """Into how many parts the slices are split for the gradient of W_K, how many there is to be
    room for, and the launch."""
    channels, slices = operands.channels, operands.slices
    columns = min(CONTEXT_COLUMNS, padded_width(channels))
    blocks = triton.cdiv(channels, columns) ** 2
    most = max(1, KEY_PROGRAMS // blocks)
    splits, part_tiles = split_tiles(triton.cdiv(slices, KEY_SLICES), most)
    arguments = {
        "slices": slices,
        "split_tiles": part_tiles,
        "D": channels,
        "PRECISION": _slice_precision(call),
        "BLOCK_S": KEY_SLICES,
        "BLOCK_E": columns,
    }
    names = {"partial_ptr": "key_partial_ptr"}
    launch = Launch(scoring.key_weight_bwd_kernel, blocks * splits, arguments, **names)
    return splits, _most(splits, most), launch


def _slice_precision(call: Call) -> str:
    """Of rows of slices, in float32, times W_K. What is rounded here the softmax does not take back
    (:func:`scoring.context_bwd_kernel`): three products in TF32 stand for one, even where torch
    allows a single one."""
    has_tensor_cores = call.arch.startswith("sm_") and int(call.arch[3:]) >= 80
    may_round = call.itemsize == 2 or call.precision == "tf32"
    return "tf32x3" if has_tensor_cores and may_round else "ieee"


@planned
def _plan_backward(
    call: Call,
    separate: bool,
    need_input_grad: bool,
    need_weight_grad: bool,
    x_strides: tuple[int, ...],
    source_strides: tuple[int, ...],
    grad_out_strides: tuple[int, ...],
    like_strides: tuple[int, ...],
    grad_source_strides: tuple[int, ...] | None,
    weights_strides: tuple[int, ...],
    grad_weights_strides: tuple[int, ...] | None,
) -> BackwardPlan:
    operands = call.operands(
        {"x": x_strides, "grad_out": grad_out_strides, "like": like_strides},
        {
            "source": source_strides,
            "grad_source": grad_source_strides,
            "weights": weights_strides,
            "grad_scores": _contiguous_strides(call.source_shape),
            "grad_weights": grad_weights_strides,
        },
    )
    channels, slices = operands.channels, operands.slices
    matrix = channels * channels
    before: dict[str, int] = {}  # scratch that only the launches before the sums of tiles use

    at_once = need_weight_grad and channels <= MOST_FUSED_BACKWARD_CHANNELS[call.itemsize]
    if at_once:
        splits, parts, first = _value_gate_weights(call, operands)
        weights = "grad_value_weight_ptr", matrix, "grad_out_weight_ptr"
        biases = "grad_value_bias_ptr", channels, "grad_out_bias_ptr"
        sums = _sum_parts(
            Partials("weight_partial_ptr", splits, 2 * matrix, *weights),
            Partials("token_bias_partial_ptr", splits, 2 * channels, *biases),
        )
        before_sums = [first, sums]
        before["weight_partial_ptr"] = parts * 2 * matrix
        before["token_bias_partial_ptr"] = parts * 2 * channels
    else:
        first = _value_gate(call, operands)
        before_sums = [first]
        if need_weight_grad:
            for a, b, a_like, b_like, sums_ptr in (
                ("grad_out_ptr", "gated_ptr", "grad_out", "like", "grad_out_weight_ptr"),
                ("grad_v_ptr", "x_ptr", "like", "x", "grad_value_weight_ptr"),
            ):
                names = {"a_ptr": a, "b_ptr": b, "partial_ptr": "weight_partial_ptr"}
                splits, parts, product = _weight_grad(call, operands, a_like, b_like, **names)
                sums = _sum_parts(Partials("weight_partial_ptr", splits, matrix, sums_ptr, matrix))
                before_sums += [product, sums]
            before["weight_partial_ptr"] = parts * matrix

    tile_slices = first.arguments["BANDS"] * first.arguments["GROUPS"]
    partial_shape = _partial_shape(first, tile_slices, at_once)
    context_launch, blocks, sum_tiles = _context(
        call, operands, partial_shape, tile_slices, need_weight_grad
    )
    source_launch = _source(call, operands, separate)
    after = {
        "grad_scores_ptr": operands.source.bands * operands.source.tokens,
        "grad_pooled_ptr": slices * channels,
        "slice_grads_ptr": slices * 2,
        "score_partial_ptr": source_launch.programs * (channels + 1),
    }
    after_sums = [context_launch, source_launch]
    in_place = False
    if need_input_grad:
        product = _input_product(call, operands, separate)
        in_place = product.arguments["BLOCK_E"] >= channels
        after_sums.append(product)
    if need_weight_grad:
        after["grad_context_ptr"] = slices * channels
        if at_once:
            bias_sums = Partials(
                "bias_partial_ptr", blocks, channels, "grad_key_bias_ptr", channels
            )
        else:
            biases = "grad_bias_ptr", 2 * channels, "grad_out_bias_ptr"
            bias_sums = Partials("bias_partial_ptr", blocks, 3 * channels, *biases)
        after["bias_partial_ptr"] = blocks * bias_sums.values
        splits, parts, product = _key_weight(call, operands)
        after["key_partial_ptr"] = parts * matrix
        scores = "grad_qkv_weight_ptr", channels, "grad_qkv_bias_ptr"
        sums = _sum_parts(
            bias_sums,
            Partials("score_partial_ptr", source_launch.programs, channels + 1, *scores),
            Partials("key_partial_ptr", splits, matrix, "grad_key_weight_ptr", matrix),
        )
        after_sums += [product, sums]
    shared = {"partial_ptr": math.prod(partial_shape)}
    taken = {"value_weight_ptr": Part("qkv_weight_ptr", (channels + matrix) * call.itemsize)}
    scratch_values = 0
    if not tracing.is_active():
        scratch_parts, scratch_values = _placed(shared, before, after)
        taken |= scratch_parts
        if need_weight_grad:
            taken |= _placed_pieces(call.itemsize, channels, at_once)
    return BackwardPlan(
        tuple(before_sums),
        partial_shape,
        sum_tiles,
        tuple(after_sums),
        shared | before | after,
        scratch_values,
        taken,
        at_once,
        in_place,
    )


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of one value a token of ``[B, N, D]`` or ``[B, D, H, W]``."""
    if len(shape) == 3:
        return shape[1], 1
    return shape[2] * shape[3], shape[3], 1


def _placed(shared: dict[str, int], *groups: dict[str, int]) -> tuple[dict[str, Part], int]:
    """Where tensors of so many float32 values lie in one, and how many that has. Those of a group
    take the place of another group's, which is not used at the same time."""
    parts: dict[str, Part] = {}

    def place(sizes: dict[str, int], first: int) -> int:
        for name, size in sizes.items():
            parts[name] = Part("scratch_ptr", first * FLOAT32)
            first += triton.cdiv(size, SCRATCH_RUN) * SCRATCH_RUN
        return first

    first = place(shared, 0)
    return parts, max(place(sizes, first) for sizes in groups)


def _pieces(channels: int, at_once: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Of qkv_proj's gradients: rows of score, keys and values; and what belongs to them of the
    bias, keys and values together where not both weights' gradients are made at once. The first has
    the name of the whole."""
    rows = {
        "grad_qkv_weight_ptr": 1,
        "grad_key_weight_ptr": channels,
        "grad_value_weight_ptr": channels,
    }
    if not at_once:
        return rows, {"grad_qkv_bias_ptr": 1, "grad_bias_ptr": 2 * channels}
    biases = {
        "grad_qkv_bias_ptr": 1,
        "grad_key_bias_ptr": channels,
        "grad_value_bias_ptr": channels,
    }
    return rows, biases


def _placed_pieces(itemsize: int, channels: int, at_once: bool) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    rows, biases = _pieces(channels, at_once)
    for sizes, row_size in ((rows, channels * itemsize), (biases, itemsize)):
        whole, *names = sizes
        firsts = itertools.accumulate(sizes.values())
        parts |= {
            name: Part(whole, first * row_size) for name, first in zip(names, firsts, strict=False)
        }
    return parts


def _value_gate(call: Call, operands: Operands) -> Launch:
    channels = operands.channels
    config = call.config("value_gate_bwd_kernel", channels)
    tiles = _tiles_of(operands, operands.grid, config.tokens)
    columns = min(config.columns, padded_width(channels))
    arguments = {
        **_of_call(operands, operands.grid),
        **operands.of_tensors("grad_out", "x", gated="like", grad_v="like"),
        **tiles,
        **_options(config),
        "slices": operands.slices,
        "ACT": call.act,
        "PRECISION": call.precision,
        "BLOCK_E": columns,
        "BLOCK_K": _depth(call, channels),
    }
    programs = tiles["tiles"] * triton.cdiv(channels, columns)
    return Launch(products.value_gate_bwd_kernel, programs, arguments)


def _source(call: Call, operands: Operands, separate: bool) -> Launch:
    config = call.config("source_bwd_kernel", operands.channels)
    tiles = _tiles_of(operands, operands.source, config.tokens)
    programs, part_tiles = split_tiles(tiles["tiles"], SPLIT_PROGRAMS)
    if not isinstance(programs, int):
        programs = SPLIT_PROGRAMS  # those with nothing to do store zeros
    arguments = {
        **_of_call(operands, operands.source),
        **operands.of_tensors(
            "source",
            "weights",
            "grad_weights",
            "grad_scores",
            grad_source="grad_source" if separate else "none",
        ),
        **tiles,
        **_options(config),
        "dropout_p": call.dropout_p,
        "GRAD_SOURCE_LAYOUT": operands.layouts.get("grad_source", ""),
        "split_tiles": part_tiles,
        "POOL_STAGES": config.stages,
        "slices": operands.slices,
        "CHUNKS": chunk_widths(operands.channels),
    }
    names = {"score_weight_ptr": "qkv_weight_ptr", "partial_ptr": "score_partial_ptr"}
    return Launch(scoring.source_bwd_kernel, programs, arguments, **names)


def _input_product(call: Call, operands: Operands, separate: bool) -> Launch:
    """The product that gives dx; where x is the source too, with the pool's terms."""
    names = {"a_ptr": "grad_v_ptr", "weight_ptr": "value_weight_ptr", "out_ptr": "grad_x_ptr"}
    if separate:
        return _product(call, operands, "like", "like", "bias", False, **names)
    names |= {"slice_ptr": "grad_pooled_ptr", "score_weight_ptr": "qkv_weight_ptr"}
    names |= {name: name for name in ("weights_ptr", "grad_scores_ptr", "seed_ptr")}
    return _product(call, operands, "like", "like", "pool", False, **names)


def separable_attention_backward(
    grad_out: Tensor,
    grad_weights: Tensor | None,
    x: Tensor,
    x_prev: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    dropout_seed: Tensor | None,
    weights: Tensor,
    statistics: Tensor,
    dropout_p: float,
    act: str,
    patch_h: int,
    patch_w: int,
    need_input_grad: bool,
    need_weight_grad: bool,
    known: Known | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of :func:`separable_attention`.

    Args:
        grad_out, grad_weights: gradients of the first two results, any strides, 0 among them; None
            where the weights took none.
        weights, statistics: what the forward returned; all others as given to it.
        need_input_grad: whether gradients of x and x_prev are wanted.
        need_weight_grad: whether those of weights and biases are.
        known: as for the forward pass; strides may differ here.

    Returns:
        Gradients of x, x_prev, qkv_weight, qkv_bias, out_weight and out_bias in the dtype of x;
        empty where not wanted.
    """
    source = x if x_prev is None else x_prev
    slices, channels = x.shape[0] * patch_h * patch_w, num_channels(x)
    grad_x = torch.empty_like(x) if need_input_grad else x.new_empty(0)
    grad_source = None
    if x_prev is not None and need_input_grad:
        grad_source = torch.empty_like(x_prev)

    input_grads = grad_x, x.new_empty(0) if grad_source is None else grad_source

    def gradient(*shape: int) -> Tensor:
        wanted = shape if need_weight_grad else (0,)
        return x.new_zeros(*wanted) if slices == 0 else x.new_empty(*wanted)

    grad_qkv_weight = gradient(1 + 2 * channels, channels)
    grad_qkv_bias = gradient(1 + 2 * channels)
    grad_out_weight, grad_out_bias = gradient(channels, channels), gradient(channels)
    if slices == 0 or not (need_input_grad or need_weight_grad):
        return *input_grads, grad_qkv_weight, grad_qkv_bias, grad_out_weight, grad_out_bias
    statistics = statistics.contiguous()
    qkv_weight, out_weight = qkv_weight.contiguous(), out_weight.contiguous()
    qkv_bias = None if qkv_bias is None else qkv_bias.contiguous()
    like = grad_x if need_input_grad else torch.empty_like(x)
    needs = need_input_grad, need_weight_grad
    plan, kind, pass_key = None, None, None
    if known is not None:  # which no traced program has, whose strides may be symbols
        # Between the passes a tensor may be kept elsewhere, and come back with other strides.
        pass_key = grad_out.stride(), x.stride(), weights.stride(), needs
        plan, kind = known.get(pass_key, (None, None))
    if plan is None:
        plan = _plan_backward(
            call_of(x, source, act, patch_h, patch_w, dropout_p),
            x_prev is not None,
            *needs,
            x.stride(),
            source.stride(),
            grad_out.stride(),
            like.stride(),
            None if grad_source is None else grad_source.stride(),
            weights.stride(),
            None if grad_weights is None else grad_weights.stride(),
        )
    weights_delta = None
    if grad_weights is not None:
        # A weight of 0 gives no gradient, whatever comes: that of p log p is not finite.
        felt = torch.where(weights == 0.0, 0.0, weights * grad_weights)
        per_slice = token_view(felt, patch_h, patch_w)
        weights_delta = per_slice.sum((-2, -1), dtype=torch.float32).flatten()
    # In a traced program every result of a kernel is a tensor of its own: Inductor copies what is
    # read as well, and of two that overlap it writes one back over the other.
    traced = tracing.is_active()
    in_place = plan.in_place and not traced
    grad_v = like if in_place or not need_input_grad else torch.empty_like(x)
    tensors: dict[str, Tensor | None] = {
        "grad_out_ptr": grad_out,
        "x_ptr": x,
        "source_ptr": source,
        "qkv_weight_ptr": qkv_weight,
        "qkv_bias_ptr": qkv_bias,
        "out_weight_ptr": out_weight,
        "statistics_ptr": statistics,
        "weights_ptr": weights,
        "weights_delta_ptr": weights_delta,
        "grad_weights_ptr": grad_weights,
        "seed_ptr": dropout_seed,
        "grad_v_ptr": grad_v,
        "gated_ptr": torch.empty_like(x) if need_weight_grad and not plan.at_once else None,
        "grad_x_ptr": grad_x,
        "grad_source_ptr": grad_source,
        "grad_qkv_weight_ptr": grad_qkv_weight,
        "grad_qkv_bias_ptr": grad_qkv_bias,
        "grad_out_weight_ptr": grad_out_weight,
        "grad_out_bias_ptr": grad_out_bias,
    }
    if traced:
        sizes = plan.scratch
        rows, biases = _pieces(channels, plan.at_once)
        grad_rows = {name: x.new_empty(count, channels) for name, count in rows.items()}
        grad_biases = {name: x.new_empty(count) for name, count in biases.items()}
        tensors |= grad_rows | grad_biases
    else:
        sizes = {"scratch_ptr": plan.scratch_values}
    scratch = {name: statistics.new_empty(size) for name, size in sizes.items()}
    tensors |= scratch
    if kind is None:
        kind = kind_of(x.device, tensors)
        if known is not None and x.dtype != torch.float32:
            known[pass_key] = plan, kind
    if plan.sum_tiles:
        run(plan.before_sums, x.device, tensors, plan.parts, kind)
        partial = scratch["partial_ptr" if traced else "scratch_ptr"]
        partial = partial[: plan.scratch["partial_ptr"]].view(plan.partial_shape)
        tensors["summed_ptr"] = partial.sum(1)
        run(plan.after_sums, x.device, tensors, plan.parts, kind)
    else:
        run((*plan.before_sums, *plan.after_sums), x.device, tensors, plan.parts, kind)
    if traced and need_weight_grad:
        grad_qkv_weight = torch.cat(list(grad_rows.values()))
        grad_qkv_bias = torch.cat(list(grad_biases.values()))
    return *input_grads, grad_qkv_weight, grad_qkv_bias, grad_out_weight, grad_out_bias
