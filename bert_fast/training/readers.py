"""What fine-tuning reads: texts with labels, and pairs of texts.

Labels become ids here: names sorted (integers by value), or the order a model already has. Words
with labels are read in `words.py`, SQuAD's files in `squad.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..ops.masked_lm_loss import IGNORED
from .tables import Table, read_table
from .text import whole

# GLUE's own headers: text, second text, label. Looked for where the default names are absent.
GLUE = (
    ("sentence", None, "label"),  # SST-2
    ("#1 String", "#2 String", "Quality"),  # MRPC
    ("question1", "question2", "is_duplicate"),  # QQP
    ("sentence1", "sentence2", "score"),  # STS-B
    ("sentence1", "sentence2", "gold_label"),  # MNLI
    ("sentence1", "sentence2", "label"),  # RTE, WNLI
    ("premise", "hypothesis", "label"),  # MNLI, as `datasets` has it
    ("question", "sentence", "label"),  # QNLI
)
NO_LABEL = str(IGNORED)
# Pairs for embeddings: with a score where there is one, else of texts that are alike.
PAIRS = tuple(
    (*pair, score)
    for score in ("label", "score", "similarity", "similarity_score", None)
    for pair in (("text", "text_b"), ("anchor", "positive"), ("sentence1", "sentence2"))
)


@dataclass(frozen=True)
class Columns:
    """Names of columns, as asked for; None where nothing was asked."""

    text: str | None = None
    text_b: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Texts:
    """Rows for a sequence-level task; `labels` as in the file, none where there are no labels.

    columns: those that were read.
    """

    table: Table
    texts: list[str]
    texts_b: list[str] | None
    labels: list[Any]
    label_column: str | None
    columns: Sequence[str | None] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, row: int) -> str:
        return f"{self.table.where(row)}, column {self.label_column!r}"


def read_texts(
    file: Path, pairs: bool | None, columns: Columns | None = None, labelled: bool | None = True
) -> Texts:
    """Texts with labels; labels may be absent unless `labelled`, and are not read where it is None.

    The columns are those asked for, else `text`, `text_b` and `label`, else GLUE's names.
    pairs: two texts a row; None: where the columns are so, and not only the first is asked for.

    Raises: ValueError naming file, line and column for a column that is absent, a text that is no
        string, and a label that is missing; OSError for a file that cannot be read.
    """
    table = read_table(file)
    text, text_b, label = _columns(table, columns or Columns(), pairs, labelled)
    labels = _labels(table, label) if label is not None else []
    texts_b = _texts(table, text_b) if text_b is not None else None
    return Texts(table, _texts(table, text), texts_b, labels, label, (text, text_b, label))


def _columns(
    table: Table, asked: Columns, pairs: bool | None, labelled: bool | None
) -> tuple[str, str | None, str | None]:
    """What was asked for, and for the rest the first usual names that are in the table with it."""
    if asked.text_b:
        pairs = True
    elif pairs is None and asked.text:
        pairs = False
    if labelled is None:
        asked = replace(asked, label=None)
    usual = (("text", "text_b", "label"), ("text", None, "label"))
    two_first = sorted(GLUE, key=lambda names: names[1] is None)
    for names in (*usual, *two_first, *(() if labelled else PAIRS)):
        if pairs is (names[1] is None):
            continue
        label = asked.label or (None if labelled is None else names[2])
        found = (asked.text or names[0], asked.text_b or names[1], label)
        # Other texts than a task of GLUE has are not of that task: its label is not theirs.
        agrees = names not in GLUE or found[:2] == names[:2]
        if agrees and set(found) - {None} <= set(table.columns):
            return found
    options = {
        "--text-column": asked.text or "text",
        "--text-b-column": asked.text_b or ("text_b" if pairs else None),
        "--label-column": asked.label or ("label" if labelled else None),
    }
    option, name = next(
        (option, name)
        for option, name in options.items()
        if name is not None and name not in table.columns
    )
    raise ValueError(
        f"{table.file} has no column {name!r}; its columns are "
        f"{', '.join(map(repr, table.columns))} (name one with {option})"
    )


def field_of(table: Table, row: int, column: str) -> Any:
    try:
        return table.rows[row][column]
    except KeyError:
        raise ValueError(f"{table.where(row)}: no field {column!r}") from None


def _labels(table: Table, column: str) -> list[Any]:
    labels = [field_of(table, row, column) for row in range(len(table))]
    for row, value in enumerate(labels):
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            raise ValueError(f"{table.where(row)}, column {column!r}: no label")
        if isinstance(value, str):
            whole(value, f"{table.where(row)}, column {column!r}")
        if isinstance(value, list | dict) or (isinstance(value, float) and math.isinf(value)):
            raise ValueError(
                f"{table.where(row)}, column {column!r}: label {value!r}, expected a string or a "
                "finite number: one label a row"
            )
    return labels


def _texts(table: Table, column: str) -> list[str]:
    texts = []
    for row in range(len(table)):
        text = field_of(table, row, column)
        if not isinstance(text, str):
            raise ValueError(
                f"{table.where(row)}, column {column!r}: {text!r} is no string, expected a text"
            )
        texts.append(whole(text, f"{table.where(row)}, column {column!r}"))
    return texts


def others(examples: Texts) -> list[str]:
    """The file's columns that are not read."""
    return [name for name in examples.table.columns if name not in examples.columns]


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
                    f"{examples.where(row)}: label {value!r}, expected one of {listed(self.names)}"
                )
        return [ids[label_name(value)] for value in examples.labels]


def labels_of(
    examples: Texts, known: Mapping[str, int] | None = None, regression: bool | None = None
) -> Labels:
    """The labels of training data.

    Args:
        known: label2id of the model's config: its order is kept where it has all of them.
        regression: None decides: labels that are all numbers, not all of them whole, are scores.

    Raises: ValueError where all labels are the same, for the label -100, and for one that is no
        number though `regression` was asked for.
    """
    if regression is None:
        numbers = [_number(value) for value in examples.labels]
        regression = None not in numbers and any(n != int(n) for n in numbers if n is not None)
    if regression:
        scores = Labels(())
        scores.encode(examples)
        return scores
    names = names_of(examples)
    if NO_LABEL in names:
        row = next(i for i, value in enumerate(examples.labels) if label_name(value) == NO_LABEL)
        raise ValueError(f"{examples.where(row)}: label {NO_LABEL}, which is torch's for no label")
    if len(names) == 1:
        raise ValueError(f"{examples.table.file}: every label is {names.pop()!r}, expected two")
    return Labels(in_order(names, known))


def names_of(examples: Texts) -> set[str]:
    """The names of the labels that occur."""
    return {label_name(value) for value in examples.labels}


def classes_of(examples: Texts, known: Container[str]) -> set[str]:
    """The labels that are classes. -1, by which the Hub means no label, is none where it is rarer
    than a hundredth of any other and not `known`: of sentiments -1, 0 and 1 it is one."""
    counts = Counter(map(label_name, examples.labels))
    least = min((n for name, n in counts.items() if name != "-1"), default=0)
    return set(counts) - ({"-1"} if counts["-1"] < least / 100 and "-1" not in known else set())


def labelled(examples: Texts, classes: Collection[str]) -> Texts:
    """Without the rows whose label says that there is none: "-" in a column gold_label (annotators
    disagreed), and -1 where the classes are numbers from 0 on and it is none of them.

    Raises: ValueError where no row is left.
    """
    absent = {"-"} if examples.label_column == "gold_label" else set()
    numbers = set(classes) - absent
    # Of two classes -1 and 1, or -1 and 0, it is one.
    if "-1" not in numbers and len(numbers) > 1 and all(map(str.isdecimal, numbers)):
        absent.add("-1")
    kept = [i for i, value in enumerate(examples.labels) if label_name(value) not in absent]
    if not kept:
        raise ValueError(f"{examples.table.file}: no row has a label")
    table, texts_b = examples.table, examples.texts_b
    return replace(
        examples,
        table=replace(
            table, rows=[table.rows[i] for i in kept], places=[table.places[i] for i in kept]
        ),
        texts=[examples.texts[i] for i in kept],
        texts_b=None if texts_b is None else [texts_b[i] for i in kept],
        labels=[examples.labels[i] for i in kept],
    )


def in_order(names: set[str], known: Mapping[str, int] | None = None) -> tuple[str, ...]:
    """By value where all are integers, else alphabetically; as in `known` where it has all."""
    if known and names <= set(known):
        return tuple(sorted(known, key=known.__getitem__))
    if all(map(_is_integer, names)):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def label_name(value: Any) -> str:
    """The name under which a label is kept: 1, 1.0, "1" and " 1 " are the same one."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    name = str(value).strip()
    whole = name.removesuffix(".0")
    return whole if _is_integer(whole) else name


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _number(value: Any) -> float | None:
    """The finite number that a label is, None where it is none."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"
