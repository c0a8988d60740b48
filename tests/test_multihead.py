"""SeparableMultiheadAttention: nn.MultiheadAttention's interface round eq. 3."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sep_attn import SeparableAttention, SeparableMultiheadAttention, reference

DIM, HEADS, BATCH, LENGTH = 24, 3, 2, 11


def build(device: torch.device | str = "cpu", **options: object) -> SeparableMultiheadAttention:
    options.setdefault("batch_first", True)
    layer = SeparableMultiheadAttention(DIM, HEADS, device=device, **options)
    with torch.no_grad():  # the biases start at zero, where a lost one would not show
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.5)
    return layer


def expected(layer: SeparableAttention, x: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Output and weights ``[B, S]`` of the reference, in float64."""
    weights = (layer.qkv_proj.weight, layer.qkv_proj.bias, layer.out_proj.weight)
    if isinstance(options.get("x_prev"), Tensor):
        options["x_prev"] = options["x_prev"].double()
    return reference.separable_attention(
        x.double(),
        *(None if each is None else each.double() for each in (*weights, layer.out_proj.bias)),
        value_act=layer.value_act,
        need_weights=True,
        **options,
    )


def close(result: Tensor, oracle: Tensor) -> None:
    torch.testing.assert_close(result.double(), oracle, atol=1e-5, rtol=1e-5)


def test_signatures_are_those_of_multihead_attention() -> None:
    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(nn.MultiheadAttention, method)).parameters
        ours = inspect.signature(getattr(SeparableMultiheadAttention, method)).parameters
        shared = {name: ours[name] for name in theirs}
        assert list(ours)[: len(theirs)] == list(theirs)
        for name, parameter in theirs.items():
            assert shared[name].default == parameter.default, name
            assert shared[name].kind == parameter.kind, name
        assert all(
            ours[name].kind == inspect.Parameter.KEYWORD_ONLY for name in ours.keys() - theirs
        )


def test_attributes_that_other_code_reads() -> None:
    theirs = nn.MultiheadAttention(DIM, HEADS, 0.1, batch_first=True)
    ours = SeparableMultiheadAttention(DIM, HEADS, 0.1, batch_first=True)
    for name in ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "batch_first"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("bias_k", "bias_v", "add_zero_attn"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.in_proj_weight is None and ours.in_proj_bias is None
    ours.dropout = 0.0
    assert ours.attn_drop.p == 0.0
    assert "num_heads=3" in repr(ours)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("value_act", ["relu", "identity"])
def test_self_attention(device: torch.device, batch_first: bool, value_act: str) -> None:
    layer = build(device, batch_first=batch_first, value_act=value_act)
    x = torch.randn(BATCH, LENGTH, DIM, device=device)
    given = x if batch_first else x.transpose(0, 1).contiguous()
    out, weights = layer(given, given, given)
    oracle, oracle_weights = expected(layer, x)
    close(out if batch_first else out.transpose(0, 1), oracle)
    assert out.shape == given.shape and out.is_contiguous()
    close(weights, oracle_weights[:, None].expand(-1, LENGTH, -1))


def test_gradients_of_the_sequence_first_layout(device: torch.device) -> None:
    layer = build(device, batch_first=False)
    other = copy.deepcopy(layer)
    other.batch_first = True
    x = torch.randn(LENGTH, BATCH, DIM, device=device)
    direction = torch.randn_like(x)
    first, second = (each.clone().requires_grad_() for each in (x, x.transpose(0, 1)))
    (layer(first, first, first)[0] * direction).sum().backward()
    (other(second, second, second)[0] * direction.transpose(0, 1)).sum().backward()
    torch.testing.assert_close(first.grad.transpose(0, 1), second.grad)
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention(device: torch.device, batch_first: bool) -> None:
    layer = build(device, batch_first=batch_first)
    x = torch.randn(BATCH, LENGTH, DIM, device=device)
    memory = torch.randn(BATCH, 7, DIM, device=device)
    query, key = (x, memory) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1))
    out, weights = layer(query, key, key)
    oracle, oracle_weights = expected(layer, x, x_prev=memory)
    close(out if batch_first else out.transpose(0, 1), oracle)
    close(weights, oracle_weights[:, None].expand(-1, LENGTH, -1))


def test_unbatched(device: torch.device) -> None:
    layer = build(device, batch_first=False)
    x, memory = torch.randn(LENGTH, DIM, device=device), torch.randn(7, DIM, device=device)
    mask = torch.arange(7, device=device) > 4
    out, weights = layer(x, memory, memory, key_padding_mask=mask)
    oracle, oracle_weights = expected(
        layer, x[None], x_prev=memory[None], key_padding_mask=mask[None]
    )
    close(out, oracle[0])
    close(weights, oracle_weights.expand(LENGTH, -1))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_shapes_are_those_of_multihead_attention(
    batched: bool, average: bool, need_weights: bool, batch_first: bool
) -> None:
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
    ours = SeparableMultiheadAttention(DIM, HEADS, batch_first=batch_first)
    middle = () if not batched else (BATCH,)
    shape, key_shape = (LENGTH, *middle, DIM), (7, *middle, DIM)
    query, key = torch.randn(shape), torch.randn(key_shape)
    if batched and batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    options = {"need_weights": need_weights, "average_attn_weights": average}
    wanted, got = (layer(query, key, key, **options) for layer in (theirs, ours))
    assert isinstance(got, tuple) and got[0].shape == wanted[0].shape
    assert (got[1] is None) == (wanted[1] is None)
    if need_weights:
        assert got[1].shape == wanted[1].shape
        torch.testing.assert_close(got[1].sum(-1), torch.ones_like(got[1].sum(-1)))


@pytest.mark.parametrize("average", [True, False])
def test_empty_batch(device: torch.device, average: bool) -> None:
    x = torch.randn(0, LENGTH, DIM, device=device)
    out, weights = build(device)(x, x, x, average_attn_weights=average)
    assert out.shape == x.shape
    assert weights.shape == (0, *(() if average else (HEADS,)), LENGTH, LENGTH)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])
@pytest.mark.parametrize("never", [float("-inf"), torch.finfo(torch.float32).min])
def test_key_padding_mask(device: torch.device, dtype: torch.dtype, never: float) -> None:
    layer, x = build(device), torch.randn(BATCH, LENGTH, DIM, device=device)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool, device=device)
    padding[0, 7:] = True
    padding[1] = True  # nothing left
    mask = padding if dtype == torch.bool else torch.zeros_like(x[..., 0], dtype=dtype)
    if dtype != torch.bool:
        mask = mask.masked_fill(padding, never)
    out, weights = layer(x, x, x, key_padding_mask=mask)
    oracle, _ = expected(layer, x, key_padding_mask=padding)
    close(out, oracle)
    assert torch.equal(weights[0, :, 7:], torch.zeros_like(weights[0, :, 7:]))
    torch.testing.assert_close(out[1], layer.out_proj.bias.expand(LENGTH, -1))


def test_a_bias_on_the_scores_is_no_padding_mask() -> None:
    layer, x = build(), torch.randn(BATCH, LENGTH, DIM)
    mask = torch.zeros(BATCH, LENGTH)
    mask[0, 3] = -2.0
    with pytest.raises(ValueError, match="key_padding_mask adds to the scores"):
        layer(x, x, x, key_padding_mask=mask)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="key_padding_mask adds to the scores"):
        compiled(x, x, x, key_padding_mask=mask)


def refused_calls() -> dict[str, tuple[type[Exception], str, Callable[..., object]]]:
    x, other = torch.randn(BATCH, LENGTH, DIM), torch.randn(BATCH, LENGTH, DIM)
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    nested = torch.nested.nested_tensor([torch.randn(3, DIM), torch.randn(5, DIM)])
    return {
        "attn_mask": (
            ValueError,
            "one softmax over the tokens",
            lambda m: m(x, x, x, attn_mask=mask),
        ),
        "is_causal": (ValueError, "is_causal must be False", lambda m: m(x, x, x, is_causal=True)),
        "values": (ValueError, "key and value must be the same", lambda m: m(x, x, other)),
        "three": (
            ValueError,
            "key and value must be the same",
            lambda m: m(x, other, other.clone()),
        ),
        "nested": (ValueError, "use_nested_tensor = False", lambda m: m(nested, nested, nested)),
        "batch": (ValueError, "key has batch 1 but query has 2", lambda m: m(x, *(x[:1],) * 2)),
        "dtype": (TypeError, "dtype", lambda m: m(*(x.half(),) * 3)),
    }


@pytest.mark.parametrize("case", refused_calls())
def test_what_separable_attention_cannot_do_is_refused(case: str) -> None:
    error, message, call = refused_calls()[case]
    with pytest.raises(error, match=message):
        call(build())


def misshapen_calls() -> dict[str, Callable[[nn.Module], object]]:
    x, flat, narrow = torch.randn(2, 5, DIM), torch.randn(5, DIM), torch.randn(2, 5, DIM - 1)
    key, value = torch.randn(2, 5, DIM), torch.randn(2, 4, DIM)
    deep = torch.randn(1, 2, 5, DIM)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    return {
        "rank of the query": lambda m: m(deep, deep, deep),
        "rank of the key": lambda m: m(x, flat, flat),
        "rank of an unbatched key": lambda m: m(flat, x, x),
        "channels": lambda m: m(narrow, narrow, narrow),
        "key and value": lambda m: m(x, key, value),
        "rank of the mask": lambda m: m(x, x, x, key_padding_mask=mask[0]),
        "tokens of the mask": lambda m: m(x, x, x, key_padding_mask=mask[:, :4]),
        "batch of the mask": lambda m: m(x, x, x, key_padding_mask=mask[:1]),
        "dtype of the mask": lambda m: m(x, x, x, key_padding_mask=mask.int()),
        "rank of an unbatched mask": lambda m: m(flat, flat, flat, key_padding_mask=mask),
    }


@pytest.mark.parametrize("case", misshapen_calls())
def test_errors_of_multihead_attention(case: str) -> None:
    call = misshapen_calls()[case]
    with pytest.raises(AssertionError):
        call(nn.MultiheadAttention(DIM, HEADS, batch_first=True))
    with pytest.raises(AssertionError, match=r"query|key|value|mask"):
        call(build())


@pytest.mark.parametrize(
    "arguments, theirs",
    [((0, 1), ValueError), ((8, 0), ValueError), ((8, 3), AssertionError)],
)
def test_errors_of_the_constructor(arguments: tuple[int, int], theirs: type[Exception]) -> None:
    for cls in (nn.MultiheadAttention, SeparableMultiheadAttention):
        with pytest.raises(theirs, match="embed_dim"):
            cls(*arguments)


@pytest.mark.parametrize(
    "options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 8}, {"vdim": 8}]
)
def test_options_without_a_meaning_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SeparableMultiheadAttention(DIM, HEADS, **options)
    assert SeparableMultiheadAttention(DIM, HEADS, kdim=DIM, vdim=DIM).kdim == DIM


def test_fresh_parameters_are_as_in_multihead_attention() -> None:
    layer = SeparableMultiheadAttention(DIM, HEADS)
    assert torch.equal(layer.qkv_proj.bias, torch.zeros(1 + 2 * DIM))
    assert torch.equal(layer.out_proj.bias, torch.zeros(DIM))
    bound = (6 / (3 * DIM + 1)) ** 0.5
    assert 0.8 * bound < layer.qkv_proj.weight.abs().max() <= bound
    bare = SeparableMultiheadAttention(DIM, HEADS, bias=False)
    assert [name for name, _ in bare.named_parameters()] == ["qkv_proj.weight", "out_proj.weight"]


def test_dropout_is_of_the_weights_and_for_training_only(device: torch.device) -> None:
    layer = build(device, dropout=0.5)
    x = torch.randn(BATCH, LENGTH, DIM, device=device)
    torch.manual_seed(1)
    out, weights = layer(x, x, x)
    torch.manual_seed(1)
    close(out, expected(layer, x, dropout_p=0.5)[0])
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    layer.eval()
    close(layer(x, x, x)[0], expected(layer, x)[0])


def test_a_state_dict_of_multihead_attention_is_refused() -> None:
    with pytest.raises(RuntimeError, match="in_proj_weight"):
        build().load_state_dict(nn.MultiheadAttention(DIM, HEADS).state_dict())


def test_deepcopy_and_pickle() -> None:
    layer, x = build(dropout=0.3).eval(), torch.randn(BATCH, LENGTH, DIM)
    out = layer(x, x, x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, x, x)[0], out)
        assert other.dropout == 0.3 and other.batch_first


@pytest.mark.parametrize("cross", [False, True])
def test_compiles_as_one_graph(device: torch.device, cross: bool) -> None:
    layer = build(device)
    x = torch.randn(BATCH, LENGTH, DIM, device=device)
    key = torch.randn(BATCH, 7, DIM, device=device) if cross else x
    mask = torch.zeros(BATCH, key.shape[1], device=device).masked_fill_(key[..., 0] > 1, -torch.inf)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for given in (None, mask, mask < 0):
        wanted = layer(x, key, key, key_padding_mask=given)
        got = compiled(x, key, key, key_padding_mask=given)
        torch.testing.assert_close(got, wanted)


def test_autocast(device: torch.device) -> None:
    layer, x = build(device), torch.randn(BATCH, LENGTH, DIM, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out, weights = layer(x, x, x)
    assert out.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x, x, x)[0], atol=0.05, rtol=0.05)


def test_in_an_encoder_layer_it_never_meets_the_fast_path(device: torch.device) -> None:
    block = nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, batch_first=True, device=device)
    block.self_attn = SeparableMultiheadAttention(DIM, 4, batch_first=True, device=device)
    with pytest.warns(UserWarning, match="use_nested_tensor is False"):
        encoder = nn.TransformerEncoder(block, 1).eval()
    x = torch.randn(BATCH, LENGTH, DIM, device=device)
    padding = torch.arange(LENGTH, device=device).expand(BATCH, -1) > 6
    block = encoder.layers[0]
    attended, _ = block.self_attn(x, x, x, key_padding_mask=padding)
    hidden = block.norm1(x + attended)
    oracle = block.norm2(hidden + block._ff_block(hidden))
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), oracle.detach())


def test_dropout_is_refused_by_its_own_name() -> None:
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        SeparableMultiheadAttention(DIM, 2, dropout=1.0)
