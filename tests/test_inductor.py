"""``torch.compile`` sees the Triton kernels: launches in its graphs, one graph for many N.

:mod:`inductor_trace` traces in a process of its own, for Triton decides when it is imported whether
kernels are compiled or interpreted. What the nodes hold is another form of the kernels; here that
form runs in the interpreter and must give the same bits.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock  # torch needs it too
from oracle import Case, distance, inputs_of
from test_triton_attention import PATHS, call, take_path
from test_triton_compile import IN_THREE_PARTS, run_without_interpreter
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.machine_code import forget_plans

pytest.importorskip("triton")

from sep_attn import SeparableAttention, ops, triton_kernels
from sep_attn.triton_kernels import attention, configs, launch

pytestmark = pytest.mark.xdist_group("inductor")  # the graphs are made once, and take a while
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="as if there were a GPU")
SCRIPT = str(Path(__file__).parent / "inductor_trace.py")
RUN_SCRIPT = str(Path(__file__).parent / "inductor_run.py")
LONG = ["score_pool_fwd_kernel", "context_combine_kernel", "value_gate_output_fwd_kernel"]
WIDE = [*LONG[:2], "token_product_kernel", "token_product_kernel"]
BACKWARD = [
    *("context_bwd_kernel", "source_bwd_kernel", "token_product_kernel", "key_weight_bwd_kernel"),
    *["sum_parts_kernel"] * 2,  # weights, and all that is small
]
KERNELS = {
    ("long", "forward"): LONG,
    ("short", "forward"): ["slice_fwd_kernel"],
    ("shared", "forward"): ["slice_fwd_kernel"],
    ("wide", "forward"): WIDE,
    ("training", "forward"): LONG,
    ("training", "backward"): [*BACKWARD, "value_gate_weights_bwd_kernel"],
    ("wide training", "forward"): WIDE,
    ("wide training", "backward"): [
        *(*BACKWARD, "sum_parts_kernel", "value_gate_bwd_kernel"),
        *("weight_grad_kernel", "weight_grad_kernel"),
    ],
    ("patches", "forward"): ["slice_fwd_kernel"],
    ("ragged patches", "forward"): ["slice_fwd_kernel"],
    ("ragged patches", "backward"): [*BACKWARD, "value_gate_weights_bwd_kernel"],
    ("very wide training", "forward"): WIDE,
    ("very wide training", "backward"): [
        *(*BACKWARD, "sum_parts_kernel", "value_gate_bwd_kernel"),
        *("weight_grad_kernel", "weight_grad_kernel"),
    ],
    ("every size", "forward"): LONG,
    ("every size", "backward"): [*BACKWARD, "value_gate_weights_bwd_kernel"],
    ("pool", "forward"): ["context_pool_combine_kernel", "context_pool_fwd_kernel"],
    ("pool", "backward"): ["context_pool_bwd_kernel"],
    ("gate", "forward"): ["gate_fwd_kernel"],
    ("gate", "backward"): ["gate_bwd_combine_kernel", "gate_bwd_kernel"],
}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """Every graph of :mod:`inductor_trace`, by case and direction; one worker of xdist's makes
    them for all."""
    folder = tmp_path_factory.mktemp("inductor")
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = tmp_path_factory.getbasetemp().parent
    file = folder / "inductor.jsonl"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            triton_cache = tmp_path_factory.mktemp("triton")
            file.write_text(run_without_interpreter(triton_cache, SCRIPT))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {(row["case"], row["graph"]): row for row in rows}


def launches(graph: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in graph["nodes"] if "kernel" in node]


@WITHOUT_GPU
def test_launches_are_nodes_of_the_graphs(graphs: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert graphs.keys() == KERNELS.keys()
    for key, kernels in KERNELS.items():
        found = [node["kernel"] for node in launches(graphs[key])]
        if key[1] == "forward" and len(kernels) > 1 and key[0] != "pool":
            assert found == kernels, key  # in this order
        assert sorted(found) == sorted(kernels), key
        assert not any(node["empty"] for node in launches(graphs[key])), key
        operators = {node["operator"] for node in graphs[key]["nodes"]}
        assert not any("sep_attn" in operator for operator in operators), key
        # Inductor writes the kernels down, and launches each as often.
        written = [name for name in graphs[key]["launched"] if "_in_scalars_" in name]
        assert sorted(name.partition("_in_scalars_")[0] for name in written) == sorted(kernels)
        assert set(kernels) <= set(graphs[key]["sources"]), key


@WITHOUT_GPU
def test_constants_come_from_the_tables(graphs: dict[tuple[str, str], dict[str, Any]]) -> None:
    checked = set()
    for (case, _), graph in graphs.items():
        for node in launches(graph):
            constants = node["constants"]
            assert not any("Sym" in str(value) or value is None for value in constants.values())
            if node["kernel"] not in configs.SM_90:
                continue
            config = configs.config_of(node["kernel"], "sm_90", 2, constants["D"])
            assert (config.tokens, config.warps, config.stages) == (
                constants["BLOCK_N"],
                node["warps"],
                node["stages"],
            ), (case, node["kernel"])
            checked.add(node["kernel"])
    assert checked == configs.SM_90.keys() - {n for n in configs.SM_90 if n.endswith("float32")}


@WITHOUT_GPU
@pytest.mark.parametrize(
    "case, served",
    [
        ("long", [513, 1000, 65_536, 4096]),
        ("shared", [2, 197, 512, 256]),
        ("short", [2, 16, 49, 1000, 256]),
        ("wide", [16, 129, 1000, 65_536, 300]),
        ("training", [513, 1000, 4096]),
        ("wide training", [129, 1000, 300]),
        ("patches", [64, 72, 1000, 256]),
        ("ragged patches", [7, 197, 1001, 49]),
        ("pool", [2, 17, 65_536, 1000]),
        ("gate", [2, 17, 65_536, 1000]),
    ],
)
def test_one_graph_serves_many_lengths(
    case: str, served: list[int], graphs: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """Guards other than upper bounds: of short against long slices, in training of wide layers of
    one tile, and of whole words where tokens are contiguous."""
    assert graphs[case, "forward"]["served"] == served
    bounds = [guard for guard in graphs[case, "forward"]["guards"] if "Eq(s" not in guard]
    dividing = [guard for guard in bounds if not guard.endswith(("<= 1073741824", "<= 2147483647"))]
    most = {"ragged patches": 2, "patches": 3, "pool": 0, "gate": 0, "wide": 0}
    assert len(dividing) <= most.get(case, 1), dividing


@WITHOUT_GPU
@pytest.mark.parametrize("case", ["long", "short", "wide", "patches", "gate"])
def test_neighbours_are_fused_into_a_kernel_on_each_side(
    case: str, graphs: dict[tuple[str, str], dict[str, Any]]
) -> None:
    launched = graphs[case, "forward"]["launched"]
    ours = [place for place, name in enumerate(launched) if "_in_scalars_" in name]
    assert ours == list(range(1, len(launched) - 1)), launched
    assert launched[0].startswith("triton_") and launched[-1].startswith("triton_poi_fused_add")
    operators = [node["operator"] for node in graphs[case, "forward"]["nodes"]]
    assert operators[-1] == "aten.add.Tensor" and operators[0].startswith(("aten.", "prims."))


@WITHOUT_GPU
def test_compiled_programs_give_the_layer(tmp_path: Path) -> None:
    """What Inductor wrote, compiled for sm_90 and run: as good as plain PyTorch for every length,
    by kernels like those of an eager call."""
    program = json.loads(run_without_interpreter(tmp_path, RUN_SCRIPT).splitlines()[-1])
    for name, (error, allowed) in program["errors"].items():
        assert error <= 2.0 * allowed + 1e-5, name
    forward, backward = (KERNELS["training", direction] for direction in ("forward", "backward"))
    kernels = [*forward, *backward]
    launched = [name for name in program["launched"] if not name.startswith("triton_")]
    assert sorted(launched) == sorted(f"{name}_in_scalars" for name in [*forward, *kernels])
    rows = program["compiled"]
    # One kernel serves both sums.
    assert {row["kernel"].partition("_in_scalars")[0] for row in rows} == set(kernels)
    for row in rows:
        in_three_parts = row["kernel"].partition("_in_scalars")[0] in IN_THREE_PARTS
        assert row["spilled"] == 0 and row["disturbed"] == [], row
        assert (row["hgmma"] > 0) == (row["half_products"] or in_three_parts), row
        # The parts of the scores' gradients are rows of D + 1 values.
        assert row["loads"].get("128", 0) > 0 or row["kernel"].startswith("sum_parts"), row


@WITHOUT_GPU
def test_launches_are_traced_on_gpus_and_not_for_an_export(tmp_path: Path) -> None:
    found = json.loads(run_without_interpreter(tmp_path, SCRIPT, "--devices"))
    assert [name for name in found["cuda:0"] if name.endswith("kernel")] == LONG
    operator = "sep_attn.separable_attention_inference_triton.default"
    assert found["cpu"] == found["export"] == [operator]


# The same bits -----------------------------------------------------------------------------------


def results_of(case: Case, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Results and gradients of the layer, of pool and of gate, with a mask and with dropout."""
    forget_plans()
    x = inputs["x"]
    mask = torch.arange(x.shape[1]).expand(x.shape[:2]) % 3 == 1
    seed = torch.tensor([3])
    out, weights, statistics = triton_kernels.separable_attention(
        *call(inputs, mask=mask, seed=seed, dropout_p=0.2)
    )
    tensors = [inputs[name] for name in ("qkv_weight", "qkv_bias", "out_weight")]
    options = (0.2, "relu", 1, 1, True, True)
    grads = triton_kernels.separable_attention_backward(
        out, weights, x, inputs.get("x_prev"), *tensors, seed, weights, statistics, *options
    )
    pool = triton_kernels.context_pool(x, weights, mask, None, 1, 1)
    pool_grads = triton_kernels.context_pool_backward(*pool, x, *pool[:2], pool[2], None, 1, 1)
    y = triton_kernels.gate(x, pool[0], "relu", 1, 1)
    gate_grads = triton_kernels.gate_backward(y, x, pool[0], "relu", 1, 1)
    return [out, weights, statistics, *grads, *pool, *pool_grads, y, *gate_grads]


class Launcher:
    """``kernel[grid](...)`` of another function of the grid."""

    def __init__(self, of_grid: Callable[[Any], Any]) -> None:
        self.of_grid = of_grid

    def __getitem__(self, grid: Any) -> Any:
        return self.of_grid(grid)


@WITHOUT_GPU
@pytest.mark.parametrize("path", PATHS)
def test_a_traced_launch_gives_the_same_bits(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As functionalisation has it: a launch works on copies, and what it changed is written back,
    one tensor after the other. So none may share memory with another."""
    take_path(path, monkeypatch)
    case = Case((2, 37, 20))
    inputs = inputs_of(case, torch.float32, torch.device("cpu"))
    expected = results_of(case, inputs)
    traced = []

    def wrap(form: Any) -> Any:
        traced.append(form.fn.__name__)

        def run_on_copies(grid: Any) -> Any:
            def run(**given: Any) -> None:
                tensors = {name: one for name, one in given.items() if isinstance(one, Tensor)}
                copies = {name: one.clone() for name, one in tensors.items()}
                form[grid](**given | copies)
                memory = [one.untyped_storage().data_ptr() for one in tensors.values()]
                for name, one in tensors.items():
                    if not torch.equal(copies[name], one):  # nor is what holds NaN
                        assert memory.count(one.untyped_storage().data_ptr()) == 1, name
                        one.copy_(copies[name])

            return run

        return Launcher(run_on_copies)

    monkeypatch.setattr(torch.library, "wrap_triton", wrap)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        with triton_kernels.tracing_launches():
            results = results_of(case, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(traced) >= 7 and all(name.endswith("_in_scalars") for name in traced)
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


@WITHOUT_GPU
@pytest.mark.parametrize("path", PATHS)
def test_empty_parts_change_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where N is a symbol, tokens may be split into more parts than there are tiles for."""
    take_path(path, monkeypatch)
    monkeypatch.setattr(attention, "SHARED_PROGRAMS", 4)
    case = Case((2, 37, 20))
    inputs = inputs_of(case, torch.float32, torch.device("cpu"))
    expected = results_of(case, inputs)
    exact = launch.split_tiles

    def with_empty_parts(tiles: int, most: int) -> tuple[int, int]:
        parts, part_tiles = exact(tiles, most)
        return parts + 3, part_tiles

    monkeypatch.setattr(attention, "split_tiles", with_empty_parts)
    for result, value in zip(results_of(case, inputs), expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-6, atol=1e-6)


def test_compiled_programs_on_disk_depend_on_the_launchers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._library.triton import get_triton_kernels_for_op

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, backend in ops._OPERATORS:
        if backend == "triton":
            (kernel,) = get_triton_kernels_for_op(f"sep_attn::{name}_triton")
            assert kernel.fn.__name__ == "fingerprint"


# On a GPU -----------------------------------------------------------------------------------------


def block(dim: int, device: torch.device) -> torch.nn.Module:
    layers = torch.nn.LayerNorm(dim), SeparableAttention(dim, backend="triton"), torch.nn.SiLU()
    return torch.nn.Sequential(*layers).to(device, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_compiled_programs_are_right_and_few(training: bool, device: torch.device) -> None:
    """Forward and backward at many N; two graphs without gradients, three with them."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    model = block(128, device).train(training)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    oracle = copy.deepcopy(model).double()
    for tokens in (300, 129, 197, 1000, 5000, 16, 100, 49):
        x = torch.randn(64, tokens, 128, device=device, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 1)
        results = []
        for function in (compiled, model, oracle):
            leaf = x.clone().to(next(function.parameters()).dtype).requires_grad_(training)
            torch._dynamo.mark_dynamic(leaf, 1)
            with torch.set_grad_enabled(training):
                out = function(leaf)
            leaves = [leaf, *function.parameters()] if training else []
            results.append([out, *(torch.autograd.grad(out.sum(), leaves) if leaves else ())])
        for result, eager, expected in zip(*results, strict=True):
            assert distance(result, expected) <= 2 * distance(eager, expected) + 1e-2
    assert counter.frame_count <= (3 if training else 2)


@pytest.mark.gpu
def test_a_compiled_program_in_a_cuda_graph(device: torch.device) -> None:
    torch._dynamo.reset()
    model = block(128, device).eval()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):  # warm-up, capture, replays
            x = torch.randn(4, 2000, 128, device=device, dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
