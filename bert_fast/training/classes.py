"""The tasks `classification` and `pairs` of `bert-fast finetune`: a label, or a score, for a text
or for two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from torch import nn

from .items import Collate, Item, collator, item_of, outputs_of, tokenize, was_cut
from .monitor import write_rows
from .readers import Labels, Texts, classes_of, labelled, labels_of, names_of, read_texts
from .scores import accuracy, macro_f1, matthews, pearson, spearman
from .tasks import (
    Job,
    Metrics,
    Task,
    known_labels,
    label_settings,
    load_config,
    load_model,
    spelling,
    token_limit,
)


def classification(job: Job) -> Task:
    """Tasks `classification` and `pairs`; regression where the labels are scores.

    Without training data the labels are those of the model.
    """
    train, valid, asked = _read(job)
    config, tokenizer = load_config(job.model)
    kind = transformers.AutoModelForSequenceClassification
    notes: list[str] = []
    if train is None:
        model = load_model(kind, job.model, trained=True)
        labels = _labels_of_model(job, model.config)
    else:
        if not job.regression:
            train = _labelled_only(train, classes_of(train, config.label2id), notes)
        labels = labels_of(train, config.label2id, job.regression)
    spelt = labels
    if valid is not None and not labels.regression:
        if train is None:
            spelt = Labels(spelling(valid.table.file, names_of(valid), labels.names, notes))
        valid = _labelled_only(valid, spelt.names, notes)
    # Before a model is loaded to train it: a wrong label ends the run at once.
    wanted = [None if given is None else spelt.encode(given) for given in (train, valid)]
    if train is not None:
        model = load_model(kind, job.model, _settings(labels))
    limit = token_limit(model, tokenizer, job.max_length)
    items, held_out, unlabelled = (
        _items(examples, ids, tokenizer, limit, notes)
        for examples, ids in zip((train, valid, asked), (*wanted, None), strict=True)
    )
    if train is not None:
        notes.insert(0, f"{len(items)} examples, {_told(labels)}")
    collate = collator(tokenizer)
    return Task(
        model,
        model,
        items,
        collate,
        _evaluation(labels, held_out, collate) if valid is not None else None,
        lambda folder: tokenizer.save_pretrained(folder),
        _prediction(labels, unlabelled, collate) if asked is not None else None,
        notes=notes,
        tokenizer=tokenizer,
    )


def _read(job: Job) -> list[Texts | None]:
    """Training, validation and unlabelled data; in all as many texts a row as in the first."""
    pairs = True if job.task == "pairs" else None
    found: list[Texts | None] = []
    for file, labels in ((job.train, True), (job.validation, True), (job.predict, None)):
        examples = read_texts(file, pairs, job.columns, labels) if file is not None else None
        if examples is not None:
            pairs = examples.texts_b is not None
        found.append(examples)
    return found


def _labels_of_model(job: Job, config: Any) -> Labels:
    """As transformers has it: a head of one output gives scores."""
    if config.problem_type == "multi_label_classification":
        raise ValueError(f"{job.model} has any number of labels for a text, expected one")
    if config.problem_type == "regression" and config.num_labels > 1:
        raise ValueError(f"{job.model} has {config.num_labels} scores for a text, expected one")
    labels = Labels(() if config.num_labels == 1 else known_labels(config))
    if job.regression is not None and job.regression != labels.regression:
        option = "--regression" if job.regression else "--no-regression"
        raise ValueError(f"{option}, but of the trained model at {job.model} {_told(labels)}")
    return labels


def _settings(labels: Labels) -> dict[str, Any]:
    """What the config of a trained model keeps of its labels."""
    if labels.regression:
        return {"num_labels": 1, "problem_type": "regression"}
    return {**label_settings(labels.names), "problem_type": "single_label_classification"}


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
    examples: Texts | None,
    wanted: Sequence[Any] | None,
    tokenizer: Any,
    limit: int,
    notes: list[str],
) -> list[Item]:
    """One for each row, with its label where there are some; none of no file."""
    if examples is None:
        return []
    items, cut = [], 0
    for encoded, i in tokenize(tokenizer, examples.texts, examples.texts_b, limit):
        items.append(item_of(encoded, i))
        cut += was_cut(encoded, i)
    if cut:
        notes.append(f"{examples.table.file}: {cut} of {len(items)} texts cut to {limit} tokens")
    if wanted is None:
        return items
    return [{**item, "labels": label} for item, label in zip(items, wanted, strict=True)]


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


def _prediction(
    labels: Labels, items: Sequence[Item], collate: Collate
) -> Callable[[nn.Module, Path], object]:
    def rows(model: nn.Module) -> Iterator[dict[str, Any]]:
        for (logits,) in outputs_of(model, items, collate, "logits"):
            if labels.regression:
                yield {"score": float(logits[0])}
                continue
            shares = np.exp(logits.astype(np.float64) - logits.max())
            shares /= shares.sum()
            yield {
                "label": labels.names[logits.argmax()],
                "probabilities": dict(zip(labels.names, shares.tolist(), strict=True)),
            }

    return lambda model, folder: write_rows(folder, rows(model))
