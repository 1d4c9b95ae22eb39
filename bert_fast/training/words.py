"""Words with labels, for the task `tokens`: CoNLL, and lists in the rows of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .readers import NO_LABEL, Columns, field_of, label_name
from .tables import READERS, Table, read_table
from .text import read_lines, suffix_of, whole

WORD_COLUMNS = ("tokens", "words", "text")
TAG_COLUMNS = ("labels", "label", "ner_tags", "tags")


@dataclass(frozen=True)
class Words:
    """Rows for token classification: the words of each and their labels' names.

    fields: those of a line of CoNLL.
    """

    file: Path
    words: list[list[str]]
    labels: list[list[str]]
    places: Sequence[int]
    fields: int = 1

    def __len__(self) -> int:
        return len(self.words)


def read_words(file: Path, columns: Columns | None = None, labelled: bool = True) -> Words:
    """Words with labels for the task `tokens`; unless `labelled`, labels may be absent and are not
    read, and rows without a word are kept.

    JSON lines, JSON and Parquet: two lists of one length in a row, in the columns asked for, else
    in `tokens` and `labels` (or `ner_tags`). Any other file is CoNLL: a word a line, its label in
    the line's last field, an empty line between sentences; lines of -DOCSTART- are left out, and so
    are comments: lines before a sentence that begin with # and have other fields than words do.

    Raises: ValueError naming file, line and column for lists of different lengths, an empty file,
        a line that has no label, and one of another number of fields than the first; OSError for a
        file that cannot be read.
    """
    suffix = suffix_of(file)
    if suffix in set(READERS) - {".csv", ".tsv"}:
        return _words_of_table(read_table(file), columns or Columns(), labelled)
    if suffix == ".csv":
        raise ValueError(f"{file}: words with labels come as CoNLL, .jsonl or .parquet, not .csv")
    return _conll(file, labelled)


def _words_of_table(table: Table, asked: Columns, labelled: bool) -> Words:
    def choose(name: str | None, usual: Sequence[str], option: str) -> str:
        for column in (name,) if name else usual:
            if column in table.columns:
                return column
        raise ValueError(
            f"{table.file} has no column {name or usual[0]!r}; its columns are "
            f"{', '.join(map(repr, table.columns))} (name one with {option})"
        )

    word_column = choose(asked.text, WORD_COLUMNS, "--text-column")
    tag_column = choose(asked.label, TAG_COLUMNS, "--label-column") if labelled else None
    columns = [name for name in (word_column, tag_column) if name is not None]
    words, labels, places = [], [], []
    for row in range(len(table)):
        found = []
        for column in columns:
            values = field_of(table, row, column)
            if not isinstance(values, list) or not all(map(_is_value, values)):
                raise ValueError(
                    f"{table.where(row)}, column {column!r}: {str(values)[:40]!r}, expected a "
                    "list of texts or numbers, none of them empty, one for each word"
                )
            found.append([label_name(v) for v in values] if column == tag_column else values)
        if not all(isinstance(word, str) for word in found[0]):
            raise ValueError(f"{table.where(row)}, column {word_column!r}: expected strings")
        for column, values in zip(columns, found, strict=True):
            for value in values:
                whole(value, f"{table.where(row)}, column {column!r}")
        if len(found[0]) != len(found[-1]):
            raise ValueError(
                f"{table.where(row)}: {len(found[0])} words in {word_column!r} but "
                f"{len(found[-1])} labels in {tag_column!r}, expected one for each"
            )
        if found[0] or not labelled:
            words.append(found[0])
            labels.append(found[1] if labelled else [NO_LABEL] * len(found[0]))
            places.append(table.places[row])
    if not any(words):
        raise ValueError(f"{table.file} has no words")
    return Words(table.file, words, labels, places)


def _is_value(value: Any) -> bool:
    """Whether it may be a word or a label."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and value != ""


def _by_spaces(line: str) -> list[str]:
    """Its fields; other spaces of Unicode, as between the digits of a number, part no words."""
    return [field for field in line.split(" ") if field]


def _conll(file: Path, labelled: bool) -> Words:
    words: list[list[str]] = []
    labels: list[list[str]] = []
    places: list[int] = []
    lines = [line.split("\t") if "\t" in line else _by_spaces(line) for line in read_lines(file)]
    usual, width = _width(lines)
    inside = False
    for number, fields in enumerate(lines, 1):
        if _no_word(fields):
            inside = False
            continue
        if not inside and _is_comment(fields, width):
            continue
        lacks_label = labelled and (len(fields) < 2 or not fields[-1].strip())
        if lacks_label or not fields[0].strip():
            line, wanted = " ".join(fields), "a word and its label" if labelled else "a word"
            raise ValueError(f"{file}, line {number}: {line[:40]!r}, expected {wanted}")
        if len(fields) != width:
            raise ValueError(
                f"{file}, line {number}: {len(fields)} fields, expected {width} as in line {usual}"
            )
        if not inside:
            words.append([])
            labels.append([])
            places.append(number)
            inside = True
        words[-1].append(fields[0].strip())
        labels[-1].append(label_name(fields[-1]) if labelled else NO_LABEL)
    if not words:
        raise ValueError(f"{file} has no words")
    if labelled and width == 10 and all(row[0].split("-")[0] == "1" for row in words):
        raise ValueError(
            f"{file}: CoNLL-U (ten fields, of which the first counts), expected a word first and "
            "its label last"
        )
    return Words(file, words, labels, places, width)


def _is_comment(fields: Sequence[str], width: int) -> bool:
    """A word may begin with # too; `# sent_id = 1` is none, however many fields words have."""
    setting = fields[0] == "#" and fields[2:3] == ["="]
    return setting or (fields[0].startswith("#") and len(fields) != width)


def _no_word(fields: Sequence[str]) -> bool:
    return not "".join(fields).strip() or fields[0] == "-DOCSTART-"


def _width(lines: Sequence[Sequence[str]]) -> tuple[int, int]:
    """The first line that is no comment for sure, and its number of fields."""
    found = [(number, fields) for number, fields in enumerate(lines, 1) if not _no_word(fields)]
    plain = [(number, fields) for number, fields in found if not fields[0].startswith("#")]
    number, fields = next(iter(plain or found), (0, ()))
    return number, len(fields)
