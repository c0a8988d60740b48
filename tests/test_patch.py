"""patch and unpatch on timm's and Hugging Face's own classes: same results, all else untouched."""

from __future__ import annotations

import copy
import functools
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from oracle import assert_as_good_as_plain, drawn_as
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from benchmarks import models
from sep_attn import patch, reference, unpatch
from sep_attn.backends import unavailable_reason

DIM = 24


@dataclass(frozen=True)
class Library:
    """What differs between the two libraries whose layers are patched."""

    name: str
    attention: Callable[..., nn.Module]
    model: Callable[[], nn.Module]
    argument: str
    dropout: str
    projection: str  # from the attention to the convolution of the input projections

    def layer(self, device: torch.device, *, dim: int = DIM, attn_drop: float = 0.0) -> nn.Module:
        return self.attention(dim, **{self.dropout: attn_drop}).to(device)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        result = model(images)
        return result if isinstance(result, Tensor) else result.logits

    def in_projection(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.projection)

    def out_projection(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.projection.replace("qkv", "out"))


TIMM = Library(
    "timm",
    models.timm_attention,
    functools.partial(models.timm_mobilevitv2, "mobilevitv2_050", num_classes=10),
    "x",
    "attn_drop",
    "qkv_proj",
)
HUGGING_FACE = Library(
    "hugging_face",
    models.hugging_face_attention,
    functools.partial(models.hugging_face_mobilevitv2, width_multiplier=0.5, num_labels=10),
    "hidden_states",
    "attn_dropout",
    "qkv_proj.convolution",
)


@pytest.fixture(params=[TIMM, HUGGING_FACE], ids=lambda library: library.name)
def library(request: pytest.FixtureRequest) -> Library:
    return request.param


def patched(layer: nn.Module, **options: str) -> nn.Module:
    """A patched copy, so that the layer itself stays as its library made it."""
    layer = copy.deepcopy(layer)
    assert patch(layer, **options) == 1
    return layer


def tokens(device: torch.device, *, dim: int = DIM, count: int = 19) -> Tensor:
    return torch.randn(2, dim, 4, count, device=device)


def results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient."""
    x.requires_grad_()
    out = layer(x)
    direction = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out)
    leaves = {"x": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(out, list(leaves.values()), direction)
    named = {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), **named}


def assert_same_layer(layer: nn.Module, original: nn.Module, x: Tensor) -> None:
    """``layer`` computes what ``original`` does, judged by ``original`` in float64."""
    oracle = results(copy.deepcopy(original).double(), x.double())
    assert_as_good_as_plain(results(layer, x), results(original, x), oracle)


def in_eq_3(layer: nn.Module, library: Library, x: Tensor, **options: object) -> Tensor:
    """The reference with the layer's weights."""
    qkv_proj, out_proj = library.in_projection(layer), library.out_projection(layer)
    return reference.separable_attention(
        x,
        qkv_proj.weight.flatten(1),
        qkv_proj.bias,
        out_proj.weight.flatten(1),
        out_proj.bias,
        **options,
    )


def call_signature(layer: nn.Module) -> list[tuple[str, object, object]]:
    parameters = inspect.signature(layer.forward).parameters.values()
    return [(each.name, each.kind, each.default) for each in parameters]


# Whole models ------------------------------------------------------------------------------------


def test_model_keeps_its_logits_and_everything_else(library: Library, device: torch.device) -> None:
    model = library.model().to(device)
    images = torch.rand(2, 3, 64, 64, device=device)
    with torch.no_grad():
        before = library.logits(model, images)
        expected = library.logits(copy.deepcopy(model).double(), images.double())
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    state = list(model.state_dict())
    attention = models.attention_layers(model)
    signatures = {name: call_signature(layer) for name, layer in attention.items()}
    calls = []
    hooked = list(attention.values())[4]
    hooked.register_forward_hook(lambda module, inputs, out: calls.append(out.shape))

    assert patch(model) == len(attention) == 9
    with torch.no_grad():
        after = library.logits(model, images)
    assert_as_good_as_plain({"out": after}, {"out": before}, {"out": expected})
    assert len(calls) == 1
    assert dict(model.named_modules()) == modules
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert list(model.state_dict()) == state
    assert models.attention_layers(model) == attention  # found by name
    for name, layer in attention.items():
        assert call_signature(layer) == signatures[name]

    assert unpatch(model) == 9
    assert all("forward" not in layer.__dict__ for layer in attention.values())
    with torch.no_grad():
        assert torch.equal(library.logits(model, images), before)


def test_attention_decides_the_logits(library: Library) -> None:
    """Else equal logits would say nothing about the attention."""
    model, images = library.model(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = library.logits(model, images)
        for layer in models.attention_layers(model).values():
            hook = layer.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out))
            changed = (library.logits(model, images) - before).abs().max() / before.abs().max()
            hook.remove()
            assert changed > 1e-2


def test_state_dict_loads_into_the_unpatched_model_and_back(library: Library) -> None:
    layer, other = library.layer(torch.device("cpu")), library.layer(torch.device("cpu"))
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = tokens(torch.device("cpu"))
    patch(layer)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x))
    nn.init.ones_(library.in_projection(layer).bias)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), other(x))


# One layer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim, positions, count", [(DIM, 4, 19), (128, 4, 256), (7, 1, 1)])
def test_values_and_gradients(
    library: Library, device: torch.device, dim: int, positions: int, count: int
) -> None:
    layer = library.layer(device, dim=dim)
    x = torch.randn(2, dim, positions, count, device=device)
    assert_same_layer(patched(layer), layer, x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_asked_backend_runs(
    library: Library, backend: str, training: bool, device: torch.device
) -> None:
    kernels = "native" if device.type == "cpu" else "triton"
    if reason := unavailable_reason(kernels, device, torch.float32):
        pytest.skip(reason)
    fused = patched(library.layer(device), backend=backend).train(training)
    x = tokens(device)
    with torch.profiler.profile() as profile, torch.no_grad():
        fused(x)
    names = {event.name for event in profile.events()}
    form = "packed" if kernels == "native" and not training else "inference"
    expected = {f"sep_attn::separable_attention_{form}_{kernels}"}
    found = {name for name in names if name.startswith("sep_attn::") or "convolution" in name}
    assert found == (expected if backend == "auto" else set())


def test_layer_without_bias(device: torch.device) -> None:
    layer = models.timm_attention(DIM, bias=False).to(device)
    assert_same_layer(patched(layer), layer, tokens(device))


def test_channels_last_input_and_weights(library: Library, device: torch.device) -> None:
    layer = library.layer(device).to(memory_format=torch.channels_last)
    x = tokens(device).to(memory_format=torch.channels_last)
    assert_same_layer(patched(layer), layer, x)


def test_keyword_argument(library: Library, device: torch.device) -> None:
    layer, x = patched(library.layer(device)), tokens(device)
    assert torch.equal(layer(**{library.argument: x}), layer(x))


def test_cross_attention_follows_eq_3(device: torch.device) -> None:
    layer, x, x_prev = TIMM.layer(device), tokens(device), tokens(device, count=11)
    expected = in_eq_3(copy.deepcopy(layer).double(), TIMM, x.double(), x_prev=x_prev.double())
    layer = patched(layer)
    torch.testing.assert_close(layer(x, x_prev).double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(layer(x, x_prev=x_prev), layer(x, x_prev))


def test_other_ranks_are_refused(library: Library, device: torch.device) -> None:
    layer = patched(library.layer(device))
    with pytest.raises(ValueError, match=r"shape \[24, 4, 24\], expected \[B, C, P, N\]"):
        layer(torch.randn(DIM, 4, DIM, device=device))


def test_attention_dropout(library: Library, device: torch.device) -> None:
    layer = library.layer(device, attn_drop=0.4)
    fused, x = patched(layer), tokens(device)
    dropout = fused.get_submodule(library.dropout)

    def matches(dropout_p: float) -> bool:
        torch.manual_seed(5)
        with drawn_as("native" if device.type == "cpu" else "triton", x.shape[2], 1):
            expected = in_eq_3(layer, library, x, dropout_p=dropout_p)
        torch.manual_seed(5)
        return torch.allclose(fused(x), expected, atol=1e-5, rtol=1e-4)

    assert matches(0.4)
    fused.eval()
    assert matches(0.0)
    dropout.train()  # dropout at inference: the child decides, as in the library's own forward
    assert matches(0.4)
    fused.train()
    dropout.p = 0.0
    assert matches(0.0)


def test_output_dropout_of_timm(device: torch.device) -> None:
    fused = patched(models.timm_attention(DIM, proj_drop=0.5).to(device))
    x = tokens(device, count=64)
    dropped, kept = fused.train()(x), fused.eval()(x)
    zeros = dropped == 0.0
    assert 0.4 < zeros.float().mean() < 0.6
    torch.testing.assert_close(dropped[~zeros], 2.0 * kept[~zeros])


def test_output_dropout_of_timm_is_called_where_it_may_do_something() -> None:
    fused, calls = patched(models.timm_attention(DIM)).eval(), []
    x = tokens(torch.device("cpu"))
    plain = fused(x)
    handle = fused.out_drop.register_forward_hook(lambda module, args, out: calls.append(out))
    assert torch.equal(fused(x), plain) and len(calls) == 1
    handle.remove()
    fused.out_drop = LowRank(DIM, DIM, 1)
    assert torch.equal(fused(x), fused.out_drop(plain))


# What users do to models -------------------------------------------------------------------------


def test_deepcopy_has_weights_of_its_own(library: Library, device: torch.device) -> None:
    layer, x = library.layer(device), tokens(device)
    patch(layer)
    before = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), torch.zeros_like(x))
    assert torch.equal(layer(x), before)
    assert unpatch(twin) == 1
    assert unpatch(layer) == 1


def test_save_and_load_of_the_patched_module(
    library: Library, device: torch.device, tmp_path: Path
) -> None:
    layer, x = library.layer(device), tokens(device)
    patch(layer)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert torch.equal(loaded(x), layer(x))
    with torch.no_grad():
        library.out_projection(loaded).bias.add_(1.0)
    torch.testing.assert_close(loaded(x), layer(x) + 1.0)
    assert unpatch(loaded) == 1


def test_a_shallow_copy_has_children_of_its_own(library: Library, device: torch.device) -> None:
    """So does what ``nn.DataParallel`` makes for each device."""
    layer, x = patched(library.layer(device)), tokens(device)
    other = patched(library.layer(device))
    nn.init.ones_(library.in_projection(other).weight)
    for twin in (copy.copy(layer), layer._replicate_for_data_parallel()):
        twin._modules = other._modules
        assert torch.equal(twin(x), other(x))
        assert not torch.equal(twin(x), layer(x))


def test_what_wraps_a_patched_forward_outlives_unpatch(
    library: Library, device: torch.device
) -> None:
    layer, x = library.layer(device), tokens(device)
    fused = patched(layer)
    inner = fused.forward
    fused.forward = lambda hidden: -inner(hidden)  # type: ignore[method-assign]
    assert patch(fused, backend="reference") == 1
    torch.testing.assert_close(fused(x), -layer(x))
    assert unpatch(fused) == 1
    assert torch.equal(fused(x), -layer(x))


def test_weights_are_read_at_call_time(library: Library, device: torch.device) -> None:
    layer = library.layer(device)
    fused = patched(layer)
    library.in_projection(fused).weight = nn.Parameter(
        torch.ones_like(library.in_projection(fused).weight)
    )
    nn.init.ones_(library.in_projection(layer).weight)
    assert_same_layer(fused, layer, tokens(device))
    double = fused.double()
    out = double(tokens(device).double())
    assert out.dtype == torch.float64


def test_frozen_weights(library: Library, device: torch.device) -> None:
    fused = patched(library.layer(device)).requires_grad_(False)
    library.out_projection(fused).bias.requires_grad_(True)
    x = tokens(device).requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None
    with_grad = [p for p in fused.parameters() if p.grad is not None]
    assert len(with_grad) == 1 and with_grad[0] is library.out_projection(fused).bias


def test_parametrized_weights(library: Library, device: torch.device) -> None:
    layer = library.layer(device)
    for parametrized in (library.in_projection(layer), library.out_projection(layer)):
        parametrizations.weight_norm(parametrized)
    fused, x = patched(layer), tokens(device)
    assert_same_layer(fused, layer, x)
    with torch.no_grad():
        for each in (fused, layer):
            library.in_projection(each).parametrizations.weight.original1.mul_(0.5)
    torch.testing.assert_close(fused(x), layer(x))


def test_activation_checkpointing(library: Library, device: torch.device) -> None:
    layer = library.layer(device, attn_drop=0.3)
    fused, x = patched(layer), tokens(device).requires_grad_()

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        return list(torch.autograd.grad(call(x).square().sum(), [x, *fused.parameters()]))

    plain = gradients(fused)
    kept = gradients(functools.partial(checkpoint, fused, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(library: Library, device: torch.device, dtype: torch.dtype) -> None:
    layer, x = library.layer(device), tokens(device)
    fused = patched(layer)
    with torch.autocast(device.type, dtype=dtype):
        result, plain = results(fused, x), results(layer, x)
    assert result["out"].dtype == dtype
    oracle = results(copy.deepcopy(layer).double(), x.double())
    assert_as_good_as_plain(result, plain, oracle)


def test_half_precision_weights(library: Library, device: torch.device) -> None:
    layer = library.layer(device).bfloat16()
    assert_same_layer(patched(layer), layer, tokens(device).bfloat16())


# The compiler ------------------------------------------------------------------------------------


def test_compiles_as_one_graph_and_once_for_every_length(
    library: Library, device: torch.device
) -> None:
    layer = library.layer(device)
    fused = patched(layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    for count in (16, 23, 64):
        x = tokens(device, count=count)
        torch._dynamo.mark_dynamic(x, 3)
        compiled_results, eager_results = results(compiled, x), results(fused, x)
        for result, expected in zip(compiled_results.values(), eager_results.values(), strict=True):
            torch.testing.assert_close(result, expected)
    assert counter.frame_count == 1
    names = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert not any("conv2d" in name for name in names)


def test_layers_that_are_compiled_one_by_one_share_a_graph(library: Library) -> None:
    counter = CompileCounterWithBackend("eager")
    layers = nn.Sequential(*[library.layer(torch.device("cpu")) for _ in range(3)])
    patch(layers)
    for layer in layers:
        layer.compile(backend=counter, fullgraph=True)
    layers(tokens(torch.device("cpu")).requires_grad_())
    assert counter.frame_count == 1


def test_unpatch_reaches_a_compiled_model(library: Library, device: torch.device) -> None:
    layer, x = patched(library.layer(device)), tokens(device)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter)
    compiled(x)
    assert unpatch(compiled) == 1
    compiled(x)
    assert counter.frame_count == 2


def test_exports_with_dynamic_tokens(library: Library, device: torch.device) -> None:
    layer = patched(library.layer(device)).eval()
    shapes = {library.argument: {3: torch.export.Dim("tokens", min=2, max=4096)}}
    exported = torch.export.export(layer, (tokens(device),), dynamic_shapes=shapes)
    assert "conv2d" not in str(exported.graph)
    x = tokens(device, count=50)
    torch.testing.assert_close(exported.module()(x), layer(x))


# What is patched, and what is left alone ---------------------------------------------------------


def test_patching_again_changes_nothing_but_the_backend(
    library: Library, device: torch.device
) -> None:
    layer = nn.Sequential(library.layer(device), library.layer(device))
    assert patch(layer[0]) == 1
    assert patch(layer) == 2
    assert patch(layer, backend="reference") == 2
    assert layer[0]._sep_attn.backend == "reference"
    assert unpatch(layer) == 2
    assert unpatch(layer) == 0
    assert "forward" not in layer[0].__dict__


def test_a_layer_used_twice_counts_once(library: Library, device: torch.device) -> None:
    layer = library.layer(device)
    assert patch(nn.ModuleList([layer, layer])) == 1


def test_a_forward_of_the_instance_comes_back(library: Library, device: torch.device) -> None:
    layer, x = library.layer(device), tokens(device)

    def own_forward(hidden: Tensor) -> Tensor:
        return -hidden

    layer.forward = own_forward
    with pytest.warns(UserWarning, match="replaces the forward set on the model"):
        patch(layer)
    patch(layer)
    assert not torch.equal(layer(x), -x)
    assert unpatch(layer) == 1
    assert layer.forward is own_forward


def test_nothing_to_patch_says_what_was_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(2, 1))
    with pytest.raises(ValueError, match=r"LinearSelfAttention.*found only.*MultiheadAttention"):
        patch(model)
    assert unpatch(model) == 0


@pytest.mark.parametrize("function", [patch, unpatch])
def test_other_objects_are_refused(function: Callable[[object], int]) -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        function([nn.Linear(2, 2)])


def test_unknown_backend_is_refused_before_anything_changes(library: Library) -> None:
    layer = library.layer(torch.device("cpu"))
    with pytest.raises(ValueError, match="backend must be one of"):
        patch(layer, backend="cuda")
    assert unpatch(layer) == 0


def test_a_subclass_that_redefines_forward_is_left_alone(
    library: Library, device: torch.device
) -> None:
    layer, x = library.layer(device), tokens(device)

    class Doubled(type(layer)):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    other = copy.deepcopy(layer)
    other.__class__ = Doubled
    with pytest.raises(ValueError, match=r"cannot serve the model \(Doubled\).*redefines forward"):
        patch(other)
    with pytest.warns(UserWarning, match=r"leaves alone 1 \(Doubled\)"):
        assert patch(nn.ModuleList([layer, other])) == 1
    torch.testing.assert_close(other(x), 2.0 * layer(x))


def test_a_subclass_that_changes_a_step_of_timms_forward_is_left_alone() -> None:
    layer = TIMM.layer(torch.device("cpu"))

    class Negated(type(layer)):
        def _forward_self_attn(self, x: Tensor) -> Tensor:
            return -super()._forward_self_attn(x)

    layer.__class__ = Negated
    with pytest.raises(ValueError, match="redefines _forward_self_attn"):
        patch(layer)


def test_a_subclass_that_keeps_forward_is_served(library: Library, device: torch.device) -> None:
    layer = library.layer(device)

    class Named(type(layer)):
        title = "attention"

        def forward_shape(self) -> tuple[int, ...]:
            return (1,)

    fused = copy.deepcopy(layer)
    fused.__class__ = Named
    assert patch(fused) == 1
    assert_same_layer(fused, layer, tokens(device))


class LowRank(nn.Conv2d):
    """A convolution that does more than its weight says, as adapters do."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def replace(layer: nn.Module, path: str, child: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, child)


def add_hook(layer: nn.Module, library: Library) -> None:
    library.in_projection(layer).register_forward_hook(lambda module, inputs, out: 2.0 * out)


def add_pre_hook(layer: nn.Module, library: Library) -> None:
    library.out_projection(layer).register_forward_pre_hook(lambda module, inputs: None)


def add_backward_hook(layer: nn.Module, library: Library) -> None:
    library.out_projection(layer).register_full_backward_hook(lambda module, grads, outs: None)


def add_backward_pre_hook(layer: nn.Module, library: Library) -> None:
    library.in_projection(layer).register_full_backward_pre_hook(lambda module, grads: None)


def set_child_forward(layer: nn.Module, library: Library) -> None:
    child = library.in_projection(layer)
    child.forward = lambda x: 2.0 * nn.Conv2d.forward(child, x)


def use_low_rank(layer: nn.Module, library: Library) -> None:
    child = LowRank(DIM, 1 + 2 * DIM, 1)
    child.load_state_dict(library.in_projection(layer).state_dict())
    replace(layer, library.projection, child)


def use_padding(layer: nn.Module, library: Library) -> None:
    replace(layer, library.projection, nn.Conv2d(DIM, 1 + 2 * DIM, 3, padding=1))


def use_other_dropout(layer: nn.Module, library: Library) -> None:
    replace(layer, library.dropout, nn.Dropout2d(0.5))


def drop_everything(layer: nn.Module, library: Library) -> None:
    layer.get_submodule(library.dropout).p = 1.0


CHANGES = {
    add_hook: "has hooks",
    add_pre_hook: "has hooks",
    add_backward_hook: "has hooks",
    add_backward_pre_hook: "has hooks",
    set_child_forward: "forward of its own",
    use_low_rank: "LowRank",
    use_padding: "no plain 1 x 1 convolution",
    use_other_dropout: "Dropout2d",
    drop_everything: "drops everything",
}
EACH_CHANGE = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


@EACH_CHANGE
def test_changed_children_are_left_alone(
    library: Library, change: Callable[[nn.Module, Library], None]
) -> None:
    layer = library.layer(torch.device("cpu"))
    change(layer, library)
    with pytest.raises(ValueError, match=CHANGES[change]):
        patch(layer)


@EACH_CHANGE
def test_children_changed_later_bring_the_own_forward_back(
    library: Library, change: Callable[[nn.Module, Library], None], device: torch.device
) -> None:
    fused, x = patched(library.layer(device)), tokens(device)
    change(fused, library)
    fused.to(device)
    torch.manual_seed(4)
    with pytest.warns(UserWarning, match=f"{CHANGES[change]}.*; its own forward runs"):
        result = fused(x)
    unpatch(fused)
    torch.manual_seed(4)
    assert torch.equal(result, fused(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(x)


def test_a_named_backend_refuses_children_changed_later(
    library: Library, device: torch.device
) -> None:
    fused = patched(library.layer(device), backend="reference")
    add_hook(fused, library)
    with pytest.raises(RuntimeError, match=r'has hooks.*patch with backend="auto"'):
        fused(tokens(device))


def test_a_missing_child_is_named() -> None:
    layer = TIMM.layer(torch.device("cpu"))
    del layer.out_proj
    with pytest.raises(ValueError, match="it has no child out_proj"):
        patch(layer)


def test_a_normalisation_after_the_projection_is_noticed() -> None:
    layer = HUGGING_FACE.layer(torch.device("cpu"))
    layer.out_proj.normalization = nn.BatchNorm2d(DIM)
    with pytest.raises(ValueError, match="out_proj does more than a convolution"):
        patch(layer)


def test_neither_library_is_imported() -> None:
    program = (
        "import sys, torch, sep_attn\n"
        "try: sep_attn.patch(torch.nn.Linear(1, 1))\n"
        "except ValueError: pass\n"
        "assert not {'timm', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
