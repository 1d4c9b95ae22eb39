"""Documents and sentences out of text files.

A document is a block of lines that ends at a blank line, or a row of a .csv or .jsonl file. Any of
them may be compressed (.gz). Lines of a block are joined: text may be wrapped, or hold one sentence
a line, as BERT's own recipe wants it.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

# The end of a sentence: a stop, closing quotes, and space (none after CJK stops).
_STOP = re.compile(
    r"""[.!?\u2026]+["'\u2019\u201d)\]]*\s+"""
    r"""|[\u3002\uff01\uff1f]+["\u2019\u201d]*\s*"""
)
_OPENING = "\"'([\u2018\u201c"
_FIELD_LIMIT = 1 << 30  # characters of one CSV field


def find_files(sources: Sequence[str | Path]) -> list[Path]:
    """The files that names and patterns (`*`, `?`, `**`) mean, each once, in order.

    Raises: ValueError for a name or pattern that means no file.
    """
    found: dict[Path, None] = {}
    for source in map(str, sources):
        matches = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise ValueError(f"{source}: no such file, and no file matches it")
        found |= dict.fromkeys(files)
    return list(found)


def read_documents(files: Iterable[Path], text_field: str = "text") -> Iterator[str]:
    """Every document with text in it, whitespace collapsed.

    Raises: ValueError for what is not UTF-8, not JSON, or has no field `text_field`.
    """
    for file in files:
        with file.open("rb") as raw:
            opened = _decoded(raw, file.suffix == ".gz")
            try:
                for document in _READERS.get(_suffix(file), _blocks)(opened, text_field):
                    if text := " ".join(document.split()):
                        yield text
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: not UTF-8 ({error.reason})") from None
            except KeyError as error:
                raise ValueError(f"{file}: no field {error}") from None
            except (ValueError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{file}: {error}") from None


def split_sentences(text: str) -> list[str]:
    """Cuts after . ! ? (and closing quotes) where space and no small letter follow.

    It knows no abbreviations: "Mr. Smith" is cut too. Pairs of sentences do not suffer from it.
    """
    sentences, start = [], 0
    for stop in _STOP.finditer(text):
        following = text[stop.end() :][:8].lstrip(_OPENING)
        if not following[:1].islower():
            sentences.append(text[start : stop.end()].strip())
            start = stop.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


def _suffix(file: Path) -> str:
    return (Path(file.stem).suffix if file.suffix == ".gz" else file.suffix).lower()


def _decoded(raw: IO[bytes], compressed: bool) -> IO[str]:
    data = gzip.GzipFile(fileobj=raw) if compressed else raw
    return io.TextIOWrapper(data, encoding="utf-8-sig", newline="")


def _blocks(opened: IO[str], text_field: str) -> Iterator[str]:
    block: list[str] = []
    for line in opened:
        if line.strip():
            block.append(line)
        else:
            yield " ".join(block)
            block = []
    yield " ".join(block)


def _json_lines(opened: IO[str], text_field: str) -> Iterator[str]:
    for line in opened:
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a line is not an object")
            text = row[text_field]
            if not isinstance(text, str):
                raise ValueError(f"a line's {text_field} is {text!r}, expected a string")
            yield text


def _csv_rows(opened: IO[str], text_field: str) -> Iterator[str]:
    limit = csv.field_size_limit(_FIELD_LIMIT)
    try:
        for row in csv.DictReader(opened):
            yield row[text_field] or ""
    finally:
        csv.field_size_limit(limit)


_READERS = {".jsonl": _json_lines, ".csv": _csv_rows}
