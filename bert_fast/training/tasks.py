"""What the tasks of `bert-fast finetune` share: what one is, and the loading of its model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import transformers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.pre_tokenizers import Sequence as Steps
from torch import nn

from ..console import cannot_load, load_tokenizer, load_weights
from ..inputs import most_tokens
from .items import Collate, Item
from .loop import MODEL_LOSS, Objective, Settings
from .readers import NO_LABEL, Columns, label_name, listed

Metrics = dict[str, float]


@dataclass(frozen=True)
class Job:
    """What to fine-tune on what.

    task: one of `finetune.TASKS`.
    model: folder of a checkpoint with its tokenizer.
    settings: how to train, and the folder for everything that is written.
    train: training data; None to evaluate or predict only, with a model that was trained before.
    validation: data to evaluate on after every epoch, or once where nothing is trained.
    predict: data to predict on at last; labels in it are not read, but those of
        spans are scored where there is no validation data with answers.
    columns: names of the columns in tables.
    max_length: tokens kept of a text or pair, or of a window (spans, tokens).
    doc_stride: tokens that windows share (spans); a third of max_length unless given.
    regression: numbers are scores (True), classes (False), or what they look like (None).
    null_threshold: how far "no answer" must be ahead of the best answer (spans).
    accelerate: through bert_fast; without, transformers' own forward, for comparison.
    """

    task: str
    model: Path
    settings: Settings
    train: Path | None = None
    validation: Path | None = None
    predict: Path | None = None
    columns: Columns = field(default_factory=Columns)
    max_length: int | None = None
    doc_stride: int | None = None
    regression: bool | None = None
    null_threshold: float = 0.0
    accelerate: bool = True

    def to_json(self) -> dict[str, Any]:
        """What a resumed run has to agree with; a file may have moved."""
        names = ("task", "max_length", "doc_stride", "regression")
        return {name: getattr(self, name) for name in names} | asdict(self.columns)


@dataclass(frozen=True)
class Task:
    """A task made ready: all that the loop needs, and what comes of the trained model.

    encoder: the part of the model to accelerate.
    items: what to train on, none where nothing is trained.
    tokenizer: what checkpoints get beside the weights; None where they are no folders of a model.
    evaluate: metrics of the model on the validation data, None where there is none.
    save: writes what the folder of a trained model gets beside the weights and metrics.json.
    predict: writes a model's predictions to a folder, None where none are asked for.
    notes: what a user should know of the data.
    """

    model: nn.Module
    encoder: nn.Module
    items: Sequence[Item]
    collate: Collate
    evaluate: Callable[[nn.Module], Metrics] | None
    save: Callable[[Path], object]
    predict: Callable[[nn.Module, Path], object] | None = None
    objective: Objective = MODEL_LOSS
    notes: Sequence[str] = ()
    tokenizer: Any = None


# -- models and tokenisers ----------------------------------------------------------------------


def load_config(folder: Path) -> tuple[Any, Any]:
    """Config and tokenizer; ValueError where the folder has none."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with cannot_load(folder):
        config = transformers.AutoConfig.from_pretrained(folder)
    return config, load_tokenizer(transformers.AutoTokenizer, folder, config)


def spaced(folder: Path, config: Any) -> Any:
    """The tokenizer, for lists of words: the bytes of a word differ where no space is before it.

    Raises: ValueError where it goes on without the space.
    """
    kind = transformers.AutoTokenizer
    tokenizer = load_tokenizer(kind, folder, config, add_prefix_space=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    bytewise = list(_byte_levels(getattr(backend, "pre_tokenizer", None)))
    for part in bytewise:  # where the class is no model's own, the argument sets an attribute only
        part.add_prefix_space = True
    if bytewise:
        listed, written = tokenizer(["a", "b"], is_split_into_words=True), tokenizer(" a b")
        if listed["input_ids"] != written["input_ids"]:
            raise ValueError(f"{folder}: its tokenizer puts no space before the words of a list")
    return tokenizer


def _byte_levels(part: Any) -> Iterator[ByteLevel]:
    if isinstance(part, ByteLevel):
        yield part
    elif isinstance(part, Steps):
        with suppress(IndexError):  # it has no length
            for i in count():
                yield from _byte_levels(part[i])


def first_pieces(words: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """(position, word) of every word's first token, of an encoding's word numbers."""
    before = None
    for position, word in enumerate(words):
        if word is not None and word != before:
            yield position, word
        before = word


def load_model(
    kind: Any, folder: Path, settings: Mapping[str, Any] | None = None, trained: bool = False
) -> Any:
    """The model in fp32, with a new head where the checkpoint's is absent or of another size.

    Raises: ValueError where it has to be `trained`, but its head is new, or another task's.
    """
    why = "its head is not trained for this task (train it with --train)" if trained else None
    model = load_weights(kind, folder, why, dtype="float32", **(settings or {}))
    # Heads of other tasks may have weights of the same names and sizes.
    named, wanted = model.config.architectures or (), type(model).__name__
    if trained and named and wanted not in named:
        found = ", ".join(named)
        raise ValueError(f"cannot load {folder}: {why}: it is a {found}, expected a {wanted}")
    return model


def known_labels(config: Any) -> tuple[str, ...]:
    """The label names of a trained model, by id, as those of files are kept; their numbers where it
    has no names of its own.

    Raises: ValueError where two labels have the same name.
    """
    names = tuple(label_name(config.id2label[i]) for i in sorted(config.id2label))
    (name, times), *_ = Counter(names).most_common(1)
    if times > 1:
        raise ValueError(f"the model has {times} labels with the name {name!r}, expected one")
    return _numbers(len(names)) if names == _nameless(len(names)) else names


def spelling(
    file: Path, found: Collection[str], names: tuple[str, ...], notes: list[str]
) -> tuple[str, ...]:
    """What a file with the labels `found` has for the names of a trained model, by id: the names;
    or numbers where no name is one; or LABEL_0 and so on where the model has no names.
    """
    other = _numbers(len(names))
    if names == other:
        other = _nameless(len(names))
    elif any(name.lstrip("-").isdecimal() for name in names):
        return names
    wanted = set(found) - {"-1", NO_LABEL}  # which may stand for no label
    if not wanted or not wanted <= set(other):
        return names
    told = listed([f"{label} is {name}" for label, name in zip(other, names, strict=True)])
    notes.append(f"{file}: its labels are taken for the model's ids: {told}")
    return other


def _numbers(n: int) -> tuple[str, ...]:
    return tuple(map(str, range(n)))


def _nameless(n: int) -> tuple[str, ...]:
    """What transformers calls labels that nobody gave a name."""
    return tuple(f"LABEL_{i}" for i in range(n))


def label_settings(names: Sequence[str]) -> dict[str, Any]:
    """What a config keeps of the label names."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def token_limit(
    model: nn.Module, tokenizer: Any, asked: int | None, usual: int | None = 512
) -> int:
    """Tokens kept of a text: those asked for, or at most `usual` of what model and tokenizer take.

    Raises: ValueError for fewer than 8 or more than the model has positions.
    """
    base = getattr(model, "base_model", model)
    most = min(most_tokens(getattr(base, "embeddings", None)), model.config.max_position_embeddings)
    if asked is None:
        return min(most, int(tokenizer.model_max_length), usual or most)
    if not 8 <= asked <= most:
        raise ValueError(f"--max-length is {asked}, expected 8 to {most} for this model")
    return asked
