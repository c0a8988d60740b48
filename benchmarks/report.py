"""How results are written: CSV and JSON that carry their environment, and a printed table."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from tabulate import tabulate
except ImportError:  # make gpu takes the machine's Python as it is: tables stand in the files
    tabulate = None

Row = Mapping[str, Any]


def write_csv(path: Path, rows: Sequence[Row], environment: Mapping[str, Any]) -> None:
    """Writes rows under comment lines ``# name: value`` that hold the environment.

    Numbers have six digits; the JSON beside it has them all.
    """
    with path.open("w", newline="") as file:
        for name, value in environment.items():
            file.write(f"# {name}: {value}\n")
        if rows:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: _short(value) for key, value in row.items()} for row in rows)


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result whose key ``environment`` holds the environment."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A table to print: ``columns`` maps the key in a row to the heading."""
    body = [[row.get(key) for key in columns] for row in rows]
    if tabulate is None:
        return "(no table is printed: tabulate is not installed)"
    return tabulate(body, headers=list(columns.values()), floatfmt=".4g", missingval="")


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A table in Markdown; numbers with two digits behind the point."""
    body = [[_two_digits(row.get(key)) for key in columns] for row in rows]
    right = [any(isinstance(row.get(key), float) for row in rows) for key in columns]
    return tabulate(
        body,
        headers=list(columns.values()),
        tablefmt="github",
        disable_numparse=True,
        colalign=["right" if numbers else "left" for numbers in right] if rows else None,
    )


def threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def grouped(rows: Iterable[Row], *columns: str) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """The rows that agree in some columns, in the order in which they came."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    yield from groups.items()


def _two_digits(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
