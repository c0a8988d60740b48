"""Compiles for a GPU what the Triton launchers would launch, on a machine without one.

Inside :func:`recording` a launch runs nothing: Triton's own binder says what it would compile for
these arguments (signature, constants, alignments, the key of its cache), and that is kept.
:func:`compile_launch` then makes the machine code, and :func:`resources` reads it with the tools
in Triton's wheel. Needs ``TRITON_INTERPRET`` unset. As a script (``triton_compile.py sm_90 bfloat16
wide narrow``) it prints one JSON object a compiled kernel.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
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

from sep_attn import triton_kernels
from sep_attn.layout import accumulate_dtype, num_channels, token_shape

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


@contextlib.contextmanager
def recording(target: GPUTarget) -> Iterator[list[Launch]]:
    """Keeps every launch in the list it gives, and launches nothing."""
    backend = make_backend(target)
    launches: list[Launch] = []

    @functools.cache
    def binder(kernel: JITFunction) -> Any:
        return create_function_from_signature(kernel.signature, kernel.params, backend)

    def record(
        kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any
    ) -> None:
        kwargs |= {"debug": False}
        bound, specialization, options = binder(kernel)(*args, **kwargs)
        options, signature, constants, attributes = kernel._pack_args(
            backend, kwargs, bound, specialization, options
        )
        key = str(specialization)
        launches.append(
            Launch(kernel, key, signature, constants, attributes, dict(options.__dict__), grid[0])
        )

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


def resources(compiled: Any, target: GPUTarget) -> dict[str, Any]:
    """Registers, bytes spilled, bytes of shared memory, and how wide global memory is accessed."""
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
        found["hgmma"] = assembly.count("HGMMA")
        bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}

        def width(instruction: str) -> int:
            return next((bits[part] for part in instruction.split(".") if part in bits), 32)
    else:
        assembly = compiled.asm["amdgcn"]
        found["hgmma"] = None
        found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly).group(1))
        found["spilled"] = sum(
            int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly)
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
    # Offsets of tiles, before any lowering: they must be 64 bits wide.
    tile = re.compile(r"tt\.addptr [^\n]*tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+x(i\d+)>")
    found["tile_offsets"] = sorted(set(tile.findall(compiled.asm["ttir"])))
    return found


# What is compiled ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """One call of all four launchers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    memory: str = "contiguous"
    patch: tuple[int, int] = (1, 1)
    masked: bool = False
    dropout: bool = False
    grad_weights: bool = False
    grad: str = "dense"
    act: str = "relu"

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
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


def launch_all(case: CompileCase) -> None:
    """Calls the launchers as a forward and a backward pass would."""
    x = in_memory(torch.zeros(case.shape, dtype=case.dtype), case.memory)
    tokens, acc = token_shape(x), accumulate_dtype(case.dtype)
    mask = torch.zeros(tokens, dtype=torch.bool) if case.masked else None
    dropout = torch.zeros(tokens, dtype=acc) if case.dropout else None
    scores = torch.zeros(tokens, dtype=case.dtype)
    pooled, weight_sum, weights = triton_kernels.context_pool(x, scores, mask, dropout, *case.patch)
    triton_kernels.context_pool_backward(
        torch.zeros_like(pooled),
        torch.zeros_like(weight_sum),
        torch.zeros_like(weights) if case.grad_weights else None,
        x,
        pooled,
        weight_sum,
        weights,
        dropout,
        *case.patch,
    )
    context = torch.zeros((pooled.shape[0], num_channels(x)), dtype=acc)
    y = triton_kernels.gate(x, context, case.act, *case.patch)
    grad_y = y.new_zeros(()).expand_as(y) if case.grad == "sum" else y
    triton_kernels.gate_backward(grad_y, x, context, case.act, *case.patch)


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A forward and a backward pass of the whole layer; ``path`` forces the kernels of a path, and
    ``at_once=False`` the backward of wide layers."""

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

    __str__ = CompileCase.__str__


def launch_layer(case: LayerCase, target_name: str) -> None:
    """Calls the launchers of the fused layer as they would be called on a GPU of this target."""
    from sep_attn.triton_kernels import attention

    x = in_memory(torch.zeros(case.shape, dtype=case.dtype), case.memory)
    dim = num_channels(x)
    mask = torch.zeros(token_shape(x), dtype=torch.bool) if case.masked else None
    seed, dropout_p = (torch.zeros(1, dtype=torch.int64), 0.1) if case.dropout else (None, 0.0)
    x_prev = torch.zeros_like(x) if case.cross else None
    qkv_weight, out_weight = x.new_zeros(1 + 2 * dim, dim), x.new_zeros(dim, dim)
    qkv_bias, out_bias = x.new_zeros(1 + 2 * dim), x.new_zeros(dim)
    options = (dropout_p, "relu", *case.patch)
    attention._plan_forward.cache_clear()
    attention._plan_backward.cache_clear()
    path_of = (lambda *_: case.path) if case.path else attention.path_of
    most_at_once = attention.MOST_FUSED_BACKWARD_CHANNELS if case.at_once else {2: 0, 4: 0}
    with (
        mock.patch.object(attention, "architecture", lambda _: target_name),
        mock.patch.object(attention, "path_of", path_of),
        mock.patch.object(attention, "MOST_FUSED_BACKWARD_CHANNELS", most_at_once),
    ):
        out, weights, statistics = attention.separable_attention(
            x, x_prev, qkv_weight, qkv_bias, out_weight, out_bias, mask, seed, *options
        )
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
                True,
            )


def layer(dtype: torch.dtype) -> list[LayerCase]:
    """Every kernel of the fused layer in the three layouts, and where registers are scarcest."""
    return [
        LayerCase((2, 2048, 128), dtype),
        LayerCase((2, 2048, 128), dtype, at_once=False),
        LayerCase((2, 192, 4, 256), dtype, "short", patch=(4, 1), masked=True, dropout=True),
        LayerCase((2, 256, 8, 8), dtype, "short", patch=(2, 2), backward=False),
        LayerCase((2, 512, 512), dtype, "short", backward=False),
        LayerCase((2, 512, 512), dtype, "long", backward=False),
        LayerCase((2, 256, 768), dtype, backward=False),
    ]


def layer_few(dtype: torch.dtype) -> list[LayerCase]:
    """Every kernel of the fused layer once."""
    return [
        LayerCase((2, 2048, 128), dtype),
        LayerCase((2, 2048, 128), dtype, at_once=False),
        LayerCase((2, 64, 64), dtype, "short", backward=False),
    ]


def wide(dtype: torch.dtype) -> list[CompileCase]:
    """Layouts that are read in whole 16-byte words, one a width of tile; N is large enough for
    splits, so the combining kernels are launched too."""
    return [
        CompileCase((1, 2048, 128), dtype),
        CompileCase((1, 4096, 96), dtype),
        CompileCase((1, 4096, 16), dtype),
        CompileCase((1, 2048, 768), dtype, masked=True, dropout=True, grad_weights=True),
        CompileCase((1, 64, 4, 1024), dtype, patch=(4, 1)),
        CompileCase((1, 96, 4, 2048), dtype, patch=(4, 1), masked=True, dropout=True),
        CompileCase((1, 64, 64, 64), dtype, patch=(2, 2), grad_weights=True),
        CompileCase((1, 64, 32, 128), dtype, memory="channels_last", patch=(2, 2)),
    ]


def narrow(dtype: torch.dtype) -> list[CompileCase]:
    """Layouts and lengths that leave no whole words, and gradients of stride 0."""
    return [
        CompileCase((1, 2051, 33), dtype, act="identity"),
        CompileCase((1, 64, 4, 1027), dtype, patch=(4, 1), grad_weights=True),
        CompileCase((1, 64, 64, 66), dtype, patch=(2, 2), masked=True),
        CompileCase((1, 64, 32, 68), dtype, patch=(2, 4)),
        CompileCase((1, 1024, 128), dtype, memory="strided"),
        CompileCase((1, 1024, 128), dtype, grad="sum"),
    ]


def few(dtype: torch.dtype) -> list[CompileCase]:
    """Every kernel, each contiguous axis and every option once."""
    return [wide(dtype)[index] for index in (3, 4, 6)]


CASES = {"wide": wide, "narrow": narrow, "few": few, "layer": layer, "layer_few": layer_few}


def compile_cases(
    target_name: str, cases: Iterable[CompileCase | LayerCase]
) -> Iterator[dict[str, Any]]:
    """Compiles every distinct kernel that the cases launch."""
    target = TARGETS[target_name]
    seen: set[Launch] = set()
    for case in cases:
        with recording(target) as launches:
            if isinstance(case, LayerCase):
                launch_layer(case, target_name)
            else:
                launch_all(case)
        for launch in launches:
            if launch in seen:
                continue
            seen.add(launch)
            constexprs = launch.constexprs
            layouts = {k: value for k, value in constexprs.items() if k.endswith("LAYOUT")}
            yield {
                "target": target_name,
                "case": str(case),
                "kernel": launch.name,
                "layouts": layouts,
                "tile": [constexprs.get("BLOCK_N"), constexprs.get("BLOCK_D")],
                "config": {
                    name: value
                    for name, value in constexprs.items()
                    if name in ("D", "BANDS", "GROUPS") or name.startswith("BLOCK_")
                },
                "warps": launch.options["num_warps"],
                "stages": launch.options["num_stages"],
                "products": "PRECISION" in constexprs,
                "itemsize": case.dtype.itemsize,
                **resources(compile_launch(launch, target), target),
            }


def count_variants(cases: Iterable[CompileCase | LayerCase]) -> dict[str, int]:
    """How many kernels of each name the cases need together."""
    with recording(TARGETS["sm_90"]) as launches:
        for case in cases:
            if isinstance(case, LayerCase):
                launch_layer(case, "sm_90")
            else:
                launch_all(case)
    return dict(collections.Counter(launch.name for launch in set(launches)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("dtype", choices=["float16", "bfloat16", "float32", "float64"])
    parser.add_argument("cases", nargs="+", choices=CASES)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    for row in compile_cases(
        arguments.target, [case for name in arguments.cases for case in CASES[name](dtype)]
    ):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
