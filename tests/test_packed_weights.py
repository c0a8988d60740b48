"""Packed weights kept between calls: used while they fit, made anew after any change."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sep_attn import SeparableAttention, functional, native

DIM = 40  # two panels or more in every instruction set, the last one not full
CAPABILITIES = [] if native.unavailable_reason() is not None else native.capabilities()
TOKENS = 96  # more than DIM: fewer tokens need no packed weights

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason="the C++ kernels are not built"
)


def make_layer(dtype: torch.dtype = torch.float32, **options: bool) -> SeparableAttention:
    torch.manual_seed(0)
    return SeparableAttention(DIM, dtype=dtype, **options).eval()


def make_tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, TOKENS, DIM, dtype=dtype)


def fresh(layer: SeparableAttention, x: Tensor) -> Tensor:
    """The result from the weights as they are now, nothing kept."""
    qkv_proj, out_proj = layer.qkv_proj, layer.out_proj
    return functional.separable_attention(
        x, qkv_proj.weight, qkv_proj.bias, out_proj.weight, out_proj.bias
    )


def packed_memory(layer: SeparableAttention) -> Tensor | None:
    return layer._packed_weights.memory


def optimizer_step(layer: SeparableAttention) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    with torch.enable_grad():
        layer(make_tokens()).square().sum().backward()
    optimizer.step()


def swap_two_values(layer: SeparableAttention) -> None:
    weight = layer.out_proj.weight.data
    weight[3, 5], weight[3, 21] = weight[3, 21].clone(), weight[3, 5].clone()


def replace_parameter(layer: SeparableAttention) -> None:
    layer.out_proj.weight = nn.Parameter(torch.randn(DIM, DIM))


def replace_child(layer: SeparableAttention) -> None:
    layer.out_proj = nn.Linear(DIM, DIM)


def replace_data(layer: SeparableAttention) -> None:
    layer.qkv_proj.weight.data = torch.randn(1 + 2 * DIM, DIM)


def replace_data_with_transposed(layer: SeparableAttention) -> None:
    layer.out_proj.weight.data = torch.randn(DIM, DIM).t()


def write_through_numpy(layer: SeparableAttention) -> None:
    layer.out_proj.weight.detach().numpy()[DIM - 1, DIM - 1] += 1.0


def load_other_weights(layer: SeparableAttention) -> None:
    torch.manual_seed(1)
    layer.load_state_dict(SeparableAttention(DIM).state_dict())


def assign_other_weights(layer: SeparableAttention) -> None:
    torch.manual_seed(1)
    layer.load_state_dict(SeparableAttention(DIM).state_dict(), assign=True)


def parametrize_weight(layer: SeparableAttention) -> None:
    nn.utils.parametrizations.weight_norm(layer.out_proj)
    layer.out_proj.parametrizations.weight.original0.data.mul_(2.0)


def fill_from_vector(layer: SeparableAttention) -> None:
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(vector * 1.5, layer.parameters())


CHANGES: dict[str, Callable[[SeparableAttention], object]] = {
    "optimizer": optimizer_step,
    "mul_": lambda layer: layer.out_proj.weight.mul_(2.0),
    "copy_": lambda layer: layer.qkv_proj.weight.copy_(torch.randn(1 + 2 * DIM, DIM)),
    ".data.mul_": lambda layer: layer.out_proj.weight.data.mul_(2.0),
    ".data.neg_": lambda layer: layer.out_proj.weight.data.neg_(),
    ".data, the sign of the values": lambda layer: layer.qkv_proj.weight.data[1 + DIM :].neg_(),
    ".data, one value": lambda layer: layer.out_proj.weight.data[0, 0].add_(1.0),
    ".data, the last value": lambda layer: layer.qkv_proj.weight.data[-1, -1].add_(1.0),
    ".data, two values swapped": swap_two_values,
    ".data, rows swapped": lambda layer: layer.out_proj.weight.data.copy_(
        layer.out_proj.weight.data.flip(0)
    ),
    ".data =": replace_data,
    ".data = transposed": replace_data_with_transposed,
    "numpy": write_through_numpy,
    "load_state_dict": load_other_weights,
    "load_state_dict(assign=True)": assign_other_weights,
    "a new parameter": replace_parameter,
    "a new child": replace_child,
    "a parametrization": parametrize_weight,
    "vector_to_parameters": fill_from_vector,
    "biases": lambda layer: layer.qkv_proj.bias.data.add_(1.0),
    "score and key rows": lambda layer: layer.qkv_proj.weight.data[: 1 + DIM].mul_(3.0),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_every_change_of_the_weights_is_seen(change: str) -> None:
    layer, x = make_layer(), make_tokens()
    before = layer(x)
    assert torch.equal(before, layer(x))
    CHANGES[change](layer)
    after = layer(x)
    assert torch.equal(after, fresh(layer, x))
    assert not torch.equal(after, before)
    assert torch.equal(after, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", CAPABILITIES)
@torch.no_grad()
def test_kept_weights_are_used(dtype: torch.dtype, capability: str) -> None:
    used = native.capability()
    try:
        native.set_capability(capability)
        layer, x = make_layer(dtype), make_tokens(dtype)
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


@torch.no_grad()
def test_another_instruction_set_packs_anew() -> None:
    used = native.capability()
    layer, x = make_layer(), make_tokens()
    try:
        for name in (*native.capabilities(), *reversed(native.capabilities())):
            native.set_capability(name)
            assert torch.equal(layer(x), fresh(layer, x))
    finally:
        native.set_capability(used)


def test_nothing_is_kept_in_training() -> None:
    layer, x = make_layer(), make_tokens()
    with torch.no_grad():
        layer(x)
    assert packed_memory(layer) is not None
    layer.train()
    assert packed_memory(layer) is None
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)
    assert packed_memory(layer) is None


@torch.no_grad()
def test_gradients_take_the_long_way() -> None:
    layer, x = make_layer(), make_tokens()
    layer(x)
    with torch.enable_grad():
        out = layer(x)
    assert out.requires_grad


@torch.no_grad()
def test_state_dict_pickle_and_deepcopy_hold_none_of_it() -> None:
    layer, x = make_layer(), make_tokens()
    sizes = []
    for _ in range(2):
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        sizes.append(buffer.tell())
        layer(x)
    assert sizes[0] == sizes[1]
    assert list(layer.state_dict()) == [
        "qkv_proj.weight",
        "qkv_proj.bias",
        "out_proj.weight",
        "out_proj.bias",
    ]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert packed_memory(other) is None
        other.out_proj.weight.data.mul_(2.0)
        assert torch.equal(other(x), fresh(other, x))
        assert torch.equal(layer(x), fresh(layer, x))
        assert packed_memory(other).data_ptr() != packed_memory(layer).data_ptr()
    assert torch.equal(copy.copy(layer)(x), layer(x))


@torch.no_grad()
def test_conversion_releases_it() -> None:
    layer, x = make_layer(), make_tokens()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        layer(x.to(next(layer.parameters()).dtype))
        layer.to(dtype)
        assert packed_memory(layer) is None
        assert torch.equal(layer(x.to(dtype)), fresh(layer, x.to(dtype)))


@torch.no_grad()
def test_functional_call_uses_the_weights_it_is_given() -> None:
    layer, x = make_layer(), make_tokens()
    layer(x)
    other = {name: 2 * value for name, value in layer.state_dict().items()}
    out = torch.func.functional_call(layer, other, (x,))
    doubled = make_layer()
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
