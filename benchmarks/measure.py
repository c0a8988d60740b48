"""How the benchmarks time: contenders take turns, medians count, and a wrong result never runs."""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Input = TypeVar("Input")
Call = Callable[[], Any]
Sampler = Callable[[Call, int], float]  # (call, repeats) -> seconds one call took

TURN_SECONDS = 0.02  # a fast contender is sampled for this long before the next has its turn
SAMPLE_SECONDS = 1e-3  # a call shorter than this is repeated within one sample
LEAD_IN_LIMIT = 0.2  # seconds; a longer call outweighs the caches that it starts from

# The furthest a result may lie from the float64 oracle, as a share of the oracle's largest value.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


@dataclass(frozen=True)
class Timing:
    """Seconds one call takes."""

    median: float
    lower_quartile: float
    upper_quartile: float
    samples: int
    rounds: tuple[float, ...] = ()  # the median of each round

    def ratios_to(self, other: Timing) -> tuple[float, float, float]:
        """How many times longer this call takes: the quartiles over rounds of the ratio within one.

        A machine whose pace changes from round to round changes both, and the ratio stays.

        Returns:
            The lower quartile, the median and the upper quartile.
        """
        pairs = zip(self.rounds, other.rounds, strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        lower, median, upper = (float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75]))
        return lower, median, upper

    def ratio_to(self, other: Timing) -> float:
        """The median of :meth:`ratios_to`."""
        return self.ratios_to(other)[1]


class WrongResultError(RuntimeError):
    """A contender's result is not the oracle's, so it must not be timed."""


def wall_clock(synchronize: Callable[[], object] | None = None) -> Sampler:
    """Samples by the wall clock; ``synchronize`` waits for a device that works on its own."""

    def sample(call: Call, repeats: int) -> float:
        if synchronize is not None:
            synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if synchronize is not None:
            synchronize()
        return (time.perf_counter() - start) / repeats

    return sample


def cuda_events(device: torch.device) -> Sampler:
    """Samples by events on the current stream of a CUDA device."""

    def sample(call: Call, repeats: int) -> float:
        with torch.cuda.device(device):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / repeats * 1e-3

    return sample


def sampler_for(device: torch.device) -> Sampler:
    """The clock that fits the device."""
    return cuda_events(device) if device.type == "cuda" else wall_clock()


def interleaved(
    contenders: Mapping[str, Call],
    *,
    seconds: float,
    min_rounds: int = 5,
    synchronize: Callable[[], object] | None = None,
    sample: Sampler | None = None,
    warmup_seconds: float = 0.05,
) -> dict[str, Timing]:
    """Times contenders in turns, so that a change of the machine's pace meets all of them.

    Every round gives each contender one turn: one sample of a slow call, or as many samples as
    fit into ``TURN_SECONDS``. A turn opens with one sample that is not counted, so that caches,
    allocator and threads are as this contender leaves them and not as the one before it did; the
    order is drawn anew for each round, so that none always follows the same one. Python's garbage
    collector rests. Rounds go on until ``seconds`` have passed.

    Args:
        contenders: name -> a call without arguments; results are dropped.
        seconds: wall time for all contenders together, warm-up left out.
        min_rounds: rounds made even when they take longer than ``seconds``.
        synchronize: waits until a device has finished; ignored when ``sample`` is given.
        sample: the clock; by default the wall clock.
        warmup_seconds: how long each contender runs untimed first, at least one call; 0 for none.

    Returns:
        name -> :class:`Timing`, in the order of ``contenders``.

    Raises:
        ValueError: ``min_rounds`` is below 1.
    """
    if min_rounds < 1:
        raise ValueError(f"min_rounds is {min_rounds}; at least one round must be made")
    sample = sample or wall_clock(synchronize)
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    rounds: dict[str, list[list[float]]] = {name: [] for name in contenders}
    spent = 0.0
    with _no_garbage_collection():
        expected = {name: _warm_up(contenders[name], sample, warmup_seconds) for name in order}
        while contenders and (len(rounds[order[0]]) < min_rounds or spent < seconds):
            shuffle(order)
            for name in order:
                turn, took = _turn(contenders[name], sample, expected[name])
                rounds[name].append(turn)
                spent += took
    return {name: _summary(turns) for name, turns in rounds.items()}


def _turn(call: Call, sample: Sampler, expected: float) -> tuple[list[float], float]:
    """The samples of one turn of a call expected to take so long, and the seconds it took."""
    repeats = max(1, math.ceil(SAMPLE_SECONDS / max(expected, 1e-9)))
    samples: list[float] = []
    spent = turn = 0.0
    if expected < LEAD_IN_LIMIT:
        spent += sample(call, repeats) * repeats
    while turn < TURN_SECONDS:
        samples.append(sample(call, repeats))
        took = samples[-1] * repeats
        turn += max(took, SAMPLE_SECONDS)
        spent += took
    return samples, spent


def _warm_up(call: Call, sample: Sampler, warmup_seconds: float) -> float:
    """Runs a contender untimed and says how long a call takes by now; with no warm-up, that it is
    too slow for one."""
    spent, taken = 0.0, []
    while spent < warmup_seconds:
        taken.append(sample(call, 1))
        spent += max(taken[-1], warmup_seconds / 1000)
    # The later half: the first calls may still allocate, compile or start threads.
    return statistics.median(taken[len(taken) // 2 :]) if taken else math.inf


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _summary(turns: Sequence[Sequence[float]]) -> Timing:
    samples = [taken for turn in turns for taken in turn]
    lower, median, upper = (float(q) for q in np.quantile(samples, [0.25, 0.5, 0.75]))
    rounds = tuple(statistics.median(turn) for turn in turns)
    return Timing(median, lower, upper, len(samples), rounds)


def check(
    name: str,
    results: Sequence[torch.Tensor],
    oracle: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor] | None = None,
) -> float:
    """Compares results with the float64 oracle's.

    A result may be twice as far from the oracle as plain PyTorch in the same dtype, plus 1e-5,
    and never further than ``TOLERANCES``; all as shares of the oracle's largest value.

    Args:
        name: the contender, for the message.
        results, oracle: as many tensors of the same shapes; the oracle's in float64.
        plain: what plain PyTorch gives in the dtype of ``results``, when it is known.

    Returns:
        The largest error over all results.

    Raises:
        WrongResultError: a shape or a value is wrong.
    """
    worst = 0.0
    for index, (result, expected) in enumerate(zip(results, oracle, strict=True)):
        if result.shape != expected.shape:
            raise WrongResultError(
                f"{name}: result {index} has shape {tuple(result.shape)}, "
                f"expected {tuple(expected.shape)}"
            )
        error = _relative_error(result, expected)
        allowed = TOLERANCES[result.dtype]
        if plain is not None:
            allowed = min(allowed, 2 * _relative_error(plain[index], expected) + 1e-5)
        if not error <= allowed:  # NaN fails too
            raise WrongResultError(
                f"{name}: result {index} is {error:.2e} away from the float64 oracle, "
                f"at most {allowed:.2e} is allowed"
            )
        worst = max(worst, error)
    return worst


def _relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    if result.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float(((result.detach().to(expected.dtype) - expected).abs().max() / scale).item())


def rotated(function: Callable[[Input], object], inputs: Sequence[Input]) -> Call:
    """A call that hands ``function`` the next of ``inputs`` each time, round and round."""
    turns = itertools.cycle(inputs)
    return lambda: function(next(turns))


def copies_beyond_cache(bytes_each: int, device: torch.device) -> int:
    """How many inputs to rotate through so that a GPU's L2 never holds the next one; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(2 * cache / max(bytes_each, 1)))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs a block with ``count`` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
