"""SQuAD files: questions on contexts with the answers' character offsets.

Version 1.1 (every question has answers) and 2.0 (some have none) as the authors publish them, and
the same as rows (id, context, question, answers) as data sets' hubs have it: Parquet, JSON lines,
or in the place of articles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .tables import read_table
from .text import parse_json, read_lines, suffix_of, whole

EXPECTED = 'expected SQuAD: {"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}'


@dataclass(frozen=True)
class Question:
    """One question; `answers` are (text, offset of its first character), none for "no answer"."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    labelled: bool  # whether the file tells the answer, or that there is none

    @property
    def asks(self) -> tuple[str, str, bool]:
        return self.question, self.context, self.labelled


@dataclass(frozen=True)
class Squad:
    """The questions of a file, and whether its version has ones without an answer (2) or not."""

    file: Path
    questions: list[Question]
    version: int

    def __len__(self) -> int:
        return len(self.questions)


def read_squad(file: Path, answered: bool = True) -> Squad:
    """Reads a SQuAD file of either version, with or without answers.

    answered: the questions get answers, by their ids: one that comes twice is one question with
        the answers of both.

    Raises: ValueError naming the place for a field that is absent or of the wrong type, and for an
        id of two questions that get answers; OSError for a file that cannot be read.
    """
    rows, said = _rows(file)
    questions: list[Question] = []
    seen: dict[str, tuple[int, str]] = {}
    version = 2 if said.lstrip("v").startswith("2") else 1
    for where, row in rows:
        question = _question(row, where)
        index, before = seen.setdefault(question.id, (len(questions), where))
        if not answered or index == len(questions):
            questions.append(question)
        elif (same := questions[index]).asks != question.asks:
            raise ValueError(f"{where}: id {question.id!r} is also that of {before}")
        else:
            questions[index] = replace(same, answers=same.answers + question.answers)
        if "is_impossible" in row or (question.labelled and not question.answers):
            version = 2
    if not questions:
        raise ValueError(f"{file} has no questions")
    return Squad(file, questions, version)


def _rows(file: Path) -> tuple[Iterator[tuple[str, dict[str, Any]]], str]:
    lines = None if suffix_of(file) in (".jsonl", ".parquet") else read_lines(file)
    if lines is None or _each_an_object(lines):
        table = read_table(file)
        return _nested(((table.where(i), row) for i, row in enumerate(table.rows)), True), ""
    document: Any = parse_json("\n".join(lines), str(file))
    version = ""
    if isinstance(document, dict):
        document, version = document.get("data"), str(document.get("version", ""))
    if not isinstance(document, list):
        raise ValueError(f"{file}: {EXPECTED}")
    items = ((f"{file}, data[{i}]", item) for i, item in enumerate(document))
    return _nested(items, False), version


def _each_an_object(lines: Sequence[str]) -> bool:
    """Whether these are JSON lines: more than one, of which the first is whole."""
    whole_ones = [line for line in lines if line.strip()]
    try:
        return len(whole_ones) > 1 and isinstance(parse_json(whole_ones[0], ""), dict)
    except ValueError:
        return False


def _nested(data: Iterable[tuple[str, Any]], table: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The questions of articles; what is one itself as it is: a table's row, what has a context."""
    for place, article in data:
        row = isinstance(article, dict) and "paragraphs" not in article
        if row and (table or "context" in article):
            yield place, article
            continue
        for p, paragraph in enumerate(_get(article, "paragraphs", list, place)):
            where = f"{place}.paragraphs[{p}]"
            context = _get(paragraph, "context", str, where)
            for q, row in enumerate(_get(paragraph, "qas", list, where)):
                if not isinstance(row, dict):
                    raise ValueError(f"{where}.qas[{q}]: {type(row).__name__}, expected an object")
                yield f"{where}.qas[{q}]", {**row, "context": context}


def _question(row: dict[str, Any], where: str) -> Question:
    found = row.get("answers")
    if isinstance(found, dict) and isinstance(found.get("text"), str):
        found = [found]
    if isinstance(found, dict):  # a row of columns: {"text": [...], "answer_start": [...]}
        texts = _get(found, "text", list, f"{where}.answers")
        starts = [None] * len(texts)
        if found.get("answer_start") is not None:
            starts = _get(found, "answer_start", list, f"{where}.answers")
        if len(texts) != len(starts):
            raise ValueError(f"{where}.answers: {len(texts)} texts but {len(starts)} offsets")
        found = [
            {"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)
        ]
    if found is not None and not isinstance(found, list):
        raise ValueError(f"{where}: answers is {type(found).__name__}, expected a list")
    impossible = row.get("is_impossible")
    if impossible not in (None, False, True):
        raise ValueError(f"{where}: is_impossible is {impossible!r}, expected true or false")
    answers = []
    for i, answer in enumerate(() if impossible else found or ()):
        place = f"{where}.answers[{i}]"
        text = _get(answer, "text", str, place)
        answers.append((text, _offset(answer.get("answer_start"), place)))
    if not isinstance(row.get("id", where), str | int):
        raise ValueError(f"{where}: id is {row['id']!r}, expected a string")
    return Question(
        whole(str(row.get("id", where)), f"{where}.id"),
        _get(row, "question", str, where),
        _get(row, "context", str, where),
        tuple(answers),
        found is not None or bool(impossible),
    )


def _offset(value: Any, where: str) -> int:
    """Of an answer's first character, -1 where it is not told: the answer is looked for."""
    if value is None:
        return -1
    try:
        if not isinstance(value, bool) and int(value) == float(value):  # a table's 12.0, or "12"
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{where}: answer_start is {value!r}, expected a whole number")


def _get(value: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(value, dict) or key not in value:
        raise ValueError(f"{where}: no {key!r}; {EXPECTED}")
    if not isinstance(value[key], kind):
        found = type(value[key]).__name__
        raise ValueError(f"{where}: {key} is {found}, expected {kind.__name__}")
    return whole(value[key], f"{where}.{key}") if kind is str else value[key]


def locate(context: str, text: str, start: int) -> tuple[int, int] | None:
    """Where an answer stands in its context, [first, last + 1), without white space around it.

    Where the text does not stand at `start`, its occurrence nearest to there is taken, then one
    that differs in white space or case only; None where there is none, or no text.
    """
    stripped = text.strip()
    if not stripped:
        return None
    start += len(text) - len(text.lstrip())
    if start >= 0 and context.startswith(stripped, start):
        return start, start + len(stripped)
    for pattern in _patterns(stripped):
        if spans := [match.span() for match in pattern.finditer(context)]:
            return min(spans, key=lambda span: abs(span[0] - start))
    return None


def _patterns(text: str) -> Iterator[re.Pattern[str]]:
    loose = r"\s+".join(map(re.escape, text.split()))
    yield re.compile(re.escape(text))
    yield re.compile(loose)
    yield re.compile(loose, re.IGNORECASE)
