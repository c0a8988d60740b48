"""Products under way, in machine code as ``nvdisasm`` prints it."""

from __future__ import annotations

import pytest

from benchmarks.hazards import disturbed_products

MULTIPLY = "HGMMA.64x16x16.F32.BF16 R24, R56, gdesc[UR8], R24"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def code(*lines: str) -> str:
    return "\n".join(
        f"{line}" if line.startswith(".L") else f"        /*{16 * i:04x}*/    {line} ;"
        for i, line in enumerate((*lines, "EXIT"))
    )


@pytest.mark.parametrize(
    "lines",
    [
        (MULTIPLY + ", gsb0", "MOV R60, R2", WAIT, "MOV R56, R2"),
        (MULTIPLY + ", gsb0", "IMAD.WIDE R54, P0, R4, 0x4, R6", WAIT),
        (MULTIPLY, "R2UR UR4, R57", MULTIPLY.replace("R56", "R60") + ", gsb0", WAIT),
        (
            "@!P0 MOV R56, R2",
            MULTIPLY + ", gsb0",
            "@P1 FADD R3, R56, R57",
            WAIT,
            "FADD R4, R24, R25",
        ),
        # One group may stay under way: the first is done.
        (
            *(MULTIPLY + ", gsb0", MULTIPLY.replace("R56", "R60").replace("R24", "R32") + ", gsb0"),
            *("WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R56, R24", WAIT),
        ),
        (".L_x_1:", MULTIPLY + ", gsb0", WAIT, "MOV R56, R2", "@P0 BRA `(.L_x_1)"),
    ],
)
def test_undisturbed(lines: tuple[str, ...]) -> None:
    assert disturbed_products(code(*lines)) == []


@pytest.mark.parametrize(
    "lines, fault",
    [
        ((MULTIPLY + ", gsb0", "@P0 MOV R59, R2", WAIT), "MOV R59"),
        ((MULTIPLY + ", gsb0", "LDS.128 R53, [R4]", WAIT), "LDS.128"),
        ((MULTIPLY + ", gsb0", "STSM.16.M88.4 [R4], R21", WAIT), "adds to what it uses"),
        ((MULTIPLY + ", gsb0", "BRA.U UP0, `(.L_x_2)", "MOV R56, R2", ".L_x_2:", WAIT), "MOV R56"),
        ((MULTIPLY, MULTIPLY.replace("R56", "R28") + ", gsb0", WAIT), "HGMMA"),
        ((MULTIPLY, MULTIPLY.replace("R24", "R28") + ", gsb0", WAIT), "HGMMA"),
        ((MULTIPLY + ", gsb0", "IMAD.WIDE R55, R4, 0x4, R6", WAIT), "IMAD.WIDE"),
        ((MULTIPLY + ", gsb0", "FADD R3, R24, R4", WAIT), "adds to what it uses"),
        ((MULTIPLY + ", gsb0", "STG.E.128 desc[UR4][R2.64], R21", WAIT), "adds to what it uses"),
        ((MULTIPLY, "HGMMA.64x16x16.F32.BF16 R52, gdesc[UR8], R52, gsb0", WAIT), "HGMMA"),
        # Round a loop, and past a wait that leaves a group.
        ((".L_x_1:", "MOV R56, R2", MULTIPLY + ", gsb0", "@P0 BRA `(.L_x_1)", WAIT), "MOV R56"),
        (
            (
                *(MULTIPLY + ", gsb0", MULTIPLY.replace("R56", "R60") + ", gsb0"),
                *("WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R60, R2", WAIT),
            ),
            "MOV R60",
        ),
    ],
)
def test_disturbed(lines: tuple[str, ...], fault: str) -> None:
    found = disturbed_products(code(*lines))
    assert len(found) == 1
    assert fault in found[0]
