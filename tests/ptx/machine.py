"""A program's threads, an instruction at a time: control, memory, tensor cores."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import tensor_cores
from .assembly import Assembly, Instruction, number
from .instructions import (
    COMPARE,
    FIRST_TYPED,
    SIMPLE,
    TYPES,
    as_bits,
    as_type,
    convert,
    extreme,
    multiply,
    packed,
    to_bfloat16,
    undefined,
)
from .memory import WARP, Array, Clock, Fault, GlobalMemory, Memory, shared_memory

SHARED_START = 1024  # after what the system keeps of shared memory
WARPGROUP = 4 * WARP
# What the threads of a program, or those of a warp, do together.
TOGETHER = ("bar", "barrier", "shfl", "mma", "wgmma", "ldmatrix", "stmatrix")


# Results that are not as plain arithmetic has them, which is all there is here.
MODIFIERS = ("sat", "satfinite", "relu", "clamp", "s8", "cc")


def _is_for_all(instruction: Instruction) -> bool:
    """Whether an instruction makes sense only for all threads of a program."""
    groups = "commit_group" in instruction.parts or "wait_group" in instruction.parts
    return groups or instruction.name in (*TOGETHER, "fence")


class Machine:
    """Runs the programs of a launch one after another.

    Args:
        assembly: the kernel.
        parameters: by their names in the assembly, scalars of bits.
        memory: where pointers among them lead.
        shared_bytes: of a program.
    """

    def __init__(
        self,
        assembly: Assembly,
        parameters: Mapping[str, Any],
        memory: GlobalMemory,
        shared_bytes: int,
    ) -> None:
        self.assembly = assembly
        self.parameters = parameters
        self.memory = memory
        self.shared_bytes = shared_bytes
        self.threads = np.arange(assembly.threads)
        self.clock = Clock()
        self.executed = 0  # instructions
        for instruction in assembly.instructions:
            modifiers = set(MODIFIERS) - ({"s8"} if instruction.name == "cvt" else set())
            if modifiers.intersection(instruction.parts):
                raise NotImplementedError(instruction.text)
        self._steps = [
            (instruction, getattr(self, f"_{instruction.name}", self._arithmetic))
            for instruction in assembly.instructions
        ]

    def run(self, program: tuple[int, ...], grid: tuple[int, ...], index: int) -> None:
        """Runs ``program`` of ``grid``, the ``index``-th of all."""
        self.program = index
        self.special = {
            "%tid.x": self.threads.astype(np.uint32),
            "%laneid": (self.threads % WARP).astype(np.uint32),
            **{f"%ctaid.{axis}": np.uint32(i) for axis, i in zip("xyz", program, strict=True)},
            **{f"%nctaid.{axis}": np.uint32(i) for axis, i in zip("xyz", grid, strict=True)},
        }
        self.registers: dict[str, Any] = {}
        self.shared = shared_memory(SHARED_START, self.shared_bytes)
        # Under way, in groups; the last group is still open.
        self.copies: list[list[tuple[Array, Array, Array]]] = [[]]
        self.products: list[list[tensor_cores.Product]] = [[]]
        self.factors: set[str] = set()  # registers that products under way read
        self.sums: set[str] = set()  # and those that they add to
        self.clock.barriers += 1
        self.at = np.zeros(len(self.threads), np.int64)  # the next instruction of each thread
        self.waiting = np.zeros(len(self.threads), bool)  # for the others, to go on together
        here = 0
        while here < len(self._steps):
            instruction, step = self._steps[here]
            running = self.at == here
            if instruction.name in TOGETHER and not running.all():
                self.waiting |= running
                here = self._furthest_behind()
                continue
            self.waiting[:] = False
            active = self._active(instruction, running)
            if active is not None and _is_for_all(instruction):
                raise Fault(f"{self.assembly.name}: not by all threads: {instruction.text}")
            self.executed += 1
            self.at[running] = here + 1
            if instruction.name in ("bra", "ret"):
                taken = running if active is None else active
                label = instruction.operands[0] if instruction.name == "bra" else None
                self.at[taken] = self.assembly.labels[label] if label else len(self._steps)
            elif active is None or active.any():
                try:
                    step(instruction, active)
                except Exception as error:
                    where = f"{self.assembly.name}, program {program} of {grid}"
                    raise Fault(f"{where}: {error}\n  at: {instruction.text[:200]}") from error
            here = self._furthest_behind()
        if any(self.copies) or any(self.products):
            raise Fault(f"{self.assembly.name}: ends while copies or products are under way")

    def _active(self, instruction: Instruction, running: Array) -> Array | None:
        """The threads that do it; None for all."""
        together = bool(running.all())
        if instruction.guard is None:
            return None if together else running
        guard = self.get(instruction.guard, "pred")
        guard = np.broadcast_to(~guard if instruction.negated else guard, running.shape)
        return None if together and guard.all() else running & guard

    def _furthest_behind(self) -> int:
        """The next instruction of those threads that are to go on, of all that need not wait."""
        if (self.at == self.at[0]).all():
            return int(self.at[0])
        free = self.at[~self.waiting]
        if not len(free) or free.min() == len(self._steps):
            raise Fault(f"{self.assembly.name}: threads wait for each other at different places")
        return int(free.min())

    # Registers ------------------------------------------------------------------------------------

    def get(self, operand: str, kind: str) -> Any:
        """The bits of a register, a special one or a number: an array, or a scalar for all."""
        if operand in self.registers:
            if operand in self.sums:
                raise Fault(f"{operand} is read while tensor cores add to it")
            return self.registers[operand]
        if operand in self.special:
            return self.special[operand]
        if operand == "global_smem":
            return np.uint64(SHARED_START)
        return undefined(kind) if operand[0] == "%" else number(operand, kind)

    def put(self, register: str, bits: Any, active: Array | None) -> None:
        if register in self.factors or register in self.sums:
            raise Fault(f"{register} is written while tensor cores use it")
        bits = np.asarray(bits)
        if bits.shape == (1,):
            bits = bits[0]
        if active is not None:
            before = self.registers.get(register)
            if before is None:
                before = np.False_ if bits.dtype == np.bool_ else ~np.zeros((), bits.dtype)
            bits = np.where(active, bits, before)
        self.registers[register] = bits

    def each(self, values: Any) -> Array:
        """One value a thread."""
        return np.broadcast_to(values, self.threads.shape)

    def of_all(self, registers: list[str], kind: str = "b32") -> Array:
        """``[registers, threads]``."""
        return np.stack([self.each(self.get(register, kind)) for register in registers])

    # Arithmetic -----------------------------------------------------------------------------------

    def _arithmetic(self, instruction: Instruction, active: Array | None) -> None:
        parts, (target, *sources) = instruction.parts, instruction.operands
        name, kind = parts[0], parts[-1]
        words = [self.get(source, kind) for source in sources]
        if kind in ("bf16x2", "f16x2"):
            self.put(target, packed(parts, *words), active)
            return
        typed = FIRST_TYPED.get(name, len(words))
        values = [as_type(word, kind if i < typed else "u32") for i, word in enumerate(words)]
        if kind == "bf16":
            values = [tensor_cores.halves_of(value, kind) for value in values]
        if name in ("min", "max"):
            result = functools.reduce(extreme(parts), values)
        elif name == "mul":
            result = multiply(parts, kind, *values)
        elif name == "shf":
            result = SIMPLE[f"shf.{parts[1]}"](*values)
        else:
            result = SIMPLE[name](*values)
        self.put(target, to_bfloat16(result) if kind == "bf16" else as_bits(result), active)

    def _mad(self, instruction: Instruction, active: Array | None) -> None:
        parts, (target, *sources, added) = instruction.parts, instruction.operands
        kind = parts[-1]
        product = multiply(parts, kind, *(as_type(self.get(s, kind), kind) for s in sources))
        wide = f"{kind[0]}{2 * int(kind[1:])}" if "wide" in parts else kind
        self.put(target, as_bits(product + as_type(self.get(added, wide), wide)), active)

    def _mov(self, instruction: Instruction, active: Array | None) -> None:
        kind, (target, source) = instruction.parts[-1], instruction.operands
        if isinstance(source, list):  # the first is lowest
            bits = int(kind[1:]) // len(source)
            words = [np.asarray(self.get(part, f"b{bits}")).astype(TYPES[kind]) for part in source]
            shifted = [word << TYPES[kind](bits * place) for place, word in enumerate(words)]
            self.put(target, functools.reduce(np.bitwise_or, shifted), active)
        elif isinstance(target, list):
            bits = int(kind[1:]) // len(target)
            value = np.asarray(self.get(source, kind))
            for place, part in enumerate(target):
                word = (value >> TYPES[kind](bits * place)).astype(TYPES[f"b{bits}"])
                self.put(part, word, active)
        else:
            self.put(target, self.get(source, kind), active)

    def _cvt(self, instruction: Instruction, active: Array | None) -> None:
        target, *sources = instruction.operands
        words = [self.get(source, instruction.parts[-1]) for source in sources]
        value = convert(instruction.parts, *words)
        if instruction.parts[-2] == "s8":  # its sign fills the register, here of 16 bits
            assert target.startswith("%rs"), instruction.text
            value = as_bits(as_type(value, "s8").astype(np.int16))
        self.put(target, value, active)

    def _setp(self, instruction: Instruction, active: Array | None) -> None:
        parts, (*targets, first, second) = instruction.parts, instruction.operands
        kind = parts[-1]
        words = self.get(first, kind), self.get(second, kind)
        if len(targets) == 2:  # of two halves, the lower first
            half = kind.removesuffix("x2")
            a, b = (tensor_cores.values_of(np.asarray(word), half) for word in words)
            for place, target in enumerate(targets):
                self.put(target, COMPARE[parts[1]](a[..., place], b[..., place]), active)
            return
        a, b = (as_type(word, kind) for word in words)
        if kind in ("f16", "bf16"):
            a, b = (tensor_cores.halves_of(as_type(word, "b16"), kind) for word in words)
        self.put(targets[0], COMPARE[parts[1]](a, b), active)

    def _selp(self, instruction: Instruction, active: Array | None) -> None:
        kind, (target, first, second, chosen) = instruction.parts[-1], instruction.operands
        values = np.asarray(self.get(first, kind)), np.asarray(self.get(second, kind))
        self.put(target, np.where(self.get(chosen, "pred"), *values), active)

    def _shfl(self, instruction: Instruction, active: Array | None) -> None:
        target, value, other, clamp, members = instruction.operands
        if active is not None or clamp != "31" or number(members, "b32") != 2**32 - 1:
            raise NotImplementedError("a shuffle of a part of a warp")
        lane, amount = self.threads % WARP, self.each(self.get(other, "b32")).astype(np.int64)
        source = {
            "bfly": lane ^ amount,
            "idx": amount % WARP,
            "down": lane + amount,
        }[instruction.parts[2]]
        source = np.where(source >= WARP, lane, source)
        values = self.each(self.get(value, "b32"))
        self.put(target, values[self.threads - lane + source], None)

    # Memory ---------------------------------------------------------------------------------------

    def _bar(self, instruction: Instruction, active: Array | None) -> None:
        if instruction.parts[1:] == ("warp", "sync"):
            self.clock.warp_barriers += 1
        elif instruction.parts[-1] == "sync" and instruction.operands == ("0",):
            self.clock.barriers += 1
        else:
            raise NotImplementedError(instruction.text)

    def _barrier(self, instruction: Instruction, active: Array | None) -> None:
        self._bar(instruction, active)

    def _fence(self, instruction: Instruction, active: Array | None) -> None:
        self.clock.fences += "proxy" in instruction.parts

    def _createpolicy(self, instruction: Instruction, active: Array | None) -> None:
        self.put(instruction.operands[0], np.uint64(0), active)  # of caches, which are not here

    def _addresses(self, operand: tuple[str, int], active: Array | None) -> tuple[Array, Array]:
        """Addresses of the active threads, and which those are."""
        base, offset = operand
        addresses = self.each(np.asarray(self.get(base, "b64")).astype(np.int64) + offset)
        if active is None:
            return addresses, self.threads
        return addresses[active], self.threads[active]

    def _memory(self, instruction: Instruction, addresses: Array) -> Memory:
        is_shared = any(part.startswith("shared") for part in instruction.parts)
        return self.shared if is_shared else self.memory.at(addresses)

    def _ld(self, instruction: Instruction, active: Array | None) -> None:
        parts, (target, source, *_) = instruction.parts, instruction.operands
        if parts[1] == "param":
            self.put(target, self.parameters[source[0]], active)
            return
        targets = target if isinstance(target, list) else [target]
        word = TYPES[f"b{8 * np.dtype(TYPES[parts[-1]]).itemsize}"]
        addresses, threads = self._addresses(source, active)
        width = len(targets) * np.dtype(word).itemsize
        memory = self._memory(instruction, addresses)
        found = memory.load(addresses, width, threads, self.program, self.clock)
        words = np.zeros((len(self.threads), len(targets)), word)
        words[slice(None) if active is None else active] = found.view(word)
        for place, register in enumerate(targets):
            self.put(register, words[:, place], active)

    def _st(self, instruction: Instruction, active: Array | None) -> None:
        parts, (target, source, *_) = instruction.parts, instruction.operands
        sources = source if isinstance(source, list) else [source]
        word = TYPES[f"b{8 * np.dtype(TYPES[parts[-1]]).itemsize}"]
        addresses, threads = self._addresses(target, active)
        values = self.of_all(sources, parts[-1]).astype(word).T
        values = np.ascontiguousarray(values if active is None else values[active])
        memory = self._memory(instruction, addresses)
        memory.store(addresses, values.view(np.uint8), threads, self.program, self.clock)

    def _cp(self, instruction: Instruction, active: Array | None) -> None:
        what = instruction.parts[1:]
        if what == ("async", "commit_group"):
            self.copies.append([])
        elif what == ("async", "wait_group"):
            while len(self.copies) - 1 > int(instruction.operands[0]):
                for addresses, values, threads in self.copies.pop(0):
                    self.shared.end_copy(addresses, values, threads, self.program, self.clock)
        elif what[0] == "async" and "bulk" not in what:
            self._copy(instruction, active)
        else:
            raise NotImplementedError(instruction.text)

    def _copy(self, instruction: Instruction, active: Array | None) -> None:
        target, source, size, *taken = instruction.operands
        width = int(size, 0)
        addresses, threads = self._addresses(target, active)
        sources, _ = self._addresses(source, active)
        # Of the source either everything is taken or nothing; the rest is filled with zeros.
        some = self.each(self.get(taken[0], "b32") if taken else np.uint32(width)) > 0
        some = some if active is None else some[active]
        values = np.zeros((len(threads), width), np.uint8)
        if some.any():
            memory = self.memory.at(sources[some])
            values[some] = memory.load(
                sources[some], width, threads[some], self.program, self.clock
            )
        self.shared.begin_copy(addresses, width, threads, self.program, self.clock)
        self.copies[-1].append((addresses, values, threads))

    def _matrix_rows(self, instruction: Instruction, address: Any) -> tuple[int, Array, Array]:
        """How many 8 x 8 matrices a warp has; the address of each row and the thread that names it,
        in the order of warps, matrices, rows."""
        count = next(int(part[1:]) for part in instruction.parts if part in ("x1", "x2", "x4"))
        addresses, threads = self._addresses(address, None)
        rows = slice(None), slice(8 * count)
        return (
            count,
            addresses.reshape(-1, WARP)[rows].ravel(),
            (threads.reshape(-1, WARP)[rows].ravel()),
        )

    def _ldmatrix(self, instruction: Instruction, active: Array | None) -> None:
        targets, source = instruction.operands
        count, addresses, threads = self._matrix_rows(instruction, source)
        found = self.shared.load(addresses, 16, threads, self.program, self.clock)
        halves = found.view(np.uint16).reshape(-1, count, 8, 8)
        if "trans" in instruction.parts:
            halves = halves.swapaxes(2, 3)
        words = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, count, WARP)
        for place, register in enumerate(targets):
            self.put(register, words[:, place].ravel(), active)

    def _stmatrix(self, instruction: Instruction, active: Array | None) -> None:
        target, sources = instruction.operands
        count, addresses, threads = self._matrix_rows(instruction, target)
        words = self.of_all(sources).reshape(count, -1, WARP).swapaxes(0, 1)
        halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
        if "trans" in instruction.parts:
            halves = halves.swapaxes(2, 3)
        values = np.ascontiguousarray(halves).view(np.uint8).reshape(-1, 16)
        self.shared.store(addresses, values, threads, self.program, self.clock)

    # Tensor cores ---------------------------------------------------------------------------------

    def _mma(self, instruction: Instruction, active: Array | None) -> None:
        targets, left, right, sums = instruction.operands
        depth = int(instruction.parts[3].split("k")[1])
        kind = instruction.parts[7]
        if not instruction.parts[3].startswith("m16n8k") or instruction.parts[-1] != "f32":
            raise NotImplementedError(instruction.text)
        warps = len(self.threads) // WARP
        factors = []
        for registers, places, size in (
            (left, tensor_cores.left_places, (16, depth)),
            (right, tensor_cores.right_places, (depth, 8)),
        ):
            values = tensor_cores.values_of(self.of_all(registers), kind)  # [registers, threads, n]
            each = values.shape[2]
            rows, columns = (place[..., :WARP] for place in places(each, len(registers)))
            factor = np.full((warps, *size), np.nan)
            factor[:, rows, columns] = values.reshape(-1, warps, WARP, each).transpose(1, 0, 3, 2)
            factors.append(factor)
        rows, columns = (place[:, :WARP] for place in tensor_cores.sums_places(8))
        product = (factors[0] @ factors[1])[:, rows, columns].swapaxes(0, 1).reshape(4, -1)
        results = product + self.of_all(sums, "f32").view(np.float32)
        for target, result in zip(targets, results.astype(np.float32), strict=True):
            self.put(target, as_bits(result), active)

    def _wgmma(self, instruction: Instruction, active: Array | None) -> None:
        what = instruction.parts[1]
        if what == "commit_group":
            self.products.append([])
        elif what == "wait_group":
            while len(self.products) - 1 > int(instruction.operands[0]):
                for product in self.products.pop(0):
                    for places in product.held:
                        self.shared.end_product(places, self.program, self.clock)
            self._note_registers()
        elif what == "mma_async":
            self._multiply(instruction)

    def _note_registers(self) -> None:
        under_way = [product for group in self.products for product in group]
        self.factors = {name for product in under_way for name in product.factors}
        self.sums = {name for product in under_way for name in product.sums}

    def _multiply(self, instruction: Instruction) -> None:
        """``wgmma.mma_async``: a warpgroup's [64, depth] times [depth, columns]."""
        shape, result, kind = instruction.parts[4:7]
        columns, depth = (int(size) for size in shape.removeprefix("m64n").split("k"))
        sums, left, right, keep, *signs = instruction.operands
        if result != "f32" or signs[:2] != ["1", "1"]:
            raise NotImplementedError(instruction.text)
        *left_turned, right_turned = [sign == "1" for sign in signs[2:]] or [False, False]
        held = []

        def in_memory(descriptors: str, mine: slice, rows: int, turned: bool) -> Array:
            given = self.each(self.get(descriptors, "b64"))[mine]
            if (given != given[0]).any():
                raise Fault("threads of a warpgroup describe different matrices")
            itemsize = 4 if kind == "tf32" else 2
            places = tensor_cores.addresses(int(given[0]), rows, depth, itemsize, turned)
            found, read = self.shared.begin_product(places.ravel(), itemsize, self.clock)
            held.append(read)
            return tensor_cores.items_of(found.reshape(rows, depth, itemsize), kind)

        product = []
        for first in range(0, len(self.threads), WARPGROUP):
            mine = slice(first, first + WARPGROUP)
            b = in_memory(right, mine, columns, right_turned)
            if isinstance(left, list):
                values = tensor_cores.values_of(self.of_all(left)[:, mine], kind)
                a = np.full((64, depth), np.nan)
                places = tensor_cores.left_places(values.shape[2], len(left))
                a[places] = values.swapaxes(1, 2)
            else:
                a = in_memory(left, mine, 64, left_turned[0])
            product.append(a.astype(np.float64) @ b.astype(np.float64).T)
        self.sums -= set(sums)  # products that add to the same registers follow each other
        rows, places = tensor_cores.sums_places(columns)
        results = np.stack(product)[:, rows, places].swapaxes(0, 1).reshape(columns // 2, -1)
        if np.all(self.get(keep, "pred")):
            results = results + self.of_all(sums, "f32").view(np.float32)
        for register, values in zip(sums, results.astype(np.float32), strict=True):
            self.put(register, as_bits(values), None)
        factors = left if isinstance(left, list) else []
        self.products[-1].append(tensor_cores.Product(held, factors, sums))
        self._note_registers()
