"""Arithmetic: what an instruction makes of its operands, for all threads at once.

Registers are arrays of unsigned integers, one a thread, or scalars where all have the same; an
instruction takes and gives them as the type that its name ends with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .tensor_cores import halves_of, values_of

TYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "f16x2": np.uint32, "bf16x2": np.uint32, "tf32": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
BITS: dict[str, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def undefined(kind: str) -> Any:
    """What a register holds that nothing has written: not a number in any type."""
    if kind == "pred":
        return np.False_
    size = np.dtype(TYPES[kind]).itemsize
    return BITS[size](2 ** (8 * size) - 1)


def as_bits(values: Any) -> Any:
    values = np.asarray(values)
    if values.dtype == np.bool_:
        return values
    return np.ascontiguousarray(values).view(BITS[values.dtype.itemsize]).reshape(values.shape)


def as_type(bits: Any, kind: str) -> Any:
    bits = np.asarray(bits)
    if kind == "pred":
        return bits
    wanted = np.dtype(TYPES[kind])
    if bits.dtype.itemsize != wanted.itemsize:  # the low bits of a wider register
        bits = bits.astype(BITS[wanted.itemsize])
    return np.ascontiguousarray(bits).view(wanted).reshape(bits.shape)


def to_bfloat16(values: Any) -> Any:
    """The bits of float32 values rounded to nearest, ties to even."""
    bits = as_bits(np.asarray(values, np.float32)).astype(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    quiet = bits >> np.uint32(16) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def _fused(a: Any, b: Any, c: Any) -> Any:
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b + c).astype(np.float32)
    return a * b + c


def _shift(left: bool) -> Callable[..., Any]:
    def shift(a: Any, amount: Any) -> Any:
        bits = a.dtype.itemsize * 8
        amount = np.asarray(amount).astype(np.int64)
        if left or a.dtype.kind == "u":
            move = operator.lshift if left else operator.rshift
            safe = np.minimum(amount, bits - 1).astype(a.dtype)
            return np.where(amount >= bits, a.dtype.type(0), move(a, safe))
        return a >> np.minimum(amount, bits - 1).astype(a.dtype)

    return shift


def _divide(a: Any, b: Any) -> Any:
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return (quotient * np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64))).astype(a.dtype)


def _remainder(a: Any, b: Any) -> Any:
    wide = a.astype(np.int64), _divide(a, b).astype(np.int64), b.astype(np.int64)
    return (wide[0] - wide[1] * wide[2]).astype(a.dtype)


def _bit_field(value: Any, first: Any, count: Any) -> Any:
    assert np.ndim(first) == np.ndim(count) == 0, "a field that differs from thread to thread"
    if int(count) == 0:
        return np.zeros_like(value)
    wide = value.astype(np.int64) >> np.int64(int(first))
    field = wide & np.int64(2 ** int(count) - 1)
    if value.dtype.kind == "i":
        sign = 2 ** (int(count) - 1)
        field = (field ^ sign) - sign
    return field.astype(value.dtype)


def _bit_insert(field: Any, value: Any, first: Any, count: Any) -> Any:
    assert np.ndim(first) == np.ndim(count) == 0, "a field that differs from thread to thread"
    assert int(first) + int(count) <= 8 * value.dtype.itemsize, "a field beyond the word"
    mask = value.dtype.type((2 ** int(count) - 1) << int(first))
    return value & ~mask | (field << value.dtype.type(int(first))) & mask


def _logic_table(a: Any, b: Any, c: Any, table: Any) -> Any:
    result = np.zeros_like(a | b | c)
    for row in range(8):
        if int(table) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _permute(a: Any, b: Any, selector: Any) -> Any:
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    result = np.uint64(0)
    for place in range(4):
        code = np.asarray(selector).astype(np.uint64) >> np.uint64(4 * place) & np.uint64(15)
        byte = both >> np.uint64(8) * (code & np.uint64(7)) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result = result | np.where(code & np.uint64(8), sign, byte) << np.uint64(8 * place)
    return result.astype(np.uint32)


def _funnel(left: bool) -> Callable[..., Any]:
    def shift(low: Any, high: Any, amount: Any) -> Any:
        both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        amount = amount.astype(np.uint64) & np.uint64(31)
        moved = both << amount >> np.uint64(32) if left else both >> amount
        return moved.astype(np.uint32)

    return shift


SIMPLE: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "neg": operator.neg,
    "abs": np.abs,
    "fma": _fused,
    "div": _divide,
    "rem": _remainder,
    "shl": _shift(True),
    "shr": _shift(False),
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda a: a.dtype.type(1) / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: a.dtype.type(1) / np.sqrt(a),
    "bfe": _bit_field,
    "bfi": _bit_insert,
    "shf.l": _funnel(True),
    "shf.r": _funnel(False),
    "lop3": _logic_table,
    "prmt": _permute,
}
# How many operands have the type in the name; the others have 32 bits.
FIRST_TYPED = {"shl": 1, "shr": 1, "bfe": 1, "bfi": 2}

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": lambda a, b: (a != b) & ~_unordered(a, b),
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
    "equ": lambda a, b: (a == b) | _unordered(a, b),
    "neu": operator.ne,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~_unordered(a, b),
    "nan": lambda a, b: _unordered(a, b),
}


def _unordered(a: Any, b: Any) -> Any:
    if np.asarray(a).dtype.kind != "f":
        return np.False_
    return np.isnan(a) | np.isnan(b)


def extreme(parts: tuple[str, ...]) -> Callable[[Any, Any], Any]:
    """``min`` and ``max``: of a number and none the number, unless the name says NaN."""
    if "NaN" in parts:
        return np.minimum if parts[0] == "min" else np.maximum
    return np.fmin if parts[0] == "min" else np.fmax


def _high_half(a: Any, b: Any) -> Any:
    """The upper half of a product of integers."""
    if a.dtype.itemsize < 8:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        bits = 8 * a.dtype.itemsize
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    low, half = np.uint64(2**32 - 1), np.uint64(32)
    x, y = as_bits(a), as_bits(b)
    cross = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    other = (x & low) * (y >> half) + (cross & low)
    high = (x >> half) * (y >> half) + (cross >> half) + (other >> half)
    if a.dtype.kind == "i":  # of two's complement
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return as_type(high, "s64" if a.dtype.kind == "i" else "u64")


def multiply(parts: tuple[str, ...], kind: str, a: Any, b: Any) -> Any:
    if kind in ("f32", "f64", "f16", "bf16"):
        return a * b
    if "wide" in parts:
        wide = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}[kind]
        return np.asarray(a).astype(wide) * np.asarray(b).astype(wide)
    if "hi" in parts:
        return _high_half(np.asarray(a), np.asarray(b))
    assert "lo" in parts
    return a * b


def packed(parts: tuple[str, ...], *operands: Any) -> Any:
    """Two values of half precision in a register: computed in float32 and rounded once."""
    kind = parts[-1].removesuffix("x2")
    values = [values_of(np.asarray(operand), kind) for operand in operands]
    if parts[0] in ("min", "max"):
        result = extreme(parts)(*values)
    else:
        result = values[0] * values[1] if parts[0] == "mul" else SIMPLE[parts[0]](*values)
    return np.ascontiguousarray(_to_half(result, kind)).view(np.uint32)[..., 0]


def _to_half(values: Any, kind: str) -> Any:
    values = np.asarray(values, np.float32)
    return to_bfloat16(values) if kind == "bf16" else as_bits(values.astype(np.float16))


# From a float to an integer, or to a float without a fraction.
ROUND: dict[str, Callable[[Any], Any]] = {
    "rzi": np.trunc,
    "rni": np.rint,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def convert(parts: tuple[str, ...], *operands: Any) -> Any:
    """``cvt``, from bits to bits."""
    target, source = parts[-2:]
    if target in ("bf16x2", "f16x2"):
        high, low = (
            _to_half(as_type(word, "f32"), target.removesuffix("x2")).astype(np.uint32)
            for word in operands
        )
        return high << np.uint32(16) | low
    (bits,) = operands
    value = halves_of(as_type(bits, "b16"), source) if source == "bf16" else as_type(bits, source)
    if target == "bf16":
        return to_bfloat16(value)
    if target == "tf32":  # to nearest, ties away from 0
        bits = as_bits(value)
        rounded = bits + np.uint32(0x1000) & np.uint32(0xFFFFE000)
        return np.where(np.isnan(value), bits & np.uint32(0xFFFFE000), rounded)
    rounding = next((ROUND[part] for part in parts if part in ROUND), None)
    return as_bits((rounding(value) if rounding else value).astype(TYPES[target]))
