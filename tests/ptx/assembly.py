"""PTX as text, read into basic blocks of instructions."""

from __future__ import annotations

import dataclasses
import functools
import re
import struct
from typing import Any

import numpy as np

_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s|]+")
_PARAMETER = re.compile(r"\.param [^,)]*?(\w+)\s*(?:,|$)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``@guard parts[0].parts[1]... operands``. A register is its name, an address ``(register or
    symbol, offset)``, several in braces a list, a number a string."""

    parts: tuple[str, ...]
    operands: tuple[Any, ...]
    guard: str | None
    negated: bool
    text: str

    @property
    def name(self) -> str:
        return self.parts[0]


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A kernel: its parameters, its threads, and its instructions with the place of each label
    among them."""

    name: str
    parameters: tuple[str, ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def _operand(text: str) -> Any:
    if text[0] == "{":
        return [_operand(part) for part in re.split(r"[,\s]+", text[1:-1].strip()) if part]
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return base, int(offset or 0)
    return text


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Assembly:
    """The one kernel of a PTX file.

    Raises:
        ValueError: a line is no instruction, nor anything that may be passed over.
    """
    text = re.sub(r"//[^\n]*", "", text)
    _, _, rest = text.partition(".visible .entry ")
    name, _, rest = rest.partition("(")
    parameters, _, rest = rest.partition(")")
    directives, _, body = rest.partition("{")
    body = body.split("\n\t.section")[0]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in re.split(r"[;\n]", _in_lines(body)):
        statement = statement.strip().lstrip("{} \t")
        if not statement or statement[0] == ".":
            continue
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
            continue
        match = _INSTRUCTION.fullmatch(statement)
        if match is None:
            raise ValueError(f"not an instruction: {statement!r}")
        negated, guard, opcode, operands = match.groups()
        instructions.append(
            Instruction(
                tuple(opcode.replace("::", "_").split(".")),
                tuple(map(_operand, _OPERAND.findall(operands))),
                guard,
                bool(negated),
                statement,
            )
        )
    threads = re.search(r"\.reqntid (\d+)", directives)
    assert threads is not None
    return Assembly(
        name.strip(),
        tuple(_PARAMETER.findall(parameters)),
        int(threads[1]),
        tuple(instructions),
        labels,
    )


def _in_lines(body: str) -> str:
    """Each instruction on a line of its own, whatever lies in braces together with it."""
    body = re.sub(r"\{[^{}]*\}", lambda match: match[0].replace("\n", " "), body)
    return re.sub(r"(\$\w+:)", r"\1\n", body)


def number(text: str, kind: str) -> Any:
    """An immediate operand as a scalar of so many bits."""
    if kind == "pred":
        return np.bool_(int(text))
    bits = int(re.sub(r"\D", "", kind) or 32)
    word = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    if re.fullmatch("0[fF][0-9a-fA-F]{8}", text):
        return np.uint32(int(text[2:], 16))
    if re.fullmatch("0[dD][0-9a-fA-F]{16}", text):
        return np.uint64(int(text[2:], 16))
    if kind[0] == "f" and "." in text:
        return np.uint32(struct.unpack("I", struct.pack("f", float(text)))[0])
    return word(int(text.rstrip("U"), 0) & (2**bits - 1))
