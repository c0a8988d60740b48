"""Where tensor cores' instructions have the values of their matrices: registers of which thread,
bytes of shared memory. After the PTX ISA 8.7, sections 9.7.14.5 (``mma``) and 9.7.15 (``wgmma``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .memory import Array

# Bytes of a row of the swizzle, by the descriptor's last two bits; 16 where there is none.
SWIZZLE = {0: 16, 1: 128, 2: 64, 3: 32}


class Product(NamedTuple):
    """A product under way: what it reads of shared memory, registers that it reads, and those that
    it adds to."""

    held: list[Array]
    factors: list[str]
    sums: list[str]


def sums_places(columns: int) -> tuple[Array, Array]:
    """Row and column of each register of the sums ``[64, columns]``, ``[registers, 128 threads]``;
    for a warp's own ``[16, 8]`` take the first 4 and 32."""
    i = np.arange(columns // 2)[:, None]
    thread = np.arange(128)[None, :]
    rows = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
    return rows, 8 * (i // 4) + 2 * (thread % 4) + i % 2


def left_places(values: int, registers: int) -> tuple[Array, Array]:
    """Row and depth of each value of a left factor of 64 rows in registers, ``[registers, values in
    one, 128 threads]``."""
    i = np.arange(registers)[:, None, None]
    j = np.arange(values)[None, :, None]
    thread = np.arange(128)[None, None, :]
    rows = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i % 2) + 0 * j
    return rows, thread % 4 * values + j + 4 * values * (i // 2)


def right_places(values: int, registers: int) -> tuple[Array, Array]:
    """Depth and column of each value of a warp's right factor of 8 columns."""
    i = np.arange(registers)[:, None, None]
    j = np.arange(values)[None, :, None]
    lane = np.arange(32)[None, None, :]
    return lane % 4 * values + j + 4 * values * i, lane // 4 + 0 * (i + j)


def addresses(descriptor: int, rows: int, depth: int, itemsize: int, transposed: bool) -> Array:
    """Of each value of a factor in shared memory, ``[rows, depth]``; ``transposed``: rows, not
    depth, are contiguous."""
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    mode = descriptor >> 62
    run = SWIZZLE[mode]
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if transposed:
        byte, line = row * itemsize, k
        if not mode:
            leading, stride = stride, leading
        place = byte // run * leading + byte % run + line % 8 * run + line // 8 * stride
    else:
        byte, line = k * itemsize, row
        place = line // 8 * stride + line % 8 * run
        place = place + (byte if mode else byte // run * leading + byte % run)
    place = start + place
    return place ^ ((place >> 7) % (run // 16) << 4)


def halves_of(halves: Array, kind: str) -> Array:
    """Half-precision values as float32."""
    if kind == "bf16":
        return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return halves.view(np.float16).astype(np.float32)


def values_of(words: Array, kind: str) -> Array:
    """Of 32-bit registers the values, as float32, with an axis for those of one: ``[..., n]``."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    return halves_of(np.ascontiguousarray(words)[..., None].view(np.uint16), kind)


def items_of(items: Array, kind: str) -> Array:
    """Of values' bytes, ``[..., size]``, the values."""
    items = np.ascontiguousarray(items)
    if kind == "tf32":
        return values_of(items.view(np.uint32), kind)[..., 0, 0]
    return halves_of(items.view(np.uint16), kind)[..., 0]
