"""Tiles, warps and stages of the fused layer's kernels: a readable table, never tuned at run time.

A kernel's configuration depends on the architecture, on the size of a value and on D, never on the
number of tokens. ``TABLES[architecture][kernel]`` holds rows ``D up to: (tokens, columns, warps,
stages[, programs])`` for values of 2 bytes and, under ``<kernel>.float32``, for values of 4. A
``None`` row holds for every larger D; an architecture without a table, or a kernel without rows in
it, takes the rows of ``OTHER``. :func:`every_config` lists all that can be picked, for reports and
tuning.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

# Channels up to which a program holds whole tokens (gated values), by the size of a value in bytes;
# above it products are cut along their columns and gated values pass through memory. Without tensor
# cores 4 bytes a value leave room for so few tokens that reading the weights would cost more than
# the pass saves.
MOST_FUSED_CHANNELS = {2: 512, 4: 64}
# The same for the backward that holds sums of both weights' gradients as well.
MOST_FUSED_BACKWARD_CHANNELS = {2: 256, 4: 0}


# The forward kernels whose programs hold whole tokens.
WHOLE_TOKEN_KERNELS = ("slice_fwd_kernel", "value_gate_output_fwd_kernel")
# Columns of the widest product that is one instruction of a tensor core, and its rows.
WIDEST_PRODUCT = 256
WIDE_PRODUCT_ROWS = 64
# Of the pieces of a tile: beside narrower ones the registers do not suffice.
NARROWEST_PIECE = 32
# A tile whose slices' contexts have more values makes its values in narrower pieces: both take
# registers.
MOST_CONTEXT_VALUES = 768
# 32-bit registers of a multiprocessor, and threads of a warp, on NVIDIA's GPUs.
REGISTERS, WARP = 65_536, 32


class Config(NamedTuple):
    """Rows and columns of a program's tile, and how the compiler is to spread and pipeline it.

    ``programs`` are to fit on a multiprocessor of an NVIDIA GPU side by side, so that one reads and
    writes while another multiplies; 0 leaves the number to the compiler."""

    tokens: int
    columns: int
    warps: int
    stages: int
    programs: int = 0

    @property
    def registers(self) -> int | None:
        """The most registers a thread may have; None where there is no limit of ours."""
        return REGISTERS // (WARP * self.warps * self.programs) if self.programs else None


class Choice(NamedTuple):
    """A configuration and what it is picked for: D from ``channels_from`` to ``channels_to``
    (None: no end)."""

    kernel: str
    architecture: str
    itemsize: int
    channels_from: int
    channels_to: int | None
    config: Config


Rows = Mapping[int | None, tuple[int, ...]]

# Small tiles that any GPU with 64 KiB of shared memory a program can hold.
_POOL: Rows = {
    64: (64, 0, 4, 1),
    128: (32, 0, 4, 1),
    256: (16, 0, 4, 1),
    512: (8, 0, 4, 1),
    1024: (8, 0, 8, 1),
    None: (4, 0, 8, 1),
}
_FUSED: Rows = {
    64: (64, 32, 4, 1),
    128: (64, 32, 4, 1),
    256: (64, 32, 8, 1),
    512: (32, 32, 4, 1),
}
_FUSED_FLOAT32: Rows = {64: (32, 16, 4, 1)}
OTHER: Mapping[str, Rows] = {
    "slice_fwd_kernel": _FUSED,
    "slice_fwd_kernel.float32": _FUSED_FLOAT32,
    "score_pool_fwd_kernel": _POOL,
    "value_gate_output_fwd_kernel": _FUSED,
    "value_gate_output_fwd_kernel.float32": _FUSED_FLOAT32,
    "token_product_kernel": {None: (64, 64, 4, 2)},
    "token_product_kernel.float32": {None: (64, 32, 4, 2)},
    "value_gate_bwd_kernel": {None: (64, 32, 4, 1)},
    "value_gate_bwd_kernel.float32": {None: (32, 32, 4, 1)},
    "value_gate_weights_bwd_kernel": {128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    "weight_grad_kernel": {None: (32, 64, 4, 2)},
    "weight_grad_kernel.float32": {None: (16, 64, 4, 2)},
    "source_bwd_kernel": _POOL,
}

_FUSED_SM_90: Rows = {
    128: (128, 64, 8, 3, 2),
    256: (128, 64, 8, 3),
    384: (128, 32, 8, 3),
    512: (128, 64, 8, 3),
}
SM_90: Mapping[str, Rows] = {
    "slice_fwd_kernel": _FUSED_SM_90,
    "score_pool_fwd_kernel": {
        64: (64, 0, 4, 3),
        128: (64, 0, 8, 3),
        256: (32, 0, 8, 3),
        512: (16, 0, 8, 3),
        1024: (8, 0, 8, 2),
        None: (4, 0, 8, 2),
    },
    "value_gate_output_fwd_kernel": _FUSED_SM_90,
    # Up to 256 channels a program has them all, and dx takes the place of dv: with fewer columns
    # backward needs another tensor as large as x (attention.BackwardPlan).
    "token_product_kernel": {
        64: (128, 64, 4, 3),
        128: (128, 128, 8, 3),
        256: (128, 256, 8, 3),
        384: (128, 128, 8, 3),
        None: (128, 256, 8, 3),
    },
    "value_gate_bwd_kernel": {None: (128, 64, 8, 3)},
    "value_gate_weights_bwd_kernel": {
        32: (64, 32, 4, 2),
        256: (64, 64, 8, 2),
    },
    "weight_grad_kernel": {None: (64, 128, 8, 3)},
    "source_bwd_kernel": {
        64: (64, 0, 4, 3),
        192: (64, 0, 8, 3),
        256: (16, 0, 4, 3),
        512: (16, 0, 8, 3),
        1024: (8, 0, 8, 2),
        None: (4, 0, 8, 2),
    },
    "token_product_kernel.float32": {None: (128, 64, 8, 3)},
    "value_gate_bwd_kernel.float32": {None: (64, 64, 8, 2)},
    "weight_grad_kernel.float32": {None: (32, 64, 8, 3)},
}

TABLES: Mapping[str, Mapping[str, Rows]] = {"sm_90": SM_90}


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, ...: the key of ``TABLES``; ``"cpu"`` under the interpreter."""
    if device.type != "cuda":
        return device.type
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def rows_of(kernel: str, arch: str, itemsize: int) -> dict[int | None, Config]:
    """The rows of a kernel, narrowest D first."""
    table = TABLES.get(arch, {})
    names = (kernel,) if itemsize == 2 else (f"{kernel}.float32", kernel)
    # A table's tiles for 2 bytes are too large for 4: without rows of its own, OTHER's.
    rows = table.get(names[0]) or OTHER.get(names[0]) or OTHER[kernel]
    return {channels: Config(*row) for channels, row in rows.items()}


@functools.lru_cache(maxsize=1024)
def config_of(kernel: str, arch: str, itemsize: int, channels: int) -> Config:
    """The configuration of a kernel for values of ``itemsize`` bytes and D = ``channels``."""
    for most, config in rows_of(kernel, arch, itemsize).items():
        if most is None or channels <= most:
            return config
    raise ValueError(f"{kernel} holds no more than {most} channels, this layer has {channels}")


def every_config(architectures: tuple[str, ...] | None = None) -> Iterator[Choice]:
    """Everything :func:`config_of` can pick on these architectures (default: those with a table,
    and ``"other"``)."""
    for arch in architectures or (*TABLES, "other"):
        for kernel in OTHER:
            if kernel.endswith(".float32"):
                continue
            for itemsize in (2, 4):
                first = 1
                for most, config in rows_of(kernel, arch, itemsize).items():
                    yield Choice(kernel, arch, itemsize, first, most, config)
                    first = first if most is None else most + 1


def padded_width(channels: int) -> int:
    """The least power of two that holds D channels and that a product takes."""
    return max(16, 1 << (channels - 1).bit_length())


@functools.cache
def chunk_widths(channels: int) -> tuple[int, ...]:
    """Powers of two, falling, that together hold D channels: a tile of tokens is held in such
    pieces, for a tile's sides must be powers of two. At most three, of at least
    ``NARROWEST_PIECE``; where these can they pad D by a seventh or less."""
    least = min(NARROWEST_PIECE, padded_width(channels))
    widths: list[int] = []
    left = channels
    while left > 0:
        width = max(least, 1 << (left.bit_length() - 1))
        # The last piece, or one that is nearly twice as wide: round up.
        if len(widths) == 2 or (width < left and 2 * width - left <= channels // 7):
            width = max(least, 1 << (left - 1).bit_length())
        widths.append(width)
        left -= width
    join_equal(widths)
    # In a piece of 32 that is not full, beside one of 128 or more, Triton 3.6.0's LLVM mistakes one
    # channel for another.
    if widths[-1] == 32 and sum(widths) > channels > 128:
        widths[-1] = 64
        join_equal(widths)
    return tuple(widths)


def join_equal(widths: list[int]) -> None:
    """Makes one of the last two, as long as they are equal."""
    while len(widths) > 1 and widths[-1] == widths[-2]:
        widths[-2:] = [2 * widths[-1]]


@functools.cache
def value_widths(channels: int, slices: int) -> tuple[int, ...]:
    """The pieces in which the values of a tile are made: at most as wide as one instruction of
    sm_90's tensor cores, and half of that where the contexts of its slices take registers too."""
    narrow = channels > WIDEST_PRODUCT and slices * channels > MOST_CONTEXT_VALUES
    widest = WIDEST_PRODUCT // 2 if narrow else WIDEST_PRODUCT
    return tuple(
        part
        for width in chunk_widths(channels)
        for part in [min(width, widest)] * max(1, width // widest)
    )


@functools.cache
def weight_rows(channels: int) -> tuple[int, ...]:
    """The pieces in which a program holds the sums of a weight's gradient, and the tokens that it
    multiplies: one, or three of the 64 rows of an instruction of sm_90's tensor cores where that
    saves a fourth. More pieces would take registers for their addresses."""
    if 2 * WIDE_PRODUCT_ROWS < channels <= 3 * WIDE_PRODUCT_ROWS:
        return (WIDE_PRODUCT_ROWS,) * 3
    return (padded_width(channels),)
