"""Packed weights kept between calls: used while they fit, made anew after any change.

By a layer of this package, and by timm's and Hugging Face's layers once they are patched."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sep_attn import SeparableAttention, functional, native, patch, unpatch

DIM = 40  # two panels or more in every instruction set, the last one not full
CAPABILITIES = [] if native.unavailable_reason() is not None else native.capabilities()
TOKENS = 96  # more than DIM: fewer tokens need no packed weights

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason="the C++ kernels are not built"
)


def make_layer(dtype: torch.dtype = torch.float32, **options: bool) -> SeparableAttention:
    torch.manual_seed(0)
    return SeparableAttention(DIM, dtype=dtype, **options).eval()


def make_unpatched(library: str) -> Any:
    models = pytest.importorskip("benchmarks.models", reason="only in the repository")
    return getattr(models, f"{library}_attention")(DIM).eval()


def make_patched(library: str, dtype: torch.dtype = torch.float32) -> Any:
    layer = make_unpatched(library).to(dtype)
    patch(layer)
    return layer


KINDS: dict[str, Callable[..., Any]] = {
    "module": make_layer,
    "timm": functools.partial(make_patched, "timm"),
    "hugging_face": functools.partial(make_patched, "hugging_face"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make_tokens(dtype: torch.dtype = torch.float32, kind: str = "module") -> Tensor:
    if kind == "module":
        return torch.randn(2, TOKENS, DIM, dtype=dtype)
    x = torch.randn(2, DIM, 4, TOKENS, dtype=dtype)
    return x.to(memory_format=torch.channels_last)  # where tokens are contiguous, nothing is packed


def projection(layer: Any, name: str) -> Any:
    """``qkv_proj`` or ``out_proj``; Hugging Face wraps the convolution."""
    child = getattr(layer, name)
    return getattr(child, "convolution", child)


def fresh(layer: Any, x: Tensor) -> Tensor:
    """The result from the weights as they are now, nothing kept."""
    qkv_proj, out_proj = projection(layer, "qkv_proj"), projection(layer, "out_proj")
    return functional.separable_attention(
        x, qkv_proj.weight.flatten(1), qkv_proj.bias, out_proj.weight.flatten(1), out_proj.bias
    )


def packed_memory(layer: Any) -> Tensor | None:
    packed = layer._packed_weights if hasattr(layer, "_packed_weights") else layer._sep_attn.packed
    return packed.memory


def optimizer_step(layer: Any, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    with torch.enable_grad():
        layer(x).square().sum().backward()
    optimizer.step()


def swap_two_values(layer: Any, x: Tensor) -> None:
    weight = projection(layer, "out_proj").weight.data
    weight[3, 5], weight[3, 21] = weight[3, 21].clone(), weight[3, 5].clone()


def drawn_like(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.randn_like(weight))


def replace_parameter(layer: Any, x: Tensor) -> None:
    out_proj = projection(layer, "out_proj")
    out_proj.weight = drawn_like(out_proj.weight)


def replace_child(layer: Any, x: Tensor) -> None:
    child = copy.deepcopy(layer.out_proj)
    for parameter in child.parameters():
        parameter.data.normal_()
    layer.out_proj = child


def replace_data(layer: Any, x: Tensor) -> None:
    weight = projection(layer, "qkv_proj").weight
    weight.data = torch.randn_like(weight)


def replace_data_with_transposed(layer: Any, x: Tensor) -> None:
    weight = projection(layer, "out_proj").weight
    weight.data = torch.randn_like(weight).transpose(0, 1)


def write_through_numpy(layer: Any, x: Tensor) -> None:
    projection(layer, "out_proj").weight.detach().numpy()[DIM - 1, DIM - 1] += 1.0


def other_state(layer: Any) -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in layer.state_dict().items()}


def parametrize_weight(layer: Any, x: Tensor) -> None:
    out_proj = projection(layer, "out_proj")
    nn.utils.parametrizations.weight_norm(out_proj)
    out_proj.parametrizations.weight.original0.data.mul_(2.0)


def fill_from_vector(layer: Any, x: Tensor) -> None:
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(vector * 1.5, layer.parameters())


def in_weight(name: str, change: Callable[[Tensor], object]) -> Callable[[Any, Tensor], object]:
    return lambda layer, x: change(projection(layer, name).weight)


CHANGES: dict[str, Callable[[Any, Tensor], object]] = {
    "optimizer": optimizer_step,
    "mul_": in_weight("out_proj", lambda weight: weight.mul_(2.0)),
    "copy_": in_weight("qkv_proj", lambda weight: weight.copy_(torch.randn_like(weight))),
    ".data.mul_": in_weight("out_proj", lambda weight: weight.data.mul_(2.0)),
    ".data.neg_": in_weight("out_proj", lambda weight: weight.data.neg_()),
    ".data, the sign of the values": in_weight(
        "qkv_proj", lambda weight: weight.data[1 + DIM :].neg_()
    ),
    ".data, one value": in_weight("out_proj", lambda weight: weight.data[0, 0].add_(1.0)),
    ".data, the last value": in_weight("qkv_proj", lambda weight: weight.data[-1, -1].add_(1.0)),
    ".data, two values swapped": swap_two_values,
    ".data, rows swapped": in_weight(
        "out_proj", lambda weight: weight.data.copy_(weight.data.flip(0))
    ),
    ".data =": replace_data,
    ".data = transposed": replace_data_with_transposed,
    "numpy": write_through_numpy,
    "load_state_dict": lambda layer, x: layer.load_state_dict(other_state(layer)),
    "load_state_dict(assign=True)": lambda layer, x: layer.load_state_dict(
        other_state(layer), assign=True
    ),
    "a new parameter": replace_parameter,
    "a new child": replace_child,
    "a parametrization": parametrize_weight,
    "vector_to_parameters": fill_from_vector,
    "biases": lambda layer, x: projection(layer, "qkv_proj").bias.data.add_(1.0),
    "score and key rows": in_weight("qkv_proj", lambda weight: weight.data[: 1 + DIM].mul_(3.0)),
}


@each_kind
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_every_change_of_the_weights_is_seen(change: str, kind: str) -> None:
    layer, x = KINDS[kind](), make_tokens(kind=kind)
    before = layer(x)
    assert packed_memory(layer) is not None
    assert torch.equal(before, layer(x))
    CHANGES[change](layer, x)
    after = layer(x)
    assert torch.equal(after, fresh(layer, x))
    assert not torch.equal(after, before)
    assert torch.equal(after, layer(x))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", CAPABILITIES)
@torch.no_grad()
def test_kept_weights_are_used(dtype: torch.dtype, capability: str, kind: str) -> None:
    used = native.capability()
    try:
        native.set_capability(capability)
        layer, x = KINDS[kind](dtype=dtype), make_tokens(dtype, kind)
        out = layer(x)
        memory = packed_memory(layer)
        assert memory is not None
        kept = memory.clone()
        assert torch.equal(layer(x), out)
        assert torch.equal(memory, kept)
        assert torch.equal(out, fresh(layer, x))
        memory[-DIM * memory.element_size() * 64 :] = 0  # the last panel: not packed again
        assert not torch.equal(layer(x), out)
    finally:
        native.set_capability(used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_another_instruction_set_packs_anew(dtype: torch.dtype) -> None:
    used, x = native.capability(), make_tokens(dtype)
    try:
        for first in native.capabilities():  # which asks for the memory
            native.set_capability(first)
            layer = make_layer(dtype)
            layer(x)
            for name in (*native.capabilities(), *reversed(native.capabilities())):
                native.set_capability(name)
                assert torch.equal(layer(x), fresh(layer, x))
    finally:
        native.set_capability(used)


@each_kind
def test_nothing_is_kept_in_training(kind: str) -> None:
    layer, x = KINDS[kind](), make_tokens(kind=kind)
    with torch.no_grad():
        layer(x)
    assert packed_memory(layer) is not None
    assert layer.train() is layer and layer.training
    assert packed_memory(layer) is None
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)
    assert packed_memory(layer) is None


@each_kind
def test_a_frozen_layer_keeps_its_weights_with_gradients_enabled_too(kind: str) -> None:
    layer, x = KINDS[kind]().requires_grad_(False), make_tokens(kind=kind)
    out = layer(x)
    assert packed_memory(layer) is not None and not out.requires_grad
    assert torch.equal(out, fresh(layer, x))
    assert layer(x.requires_grad_()).requires_grad  # the input's


@each_kind
@torch.no_grad()
def test_gradients_take_the_long_way(kind: str) -> None:
    layer, x = KINDS[kind](), make_tokens(kind=kind)
    layer(x)
    with torch.enable_grad():
        out = layer(x)
    assert out.requires_grad


@each_kind
@torch.no_grad()
def test_state_dict_pickle_and_deepcopy_hold_none_of_it(kind: str) -> None:
    layer, x = KINDS[kind](), make_tokens(kind=kind)
    names, sizes = list(layer.state_dict()), []
    for _ in range(2):
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        sizes.append(buffer.tell())
        layer(x)
    assert sizes[0] == sizes[1]
    assert list(layer.state_dict()) == names and len(names) == 4
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert packed_memory(other) is None
        projection(other, "out_proj").weight.data.mul_(2.0)
        assert torch.equal(other(x), fresh(other, x))
        assert torch.equal(layer(x), fresh(layer, x))
        assert packed_memory(other).data_ptr() != packed_memory(layer).data_ptr()
        other.train()
        assert packed_memory(other) is None and packed_memory(layer) is not None
        assert other.training and not layer.training
    assert torch.equal(copy.copy(layer)(x), layer(x))


@each_kind
@torch.no_grad()
def test_conversion_releases_it(kind: str) -> None:
    layer, x = KINDS[kind](), make_tokens(kind=kind)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        layer(x.to(next(layer.parameters()).dtype))
        layer.to(dtype)
        assert packed_memory(layer) is None
        assert torch.equal(layer(x.to(dtype)), fresh(layer, x.to(dtype)))


@each_kind
@torch.no_grad()
def test_functional_call_uses_the_weights_it_is_given(kind: str) -> None:
    layer, x = KINDS[kind](), make_tokens(kind=kind)
    layer(x)
    other = {name: 2 * value for name, value in layer.state_dict().items()}
    out = torch.func.functional_call(layer, other, (x,))
    doubled = KINDS[kind]()
    doubled.load_state_dict(other)
    assert torch.equal(out, fresh(doubled, x))
    assert torch.equal(layer(x), fresh(layer, x))


@torch.no_grad()
def test_two_threads_at_once() -> None:
    layer, x = make_layer(), make_tokens()
    expected = fresh(layer, x)
    wrong: list[int] = []

    def call(index: int) -> None:
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(layer(x), expected):
                    wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_errors_are_those_of_the_long_way() -> None:
    layer = make_layer()
    layer(make_tokens())
    with pytest.raises(ValueError, match=r"\[1, 4, 41\]|41"):
        layer(torch.randn(1, 4, DIM + 1))
    with pytest.raises(TypeError, match="float64"):
        layer(make_tokens(torch.float64))
    with pytest.raises(ValueError, match="no tokens"):
        layer(torch.randn(2, 0, DIM))
    with pytest.raises(TypeError):
        layer(None)
    assert layer(torch.randn(0, 5, DIM)).shape == (0, 5, DIM)


@torch.inference_mode()
def test_memory_made_in_inference_mode_serves_outside() -> None:
    layer, x = make_layer(), make_tokens()
    expected = layer(x)
    with torch.inference_mode(False), torch.no_grad():
        assert torch.equal(layer(x.clone()), expected)


@torch.no_grad()
def test_the_same_bits_in_another_type_are_packed_anew() -> None:
    layer, x = make_layer(torch.bfloat16), make_tokens(torch.float16)
    layer(x.to(torch.bfloat16))
    for parameter in layer.parameters():
        parameter.data = parameter.data.view(torch.float16)
    assert torch.equal(layer(x), fresh(layer, x))


@each_kind
@torch.no_grad()
def test_parameters_on_meta_are_refused(kind: str) -> None:
    layer, x = KINDS[kind](), make_tokens(kind=kind)
    for name in ("bias", "weight"):
        own = getattr(projection(layer, "out_proj"), name)
        setattr(projection(layer, "out_proj"), name, nn.Parameter(own.to("meta")))
        with pytest.raises(ValueError, match=f"out_{name} is on meta but x is on cpu"):
            layer(x)


@pytest.mark.parametrize("weight", [None, nn.Parameter(torch.ones(DIM))], ids=["none", "vector"])
@torch.no_grad()
def test_weights_of_no_layer_are_refused(weight: nn.Parameter | None) -> None:
    layer, x = make_layer(), make_tokens()
    layer.qkv_proj.weight = weight
    with pytest.raises((TypeError, ValueError), match="qkv_weight"):
        layer(x)


@pytest.mark.parametrize("library", ["timm", "hugging_face"])
@torch.no_grad()
def test_unpatching_leaves_none_of_it(library: str) -> None:
    layer, x = make_unpatched(library), make_tokens(kind=library)
    attributes, expected = set(vars(layer)), layer(x)
    for _ in range(2):
        patch(layer)
    layer(x)
    assert packed_memory(layer) is not None
    unpatch(layer)
    assert set(vars(layer)) == attributes
    assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_a_patched_layer_keeps_the_train_it_was_given() -> None:
    layer, calls = make_unpatched("timm"), []

    def frozen(mode: bool = True) -> nn.Module:
        calls.append(mode)
        return layer

    layer.train = frozen
    patch(layer)
    nn.Sequential(layer).train()
    unpatch(layer)
    assert calls == [True] and layer.train is frozen and not layer.training
