"""The tasks of `bert-fast finetune` with one label for a text (or a pair), or one for each word."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.pre_tokenizers import Sequence as Steps
from torch import nn

from ..console import cannot_load, load_tokenizer, load_weights
from ..inputs import most_tokens
from ..ops.masked_lm_loss import IGNORED
from .items import (
    Collate,
    Item,
    collator,
    item_of,
    outputs_of,
    tokenize,
    was_cut,
)
from .loop import MODEL_LOSS, Objective, Settings
from .readers import (
    NO_LABEL,
    Columns,
    Labels,
    Texts,
    classes_of,
    in_order,
    labelled,
    labels_of,
    names_of,
    read_texts,
)
from .scores import accuracy, entity_scores, is_bio, macro_f1, matthews, pearson, spearman
from .words import Words, read_words

Metrics = dict[str, float]


@dataclass(frozen=True)
class Job:
    """What to fine-tune on what.

    task: one of `finetune.TASKS`.
    model: folder of a checkpoint with its tokenizer.
    settings: how to train, and the folder for everything that is written.
    train: training data; None to evaluate or predict only, where the task can.
    validation: data to evaluate on after every epoch.
    predict: questions to answer (spans).
    columns: names of the columns in tables.
    max_length: tokens kept of a text or pair, or of a window (spans).
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

    def training_file(self) -> Path:
        if self.train is None:
            raise ValueError(f"--task {self.task} needs --train")
        return self.train


@dataclass(frozen=True)
class Task:
    """A task made ready: all that the loop needs, and what comes of the trained model.

    encoder: the part of the model to accelerate.
    tokenizer: what checkpoints get beside the weights; None where they are no folders of a model.
    evaluate: metrics of the model on the validation data, None where there is none.
    save: writes what the output folder gets beside the weights and metrics.json.
    notes: what a user should know of the data.
    """

    model: nn.Module
    encoder: nn.Module
    items: Sequence[Item]
    collate: Collate
    evaluate: Callable[[nn.Module], Metrics] | None
    save: Callable[[Path], None]
    objective: Objective = MODEL_LOSS
    notes: Sequence[str] = ()
    tokenizer: Any = None


# -- a label for a text or a pair ---------------------------------------------------------------


def classification(job: Job) -> Task:
    """Tasks `classification` and `pairs`; regression where the labels are scores."""
    train = read_texts(job.training_file(), True if job.task == "pairs" else None, job.columns)
    two = train.texts_b is not None
    valid = read_texts(job.validation, two, job.columns) if job.validation else None
    config, tokenizer = load_config(job.model)
    notes: list[str] = []
    if not job.regression:
        train = _labelled_only(train, classes_of(train, config.label2id), notes)
    labels = labels_of(train, config.label2id, job.regression)
    if valid is not None and not labels.regression:
        valid = _labelled_only(valid, labels.names, notes)
    # Before the model is loaded: a wrong label ends the run at once.
    wanted = [labels.encode(examples) for examples in (train, valid) if examples is not None]
    kind = {**label_settings(labels.names), "problem_type": "single_label_classification"}
    if labels.regression:
        kind = {"num_labels": 1, "problem_type": "regression"}
    model = load_model(transformers.AutoModelForSequenceClassification, job.model, kind)
    limit = token_limit(model, tokenizer, job.max_length)
    items = _items(train, wanted[0], tokenizer, limit, notes)
    collate = collator(tokenizer)
    evaluate = None
    if valid is not None:
        held_out = _items(valid, wanted[1], tokenizer, limit, notes)
        evaluate = _evaluation(labels, held_out, collate)
    return Task(
        model,
        model,
        items,
        collate,
        evaluate,
        lambda folder: _saved(tokenizer, folder),
        notes=[f"{len(items)} examples, {_told(labels)}", *notes],
        tokenizer=tokenizer,
    )


def _told(labels: Labels) -> str:
    if labels.regression:
        return "labels are scores (regression)"
    return f"{len(labels.names)} labels"


def _labelled_only(examples: Texts, classes: Collection[str], notes: list[str]) -> Texts:
    kept = labelled(examples, classes)
    if gone := len(examples) - len(kept):
        notes.append(
            f"{examples.table.file}: {gone} of {len(examples)} rows left out: their label "
            f"{' or '.join(sorted(names_of(examples) - names_of(kept)))} says that there is none"
        )
    return kept


def _items(
    examples: Texts, wanted: Sequence[Any], tokenizer: Any, limit: int, notes: list[str]
) -> list[Item]:
    items, cut = [], 0
    encodings = tokenize(tokenizer, examples.texts, examples.texts_b, limit)
    for (encoded, i), label in zip(encodings, wanted, strict=True):
        items.append({**item_of(encoded, i), "labels": label})
        cut += was_cut(encoded, i)
    if cut:
        notes.append(f"{examples.table.file}: {cut} of {len(items)} texts cut to {limit} tokens")
    return items


def _evaluation(
    labels: Labels, items: Sequence[Item], collate: Collate
) -> Callable[[nn.Module], Metrics]:
    wanted = np.array([item["labels"] for item in items])

    def evaluate(model: nn.Module) -> Metrics:
        logits = np.stack([found[0] for found in outputs_of(model, items, collate, "logits")])
        if labels.regression:
            predicted = logits[:, 0].astype(np.float64)
            return {
                "pearson": pearson(predicted, wanted),
                "spearman": spearman(predicted, wanted),
                "mse": float(np.mean((predicted - wanted) ** 2)),
            }
        predicted = logits.argmax(-1)
        return {
            "accuracy": accuracy(predicted, wanted),
            "macro_f1": macro_f1(predicted, wanted),
            "matthews": matthews(predicted, wanted),
        }

    return evaluate


# -- a label for each word ----------------------------------------------------------------------


def tokens(job: Job) -> Task:
    """Task `tokens`: each word's first piece carries its label, the others none."""
    train = read_words(job.training_file(), job.columns)
    valid = read_words(job.validation, job.columns) if job.validation else None
    config, _ = load_config(job.model)
    tokenizer = spaced(job.model, config)
    found = {label for row in train.labels for label in row} - {NO_LABEL}
    if not found:
        raise ValueError(f"{train.file}: no word has a label")
    names = in_order(found, config.label2id)
    if valid is not None:
        _check_known(valid, names)
        if all(label == NO_LABEL for row in valid.labels for label in row):
            raise ValueError(f"{valid.file}: no word has a label")
    ids = {**{name: i for i, name in enumerate(names)}, NO_LABEL: IGNORED}
    model = load_model(
        transformers.AutoModelForTokenClassification, job.model, label_settings(names)
    )
    limit = token_limit(model, tokenizer, job.max_length)
    notes = [f"{len(train)} sentences, {len(names)} labels"]
    items = _tagged(train, ids, tokenizer, limit, notes)
    collate = collator(tokenizer)

    evaluate = None
    if valid is not None:
        held_out = _tagged(valid, ids, tokenizer, limit, notes)

        def evaluate(model: nn.Module) -> Metrics:
            predicted, wanted = [], []
            logits = outputs_of(model, held_out, collate, "logits")
            for item, (found,) in zip(held_out, logits, strict=True):
                scored = np.flatnonzero(item["labels"] != IGNORED)
                predicted.append([names[i] for i in found[scored].argmax(-1)])
                wanted.append([names[i] for i in item["labels"][scored]])
            flat = [np.array([tag for row in rows for tag in row]) for rows in (predicted, wanted)]
            entity = entity_scores(predicted, wanted) if is_bio(names) else {}
            return {"accuracy": accuracy(*flat), **entity}

    return Task(
        model,
        model,
        items,
        collate,
        evaluate,
        lambda folder: _saved(tokenizer, folder),
        notes=notes,
        tokenizer=tokenizer,
    )


def _check_known(examples: Words, names: Sequence[str]) -> None:
    known = {*names, NO_LABEL}
    for row, place in zip(examples.labels, examples.places, strict=True):
        for label in row:
            if label not in known:
                raise ValueError(
                    f"{examples.file}, sentence at {place}: label {label!r}, expected one of "
                    f"{', '.join(map(repr, names))}"
                )


def _tagged(
    examples: Words, ids: Mapping[str, int], tokenizer: Any, limit: int, notes: list[str]
) -> list[Item]:
    items, cut = [], 0
    encodings = tokenize(tokenizer, examples.words, None, limit, is_split_into_words=True)
    for (encoded, i), names in zip(encodings, examples.labels, strict=True):
        item = item_of(encoded, i)
        labels = np.full(len(item["input_ids"]), IGNORED, np.int32)
        before = None
        for position, word in enumerate(encoded.word_ids(i)):
            if word is not None and word != before:
                labels[position] = ids[names[word]]
            before = word
        if (labels != IGNORED).any():  # else no word of it is known to the tokeniser
            items.append({**item, "labels": labels})
        cut += was_cut(encoded, i)
    if cut:
        notes.append(
            f"{examples.file}: {cut} of {len(examples)} sentences cut to {limit} tokens; the words "
            "behind are neither trained on nor counted"
        )
    return items


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


def load_model(kind: Any, folder: Path, settings: Mapping[str, Any]) -> nn.Module:
    """The model in fp32, with a new head where the checkpoint's is absent or of another size."""
    return load_weights(kind, folder, dtype="float32", **settings)


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


def _saved(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
