"""Build, test and measure on a machine with a GPU, with the Python at hand and no network.

``python -m benchmarks.gpu --out DIR`` takes at most nine minutes. The most important step goes
first, each in a process and under a time limit of its own, and ``DIR`` is written as it goes:
``summary.json`` (what ran and how it ended), ``log.txt`` (what every step printed), ``tests.xml``,
``.csv``, ``.json`` and ``.png`` of each table (:mod:`benchmarks.gpu_tables`) and of the token
sweep, ``microbench.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import environment, report

TIME_LIMIT = 530  # seconds for all steps together
TESTS = (
    "tests/test_triton_attention.py",
    "tests/test_inductor.py",
    "tests/test_ops.py",
    "tests/test_layer.py",
    "tests/test_differentiated.py",
    "tests/test_triton_kernels.py",
    "tests/test_special_values.py",
)
SANITIZER = "compute-sanitizer"  # NVIDIA's, of the CUDA toolkit
SANITIZER_TESTS = (
    "tests/test_triton_attention.py",
    "-k",
    "every_path_in_float16 or tiles_of_the_table",
)
TEST_WORKERS = min(12, environment.usable_cores())  # most of their time goes into compiling
LAST_WORDS = 5  # seconds that a step has to end by itself once its time is over
TAIL_LINES = 25  # of a failed step's output, printed


@dataclass(frozen=True)
class Step:
    """One process: its arguments after ``python``, the seconds it may take, the program that
    ``python`` runs under and variables of the environment."""

    name: str
    arguments: tuple[str, ...]
    limit: float
    under: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a step ended: "passed", "failed (exit 1)", "out of time" or "left out: ..."."""

    step: str
    status: str
    seconds: float


def steps(out: Path, *, dtype: str = "bfloat16") -> list[Step]:
    """All steps, most important first; what takes seconds goes before what takes minutes."""
    workers = ("-n", str(TEST_WORKERS)) if importlib.util.find_spec("xdist") else ()
    pytest = ("-m", "pytest", "-v", "-p", "no:cacheprovider")
    sweep_limit = 100

    def table(name: str, limit: float) -> Step:
        tables = ("-m", "benchmarks.gpu_tables", name, "--out", str(out), "--dtype", dtype)
        return Step(name, tables, limit)

    return [
        Step("build", ("setup.py", "build_ext", "--inplace"), 150),
        Step("describe", ("-m", "sep_attn"), 30),
        Step("compile", ("-m", "benchmarks.precompile", "--dtype", dtype), 60),
        table("floor", 100),
        Step("tests", (*pytest, *TESTS, *workers, f"--junitxml={out / 'tests.xml'}"), 150),
        table("latency", 30),
        table("memory", 30),
        table("timm", 150),
        table("attention", 60),
        Step(
            "sanitizer",
            (*pytest, *SANITIZER_TESTS, "-x"),
            60,
            # Calls of the driver that PyTorch makes to find out, and that fail, are not ours.
            under=(SANITIZER, "--error-exitcode", "3", "--report-api-errors", "no"),
            variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # each tensor has its own bounds
        ),
        Step(
            "token_sweep",
            (
                *("-m", "benchmarks.token_sweep", "--device", "cuda", "--dtype", dtype),
                *("--seconds", "0.3", "--time-limit", str(sweep_limit - 40), "--out", str(out)),
            ),
            sweep_limit,
        ),
        Step(
            "microbench",
            (
                *(*pytest, "benchmarks", "--benchmark-only"),
                *("--benchmark-max-time=0.2", "--benchmark-columns=min,median,iqr,rounds"),
                f"--benchmark-json={out / 'microbench.json'}",
            ),
            90,
        ),
    ]


def run_step(step: Step, log: Path, *, limit: float) -> Outcome:
    """Runs a step, appends what it prints to ``log``, and ends it with its children in time."""
    start = time.monotonic()
    command = [*step.under, sys.executable, *step.arguments]
    paths = filter(None, (str(environment.REPOSITORY), os.environ.get("PYTHONPATH")))
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    variables.update(step.variables)
    variables.pop("TRITON_INTERPRET", None)  # the kernels are to run on the GPU
    with log.open("a") as file:
        file.write(f"\n===== {step.name}: {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            cwd=environment.REPOSITORY,
            env=variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_take_interrupts,
        )
        try:
            code = process.wait(timeout=limit)
            status = "passed" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            status = "out of time"
            process.send_signal(signal.SIGINT)  # pytest then writes down what it has found
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=LAST_WORDS)
        finally:
            _end_group(process)
    return Outcome(step.name, status, round(time.monotonic() - start, 1))


def _take_interrupts() -> None:
    """In the step's process: what a shell starts in the background ignores interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a step's process and whatever it started and left running."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run(
    todo: Sequence[Step],
    out: Path,
    *,
    time_limit: float,
    say: Callable[[str], object] = tqdm.write,
) -> list[Outcome]:
    """Runs steps one after another within ``time_limit`` seconds and writes the summary as it goes.

    A step that fails does not keep the next from running.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("")
    header = environment.describe("cuda" if torch.cuda.is_available() else "cpu")
    outcomes: list[Outcome] = []
    start = time.monotonic()
    for step in tqdm(todo, desc="gpu", unit="step"):
        left = time_limit - (time.monotonic() - start)
        if left < 5:
            outcomes.append(Outcome(step.name, "left out: no time was left", 0.0))
        elif step.under and shutil.which(step.under[0]) is None:
            outcomes.append(Outcome(step.name, f"left out: no {step.under[0]} here", 0.0))
        else:
            say(f"{step.name} ...")
            before = log.stat().st_size
            outcomes.append(run_step(step, log, limit=min(step.limit, left)))
            if outcomes[-1].status != "passed":
                output = log.read_bytes()[before:].decode(errors="replace")
                say("\n".join(output.splitlines()[-TAIL_LINES:]))
        say(f"{step.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s")
        report.write_json(
            out / "summary.json",
            {"environment": header, "steps": [asdict(outcome) for outcome in outcomes]},
        )
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds for all")
    parser.add_argument("--only", nargs="+", help="names of the steps to run")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        cause = "it sees no GPU" if built else "it is a CPU build"
        raise SystemExit(
            f"benchmarks.gpu needs a GPU that torch can use; torch {torch.__version__} finds none "
            f"({cause}). On a CPU: make test, make bench, make microbench"
        )
    todo = steps(options.out.resolve(), dtype=options.dtype)
    names = [step.name for step in todo]
    if options.only:
        unknown = sorted(set(options.only) - set(names))
        if unknown:
            parser.error(f"--only: no step {', '.join(unknown)}; there are {', '.join(names)}")
        todo = [step for step in todo if step.name in options.only]
    outcomes = run(todo, options.out.resolve(), time_limit=options.time_limit)
    rows = [asdict(outcome) for outcome in outcomes]
    print(report.table(rows, {"step": "step", "status": "status", "seconds": "seconds"}))
    good = ("passed", f"left out: no {SANITIZER} here")
    return 0 if all(outcome.status in good for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
