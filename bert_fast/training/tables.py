"""Files of rows: CSV, TSV, JSON lines, JSON arrays and Parquet, with the place of every row.

Only what the formats themselves say is checked here; what a task wants of the rows is in
`readers.py`. Every error names the file and the line (or row) and what is expected there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from .text import csv_records, parse_json, read_lines, suffix_of, with_header

Rows = tuple[list[dict[str, Any]], Sequence[int]]


@dataclass(frozen=True)
class Table:
    """Rows of a file, each a dict by column name, and where each one begins."""

    file: Path
    rows: list[dict[str, Any]]
    places: Sequence[int]  # line numbers from 1; row numbers where the format has no lines
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Of any row: a line of JSON may lack what another one has."""
        return list(dict.fromkeys(chain.from_iterable(self.rows)))

    def where(self, row: int) -> str:
        """As errors name it: `train.csv, line 17`."""
        return f"{self.file}, {self.unit} {self.places[row]}"


def read_table(file: Path) -> Table:
    """The rows of a .csv, .tsv, .jsonl, .json or .parquet file; CSV and TSV begin with a header.

    TSV is read as GLUE's files are written: a tab always separates, quotes are text. A .json file
    is an array of objects, or JSON lines. Any but Parquet may end in .gz.

    Raises: ValueError for a file that is not what its name says, or without rows; OSError for one
        that cannot be read.
    """
    suffix = suffix_of(file)
    if suffix not in READERS:
        raise ValueError(f"{file}: unknown kind {suffix!r}, expected one of {', '.join(READERS)}")
    rows, places = READERS[suffix](file)
    if not rows:
        raise ValueError(f"{file} has no rows")
    return Table(file, rows, places, "row" if isinstance(places, range) else "line")


def _csv(file: Path) -> Rows:
    # A quoted field may hold line ends, which the reader has to see as they are.
    text = "\n".join(read_lines(file))
    return _rows(file, csv_records(io.StringIO(text, newline="")))


def _tsv(file: Path) -> Rows:
    lines = enumerate(read_lines(file), 1)
    return _rows(file, ((n, line.split("\t")) for n, line in lines if line.strip(" ")))


def _rows(file: Path, records: Iterable[tuple[int, list[str]]]) -> Rows:
    try:
        found = list(with_header(records))
    except ValueError as error:
        raise ValueError(f"{file}, {error}") from None
    return [row for _, row in found], [place for place, _ in found]


def _jsonl(file: Path) -> Rows:
    rows, places = [], []
    for number, line in enumerate(read_lines(file), 1):
        if line.strip():
            rows.append(_object(parse_json(line, f"{file}, line {number}"), file, number, "line"))
            places.append(number)
    return rows, places


def _json(file: Path) -> Rows:
    lines = read_lines(file)
    if not "".join(lines[:1]).lstrip().startswith("["):
        return _jsonl(file)
    values = parse_json("\n".join(lines), str(file))
    rows = [_object(value, file, number, "item") for number, value in enumerate(values, 1)]
    return rows, range(1, len(rows) + 1)


def _object(value: Any, file: Path, number: int, unit: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f"{file}, {unit} {number}: {type(value).__name__}, expected an object "
            '({"text": ..., "label": ...})'
        )
    return value


def _parquet(file: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: reading Parquet needs pyarrow (pip install pyarrow)") from None
    with file.open("rb"):  # a file that is not there is an OSError, as in the other formats
        pass
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: not Parquet ({error})") from None
    return rows, range(1, len(rows) + 1)


READERS: dict[str, Callable[[Path], Rows]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
