"""Global and shared memory, and who touched what since when."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

NOBODY, SEVERAL = -1, -2
WARP = 32
# How far apart threads may be that store "the same" sum (:func:`_alike`), and what is too small to
# be left of a sum: an integer, as a float.
LAST_BITS = 1e-5
TINY = 2.0**-100


class Fault(AssertionError):
    """A GPU need not do this right."""


class Clock:
    """What the threads of a program have passed: barriers of all, those of a warp, and fences
    before the tensor cores read shared memory."""

    def __init__(self) -> None:
        self.barriers = self.warp_barriers = self.fences = 0


class Access:
    """Who touched each byte last, and when."""

    def __init__(self, size: int) -> None:
        self.thread = np.full(size, NOBODY, np.int32)
        self.program = np.full(size, NOBODY, np.int32)
        self.barriers = np.zeros(size, np.int32)
        self.warp_barriers = np.zeros(size, np.int32)

    def note(self, places: Array, threads: Array | int, program: Array | int, clock: Clock) -> None:
        self.thread[places] = threads
        self.program[places] = program
        self.barriers[places] = clock.barriers
        self.warp_barriers[places] = clock.warp_barriers

    def may_meet(self, places: Array, threads: Array, clock: Clock) -> Array:
        """Where another thread's access and one by ``threads`` now come in any order."""
        who = self.thread[places]
        others = (who != threads) & (who != NOBODY) & (self.barriers[places] == clock.barriers)
        same_warp = (who >= 0) & (who // WARP == threads // WARP)
        return others & ~(same_warp & (self.warp_barriers[places] < clock.warp_barriers))

    def is_elsewhere(self, places: Array, program: int) -> Array:
        """Where another program's access was."""
        owner = self.program[places]
        return (owner != NOBODY) & (owner != program)


class Memory:
    """A run of bytes; threads are those of one program at a time.

    Args:
        name: for messages.
        start: address of the first byte.
        data: the bytes.
        inside: of each, whether it belongs to a tensor.
    """

    def __init__(self, name: str, start: int, data: Array, inside: Array) -> None:
        self.name, self.start, self.data, self.inside = name, start, data, inside
        size = len(data)
        self.stores, self.loads = Access(size), Access(size)
        self.fences = np.full(size, NOBODY, np.int32)  # passed before the last store
        self.filling = np.zeros(size, bool)  # by an asynchronous copy
        self.multiplied = np.zeros(size, np.int16)  # products under way that read it

    def _places(self, addresses: Array, width: int) -> Array:
        """The bytes of accesses of ``width`` bytes, ``[threads, width]``; faults on those that lie
        outside or not at a multiple of their width."""
        first = addresses - self.start
        if np.any(addresses % width):
            raise Fault(f"{self.name}: {width} bytes at an address that is no multiple of it")
        if np.any((first < 0) | (first + width > len(self.data))):
            where = f"{first.min()} to {first.max()} of {len(self.data)}"
            raise Fault(f"{self.name}: {width} bytes outside, at byte {where}")
        places = first[:, None] + np.arange(width)
        if not self.inside[places].all():
            raise Fault(f"{self.name}: {width} bytes that are no element of a tensor")
        return places

    def load(
        self, addresses: Array, width: int, threads: Array, program: int, clock: Clock
    ) -> Array:
        """``[threads, width]`` bytes."""
        places = self._places(addresses, width)
        who = np.broadcast_to(threads[:, None], places.shape)
        if self.filling[places].any():
            raise Fault(f"{self.name}: read while an asynchronous copy fills it")
        if self.stores.is_elsewhere(places, program).any():
            raise Fault(f"{self.name}: written by one program, read by another")
        if self.stores.may_meet(places, who, clock).any():
            raise Fault(f"{self.name}: written by one thread, read by another, no barrier between")
        by_now = self.loads.barriers[places] == clock.barriers
        shared = by_now & (self.loads.thread[places] != NOBODY) & (self.loads.thread[places] != who)
        elsewhere = self.loads.is_elsewhere(places, program)
        readers = np.where(shared, SEVERAL, who)
        self.loads.note(places, readers, np.where(elsewhere, SEVERAL, program), clock)
        # Of threads of this very instruction only one has been noted.
        self.loads.thread[places[self.loads.thread[places] != readers]] = SEVERAL
        return self.data[places]

    def _check_store(
        self, places: Array, changed: Array, threads: Array, program: int, clock: Clock
    ) -> None:
        if self.filling[places].any():
            raise Fault(f"{self.name}: written while an asynchronous copy fills it")
        if self.multiplied[places].any():
            raise Fault(f"{self.name}: written while tensor cores read it")
        for before, verb in ((self.stores, "written"), (self.loads, "read")):
            if np.any(before.is_elsewhere(places, program) & changed):
                raise Fault(f"{self.name}: {verb} by one program, written by another")
            if np.any(before.may_meet(places, threads, clock) & changed):
                raise Fault(
                    f"{self.name}: {verb} by one thread, written by another, no barrier between"
                )

    def store(
        self, addresses: Array, values: Array, threads: Array, program: int, clock: Clock
    ) -> None:
        """``values [threads, width]``, bytes."""
        places = self._places(addresses, values.shape[1])
        who = np.broadcast_to(threads[:, None], places.shape)
        changed = self.data[places] != values
        self._check_store(places, changed, who, program, clock)
        self.data[places] = values
        if not _alike(self.data[places], values):
            raise Fault(f"{self.name}: threads store different values in one place")
        self.stores.note(places, who, program, clock)
        self.fences[places] = clock.fences

    def begin_copy(
        self, addresses: Array, width: int, threads: Array, program: int, clock: Clock
    ) -> None:
        """From here to :meth:`end_copy` an asynchronous copy may write at any time."""
        places = self._places(addresses, width)
        changed = np.ones(places.shape, bool)
        self._check_store(places, changed, threads[:, None], program, clock)
        self.filling[places] = True

    def end_copy(
        self, addresses: Array, values: Array, threads: Array, program: int, clock: Clock
    ) -> None:
        places = self._places(addresses, values.shape[1])
        self.filling[places] = False
        self.data[places] = values
        self.stores.note(places, threads[:, None], program, clock)
        # Triton before 3.7.1 puts no fence between a copy and tensor cores, as CUTLASS puts none.
        self.fences[places] = NOBODY

    def begin_product(self, addresses: Array, width: int, clock: Clock) -> tuple[Array, Array]:
        """What tensor cores read, ``[values, width]`` bytes, and the places that they hold until
        :meth:`end_product`."""
        places = self._places(addresses, width)
        if self.filling[places].any():
            raise Fault(f"{self.name}: read by tensor cores while an asynchronous copy fills it")
        stored = self.stores.thread[places] != NOBODY
        if np.any(stored & (self.stores.barriers[places] == clock.barriers)):
            raise Fault(f"{self.name}: read by tensor cores, no barrier after the store")
        if np.any(self.fences[places] == clock.fences):
            raise Fault(f"{self.name}: read by tensor cores, no fence after the store")
        held = np.unique(places)
        self.multiplied[held] += 1
        return self.data[places], held

    def end_product(self, held: Array, program: int, clock: Clock) -> None:
        self.multiplied[held] -= 1
        self.loads.note(held, SEVERAL, program, clock)


def _alike(stored: Array, values: Array) -> bool:
    """Whether all threads find what they stored, but for the last bits of sums of values about 1.

    Threads of a warp that add products hold different roundings of one sum: each rounds the
    others' products, not its own, which its addition takes exactly (Triton's issue 7264). Which of
    them a place then holds is the hardware's choice, and always the same.
    """
    if np.array_equal(stored, values):
        return True
    if values.shape[1] % 4:
        return False
    a, b = (np.ascontiguousarray(side).view(np.float32) for side in (stored, values))
    scale = np.abs(b[np.isfinite(b)]).max(initial=1.0)
    sums = [(side == 0) | (np.abs(side) > TINY) for side in (a, b)]
    near = (np.abs(a - b) <= LAST_BITS * scale) & sums[0] & sums[1]
    return bool(((a == b) | (np.isnan(a) & np.isnan(b)) | near).all())


class GlobalMemory:
    """The storages of tensors, at the addresses that they have."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._memories: dict[int, Memory] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            start, size, itemsize = storage.data_ptr(), storage.nbytes(), tensor.element_size()
            if not size:
                continue
            if start in self._memories:
                memory = self._memories[start]
                memory.name += f", {name}"
            else:
                data = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
                memory = Memory(name, start, data, np.zeros(size, bool))
                self._memories[start] = memory
            elements = torch.zeros(size // itemsize, dtype=torch.bool)
            view = elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            view.fill_(True)
            memory.inside[: len(elements) * itemsize] |= np.repeat(elements.numpy(), itemsize)

    def at(self, addresses: Array) -> Memory:
        """The memory in which these addresses lie."""
        for memory in self._memories.values():
            if memory.start <= addresses[0] < memory.start + len(memory.data):
                return memory
        raise Fault(f"global memory: no tensor lies at {int(addresses[0]):#x}")


def shared_memory(start: int, size: int) -> Memory:
    """A program's own, full of ones: not a number in any type."""
    return Memory("shared memory", start, np.full(size, 255, np.uint8), np.ones(size, bool))
