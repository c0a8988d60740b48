"""What the tests compile for a GPU: calls of pool and gate alone and of the whole layer.

As a script (``triton_compile.py sm_90 bfloat16 wide narrow``) it prints one JSON object a compiled
kernel. Needs ``TRITON_INTERPRET`` unset.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks.machine_code import (
    TARGETS,
    Launch,
    LayerCase,
    compile_launch,
    describe_case,
    in_memory,
    launch_layer,
    recording,
    resources,
)
from sep_attn import triton_kernels
from sep_attn.layout import accumulate_dtype, num_channels, token_shape


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
        return describe_case(self)


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
            compiled = compile_launch(launch, target)
            loop = compiled.asm["ttgir"].partition("scf.for")[2]
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
                "itemsize": case.dtype.itemsize,
                # In the first loop, whether the next tile is asked for before this one's products.
                "loads_ahead": 0 < loop.find("async_copy") < loop.find("warp_group_dot "),
                **resources(compiled, target),
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
