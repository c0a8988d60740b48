"""The module: state dicts of other libraries, dropout, and the services PyTorch gives a module."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import drawn_as
from test_layer import backend_or_skip, device_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from sep_attn import SeparableAttention, functional, reference

DIM = 16
BACKENDS = ["native", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    backend_or_skip(request.param, device_of(request.param, device), torch.float32)
    return request.param


def build(backend: str, device: torch.device, **options: object) -> SeparableAttention:
    return SeparableAttention(DIM, backend=backend, device=device_of(backend, device), **options)


def tokens(backend: str, device: torch.device, count: int = 20) -> Tensor:
    return torch.randn(2, count, DIM, device=device_of(backend, device))


def test_constructor_is_timms() -> None:
    layer = SeparableAttention(DIM, 0.1, 0.2, False)
    assert (layer.attn_drop.p, layer.proj_drop.p) == (0.1, 0.2)
    assert layer.qkv_proj.bias is None and layer.out_proj.bias is None
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "qkv_proj.weight": (1 + 2 * DIM, DIM),
        "out_proj.weight": (DIM, DIM),
    }
    assert "embed_dim=16" in repr(SeparableAttention(DIM, patch_size=2))


@pytest.mark.parametrize("infix", [".", ".block.conv.", ".convolution."])
@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("prefix", ["", "0.attention."])
def test_loads_the_state_dicts_of_others(infix: str, convolution: bool, prefix: str) -> None:
    source = SeparableAttention(DIM)
    foreign = {}
    for name, value in source.state_dict().items():
        projection, kind = name.split(".")
        shaped = value[..., None, None] if convolution and kind == "weight" else value
        foreign[f"{prefix}{projection}{infix}{kind}"] = shaped.clone()
    layer = SeparableAttention(DIM)
    target: nn.Module = layer
    if prefix:
        target = nn.Sequential(nn.ModuleDict({"attention": layer}))
    given = set(foreign)
    target.load_state_dict(foreign)
    assert set(foreign) == given
    for name, value in source.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    state = SeparableAttention(DIM).state_dict()
    state["qkv_proj.block.conv.weight"] = state["qkv_proj.weight"]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        SeparableAttention(DIM).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        SeparableAttention(DIM).load_state_dict(SeparableAttention(DIM + 1).state_dict())


def test_dropout_is_for_training_only(backend: str, device: torch.device) -> None:
    layer = build(backend, device, attn_drop=0.5, proj_drop=0.5)
    x = tokens(backend, device)
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), atol=0, rtol=0)
    layer.train()
    torch.manual_seed(1)
    first, weights = layer(x, need_weights=True)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, layer(x))
    assert 0.3 < (first == 0).float().mean() < 0.7
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, device=x.device))


def test_attention_dropout_follows_the_reference(backend: str, device: torch.device) -> None:
    layer = build(backend, device, attn_drop=0.4)
    x = tokens(backend, device)
    torch.manual_seed(1)
    result = layer(x)
    torch.manual_seed(1)
    with drawn_as(backend):
        expected = reference.separable_attention(
            x,
            layer.qkv_proj.weight,
            layer.qkv_proj.bias,
            layer.out_proj.weight,
            layer.out_proj.bias,
            dropout_p=0.4,
        )
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_deepcopy_and_pickle(backend: str, device: torch.device, tmp_path: Path) -> None:
    layer = build(backend, device, patch_size=2).eval()
    x = torch.randn(2, DIM, 6, 4, device=device_of(backend, device))
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    torch.save(layer, tmp_path / "layer.pt")
    copies.append(torch.load(tmp_path / "layer.pt", weights_only=False))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    copies.append(build(backend, device, patch_size=2))
    copies[-1].load_state_dict(torch.load(buffer))
    for other in copies:
        torch.testing.assert_close(other.eval()(x), layer(x), atol=0, rtol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend: str, use_reentrant: bool, device: torch.device) -> None:
    layer = build(backend, device, attn_drop=0.3, proj_drop=0.3)
    x = tokens(backend, device).requires_grad_()
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        out = checkpoint(layer, x, use_reentrant=use_reentrant) if checkpointed else layer(x)
        x.grad = None
        out.square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


def test_frozen_parameters_and_inputs(backend: str, device: torch.device) -> None:
    layer = build(backend, device)
    x = tokens(backend, device)
    layer(x).sum().backward()
    expected = {name: value.grad.clone() for name, value in layer.named_parameters()}
    layer.zero_grad()
    layer.qkv_proj.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.qkv_proj.weight.grad is None
    torch.testing.assert_close(layer.out_proj.weight.grad, expected["out_proj.weight"])
    layer.zero_grad()
    layer.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None and all(value.grad is None for value in layer.parameters())
    assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).is_inference()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend_name", [*BACKENDS, "reference"])
def test_autocast(backend_name: str, dtype: torch.dtype, device: torch.device) -> None:
    place = device_of(backend_name, device)
    backend_or_skip(backend_name, place, dtype)
    layer = build(backend_name, device)
    x = tokens(backend_name, device, 50).requires_grad_()
    expected = layer(x)
    with torch.autocast(place.type, dtype):
        out, weights = layer(x, need_weights=True)
        half = layer(x.to(dtype))
    assert out.dtype == weights.dtype == half.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
    out.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert layer.qkv_proj.weight.grad.dtype == torch.float32
    double = copy.deepcopy(layer).double()
    with torch.autocast(place.type, dtype):
        assert double(x.detach().double()).dtype == torch.float64


def test_half_statistics_are_float32(backend: str, device: torch.device) -> None:
    """65,536 tokens of weight 1 / N: their float16 sum would be far from 1."""
    place = device_of(backend, device)
    count = 65_536 if backend == "native" or place.type == "cuda" else 4096
    x = torch.ones(1, count, 4, device=place, dtype=torch.float16)
    pooled = functional.context_pool(x, torch.zeros_like(x[..., 0]), backend=backend)
    torch.testing.assert_close(pooled, torch.ones_like(pooled), atol=1e-3, rtol=0)


def test_compiles_as_one_graph(backend: str, device: torch.device) -> None:
    layer = build(backend, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = tokens(backend, device)
    mask = torch.rand(2, 20, device=x.device) < 0.3
    gradients = []
    for module in (layer, compiled):
        leaf = x.clone().requires_grad_()
        out, weights = module(leaf, key_padding_mask=mask, need_weights=True)
        loss = out.square().sum() + weights.square().sum()
        gradients.append(torch.autograd.grad(loss, [leaf, *layer.parameters()]))
    for expected, result in zip(*gradients, strict=True):
        torch.testing.assert_close(result, expected)


def test_compiles_with_inductor() -> None:
    backend_or_skip("native", torch.device("cpu"), torch.float32)
    layer = SeparableAttention(DIM, attn_drop=0.2, patch_size=2).train()

    @torch.compile(fullgraph=True)
    def step(x: Tensor) -> Tensor:
        return layer(torch.relu(x) + 1.0) * 2.0

    x = torch.randn(2, DIM, 6, 8, requires_grad=True)
    out = step(x)
    out.square().sum().backward()
    assert out.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    layer.eval()
    expected = layer(torch.relu(x) + 1.0) * 2.0
    torch.testing.assert_close(step(x), expected)


@pytest.mark.parametrize("training", [False, True])
def test_does_not_recompile_for_each_number_of_tokens(
    training: bool, backend: str, device: torch.device
) -> None:
    layer = build(backend, device)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for count in (20, 33, 48, 64, 75):
        x = tokens(backend, device, count).requires_grad_(training)
        with torch.set_grad_enabled(training):
            result = compiled(x)
        torch.testing.assert_close(result, layer(x))
    assert counter.frame_count <= 2  # one for the first N, one for every other


@pytest.mark.parametrize("layout", ["tokens", "groups", "pixels"])
def test_exports_with_dynamic_tokens(
    layout: str, backend: str, device: torch.device, tmp_path: Path
) -> None:
    layer = build(backend, device, patch_size=(2, 2) if layout == "pixels" else None).eval()
    place = device_of(backend, device)
    count = torch.export.Dim("count", min=2, max=4096)
    half = torch.export.Dim("half", min=2, max=64)
    x, dynamic, other = {
        "tokens": (torch.randn(2, 20, DIM), {1: count}, torch.randn(2, 33, DIM)),
        "groups": (torch.randn(2, DIM, 4, 20), {3: count}, torch.randn(2, DIM, 4, 33)),
        "pixels": (
            torch.randn(2, DIM, 8, 12),
            {2: 2 * half, 3: torch.export.Dim.AUTO},
            torch.randn(2, DIM, 10, 6),
        ),
    }[layout]
    x, other = x.to(place), other.to(place)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": dynamic}, strict=False)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for value in (x, other):
        torch.testing.assert_close(loaded(value), layer(value))


def test_channels_may_be_numpys() -> None:
    layer = SeparableAttention(np.int64(DIM))
    assert type(layer.embed_dim) is int and layer(torch.randn(1, 2, DIM)).shape == (1, 2, DIM)


def test_meta_tensors_have_the_right_shape() -> None:
    layer = SeparableAttention(DIM, device="meta")
    out, weights = layer(torch.empty(2, 20, DIM, device="meta"), need_weights=True)
    assert out.shape == (2, 20, DIM) and weights.shape == (2, 20)


def test_module_to_dtype_and_back(backend: str, device: torch.device) -> None:
    layer = build(backend, device).eval()
    x = tokens(backend, device)
    expected = layer(x)
    assert layer.double()(x.double()).dtype == torch.float64
    torch.testing.assert_close(layer.float()(x), expected)


# Children that do more than their parameters say --------------------------------------------------


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class LowRank(nn.Module):
    """A projection and a trained difference, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def doubled(layer: SeparableAttention) -> None:
    plain = layer.out_proj
    layer.out_proj = Doubling(8, 8)
    layer.out_proj.load_state_dict(plain.state_dict())


def hooked(layer: SeparableAttention) -> None:
    layer.out_proj.register_forward_hook(lambda *arguments: 2 * arguments[2])


def rebound(layer: SeparableAttention) -> None:
    own = layer.out_proj.forward
    layer.out_proj.forward = lambda x: 2 * own(x)  # type: ignore[method-assign]


class TwiceWhatItHolds(Tensor):
    """A weight whose values only its class knows, as a quantised one's."""

    @staticmethod
    def __new__(cls, held: Tensor) -> TwiceWhatItHolds:
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> TwiceWhatItHolds:
        return TwiceWhatItHolds(inner["held"])

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "sep_attn":
            raise NotImplementedError(f"{function} of {cls.__name__}")
        if function is torch.ops.aten.detach.default:
            return cls(args[0].held)
        return function(*[2 * each.held if isinstance(each, cls) else each for each in args])


def subclassed(layer: SeparableAttention) -> None:
    for name, value in (("weight", TwiceWhatItHolds), ("bias", lambda bias: 2 * bias)):
        held = getattr(layer.out_proj, name).detach()
        setattr(layer.out_proj, name, nn.Parameter(value(held), requires_grad=False))


def sparse(layer: SeparableAttention) -> None:
    for name, value in (("weight", Tensor.to_sparse_csr), ("bias", Tensor.clone)):
        held = getattr(layer.out_proj, name).detach()
        setattr(layer.out_proj, name, nn.Parameter(value(2 * held), requires_grad=False))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("change", [doubled, hooked, rebound, subclassed, sparse])
@pytest.mark.parametrize("training", [True, False])
def test_a_projection_that_was_changed_is_called(change: Any, training: bool) -> None:
    layer, x = SeparableAttention(8).train(training), torch.randn(2, 5, 8)
    expected = 2 * layer(x)
    change(layer)
    with pytest.warns(UserWarning, match="out_proj .*in plain PyTorch") as warned:
        torch.testing.assert_close(layer(x), expected)
    assert Path(warned[0].filename) == Path(__file__)
    layer.backend = "reference"
    torch.testing.assert_close(layer(x), expected)
    layer.backend = "native"
    with pytest.raises(RuntimeError, match=r'out_proj .*backend="auto"'):
        layer(x)


@pytest.mark.filterwarnings("ignore:sep_attn's kernels cannot serve")
def test_differences_of_low_rank_are_trained() -> None:
    layer, x = SeparableAttention(8), torch.randn(2, 8, 3, 5)
    layer.qkv_proj = LowRank(layer.qkv_proj)  # type: ignore[assignment]
    mask = torch.zeros(2, 3, 5, dtype=torch.bool)
    mask[0, 1, 2:] = True
    layer(x, x.roll(1, 0), key_padding_mask=mask).square().sum().backward()
    with torch.no_grad():
        proj = layer.qkv_proj
        merged = SeparableAttention(8)
        merged.load_state_dict(
            {
                "qkv_proj.weight": proj.base.weight + proj.up.weight @ proj.down.weight,
                "qkv_proj.bias": proj.base.bias,
                **{f"out_proj.{key}": value for key, value in layer.out_proj.state_dict().items()},
            }
        )
        for arguments in ({}, {"key_padding_mask": mask}, {"x_prev": x.roll(1, 0)}):
            own, weights = layer(x, **arguments, need_weights=True)
            expected = merged(x, **arguments, need_weights=True)
            torch.testing.assert_close((own, weights), expected)
    for adapter in (layer.qkv_proj.down, layer.qkv_proj.up):
        assert adapter.weight.grad is not None and bool(adapter.weight.grad.any())


@pytest.mark.filterwarnings("ignore:sep_attn's kernels cannot serve")
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
def test_projections_can_be_quantised() -> None:
    model, x = nn.Sequential(SeparableAttention(32)).eval(), torch.randn(2, 5, 32)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    torch.testing.assert_close(quantised(x), model(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("place", ["attn_drop", "proj_drop"])
def test_dropout_follows_its_own_module(place: str) -> None:
    """As in timm: Monte Carlo dropout wakes the dropouts of a model in eval."""
    layer, x = SeparableAttention(8, **{place: 0.5}).eval(), torch.randn(2, 40, 8)
    still = layer(x)
    getattr(layer, place).train()
    assert not torch.equal(layer(x), layer(x))
    layer.train()
    getattr(layer, place).eval()
    torch.testing.assert_close(layer(x), still)


@pytest.mark.filterwarnings("ignore:sep_attn's kernels cannot serve")
@pytest.mark.parametrize("place", ["attn_drop", "proj_drop"])
def test_dropout_can_be_taken_out(place: str) -> None:
    layer, x = SeparableAttention(8, **{place: 0.5}), torch.randn(2, 40, 8)
    setattr(layer, place, nn.Identity())
    torch.testing.assert_close(layer(x), layer.eval()(x))


def test_a_choice_made_after_construction_is_checked() -> None:
    layer, x = SeparableAttention(8).eval(), torch.randn(2, 8, 4, 6)
    layer.value_act = "silu"
    with torch.no_grad(), pytest.raises(ValueError, match="value_act must be one of"):
        layer(x)
    layer.value_act, layer.patch_size = "relu", 2  # type: ignore[assignment]
    with torch.no_grad():
        square = SeparableAttention(8, patch_size=2)
        square.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), square.eval()(x))
