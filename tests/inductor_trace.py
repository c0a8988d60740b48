"""What ``torch.compile`` makes of the layer on Triton, as far as a machine without a GPU can tell.

As a script it traces calls with a symbolic number of tokens, lets Inductor write its program for
each, and prints one JSON object a graph: the launches in it, the guards on N, what the program
holds. Tensors lie on the CPU, where Inductor is told to write Triton as well; the kernels take
their configurations from the table of sm_90. Needs ``TRITON_INTERPRET`` unset.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx
import torch._inductor.graph
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor import config as inductor_config
from torch._inductor import inductor_prims
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.export._trace import _disable_custom_triton_op_functional_decomposition
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    statically_known_true,
)
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner

from benchmarks.machine_code import TARGET, QuietDriver
from sep_attn import SeparableAttention, functional, triton_kernels
from sep_attn.triton_kernels import attention


@dataclasses.dataclass(frozen=True)
class TraceCase:
    """A call between two neighbours, with N symbolic; ``serves`` and ``leaves`` list other N that
    its graph is to serve and to leave to another. ``"function"`` is the layer as a function of its
    weights, with every size a symbol where it begins; D becomes a number, and is one guard."""

    shape: tuple[int, ...]
    serves: tuple[int, ...] = ()
    leaves: tuple[int, ...] = ()
    kind: str = "layer"
    training: bool = False
    dropout: float = 0.0
    masked: bool = False
    bias: bool = True

    @property
    def token_axis(self) -> int:
        return 1 if len(self.shape) == 3 else 3


CASES = {
    "long": TraceCase((8, 4096, 128), (513, 1000, 65_536), (512, 16)),
    "shared": TraceCase((8, 256, 128), (2, 197, 512), (513,)),
    "short": TraceCase((64, 256, 128), (2, 16, 49, 1000), (1025, 65_536)),
    "wide": TraceCase((8, 300, 640), (16, 129, 1000, 65_536)),
    "training": TraceCase((8, 4096, 128), (513, 1000), (512,), training=True, dropout=0.1),
    "wide training": TraceCase((8, 300, 640), (129, 1000), training=True, masked=True),
    "patches": TraceCase((64, 128, 4, 256), (64, 72, 1000), (49, 1032), bias=False),
    "ragged patches": TraceCase((64, 128, 4, 49), (7, 197, 1001), (64, 1025), training=True),
    "very wide training": TraceCase((8, 300, 2176), training=True),
    "every size": TraceCase((8, 4096, 128), kind="function", training=True),
    "pool": TraceCase((4, 1000, 96), (2, 17, 65_536), kind="pool", training=True),
    "gate": TraceCase((4, 1000, 96), (2, 17, 65_536), kind="gate", training=True),
}


class Traced(Exception):
    """Thrown in place of running what was compiled."""


def program_of(case: TraceCase) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function with pointwise neighbours on both sides, and its arguments."""
    dtype = torch.bfloat16
    x = torch.zeros(case.shape, dtype=dtype, requires_grad=case.training)
    torch._dynamo.mark_dynamic(x, case.token_axis)
    if case.kind == "pool":
        scores = torch.zeros(case.shape[:2], dtype=dtype)
        torch._dynamo.mark_dynamic(scores, 1)
        return lambda x, s: functional.context_pool(x.sin(), s, backend="triton") + 1, (x, scores)
    if case.kind == "gate":
        context = torch.zeros(case.shape[0], case.shape[2], dtype=dtype, requires_grad=True)
        return lambda x, c: functional.gate(x.sin(), c, backend="triton") + x, (x, context)
    dim = case.shape[2 if len(case.shape) == 3 else 1]
    if case.kind == "function":
        sizes = (1 + 2 * dim, dim), (1 + 2 * dim,), (dim, dim), (dim,)
        weights = [torch.zeros(size, dtype=dtype, requires_grad=case.training) for size in sizes]
        layer = functional.separable_attention
        return lambda x, *weights: layer(x.sin(), *weights, backend="triton") + x, (x, *weights)
    layer = SeparableAttention(
        dim, case.dropout, bias=case.bias, backend="triton", dtype=dtype
    ).train(case.training)
    before = nn.LayerNorm(dim, dtype=dtype) if len(case.shape) == 3 else nn.SiLU()
    if not case.masked:
        return lambda x: layer(before(x)) + x, (x,)
    mask = torch.zeros(case.shape[:2], dtype=torch.bool)
    torch._dynamo.mark_dynamic(mask, 1)
    return lambda x, mask: layer(before(x), key_padding_mask=~mask) + x, (x, mask)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    driver.set_active(QuietDriver())
    with (
        mock.patch.object(attention, "architecture", lambda _: TARGET),
        mock.patch.object(triton_kernels, "unavailable_reason", lambda _: None),
        mock.patch.object(triton_kernels, "traces", lambda _: True),
        mock.patch.object(torch._inductor.graph, "should_assume_input_aligned", lambda _: True),
        inductor_config.patch(cpu_backend="triton", force_disable_caches=True),
    ):
        yield


def trace(case: TraceCase) -> list[dict[str, Any]]:
    """The graphs of a case, forward first."""
    graphs: list[dict[str, Any]] = []
    guards: list[Any] = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        nodes = nodes_of(graph)
        written: list[str] = []

        def write(lowering: GraphLowering) -> None:
            code, _ = lowering.codegen()
            written.append(getattr(code, "value", code))
            raise Traced

        with mock.patch.object(GraphLowering, "compile_to_module", write):
            try:
                torch._inductor.compile_fx.compile_fx_inner(graph, inputs)
            except Exception as error:
                if not written:
                    raise AssertionError("Inductor wrote no program") from error
        graphs.append({"nodes": nodes, "program": written[0]})

        def run(*arguments: Any) -> Any:
            raise Traced

        return run

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        compiled = aot_module_simplified(
            graph,
            inputs,
            fw_compiler=compile_graph,
            bw_compiler=compile_graph,
            inference_compiler=compile_graph,
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )
        guards.extend(torch._guards.TracingContext.get().fake_mode.shape_env.guards)
        return compiled

    torch._dynamo.reset()
    function, arguments = program_of(case)
    with torch.set_grad_enabled(case.training), contextlib.suppress(Traced):
        dynamic = True if case.kind == "function" else None
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*arguments)
    expressions = {guard.expr for guard in guards}
    # All symbols stand for N: that of x, and that of a mask or of scores, until they are compared.
    # (But of "every size", whose lengths nobody asks for.)
    symbols = set().union(*(expression.free_symbols for expression in expressions))
    for graph in graphs:
        graph["served"] = [
            length
            for length in (*case.serves, *case.leaves, case.shape[case.token_axis])
            if all(expression.subs(dict.fromkeys(symbols, length)) for expression in expressions)
        ]
        graph["guards"] = sorted(map(str, expressions))
    return graphs


def nodes_of(graph: torch.fx.GraphModule) -> list[dict[str, Any]]:
    """Calls of operators, in order; launches with their constants."""
    nodes = []
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if "triton_kernel_wrapper" not in str(node.target):
            nodes.append({"operator": str(node.target)})
            continue
        kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
        constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
        given = {**node.kwargs["kwargs"], **constants}
        options = {}
        if isinstance(kernel, Autotuner):  # of one configuration: that is how options are kept
            (config,), kernel = kernel.configs, kernel.fn
            options = {"warps": config.num_warps, "stages": config.num_stages}
        names = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
        nodes.append(
            {
                "operator": str(node.target),
                "kernel": kernel.fn.__name__.removesuffix("_in_scalars"),
                "constants": {name: given[name] for name in names},
                "cloned": node.kwargs.get("tensors_to_clone"),
                "empty": [
                    name
                    for name, value in node.kwargs["kwargs"].items()
                    if isinstance(value, torch.fx.Node)
                    and isinstance(value.meta["val"], Tensor)
                    and statically_known_true(value.meta["val"].numel() == 0)
                ],
                **options,
            }
        )
    return nodes


def operators_on(device: str, *, exporting: bool = False) -> list[str]:
    """The graph of a call on fake tensors of this device, functionalised as ``torch.compile``
    does it; of a GPU, which need not be there."""
    context = StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake = FakeTensorMode(shape_env=ShapeEnv())
    shape = fake.from_tensor(
        torch.empty(8, 2000, 64, device="meta"), symbolic_context=context
    ).shape
    exported = _disable_custom_triton_op_functional_decomposition()
    with (
        fake,
        mock.patch.object(attention, "architecture", lambda _: TARGET),
        exported if exporting else contextlib.nullcontext(),
        # Its fake of a copy asks for the device.
        mock.patch.object(inductor_prims, "force_stride_order", lambda value, _: value),
    ):
        sizes = (shape, (129, 64), (129,), (64, 64), (64,))
        tensors = [torch.empty(size, dtype=torch.float16, device=device) for size in sizes]

        def call(x: Tensor, *weights: Tensor) -> Tensor:
            operator = torch.ops.sep_attn.separable_attention_inference_triton
            return operator(x, None, *weights, None, None, 0.0, "relu", 1, 1)

        graph = make_fx(dispatch_functionalize(call), tracing_mode="real")(*tensors)
    return [node.get("kernel", node["operator"]) for node in nodes_of(graph)]


KERNEL = re.compile(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str=", re.S | re.M)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all of them by default")
    parser.add_argument(
        "--devices", action="store_true", help="only what is traced on which device"
    )
    arguments = parser.parse_args()
    if arguments.devices:
        driver.set_active(QuietDriver())
        found = {device: operators_on(device) for device in ("cuda:0", "cpu")}
        print(json.dumps({**found, "export": operators_on("cuda:0", exporting=True)}))
        return
    with as_on_a_gpu():
        for name in arguments.cases or CASES:
            for direction, graph in zip(("forward", "backward"), trace(CASES[name]), strict=False):
                program = graph.pop("program")
                graph["written"] = [kernel for kernel, _ in KERNEL.findall(program)]
                graph["sources"] = sorted(set(re.findall(r"^def (\w+_kernel)\(", program, re.M)))
                graph["launched"] = re.findall(r"^ +(\w+)\.run\(", program, re.M)
                row = {"case": name, "graph": direction, **graph}
                print(json.dumps(row, default=str), flush=True)


if __name__ == "__main__":
    main()
