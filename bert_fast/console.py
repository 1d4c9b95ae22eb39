"""What the commands share: where they print, and how they refuse what a user got wrong."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from safetensors import SafetensorError

console = Console()
# Paths may hold brackets and colons; a line of a log is not broken.
log = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what a user can get wrong into one line on stderr and exit code 2, and what bert_fast
    warns of into one line too."""
    with warnings.catch_warnings():
        warnings.showwarning = partial(_warned, warnings.showwarning)
        try:
            yield
        except OSError as error:
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except ModuleNotFoundError as error:
            message = f"{error}: pip install {error.name}"
        except (ValueError, SafetensorError) as error:  # the latter for a disk that is full
            message = str(error)
        else:
            return
    log.print(f"bert-fast: {' '.join(message.split())}")
    raise typer.Exit(2)


def _warned(otherwise: Any, message: Any, *about: Any, **more: Any) -> None:
    ours, told = str(message).startswith("bert_fast: "), str(message).removeprefix("bert_fast: ")
    if ours:
        log.print(f"bert-fast: warning: {' '.join(told.split())}")
    else:
        otherwise(message, *about, **more)


@contextmanager
def cannot_load(folder: Path) -> Iterator[None]:
    """Whatever a broken folder makes transformers raise is one ValueError."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"cannot load {folder}: {reason[0]}") from None


def load_weights(kind: Any, folder: Path, no_head: str | None = None, **settings: Any) -> Any:
    """kind.from_pretrained(folder); new may be a head, or a pooler, and nothing else.

    no_head: given, these may not be new either, and it says why.

    Raises: ValueError for a folder that cannot be loaded, and where weights of the encoder are not
        in it, or of another size: transformers warns, and leaves random ones.
    """
    with cannot_load(folder):
        model, told = kind.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    sizes = {
        name: f"{list(there)} in its weights, {list(wanted)} by its config.json"
        for name, there, wanted in told["mismatched_keys"]
    }
    inside = hasattr(model, model.base_model_prefix)
    prefix = f"{model.base_model_prefix}." if inside else ""
    new = sorted({*told["missing_keys"], *sizes})
    lacking = [
        name for name in new if name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")
    ]
    why = ""
    if new and not lacking and no_head:
        lacking, why = new, f"{no_head}: "
    if lacking:
        what = sizes.get(lacking[0], "not in its weights")
        more = f"; so for {len(lacking) - 1} more" if lacking[1:] else ""
        raise ValueError(f"cannot load {folder}: {why}{lacking[0]} is {what}{more}")
    return model


def load_tokenizer(kind: Any, folder: Path, config: Any = None, **settings: Any) -> Any:
    """kind.from_pretrained(folder), for a model with this config where there is one.

    Raises: ValueError for a folder that cannot be loaded, and what `check_tokenizer` raises.
    """
    with cannot_load(folder):
        tokenizer = kind.from_pretrained(folder, **settings)
    check_tokenizer(tokenizer, folder, config)
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """What its ids stay below: more than there are tokens where ids are left out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def check_tokenizer(tokenizer: Any, folder: Path, config: Any = None) -> None:
    """Raises: ValueError where the folder has no tokenizer (transformers then makes one that knows
    special tokens only, to which every word is the unknown one), and for one that has more tokens
    than the model of this config.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(f"cannot load {folder}: it has no tokenizer files")
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and (needed := vocabulary_size(tokenizer)) > vocabulary:
        raise ValueError(
            f"cannot load {folder}: its tokenizer has {needed} tokens, but the model's "
            f"vocabulary {vocabulary}"
        )


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(allowed)}")


def check_model(folder: Path) -> None:
    if not folder.exists():
        raise ValueError(f"no model at {folder}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: not the folder of a model")


def check_output(file: Path, source: str = "") -> None:
    """What would otherwise fail, or write over the input, after the work is done."""
    if str(file) == "-":
        raise ValueError("- is no file to write: name one")
    if file.exists() and Path(source).is_file() and file.samefile(source):
        raise ValueError(f"{file} is the input, expected another file to write")
    if file.is_dir():
        raise ValueError(f"{file} is a folder, expected a file to write")
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is a device or a pipe, expected a file to write")
    file = file.resolve()  # a link stays one
    if not file.parent.is_dir():
        raise ValueError(f"no folder {file.parent} to write {file.name} to")
    if not os.access(file.parent, os.W_OK):
        raise ValueError(f"{file.parent} is not writable")


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A file beside `file` (what it is a link to), which takes its place when it is done."""
    file = file.resolve()
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> Path:
    """Writes the text, whole or not at all; returns the file."""
    with whole(file) as part:
        part.write_text(text, encoding="utf-8")
    return file
