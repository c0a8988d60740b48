"""The fused layer on the Triton backend: every path of it, tiles, tables, offsets and streams.

Without a GPU the kernels run in Triton's interpreter. That each option of the layer agrees with
the oracle on the path which its size takes is the matter of test_layer.py; here small tiles and a
forced path put every kernel to work on every layout.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import unittest.mock
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import Case, check_layer, inputs_of, make_mask, run
from test_triton_kernels import huge_memory, name_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cpu.memory import tensor_bytes
from benchmarks.machine_code import forget_plans
from sep_attn import SeparableAttention, ops
from sep_attn.functional import separable_attention
from sep_attn.layout import default_patch_size, token_shape

pytest.importorskip("triton")

from sep_attn.triton_kernels import attention, configs, launch, tiles

PATHS = ["short", "long", "wide"]
FUSED_KERNELS = ["slice_fwd_kernel", "value_gate_output_fwd_kernel"]
NARROW_KERNELS = ["value_gate_weights_bwd_kernel"]

# Ragged N and D, bands side by side, several tiles a band, every layout, masks, x_prev, gradients.
CASES = [
    Case((1, 1, 1)),
    Case((1, 37, 24), need_weights=True),
    Case((5, 5, 20), mask="random"),
    Case((1, 19, 33), bias=False, value_act="identity"),
    Case((2, 19, 16), mask="first_image", dropout_p=0.3, need_weights=True, grad="sum"),
    Case((2, 19, 16), prev_shape=(2, 21, 16), mask="random", dropout_p=0.2, need_weights=True),
    Case((1, 24, 4, 5), prev_shape=(1, 24, 4, 19)),
    Case((1, 24, 2, 16), mask="all", memory="transposed", grad="transposed"),
    Case((1, 16, 4, 16), patch_size=(2, 2), mask="random", dropout_p=0.1),
    Case((2, 12, 4, 4), patch_size=(2, 4), memory="channels_last"),
    Case((1, 12, 4, 6), patch_size=(2, 3), memory="sliced", grad="sliced"),
    Case((2, 19, 16), memory="expanded"),
    Case((0, 37, 16), need_weights=True),
]


def take_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call from here on takes this path, in tiles of 16 tokens and columns."""
    forget_plans()
    fused_backward = 0 if path == "wide" else 512
    monkeypatch.setattr(
        attention, "MOST_FUSED_BACKWARD_CHANNELS", dict.fromkeys((2, 4), fused_backward)
    )
    monkeypatch.setattr(attention, "path_of", lambda *_: path)
    monkeypatch.setattr(attention, "config_of", lambda *_: configs.Config(16, 16, 4, 1))
    monkeypatch.setattr(attention, "SHARED_PROGRAMS", 1)
    monkeypatch.setattr(attention, "COMBINE_ROWS", 16)
    monkeypatch.setattr(attention, "COMBINE_CHANNELS", 16)
    monkeypatch.setattr(attention, "COMBINE_COLUMNS", 16)
    monkeypatch.setattr(attention, "WEIGHT_PROGRAMS", 5)
    monkeypatch.setattr(attention, "WEIGHT_WARPS", 20)
    monkeypatch.setattr(attention, "KEY_SLICES", 16)
    monkeypatch.setattr(attention, "KEY_PROGRAMS", 8)


@pytest.fixture(autouse=True)
def plans_of_their_own() -> Iterator[None]:
    yield
    forget_plans()


# Results ------------------------------------------------------------------------------------------


def forward(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The operator's three results; the draws are those of every other call of the case."""
    patch = case.patch_size or default_patch_size(inputs["x"])
    source = inputs.get("x_prev", inputs["x"])
    torch.manual_seed(2)
    mask = None if case.mask is None else make_mask(case.mask, token_shape(source), source.device)
    seed = torch.randint(2**31 - 1, (1,), device=source.device) if case.dropout_p else None
    arguments = call(
        inputs,
        mask=mask,
        seed=seed,
        dropout_p=case.dropout_p,
        act=case.value_act,
        patch_h=patch[0],
        patch_w=patch[1],
    )
    results = ops.separable_attention("triton", *arguments)
    return dict(zip(("out", "weights", "statistics"), results, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel_in_small_tiles(
    case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two backwards both are held against the oracle, and of the three forwards one, and
    the others against that one."""
    for path in ("short", "wide"):
        take_path(path, monkeypatch)
        check_layer(separable_attention, case, torch.float32, device, backend="triton")
    take_path("short", monkeypatch)
    inputs = inputs_of(case, torch.float32, device)
    expected = forward(case, inputs)
    for path in ("long", "wide"):
        take_path(path, monkeypatch)
        for name, result in forward(case, inputs).items():
            torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case, most, grid",
    [
        (Case((1, 100, 20), need_weights=True), 132, (1, 1, 7)),
        (Case((1, 100, 20), mask="random", dropout_p=0.2), 3, (1, 1, 3)),  # 3 tiles, 3 and 1
        (Case((2, 37, 24), mask="first_image"), 5, (2, 1, 2)),
        (Case((2, 37, 24), mask="first_image"), 3, (2, 1, 1)),
        (Case((1, 60, 16), prev_shape=(1, 21, 16), dropout_p=0.1), 132, (1, 1, 4)),
        (Case((1, 16, 16), prev_shape=(1, 60, 16)), 132, (1, 1, 1)),
        (Case((1, 24, 4, 36), memory="transposed"), 8, (4, 1, 2)),
        (Case((1, 16, 8, 16), patch_size=(2, 2), mask="random"), 132, (2, 1, 4)),
    ],
    ids=str,
)
def test_programs_that_share_a_slice_do_as_one(
    case: Case,
    most: int,
    grid: tuple[int, int, int],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take_path("short", monkeypatch)
    inputs = inputs_of(case, torch.float32, device)
    expected = forward(case, inputs)
    grids: list[tuple[int, ...]] = []
    run_all = attention.run

    def run_and_keep(launches: Any, *args: Any) -> None:
        grids.extend(launch.grid for launch in launches)
        run_all(launches, *args)

    monkeypatch.setattr(attention, "run", run_and_keep)
    monkeypatch.setattr(attention, "SHARED_PROGRAMS", most)
    forget_plans()
    for name, result in forward(case, inputs).items():
        assert torch.equal(result, expected[name])
    assert grids == [grid]


@pytest.mark.parametrize("most", [16, 3])
def test_the_tiles_of_a_slice_are_summed_in_the_kernel_or_before(
    most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_path("short", monkeypatch)
    monkeypatch.setattr(attention, "MOST_TILES_SUMMED", most)
    runs: list[int] = []
    run_all = attention.run
    monkeypatch.setattr(
        attention, "run", lambda launches, *args: runs.append(1) or run_all(launches, *args)
    )
    case = Case((3, 100, 36), mask="random", dropout_p=0.2)  # seven tiles a slice
    inputs = inputs_of(case, torch.float32, device)
    run(separable_attention, case, inputs, backend="triton")
    assert len(runs) == (3 if most < 7 else 2)  # forward, and backward before and after the sums
    check_layer(separable_attention, case, torch.float32, device, backend="triton")


def test_programs_share_out_the_slices_for_the_key_weight(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five tiles of slices, the last with six, over two programs for each of four blocks of W_K."""
    take_path("short", monkeypatch)
    monkeypatch.setattr(attention, "CONTEXT_COLUMNS", 16)
    plan = attention._key_weight
    launches: list[tuple[int, launch.Launch]] = []

    def plan_and_keep(*arguments: Any) -> Any:
        splits, most, planned = plan(*arguments)
        launches.append((splits, planned))
        return splits, most, planned

    monkeypatch.setattr(attention, "_key_weight", plan_and_keep)
    case = Case((70, 3, 20), mask="random")
    check_layer(separable_attention, case, torch.float32, device, backend="triton")
    ((splits, planned),) = launches
    assert (splits, planned.programs, planned.arguments["split_tiles"]) == (2, 8, 3)


def test_more_slices_a_tile_than_a_block_of_them_has(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight bands of four groups each, and a last tile with fewer."""
    take_path("short", monkeypatch)
    monkeypatch.setattr(attention, "config_of", lambda *_: configs.Config(128, 16, 4, 1))
    case = Case((5, 20, 4, 8), patch_size=(2, 4), mask="random")
    check_layer(separable_attention, case, torch.float32, device, backend="triton")


def test_programs_without_tiles_add_nothing(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """A traced program splits a number of tokens that it does not know over as many programs as
    there can be: of 34 tiles over 33 of them, 16 have none."""
    planned = attention._value_gate_weights

    def with_more(call: Any, operands: Any) -> tuple[int, int, launch.Launch]:
        splits, parts, first = planned(call, operands)
        first.programs += 3 * (first.programs // splits)
        first.grid = (first.programs, 1, 1)
        return splits + 3, parts + 3, first

    monkeypatch.setattr(attention, "_value_gate_weights", with_more)
    forget_plans()
    check_layer(separable_attention, Case((2, 70, 72)), torch.float16, device, backend="triton")


@pytest.mark.parametrize(
    "arch, dtype, precision, expected",
    [
        ("sm_90", torch.bfloat16, "ieee", "tf32x3"),
        ("sm_80", torch.float16, "ieee", "tf32x3"),
        ("sm_90", torch.float32, "ieee", "ieee"),
        ("sm_90", torch.float32, "tf32", "tf32x3"),  # torch allows TF32: not for rows of slices
        ("sm_75", torch.float16, "ieee", "ieee"),
        ("gfx942", torch.bfloat16, "ieee", "ieee"),
    ],
)
def test_rows_of_slices_are_not_rounded_to_tf32(
    arch: str, dtype: torch.dtype, precision: str, expected: str
) -> None:
    made = attention.Call(arch, dtype, (2, 9, 16), (2, 9, 16), 1, 1, "relu", precision)
    assert attention._slice_precision(made) == expected


class _Operators(TorchDispatchMode):
    """The names of all operators called that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = operator.overloadpacket.__name__
        if not operator.is_view and not name.startswith(("new_empty", "empty", "split")):
            self.names.append(name)
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("path", PATHS)
def test_torch_computes_nothing_in_backward(
    path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_path(path, monkeypatch)
    inputs = inputs_of(Case((3, 20, 16)), torch.float16, device)
    tensors = call(inputs)
    out, weights, statistics = attention.separable_attention(*tensors)
    arguments = (*tensors[:3], tensors[3], tensors[4], None, weights, statistics)
    monkeypatch.setattr(attention, "run", lambda *_: None)  # the interpreter calls operators too
    torch.utils.deterministic.fill_uninitialized_memory = False
    with _Operators() as operators:
        attention.separable_attention_backward(out, None, *arguments, 0.0, "relu", 1, 1, True, True)
    assert not operators.names


@pytest.mark.parametrize(
    "channels, bands, tokens, path",
    [
        (128, 256, 1024, "short"),
        (512, 64, 1024, "short"),
        (128, 256, 1025, "long"),  # longer than one program should read
        (128, 1, 512, "short"),  # few slices: a few programs each
        (128, 63, 513, "long"),  # more than each of them should read
        (256, 1, 256, "short"),
        (256, 1, 257, "long"),
        (16, 1, 1024, "short"),
        (16, 1, 1025, "long"),
        (512, 1, 128, "wide"),  # a single tile of many channels is shared out
        (512, 63, 129, "wide"),
        (512, 64, 128, "short"),
        (512, 64, 16, "wide"),  # eight tiles
        (512, 1, 64 * 128 - 1, "wide"),
        (512, 1, 64 * 128, "long"),
        (513, 256, 16, "wide"),
    ],
)
def test_the_path_fits_the_shape(channels: int, bands: int, tokens: int, path: str) -> None:
    assert attention.path_of(channels, 2, bands, tokens, tokens, 128) == path
    if channels > configs.MOST_FUSED_CHANNELS[4]:
        assert attention.path_of(channels, 4, bands, tokens, tokens, 32) == "wide"


@pytest.mark.parametrize("path, case", [*zip(PATHS, (CASES[5], CASES[8], CASES[4]), strict=True)])
def test_every_path_in_float16(
    path: str, case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_path(path, monkeypatch)
    check_layer(separable_attention, case, torch.float16, device, backend="triton")


@pytest.mark.parametrize("shape", [(17, 3, 12), (1, 70, 40)], ids=name_of)
def test_tiles_of_the_table(shape: tuple[int, ...], device: torch.device) -> None:
    """What the sizes themselves choose: bands side by side, a long slice."""
    check_layer(separable_attention, Case(shape), torch.float32, device, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        Case((9, 16, 24), mask="random"),
        Case((2, 40, 8, 8), patch_size=(4, 2), dropout_p=0.1, need_weights=True),
        Case((1, 20, 8, 13), prev_shape=(1, 20, 8, 9)),
    ],
    ids=str,
)
def test_contexts_of_many_slices_are_a_product(
    case: Case, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_wide_tiles(monkeypatch)
    check_layer(separable_attention, case, dtype, device, backend="triton")


def take_wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short slices from here on lie side by side in tiles of 128 rows."""
    forget_plans()
    monkeypatch.setattr(attention, "config_of", lambda *_: configs.Config(128, 16, 4, 1))
    monkeypatch.setattr(attention, "path_of", lambda *_: "short")


@pytest.mark.parametrize("shape", [(3, 16, 24), (5, 30, 24), (9, 10, 24)], ids=name_of)
def test_a_tile_of_fewer_slices_writes_nothing_beyond_them(
    shape: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the softmax takes slices one by one, too."""
    take_wide_tiles(monkeypatch)
    monkeypatch.setattr(attention, "POOL_ROWS", 16)
    inputs = inputs_of(Case(shape), torch.float32, device)
    guards: list[Tensor] = []
    new_empty = Tensor.new_empty

    def guarded(self: Tensor, *size: Any, **options: Any) -> Tensor:
        wanted = torch.Size(size[0] if isinstance(size[0], (tuple, list)) else size)
        memory = new_empty(self, wanted.numel() + 512, **options).fill_(7)
        guards.append(memory[wanted.numel() :])
        return memory[: wanted.numel()].view(wanted)

    monkeypatch.setattr(Tensor, "new_empty", guarded)
    attention.separable_attention(*call(inputs))
    assert len(guards) >= 2 and all((guard == 7).all() for guard in guards)


def test_contexts_larger_than_float16_by_dropout(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_wide_tiles(monkeypatch)
    inputs = inputs_of(Case((9, 16, 24)), torch.float16, device)
    inputs["x"] = torch.full_like(inputs["x"], 5e4)
    inputs["qkv_weight"] = inputs["qkv_weight"].clone()
    inputs["qkv_weight"][0] = 0  # equal weights
    seed = torch.tensor([3], device=device)
    _, _, statistics = attention.separable_attention(*call(inputs, seed=seed, dropout_p=0.5))
    pooled, context, kept = statistics.double().split([24, 24, 1], dim=1)
    assert pooled.max() > torch.finfo(torch.float16).max
    key_weight, key_bias = inputs["qkv_weight"][1:25], inputs["qkv_bias"][1:25]
    expected = pooled @ key_weight.double().T + kept * key_bias.double()
    torch.testing.assert_close(context, expected, rtol=1e-4, atol=1e-4 * 5e4)


@pytest.mark.parametrize("path", ["short", "long"])
def test_values_in_several_passes_over_x(
    path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "path_of", lambda *_: path)
    forget_plans()
    case = Case((2, 20, 272))
    assert sum(configs.value_widths(272, 1)) > configs.WIDEST_PRODUCT
    check_layer(separable_attention, case, torch.float16, device, backend="triton")


def call(inputs: dict[str, Tensor], **changed: Any) -> tuple[Any, ...]:
    """Arguments of the operator for [B, N, D]."""
    arguments: dict[str, Any] = {
        "x": None,
        "x_prev": None,
        "qkv_weight": None,
        "qkv_bias": None,
        "out_weight": None,
        "out_bias": None,
        "mask": None,
        "seed": None,
        "dropout_p": 0.0,
        "act": "relu",
        "patch_h": 1,
        "patch_w": 1,
    }
    return tuple((arguments | inputs | changed).values())


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_each_time_and_without_gradients(
    path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_path(path, monkeypatch)
    case = Case((2, 37, 20), need_weights=True)
    inputs = inputs_of(case, torch.float32, device)
    first = run(separable_attention, case, inputs, backend="triton")
    again = run(separable_attention, case, inputs, backend="triton")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(ops.separable_attention_inference("triton", *call(inputs)), first["out"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, inside the interpreter
@pytest.mark.parametrize("path", PATHS)
def test_masked_memory_is_never_felt(
    path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_path(path, monkeypatch)
    inputs = inputs_of(Case((2, 5, 16), prev_shape=(2, 21, 16)), torch.float32, device)
    mask = torch.rand(2, 21, device=device) < 0.4
    mask[0] = True  # nothing is left of the first slice
    results = []
    for fill in (0.0, float("nan")):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        x_prev = leaves["x_prev"].masked_fill(mask[..., None], fill).detach().requires_grad_()
        arguments = call(leaves, x_prev=x_prev, mask=mask)
        out, weights, _ = ops.separable_attention("triton", *arguments)
        grads = torch.autograd.grad(out.square().sum(), [*list(leaves.values())[:-1], x_prev])
        results.append((out, weights, *grads))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned) and clean.isfinite().all()


@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space as Linux does")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("far_axis", [0, 1, 2])
def test_offsets_past_two_to_the_31(
    far_axis: int, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch, token or channel stride leads past the reach of 32 bits."""
    take_path(path, monkeypatch)
    shape = [3, 4, 5]
    shape[far_axis] = 2
    strides = [600, 40, 1]
    strides[far_axis] = 2**31 + 8
    memory = huge_memory(2**31 + 8192, device)
    inputs = inputs_of(Case(tuple(shape)), torch.float16, device)
    grad = torch.randn(shape, device=device).half()
    results = []
    for far in (False, True):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        direction = grad
        if far:
            leaves["x"] = memory.as_strided(shape, strides, 16)
            leaves["x"].copy_(inputs["x"]).requires_grad_()
            direction = memory.as_strided(shape, strides, 4096).copy_(grad)
        out, _, _ = ops.separable_attention("triton", *call(leaves))
        results.append((out, *torch.autograd.grad(out, list(leaves.values()), direction)))
    for near, far_result in zip(*results, strict=True):
        torch.testing.assert_close(near, far_result, rtol=2e-3, atol=2e-3)


def test_no_more_than_the_input_is_saved_for_backward(device: torch.device) -> None:
    """N D values: x itself; one weight a token and 2 D + 1 statistics a slice beside it."""
    case = Case((2, 60, 24))
    leaves = {
        name: value.requires_grad_()
        for name, value in inputs_of(case, torch.float32, device).items()
    }
    given = {value.data_ptr() for value in leaves.values()}
    saved: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        if value.data_ptr() not in given:
            saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        ops.separable_attention("triton", *call(leaves))
    assert sum(value.numel() for value in saved) == 2 * 60 + 2 * (2 * 24 + 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts a CPU's allocations")
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_a_training_step_holds_the_output_and_one_gradient(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dx lies where dv did, and what one program leaves for another is a share of it."""
    monkeypatch.setattr(attention, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(attention, "run", lambda *_: None)
    forget_plans()
    torch.utils.deterministic.fill_uninitialized_memory = False
    layer = SeparableAttention(dim, backend="triton", dtype=torch.bfloat16)
    x = torch.empty(1024, 256, dim, dtype=torch.bfloat16, requires_grad=True)
    grad_out = torch.empty_like(x)

    def step() -> tuple[Tensor, ...]:
        out = layer(x)
        return out, *torch.autograd.grad(out, [x, *layer.parameters()], grad_out)

    step()
    _, peak, _ = tensor_bytes(step)
    assert peak <= 2.32 * x.nbytes


@pytest.mark.parametrize(
    "dim, dtype, in_place",
    [
        (192, torch.bfloat16, True),
        (256, torch.float16, True),
        (257, torch.bfloat16, False),  # programs share a token's channels out
        (64, torch.float32, True),
        (65, torch.float32, False),
    ],
)
def test_dx_takes_the_place_of_dv_where_a_program_has_all_channels(
    dim: int, dtype: torch.dtype, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "architecture", lambda _: "sm_90")
    forget_plans()
    x = torch.zeros(1, 16, dim, dtype=dtype)
    tensors = [x, None, x.new_zeros(1 + 2 * dim, dim), None, x.new_zeros(dim, dim), None]
    given: list[dict[str, Tensor | None]] = []
    monkeypatch.setattr(attention, "run", lambda _, __, tensors, *___: given.append(tensors))
    options = (None, 0.0, "relu", 1, 1)
    _, weights, statistics = attention.separable_attention(*tensors, None, *options)
    saved = (weights, statistics)
    grads = attention.separable_attention_backward(
        x, None, *tensors[:5], None, *saved, *options[1:], True, True
    )
    assert (given[-1]["grad_v_ptr"] is grads[0]) == in_place
    assert given[-1]["grad_x_ptr"] is grads[0]


def test_float64_is_refused_by_the_operator(device: torch.device) -> None:
    inputs = inputs_of(Case((1, 3, 4)), torch.float64, device)
    with pytest.raises(TypeError, match="float64 goes through"):
        ops.separable_attention_inference("triton", *call(inputs))


@pytest.mark.parametrize("allowed, expected", [("highest", "ieee"), ("high", "tf32")])
def test_float32_is_rounded_to_tf32_only_where_torch_allows_it(allowed: str, expected: str) -> None:
    x = torch.zeros(1, 2, 3)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        assert attention.call_of(x, x, "relu", 1, 1).precision == expected
        assert attention.call_of(x.half(), x.half(), "relu", 1, 1).precision == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype, kept", [(torch.float16, True), (torch.float32, False)])
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_asks_of_every_call_what_its_kernels_depend_on(
    training: bool,
    dtype: torch.dtype,
    kept: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rest is kept from the first call; not in float32, where a setting of torch's counts."""
    forget_plans()
    layer = SeparableAttention(16, backend="triton", device=device, dtype=dtype).train(training)
    x = torch.randn(2, 19, 16, device=device, dtype=dtype)
    without_bias = copy.deepcopy(layer)
    without_bias.out_proj.bias = None
    frozen = copy.deepcopy(layer).requires_grad_(False)
    unaligned = torch.cat([x[0, 0, :1], x.flatten()])[1:].view_as(x)  # not in 16-byte words
    calls = [
        (layer, x, x),
        (layer, unaligned, x),
        (layer, x, x.mT.contiguous().mT),
        (layer, x, x[:, :, :1].expand_as(x)),
        (layer, x.mT.contiguous().mT, x),
        (layer, x[:, :7], x[:, :7]),
        (layer, x[:1], x[:1]),
        (without_bias, x, x),
        (frozen, x, x),
    ]

    def results(module: nn.Module, x: Tensor, gradient: Tensor, **options: bool) -> list[Tensor]:
        if not training:
            result = module(x, **options)
            return [result[0] if isinstance(result, tuple) else result]
        x = x.detach().requires_grad_()
        result = module(x, **options)
        out = result[0] if isinstance(result, tuple) else result
        leaves = [x, *(leaf for leaf in module.parameters() if leaf.requires_grad)]
        return [out, *torch.autograd.grad(out, leaves, gradient)]

    with torch.set_grad_enabled(training):
        # With the weights the call goes another way, through the operator.
        expected = [results(*call, need_weights=True) for call in calls]
        for _ in range(2):
            for call, values in zip(calls, expected, strict=True):
                for result, value in zip(results(*call), values, strict=True):
                    assert torch.equal(result, value)
        planners = [
            unittest.mock.Mock(wraps=getattr(attention, name), __name__=name)
            for name in ("_plan_forward", "_plan_backward")[: 1 + training]
        ]
        for planner in planners:
            monkeypatch.setattr(attention, planner.__name__, planner)
        results(*calls[0])
    assert all(planner.called != kept for planner in planners)


def test_what_is_saved_may_come_back_with_other_strides(device: torch.device) -> None:
    """As from ``torch.autograd.graph.save_on_cpu``, after a call that found out the first ones."""
    layer = SeparableAttention(16, backend="triton", device=device, dtype=torch.float16)
    x = torch.randn(2, 16, 19, device=device).half().mT.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])

    expected = step()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: value, Tensor.contiguous):
        results = step()
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=2e-3, atol=2e-3)


# Paths, tiles and tables --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, dtype, path",
    [
        ((1024, 16, 256), torch.bfloat16, "short"),
        ((1024, 1024, 128), torch.float16, "short"),
        ((1, 100, 128), torch.bfloat16, "short"),
        ((1, 256, 128), torch.bfloat16, "short"),
        ((1, 1024, 128), torch.bfloat16, "long"),
        ((1024, 1025, 64), torch.bfloat16, "long"),
        ((8, 65_536, 512), torch.bfloat16, "long"),
        ((8, 197, 513), torch.bfloat16, "wide"),
        ((1024, 256, 64), torch.float32, "short"),
        ((1024, 256, 128), torch.float32, "wide"),
    ],
)
def test_path(shape: tuple[int, int, int], dtype: torch.dtype, path: str) -> None:
    strides = (shape[1] * shape[2], shape[2], 1)
    given = attention.Call("sm_90", dtype, shape, shape, 1, 1, "relu", "ieee")
    assert attention._plan_forward(given, strides, strides, None, None, strides).path == path


@pytest.mark.parametrize("at_once", [True, False])
def test_what_a_backward_pass_needs_lies_side_by_side(at_once: bool) -> None:
    """Scratch of the launches before and after the sums of tiles takes the same place."""
    shape, strides = (6, 9, 40), (360, 40, 1)
    given = attention.Call("sm_90", torch.bfloat16, shape, shape, 1, 1, "relu", "ieee")
    with unittest.mock.patch.object(
        attention, "MOST_FUSED_BACKWARD_CHANNELS", {2: 256 if at_once else 0}
    ):
        plan = attention._plan_backward.__wrapped__(
            given, False, True, True, *[strides] * 4, None, (9, 1), None
        )

    def extents(launches: tuple[launch.Launch, ...], whole: str) -> list[tuple[int, int]]:
        names = {name for planned in launches for name in planned.operands.values()}
        return sorted(
            (part.offset, part.offset + 4 * plan.scratch.get(name, 0))
            for name, part in plan.parts.items()
            if part.whole == whole and name in names
        )

    last = 0
    for launches in (plan.before_sums, plan.after_sums):
        found = extents(launches, "scratch_ptr")
        assert all(first % 128 == 0 for first, _ in found)
        assert all(end <= first for (_, end), (first, _) in itertools.pairwise(found))
        last = max(last, *(end for _, end in found))
    assert 0 <= 4 * plan.scratch_values - last < 128
    both = extents((*plan.before_sums, *plan.after_sums), "scratch_ptr")
    assert any(first < end for (_, end), (first, _) in itertools.pairwise(both))
    of_weight = extents((*plan.before_sums, *plan.after_sums), "grad_qkv_weight_ptr")
    assert [first for first, _ in of_weight] == [2 * 40, 2 * 41 * 40]
    of_bias = extents((*plan.before_sums, *plan.after_sums), "grad_qkv_bias_ptr")
    assert [first for first, _ in of_bias] == ([2, 2 * 41] if at_once else [2])


def test_kernels_are_kept_for_parts_that_begin_alike() -> None:
    """Both tensors begin at no multiple of 16 bytes, but the part of one does."""
    seen: list[tuple[object, int]] = []

    def record(
        kind: object, tensors: object, parts: object, addresses: Any, stream: object
    ) -> None:
        seen.append((kind, addresses["part_ptr"] % 16))

    memory = torch.zeros(64, dtype=torch.bfloat16)
    for first in (4, 2):
        tensors = {"whole_ptr": memory[first:][:40]}
        parts = {"part_ptr": launch.Part("whole_ptr", 8)}
        launch.run([record], torch.device("cpu"), tensors, parts)
    (kind, address), (other_kind, other_address) = seen
    assert (address, other_address) == (0, 12)
    assert kind != other_kind


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 49, 64, 65, 1000])
@pytest.mark.parametrize("bands", [1, 3, 16])
@pytest.mark.parametrize("groups", [1, 2])
def test_tiles_hold_every_token_once(tokens: int, bands: int, groups: int) -> None:
    grid = launch.TokenGrid(bands, tokens * groups, tokens * groups, 8, 1, 1, groups)
    cut = tiles.tiling(grid, 64)
    rows = 64 // cut.bands
    assert cut.slices == cut.bands * groups
    assert cut.bands == 1 or (cut.band_tiles == 1 and rows >= max(grid.tokens, 16))
    assert cut.band_tiles * rows >= grid.tokens > (cut.band_tiles - 1) * rows
    assert cut.tiles // cut.band_tiles * cut.bands >= bands


@pytest.mark.parametrize("channels", range(1, 520, 7))
def test_chunks_hold_all_channels_in_powers_of_two(channels: int) -> None:
    widths = configs.chunk_widths(channels)
    assert all(width & (width - 1) == 0 for width in widths)
    assert min(widths) >= (16 if channels <= 16 else 32)
    assert list(widths) == sorted(widths, reverse=True) and len(widths) <= 3
    assert channels <= sum(widths) <= configs.padded_width(channels)
    # Above 128 a piece of 32 must be full.
    assert widths[-1] != 32 or channels < 129 or sum(widths) == channels
    most = 31 if channels < 129 else 63
    assert sum(widths) <= max(16, channels + most, 1.15 * channels) or len(widths) == 3


def test_every_configuration_is_listed() -> None:
    choices = list(configs.every_config())
    assert {choice.architecture for choice in choices} == {*configs.TABLES, "other"}
    listed = {
        (choice.kernel, choice.architecture, choice.itemsize, choice.config) for choice in choices
    }
    kernels = {choice.kernel for choice in choices}
    for kernel in kernels:
        for arch in (*configs.TABLES, "other"):
            for itemsize in (2, 4):
                for channels in (1, 33, 64, 65, 100, 256, 300, 512):
                    if channels > 64 and itemsize == 4 and kernel in FUSED_KERNELS:
                        continue
                    if channels > 256 and kernel in NARROW_KERNELS:
                        continue
                    config = configs.config_of(kernel, arch, itemsize, channels)
                    assert (kernel, arch, itemsize, config) in listed
                    for side in (config.tokens, config.columns):
                        assert side & (side - 1) == 0


# On a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 100, 64), (1, 4096, 64), (2, 100, 640)], ids=name_of)
def test_cuda_graph(shape: tuple[int, ...], device: torch.device) -> None:
    inputs = inputs_of(Case(shape), torch.bfloat16, device)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}

    def step() -> list[Tensor]:
        seed = torch.randint(2**31 - 1, (1,), device=device)
        arguments = call(leaves, seed=seed, dropout_p=0.1)
        out, _, _ = ops.separable_attention("triton", *arguments)
        return [out, *torch.autograd.grad(out.sum(), list(leaves.values()))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
    graph.replay()
    torch.cuda.synchronize()
    first = [value.clone() for value in captured]
    graph.replay()
    torch.cuda.synchronize()
    assert all(value.isfinite().all() for value in first)
    assert not torch.equal(first[0], captured[0])  # another draw


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_a_stream_of_its_own(path: str, device: torch.device) -> None:
    shape = {"short": (256, 64, 128), "long": (1, 20_000, 128), "wide": (2, 500, 768)}[path]
    inputs = inputs_of(Case(shape), torch.bfloat16, device)
    expected = ops.separable_attention_inference("triton", *call(inputs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = ops.separable_attention_inference("triton", *call(inputs))
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(result, expected)


@pytest.mark.gpu
def test_the_layer_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        device = torch.device("cuda:1")
        check_layer(
            separable_attention, Case((2, 50, 64)), torch.bfloat16, device, backend="triton"
        )
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 512, 1024])
def test_more_than_two_to_the_31_values(dim: int, device: torch.device) -> None:
    if torch.cuda.get_device_properties(device).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    tokens = 2**31 // dim + 130
    inputs = inputs_of(Case((1, 300, dim)), torch.bfloat16, device)
    few = inputs["x"]
    many = few[:, torch.arange(tokens, device=device) % 300]
    out = ops.separable_attention_inference("triton", *call(inputs, x=many, x_prev=few))
    expected = ops.separable_attention_inference("triton", *call(inputs))
    for first in (0, tokens // 300 // 2 * 300, (tokens // 300 - 1) * 300):
        torch.testing.assert_close(out[:, first : first + 300], expected, rtol=2e-2, atol=2e-2)


GPU_SHAPES = {"short": (256, 64, 128), "long": (1, 20_000, 128), "wide": (2, 500, 768)}


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_a_hundred_times(path: str, device: torch.device) -> None:
    """Where a result would depend on the order in which programs end, some run shows it."""
    inputs = inputs_of(Case(GPU_SHAPES[path]), torch.bfloat16, device)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    seed = torch.tensor([5], device=device)
    grad = torch.randn_like(inputs["x"])

    def step() -> list[Tensor]:
        results = ops.separable_attention("triton", *call(leaves, seed=seed, dropout_p=0.1))
        return [*results, *torch.autograd.grad(results[0], list(leaves.values()), grad)]

    first = step()
    for _ in range(99):
        assert all(torch.equal(one, other) for one, other in zip(step(), first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("grad", ["sum", "transposed"])
def test_gradients_of_any_stride_in_the_tables_tiles(
    grad: str, path: str, device: torch.device
) -> None:
    case = Case(GPU_SHAPES[path], memory="transposed", grad=grad)
    check_layer(separable_attention, case, torch.bfloat16, device, backend="triton")


def test_a_launch_makes_its_tensors_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    guard = launch.on_device(torch.device("cuda", 1))
    assert isinstance(guard, torch.accelerator.device_index) and guard.idx == 1
    assert isinstance(launch.on_device(torch.device("cuda", 0)), contextlib.nullcontext)
