"""What the products of a launch move on the chip: from the L2 into shared memory, and from there
into the tensor cores.

:mod:`benchmarks.roofline` counts every tensor once. A tile of tokens reads the weights again, and a
tile of columns the tokens: the L2 serves that, and it can be slower than memory is. An instruction
of sm_90's tensor cores multiplies 64 rows by up to 256 columns, 16 channels deep; it reads the
columns, and the rows unless they lie in registers, from shared memory at 128 bytes a cycle, so that
below 64 columns it reads for longer than it multiplies. Both follow from the tile
(:mod:`sep_attn.triton_kernels.configs`), here for values of 2 bytes on sm_90.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.registry import LayerShape
from sep_attn.triton_kernels.configs import (
    WIDEST_PRODUCT,
    Config,
    config_of,
    padded_width,
    value_widths,
    weight_rows,
)

TARGET = "sm_90"
ITEMSIZE = 2
ROWS = 64  # of an instruction, which four warps give together
GROUP = 4  # those warps
FEWEST_ROWS = 16  # of a product, and so of a slice in a tile


class Traffic(NamedTuple):
    """Bytes from and to the L2, and bytes that tensor cores read from shared memory."""

    cache: float = 0
    operands: float = 0


def operands(
    rows: int, columns: int, depth: int, warps: int, *, rows_in_registers: bool = False
) -> int:
    """Bytes that a product ``[rows, depth] x [depth, columns]`` of one program reads. Its groups of
    warps share out the rows, and the columns where there are more groups than 64 rows each."""
    blocks = math.ceil(rows / ROWS)
    across = max(1, warps // GROUP // blocks)  # groups side by side, each reads the rows
    left = 0 if rows_in_registers else ROWS * across
    return blocks * depth * (left + columns) * ITEMSIZE


def slices_side_by_side(shape: LayerShape, block_tokens: int) -> int:
    """Of a tile of so many rows, where each slice is padded by itself."""
    return max(1, block_tokens // max(FEWEST_ROWS, 1 << (shape.tokens - 1).bit_length()))


def tiles_of(shape: LayerShape, block_tokens: int) -> int:
    side_by_side = slices_side_by_side(shape, block_tokens)
    rows = block_tokens // side_by_side
    return math.ceil(shape.slices / side_by_side) * math.ceil(shape.tokens / rows)


def whole_tokens(shape: LayerShape, config: Config, *, pools: bool) -> Traffic:
    """``slice_fwd_kernel``, which pools too and whose programs read W_K, and
    ``value_gate_output_fwd_kernel``."""
    tokens, dim = shape.slices * shape.tokens, shape.dim
    tiles = tiles_of(shape, config.tokens)
    programs = min(tiles, shape.slices) if pools else 0
    widths = value_widths(dim, slices_side_by_side(shape, config.tokens))
    values = tokens * dim * ITEMSIZE
    weights = (2 * tiles + programs) * dim * dim * ITEMSIZE
    read = sum(operands(config.tokens, width, dim, config.warps) for width in widths)
    read += operands(config.tokens, dim, dim, config.warps, rows_in_registers=True)
    passes = 1 if sum(widths) <= WIDEST_PRODUCT else len(widths)  # over x, for the values
    return Traffic((pools + passes + 1) * values + weights, tiles * read)


def by_columns(shape: LayerShape, config: Config, *, products: int) -> Traffic:
    """``token_product_kernel``, and with two products ``value_gate_bwd_kernel``, which also writes
    two tensors and reads the gradient once more."""
    tokens, dim = shape.slices * shape.tokens, shape.dim
    columns = min(config.columns, padded_width(dim))
    tiles, blocks = tiles_of(shape, config.tokens), math.ceil(dim / columns)
    values, matrix = tokens * dim * ITEMSIZE, dim * dim * ITEMSIZE
    others = 1 if products == 1 else 3
    read = products * tiles * blocks * operands(config.tokens, columns, dim, config.warps)
    return Traffic(products * (blocks * values + tiles * matrix) + others * values, read)


def weights_at_once(shape: LayerShape, config: Config) -> Traffic:
    """``value_gate_weights_bwd_kernel``, whose programs keep the weights and the sums, and multiply
    tokens piece by piece."""
    tokens, dim = shape.slices * shape.tokens, shape.dim
    tiles, blocks = tiles_of(shape, config.tokens), math.ceil(dim / config.columns)
    values = tokens * dim * ITEMSIZE
    pieces = weight_rows(dim)
    forth = operands(config.tokens, config.columns, sum(pieces), config.warps)
    back = sum(operands(piece, config.columns, config.tokens, config.warps) for piece in pieces)
    return Traffic((2 * blocks + 2) * values, 2 * tiles * blocks * (forth + back))


def weight_grad(shape: LayerShape, config: Config) -> Traffic:
    tokens, dim = shape.slices * shape.tokens, shape.dim
    side = min(config.columns, dim)
    blocks = math.ceil(dim / side)
    read = blocks**2 * operands(side, side, tokens, config.warps)
    return Traffic(2 * blocks * tokens * dim * ITEMSIZE, read)


PRODUCTS: dict[str, Callable[[LayerShape, Config], Traffic]] = {
    "slice_fwd_kernel": partial(whole_tokens, pools=True),
    "value_gate_output_fwd_kernel": partial(whole_tokens, pools=False),
    "token_product_kernel": partial(by_columns, products=1),
    "value_gate_bwd_kernel": partial(by_columns, products=2),
    "value_gate_weights_bwd_kernel": weights_at_once,
    "weight_grad_kernel": weight_grad,
}


def traffic(kernel: str, shape: LayerShape) -> Traffic | None:
    """Of one launch of a kernel; None where it holds no products of tokens."""
    if kernel not in PRODUCTS:
        return None
    config = config_of(kernel, TARGET, ITEMSIZE, shape.dim)
    return PRODUCTS[kernel](shape, config)
