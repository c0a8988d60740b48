"""Random calls of the layer, the pool and the gate on the C++ kernels, held against float64.

``python tests/fuzz.py --cases 2000 --seed 0``. A case depends on the seed and its number alone, so
the line that a failure prints runs it again by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import sys
import time
from collections.abc import Callable, Sequence

import torch
from oracle import Case, assert_as_good_as_plain, inputs_of, lay_out, make_mask, run
from torch import Tensor

from sep_attn import functional, native
from sep_attn.layout import token_shape

CPU = torch.device("cpu")
LAYOUTS = ["contiguous", "channels_last", "transposed", "interleaved", "sliced", "offset"]
MASKS = ["random", "random", "sliced", "expanded", "first_image", "all"]
ELEMENTS = 40_000  # of x, at most


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: of what, on which inputs, and how the kernels run."""

    function: str
    case: Case
    dtype: torch.dtype
    weight_memory: str
    prev_memory: str
    score_scale: float
    capability: str
    threads: int
    seed: int

    def __str__(self) -> str:
        fields = [f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self)]
        return ", ".join(fields)


# Drawing a call ----------------------------------------------------------------------------------


def _size(rng: random.Random, most: int) -> int:
    """1 to ``most``, small ones as often as large ones; powers of two and their neighbours more."""
    size = int(math.exp(rng.uniform(0, math.log(most + 1))))
    if rng.random() < 0.3:
        size = 2 ** round(math.log2(size)) + rng.choice([-1, 0, 1])
    return min(max(size, 1), most)


def _shapes(
    rng: random.Random, cross: bool
) -> tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, int] | None]:
    """The shapes of x and x_prev, and the patch size."""
    dim = _size(rng, 200)
    batch = 0 if rng.random() < 0.02 else rng.randint(1, 4)
    most = max(1, ELEMENTS // (dim * max(batch, 1)))
    kind = rng.choice(["[B, N, D]", "[B, D, P, N]", "[B, D, H, W]"])
    if kind == "[B, N, D]":
        shape, prev = (batch, _size(rng, most), dim), (batch, _size(rng, most), dim)
        return shape, prev if cross else None, None
    if kind == "[B, D, P, N]":
        groups = min(rng.randint(1, 4), most)
        counts = [_size(rng, max(1, most // groups)) for _ in range(2)]
        shape, prev = ((batch, dim, groups, count) for count in counts)
        return shape, prev if cross else None, None
    patch = (rng.randint(1, 3), rng.randint(1, 3))
    most = max(1, most // (patch[0] * patch[1]))
    rows = [_size(rng, max(1, math.isqrt(most))) for _ in range(2)]
    columns = [_size(rng, max(1, most // count)) for count in rows]
    shape, prev = (
        (batch, dim, r * patch[0], c * patch[1]) for r, c in zip(rows, columns, strict=True)
    )
    return shape, prev if cross else None, patch


def draw(seed: int, number: int) -> Call:
    """Call ``number`` of the calls that ``seed`` stands for."""
    rng = random.Random(f"{seed}/{number}")
    function = rng.choice(["layer"] * 5 + ["inference", "pool", "gate"])
    cross = function in ("layer", "inference") and rng.random() < 0.35
    shape, prev_shape, patch_size = _shapes(rng, cross)
    if function in ("pool", "gate"):
        dim, tokens = rng.randint(1, 130), rng.randint(1, 300)
        shape, patch_size = (shape[0], tokens, dim), None
    memory = rng.choice(LAYOUTS * 3 + ["expanded"] * (shape[0] > 0))
    grads = ["dense", "sum", *LAYOUTS, memory]
    case = Case(
        shape,
        patch_size=patch_size,
        memory=memory,
        prev_shape=prev_shape,
        mask=rng.choice(
            [None, None, "random", "random", "sliced", "expanded", "first_image", "all"]
        ),
        dropout_p=rng.choice([0.0, 0.0, 0.1, 0.6]),
        value_act=rng.choice(["relu", "relu", "identity"]),
        bias=rng.random() < 0.8,
        need_weights=rng.random() < 0.4,
        grad=rng.choice([name for name in grads if name != "expanded"]),
    )
    return Call(
        function,
        case,
        dtype=rng.choice([torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16]),
        weight_memory=rng.choice(["contiguous", "contiguous", "transposed", "sliced", "offset"]),
        prev_memory=rng.choice(LAYOUTS),
        score_scale=rng.choice([1.0, 1.0, 1.0, 0.0, 5.0]),
        capability=rng.choice(native.capabilities()),
        threads=rng.choice([1, 1, 2, 3, 5]),
        seed=rng.randrange(2**32),
    )


# Checking a call ---------------------------------------------------------------------------------


def _inputs(call: Call) -> dict[str, Tensor]:
    inputs = inputs_of(call.case, call.dtype, CPU, call.seed)
    inputs["qkv_weight"][0] *= call.score_scale
    for name in ("qkv_weight", "out_weight"):
        inputs[name] = lay_out(inputs[name], call.weight_memory)
    if call.weight_memory in ("sliced", "offset") and call.case.bias:
        inputs["qkv_bias"] = lay_out(inputs["qkv_bias"], call.weight_memory)
        inputs["out_bias"] = lay_out(inputs["out_bias"], call.weight_memory)
    if "x_prev" in inputs:
        inputs["x_prev"] = lay_out(inputs["x_prev"], call.prev_memory)
    return inputs


def _run_layer(call: Call, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    if call.function == "layer":
        return run(functional.separable_attention, call.case, inputs, backend=backend)
    names = ("x", "qkv_weight", "qkv_bias", "out_weight", "out_bias")
    source = inputs.get("x_prev", inputs["x"])
    torch.manual_seed(2)
    mask = make_mask(call.case.mask, token_shape(source), CPU) if call.case.mask else None
    with torch.no_grad():
        result = functional.separable_attention(
            *(inputs.get(name) for name in names),
            x_prev=inputs.get("x_prev"),
            key_padding_mask=mask,
            dropout_p=call.case.dropout_p,
            value_act=call.case.value_act,
            patch_size=call.case.patch_size,
            need_weights=call.case.need_weights,
            backend=backend,
        )
    if isinstance(result, tuple):
        return {"out": result[0], "weights": result[1]}
    return {"out": result}


def _run_part(call: Call, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The pool or the gate, on x and on scores or a context taken from the other inputs."""
    x = inputs["x"].detach().requires_grad_()
    batch, tokens, dim = x.shape
    generator = torch.Generator().manual_seed(call.seed)
    torch.manual_seed(2)
    if call.function == "pool":
        other = torch.randn(batch, tokens, generator=generator) * (1 + call.score_scale)
        memory = call.prev_memory
    else:
        other = torch.randn(batch, dim, generator=generator)
        memory = call.weight_memory
    exact = other.bfloat16().half().to(x.dtype)  # the same numbers in every dtype
    other = lay_out(exact, "contiguous" if memory == "channels_last" else memory)
    other = other.detach().requires_grad_()
    if call.function == "pool":
        mask = make_mask(call.case.mask, (batch, tokens), CPU) if call.case.mask else None
        out = functional.context_pool(x, other, key_padding_mask=mask, backend=backend)
    else:
        out = functional.gate(x, other, act=call.case.value_act, backend=backend)
    direction = torch.randn(out.shape, generator=generator).bfloat16().half().to(out.dtype)
    if call.function == "gate" and call.case.grad not in ("dense", "sum"):
        direction = lay_out(direction, call.case.grad)
    loss = out.sum() if call.case.grad == "sum" else (out * direction).sum()
    grads = torch.autograd.grad(loss, [x, other])
    return {"out": out.detach(), "grad_x": grads[0], "grad_other": grads[1]}


def check(call: Call) -> None:
    """Raises AssertionError where the kernels are further from float64 than the rule of
    :mod:`oracle` allows, or give other bits when the call is made again."""
    layer = call.function in ("layer", "inference")
    run_call: Callable[..., dict[str, Tensor]] = _run_layer if layer else _run_part
    inputs = _inputs(call)
    threads, capability = torch.get_num_threads(), native.capability()
    try:
        torch.set_num_threads(call.threads)
        native.set_capability(call.capability)
        result, again = (run_call(call, inputs, "native") for _ in range(2))
    finally:
        torch.set_num_threads(threads)
        native.set_capability(capability)
    for name, value in result.items():
        assert torch.equal(value, again[name]), f"{name} differs from one run to the next"
    plain = run_call(call, inputs, "reference")
    in_float64 = {name: value.double() for name, value in inputs.items()}
    assert_as_good_as_plain(result, plain, run_call(call, in_float64, "reference"))


def failures(seed: int, numbers: range) -> list[str]:
    """Runs calls and describes each that failed, with the command that runs it alone."""
    messages = []
    for number in numbers:
        call = draw(seed, number)
        try:
            check(call)
        except Exception as error:  # whatever it is, the other calls still run
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            messages.append(
                f"python tests/fuzz.py --seed {seed} --first {number} --cases 1  # {cause} | {call}"
            )
    return messages


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="how many calls")
    parser.add_argument("--seed", type=int, default=0, help="which calls")
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    options = parser.parse_args(arguments)
    native.poison_results(True)  # a value left unwritten shows as NaN
    start = time.perf_counter()
    failed = 0
    for first in range(options.first, options.first + options.cases, 100):
        last = min(first + 100, options.first + options.cases)
        for message in failures(options.seed, range(first, last)):
            print(message, flush=True)
            failed += 1
        if last % 500 == 0:
            print(f"{last} calls, {failed} failed, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{options.cases} calls of seed {options.seed}: {failed} failed")
    return 1 if failed or not options.cases else 0


if __name__ == "__main__":
    sys.exit(main())
