"""Everything that shows what the layer is good for, on this machine's CPU.

``python -m benchmarks --out DIR`` runs the token sweep, the short layer table and the real model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import real_model, token_sweep
from benchmarks.cpu import run as cpu

SWEEP_LIMIT = 150  # seconds; the whole stays under five minutes on two cores


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    out = ["--out", str(options.out)]
    status = token_sweep.main([*out, "--time-limit", str(SWEEP_LIMIT)])
    status = cpu.main([*out, "--quick"]) or status
    status = real_model.main(out) or status
    print(f"\n{time.perf_counter() - start:.0f} s; results in {options.out}")
    for path in sorted(options.out.iterdir()):
        print(f"  {path}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
