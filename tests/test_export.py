"""Exported programs: standard operators alone, the pooled form, no need of this package to run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Case, check_layer, inputs_of, make_mask
from test_layer import OPTIONS
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import sep_attn
from sep_attn import SeparableAttention, backends, functional, native, ops, reference
from sep_attn.layout import VALUES_HEADER, VALUES_WIDTH, num_channels, token_shape

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
DIM = 16

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason="the C++ kernels are not built"
)


# The pooled form ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_the_pooled_form_is_the_layer(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "resolve", lambda *_: "pooled")
    check_layer(functional.separable_attention, case, dtype, CPU, backend="native")


def kept_rows(kept: Tensor, x: Tensor) -> Tensor:
    """Values as the layer keeps them for the backward pass, as rows of channels ``[tokens, D]``."""
    header, values = kept[:VALUES_HEADER], kept[VALUES_HEADER:]
    if kept.numel() > 0 and header[0] == 1:
        values = values.view(-1, num_channels(x), VALUES_WIDTH).transpose(1, 2)
    return values.reshape(-1, num_channels(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_decompositions_give_what_their_operators_give(case: Case, dtype: torch.dtype) -> None:
    """Values, shapes, dtypes and strides of every result."""
    inputs = inputs_of(case, dtype, CPU)
    x, source = inputs["x"], inputs.get("x_prev", inputs["x"])
    patch_h, patch_w = case.patch_size or ((1, 1) if x.dim() == 3 else (x.shape[2], 1))
    mask = None if case.mask is None else make_mask(case.mask, token_shape(source), CPU)
    scale = reference.dropout_scale(source, case.dropout_p) if case.dropout_p else None
    layer = (
        x,
        inputs.get("x_prev"),
        inputs["qkv_weight"],
        inputs.get("qkv_bias"),
        inputs["out_weight"],
        inputs.get("out_bias"),
        mask,
        scale,
        case.value_act,
        patch_h,
        patch_w,
    )
    scores = torch.randn(token_shape(source))
    context = torch.randn(x.shape[0] * patch_h * patch_w, case.dim)
    calls = {
        "separable_attention": (*layer, True),
        "separable_attention_inference": layer,
        "context_pool": (source, scores, mask, scale, patch_h, patch_w),
        "gate": (x, context, case.value_act, patch_h, patch_w),
    }
    for name, arguments in calls.items():
        operator = getattr(torch.ops.sep_attn, f"{name}_native").default
        expected, results = operator(*arguments), sep_attn.decompositions()[operator](*arguments)
        if isinstance(expected, Tensor):
            expected, results = [expected], [results]
        elif name == "separable_attention":
            assert results[3].shape == expected[3].shape
            *expected, kept = expected
            *results, other_kept = results
            expected, results = (
                [*expected, kept_rows(kept, x)],
                [*results, kept_rows(other_kept, x)],
            )
        tolerance = 1e-2 if dtype == torch.float16 else 1e-5
        for one, other in zip(results, expected, strict=True):
            torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
        assert results[0].stride() == expected[0].stride()


def test_every_forward_operator_has_a_decomposition() -> None:
    defined = {
        getattr(torch.ops.sep_attn, name).default
        for name in dir(torch.ops.sep_attn)
        if name.endswith(("_native", "_triton")) and "_backward_" not in name
    }
    table = sep_attn.decompositions()
    assert defined == set(table)
    table.clear()
    assert sep_attn.decompositions() == ops.DECOMPOSITIONS


# Exported programs -------------------------------------------------------------------------------

BATCH, COUNT = Dim("batch", min=1, max=64), Dim("count", min=1, max=4096)
ROWS, COLUMNS = (2 * Dim(name, min=1, max=64) for name in ("rows", "columns"))
# layout -> (patch_size, shape at export, dynamic axes, another shape)
LAYOUTS: dict[str, tuple[Any, ...]] = {
    "tokens": (None, (2, 20, DIM), {0: BATCH, 1: COUNT}, (1, 33, DIM)),
    "groups": (None, (2, DIM, 4, 20), {0: BATCH, 3: COUNT}, (3, DIM, 4, 7)),
    "pixels": (2, (2, DIM, 8, 12), {0: BATCH, 2: ROWS, 3: COLUMNS}, (1, DIM, 2, 6)),
}
VARIANTS = [("tokens", False), ("groups", False), ("pixels", False), ("pixels", True)]
layouts = pytest.mark.parametrize("layout", LAYOUTS)


class Masked(nn.Module):
    """A call with every input and both results."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, x_prev: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x, x_prev, key_padding_mask=mask, need_weights=True)


def build(layout: str, *, masked: bool, **options: Any) -> nn.Module:
    layer = SeparableAttention(DIM, patch_size=LAYOUTS[layout][0], **options).eval()
    return Masked(layer) if masked else layer


def arguments_of(shape: tuple[int, ...], *, masked: bool) -> tuple[Tensor, ...]:
    x = torch.randn(shape)
    if not masked:
        return (x,)
    mask = torch.rand(token_shape(x)) < 0.4
    mask[0] = True  # an image with nothing left
    return x, torch.randn(shape), mask


def dynamic_shapes(layout: str, *, masked: bool) -> dict[str, Any]:
    axes = LAYOUTS[layout][2]
    if not masked:
        return {"x": axes}
    last = len(LAYOUTS[layout][1]) - 1
    tokens = axes if last == 2 else {max(axis - 1, 0): size for axis, size in axes.items()}
    return {"x": axes, "x_prev": axes, "mask": tokens}


def export(layout: str, *, masked: bool = False) -> tuple[nn.Module, torch.export.ExportedProgram]:
    model = build(layout, masked=masked)
    arguments = arguments_of(LAYOUTS[layout][1], masked=masked)
    shapes = dynamic_shapes(layout, masked=masked)
    program = torch.export.export(model, arguments, dynamic_shapes=shapes)
    return model, program.run_decompositions(sep_attn.decompositions())


def operators_of(program: torch.export.ExportedProgram) -> set[str]:
    return {
        node.target.namespace
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }


def run_without_sep_attn(code: str, *arguments: object) -> None:
    """Runs a program in a process that cannot import this package."""
    code = f"import sys; sys.modules['sep_attn'] = None\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr


def test_decomposed_programs_run_without_this_package(tmp_path: Path) -> None:
    for layout, masked in VARIANTS:
        _, shape, _, other = LAYOUTS[layout]
        model, program = export(layout, masked=masked)
        assert operators_of(program) == {"aten"}
        torch.export.save(program, tmp_path / f"{layout}-{masked}.pt2")
        calls = [arguments_of(size, masked=masked) for size in (shape, other)]
        with torch.no_grad():
            torch.save([(c, model(*c)) for c in calls], tmp_path / f"{layout}-{masked}.pt")
    code = """
import pathlib, torch
saved = sorted(pathlib.Path(sys.argv[1]).glob("*.pt2"))
assert len(saved) == int(sys.argv[2])
for path in saved:
    module = torch.export.load(path).module()
    for arguments, expected in torch.load(path.with_suffix(".pt")):
        torch.testing.assert_close(module(*arguments), expected)
"""
    run_without_sep_attn(code, tmp_path, len(VARIANTS))


def test_a_view_of_the_result_survives_decomposition() -> None:
    """The exported program holds a view that fits the operator's strides alone."""

    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SeparableAttention(DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(1, 2)).transpose(1, 2).view(2, -1)

    model, x = Viewed().eval(), torch.randn(2, DIM, 20)
    program = torch.export.export(model, (x,)).run_decompositions(sep_attn.decompositions())
    torch.testing.assert_close(program.module()(x), model(x))


@layouts
def test_the_exported_form_is_the_pooled_form(layout: str) -> None:
    """4 N D^2 operations a slice, and 2 D^2 for the context; the literal equation has 6 N D^2."""
    _, program = export(layout)
    shape = LAYOUTS[layout][1]
    with FlopCounterMode(display=False) as counter:
        program.module()(torch.randn(shape))
    tokens = torch.Size(shape).numel() // DIM
    slices = {"tokens": 2, "groups": 2 * 4, "pixels": 2 * 4}[layout]
    scores = 2 * tokens * DIM
    pooling = 2 * tokens * DIM if layout == "tokens" else 0  # elsewhere no matrix product
    expected = 4 * tokens * DIM**2 + 2 * slices * DIM**2 + scores + pooling
    assert counter.get_total_flops() == expected


def test_an_undecomposed_program_keeps_the_kernels() -> None:
    model = build("tokens", masked=False)
    program = torch.export.export(model, (torch.randn(2, 20, DIM),))
    assert operators_of(program) == {"sep_attn"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trace", ["export", "make_fx"])
def test_a_program_traced_without_gradients_has_them(trace: str, training: bool) -> None:
    layer, x = SeparableAttention(DIM).train(training), torch.randn(2, 20, DIM)
    with torch.no_grad():
        layer(x)  # in eval it now keeps its weights packed
        if trace == "export":
            program = torch.export.export(layer, (x,)).module()
        else:
            program = make_fx(layer)(x)
    x.requires_grad_()
    (found,) = torch.autograd.grad(program(x).pow(2).sum(), x)
    (expected,) = torch.autograd.grad(layer(x).pow(2).sum(), x)
    torch.testing.assert_close(found, expected)


# ONNX --------------------------------------------------------------------------------------------

OPSET = 20  # what torch.onnx.export writes unless it is told otherwise


def to_onnx(model: Any, arguments: tuple[Tensor, ...] = (), **options: Any) -> Any:
    pytest.importorskip("onnxscript")
    return torch.onnx.export(model, arguments, dynamo=True, verbose=False, **options).model_proto


def run_onnx(proto: Any, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, arguments, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feed)]


def assert_standard(proto: Any) -> None:
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", OPSET)]
    assert {node.domain for node in proto.graph.node} == {""} and not proto.functions


def assert_same_results(proto: Any, model: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        expected = model(*arguments)
    expected = list(expected) if isinstance(expected, tuple) else [expected]
    torch.testing.assert_close(run_onnx(proto, arguments), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout, masked", [("tokens", False), ("pixels", False), ("pixels", True)])
def test_onnx(layout: str, masked: bool) -> None:
    _, shape, _, other = LAYOUTS[layout]
    model = build(layout, masked=masked, backend="native" if masked else "auto")
    shapes = dynamic_shapes(layout, masked=masked)
    proto = to_onnx(model, arguments_of(shape, masked=masked), dynamic_shapes=shapes)
    assert_standard(proto)
    for size in (shape, other):
        assert_same_results(proto, model, arguments_of(size, masked=masked))


def test_onnx_of_a_decomposed_program() -> None:
    model, program = export("groups")
    proto = to_onnx(program)
    assert_standard(proto)
    assert_same_results(proto, model, arguments_of((1, DIM, 4, 9), masked=False))


def test_onnx_of_the_functions() -> None:
    class Pool(nn.Module):
        def forward(self, x: Tensor, scores: Tensor) -> Tensor:
            return functional.gate(x, functional.context_pool(x, scores), act="identity")

    arguments = torch.randn(2, 20, DIM), torch.randn(2, 20)
    proto = to_onnx(Pool(), arguments)
    assert_standard(proto)
    assert_same_results(proto, Pool(), arguments)


def test_the_reference_stays_literal_in_an_onnx_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for backend in ("auto", "native", "triton"):
        assert backends.resolve(backend, CPU, torch.float32) == "pooled"
    assert backends.resolve("reference", CPU, torch.float32) == "reference"


def test_onnx_of_a_patched_model() -> None:
    models = pytest.importorskip("benchmarks.models", reason="only in the repository")
    model = models.timm_mobilevitv2("mobilevitv2_050", num_classes=10)
    x = torch.rand(2, 3, 256, 256)
    with torch.no_grad():
        before = model(x[:1])
    assert sep_attn.patch(model) == 9
    proto = to_onnx(model, (x,), dynamic_shapes=({0: BATCH},))
    assert_standard(proto)
    (logits,) = run_onnx(proto, (x[:1],))
    torch.testing.assert_close(logits, before, atol=1e-5, rtol=1e-4)
    assert logits.std() > 1e-3


def test_onnx_of_a_converted_vit() -> None:
    models = pytest.importorskip("benchmarks.models", reason="only in the repository")
    model = (
        models.import_timm().create_model("vit_tiny_patch16_224", depth=2, num_classes=10).eval()
    )
    assert sep_attn.convert(model) == 2
    x = torch.rand(2, 3, 224, 224)
    proto = to_onnx(model, (x,), dynamic_shapes=({0: BATCH},))
    assert_standard(proto)
    assert_same_results(proto, model, (x[:1],))


# AOTInductor and ExecuTorch ----------------------------------------------------------------------


def test_aot_inductor_package_runs_without_this_package(tmp_path: Path) -> None:
    model, program = export("tokens")
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "layer.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # compiles sooner
    )
    x = torch.randn(1, 33, DIM)
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "call.pt")
    code = """
import torch
layer = torch._inductor.aoti_load_package(sys.argv[1])
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(layer(x), expected)
"""
    run_without_sep_attn(code, package, tmp_path / "call.pt")


@layouts
def test_executorch(layout: str) -> None:
    """The steps of README, with XNNPACK: every projection reaches it."""
    pytest.importorskip("executorch", reason="pip install executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass
    from executorch.runtime import Runtime

    model, program = export(layout)
    program = constant_prop_pass(program)
    for name, value in program.constants.items():
        program.constants[name] = value.detach().clone()
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    lowered = edge.to_executorch()
    left = {str(node.target) for node in lowered.exported_program().graph.nodes}
    assert not any(name in target for target in left for name in ("conv", "mm", "linear"))
    method = Runtime.get().load_program(lowered.buffer).load_method("forward")
    for shape in (LAYOUTS[layout][1], (1, *LAYOUTS[layout][1][1:])):
        x = torch.randn(shape)
        (out,) = method.execute([x])
        torch.testing.assert_close(out, model(x), check_stride=False)
