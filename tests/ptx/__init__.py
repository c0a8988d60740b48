"""Runs on a CPU what Triton's compiler made of a kernel, down to PTX, NVIDIA's virtual assembly.

Triton's interpreter runs a kernel's Python. What the compiler makes of it, it cannot show: which
loads it widens because it was promised an alignment, where it lets shared memory be written again,
which products it gives to the tensor cores, and in which swizzle. :func:`running` compiles every
launch inside it for sm_90, with that architecture's configurations, and runs the PTX on tensors in
the CPU's memory: a program after another, all threads of a program an instruction at a time.

It faults on what a GPU would not forgive or, worse, forgives most of the time:

- an access outside the elements of the tensors given, or not aligned to its width;
- memory, shared or global, that a thread writes and another reads or writes with no barrier
  between, unless a store comes last that changes nothing; the same between programs of a launch;
- shared memory touched while an asynchronous copy fills it, written while tensor cores read it, or
  read by them before a barrier and a fence have followed the store;
- a register used while tensor cores read it or add to it;
- threads that wait for each other at different places.

Sums of products are as exact as float32 allows and ``ex2.approx`` is exact: of rounding it says no
more than the interpreter. ``wgmma.fence`` does nothing, and a copy has read its source when it
begins. Nothing here knows time, nor what ``ptxas`` makes of PTX.
"""

from .launch import Ran, running
from .memory import Fault

__all__ = ["Fault", "Ran", "running"]
