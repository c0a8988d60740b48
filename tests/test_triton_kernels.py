"""What is particular to the Triton kernels: layouts, tiles, splits, offsets, masked memory.

Without a GPU the kernels run in Triton's interpreter. That they agree with the oracle in every
option of the layer is the matter of test_ops.py and test_layer.py.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sep_attn import triton_kernels
from sep_attn.layout import (
    accumulate_dtype,
    merge_slices,
    merge_token_slices,
    num_channels,
    slice_view,
    token_shape,
    token_view,
)

pytest.importorskip("triton")

from sep_attn.triton_kernels import gating, launch, pooling

DTYPES = [torch.float32, torch.float16, torch.float64]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 3e-3}

# Shape, patch and memory: every memory layout, bands of 1, 2 and 4 slices, rows of one token.
LAYOUTS = [
    ((2, 37, 24), (1, 1), "contiguous"),
    ((2, 37, 24), (1, 1), "transposed"),
    ((2, 37, 24), (1, 1), "sliced"),
    ((2, 37, 24), (1, 1), "expanded"),
    ((1, 1, 5), (1, 1), "contiguous"),
    ((1, 16, 4, 16), (4, 1), "contiguous"),
    ((2, 9, 3, 11), (3, 1), "contiguous"),
    ((1, 8, 4, 8), (2, 2), "contiguous"),
    ((2, 9, 6, 10), (2, 2), "contiguous"),
    ((2, 9, 6, 10), (2, 2), "channels_last"),
    ((2, 9, 6, 10), (2, 2), "sliced"),
    ((1, 7, 2, 8), (1, 4), "contiguous"),
    ((1, 7, 4, 9), (2, 3), "contiguous"),
    ((1, 7, 8, 3), (2, 3), "contiguous"),
    ((2, 7, 5, 6), (1, 1), "contiguous"),
]


def name_of(value: object) -> str:
    return str(value).replace(" ", "")


def in_memory(values: Tensor, memory: str) -> Tensor:
    """The same values, lying in memory as asked."""
    if memory == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if memory == "sliced":
        larger = values.new_zeros([2 * size + 1 for size in values.shape])
        view = larger[tuple(slice(1, None, 2) for _ in values.shape)]
        return view.copy_(values)
    if memory == "expanded":
        return values[:1].expand(values.shape)
    return values.contiguous()


class Arguments(NamedTuple):
    x: Tensor
    scores: Tensor
    mask: Tensor | None
    dropout: Tensor | None
    patch: tuple[int, int]

    @property
    def slices(self) -> int:
        return self.x.shape[0] * self.patch[0] * self.patch[1]


def arguments(
    shape: tuple[int, ...],
    patch: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    memory: str = "contiguous",
    masked: bool = False,
    dropped: bool = False,
) -> Arguments:
    x = in_memory(torch.randn(shape, device=device).to(dtype), memory)
    tokens = token_shape(x)
    token_memory = "contiguous" if memory == "channels_last" else memory
    scores = in_memory(3 * torch.randn(tokens, device=device), token_memory)
    mask = in_memory(torch.rand(tokens, device=device) < 0.4, token_memory) if masked else None
    dropout = None
    if dropped:
        kept = torch.rand(tokens, device=device) < 0.7
        dropout = in_memory(kept.to(accumulate_dtype(dtype)) / 0.7, token_memory)
    return Arguments(x, scores, mask, dropout, patch)


def plain_pool(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Pool, weight sum and weights as PyTorch writes them, in the dtype of x and scores."""
    tokens = slice_view(given.x, *given.patch)  # [B, ph, pw, NH, NW, D]
    grid = tokens.shape[:-1]
    tokens = tokens.reshape(given.slices, -1, tokens.shape[-1])
    scores = token_view(given.scores, *given.patch).reshape(tokens.shape[:2])
    if given.mask is None:
        weights = scores.softmax(-1)
    else:
        masked = token_view(given.mask, *given.patch).reshape(tokens.shape[:2])
        nothing_left = masked.all(-1, keepdim=True)
        filled = scores.masked_fill(masked, -torch.inf).masked_fill(nothing_left, 0.0)
        weights = filled.softmax(-1).masked_fill(masked, 0.0)
        tokens = tokens.masked_fill(masked[..., None], 0.0)
    kept = weights
    if given.dropout is not None:
        kept = weights * token_view(given.dropout, *given.patch).reshape(weights.shape)
    pooled = (kept[..., None] * tokens).sum(1)
    weights = merge_token_slices(weights.view(grid), tuple(given.scores.shape))
    return pooled, kept.sum(1), weights


def plain_gate(v: Tensor, context: Tensor, act: str, patch: tuple[int, int]) -> Tensor:
    tokens = slice_view(v, *patch)
    rows = context.view(*tokens.shape[:3], 1, 1, tokens.shape[-1])
    return merge_slices((tokens.relu() if act == "relu" else tokens) * rows, v)


def assert_close(results: dict[str, Tensor], oracle: dict[str, Tensor], tolerance: float) -> None:
    for name, expected in oracle.items():
        result = results[name].double()
        error = ((result - expected).abs() / (1 + expected.abs())).max().item()
        assert error <= tolerance, f"{name}: {error:.3g}"


def check_pool(given: Arguments, grads: tuple[Tensor | None, Tensor | None, Tensor | None]) -> None:
    """Forward and backward against plain PyTorch in float64."""
    grad_pooled, grad_weight_sum, grad_weights = grads
    assert grad_pooled is not None
    forward = triton_kernels.context_pool(
        given.x, given.scores, given.mask, given.dropout, *given.patch
    )
    grad_x, grad_scores = triton_kernels.context_pool_backward(
        grad_pooled, grad_weight_sum, grad_weights, given.x, *forward, given.dropout, *given.patch
    )
    assert grad_x.stride() == torch.empty_like(given.x).stride()
    assert grad_x.dtype == given.x.dtype and grad_scores.dtype == accumulate_dtype(given.x.dtype)
    x = given.x.double().requires_grad_()
    scores = given.scores.double().requires_grad_()
    oracle = plain_pool(given._replace(x=x, scores=scores))
    oracle_grads = torch.autograd.grad(
        [result for result, grad in zip(oracle, grads, strict=True) if grad is not None],
        [x, scores],
        [grad.double() for grad in grads if grad is not None],
    )
    names = ("pooled", "weight_sum", "weights", "grad_x", "grad_scores")
    assert_close(
        dict(zip(names, (*forward, grad_x, grad_scores), strict=True)),
        dict(zip(names, (*(part.detach() for part in oracle), *oracle_grads), strict=True)),
        TOLERANCE[given.x.dtype],
    )


def check_gate(
    v: Tensor, context: Tensor, grad_y: Tensor, act: str, patch: tuple[int, int]
) -> None:
    y = triton_kernels.gate(v, context, act, *patch)
    grad_v, grad_context = triton_kernels.gate_backward(grad_y, v, context, act, *patch)
    assert y.stride() == grad_v.stride() == torch.empty_like(v).stride()
    v64, context64 = v.double().requires_grad_(), context.double().requires_grad_()
    oracle = plain_gate(v64, context64, act, patch)
    oracle_grads = torch.autograd.grad(oracle, [v64, context64], grad_y.double())
    names = ("y", "grad_v", "grad_context")
    assert_close(
        dict(zip(names, (y, grad_v, grad_context), strict=True)),
        dict(zip(names, (oracle.detach(), *oracle_grads), strict=True)),
        TOLERANCE[v.dtype],
    )


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small, and splits so short, that small inputs have many of both."""
    plans: list[Callable[..., object]] = [
        pooling._plan_forward,
        pooling._plan_backward,
        gating._plan_forward,
        gating._plan_backward,
    ]
    for plan in plans:
        plan.cache_clear()
    monkeypatch.setattr(launch, "TILE_VALUES", dict.fromkeys((2, 4, 8), 256))
    monkeypatch.setattr(launch, "TILES_PER_SPLIT", 1)
    monkeypatch.setattr(pooling, "WEIGHTS_BLOCK", 16)
    yield
    for plan in plans:
        plan.cache_clear()


# The token grid -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, patch, memory", LAYOUTS, ids=name_of)
def test_the_grid_reaches_every_token_of_every_slice(
    shape: tuple[int, ...], patch: tuple[int, int], memory: str
) -> None:
    x = in_memory(torch.arange(torch.Size(shape).numel()).view(shape), memory)
    scores = in_memory(torch.arange(torch.Size(token_shape(x)).numel()).view(token_shape(x)), "")
    grid = launch.token_grid(x.shape, *patch)
    slices = slice_view(x, *patch).flatten(0, 2).flatten(1, 2)  # [S, N, D]
    token_slices = token_view(scores, *patch).flatten(0, 2).flatten(1)  # [S, N]
    assert grid.bands * grid.groups == slices.shape[0]
    assert grid.tokens == slices.shape[1] * grid.groups

    band = torch.arange(grid.bands)
    image = band // (grid.patch_h * grid.patch_w)
    row, column = band // grid.patch_w % grid.patch_h, band % grid.patch_w
    token = torch.arange(grid.tokens)
    for values, expected in ((x, slices), (scores, token_slices)):
        strides = launch.grid_strides(x.shape, values.stride(), grid)
        starts = image * strides[0] + row * strides[1] + column * strides[2]  # [bands]
        offsets = token // grid.width * strides[3] + token % grid.width * strides[4]  # [tokens]
        if launch.is_uniform(grid, [strides]):
            assert torch.equal(offsets, token * strides[4])
        addresses = starts[:, None] + offsets  # [bands, tokens]
        if values is x:
            addresses = addresses[..., None] + torch.arange(grid.channels) * strides[5]
        memory_of = values.as_strided(
            (values.untyped_storage().nbytes() // values.element_size(),), (1,), 0
        )
        found = memory_of[addresses + values.storage_offset()]
        found = found.unflatten(1, (-1, grid.groups)).transpose(1, 2).flatten(0, 1)
        assert torch.equal(found, expected)


def layout_of(x: Tensor, patch: tuple[int, int]) -> str:
    grid = launch.token_grid(x.shape, *patch)
    strides = launch.grid_strides(x.shape, x.stride(), grid)
    uniform = launch.is_uniform(grid, [strides])
    return launch.memory_layout(x.element_size(), grid, strides, uniform)


@pytest.mark.parametrize(
    "shape, patch, memory, expected",
    [
        ((8, 197, 768), (1, 1), "contiguous", "channels_wide"),
        ((8, 197, 100), (1, 1), "contiguous", "channels"),
        ((2, 64, 4, 256), (4, 1), "contiguous", "tokens_wide"),
        ((2, 64, 4, 250), (4, 1), "contiguous", "tokens"),
        ((2, 64, 32, 32), (2, 2), "contiguous", "tokens_wide"),
        ((2, 64, 32, 32), (2, 2), "channels_last", "channels_wide"),
        ((2, 64, 32, 32), (1, 1), "contiguous", "tokens_wide"),
        ((2, 64, 14, 14), (2, 2), "contiguous", "tokens"),
        ((2, 64, 30, 30), (3, 3), "contiguous", "strided"),
        ((2, 65, 64), (1, 1), "sliced", "strided"),
    ],
    ids=name_of,
)
def test_common_inputs_are_read_in_words(
    shape: tuple[int, ...], patch: tuple[int, int], memory: str, expected: str
) -> None:
    x = in_memory(torch.zeros(shape, dtype=torch.bfloat16), memory)
    assert layout_of(x, patch) == expected


@pytest.mark.parametrize("tokens", [1, 16, 197, 4096, 65_537, 10_000_000])
@pytest.mark.parametrize("programs", [1, 7, 256, 5000])
def test_splits_cover_the_tokens(tokens: int, programs: int) -> None:
    splits, split_tiles = launch.split_tokens(programs, tokens, 32)
    assert (splits - 1) * split_tiles * 32 < tokens <= splits * split_tiles * 32
    assert 1 <= splits <= launch.PROGRAMS
    assert (splits - 1) * programs < launch.PROGRAMS
    assert splits == 1 or split_tiles >= launch.TILES_PER_SPLIT


def test_a_slice_too_long_for_its_index_is_refused() -> None:
    with pytest.raises(ValueError, match=r"up to 1073741824 tokens .* this call has 1073741825"):
        launch.token_grid((1, 2**30 + 1, 8), 1, 1)


# Results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, patch, memory", LAYOUTS, ids=name_of)
def test_pool_in_many_tiles_and_splits(
    shape: tuple[int, ...],
    patch: tuple[int, int],
    memory: str,
    device: torch.device,
    small_tiles: None,
) -> None:
    given = arguments(shape, patch, device, memory=memory, masked=True, dropped=True)
    grad_pooled = torch.randn(given.slices, num_channels(given.x), device=device)
    grad_weight_sum = torch.randn(given.slices, device=device)
    grad_weights = torch.randn(token_shape(given.x), device=device)
    check_pool(given, (grad_pooled, grad_weight_sum, grad_weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, patch", [((1, 300, 40), (1, 1)), ((1, 20, 16, 16), (2, 2))])
def test_pool_in_every_dtype(
    shape: tuple[int, ...], patch: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    given = arguments(shape, patch, device, dtype)
    acc = accumulate_dtype(dtype)
    grad_pooled = torch.randn(given.slices, num_channels(given.x), device=device, dtype=acc)
    check_pool(given, (grad_pooled, None, None))


@pytest.mark.parametrize("shape, patch, memory", LAYOUTS, ids=name_of)
def test_gate_in_many_tiles_and_splits(
    shape: tuple[int, ...],
    patch: tuple[int, int],
    memory: str,
    device: torch.device,
    small_tiles: None,
) -> None:
    v = arguments(shape, patch, device, memory=memory).x
    slices = shape[0] * patch[0] * patch[1]
    context = torch.randn(num_channels(v), slices, device=device).T  # channels far apart
    check_gate(v, context, torch.randn_like(v), "relu", patch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["relu", "identity"])
def test_gate_in_every_dtype(act: str, dtype: torch.dtype, device: torch.device) -> None:
    v = torch.randn(1, 300, 40, device=device).to(dtype)
    context = torch.randn(1, 40, device=device).to(dtype)
    check_gate(v, context, torch.randn_like(v), act, (1, 1))


@pytest.mark.parametrize("shape, patch", [((2, 50, 24), (1, 1)), ((2, 8, 8, 8), (2, 2))])
def test_gradients_of_stride_0(
    shape: tuple[int, ...], patch: tuple[int, int], device: torch.device
) -> None:
    given = arguments(shape, patch, device)
    channels = num_channels(given.x)
    one = torch.randn((), device=device)
    check_pool(
        given,
        (
            one.expand(given.slices, channels),
            one.expand(given.slices),
            one.expand(token_shape(given.x)),
        ),
    )
    context = torch.randn(given.slices, 1, device=device).expand(given.slices, channels)
    check_gate(given.x, context, one.expand(shape), "relu", patch)


def test_results_are_the_same_bit_for_bit(device: torch.device) -> None:
    given = arguments((1, 3000, 20), (1, 1), device)
    results = []
    for _ in range(2):
        forward = triton_kernels.context_pool(given.x, given.scores, None, None, 1, 1)
        backward = triton_kernels.context_pool_backward(
            forward[0], forward[1], forward[2], given.x, *forward, None, 1, 1
        )
        gate_backward = triton_kernels.gate_backward(given.x, given.x, forward[0], "relu", 1, 1)
        results.append((*forward, *backward, *gate_backward))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_the_number_of_splits_changes_rounding_only(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments((1, 600, 16), (1, 1), device, torch.float64)
    results = []
    for tiles in (1000, 3, 1):
        monkeypatch.setattr(launch, "TILES_PER_SPLIT", tiles)
        pooling._plan_forward.cache_clear()
        results.append(triton_kernels.context_pool(given.x, given.scores, None, None, 1, 1))
    pooling._plan_forward.cache_clear()
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-13)


# Masks and extreme values -------------------------------------------------------------------------


@pytest.mark.parametrize("small", [False, True])
def test_masked_memory_is_never_felt(
    small: bool, device: torch.device, request: pytest.FixtureRequest
) -> None:
    if small:
        request.getfixturevalue("small_tiles")
    given = arguments((2, 40, 16), (1, 1), device, masked=True, dropped=True)
    assert given.mask is not None and given.dropout is not None
    given.mask[0] = True  # nothing is left of the first slice
    poisoned = given.x.masked_fill(given.mask[..., None], float("nan"))
    scores = given.scores.masked_fill(given.mask, float("nan"))
    results = []
    for x, s in ((given.x, given.scores), (poisoned, scores)):
        forward = triton_kernels.context_pool(x, s, given.mask, given.dropout, 1, 1)
        backward = triton_kernels.context_pool_backward(
            torch.ones_like(forward[0]), None, None, x, *forward, given.dropout, 1, 1
        )
        results.append((*forward, *backward))
    for clean, poisoned_result in zip(*results, strict=True):
        assert torch.equal(clean, poisoned_result)
        assert torch.isfinite(clean).all()
    for result in results[0]:
        assert (result[0] == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, inside the interpreter
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(
    "scores",
    [
        [1e4, -1e4, 9999.0, 0.0],
        [-1e4, -1e4, -1e4, -1e4],
        [-3.4e38, -3.4e38, 3.4e38, 0.0],
        [torch.finfo(torch.float32).min] * 4,
        [-torch.inf, 1.0, 2.0, -torch.inf],
        [-torch.inf] * 4,
        [torch.inf, 0.0, 1.0, 2.0],
        [torch.nan, 0.0, 1.0, 2.0],
    ],
    ids=str,
)
def test_extreme_scores_act_as_in_torch_softmax(
    scores: list[float], small: bool, device: torch.device, request: pytest.FixtureRequest
) -> None:
    if small:
        request.getfixturevalue("small_tiles")
    row = torch.tensor(scores, device=device).repeat(15)[None]
    x = torch.randn(1, 60, 8, device=device)
    pooled, weight_sum, weights = triton_kernels.context_pool(x, row, None, None, 1, 1)
    expected = row.softmax(-1)
    torch.testing.assert_close(weights, expected, equal_nan=True)
    torch.testing.assert_close(
        pooled, (expected[..., None] * x).sum(1), equal_nan=True, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(weight_sum, expected.sum(-1), equal_nan=True)


def test_the_activation_keeps_nan(device: torch.device) -> None:
    v = torch.tensor([[[float("nan"), -1.0, 0.0, 2.0]]], device=device)
    context = torch.full((1, 4), 3.0, device=device)
    y = triton_kernels.gate(v, context, "relu", 1, 1)
    torch.testing.assert_close(y, torch.relu(v) * 3.0, equal_nan=True)
    grad_v, grad_context = triton_kernels.gate_backward(
        torch.ones_like(v), v, context, "relu", 1, 1
    )
    assert grad_v[0, 0, 1:].tolist() == [0.0, 0.0, 3.0]
    torch.testing.assert_close(grad_context, torch.relu(v)[0], equal_nan=True)


def test_an_empty_batch_launches_nothing(device: torch.device) -> None:
    for shape, patch in (((0, 9, 5), (1, 1)), ((0, 5, 4, 6), (2, 2))):
        given = arguments(shape, patch, device, masked=True, dropped=True)
        forward = triton_kernels.context_pool(
            given.x, given.scores, given.mask, given.dropout, *patch
        )
        assert [tuple(part.shape) for part in forward] == [(0, 5), (0,), given.scores.shape]
        grad_x, grad_scores = triton_kernels.context_pool_backward(
            forward[0], None, None, given.x, *forward, given.dropout, *patch
        )
        assert grad_x.shape == given.x.shape and grad_scores.shape == given.scores.shape
        assert triton_kernels.gate(given.x, forward[0], "relu", *patch).shape == given.x.shape
        grad_v, grad_context = triton_kernels.gate_backward(
            given.x, given.x, forward[0], "relu", *patch
        )
        assert grad_v.shape == given.x.shape and grad_context.shape == (0, 5)


# Memory and devices -------------------------------------------------------------------------------


def huge_memory(values: int, device: torch.device) -> Tensor:
    """That many float16 values; on a CPU only the pages that are touched come into being."""
    if device.type != "cpu":
        return torch.empty(values, dtype=torch.float16, device=device)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    pages = mmap.mmap(-1, 2 * values, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=torch.float16)


@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space as Linux does")
@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 2, 8), (1, 1, 2)], ids=name_of)
def test_offsets_past_two_to_the_31(shape: tuple[int, int, int], device: torch.device) -> None:
    """The batch, token and channel strides, in turn, lead past the reach of 32 bits."""
    far = 2**31 + 8
    memory = huge_memory(far + 4096, device)
    strides = {2: (far, 100, 1), 1: (far, far, 1)}[shape[0]]
    if shape[1] == 1:
        strides = (far, far, far)
    x = memory.as_strided(shape, strides, 16)
    x.copy_(torch.randn(shape))
    scores = torch.randn(shape[:2], device=device)
    given = Arguments(x, scores, None, None, (1, 1))
    grad_pooled = torch.randn(shape[0], shape[2], device=device)
    check_pool(given, (grad_pooled, None, None))
    grad_y = memory.as_strided(shape, strides, 512)
    grad_y.copy_(torch.randn(shape))
    check_gate(x, grad_pooled, grad_y, "relu", (1, 1))


@pytest.mark.gpu
def test_more_than_two_to_the_31_values(device: torch.device) -> None:
    if torch.cuda.get_device_properties(device).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    v = torch.ones(1, 2**21 + 1, 1024, dtype=torch.bfloat16, device=device)
    v[:, -1] = 2.0
    context = torch.arange(1024, dtype=torch.float32, device=device)[None]
    y = triton_kernels.gate(v, context, "relu", 1, 1)
    assert torch.equal(y[0, 0].float(), context[0].bfloat16().float())
    assert torch.equal(y[0, -1].float(), (2 * context[0]).bfloat16().float())
    del y
    scores = torch.zeros(v.shape[:2], device=device)
    pooled, weight_sum, weights = triton_kernels.context_pool(v, scores, None, None, 1, 1)
    torch.testing.assert_close(
        pooled, torch.full_like(pooled, 1 + 1 / v.shape[1]), rtol=1e-5, atol=0.0
    )
    grad_x, _ = triton_kernels.context_pool_backward(
        context * v.shape[1], None, None, v, pooled, weight_sum, weights, None, 1, 1
    )
    assert torch.equal(grad_x[0, -1], grad_x[0, 0])
    torch.testing.assert_close(grad_x[0, -1].float(), context[0], rtol=8e-3, atol=0.0)


@pytest.mark.gpu
def test_kernels_run_on_the_device_of_their_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = torch.device("cuda:1")
    given = arguments((2, 50, 24), (1, 1), device)
    grad_pooled = torch.randn(2, 24, device=device)
    with torch.cuda.device(0):
        check_pool(given, (grad_pooled, None, None))
        check_gate(given.x, grad_pooled, torch.randn_like(given.x), "relu", (1, 1))
        assert torch.cuda.current_device() == 0


def test_unavailable_reason_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_kernels.unavailable_reason(torch.device("cpu")) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    reason = triton_kernels.unavailable_reason(torch.device("cpu"))
    assert reason is not None and "TRITON_INTERPRET=1" in reason
    reason = triton_kernels.unavailable_reason(torch.device("mps"))
    assert reason is not None and "mps" in reason


def test_nothing_needs_triton_before_the_first_call() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from sep_attn import triton_kernels\n"
        "print(triton_kernels.unavailable_reason(torch.device('cuda')))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "triton does not import" in result.stdout and "install triton" in result.stdout
