"""What a sentence-transformers model asks for beside its encoder, in its folder or in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .ops.pool import MODES

# Of its modules, what is served: the encoder, and what comes after it.
SERVED = {"Transformer", "Pooling", "Normalize"}


@dataclass(frozen=True)
class SentenceSettings:
    """What it asks for; None where it says nothing.

    max_length: tokens kept of a text.
    lower: whether the texts are put into small letters first.
    prompt: the name of what it puts before each text unless told otherwise.
    dimensions: the first so many columns of its vectors are kept.
    """

    pooling: str | None = None
    normalize: bool | None = None
    max_length: int | None = None
    lower: bool = False
    prompt: str | None = None
    dimensions: int | None = None


def settings_of(model: nn.Module) -> SentenceSettings:
    """Of a SentenceTransformer; of any other module, nothing.

    Raises: ValueError for a pooling other than mean and cls.
    """
    if not sentence_classes(model):
        return SentenceSettings()
    first, *rest = model.children()
    kinds = {type(module).__name__: module for module in rest}
    modes: Any = getattr(kinds.get("Pooling"), "pooling_mode", ())
    if not modes and hasattr(kinds.get("Pooling"), "get_pooling_mode_str"):
        modes = kinds["Pooling"].get_pooling_mode_str().split("+")  # before version 6
    own = vars(model)
    return SentenceSettings(
        _pooling([modes] if isinstance(modes, str) else list(modes)),
        "Normalize" in kinds,
        getattr(model, "max_seq_length", None),
        bool(getattr(first, "do_lower_case", False)),
        own.get("default_prompt_name"),
        own.get("truncate_dim"),
    )


def sentence_classes(model: nn.Module) -> set[str]:
    """The names of a module's classes that are of sentence-transformers."""
    home = "sentence_transformers."
    return {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith(home)}


def sentence_modules(folder: Path) -> dict[str, str]:
    """The classes in modules.json of a sentence-transformers folder, and their folders in it.

    Raises: ValueError for a file that does not list them.
    """
    modules = _json(file := folder / "modules.json", [])
    try:
        return {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{file} does not give each module's type and path") from None


def sentence_settings(folder: Path) -> SentenceSettings:
    """Reads modules.json, the pooling's config and two more files of a model folder.

    Raises: ValueError for a file not as sentence-transformers writes it, for a pooling other
        than mean and cls, and for modules after the encoder other than Pooling and Normalize.
    """
    kinds = sentence_modules(folder)
    if unknown := sorted(kinds.keys() - SERVED):
        raise ValueError(f"{folder / 'modules.json'} has {', '.join(unknown)}, which is not served")
    file = folder / kinds.get("Pooling", "1_Pooling") / "config.json"
    pooling = _json(file, {})
    named = pooling.get("pooling_mode") or []
    modes = [named] if isinstance(named, str) else list(named)
    modes += [
        key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
        for key, value in pooling.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    if not modes and file.exists():
        raise ValueError(f"{file} names no pooling")
    more, rest = (_json(folder / name, {}) for name in _FILES)
    return SentenceSettings(
        _pooling(modes),
        "Normalize" in kinds if kinds else None,
        _number(folder / _FILES[0], more, "max_seq_length"),
        bool(more.get("do_lower_case")),
        rest.get("default_prompt_name"),
        _number(folder / _FILES[1], rest, "truncate_dim"),
    )


_FILES = ("sentence_bert_config.json", "config_sentence_transformers.json")


def _pooling(modes: Iterable[str]) -> str | None:
    modes = list(modes)
    if modes and (len(modes) > 1 or modes[0] not in MODES):
        raise ValueError(f"the model pools by {' + '.join(modes)}, expected one of {MODES}")
    return modes[0] if modes else None


def _json(file: Path, absent: Any) -> Any:
    """What the file holds, of the kind of `absent`, which stands for a file that is not there."""
    if not file.exists():
        return absent
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None
    if type(found) is not type(absent):
        kind = type(absent).__name__
        raise ValueError(f"{file} holds a {type(found).__name__}, expected a {kind}")
    return found


def _number(file: Path, settings: dict[str, Any], name: str) -> int | None:
    value = settings.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{file}: {name} is {value!r}, expected a number of at least 1")
    return value
