"""SQuAD files: questions on contexts with the answers' character offsets.

Version 1.1 (every question has answers) and 2.0 (some have none) as the authors publish them, and
the same as rows of Parquet or JSON lines (id, context, question, answers) as data sets' hubs do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tables import read_table
from .text import parse_json, read_lines, whole

EXPECTED = 'expected SQuAD: {"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}'


@dataclass(frozen=True)
class Question:
    """One question; `answers` are (text, offset of its first character), none for "no answer"."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    labelled: bool  # whether the file tells the answer, or that there is none


@dataclass(frozen=True)
class Squad:
    """The questions of a file, and whether its version has ones without an answer (2) or not."""

    file: Path
    questions: list[Question]
    version: int

    def __len__(self) -> int:
        return len(self.questions)


def read_squad(file: Path) -> Squad:
    """Reads a SQuAD file of either version, with or without answers.

    Raises: ValueError naming the place for a field that is absent or of the wrong type, and for an
        id that comes twice; OSError for a file that cannot be read.
    """
    rows, said = _rows(file)
    questions, seen = [], dict[str, str]()
    version = 2 if said.lstrip("v").startswith("2") else 1
    for where, row in rows:
        question = _question(row, where)
        if question.id in seen:
            raise ValueError(f"{where}: id {question.id!r} is also that of {seen[question.id]}")
        seen[question.id] = where
        questions.append(question)
        if "is_impossible" in row or (question.labelled and not question.answers):
            version = 2
    if not questions:
        raise ValueError(f"{file} has no questions")
    return Squad(file, questions, version)


def _rows(file: Path) -> tuple[Iterator[tuple[str, dict[str, Any]]], str]:
    if file.suffix.lower() in (".jsonl", ".parquet"):
        table = read_table(file)
        return ((table.where(i), row) for i, row in enumerate(table.rows)), ""
    document = parse_json("\n".join(read_lines(file)), str(file))
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        raise ValueError(f"{file}: {EXPECTED}")
    return _nested(file, document["data"]), str(document.get("version", ""))


def _nested(file: Path, data: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for a, article in enumerate(data):
        for p, paragraph in enumerate(_get(article, "paragraphs", list, f"{file}, data[{a}]")):
            where = f"{file}, data[{a}].paragraphs[{p}]"
            context = _get(paragraph, "context", str, where)
            for q, row in enumerate(_get(paragraph, "qas", list, where)):
                place = f"{where}.qas[{q}]"
                if not isinstance(row, dict):
                    raise ValueError(f"{place}: {type(row).__name__}, expected an object")
                yield place, {**row, "context": context}


def _question(row: dict[str, Any], where: str) -> Question:
    found = row.get("answers")
    if isinstance(found, dict):  # a row of columns: {"text": [...], "answer_start": [...]}
        texts = _get(found, "text", list, f"{where}.answers")
        starts = _get(found, "answer_start", list, f"{where}.answers")
        if len(texts) != len(starts):
            raise ValueError(f"{where}.answers: {len(texts)} texts but {len(starts)} offsets")
        found = [
            {"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)
        ]
    if found is not None and not isinstance(found, list):
        raise ValueError(f"{where}: answers is {type(found).__name__}, expected a list")
    impossible = bool(row.get("is_impossible", False))
    answers = []
    for i, answer in enumerate(() if impossible else found or ()):
        place = f"{where}.answers[{i}]"
        start = _get(answer, "answer_start", int, place)
        answers.append((_get(answer, "text", str, place), start))
    if not isinstance(row.get("id", where), str | int):
        raise ValueError(f"{where}: id is {row['id']!r}, expected a string")
    return Question(
        whole(str(row.get("id", where)), f"{where}.id"),
        _get(row, "question", str, where),
        _get(row, "context", str, where),
        tuple(answers),
        found is not None or impossible,
    )


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
