"""Replaces the multi-head attention of a model by separable attention, all of it or none.

Recognised by name, without importing the library: timm's ``Attention`` (``vit_*``, ``deit_*``,
MobileViT v1), Hugging Face's ``ViTAttention``, ``DeiTAttention`` and ``MobileViTAttention``, and
``torch.nn.MultiheadAttention`` (torchvision's ViT, ``nn.TransformerEncoder``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from sep_attn.adapters import (
    HuggingFaceSeparableAttention,
    MobileViTSeparableAttention,
    TimmSeparableAttention,
)
from sep_attn.children import qualified_name
from sep_attn.initialization import FROM_MHA, INITS, MultiHeadWeights, initialize
from sep_attn.module import SeparableAttention
from sep_attn.multihead import SeparableMultiheadAttention
from sep_attn.validation import ACTIVATIONS, BACKENDS, check_choice

Filter = Callable[[str, nn.Module], bool]


def convert(
    model: nn.Module,
    *,
    filter: Filter | None = None,
    init: str = FROM_MHA,
    value_act: str = "relu",
    backend: str = "auto",
) -> int:
    """Replaces every multi-head attention layer in ``model`` by a separable one, in place.

    The new layer is another function (``init`` says where it starts), so the
    model has to be fine-tuned. It takes the calls the old one took: key padding masks in whatever
    form the library has them, no other masks. It has the old layer's device, dtype, train or eval
    mode, dropout, ``requires_grad`` and hooks, and always biases. Norms of queries and keys go:
    there are none. Make the optimizer afterwards, and convert before compiling, sharding,
    quantising or wrapping.

    Args:
        model: any module that holds attention layers; parameters may be on ``meta``.
        filter: called with the name and the module of every attention layer found, also of those
            that cannot be converted; only those for which it returns True are converted. A module
            under several names comes with its first.
        init: where the layers begin. ``"from_mha"``: with the old weights, by the start that
            trained best of those tried, ``"old_keys"``; the others by name: ``"old_keys_small"``,
            ``"fresh_context"``, ``"constant_context"``, ``"pooled_values"``, ``"own_and_mean"``; or
            ``"fresh"``, which takes nothing over, begins as ``nn.Linear`` does, and was as good or
            better in that small trial (README has it, ``python -m benchmarks.convert_init`` makes
            it). Those with drawn scores depend on torch's seed.
        value_act: ``"relu"`` (paper) or ``"identity"``, which gained nothing in that trial.
        backend: as in :func:`sep_attn.functional.separable_attention`.

    Returns:
        How many layers were replaced; one under several names counts once.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: a layer cannot be converted (each is named with the reason), there is nothing to
            convert, ``model`` is itself the attention layer, or an unknown choice. The model is
            then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("init", init, INITS)
    check_choice("value_act", value_act, ACTIVATIONS)
    check_choice("backend", backend, BACKENDS)

    wrapper = next((m for m in model.modules() if qualified_name(type(m)) in _WRAPPERS), None)
    if wrapper is not None:
        raise ValueError(
            f"the parameters are held by a {type(wrapper).__name__}: convert before wrapping"
        )
    found = _attention_layers(model)
    chosen = [layer for layer in found if filter is None or filter(layer.name, layer.module)]
    _refuse_nothing(model, found, chosen)
    obstacles = [(layer, _obstacle(layer, model)) for layer in chosen]
    if any(reason for _, reason in obstacles):
        raise ValueError(_refusal(obstacles))

    # Everything that can fail is done before the first layer changes.
    replacements = {
        id(layer.module): _replacement(layer, init, value_act, backend) for layer in chosen
    }
    encoders = [
        encoder
        for encoder in model.modules()
        if isinstance(encoder, nn.TransformerEncoder)
        and any(id(inner) in replacements for inner in encoder.modules())
    ]
    places = [
        (parent, name, replacements[id(child)])
        for parent in model.modules()
        for name, child in parent._modules.items()
        if id(child) in replacements
    ]
    for encoder in encoders:
        encoder.use_nested_tensor = False  # its fast path would pack tokens for multi-head kernels
    for parent, name, new in places:
        parent._modules[name] = new
    return len(replacements)


@dataclass(frozen=True)
class _Layer:
    """An attention layer where it was found."""

    name: str
    module: Any
    parent: nn.Module | None
    family: _Family | None

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({qualified_name(type(self.module))})"


# The families ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """What convert knows of one attention class.

    Attributes:
        linears: names of the projections below the layer, the output's last.
        others: names of the other modules below it that may be there.
        parameters: names of the layer's own parameters.
        read: the projections of a layer.
        build: an uninitialised replacement, given the layer and the constructor's options.
        obstacle: what of the layer's own options cannot be kept, or None.
    """

    linears: tuple[str, ...]
    others: tuple[str, ...]
    parameters: tuple[str, ...]
    read: Callable[[Any], MultiHeadWeights]
    build: Callable[..., SeparableAttention]
    obstacle: Callable[[Any], str | None] = lambda module: None


def _packed(weight: Any, bias: Any) -> list[tuple[Any, Any]]:
    """Weight and bias of query, key and value out of one projection."""
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return list(zip(weight.chunk(3), biases, strict=True))


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or type(module) is nn.Identity


def _timm_weights(module: Any) -> MultiHeadWeights:
    norms = (getattr(module, "q_norm", None), getattr(module, "k_norm", None))
    return MultiHeadWeights.of(
        [*_packed(module.qkv.weight, module.qkv.bias), (module.proj.weight, module.proj.bias)],
        module.num_heads,
        normalized=not all(map(_is_identity, norms)),
    )


def _timm_build(module: Any, **options: Any) -> SeparableAttention:
    return TimmSeparableAttention(
        module.qkv.in_features, module.attn_drop.p, module.proj_drop.p, **options
    )


def _timm_obstacle(module: Any) -> str | None:
    if not _is_identity(getattr(module, "norm", None)):
        return "it normalises what goes into the output projection (scale_norm)"
    if getattr(module, "gate", None) is not None:
        return "it has a gate of its own (gated)"
    return None


def _hugging_face_weights(module: Any) -> MultiHeadWeights:
    projections = (module.q_proj, module.k_proj, module.v_proj, module.o_proj)
    return MultiHeadWeights.of(
        [(linear.weight, linear.bias) for linear in projections], module.num_attention_heads
    )


def _hugging_face_build(module: Any, **options: Any) -> SeparableAttention:
    return HuggingFaceSeparableAttention(
        module.q_proj.in_features, module.attention_dropout, **options
    )


def _hugging_face_obstacle(module: Any) -> str | None:
    if getattr(module.config, "output_attentions", False):
        return "its configuration sets output_attentions; separable attention has no N x N map"
    return None


def _mobilevit_weights(module: Any) -> MultiHeadWeights:
    inner = module.attention
    projections = (inner.query, inner.key, inner.value, module.output.dense)
    return MultiHeadWeights.of(
        [(linear.weight, linear.bias) for linear in projections], inner.num_attention_heads
    )


def _mobilevit_build(module: Any, **options: Any) -> SeparableAttention:
    return MobileViTSeparableAttention(
        module.attention.query.in_features,
        module.attention.dropout.p,
        module.output.dropout.p,
        **options,
    )


def _torch_weights(module: Any) -> MultiHeadWeights:
    return MultiHeadWeights.of(
        [
            *_packed(module.in_proj_weight, module.in_proj_bias),
            (module.out_proj.weight, module.out_proj.bias),
        ],
        module.num_heads,
    )


def _torch_build(module: Any, **options: Any) -> SeparableAttention:
    return SeparableMultiheadAttention(
        module.embed_dim,
        module.num_heads,
        module.dropout,
        batch_first=module.batch_first,
        **options,
    )


def _torch_obstacle(module: Any) -> str | None:
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return "it appends a token to keys and values (add_bias_kv, add_zero_attn)"
    if not module._qkv_same_embed_dim:
        return f"kdim={module.kdim} and vdim={module.vdim} are not embed_dim={module.embed_dim}"
    return None


_HUGGING_FACE_VIT = _Family(
    linears=("q_proj", "k_proj", "v_proj", "o_proj"),
    others=(),
    parameters=(),
    read=_hugging_face_weights,
    build=_hugging_face_build,
    obstacle=_hugging_face_obstacle,
)
_FAMILIES: dict[str, _Family] = {
    "timm.layers.attention.Attention": _Family(
        linears=("qkv", "proj"),
        others=("q_norm", "k_norm", "norm", "attn_drop", "proj_drop"),
        parameters=(),
        read=_timm_weights,
        build=_timm_build,
        obstacle=_timm_obstacle,
    ),
    "transformers.models.vit.modeling_vit.ViTAttention": _HUGGING_FACE_VIT,
    "transformers.models.deit.modeling_deit.DeiTAttention": _HUGGING_FACE_VIT,
    "transformers.models.mobilevit.modeling_mobilevit.MobileViTAttention": _Family(
        linears=("attention.query", "attention.key", "attention.value", "output.dense"),
        others=("attention", "attention.dropout", "output", "output.dropout"),
        parameters=(),
        read=_mobilevit_weights,
        build=_mobilevit_build,
    ),
    "torch.nn.modules.activation.MultiheadAttention": _Family(
        linears=("out_proj",),
        others=(),
        parameters=("in_proj_weight", "in_proj_bias"),
        read=_torch_weights,
        build=_torch_build,
        obstacle=_torch_obstacle,
    ),
}
# Older timm defines the class beside its ViT.
_FAMILIES["timm.models.vision_transformer.Attention"] = _FAMILIES["timm.layers.attention.Attention"]

# Finding them ------------------------------------------------------------------------------------

_LOOKS_LIKE_ATTENTION = re.compile(r"(Attention|Attn)(V?\d\w*|Cl|Rope)?$")
_OTHER_ATTENTION = {
    "timm.layers.attention.AttentionRope": "it rotates queries and keys by position",
    "timm.models.eva.EvaAttention": "its queries and keys carry relative positions",
    "timm.models.vision_transformer.ParallelScalingBlock": "one projection serves it and the MLP",
    "timm.models.vision_transformer.DiffParallelScalingBlock": (
        "one projection serves it and the MLP"
    ),
}
_SEPARABLE_ALREADY = (
    "timm.models.mobilevit.LinearSelfAttention",
    "transformers.models.mobilevitv2.modeling_mobilevitv2.MobileViTV2LinearSelfAttention",
)
_WRAPPERS = (
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
)


def _is_separable(module: nn.Module) -> bool:
    names = {qualified_name(cls) for cls in type(module).__mro__}
    return isinstance(module, SeparableAttention) or not names.isdisjoint(_SEPARABLE_ALREADY)


def _family_class(module: nn.Module) -> type | None:
    return next((cls for cls in type(module).__mro__ if qualified_name(cls) in _FAMILIES), None)


def _walk(
    module: nn.Module, name: str, parent: nn.Module | None, seen: set[int]
) -> Iterator[_Layer]:
    """The attention layers at and below ``module``, each once, parents before children."""
    if id(module) in seen or _is_separable(module):
        return
    seen.add(id(module))
    cls = _family_class(module)
    if cls is not None:
        yield _Layer(name, module, parent, _FAMILIES[qualified_name(cls)])
        return
    inner = [
        layer
        for child_name, child in module.named_children()
        for layer in _walk(child, f"{name}.{child_name}" if name else child_name, module, seen)
    ]
    unknown = qualified_name(type(module)) in _OTHER_ATTENTION or (
        _LOOKS_LIKE_ATTENTION.search(type(module).__name__) is not None
        and any(True for _ in module.parameters())
    )
    # What is only called so, round layers that were found or converted, is no further layer.
    if unknown and not inner and not any(map(_is_separable, module.modules())):
        yield _Layer(name, module, parent, None)
    yield from inner


def _attention_layers(model: nn.Module) -> list[_Layer]:
    return list(_walk(model, "", None, set()))


def _refusal(obstacles: list[tuple[_Layer, str | None]]) -> str:
    """Layers of one class with one reason share a line, on which the first three are named."""
    names: dict[str, list[str]] = {}
    for layer, reason in obstacles:
        if reason is not None:
            why = f"({qualified_name(type(layer.module))}): {reason}"
            names.setdefault(why, []).append(layer.name or "the model")
    lines = [
        f"  {', '.join(found[:3])}{f' and {len(found) - 3} more' * (len(found) > 3)} {why}"
        for why, found in names.items()
    ]
    return "\n".join(
        (
            "nothing was converted, because of",
            *lines,
            "A filter that returns False for a layer leaves it as it is.",
        )
    )


def _refuse_nothing(model: nn.Module, found: list[_Layer], chosen: list[_Layer]) -> None:
    if chosen:
        return
    if found:
        raise ValueError(f"filter returned False for {', '.join(map(str, found))}")
    if any(isinstance(module, SeparableAttention) for module in model.modules()):
        raise ValueError("nothing to convert: the model's attention is separable already")
    if any(_is_separable(module) for module in model.modules()):
        raise ValueError(
            "nothing to convert: the model's attention is separable; "
            "sep_attn.patch serves it with the same weights"
        )
    classes = sorted({type(module).__name__ for module in model.modules()})
    raise ValueError(
        f"nothing to convert: expected a model with {' or '.join(_FAMILIES)}, "
        f"found only {', '.join(classes)}"
    )


# What stands in the way --------------------------------------------------------------------------


def _obstacle(layer: _Layer, model: nn.Module) -> str | None:
    """Why ``layer`` cannot be converted; None where it can."""
    module, family = layer.module, layer.family
    if family is None:
        return _unknown(module)
    if layer.parent is None:
        return "a model cannot replace itself: put it into another module, such as nn.Sequential"
    return (
        family.obstacle(module)
        or _altered(module, family)
        or _causal(module, model)
        or _unusual_parameters(module, family)
        or _tied(module, model)
        or _unusual_sizes(module, family)
    )


def _unknown(module: nn.Module) -> str:
    if reason := _OTHER_ATTENTION.get(qualified_name(type(module))):
        return reason
    own = [*vars(module), *module._modules, *module._parameters, *module._buffers]
    if position := [name for name in own if re.search("rel_?pos|relative_pos|rope|rotary", name)]:
        return f"its scores depend on relative positions ({position[0]})"
    if getattr(module, "is_causal", False):
        return "it is causal"
    return "convert does not know this attention"


def _altered(module: Any, family: _Family) -> str | None:
    """What a user or another library changed of the layer that its class makes."""
    cls = _family_class(module)
    assert cls is not None
    if type(module) is not cls and not is_parametrized(module):
        return f"its class derives from {qualified_name(cls)}, and may compute something else"
    children = dict(module.named_modules())
    for name, child in children.items():
        where = "it" if child is module else name
        if is_parametrized(child):
            return f"{where} is parametrised: remove the parametrisation first"
        if "forward" in vars(child):
            return f"{where} has a forward of its own"
        if getattr(child, "_compiled_call_impl", None) is not None:
            return f"{where} is compiled: convert before compiling"
        if child is not module and _has(child, _CALL_HOOKS):
            return f"{where} has hooks, and will be gone"
        if _has(child, _STATE_HOOKS):
            return f"{where} has hooks on its state dict, whose keys change"
    for name in family.linears:
        linear = children.get(name)
        if linear is None:
            return f"it has no child {name}, as its class makes in the versions that convert knows"
        if type(linear) not in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return (
                f"{name} is a {qualified_name(type(linear))}, expected a plain nn.Linear: "
                "convert before quantising, sharding or adding adapters"
            )
    known = {"", *family.linears, *family.others}
    for name, child in children.items():
        if name not in known and not any(
            name.startswith(f"{norm}.") for norm in ("q_norm", "k_norm")
        ):
            return f"it has a child {name} that convert does not know"
        if isinstance(child, nn.Dropout) and child.p == 1.0:
            return f"{name} drops everything"
    if getattr(module, "attention_dropout", 0.0) == 1.0 or getattr(module, "dropout", 0.0) == 1.0:
        return "its dropout drops everything"
    return None


_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _has(module: nn.Module, hooks: tuple[str, ...]) -> bool:
    return any(getattr(module, name, None) for name in hooks)


def _causal(module: nn.Module, model: nn.Module) -> str | None:
    if getattr(module, "is_causal", False):
        return "it is causal"
    for parent in model.modules():
        if not any(child is module for child in parent.children()):
            continue
        if isinstance(parent, nn.TransformerDecoderLayer) and parent.self_attn is module:
            return "the self-attention of a decoder is causal"
        if getattr(parent, "attn_mask", None) is not None:
            return "the module round it holds an attn_mask; only key padding masks can be kept"
    return None


def _unusual_parameters(module: nn.Module, family: _Family) -> str | None:
    parameters = list(module.named_parameters())
    for name, parameter in parameters:
        if hasattr(parameter, "device_mesh"):
            return f"{name} is sharded ({type(parameter).__name__}): convert before sharding"
        if type(parameter) is not nn.Parameter:
            return (
                f"{name} is a {type(parameter).__name__}, expected a plain nn.Parameter: "
                "convert before quantising"
            )
        if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"{name} has dtype {parameter.dtype}: convert before quantising"
    if buffers := [name for name, _ in module.named_buffers()]:
        return f"it has a buffer {buffers[0]} that convert does not know"
    for name, parameter in module._parameters.items():
        if parameter is not None and name not in family.parameters:
            return f"it has a parameter {name} that convert does not know"
    for what in ("device", "dtype"):
        if len({getattr(parameter, what) for _, parameter in parameters}) > 1:
            return f"its parameters differ in {what}"
    return None


def _tied(module: nn.Module, model: nn.Module) -> str | None:
    """A parameter that another module has too: the tie would be lost."""
    own = {id(child) for child in module.modules()}
    mine = {id(parameter): name for name, parameter in module.named_parameters()}
    for name, other in model.named_modules():
        if id(other) in own:
            continue
        for kind, parameter in other._parameters.items():
            if id(parameter) in mine:
                return (
                    f"its parameter {mine[id(parameter)]} is also {name}.{kind}, a tie that "
                    "cannot be kept: share the module, or untie"
                )
    return None


def _unusual_sizes(module: Any, family: _Family) -> str | None:
    weights = family.read(module)
    dim = weights.value_weight.shape[-1]
    for kind in ("query", "key", "value", "out"):
        shape = tuple(getattr(weights, f"{kind}_weight").shape)
        if shape != (dim, dim):
            return f"its {kind} projection is {list(shape)}, expected [{dim}, {dim}]"
    return None


# Making the new ones -----------------------------------------------------------------------------


def _replacement(layer: _Layer, init: str, value_act: str, backend: str) -> SeparableAttention:
    module, family = layer.module, layer.family
    assert family is not None
    old = family.read(module)
    new = family.build(module, value_act=value_act, backend=backend, device="meta")
    new.to(old.value_weight.dtype).to_empty(device=old.value_weight.device)
    initialize(new, old, init)
    old_out = module.get_submodule(family.linears[-1])
    inputs = {id(each) for each in module.parameters()} - {
        id(each) for each in old_out.parameters()
    }
    new.out_proj.requires_grad_(old_out.weight.requires_grad)
    new.qkv_proj.requires_grad_(
        any(each.requires_grad for each in module.parameters() if id(each) in inputs)
    )
    new.train(module.training)
    for name in _CALL_HOOKS:  # the same objects, so that handles can still remove their hooks
        if hasattr(module, name):
            setattr(new, name, getattr(module, name))
    new._is_full_backward_hook = module._is_full_backward_hook
    return new
