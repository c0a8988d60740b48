"""Instructions of sm_90's machine code that disturb a product under way.

The tensor cores read a left factor from registers, and add to registers, while the program goes
on: from ``HGMMA`` until ``WARPGROUP.DEPBAR`` waits for its group, which the ``HGMMA`` with ``gsb0``
ends. NVIDIA's assembler before CUDA 13.3, which Triton's wheels up to 3.7 bring, may move other
values into such registers (Triton's issue 9433): the product is then wrong, now and then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_LABEL = re.compile(r"\s*(\.L_\w+):")
_LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")
_REGISTER = re.compile(r"(?<![A-Z])R(\d+)(\.64)?")
_PREDICATE = re.compile(r"!?U?P[T\d]")
# Instructions without a result in registers, by how their names begin.
_NO_RESULT = (
    *("ST", "RED", "LDGSTS", "BAR", "BRA", "EXIT", "DEPBAR", "LDGDEPBAR", "WARP", "BSSY", "BSYNC"),
    *("NOP", "ERRBAR", "FENCE", "CCTL", "MEMBAR", "ISETP", "FSETP", "DSETP", "HSETP2", "PLOP3"),
    *("FCHK", "R2P", "R2UR", "S2UR", "CALL", "RET", "BREAK", "YIELD", "BMOV", "VOTEU"),
)


class Instruction(NamedTuple):
    name: str
    operands: list[str]
    guarded: bool

    def __str__(self) -> str:
        return f"{self.name} {', '.join(self.operands)}"


# Registers that the products of a group read, and those that they add to; the last group is open.
Group = tuple[frozenset[int], frozenset[int]]
Groups = tuple[Group, ...]
_OPEN: Group = (frozenset(), frozenset())
MOST_GROUPS = 8  # told apart; of more, in a loop that does not wait, the oldest count as one


def _parse(assembly: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _LINE.match(line):
            guard, name, operands = match.groups()
            instructions.append(Instruction(name, operands.split(", "), guard is not None))
    return instructions, labels


def _columns(name: str) -> int:
    return int(name.split(".")[1].split("x")[1])


def _width(name: str) -> int:
    """Registers of a result."""
    parts = name.split(".")
    if parts[0] == "HGMMA":
        return _columns(name) // 2
    if parts[0] == "HMMA" or "128" in parts:
        return 4
    if parts[0] in ("LDSM", "STSM"):
        return int(parts[-1]) if parts[-1].isdigit() else 1
    double = parts[0].startswith("D") or (parts[0] == "CS2R" and "32" not in parts)
    double = double or (parts[0] in ("F2F", "I2F") and parts[1] == "F64")
    return 2 if double or "WIDE" in parts or "64" in parts else 1


def _span(operand: str, width: int) -> frozenset[int]:
    match = _REGISTER.search(operand)
    return frozenset(range(int(match[1]), int(match[1]) + width)) if match else frozenset()


def _written(instruction: Instruction) -> frozenset[int]:
    if instruction.name.startswith(_NO_RESULT):
        return frozenset()
    for operand in instruction.operands:
        if not _PREDICATE.fullmatch(operand):
            return _span(operand, _width(instruction.name))
    return frozenset()


def _touched(instruction: Instruction) -> frozenset[int]:
    """What it writes or reads; of wide operands in the middle only what names them shows."""
    touched = set(_written(instruction))
    for operand in instruction.operands:
        for match in _REGISTER.finditer(operand):
            wide = 2 if match[2] else 1
            if instruction.name.startswith("ST") and not operand.startswith(("[", "desc")):
                wide = _width(instruction.name)
            touched |= set(range(int(match[1]), int(match[1]) + wide))
    return frozenset(touched)


def _faults(instruction: Instruction, groups: Groups) -> Iterator[str]:
    written, touched = _written(instruction), _touched(instruction)
    for factors, sums in groups:
        if written & factors:
            yield f"{instruction}: a product under way reads what it writes"
        used = touched
        if instruction.name.startswith("HGMMA"):
            # Products that add to the same registers follow each other.
            left = instruction.operands[1]
            used = _span(left, 4) if left.startswith("R") else frozenset()
            if written & sums and not written <= sums:
                used |= written
        if used & sums:
            yield f"{instruction}: a product under way adds to what it uses"


def _after(instruction: Instruction, groups: Groups) -> Groups:
    if instruction.name.startswith("WARPGROUP.DEPBAR"):
        left = int(instruction.operands[-1], 0)
        return groups[-left - 1 :]
    if instruction.name.startswith("HGMMA"):
        left_factor = instruction.operands[1]
        factors = _span(left_factor, 4) if left_factor.startswith("R") else frozenset()
        *closed, (read, added) = groups
        groups = *closed, (read | factors, added | _written(instruction))
        if "gsb0" in instruction.operands:
            groups = *groups, _OPEN
        if len(groups) > MOST_GROUPS:
            (read, added), (also_read, also_added), *rest = groups
            groups = (read | also_read, added | also_added), *rest
    return groups


def disturbed_products(assembly: str) -> list[str]:
    """What is wrong, a line each, on all ways through a kernel as ``nvdisasm`` prints it."""
    instructions, labels = _parse(assembly)
    found: dict[str, None] = {}
    seen: set[tuple[int, Groups]] = set()
    ways: list[tuple[int, Groups]] = [(0, (_OPEN,))]
    while ways:
        place, groups = ways.pop()
        while place < len(instructions) and (place, groups) not in seen:
            seen.add((place, groups))
            instruction = instructions[place]
            found |= dict.fromkeys(_faults(instruction, groups))
            groups = _after(instruction, groups)
            place += 1
            if instruction.name.startswith("CALL") and any(map(any, groups)):
                found[f"{instruction}: a call while a product is under way"] = None
            elif instruction.name.startswith("BRA"):
                target = re.search(r"\.L_\w+", " ".join(instruction.operands))
                assert target is not None, instruction
                if instruction.guarded or len(instruction.operands) > 1:  # with a condition
                    ways.append((labels[target[0]], groups))
                else:
                    place = labels[target[0]]
            elif instruction.name.startswith(("EXIT", "RET")) and not instruction.guarded:
                break
    return list(found)
