"""Compiles for a GPU what the Triton launchers would launch, on a machine without one.

Inside :func:`recording` a launch runs nothing: Triton's own binder says what it would compile for
these arguments (signature, constants, alignments, the key of its cache), and that is kept.
:func:`compile_launch` then makes the machine code, and :func:`resources` reads it with the tools
in Triton's wheel. Needs ``TRITON_INTERPRET`` unset.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import re
import subprocess
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.hazards import disturbed_products
from sep_attn import functional
from sep_attn.layout import num_channels, token_shape
from sep_attn.triton_kernels import attention

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TARGET = "sm_90"  # where one must do
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class LaunchNothing:
    """What Triton calls with a kernel's programs, stream and arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class QuietDriver:
    """All that Triton asks of a GPU, for ``triton.runtime.driver.set_active``: kernels are compiled
    for :data:`TARGET`, and what is launched reaches :attr:`launcher_cls`."""

    launcher_cls = LaunchNothing
    utils = types.SimpleNamespace(
        load_binary=lambda *_: (1, 2, 0, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 232448},
    )

    def get_current_target(self) -> Any:
        return TARGETS[TARGET]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Launch:
    """What Triton would compile for one launch; equal launches share one compiled kernel."""

    kernel: JITFunction
    key: str
    signature: dict[str, Any] = dataclasses.field(compare=False)
    constants: dict[Any, Any] = dataclasses.field(compare=False)
    attributes: dict[Any, Any] = dataclasses.field(compare=False)
    options: dict[str, Any] = dataclasses.field(compare=False)
    programs: int = dataclasses.field(compare=False)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def constexprs(self) -> dict[str, Any]:
        """The constants by name, those that are None or a specialised 1 among them."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items()}


@functools.cache
def _binder(kernel: JITFunction, backend: Any) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, backend)


def bind(
    kernel: JITFunction, backend: Any, grid: Sequence[int], *args: Any, **kwargs: Any
) -> tuple[dict[str, Any], Launch]:
    """A launch's arguments by the kernel's names, and what Triton would compile for them."""
    kwargs |= {"debug": False}
    bound, specialization, options = _binder(kernel, backend)(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    key = str(specialization)
    made = dict(options.__dict__)
    return bound, Launch(kernel, key, signature, constants, attributes, made, grid[0])


@contextlib.contextmanager
def recording(target: GPUTarget) -> Iterator[list[Launch]]:
    """Keeps every launch in the list it gives, and launches nothing."""
    backend = make_backend(target)
    launches: list[Launch] = []

    def record(
        kernel: JITFunction, *args: Any, grid: Sequence[int], warmup: bool, **kwargs: Any
    ) -> None:
        launches.append(bind(kernel, backend, grid, *args, **kwargs)[1])

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=target, options=launch.options)


def tool(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [str(TOOLS / name), *arguments], capture_output=True, text=True, check=True
    )
    return result.stdout


def lone_buffers(ttgir: str) -> list[str]:
    """Buffers that asynchronous copies fill, of which there is one only, and which tensor cores of
    sm_90 read where they lie: the next copy could come too early."""
    found = []
    for buffer in re.findall(r"(%\S+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<1x", ttgir):
        views = set(re.findall(rf"(%\S+) = ttg\.memdesc_index {re.escape(buffer)}\[", ttgir))
        filled = any(
            re.search(rf"async_copy_global_to_local .*{re.escape(view)}\b", ttgir) for view in views
        )
        for view in list(views):
            views |= set(re.findall(rf"(%\S+) = ttg\.memdesc_trans {re.escape(view)} ", ttgir))
        operands = {
            operand
            for dot in re.findall(r"warp_group_dot (%\S+), (%\S+),", ttgir)
            for operand in dot
        }
        if filled and views & operands:
            found.append(buffer)
    return found


def resources(compiled: Any, target: GPUTarget) -> dict[str, Any]:
    """Registers, bytes spilled, bytes of shared memory, products, in which dtype and of how many
    columns an instruction, how wide global memory is accessed, and what disturbs a product under
    way. None where a target has no such figure."""
    found: dict[str, Any] = {"shared": compiled.metadata.shared}
    if target.backend == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            usage = tool("cuobjdump", "--dump-resource-usage", cubin.name)
            assembly = tool("nvdisasm", cubin.name)
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups()
        found["registers"] = int(registers)
        found["spilled"] = int(stack) + int(local)
        # LDGSTS: from global to shared memory, as pipelined loops load.
        access = re.findall(r"\b((?:LDG|LDGSTS|STG)\.E[.\w]*)", assembly)
        # The tensor cores' instruction of sm_90; the other targets have others.
        found["hgmma"] = assembly.count("HGMMA") if target.arch == 90 else None
        found["disturbed"] = disturbed_products(assembly) if target.arch == 90 else None
        found["hgmma_columns"] = sorted({int(n) for n in re.findall(r"HGMMA\.64x(\d+)x", assembly)})
        bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}

        def width(instruction: str) -> int:
            return next((bits[part] for part in instruction.split(".") if part in bits), 32)
    else:
        assembly = compiled.asm["amdgcn"]
        found["hgmma"], found["hgmma_columns"], found["disturbed"] = None, [], None
        found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly).group(1))
        found["spilled"] = int(
            re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly).group(1)
        )
        access = re.findall(r"\b((?:global|buffer)_(?:load|store)_\w+)", assembly)
        words = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}

        def width(instruction: str) -> int:
            return next((bits for word, bits in words.items() if word in instruction), 16)

    for kind, names in (("loads", ("LDG", "_load_")), ("stores", ("STG", "_store_"))):
        found[kind] = dict(
            collections.Counter(
                str(width(instruction))
                for instruction in access
                if any(name in instruction for name in names)
            )
        )
    operands = re.findall(r"tt\.dot [^\n]*: tensor<\w*x(\w+?)> \*", compiled.asm["ttir"])
    found["products"] = bool(operands)
    found["half_products"] = bool({"f16", "bf16"} & {name.split("x")[-1] for name in operands})
    # Offsets of tiles, before any lowering: they must be 64 bits wide.
    tile = re.compile(r"tt\.addptr [^\n]*tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+x(i\d+)>")
    found["lone_buffers"] = lone_buffers(compiled.asm["ttgir"])
    found["tile_offsets"] = sorted(set(tile.findall(compiled.asm["ttir"])))
    return found


def describe_case(case: Any) -> str:
    """Shape and dtype, then every field that is not as usual."""
    parts = ["x".join(map(str, case.shape)), str(case.dtype).removeprefix("torch.")]
    for field in dataclasses.fields(case)[2:]:
        value = getattr(case, field.name)
        if value != field.default:
            parts.append(f"{field.name}={value}")
    return " ".join(parts)


def in_memory(values: Tensor, memory: str) -> Tensor:
    if memory == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory == "strided":
        larger = values.new_zeros([2 * size for size in values.shape])
        return larger[tuple(slice(None, None, 2) for _ in values.shape)]
    return values


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A forward and a backward pass of the whole layer, or, in ``inference``, the forward pass that
    keeps nothing for another; ``path`` forces the kernels of a path, and ``at_once=False`` the
    backward of wide layers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: str = ""
    memory: str = "contiguous"
    patch: tuple[int, int] = (1, 1)
    masked: bool = False
    dropout: bool = False
    cross: bool = False
    grad_weights: bool = False
    backward: bool = True
    at_once: bool = True
    need_weight_grad: bool = True
    inference: bool = False

    def __str__(self) -> str:
        return describe_case(self)


def forget_plans() -> None:
    """Has the next call of the layer choose its kernels anew."""
    functional._SERVED.clear()
    attention._plan_forward.cache_clear()
    attention._plan_backward.cache_clear()


def launch_layer(case: LayerCase, target_name: str) -> None:
    """Calls the launchers of the fused layer as they would be called on a GPU of this target."""
    x = in_memory(torch.zeros(case.shape, dtype=case.dtype), case.memory)
    dim = num_channels(x)
    mask = torch.zeros(token_shape(x), dtype=torch.bool) if case.masked else None
    seed, dropout_p = (torch.zeros(1, dtype=torch.int64), 0.1) if case.dropout else (None, 0.0)
    x_prev = torch.zeros_like(x) if case.cross else None
    qkv_weight, out_weight = x.new_zeros(1 + 2 * dim, dim), x.new_zeros(dim, dim)
    qkv_bias, out_bias = x.new_zeros(1 + 2 * dim), x.new_zeros(dim)
    options = (dropout_p, "relu", *case.patch)
    forget_plans()
    path_of = (lambda *_: case.path) if case.path else attention.path_of
    most_at_once = attention.MOST_FUSED_BACKWARD_CHANNELS if case.at_once else {2: 0, 4: 0}
    with (
        mock.patch.object(attention, "architecture", lambda _: target_name),
        mock.patch.object(attention, "path_of", path_of),
        mock.patch.object(attention, "MOST_FUSED_BACKWARD_CHANNELS", most_at_once),
    ):
        inputs = x, x_prev, qkv_weight, qkv_bias, out_weight, out_bias, mask, seed
        if case.inference:
            attention.separable_attention_inference(*inputs, *options)
            return
        out, weights, statistics = attention.separable_attention(*inputs, *options)
        if case.backward:
            attention.separable_attention_backward(
                out,
                weights if case.grad_weights else None,
                x,
                x_prev,
                qkv_weight,
                qkv_bias,
                out_weight,
                seed,
                weights,
                statistics,
                *options,
                True,
                case.need_weight_grad,
            )
