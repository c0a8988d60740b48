"""What every launch shares: the token grid as kernels see it, tile and split rules, device guard.

A *band* is what one program works on: ``groups`` slices whose tokens lie side by side, token ``n``
of the band in group ``n % groups``. With a patch 2 or 4 pixels wide the slices of a row of the
patch make one band, which is then read in whole runs of memory; otherwise a band is a slice. Slice
``s`` is group ``s % groups`` of band ``s // groups``.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from sep_attn.triton_kernels import tracing

ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}

INTERLEAVED = (2, 4)

# Values of a tile by the size of one, in bytes; half of it where memory is not read in words of 16
# bytes, for every value then holds an address. Four warps work on a tile.
TILE_VALUES = {2: 4096, 4: 4096, 8: 2048}
# Channels of the widest tile, by the axis that is contiguous in memory.
WIDEST_TILE = {"channels": 128, "tokens": 64, "strided": 64}
NARROWEST_TILE = 16

# Sums over tokens are split over programs when there are fewer than PROGRAMS, into parts of at
# least TILES_PER_SPLIT tiles; where that leaves one part, one launch does it all.
PROGRAMS = 1024
TILES_PER_SPLIT = 8
# Combining kernels hold a tile of partial sums: [COMBINE_ROWS, COMBINE_CHANNELS].
COMBINE_ROWS = 128
COMBINE_CHANNELS = 32

# Launches whose plans are kept, for each kind: a plan depends on shapes, strides and dtypes alone.
PLANS = 1024

# Token indices are int32; offsets are int64.
MOST_TOKENS = 2**30

_OPERANDS = (
    *("x", "source", "out", "v", "y", "a", "b", "gated", "context", "pooled"),
    *("scores", "weights", "mask", "dropout"),
)
# What varies from call to call: a new length or stride never compiles a kernel anew.
VARYING = (
    "bands",
    "tokens",
    "width",
    "channels",
    "source_tokens",
    "source_width",
    "slices",
    "tiles",
    "band_tiles",
    "splits",
    "second_splits",
    "third_splits",
    "split_tiles",
    "parts",
    "row_size",
    *(f"{gradient}{operand}_strides" for operand in _OPERANDS for gradient in ("", "grad_")),
    "weight_sum_stride",
    "grad_weight_sum_stride",
)

# Triton compiles anew for every int of a tuple that turns 1 or a multiple of 16, whatever
# do_not_specialize says. Strides travel shifted by this many bits, and so all look alike.
STRIDE_SHIFT = tl.constexpr(tracing.SHIFT)


class TokenGrid(NamedTuple):
    """Bands of ``tokens`` tokens in rows of ``width``. ``patch_w`` counts the bands side by side in
    a patch."""

    bands: int
    tokens: int
    width: int
    channels: int
    patch_h: int
    patch_w: int
    groups: int

    def arguments(self) -> dict[str, int]:
        """What kernels are told about the grid."""
        arguments = self._asdict()
        arguments["GROUPS"] = arguments.pop("groups")
        return arguments


def token_grid(shape: tuple[int, ...], patch_h: int, patch_w: int) -> TokenGrid:
    """The grid of ``[B, N, D]`` or ``[B, D, H, W]``.

    Raises:
        ValueError: a band of more tokens than an int32 index counts.
    """
    if len(shape) == 3:
        batch, width, channels = shape
        rows = groups = 1
    else:
        batch, channels, height, columns = shape
        groups = patch_w if patch_w in INTERLEAVED else 1
        patch_w //= groups
        rows, width = height // patch_h, columns // patch_w
    tokens = rows * width
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"the Triton kernels take up to {MOST_TOKENS} tokens a slice (or row of slices), "
            f"this call has {tokens}; cut the input along its tokens"
        )
    if statically_known_true(rows == 1) or statically_known_true(width == 1):
        width = tokens
    return TokenGrid(batch * patch_h * patch_w, tokens, width, channels, patch_h, patch_w, groups)


def grid_strides(
    shape: tuple[int, ...], stride: tuple[int, ...], grid: TokenGrid
) -> tuple[int, ...]:
    """Strides of (image, row of the patch, column of the patch, row of tokens, token), and of the
    channels of a tensor that has them.

    Args:
        shape: of x, ``[B, N, D]`` or ``[B, D, H, W]``.
        stride: of a tensor of that shape, or of one value a token, ``[B, N]`` or ``[B, H, W]``.
    """
    image = 0 if statically_known_true(shape[0] <= 1) else stride[0]
    if len(shape) == 3:
        return image, 0, 0, 0, *stride[1:]
    *channel, row, column = stride[1:]
    patch_row = row if grid.patch_h > 1 else 0
    patch_column = column if grid.patch_w > 1 else 0
    row, column = row * grid.patch_h, column * grid.patch_w
    if statically_known_true(shape[3] == grid.patch_w):  # one token a row: go from row to row
        row, column = 0, row
    return image, patch_row, patch_column, row, column, *channel


def shifted(strides: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Strides as kernels take them: see ``STRIDE_SHIFT``."""
    return None if strides is None else tuple(stride * 2**tracing.SHIFT for stride in strides)


def is_uniform(grid: TokenGrid, operands: Iterable[tuple[int, ...]]) -> bool:
    """Whether one stride leads from token to token through the whole band, in every operand."""
    return statically_known_true(grid.width == grid.tokens) or all(
        statically_known_true(strides[3] == grid.width * strides[4]) for strides in operands
    )


def memory_layout(itemsize: int, grid: TokenGrid, strides: tuple[int, ...], uniform: bool) -> str:
    """The axis that is contiguous in memory, ``channels`` or ``tokens``, with ``_wide`` where every
    run of it consists of whole 16-byte words; else ``strided``."""
    *starts, row, token, channel = strides
    if not uniform:
        starts.append(row)
    if channel == 1:
        axis, run = "channels", grid.channels
        starts.append(token)
    elif token == 1:
        axis, run = "tokens", grid.tokens if uniform else grid.width
        starts.append(channel)
    else:
        return "strided"
    word = 16 // itemsize
    return f"{axis}_wide" if all(step % word == 0 for step in (run, *starts)) else axis


# Of a tensor's axes, by the operand's name; None where there is no such operand.
Strides = Mapping[str, tuple[int, ...] | None]


class Operands:
    """How the operands of a call lie in memory, by name: strides over the token grid, the layouts
    of those with channels, and whether all are :func:`is_uniform`.

    Args:
        itemsize: bytes of a value.
        patch_h, patch_w: of the call.
        sides: a shape, of x and then of the source where there is one, and the strides of operands
            that have it or one value a token of it.
    """

    def __init__(
        self, itemsize: int, patch_h: int, patch_w: int, *sides: tuple[tuple[int, ...], Strides]
    ) -> None:
        grids = [token_grid(shape, patch_h, patch_w) for shape, _ in sides]
        self.grid, self.source = grids[0], grids[-1]
        self.channels = self.grid.channels
        self.slices = self.grid.bands * self.grid.groups
        self.strides: dict[str, tuple[int, ...]] = {}
        self.layouts: dict[str, str] = {}
        self.uniform = True
        of_grids = [
            {
                name: grid_strides(shape, value, grid)
                for name, value in given.items()
                if value is not None
            }
            for grid, (shape, given) in zip(grids, sides, strict=True)
        ]
        for grid, strides in zip(grids, of_grids, strict=True):
            self.uniform = self.uniform and is_uniform(grid, strides.values())
            self.strides |= strides
        for grid, strides in zip(grids, of_grids, strict=True):
            for name, value in strides.items():
                if len(value) == 6:
                    self.layouts[name] = memory_layout(itemsize, grid, value, self.uniform)

    def of_tensors(self, *same: str, **operands: str) -> dict[str, Any]:
        """Strides, and the layout where an operand has channels, by the names of a kernel; ``same``
        are those that the kernel names alike."""
        arguments: dict[str, Any] = {}
        for name, operand in (*zip(same, same, strict=True), *operands.items()):
            arguments[f"{name}_strides"] = shifted(self.strides.get(operand))
            if operand in self.layouts:
                arguments[f"{name.upper()}_LAYOUT"] = self.layouts[operand]
        return arguments


def tile_shape(itemsize: int, layout: str, channels: int) -> tuple[int, int]:
    """Tokens and channels of a tile: the widest in channels that pads them by a quarter or less."""
    axis, _, wide = layout.partition("_")
    values = TILE_VALUES[itemsize] // (1 if wide else 2)
    block = WIDEST_TILE[axis]
    while block > NARROWEST_TILE and triton.cdiv(channels, block) * block > 1.25 * channels:
        block //= 2
    return values // block, block


def split_tiles(tiles: int, most: int) -> tuple[int, int]:
    """Into how many parts this many tiles are split, ``most`` or fewer, and how many tiles a part
    has. None is empty, except in a traced program, where the number of tiles is a symbol."""
    parts = torch.sym_max(1, torch.sym_min(tiles, most))
    part_tiles = triton.cdiv(tiles, parts)
    return triton.cdiv(tiles, part_tiles) if isinstance(tiles, int) else parts, part_tiles


def split_tokens(programs: int, tokens: int, block_tokens: int) -> tuple[int, int]:
    """Into how many parts the tokens of a band are split, and how many tiles a part has, where
    ``programs`` programs would run without splitting."""
    tiles = triton.cdiv(tokens, block_tokens)
    if not isinstance(tiles, int):  # nearly the same, in terms of which less is to be proved
        most = torch.sym_min(triton.cdiv(tiles, TILES_PER_SPLIT), PROGRAMS // programs)
        return split_tiles(tiles, most)
    part_tiles = max(TILES_PER_SPLIT, triton.cdiv(tiles * programs, PROGRAMS))
    return triton.cdiv(tiles, part_tiles), part_tiles


class Plan(NamedTuple):
    """Into how many parts a band is split, and the launches."""

    splits: int
    launches: tuple[Launch, ...]


class Part(NamedTuple):
    """What lies in another of a call's tensors, a contiguous one, from its byte ``offset`` on: to
    make a view takes the host a microsecond or two."""

    whole: str
    offset: int

    def of(self, tensors: Tensors) -> Tensor | None:
        whole = tensors[self.whole]
        return None if whole is None else whole.flatten()[self.offset // whole.itemsize :]


# What kernels are given, by the names that a call has for it; parts of them, by their own names.
Tensors = Mapping[str, Tensor | None]
Parts = Mapping[str, Part]
NO_PARTS: Parts = types.MappingProxyType({})


class Launch:
    """A kernel, its programs and everything it is told but its tensors.

    Triton compiles by what the arguments are: of tensors, whether they are there, their dtype, and
    whether they begin at a multiple of 16 bytes. What was compiled for tensors of a kind is kept,
    and launched at once by the next call of that kind: to work that out takes Triton longer than a
    small layer's kernel.

    Args:
        kernel: a function of ``triton.jit``.
        programs: how many run.
        arguments: by the kernel's names, the compiler's options among them.
        splits: over how many programs the work of each is split, which a third index counts. (The
            second is always 0, which the compiler does not know.)
        operands: by the kernel's names, what a call's tensors are named where that differs.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        arguments: dict[str, Any],
        splits: int = 1,
        /,
        **operands: str,
    ) -> None:
        self.kernel = kernel
        self.programs = programs
        self.grid = (programs, 1, splits)
        self.arguments = arguments
        self.operands = {
            name: operands.get(name, name) for name in kernel.arg_names if name not in arguments
        }
        self._compiled: dict[Hashable, CompiledKernel] = {}
        self._template = [arguments.get(name) for name in kernel.arg_names]
        self._places = [
            (place, self.operands[name])
            for place, name in enumerate(kernel.arg_names)
            if name in self.operands
        ]

    def taken(self, tensors: Tensors, parts: Parts) -> dict[str, Tensor | None]:
        """What the kernel takes of a call's tensors and of parts that are not among them, by its
        own names."""
        return {
            name: tensors[operand] if operand in tensors else parts[operand].of(tensors)
            for name, operand in self.operands.items()
        }

    def __call__(
        self,
        kind: Hashable,
        tensors: Tensors,
        parts: Parts,
        addresses: Mapping[str, int | None],
        stream: int | None,
    ) -> None:
        """Launches on what the kernel takes of ``tensors`` and ``parts``, which are of this kind
        and begin at ``addresses``. With a stream nothing but the launch itself is done; without one
        Triton finds it out, and calls the hooks of a profiler."""
        compiled = self._compiled.get(kind)
        if compiled is None:
            result = self.kernel[self.grid](**self.taken(tensors, parts), **self.arguments)
            if isinstance(result, CompiledKernel):  # under the interpreter there is none
                self._compiled[kind] = result
            return
        arguments = self._template.copy()
        for place, operand in self._places:
            arguments[place] = addresses[operand]
        if stream is None:
            compiled[self.grid](*arguments)
        else:
            metadata, hooks = compiled.packed_metadata, (None, None, None)
            compiled.run(*self.grid, stream, compiled.function, metadata, *hooks, *arguments)


_KINDS: dict[Hashable, object] = {}


def kind_of(device: torch.device, tensors: Tensors) -> object:
    """What Triton compiles a kernel by, besides a launch's own arguments and where tensors begin:
    which there are, and their dtypes. The same object each time, which is looked up quicker than
    they are."""
    dtypes = [None if value is None else value.dtype for value in tensors.values()]
    return _KINDS.setdefault((device.index, *dtypes), object())


def run(
    launches: Sequence[Launch],
    device: torch.device,
    tensors: Tensors,
    parts: Parts = NO_PARTS,
    kind: object = None,
) -> None:
    """Launches kernels one after another; each takes what it needs of the call's tensors, whose
    :func:`kind_of` may be known, and of their parts."""
    if tracing.is_active():
        for launch in launches:
            taken = launch.taken(tensors, parts)
            tracing.launch(launch.kernel, launch.grid, launch.arguments, taken)
        return
    if kind is None:
        kind = kind_of(device, tensors)
    # Of a tensor Triton would ask the driver, for each launch, whether the GPU can reach it.
    addresses = {
        name: None if value is None else value.data_ptr() for name, value in tensors.items()
    }
    together = 0
    for address in addresses.values():
        together |= address or 0
    if together & 15:  # what is left of 16 bytes says where parts begin, too
        kind = kind, *[(address or 0) & 15 for address in addresses.values()]
    for name, (whole, offset) in parts.items():
        address = addresses[whole]
        addresses[name] = None if address is None else address + offset
    with on_device(device):
        stream = current_stream(device)
        for launch in launches:
            launch(kind, tensors, parts, addresses, stream)


def current_stream(device: torch.device) -> int | None:
    """The stream that the launches of a call go to; None where Triton is to ask for it at each of
    them, because something was hooked to them or there is no GPU."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if device.index is None or any(getattr(hook, "calls", hook) for hook in hooks):
        return None
    stream: int = driver.active.get_current_stream(device.index)
    return stream


def planned(plan: Callable[..., Any]) -> Any:
    """Keeps plans by their arguments: shapes, strides, dtypes and choices. Not while a program is
    traced, for then sizes may be symbols, and the plan holds for all that they can be."""
    kept = functools.lru_cache(maxsize=PLANS)(plan)

    @functools.wraps(plan)
    def plan_or_recall(*arguments: Any, **named: Any) -> Any:
        return (plan if tracing.is_active() else kept)(*arguments, **named)

    plan_or_recall.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
    return plan_or_recall


_NOTHING = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes ``device`` current while a kernel is launched; a CPU device needs nothing, nor one that
    is current."""
    if device.type == "cpu" or torch.accelerator.current_device_index() == device.index:
        return _NOTHING
    return torch.accelerator.device_index(device.index)


@triton.jit
def band_offset(i_band, strides, patch_h, patch_w):
    image = (i_band // (patch_w * patch_h)).to(tl.int64)
    row = (i_band // patch_w % patch_h).to(tl.int64)
    column = (i_band % patch_w).to(tl.int64)
    return (image * strides[0] + row * strides[1] + column * strides[2]) >> STRIDE_SHIFT


@triton.constexpr_function
def shift_of(power):
    return power.bit_length() - 1


@triton.jit
def in_runs(value, RUN: tl.constexpr):
    # Changes nothing: shows the compiler a multiple of RUN, which is a power of two.
    SHIFT: tl.constexpr = shift_of(RUN)
    return value >> SHIFT << SHIFT


@triton.jit
def stride_of(strides, AXIS: tl.constexpr, WORD: tl.constexpr):
    return in_runs(strides[AXIS] >> STRIDE_SHIFT, WORD)


@triton.jit
def token_offsets(tokens, strides, width, UNIFORM: tl.constexpr, WORD: tl.constexpr = 1):
    if UNIFORM:
        return tokens.to(tl.int64) * stride_of(strides, 4, WORD)
    else:
        rows = (tokens // width).to(tl.int64)
        columns = (tokens % width).to(tl.int64)
        return rows * stride_of(strides, 3, WORD) + columns * stride_of(strides, 4, WORD)


@triton.constexpr_function
def word_of(pointer_type):
    # Values in 16 bytes.
    return 128 // pointer_type.element_ty.primitive_bitwidth


@triton.constexpr_function
def runs_along(layout, axis):
    # Of memory_layout: whether this axis, "tokens" or "channels", is contiguous.
    return layout.startswith(axis)


@triton.constexpr_function
def run_of(pointer_type, layout):
    # Values that surely lie side by side, from a multiple of 16 bytes on.
    return word_of(pointer_type) if layout.endswith("_wide") else 1


@triton.constexpr_function
def any_is(layout, *layouts):
    return layout in layouts


@triton.jit
def in_words(
    tokens,
    width,
    channels,
    ptr,
    GROUPS: tl.constexpr,
    LAYOUT: tl.constexpr,  # of the operands
    SECOND_LAYOUT: tl.constexpr = None,
    THIRD_LAYOUT: tl.constexpr = None,
):
    # Changes nothing: says that rows hold whole groups, and that wide runs hold whole words.
    WORD: tl.constexpr = word_of(ptr.dtype)
    width = in_runs(width, GROUPS)
    if any_is("channels_wide", LAYOUT, SECOND_LAYOUT, THIRD_LAYOUT):
        channels = in_runs(channels, WORD)
    if any_is("tokens_wide", LAYOUT, SECOND_LAYOUT, THIRD_LAYOUT):
        tokens = in_runs(tokens, WORD)
        width = in_runs(width, WORD)
    return tokens, width, channels


@triton.jit
def tile_offsets(
    ptr,
    offset,
    tokens,  # [BLOCK_N]
    channels,  # [BLOCK_D]
    strides,
    width,
    UNIFORM: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    RUN: tl.constexpr = run_of(ptr.dtype, LAYOUT)
    offset = in_runs(offset, RUN)
    if runs_along(LAYOUT, "tokens"):
        columns = offset + channels.to(tl.int64) * stride_of(strides, 5, RUN)  # [BLOCK_D]
        rows = tokens  # [BLOCK_N]
        if not UNIFORM:
            rows = (tokens // width).to(tl.int64) * stride_of(strides, 3, RUN) + tokens % width
    else:
        rows = offset + token_offsets(tokens, strides, width, UNIFORM, RUN)
        columns = channels
        if LAYOUT == "strided":
            columns = channels.to(tl.int64) * stride_of(strides, 5, RUN)
    return rows[:, None] + columns[None, :]  # [BLOCK_N, BLOCK_D]


@triton.jit
def matrix_offsets(rows, columns, strides):
    row_offsets = rows.to(tl.int64) * stride_of(strides, 0, 1)
    column_offsets = columns.to(tl.int64) * stride_of(strides, 1, 1)
    return row_offsets[:, None] + column_offsets[None, :]


@triton.jit
def spread(values, BLOCK_N: tl.constexpr):
    # From one value (or one row) a group to one a token.
    GROUPS: tl.constexpr = values.shape[0]
    if len(values.shape) == 1:
        tokens = tl.broadcast_to(values[None, :], (BLOCK_N // GROUPS, GROUPS))
        return tl.reshape(tokens, (BLOCK_N,))
    else:
        BLOCK_D: tl.constexpr = values.shape[1]
        tokens = tl.broadcast_to(values[None, :, :], (BLOCK_N // GROUPS, GROUPS, BLOCK_D))
        return tl.reshape(tokens, (BLOCK_N, BLOCK_D))


@triton.jit
def by_group(tokens, GROUPS: tl.constexpr):
    # Axis 0 split in two, [tokens of a group, groups], to reduce over the first.
    if len(tokens.shape) == 1:
        return tl.reshape(tokens, (tokens.shape[0] // GROUPS, GROUPS))
    else:
        return tl.reshape(tokens, (tokens.shape[0] // GROUPS, GROUPS, tokens.shape[1]))
