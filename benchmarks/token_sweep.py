"""Time against the number of tokens: O(N^2) beside O(N).

``python -m benchmarks.token_sweep --out DIR`` writes ``token_sweep.csv``, ``.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import ceilings, environment, measure, plots, registry, report
from benchmarks.registry import CONTENDERS, MODES, OURS, Contender, Weights
from sep_attn import backends

FIT_OCTAVES = 4  # an exponent is fitted over the largest N down to N / 2**4
SLOW_ROUND = 2.0  # from this many seconds a round, fewer rounds are made
FAR_TOKENS = 16_384  # every contender is to get this far; beyond it only the quick ones go on
FLOOR = "floor"


@dataclass(frozen=True)
class Settings:
    """What one sweep does.

    A contender stops before a call that is predicted to take more than ``call_limit`` seconds, or
    ``far_call_limit`` beyond ``FAR_TOKENS``, or more than ``memory_limit`` bytes. ``time_limit``
    ends the whole sweep in an orderly way.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    batch: int = 1
    dim: int = registry.SWEEP_DIM
    tokens: tuple[int, ...] = registry.SWEEP_TOKENS["cpu"]
    contenders: tuple[str, ...] = registry.TOKEN_SWEEP
    seconds: float = 1.0
    call_limit: float = 8.0
    far_call_limit: float = 1.0
    memory_limit: int = 8 * 2**30
    time_limit: float = float("inf")


class Sweep:
    """One run: contenders built once, then timed at every number of tokens."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        self.environment = {
            **environment.describe(settings.device),
            "backend": backends.resolve("auto", settings.device, settings.dtype),
        }
        self.rates = (
            ceilings.gpu_rates(settings.device, settings.dtype)
            if settings.device.type == "cuda"
            else None
        )
        self._modules = {
            name: CONTENDERS[name].build(self._weights(CONTENDERS[name]))
            for name in settings.contenders
        }
        # By (mode, contender): why it goes no further, and its last N with the seconds of a call.
        self._stopped: dict[tuple[str, str], str] = {}
        self._last: dict[tuple[str, str], tuple[int, float]] = {}
        self._start = time.perf_counter()

    def _weights(self, contender: Contender) -> Weights:
        family_weights = contender.family.weights(self.settings.dim)
        return family_weights.to(self.settings.device, self.settings.dtype)

    def run(self, progress: tqdm | None = None, directory: Path | None = None) -> None:
        """Measures every mode at every N, smallest first; writes to ``directory`` as it goes."""
        for tokens in self.settings.tokens:
            for mode in MODES:
                if progress is not None:
                    progress.set_postfix_str(f"N = {tokens}, {mode}")
                if time.perf_counter() - self._start < self.settings.time_limit:
                    self._measure(tokens, mode)
                else:
                    self._leave_out(tokens, mode)
                if progress is not None:
                    progress.update()
            if directory is not None:
                self.write(directory)

    def _measure(self, tokens: int, mode: str) -> None:
        settings = self.settings
        x = registry.draw_tokens(
            settings.batch, tokens, settings.dim, settings.device, settings.dtype
        )
        states, errors = self._check(x, mode)
        right = [name for name, state in states.items() if state == "timed"]
        calls = {name: self._call(CONTENDERS[name], x, mode) for name in right}
        if self.rates is None:
            calls[FLOOR] = ceilings.cpu_products(x, mode=mode)
        round_seconds = sum(self._predicted(name, mode, tokens) or 0.0 for name in right)
        with torch.set_grad_enabled(mode == "training"):
            timings = measure.interleaved(
                calls,
                seconds=settings.seconds,
                min_rounds=3 if round_seconds > SLOW_ROUND else 5,
                sample=measure.sampler_for(settings.device),
                # The check has run a slow contender once already.
                warmup_seconds=0.0 if round_seconds > SLOW_ROUND else 0.05,
            )
        floor = self._floor(tokens, mode, timings)
        ours = timings[OURS].median if OURS in timings else None
        for name, state in states.items():
            timing = timings.get(name)
            if timing is not None:
                self._last[mode, name] = (tokens, timing.median)
            self._add_row(tokens, mode, name, state, timing, errors.get(name), ours, floor)
        self._add_row(tokens, mode, FLOOR, "timed", timings.get(FLOOR), None, ours, floor)

    def _leave_out(self, tokens: int, mode: str) -> None:
        state = f"left out: the sweep's {self.settings.time_limit:.0f} s were over"
        for name in self.settings.contenders:
            self._add_row(tokens, mode, name, state, None, None, None, None)

    def _check(self, x: Tensor, mode: str) -> tuple[dict[str, str], dict[str, float]]:
        """What becomes of each contender at this N, and the errors of those that may be timed."""
        states: dict[str, str] = {}
        errors: dict[str, float] = {}
        expected: dict[str, list[Tensor]] = {}
        plain: dict[str, list[Tensor]] = {}
        for name in self.settings.contenders:
            contender, module = CONTENDERS[name], self._modules[name]
            family = contender.family
            reason = self._stop_reason(name, mode, x.shape[1])
            if reason is not None:
                states[name] = reason
                continue
            weights = self._weights(contender)
            if family.name not in expected:
                expected[family.name] = registry.expected_results(family, weights, x, mode=mode)
            if family is registry.SEPARABLE and not plain:
                literal = CONTENDERS["literal_eager"]
                plain[family.name] = registry.layer_results(
                    literal, literal.build(weights), x, mode=mode
                )
            module.train(mode == "training")
            try:
                errors[name] = registry.verify(
                    contender,
                    module,
                    x,
                    expected[family.name],
                    mode=mode,
                    plain=plain.get(family.name),
                )
                states[name] = "timed"
            except measure.WrongResultError as error:
                states[name] = self._stopped[mode, name] = f"refused: {error}"
            except Exception as error:  # one contender's failure must not cost the others' figures
                first_line = str(error).strip().partition("\n")[0]
                states[name] = f"failed: {type(error).__name__}: {first_line}"
                self._stopped[mode, name] = states[name]
        return states, errors

    def _stop_reason(self, name: str, mode: str, tokens: int) -> str | None:
        settings, contender = self.settings, CONTENDERS[name]
        if (mode, name) not in self._stopped:
            seconds = self._predicted(name, mode, tokens)
            memory = contender.peak_bytes(
                settings.batch, tokens, settings.dim, settings.device.type, settings.dtype.itemsize
            )
            far = tokens > FAR_TOKENS
            limit = min(settings.call_limit, settings.far_call_limit if far else float("inf"))
            if seconds is not None and seconds > limit:
                self._stopped[mode, name] = (
                    f"stopped: a call at N = {tokens} would take about {seconds:.1f} s, "
                    f"the limit is {limit:.1f} s"
                )
            elif memory > settings.memory_limit:
                self._stopped[mode, name] = (
                    f"stopped: a call at N = {tokens} may take {memory / 2**30:.1f} GiB, "
                    f"the limit is {settings.memory_limit / 2**30:.1f} GiB"
                )
        return self._stopped.get((mode, name))

    def _predicted(self, name: str, mode: str, tokens: int) -> float | None:
        """Seconds a call will take, from the last N and the contender's exponent."""
        if (mode, name) not in self._last:
            return None
        last_tokens, seconds = self._last[mode, name]
        return seconds * (tokens / last_tokens) ** CONTENDERS[name].family.exponent

    def _call(self, contender: Contender, x: Tensor, mode: str) -> measure.Call:
        """One timed step, on inputs that rotate through more than a GPU's L2."""
        module = self._modules[contender.key]
        copies = measure.copies_beyond_cache(x.numel() * x.element_size(), x.device)
        # The first is x itself; the others are drawn on the device, since they are never compared.
        inputs = [x, *torch.randn(copies - 1, *x.shape, device=x.device).to(x.dtype)]
        inputs = [contender.layout.from_tokens(tokens).detach() for tokens in inputs]
        if mode == "forward":
            return measure.rotated(module, inputs)
        pairs = [(tokens.requires_grad_(), torch.randn_like(tokens)) for tokens in inputs]
        return measure.rotated(registry.training_step(module), pairs)

    def _floor(self, tokens: int, mode: str, timings: dict[str, measure.Timing]) -> float:
        if self.rates is None:
            return timings[FLOOR].median
        settings = self.settings
        return ceilings.gpu_floor(
            self.rates, settings.batch, tokens, settings.dim, settings.dtype.itemsize, mode=mode
        )

    def _add_row(
        self,
        tokens: int,
        mode: str,
        name: str,
        state: str,
        timing: measure.Timing | None,
        error: float | None,
        ours: float | None,
        floor: float | None,
    ) -> None:
        median = timing.median if timing else None
        if name == FLOOR:  # on a GPU it is computed from the device's rates, not timed
            median = floor
        self.rows.append(
            {
                "mode": mode,
                "batch": self.settings.batch,
                "tokens": tokens,
                "dim": self.settings.dim,
                "dtype": str(self.settings.dtype).removeprefix("torch."),
                "contender": name,
                "milliseconds": median and median * 1e3,
                "lower_quartile": timing and timing.lower_quartile * 1e3,
                "upper_quartile": timing and timing.upper_quartile * 1e3,
                "samples": timing.samples if timing else 0,
                "times_sep_attn": median / ours if median and ours else None,
                "times_floor": median / floor if median and floor else None,
                "error": error,
                "status": state,
            }
        )

    def result(self) -> dict[str, Any]:
        """Everything measured so far, ready for JSON and for :mod:`benchmarks.plots`."""
        return {
            "environment": self.environment,
            "settings": {
                "batch": self.settings.batch,
                "dim": self.settings.dim,
                "dtype": str(self.settings.dtype).removeprefix("torch."),
                "seconds": self.settings.seconds,
                "call_limit": self.settings.call_limit,
                "far_call_limit": self.settings.far_call_limit,
            },
            "rates": self.rates and {"flops": self.rates.flops, "bandwidth": self.rates.bandwidth},
            "exponents": exponents(self.rows),
            "rows": self.rows,
        }

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        report.write_csv(directory / "token_sweep.csv", self.rows, self.environment)
        report.write_json(directory / "token_sweep.json", self.result())


def fit_exponent(
    tokens: Sequence[int], seconds: Sequence[float], *, octaves: int | None = FIT_OCTAVES
) -> float | None:
    """The exponent of ``seconds ~ tokens ** exponent`` over the largest N.

    Args:
        tokens: every N.
        seconds: the time at each, in any unit.
        octaves: fit from the largest N down to its ``2 ** octaves``-th part; None fits all.

    Returns:
        The least-squares slope on logarithms, or None with fewer than three points to fit.
    """
    smallest = 0 if octaves is None else max(tokens) / 2**octaves
    points = [point for point in zip(tokens, seconds, strict=True) if point[0] >= smallest]
    if len(points) < 3:
        return None
    log_tokens, log_seconds = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(log_tokens, log_seconds, 1)[0])


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """mode -> contender -> fitted exponent, of rows as :class:`Sweep` makes them."""
    fitted: dict[str, dict[str, float | None]] = {}
    for mode in MODES:
        series: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row["mode"] == mode and row["milliseconds"] is not None:
                series.setdefault(row["contender"], []).append((row["tokens"], row["milliseconds"]))
        fitted[mode] = {
            name: fit_exponent(*zip(*points, strict=True)) for name, points in series.items()
        }
    return fitted


def print_tables(result: dict[str, Any]) -> None:
    """Prints, for each mode, milliseconds and speed-ups at each N, then the exponents."""
    rows = result["rows"]
    names = list(dict.fromkeys(row["contender"] for row in rows if row["milliseconds"] is not None))
    others = [name for name in names if name not in (OURS, FLOOR)]
    for mode in MODES:
        lines = []
        for tokens in dict.fromkeys(row["tokens"] for row in rows):
            line: dict[str, Any] = {"tokens": f"{tokens:,}"}
            for row in rows:
                if row["mode"] == mode and row["tokens"] == tokens:
                    line[row["contender"]] = row["milliseconds"]
                    if row["contender"] in others and row["times_sep_attn"]:
                        line[f"x {row['contender']}"] = f"{row['times_sep_attn']:.1f} x"
                    if row["contender"] == OURS:
                        line["times_floor"] = row["times_floor"]
            lines.append(line)
        lines.append({"tokens": "exponent", **result["exponents"][mode]})
        columns = {"tokens": "N", **{name: f"{name}\nms" for name in names}}
        columns |= {f"x {name}": f"speed-up over\n{name}" for name in others}
        columns["times_floor"] = f"{OURS}\n/ floor"
        print(f"\n{mode}\n{report.table(lines, columns)}")
    notes = [
        f"{r['mode']}, {r['contender']}: {r['status']}" for r in rows if r["status"] != "timed"
    ]
    print("\n".join(["", *dict.fromkeys(notes)]))


def default_memory_limit(device: torch.device) -> int:
    """Half of the memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.token_sweep", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--dim", type=int, default=defaults.dim, help="channels")
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of tokens, ascending")
    parser.add_argument(
        "--contenders", nargs="+", default=list(defaults.contenders), choices=list(CONTENDERS)
    )
    parser.add_argument("--threads", type=int, help="CPU threads; torch's default otherwise")
    parser.add_argument(
        "--seconds", type=float, default=defaults.seconds, help="time spent on each N and mode"
    )
    parser.add_argument(
        "--call-limit",
        type=float,
        default=defaults.call_limit,
        help="stop a contender whose next call would take more seconds",
    )
    parser.add_argument(
        "--far-call-limit",
        type=float,
        default=defaults.far_call_limit,
        help=f"the same beyond {FAR_TOKENS} tokens",
    )
    parser.add_argument(
        "--time-limit", type=float, default=defaults.time_limit, help="end the sweep after seconds"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here; leave the option out for the CPU")
    settings = Settings(
        device=device,
        dtype=getattr(torch, options.dtype),
        batch=options.batch,
        dim=options.dim,
        tokens=tuple(options.tokens or registry.SWEEP_TOKENS[device.type]),
        contenders=tuple(options.contenders),
        seconds=options.seconds,
        call_limit=options.call_limit,
        far_call_limit=options.far_call_limit,
        memory_limit=default_memory_limit(device),
        time_limit=options.time_limit,
    )
    # Float32 means float32 on every device: no contender may round its products to TF32.
    torch.backends.cudnn.allow_tf32 = False
    with (
        measure.threads(options.threads or torch.get_num_threads()),
        tqdm(total=len(settings.tokens) * len(MODES), desc="token sweep", unit="step") as progress,
    ):
        sweep = Sweep(settings)
        sweep.run(progress, options.out)
    result = sweep.result()
    print_tables(result)
    if any(row["milliseconds"] is not None for row in sweep.rows):
        plots.token_sweep(result, options.out / "token_sweep.png")
    wrong = [row for row in sweep.rows if str(row["status"]).startswith(("refused", "failed"))]
    return 1 if any(row["contender"] == OURS for row in wrong) else 0


if __name__ == "__main__":
    raise SystemExit(main())
