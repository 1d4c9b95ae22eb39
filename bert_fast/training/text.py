"""Lines, documents and sentences out of text files.

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
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

# The end of a sentence: a stop, closing quotes, and space (none after CJK stops and dandas). A line
# of dots has one end too, and is not searched from each of them.
_STOP = re.compile(
    r"""[.!?\u2026\u061f\u06d4]{1,64}["'\u2019\u201d)\]]*\s+"""
    r"""|[\u3002\uff01\uff1f\u0964\u0965]+["\u2019\u201d]*\s*"""
)
_OPENING = "\"'([\u2018\u201c"
TABLES = (".json", ".ndjson", ".tsv", ".parquet", ".arrow")  # their lines are no text
NUL = "a NUL byte, expected UTF-8"  # as in UTF-16 without its mark
_FIELD_LIMIT = 1 << 30  # characters of one CSV field


def find_files(sources: Sequence[str | Path]) -> list[Path]:
    """The files that names and patterns (`*`, `?`, `**`) mean, each once, in order.

    Raises: ValueError for a name or pattern that means no file.
    """
    found: dict[Path, None] = {}
    for source in map(str, sources):
        matches = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files and Path(source).is_dir():
            raise ValueError(f"{source} is a folder: name its files, as in {source}/*.txt")
        if not files:
            raise ValueError(f"{source}: no such file, and no file matches it")
        found |= dict.fromkeys(files)
    return list(found)


def read_documents(files: Iterable[Path], text_field: str = "text") -> Iterator[str]:
    """Every document with text in it, whitespace collapsed.

    Raises: ValueError for what is not UTF-8, not JSON, or has no field `text_field`, and for a kind
        of table that is not read.
    """
    for file in files:
        with file.open("rb") as raw:
            opened = _decoded(raw, _compressed(file))
            try:
                for document in _reader(file)(opened, text_field):
                    if "\0" in document:
                        raise ValueError(NUL)
                    if text := " ".join(document.split()):
                        yield text
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: not UTF-8 ({error.reason})") from None
            except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{file}: {error}") from None


def read_lines(file: Path | None) -> list[str]:
    """The lines of a UTF-8 file, None: of stdin, without their ends.

    Only \\n, \\r\\n end a line: Unicode's other line separators are part of a text.

    Raises: ValueError naming the line that is not UTF-8; OSError for a file that cannot be read.
    """
    if file is None and sys.stdin is None:
        raise ValueError("stdin is closed")
    data = sys.stdin.buffer.read() if file is None else file.read_bytes()
    if file is not None and _compressed(file):
        try:
            data = gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{file}: {error}") from None
    found, lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), []
    if not found[-1]:
        found.pop()  # what follows the last line's end
    for number, line in enumerate(found, 1):
        try:
            lines.append(line.removesuffix(b"\r").decode())
            if "\0" in lines[-1]:
                raise ValueError(f"{file or 'stdin'}, line {number}: {NUL}")
        except UnicodeDecodeError as error:
            name = file or "stdin"
            raise ValueError(f"{name}, line {number}: not UTF-8 ({error.reason})") from None
    return lines


def parse_json(text: str, where: str) -> Any:
    """The value that `text` is; ValueError, with `where`, if it is no JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets
        raise ValueError(f"{where}: {error}") from None


def text_of(line: str, field: str, where: str) -> str:
    """The text in a line of JSON; ValueError, with `where`, for a line that has none."""
    row = parse_json(line, where)
    if not isinstance(row, dict) or field not in row:
        raise ValueError(f"{where}: no field {field!r}")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} is {text!r}, expected a string")
    return whole(text, f"{where}, field {field!r}")


def whole(text: str, where: str) -> str:
    """The text; ValueError, with `where`, for half of a character: JSON can spell a lone surrogate
    (\\ud83d without what follows it), which no tokenizer takes and no file.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{where}: {half} at character {error.start} is half of one, expected text"
        ) from None
    return text


def csv_records(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Every record that is no blank line, and the line it begins at.

    lines: with their ends, which a quoted field may hold.

    Raises: ValueError for what is not CSV.
    """
    limit, begin = csv.field_size_limit(_FIELD_LIMIT), 1
    reader = csv.reader(lines, strict=True)
    try:
        for record in reader:
            if record:  # the reader's answer to a blank line is []
                yield begin, record
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {begin}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def with_header(
    records: Iterable[tuple[int, list[str]]],
) -> Iterator[tuple[int, dict[str, str]]]:
    """The records after the first, by its names, each with its place.

    Raises: ValueError for a name that is there twice, and a record of more or fewer fields.
    """
    header: list[str] | None = None
    for place, record in records:
        if header is None:
            header = [name.strip() for name in record]
            if twice := sorted({name for name in header if header.count(name) > 1}):
                named = ", ".join(map(repr, twice))
                raise ValueError(f"line {place}: the header names {named} more than once")
        elif len(record) != len(header):
            raise ValueError(
                f"line {place}: {len(record)} fields, expected {len(header)} as in the header "
                f"({', '.join(header)})"
            )
        else:
            yield place, dict(zip(header, record, strict=True))


def split_sentences(text: str) -> list[str]:
    """Cuts after . ! ? (and closing quotes) where space and no small letter follow.

    It knows no abbreviations: "Mr. Smith" is cut too. Pairs of sentences do not suffer from it.
    """
    sentences, start = [], 0
    for stop in _STOP.finditer(text):
        following = text[stop.end() : stop.end() + 8].lstrip(_OPENING)
        if not following[:1].islower():
            sentences.append(text[start : stop.end()].strip())
            start = stop.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


def suffix_of(file: Path) -> str:
    """Of a file's name, in small letters, and without the .gz of a compressed one."""
    return (Path(file.stem) if _compressed(file) else file).suffix.lower()


def _compressed(file: Path) -> bool:
    return file.suffix.lower() == ".gz"


def _reader(file: Path) -> Callable[[IO[str], str], Iterator[str]]:
    suffix = suffix_of(file)
    if suffix in TABLES:
        raise ValueError(f"{suffix} is not read: expected text, .jsonl or .csv")
    return _READERS.get(suffix, _blocks)


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
    for number, line in enumerate(opened, 1):
        if line.strip():
            yield text_of(line, text_field, f"line {number}")


def _csv_texts(opened: IO[str], text_field: str) -> Iterator[str]:
    for place, row in with_header(csv_records(opened)):
        if text_field not in row:
            raise ValueError(f"line {place}: no field {text_field!r}")
        yield row[text_field]


_READERS = {".jsonl": _json_lines, ".csv": _csv_texts}
