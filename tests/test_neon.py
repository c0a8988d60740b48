"""The cross build for 64-bit ARM by disassembly; `make test-neon` makes it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

BINARY = Path(__file__).resolve().parent.parent / "build/neon/csrc/tests/kernel_tests"
OBJDUMP = "aarch64-linux-gnu-objdump"
TILE = 24  # sums of the micro-kernel: 8 rows of 3 vectors


def loops(disassembly: str) -> Iterator[tuple[str, list[str]]]:
    """The function and instructions of every stretch that ends by jumping to its beginning."""
    function, places, instructions = "", {}, []
    for line in disassembly.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function, places, instructions = match[1], {}, []
        elif match := re.match(r" *([0-9a-f]+):\t(.+)", line):
            places[match[1]] = len(instructions)
            instructions.append(match[2])
            jump = re.match(r"b\.\w+\t([0-9a-f]+) ", match[2])
            if jump and jump[1] in places:
                yield function, instructions[places[jump[1]] :]


@pytest.mark.skipif(not BINARY.exists(), reason="make test-neon has not built the kernels")
@pytest.mark.skipif(shutil.which(OBJDUMP) is None, reason=f"{OBJDUMP} is not installed")
def test_the_innermost_loops_multiply_whole_vectors_and_spill_nothing() -> None:
    disassembly = subprocess.run(
        [OBJDUMP, "--disassemble", "--no-show-raw-insn", str(BINARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {"4s": 0, "2d": 0}
    for function, body in loops(disassembly):
        multiplications = [text for text in body if text.startswith("fmla\t")]
        if "multiply" not in function or len(multiplications) < TILE or len(body) > 3 * TILE:
            continue
        lanes = {re.match(r"fmla\tv\d+\.(\w+)", text)[1] for text in multiplications}
        assert len(multiplications) == TILE and len(lanes) == 1, function
        assert not [text for text in body if "[sp" in text or "\tmov" in text], function
        found[lanes.pop()] += 1
    assert found["4s"] >= 4 and found["2d"] >= 4  # float and double, by rows and by columns
