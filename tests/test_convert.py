"""convert on the libraries' own classes: what it makes, what it keeps, what it refuses."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import models
from sep_attn import SeparableAttention, SeparableMultiheadAttention, convert, reference
from sep_attn.backends import unavailable_reason
from sep_attn.initialization import FROM_MHA, INITS, STARTS

timm = models.import_timm()  # imports torchvision the way that works with any torch
import torchvision  # noqa: E402
import transformers  # noqa: E402

DIM, HEADS = 32, 4


# The models --------------------------------------------------------------------------------------


def timm_vit(**options: Any) -> nn.Module:
    name = options.pop("name", "vit_tiny_patch16_224")
    shape = dict(img_size=32, patch_size=8, depth=2, embed_dim=DIM, num_heads=HEADS, num_classes=5)
    return timm.create_model(name, **{**shape, **options})


def hugging_face(kind: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=2 * DIM,
        image_size=32,
        patch_size=8,
        **options,
    )
    return getattr(transformers, f"{kind}Model")(config)


def hugging_face_mobilevit() -> nn.Module:
    sizes = {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [16, 16, 24, 24, 32, 32, 80]}
    return transformers.MobileViTModel(transformers.MobileViTConfig(image_size=32, **sizes))


def torch_encoder(layers: int = 2, **options: Any) -> nn.Module:
    block = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, **{"batch_first": True, **options})
    return nn.TransformerEncoder(block, layers)


def images(size: int = 32) -> Tensor:
    return torch.rand(2, 3, size, size)


@dataclass(frozen=True)
class Model:
    """A model as its library makes it, and what convert is to find there."""

    build: Callable[[], nn.Module]
    layers: tuple[str, ...]  # the first two
    count: int
    old_class: str
    inputs: Callable[[], Tensor] = images


MODELS = {
    "timm_vit": Model(timm_vit, ("blocks.0.attn", "blocks.1.attn"), 2, "Attention"),
    "timm_vit_qk_norm": Model(
        functools.partial(timm_vit, qk_norm=True, qkv_bias=False, global_pool="avg"),
        ("blocks.0.attn", "blocks.1.attn"),
        2,
        "Attention",
    ),
    "timm_deit": Model(
        functools.partial(timm_vit, name="deit_tiny_distilled_patch16_224"),
        ("blocks.0.attn", "blocks.1.attn"),
        2,
        "Attention",
    ),
    "timm_mobilevit": Model(
        functools.partial(timm.create_model, "mobilevit_xxs", num_classes=5),
        ("stages.2.1.transformer.0.attn", "stages.2.1.transformer.1.attn"),
        9,
        "Attention",
    ),
    "hugging_face_vit": Model(
        functools.partial(hugging_face, "ViT"),
        ("layers.0.attention", "layers.1.attention"),
        2,
        "ViTAttention",
    ),
    "hugging_face_deit": Model(
        functools.partial(hugging_face, "DeiT", qkv_bias=False),
        ("layers.0.attention", "layers.1.attention"),
        2,
        "DeiTAttention",
    ),
    "hugging_face_mobilevit": Model(
        hugging_face_mobilevit,
        ("encoder.layer.2.transformer.layer.0.attention",) * 2,
        9,
        "MobileViTAttention",
    ),
    "torchvision_vit": Model(
        functools.partial(
            torchvision.models.VisionTransformer, 32, 8, 2, HEADS, DIM, 2 * DIM, num_classes=5
        ),
        (
            "encoder.layers.encoder_layer_0.self_attention",
            "encoder.layers.encoder_layer_1.self_attention",
        ),
        2,
        "MultiheadAttention",
    ),
    "transformer_encoder": Model(
        torch_encoder,
        ("layers.0.self_attn", "layers.1.self_attn"),
        2,
        "MultiheadAttention",
        lambda: torch.randn(2, 9, DIM),
    ),
}


# timm's MobileViT has the layers of its ViT, in a model that takes seconds.
QUICK = [kind for kind in MODELS if kind != "timm_mobilevit"]


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def case(kind: str) -> Model:
    return MODELS[kind]


def livened(model: nn.Module) -> nn.Module:
    """Random biases, no zero weights (torchvision's head), and a signal that reaches the output
    (Hugging Face's own weights lose it), so that what convert breaks would show."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            model.train()(torch.rand(4, 3, 64, 64))
    return model


@functools.cache
def prototype(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return livened(MODELS[kind].build()).eval()


def built(kind: str, device: torch.device | str = "cpu") -> nn.Module:
    return copy.deepcopy(prototype(kind)).to(device)


def output(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    return result if isinstance(result, Tensor) else result.last_hidden_state


def attentions(model: nn.Module) -> list[SeparableAttention]:
    return [module for module in model.modules() if isinstance(module, SeparableAttention)]


def snapshot(model: nn.Module) -> list[tuple[str, int]]:
    """Every module, parameter and hook by identity."""
    named = [*model.named_modules(remove_duplicate=False), *model.named_parameters()]
    return [(name, id(value)) for name, value in named]


def only_in(model: nn.Module, *patterns: str) -> Callable[[str, nn.Module], bool]:
    return lambda name, module: any(pattern in name for pattern in patterns)


# Whole models ------------------------------------------------------------------------------------


def test_every_layer_is_replaced_and_the_rest_is_not(
    kind: str, case: Model, device: torch.device
) -> None:
    model = built(kind, device)
    before = dict(model.named_modules())
    old = before[case.layers[0]]
    assert type(old).__name__ == case.old_class
    parameters = {name: value for name, value in model.named_parameters()}
    x = case.inputs().to(device)
    shape = output(model, x).shape

    assert convert(model) == case.count == len(attentions(model))
    assert not any(type(module).__name__ == case.old_class for module in model.modules())
    assert all(isinstance(model.get_submodule(name), SeparableAttention) for name in case.layers)
    gone = {id(value) for name in before for value in _attention_parameters(before, name, case)}
    for name, value in parameters.items():
        if id(value) not in gone:
            assert model.get_parameter(name) is value
    out = output(model, x)
    assert out.shape == shape and out.isfinite().all()


def _attention_parameters(modules: dict[str, Any], name: str, case: Model) -> Iterator[Tensor]:
    if type(modules[name]).__name__ == case.old_class:
        yield from modules[name].parameters()


def test_the_attention_decides_the_output(kind: str, case: Model) -> None:
    """Else finite outputs would say nothing about the attention."""
    model, x = built(kind), case.inputs()
    convert(model)
    with torch.no_grad():
        out = output(model, x)
        for layer in attentions(model):
            layer.out_proj.weight.zero_()
        assert (output(model, x) - out).abs().max() > 1e-3 * out.std()


def test_the_call_signature_stays(kind: str, case: Model) -> None:
    model = built(kind)
    old = inspect.signature(model.get_submodule(case.layers[0]).forward)
    convert(model)
    new = inspect.signature(model.get_submodule(case.layers[0]).forward)
    assert [(p.name, p.kind, p.default) for p in new.parameters.values()] == [
        (p.name, p.kind, p.default) for p in old.parameters.values()
    ]


@pytest.mark.parametrize("kind", QUICK)
def test_trains(kind: str, case: Model, device: torch.device) -> None:
    model = built(kind, device).train()
    convert(model)
    output(model, case.inputs().to(device)).square().mean().backward()
    for layer in attentions(model):
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


class KernelLog(TorchDispatchMode):
    """The operators of this package that run, and any attention of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name()
        if name.startswith("sep_attn::") or "attention" in name or "transformer" in name:
            self.names.append(name)
        return operator(*args, **(kwargs or {}))


def test_the_kernels_run(kind: str, case: Model) -> None:
    if reason := unavailable_reason("native", torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    model = built(kind)
    convert(model)
    with KernelLog() as log, torch.no_grad():
        output(model, case.inputs())
    assert log.names == ["sep_attn::separable_attention_inference_native"] * case.count


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_options_reach_the_layers(backend: str) -> None:
    model = built("timm_vit")
    convert(model, value_act="identity", backend=backend)
    assert {(layer.value_act, layer.backend) for layer in attentions(model)} == {
        ("identity", backend)
    }


def test_the_mobilevit_of_the_paper_keeps_its_layout(device: torch.device) -> None:
    """[BP, N, D]: a pixel of the patch is a slice of its own, so images do not mix."""
    model = built("timm_mobilevit", device)
    convert(model)
    x = images(64).to(device)
    with torch.no_grad():
        together = model(x)
        apart = torch.cat([model(x[:1]), model(x[1:])])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_torchvisions_own_size_on_meta() -> None:
    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    assert convert(model) == 12
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


# How a layer begins ------------------------------------------------------------------------------


def heads_of(old: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, heads, N, head dim]`` of a timm or torch layer."""
    weight, bias = (
        (old.qkv.weight, old.qkv.bias)
        if hasattr(old, "qkv")
        else (old.in_proj_weight, old.in_proj_bias)
    )
    qkv = nn.functional.linear(x, weight, bias).unflatten(-1, (3, old.num_heads, -1))
    return tuple(qkv.permute(2, 0, 3, 1, 4))


def merged(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def start(kind: str, init: str, value_act: str = "relu") -> tuple[Any, SeparableAttention]:
    """A layer in float64, and what it is converted to."""
    model = built(kind).double()
    old = model.get_submodule(MODELS[kind].layers[0])
    convert(model, init=init, value_act=value_act)
    return old, model.get_submodule(MODELS[kind].layers[0])


def call(layer: Any, x: Tensor) -> Tensor:
    out = layer(x, x, x) if isinstance(layer, SeparableMultiheadAttention) else layer(x)
    return out[0] if isinstance(out, tuple) else out


KINDS = ["timm_vit", "transformer_encoder"]


def output_projection(old: Any) -> nn.Linear:
    return old.proj if hasattr(old, "proj") else old.out_proj


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init, scale", [("old_keys", 1.0), ("old_keys_small", 0.1)])
def test_old_keys(kind: str, init: str, scale: float) -> None:
    old, new = start(kind, init)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    _, keys, values = (merged(heads) for heads in heads_of(old, x))
    weights = (x @ new.qkv_proj.weight[0]).softmax(-1)
    assert 0 < new.qkv_proj.weight[0].abs().max() <= DIM**-0.5
    gated = values.relu() * (weights[..., None] * keys).sum(1, keepdim=True)
    projection = output_projection(old)
    expected = scale * gated @ projection.weight.T + projection.bias
    torch.testing.assert_close(call(new, x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_context_has_the_old_values_and_output(kind: str) -> None:
    old, new = start(kind, "fresh_context")
    weight, bias = (
        (old.qkv.weight, old.qkv.bias)
        if kind == "timm_vit"
        else (old.in_proj_weight, old.in_proj_bias)
    )
    torch.testing.assert_close(new.qkv_proj.weight[1 + DIM :], weight[2 * DIM :])
    torch.testing.assert_close(new.qkv_proj.bias[1 + DIM :], bias[2 * DIM :])
    torch.testing.assert_close(new.out_proj.weight, output_projection(old).weight)
    torch.testing.assert_close(new.out_proj.bias, output_projection(old).bias)
    fresh = torch.cat([new.qkv_proj.weight[: 1 + DIM].flatten(), new.qkv_proj.bias[1 : 1 + DIM]])
    assert 0.9 * DIM**-0.5 < fresh.abs().max() <= DIM**-0.5
    assert not torch.isclose(fresh[DIM : 2 * DIM], weight[DIM]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_own_and_mean_is_the_sum_it_says(kind: str) -> None:
    old, new = start(kind, "own_and_mean")
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    values = merged(heads_of(old, x)[2])
    mean = values.mean(1, keepdim=True)
    weight, bias = new.qkv_proj.weight[1 + DIM :], new.qkv_proj.bias[1 + DIM :]
    assert (torch.nn.functional.linear(x, weight, bias) > 0).all()  # where relu is linear
    rows = (
        (old.qkv.weight, old.qkv.bias)
        if kind == "timm_vit"
        else (old.in_proj_weight, old.in_proj_bias)
    )
    size = (rows[0][2 * DIM :].square().sum(1) + rows[1][2 * DIM :].square()).sqrt()
    expected = output_projection(old)((values + mean) / 2 + values * mean / (16 * size))
    torch.testing.assert_close(call(new, x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value_act", ["relu", "identity"])
def test_constant_context_keeps_every_tokens_own_values(kind: str, value_act: str) -> None:
    old, new = start(kind, "constant_context", value_act)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    values = merged(heads_of(old, x)[2])
    expected = output_projection(old)(reference.activation(values, value_act))
    torch.testing.assert_close(call(new, x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_values_is_multihead_attention_with_the_mean_query(kind: str) -> None:
    """With one head and every query the same, eq. 3 is multi-head attention."""
    old, new = start(kind, "pooled_values")
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    _, keys, values = heads_of(old, x)
    bias = old.qkv.bias if hasattr(old, "qkv") else old.in_proj_bias
    queries = bias[:DIM].view(HEADS, 1, DIM // HEADS)
    scores = (queries * keys).sum(-1).mean(1) / (DIM // HEADS) ** 0.5  # [B, N]
    pooled = (scores.softmax(-1)[:, None, :, None] * values).sum(2, keepdim=True)
    expected = output_projection(old)(merged(pooled.expand_as(values)))
    torch.testing.assert_close(call(new, x), expected)


def test_the_mean_query_is_not_known_behind_a_norm_or_without_a_bias() -> None:
    for options in ({"qk_norm": True}, {"qkv_bias": False}):
        model = livened(timm_vit(**options))
        convert(model, init="pooled_values")
        assert not model.blocks[0].attn.qkv_proj.weight[0].any()


def test_pooled_values_is_the_old_layer_where_it_had_no_choice() -> None:
    """Queries of zero and one key bias: every head of the old layer takes the mean."""
    model = built("timm_vit")
    old = model.blocks[0].attn
    with torch.no_grad():
        old.qkv.weight[:DIM].zero_()
        old.qkv.bias[:DIM].zero_()
    x = torch.randn(2, 7, DIM)
    expected = old(x)
    convert(model, init="pooled_values")
    torch.testing.assert_close(model.blocks[0].attn(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_start_is_finite_and_trains(init: str, bias: bool) -> None:
    block = nn.TransformerEncoderLayer(
        DIM, HEADS, 2 * DIM, bias=bias, dropout=0.0, batch_first=True
    )
    model = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
    assert convert(model, init=init) == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    layer = model.layers[0].self_attn
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, target = torch.randn(4, 9, DIM), torch.randn(4, 9, DIM)
    losses = []
    for _ in range(6):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.any() for parameter in layer.parameters() if parameter.dim() > 1)
        optimizer.step()
    assert losses[-1] < losses[0]


def test_from_mha_is_one_of_the_named_starts() -> None:
    model = built("timm_vit")
    same = []
    for init in (FROM_MHA, *STARTS):
        converted = copy.deepcopy(model)
        torch.manual_seed(3)
        convert(converted, init=init)
        layer = converted.blocks[1].attn
        same.append(torch.cat([layer.qkv_proj.weight, layer.out_proj.weight]))
    assert sum(torch.equal(same[0], other) for other in same[1:]) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if "mobilevit" not in kind])
def test_dtype_is_kept(kind: str, case: Model, dtype: torch.dtype) -> None:
    model = built(kind).to(dtype)
    convert(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert output(model, case.inputs().to(dtype)).dtype == dtype


def test_timms_fused_switch_is_no_part_of_the_result() -> None:
    fused, eager = built("timm_vit"), built("timm_vit")
    for block in eager.blocks:
        block.attn.fused_attn = not block.attn.fused_attn
    for model in (fused, eager):
        torch.manual_seed(3)
        convert(model)
    x = images()
    assert torch.equal(fused(x), eager(x))


# What is kept ------------------------------------------------------------------------------------


def test_dropout_mode_and_requires_grad_are_kept() -> None:
    model = timm_vit(attn_drop_rate=0.2, proj_drop_rate=0.3).train()
    model.blocks[1].eval()
    model.blocks[1].attn.qkv.requires_grad_(False)
    model.blocks[0].attn.requires_grad_(False)
    convert(model)
    first, second = (block.attn for block in model.blocks)
    assert (first.attn_drop.p, first.proj_drop.p) == (0.2, 0.3)
    assert first.training and not second.training and not second.attn_drop.training
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert not second.qkv_proj.weight.requires_grad and second.out_proj.weight.requires_grad


@pytest.mark.parametrize(
    "model, attn_drop, proj_drop",
    [
        (lambda: hugging_face("ViT", attention_probs_dropout_prob=0.2), 0.2, 0.0),
        (lambda: torch_encoder(dropout=0.2), 0.2, 0.0),
        (
            lambda: transformers.MobileViTModel(
                transformers.MobileViTConfig(
                    hidden_sizes=[24, 32, 40],
                    neck_hidden_sizes=[16, 16, 24, 24, 32, 32, 80],
                    attention_probs_dropout_prob=0.2,
                    hidden_dropout_prob=0.3,
                )
            ),
            0.2,
            0.3,
        ),
    ],
    ids=["hugging_face_vit", "torch", "hugging_face_mobilevit"],
)
def test_dropout_of_the_others(
    model: Callable[[], nn.Module], attn_drop: float, proj_drop: float
) -> None:
    model = model()
    convert(model)
    for layer in attentions(model):
        assert (layer.attn_drop.p, layer.proj_drop.p) == (attn_drop, proj_drop)


@pytest.mark.parametrize("batch_first", [True, False])
def test_batch_first_is_kept(batch_first: bool) -> None:
    block = nn.TransformerEncoderLayer(DIM, HEADS, DIM, batch_first=batch_first)
    model = nn.TransformerEncoder(block, 2, enable_nested_tensor=False).eval()
    convert(model)
    x = torch.randn(2, 9, DIM)
    given = x if batch_first else x.transpose(0, 1)
    out = model(given)
    alone = model(given[:1] if batch_first else given[:, :1])
    torch.testing.assert_close(out[:1] if batch_first else out[:, :1], alone)


@pytest.mark.parametrize("kind", QUICK)
def test_state_dict_goes_into_another_converted_model(kind: str, case: Model) -> None:
    model, other, x = built(kind), built(kind), case.inputs()
    convert(model)
    convert(other, init="fresh")
    assert not torch.equal(output(model, x), output(other, x))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(model, x), output(other, x), atol=0, rtol=0)


def test_state_dict_of_the_old_model_is_refused() -> None:
    model = built("timm_vit")
    state = model.state_dict()
    convert(model)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv\.weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize("kind", QUICK)
def test_deepcopy_and_pickle(kind: str, case: Model) -> None:
    model, x = built(kind), case.inputs()
    convert(model)
    out = output(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other, x), out)
        with torch.no_grad():
            attentions(other)[0].out_proj.bias.add_(1.0)
        assert not torch.equal(output(other, x), out)
    assert torch.equal(output(model, x), out)


@pytest.mark.parametrize(
    "kind", ["timm_vit", "hugging_face_vit", "torchvision_vit", "transformer_encoder"]
)
def test_compiles_as_one_graph(kind: str) -> None:
    model, x = built(kind), MODELS[kind].inputs()
    convert(model)
    expected = output(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(compiled, x), expected, atol=1e-5, rtol=1e-4)


def test_hooks_survive_and_their_handles_work() -> None:
    model = built("timm_vit").train()
    layer, calls = model.blocks[0].attn, []
    handles = [
        layer.register_forward_hook(lambda module, args, out: calls.append("forward")),
        layer.register_forward_hook(
            lambda module, args, kwargs, out: calls.append(f"with {sorted(kwargs)}"),
            with_kwargs=True,
        ),
        layer.register_forward_pre_hook(lambda module, args: calls.append("pre")),
        layer.register_full_backward_hook(lambda module, gin, gout: calls.append("backward")),
        layer.register_full_backward_pre_hook(lambda module, gout: calls.append("backward pre")),
    ]
    convert(model)
    model(images()).sum().backward()
    expected = ["pre", "forward", "with ['attn_mask', 'is_causal']", "backward pre", "backward"]
    assert calls == expected
    for handle in handles:
        handle.remove()
    model(images()).sum().backward()
    assert calls == expected
    model.blocks[0].attn.register_forward_hook(lambda module, args, out: calls.append("new"))
    model(images())
    assert calls == [*expected, "new"]


def test_a_module_under_two_names_stays_one() -> None:
    model = built("timm_vit")
    model.blocks[1].attn = model.blocks[0].attn
    model.spare = nn.ModuleDict({"attention": model.blocks[0].attn})
    assert convert(model) == 1
    assert model.blocks[0].attn is model.blocks[1].attn is model.spare["attention"]
    assert isinstance(model.blocks[0].attn, SeparableAttention)
    assert model(images()).isfinite().all()


@pytest.mark.parametrize("kind", QUICK)
def test_parameters_on_meta_stay_there(kind: str, case: Model) -> None:
    model = built(kind)
    target = copy.deepcopy(model)
    convert(target)
    model.to("meta")
    assert convert(model) == case.count
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.load_state_dict(target.state_dict(), assign=True)
    x = case.inputs()
    torch.testing.assert_close(output(model, x), output(target, x), atol=0, rtol=0)


# Masks -------------------------------------------------------------------------------------------


def padding_masks(keep: Tensor) -> dict[str, Tensor]:
    """One key padding mask ``[B, N]`` in the forms that attention code writes it in."""
    tokens = keep.shape[1]
    additive = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    return {
        "bool": keep[:, None, None],
        "bool_expanded": keep[:, None, None].expand(-1, HEADS, tokens, -1),
        "bool_written_out": keep[:, None, None].expand(-1, HEADS, tokens, -1).clone(),
        "rank_3": keep[:, None],
        "minus_infinity": additive[:, None, None],
        "lowest": additive.clamp(min=torch.finfo(torch.float32).min)[:, None, None],
        # Of a query that is padding it says that it sees nothing, as timm's NaFlexViT does.
        "symmetric": (keep[:, :, None] & keep[:, None])[:, None],
        "symmetric_additive": torch.zeros(len(keep), 1, tokens, tokens).masked_fill(
            ~(keep[:, :, None] & keep[:, None])[:, None], -torch.inf
        ),
        "minus_ten_thousand": additive.clamp(min=-1e4)[:, None, None].expand(-1, 1, tokens, -1),
    }


KEEP = torch.tensor(
    [[True] * 12 + [False] * 5, [True, False] * 8 + [True]]
)  # 16 patches and a class


@pytest.mark.parametrize("form", padding_masks(KEEP))
def test_timm_key_padding_masks(form: str) -> None:
    model = built("timm_vit")
    convert(model)
    layer, x = model.blocks[0].attn, torch.randn(2, 17, DIM)
    mask = padding_masks(KEEP)[form]
    if form == "rank_3":  # [H, 1, N] for one slice
        mask, x, keep = mask[:1], x[:1], KEEP[:1]
    else:
        keep = KEEP
    expected = SeparableAttention.forward(layer, x, key_padding_mask=~keep)
    torch.testing.assert_close(layer(x, attn_mask=mask), expected)
    if form in ("bool_written_out", "minus_infinity", "symmetric"):  # whose values are looked at
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, attn_mask=mask), expected)


def test_timm_passes_masks_through_the_model() -> None:
    model = built("timm_vit")
    convert(model)
    x = images()
    whole = model(x, attn_mask=torch.ones(2, 1, 1, 17, dtype=torch.bool))
    torch.testing.assert_close(whole, model(x))
    assert not torch.allclose(model(x, attn_mask=KEEP[:, None, None]), model(x))


def other_masks() -> dict[str, tuple[Any, type[Exception], str]]:
    causal = torch.ones(17, 17, dtype=torch.bool).tril()
    return {
        "causal": (causal, ValueError, "differs between queries"),
        "additive_causal": (
            torch.zeros(17, 17).masked_fill(~causal, -torch.inf),
            ValueError,
            "differs between queries",
        ),
        "heads": (
            torch.rand(2, HEADS, 1, 17) > 0.5,
            ValueError,
            "differs between heads",
        ),
        "bias": (torch.randn(2, 1, 1, 17), ValueError, "attn_mask adds to the scores"),
        "integer": (torch.ones(2, 1, 1, 17, dtype=torch.int), TypeError, "torch.int32"),
        "shape": (torch.ones(2, 1, 1, 16, dtype=torch.bool), ValueError, "has shape"),
        "batch": (torch.ones(3, 1, 1, 17, dtype=torch.bool), ValueError, "has batch 3, expected 2"),
        "object": ("causal", TypeError, "must be a torch.Tensor, got str"),
    }


@pytest.mark.parametrize("form", other_masks())
def test_other_masks_are_refused(form: str) -> None:
    mask, error, message = other_masks()[form]
    model = built("timm_vit")
    convert(model)
    with pytest.raises(error, match=message):
        model(images(), attn_mask=mask)


def test_causal_calls_are_refused() -> None:
    model = built("timm_vit")
    convert(model)
    with pytest.raises(ValueError, match="is_causal must be False"):
        model(images(), is_causal=True)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_hugging_face_key_padding_masks(kind: str, implementation: str) -> None:
    model = livened(hugging_face(kind, attn_implementation=implementation)).eval()
    convert(model)
    tokens = 17 if kind == "ViT" else 18
    keep = torch.ones(2, tokens, dtype=torch.long)
    keep[0, 10:] = 0
    keep[1, 3] = 0
    seen = []
    layer = attentions(model)[0]
    layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out[0])))
    with torch.no_grad():
        model(images(), attention_mask=keep)
    x, out = seen[0]
    expected = SeparableAttention.forward(layer, x, key_padding_mask=keep == 0)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layer(x, keep)[0], expected)  # as flash attention is given it


def test_hugging_face_attention_maps_are_refused() -> None:
    model = built("hugging_face_vit")
    convert(model)
    model(images(), output_attentions=False)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(images(), output_attentions=True)
    model = hugging_face("ViT", output_attentions=True, attn_implementation="eager")
    with pytest.raises(ValueError, match="configuration sets output_attentions"):
        convert(model)


# PyTorch's fast path -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_inference_is_the_layers_own_sum(norm_first: bool, device: torch.device) -> None:
    """In eval mode PyTorch would run all of a block in one multi-head kernel."""
    block = nn.TransformerEncoderLayer(
        DIM, HEADS, 2 * DIM, batch_first=True, norm_first=norm_first, device=device
    )
    model = livened(nn.TransformerEncoder(block, 2, enable_nested_tensor=False)).eval()
    convert(model)
    x = torch.randn(2, 9, DIM, device=device)
    padding = torch.zeros(2, 9, dtype=torch.bool, device=device)
    padding[0, 6:] = True

    def oracle(y: Tensor, mask: Tensor | None) -> Tensor:
        for layer in model.layers:
            attend = functools.partial(
                SeparableAttention.forward, layer.self_attn, key_padding_mask=mask
            )
            if norm_first:
                y = y + attend(layer.norm1(y))
                y = y + layer._ff_block(layer.norm2(y))
            else:
                y = layer.norm1(y + attend(y))
                y = layer.norm2(y + layer._ff_block(y))
        return y

    with torch.no_grad():
        for mask in (None, padding):
            expected = oracle(x, mask)
            torch.testing.assert_close(model(x, src_key_padding_mask=mask), expected)
        torch.testing.assert_close(model(x), model.train(False)(x))
    torch.testing.assert_close(model(x, src_key_padding_mask=padding), oracle(x, padding))


@pytest.mark.parametrize("layer", [0, 1])
def test_encoder_does_not_pack_tokens(layer: int) -> None:
    """With a left-aligned mask PyTorch's encoder would hand its layers a nested tensor."""
    model = torch_encoder().eval()
    assert model.use_nested_tensor
    convert(model, filter=only_in(model, f"layers.{layer}."))
    assert not model.use_nested_tensor
    x, padding = torch.randn(2, 9, DIM), torch.zeros(2, 9, dtype=torch.bool)
    padding[:, 6:] = True
    with torch.no_grad():
        inference = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(model(x, src_key_padding_mask=padding), inference)


def test_encoder_refuses_attention_masks() -> None:
    model = torch_encoder().eval()
    convert(model)
    x, mask = torch.randn(2, 9, DIM), nn.Transformer.generate_square_subsequent_mask(9)
    for options in ({"mask": mask}, {"mask": mask, "is_causal": True}):
        with pytest.raises(ValueError, match="attn_mask must be None"):
            model(x, **options)


# filter ------------------------------------------------------------------------------------------


def test_filter_picks_by_name_and_module() -> None:
    model = built("timm_vit")
    asked = []

    def second(name: str, module: nn.Module) -> bool:
        asked.append((name, type(module)))
        return name == "blocks.1.attn"

    assert convert(model, filter=second) == 1
    assert asked == [(f"blocks.{i}.attn", timm.layers.Attention) for i in range(2)]
    assert isinstance(model.blocks[0].attn, timm.layers.Attention)
    assert isinstance(model.blocks[1].attn, SeparableAttention)
    assert convert(model) == 1  # and now the first


def test_a_wrapper_called_attention_is_not_in_the_way() -> None:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
            self.scale = nn.Parameter(torch.ones(DIM))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.inner(x, x, x)[0]

    model = nn.Sequential(SelfAttention())
    assert convert(model) == 1
    assert isinstance(model[0].inner, SeparableMultiheadAttention)
    assert model(torch.randn(2, 9, DIM)).shape == (2, 9, DIM)
    model.append(SelfAttention())
    assert convert(model) == 1  # the new one
    with pytest.raises(ValueError, match="separable already"):
        convert(model)


def test_filter_that_picks_nothing() -> None:
    model = built("timm_vit")
    with pytest.raises(ValueError, match=r"filter returned False for blocks\.0\.attn .*blocks\.1"):
        convert(model, filter=lambda name, module: False)


def test_filter_leaves_out_what_cannot_be_converted() -> None:
    model = nn.Transformer(DIM, HEADS, 1, 1, 2 * DIM, batch_first=True).eval()
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.self_attn .*decoder is causal"):
        convert(model)
    assert convert(model, filter=lambda name, module: name != "decoder.layers.0.self_attn") == 2
    source, target = torch.randn(2, 9, DIM), torch.randn(2, 5, DIM)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad():
        out = model(source, target, tgt_mask=causal)
        shorter = model(source, target[:, :3], tgt_mask=causal[:3, :3])
    torch.testing.assert_close(out[:, :3], shorter)


def test_a_failing_filter_changes_nothing() -> None:
    model = built("timm_vit")
    before = snapshot(model)

    def fail(name: str, module: nn.Module) -> bool:
        if name == "blocks.1.attn":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        convert(model, filter=fail)
    assert snapshot(model) == before


# What is refused ---------------------------------------------------------------------------------


def quantised(model: nn.Module) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


class QuantisedTensor(Tensor):
    """Stands for the weight that a quantisation library puts in a plain nn.Linear."""


def subclassed(model: nn.Module) -> None:
    linear = model.blocks[1].attn.qkv
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(QuantisedTensor))


def float8(model: nn.Module) -> None:
    linear = model.blocks[1].attn.qkv
    linear.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)


class LowRankAdapter(nn.Linear):
    """Stands for what an adapter library puts in the place of a projection."""


def adapted(model: nn.Module) -> None:
    model.blocks[1].attn.qkv = LowRankAdapter(DIM, 3 * DIM)


def tied(model: nn.Module) -> None:
    model.blocks[1].attn.proj.weight = model.blocks[0].attn.proj.weight


def own_forward(model: nn.Module) -> None:
    layer = model.blocks[1].attn
    layer.forward = functools.partial(type(layer).forward, layer)


class OtherAttention(timm.layers.Attention):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return -super().forward(x)


def subclass(model: nn.Module) -> None:
    model.blocks[1].attn = OtherAttention(DIM, HEADS)


class RelativeAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(49, HEADS))


# What is done to a good model, of whose two layers the second is then in the way; and the reason.
OBSTACLES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "quantised": (quantised, "quantized.dynamic.* convert before quantising"),
    "tensor_subclass": (subclassed, "qkv.weight is a QuantisedTensor.*before quantising"),
    "float8": (float8, "float8_e4m3fn: convert before quantising"),
    "adapter": (adapted, "qkv is a .*LowRankAdapter, expected a plain nn.Linear"),
    "tied": (tied, r"proj.weight is also blocks\.0\.attn\.proj\.weight"),
    "own_forward": (own_forward, "it has a forward of its own"),
    "subclass": (subclass, "derives from timm.layers.attention.Attention"),
    "unknown": (
        lambda model: model.blocks[1].register_module("attn", RelativeAttention()),
        r"relative positions \(relative_position_bias_table\)",
    ),
    "hooked_child": (
        lambda model: model.blocks[1].attn.attn_drop.register_forward_hook(print),
        "attn_drop has hooks, and will be gone",
    ),
    "state_dict_hook": (
        lambda model: model.blocks[1].attn.register_state_dict_post_hook(lambda *args: None),
        "it has hooks on its state dict",
    ),
    "parametrised": (
        lambda model: parametrizations.weight_norm(model.blocks[1].attn.qkv),
        "qkv is parametrised",
    ),
    "compiled": (lambda model: model.blocks[1].attn.compile(), "it is compiled"),
    "extra_child": (
        lambda model: model.blocks[1].attn.register_module("extra", nn.Linear(2, 2)),
        "it has a child extra",
    ),
    "extra_parameter": (
        lambda model: model.blocks[1].attn.register_parameter("extra", nn.Parameter(torch.ones(2))),
        "it has a parameter extra",
    ),
    "extra_buffer": (
        lambda model: model.blocks[1].attn.register_buffer("extra", torch.ones(2)),
        "it has a buffer extra",
    ),
    "missing_child": (
        lambda model: model.blocks[1].attn.__delattr__("proj"),
        "it has no child proj",
    ),
    "dtypes": (lambda model: model.blocks[1].attn.proj.double(), "parameters differ in dtype"),
    "devices": (lambda model: model.blocks[1].attn.proj.to("meta"), "parameters differ in device"),
    "everything_dropped": (
        lambda model: setattr(model.blocks[1].attn.attn_drop, "p", 1.0),
        "attn_drop drops everything",
    ),
    "norm": (
        lambda model: setattr(model.blocks[1].attn, "norm", nn.LayerNorm(DIM)),
        "it normalises what goes into the output projection",
    ),
    "gate": (
        lambda model: setattr(model.blocks[1].attn, "gate", nn.Linear(DIM, DIM)),
        "it has a gate of its own",
    ),
    "causal": (lambda model: setattr(model.blocks[1].attn, "is_causal", True), "it is causal"),
    "mask_in_the_block": (
        lambda model: model.blocks[1].register_buffer("attn_mask", torch.zeros(17, 17)),
        "holds an attn_mask",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_all_or_none(obstacle: str) -> None:
    model = built("timm_vit")
    spoil, reason = OBSTACLES[obstacle]
    spoil(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"(?s)blocks\.1\.attn \(.*{reason}"):
        convert(model)
    assert snapshot(model) == before and not attentions(model)
    if obstacle not in ("quantised", "tied"):  # there both layers are in the way
        assert convert(model, filter=lambda name, module: name == "blocks.0.attn") == 1


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"add_bias_kv": True}, "appends a token to keys and values"),
        ({"add_zero_attn": True}, "appends a token to keys and values"),
        ({"kdim": 8, "vdim": 8}, "kdim=8 and vdim=8 are not embed_dim=32"),
        ({"dropout": 1.0}, "drops everything"),
    ],
)
def test_options_of_multihead_attention_that_are_refused(
    options: dict[str, Any], reason: str
) -> None:
    model = nn.Sequential(nn.MultiheadAttention(DIM, HEADS, **options))
    with pytest.raises(ValueError, match=rf"0 \(torch.nn.*MultiheadAttention\): .*{reason}"):
        convert(model)


def test_quantizable_multihead_attention_is_refused() -> None:
    model = nn.Sequential(torch.ao.nn.quantizable.MultiheadAttention(DIM, HEADS))
    with pytest.raises(ValueError, match=r"derives from torch\.nn\.modules\.activation"):
        convert(model)


def test_head_sizes_that_do_not_make_up_the_channels_are_refused() -> None:
    model = timm_vit()
    model.blocks[1].attn = timm.layers.Attention(DIM, HEADS, attn_head_dim=16)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn .*query projection is \[64, 32\]"):
        convert(model)


@pytest.mark.parametrize(
    "name, layer, reason",
    [
        ("beit_base_patch16_224", "blocks.11.attn", "relative_position_bias_table"),
        ("eva02_tiny_patch14_224", "blocks.0.attn", "relative positions"),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn", "relative_position_bias_table"),
        ("vit_relpos_small_patch16_224", "blocks.0.attn", r"\(rel_pos\)"),
        ("vit_small_patch16_rope_224", "blocks.0.attn", "rotates queries and keys"),
        ("xcit_nano_12_p16_224", "cls_attn_blocks.0.attn", "does not know this attention"),
    ],
)
def test_attention_of_other_timm_models_is_refused(name: str, layer: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=reason) as error:
        convert(model)
    assert layer in str(error.value) or "more" in str(error.value)
    assert snapshot(model) == before


def test_a_block_with_a_shared_projection_is_refused() -> None:
    with torch.device("meta"):
        model = timm_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock)
    with pytest.raises(ValueError, match=r"blocks\.0, .*one projection serves it and the MLP"):
        convert(model)


def test_torchvision_swin_is_refused() -> None:
    with torch.device("meta"):
        model = torchvision.models.swin_t()
    with pytest.raises(ValueError, match=r"ShiftedWindowAttention.*relative_position"):
        convert(model)


def test_hugging_face_causal_attention_is_refused() -> None:
    config = transformers.GPT2Config(n_embd=DIM, n_layer=1, n_head=HEADS, vocab_size=11)
    with pytest.raises(ValueError, match=r"h\.0\.attn \(.*GPT2Attention\): it is causal"):
        convert(transformers.GPT2Model(config))


def test_sharded_parameters_are_refused(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = built("timm_vit")
        linear = model.blocks[1].attn.qkv
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"qkv.weight is sharded \(DTensor\)"):
            convert(model)
        assert snapshot(model) == before
        wrapped = nn.parallel.DistributedDataParallel(built("timm_vit"))
        with pytest.raises(ValueError, match="DistributedDataParallel: convert before wrapping"):
            convert(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_converted_again(kind: str, case: Model) -> None:
    model = built(kind)
    convert(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="attention is separable already"):
        convert(model)
    assert snapshot(model) == before


def test_nothing_to_convert() -> None:
    with pytest.raises(ValueError, match="found only Linear, ReLU, Sequential"):
        convert(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(ValueError, match=r"sep_attn\.patch serves it"):
        convert(models.timm_mobilevitv2("mobilevitv2_050"))


def test_a_model_that_is_the_attention() -> None:
    with pytest.raises(ValueError, match=r"the model \(.*\): a model cannot replace itself"):
        convert(nn.MultiheadAttention(DIM, HEADS))


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="got list"):
        convert([nn.MultiheadAttention(DIM, HEADS)])
    model = built("timm_vit")
    before = snapshot(model)
    for options, message in (
        ({"init": "mha"}, "init must be one of 'from_mha', 'fresh'"),
        ({"value_act": "gelu"}, "value_act must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(model, **options)
    assert snapshot(model) == before


def test_many_refusals_make_a_short_message() -> None:
    with torch.device("meta"):
        model = timm.create_model("beit_base_patch16_224")
    with pytest.raises(ValueError) as error:
        convert(model)
    assert "blocks.0.attn, blocks.1.attn, blocks.2.attn and 9 more" in str(error.value)
    assert len(str(error.value).splitlines()) == 3


def test_no_library_is_imported() -> None:
    program = (
        "import sys, torch, sep_attn\n"
        "sep_attn.convert(torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2)))\n"
        "assert not {'timm', 'transformers', 'torchvision'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
