"""What each fine-tuning task reads: texts with labels, pairs of texts, words with labels.

Labels become ids here: names sorted (integers by value), or the order a model already has. SQuAD's
files are read in `squad.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tables import READERS, Table, read_lines, read_table

# GLUE's own headers: text, second text, label. Looked for where the default names are absent.
GLUE = (
    ("sentence", None, "label"),  # SST-2
    ("#1 String", "#2 String", "Quality"),  # MRPC
    ("question1", "question2", "is_duplicate"),  # QQP
    ("sentence1", "sentence2", "score"),  # STS-B
    ("sentence1", "sentence2", "gold_label"),  # MNLI
    ("sentence1", "sentence2", "label"),  # RTE, WNLI
    ("question", "sentence", "label"),  # QNLI
)
# Pairs that are alike, without a score.
ALIKE = (
    ("text", "text_b", None),
    ("anchor", "positive", None),
    ("sentence1", "sentence2", None),
)
WORD_COLUMNS = ("tokens", "words", "text")
TAG_COLUMNS = ("labels", "label", "ner_tags", "tags")


@dataclass(frozen=True)
class Columns:
    """Names of columns, as asked for; None where nothing was asked."""

    text: str | None = None
    text_b: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Texts:
    """Rows for a sequence-level task; `labels` as in the file, none where there are no labels."""

    table: Table
    texts: list[str]
    texts_b: list[str] | None
    labels: list[Any]
    label_column: str | None

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, row: int) -> str:
        return f"{self.table.where(row)}, column {self.label_column!r}"


@dataclass(frozen=True)
class Words:
    """Rows for token classification: the words of each and their labels' names."""

    file: Path
    words: list[list[str]]
    labels: list[list[str]]
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.words)


def read_texts(
    file: Path, pairs: bool | None, columns: Columns | None = None, labelled: bool = True
) -> Texts:
    """Texts with labels; labels may be absent unless `labelled`.

    The columns are those asked for, else `text`, `text_b` and `label`, else GLUE's names.
    pairs: two texts a row; None: where the columns are so.

    Raises: ValueError naming file, line and column for a column that is absent, a text that is no
        string, and a label that is missing; OSError for a file that cannot be read.
    """
    table = read_table(file)
    text, text_b, label = _columns(table, columns or Columns(), pairs, labelled)
    labels = _labels(table, label) if label is not None else []
    texts_b = _texts(table, text_b) if text_b is not None else None
    return Texts(table, _texts(table, text), texts_b, labels, label)


def _columns(
    table: Table, asked: Columns, pairs: bool | None, labelled: bool
) -> tuple[str, str | None, str | None]:
    usual = (("text", "text_b", "label"), ("text", None, "label"))
    if asked == Columns():
        two_first = sorted(GLUE, key=lambda names: names[1] is None)
        for names in (*usual, *two_first, *(() if labelled else ALIKE)):
            wanted = pairs is None or pairs is (names[1] is not None)
            if wanted and set(names) - {None} <= set(table.columns):
                return names
    text, label = asked.text or "text", asked.label or "label"
    text_b = asked.text_b or ("text_b" if pairs else None)
    options = {"--text-column": text, "--text-b-column": text_b, "--label-column": label}
    if not labelled and asked.label is None and label not in table.columns:
        del options["--label-column"]
    for option, name in options.items():
        if name is not None and name not in table.columns:
            raise ValueError(
                f"{table.file} has no column {name!r}; its columns are "
                f"{', '.join(map(repr, table.columns))} (name one with {option})"
            )
    return text, text_b, options.get("--label-column")


def _field(table: Table, row: int, column: str) -> Any:
    try:
        return table.rows[row][column]
    except KeyError:
        raise ValueError(f"{table.where(row)}: no field {column!r}") from None


def _labels(table: Table, column: str) -> list[Any]:
    labels = [_field(table, row, column) for row in range(len(table))]
    for row, value in enumerate(labels):
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            raise ValueError(f"{table.where(row)}, column {column!r}: no label")
        if isinstance(value, list | dict) or (isinstance(value, float) and math.isinf(value)):
            raise ValueError(
                f"{table.where(row)}, column {column!r}: label {value!r}, expected a string or a "
                "finite number: one label a row"
            )
    return labels


def _texts(table: Table, column: str) -> list[str]:
    texts = []
    for row in range(len(table)):
        text = _field(table, row, column)
        if not isinstance(text, str):
            raise ValueError(
                f"{table.where(row)}, column {column!r}: {text!r} is no string, expected a text"
            )
        texts.append(text)
    return texts


# -- labels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """The label names of a classifier, by id; none for regression."""

    names: tuple[str, ...]

    @property
    def regression(self) -> bool:
        return not self.names

    def encode(self, examples: Texts) -> list[int] | list[float]:
        """Ids, or numbers for regression; ValueError for a label that is not one of these."""
        if self.regression:
            numbers = [_number(value) for value in examples.labels]
            for row, number in enumerate(numbers):
                if number is None:
                    raise ValueError(
                        f"{examples.where(row)}: {examples.labels[row]!r}, expected a number"
                    )
            return [number for number in numbers if number is not None]
        ids = {name: i for i, name in enumerate(self.names)}
        for row, value in enumerate(examples.labels):
            if label_name(value) not in ids:
                raise ValueError(
                    f"{examples.where(row)}: label {value!r}, expected one of {_listed(self.names)}"
                )
        return [ids[label_name(value)] for value in examples.labels]


def labels_of(
    examples: Texts, known: Mapping[str, int] | None = None, regression: bool | None = None
) -> Labels:
    """The labels of training data.

    Args:
        known: label2id of the model's config: its order is kept where it has all of them.
        regression: None decides: labels that are all numbers, not all of them whole, are scores.

    Raises: ValueError where all labels are the same, and for a label that is no number though
        `regression` was asked for.
    """
    if regression is None:
        numbers = [_number(value) for value in examples.labels]
        regression = None not in numbers and any(n != int(n) for n in numbers if n is not None)
    if regression:
        scores = Labels(())
        scores.encode(examples)
        return scores
    names = {label_name(value) for value in examples.labels}
    if len(names) == 1:
        raise ValueError(f"{examples.table.file}: every label is {names.pop()!r}, expected two")
    return Labels(in_order(names, known))


def in_order(names: set[str], known: Mapping[str, int] | None = None) -> tuple[str, ...]:
    """By value where all are integers, else alphabetically; as in `known` where it has all."""
    if known and names <= set(known):
        return tuple(sorted(known, key=known.__getitem__))
    if all(name.lstrip("-").isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def label_name(value: Any) -> str:
    """The name under which a label is kept: 1, 1.0, "1" and " 1 " are the same one."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value == int(value):
        return str(int(value))
    name = str(value).strip()
    whole = name.removesuffix(".0")
    return whole if whole.lstrip("-").isdecimal() else name


def _number(value: Any) -> float | None:
    """The finite number that a label is, None where it is none."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _listed(names: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


# -- words with labels --------------------------------------------------------------------------


def read_words(file: Path, columns: Columns | None = None) -> Words:
    """Words with labels for the task `tokens`.

    JSON lines, JSON and Parquet: two lists of one length in a row, in the columns asked for, else
    in `tokens` and `labels` (or `ner_tags`). Any other file is CoNLL: a word a line, its label in
    the line's last field, an empty line between sentences; lines of -DOCSTART- are left out.

    Raises: ValueError naming file, line and column for lists of different lengths, an empty file,
        and a line that has no label; OSError for a file that cannot be read.
    """
    if file.suffix.lower() in set(READERS) - {".csv", ".tsv"}:
        return _words_of_table(read_table(file), columns or Columns())
    if file.suffix.lower() == ".csv":
        raise ValueError(f"{file}: words with labels come as CoNLL, .jsonl or .parquet, not .csv")
    return _conll(file)


def _words_of_table(table: Table, asked: Columns) -> Words:
    def choose(name: str | None, usual: Sequence[str], option: str) -> str:
        for column in (name,) if name else usual:
            if column in table.columns:
                return column
        raise ValueError(
            f"{table.file} has no column {name or usual[0]!r}; its columns are "
            f"{', '.join(map(repr, table.columns))} (name one with {option})"
        )

    word_column = choose(asked.text, WORD_COLUMNS, "--text-column")
    tag_column = choose(asked.label, TAG_COLUMNS, "--label-column")
    words, labels, places = [], [], []
    for row in range(len(table)):
        pair = []
        for column in (word_column, tag_column):
            values = _field(table, row, column)
            if not isinstance(values, list) or any(v is None or v == "" for v in values):
                raise ValueError(
                    f"{table.where(row)}, column {column!r}: {str(values)[:40]!r}, expected a "
                    "list without empty values, one for each word"
                )
            pair.append([label_name(v) for v in values] if column == tag_column else values)
        if not all(isinstance(word, str) for word in pair[0]):
            raise ValueError(f"{table.where(row)}, column {word_column!r}: expected strings")
        if len(pair[0]) != len(pair[1]):
            raise ValueError(
                f"{table.where(row)}: {len(pair[0])} words in {word_column!r} but {len(pair[1])} "
                f"labels in {tag_column!r}, expected one for each"
            )
        if pair[0]:
            words.append(pair[0])
            labels.append(pair[1])
            places.append(table.places[row])
    if not words:
        raise ValueError(f"{table.file} has no words")
    return Words(table.file, words, labels, places)


def _conll(file: Path) -> Words:
    words: list[list[str]] = []
    labels: list[list[str]] = []
    places: list[int] = []
    inside = False
    for number, line in enumerate(read_lines(file), 1):
        fields = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or fields[0] == "-DOCSTART-":
            inside = False
            continue
        if len(fields) < 2 or not fields[0].strip() or not fields[-1].strip():
            raise ValueError(f"{file}, line {number}: {line[:40]!r}, expected a word and its label")
        if not inside:
            words.append([])
            labels.append([])
            places.append(number)
            inside = True
        words[-1].append(fields[0].strip())
        labels[-1].append(fields[-1].strip())
    if not words:
        raise ValueError(f"{file} has no words")
    return Words(file, words, labels, places)
