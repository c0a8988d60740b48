"""A short run of the fuzzer, and that it finds what it is there to find."""

from __future__ import annotations

import fuzz
import pytest
import torch
from torch import Tensor

from sep_attn import functional, native

if native.unavailable_reason() is not None:
    pytest.skip(f"native: {native.unavailable_reason()}", allow_module_level=True)

CHUNK = 20


@pytest.mark.parametrize("first", range(0, 100, CHUNK))
def test_random_calls_are_right(first: int) -> None:
    assert fuzz.failures(seed=1, numbers=range(first, first + CHUNK)) == []


def test_calls_reach_every_option() -> None:
    calls = [fuzz.draw(0, number) for number in range(500)]
    assert {call.function for call in calls} == {"layer", "inference", "pool", "gate"}
    assert {call.dtype for call in calls} == {
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
    }
    assert {call.capability for call in calls} == set(native.capabilities())
    assert {call.case.memory for call in calls} == {*fuzz.LAYOUTS, "expanded"}
    assert {call.case.mask for call in calls} == {None, *fuzz.MASKS}
    assert any(call.case.prev_shape is not None for call in calls)
    assert any(call.case.shape[0] == 0 for call in calls)
    assert fuzz.draw(0, 7) == calls[7]


def test_a_wrong_result_is_reported_with_the_line_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*args: Tensor, backend: str, **options: object) -> Tensor:
        y = gate(*args, backend=backend, **options)  # type: ignore[arg-type]
        return y + 1e-3 * y.detach() if backend == "native" else y

    gate = functional.gate
    monkeypatch.setattr(functional, "gate", wrong)
    number = next(n for n in range(500) if fuzz.draw(3, n).function == "gate")
    assert fuzz.main(["--seed", "3", "--first", str(number), "--cases", "1"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(f"python tests/fuzz.py --seed 3 --first {number} --cases 1  # ")
    assert "out: 0.00" in printed
