"""The task `tokens` of `bert-fast finetune`: a label for each word.

In training a sentence is cut to what the model reads. In evaluation and prediction one that is
longer is read in windows that overlap, so that every word gets its label: from the window that
shows the most around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from torch import nn

from ..ops.masked_lm_loss import IGNORED
from .items import Collate, Item, collator, item_of, outputs_of, tokenize, was_cut
from .monitor import write_rows
from .readers import NO_LABEL, in_order
from .scores import accuracy, entity_scores, is_bio
from .tasks import (
    Job,
    Metrics,
    Task,
    first_pieces,
    known_labels,
    label_settings,
    load_config,
    load_model,
    spaced,
    spelling,
    token_limit,
)
from .words import Words, read_words

# The label of every word by sentence; None for a word without a token, of which a model sees none.
Tagger = Callable[[nn.Module], list[list[str | None]]]


def tokens(job: Job) -> Task:
    """Task `tokens`: each word's first piece carries its label, the others none.

    Without training data the labels are those of the model.
    """
    train, valid, asked = (
        read_words(file, job.columns, labelled) if file is not None else None
        for file, labelled in ((job.train, True), (job.validation, True), (job.predict, False))
    )
    config, _ = load_config(job.model)
    tokenizer = spaced(job.model, config)
    kind = transformers.AutoModelForTokenClassification
    notes: list[str] = []
    if train is None:
        model = load_model(kind, job.model, trained=True)
        names = known_labels(model.config)
        valid = _by_name(valid, names, notes) if valid is not None else None
    else:
        names = in_order(_labels_of(train), config.label2id)
    if valid is not None:
        _check_known(valid, names)
    if train is not None:
        model = load_model(kind, job.model, label_settings(names))
    limit = token_limit(model, tokenizer, job.max_length)
    collate = collator(tokenizer)
    items: list[Item] = []
    if train is not None:
        notes.append(f"{len(train)} sentences, {len(names)} labels")
        items = _tagged(train, names, tokenizer, limit, notes)
    evaluate = predict = None
    if valid is not None:
        evaluate = _evaluation(
            valid, names, _tagger(valid, names, tokenizer, limit, collate, notes)
        )
    if asked is not None:
        if asked.fields > 1:  # a text of words between spaces may look so too
            notes.append(
                f"{asked.file}: {len(asked)} sentences; of the {asked.fields} fields of a line the "
                "first is its word"
            )
        predict = _prediction(asked, _tagger(asked, names, tokenizer, limit, collate, notes))
    return Task(
        model,
        model,
        items,
        collate,
        evaluate,
        lambda folder: tokenizer.save_pretrained(folder),
        predict,
        notes=notes,
        tokenizer=tokenizer,
    )


def _labels_of(examples: Words) -> set[str]:
    found = {label for row in examples.labels for label in row} - {NO_LABEL}
    if not found:
        raise ValueError(f"{examples.file}: no word has a label")
    return found


def _by_name(examples: Words, names: tuple[str, ...], notes: list[str]) -> Words:
    """With a trained model's names for labels that are spelt otherwise."""
    spelt = spelling(examples.file, _labels_of(examples), names, notes)
    own = dict(zip(spelt, names, strict=True))
    labels = [[own.get(label, label) for label in row] for row in examples.labels]
    return replace(examples, labels=labels)


def _check_known(examples: Words, names: Sequence[str]) -> None:
    wrong = _labels_of(examples) - set(names)
    for row, place in zip(examples.labels, examples.places, strict=True):
        for label in row:
            if label in wrong:
                raise ValueError(
                    f"{examples.file}, sentence at {place}: label {label!r}, expected one of "
                    f"{', '.join(map(repr, names))}"
                )


def _tagged(
    examples: Words, names: Sequence[str], tokenizer: Any, limit: int, notes: list[str]
) -> list[Item]:
    ids: Mapping[str, int] = {**{name: i for i, name in enumerate(names)}, NO_LABEL: IGNORED}
    items, cut = [], 0
    encodings = tokenize(tokenizer, examples.words, None, limit, is_split_into_words=True)
    for (encoded, i), tags in zip(encodings, examples.labels, strict=True):
        item = item_of(encoded, i)
        labels = np.full(len(item["input_ids"]), IGNORED, np.int32)
        for position, word in first_pieces(encoded.word_ids(i)):
            labels[position] = ids[tags[word]]
        if (labels != IGNORED).any():  # else no word of it is known to the tokeniser
            items.append({**item, "labels": labels})
        cut += was_cut(encoded, i)
    if cut:
        notes.append(
            f"{examples.file}: {cut} of {len(examples)} sentences cut to {limit} tokens; the words "
            "behind are not trained on"
        )
    return items


# -- evaluation and prediction ------------------------------------------------------------------


def _tagger(
    examples: Words,
    names: Sequence[str],
    tokenizer: Any,
    limit: int,
    collate: Collate,
    notes: list[str],
) -> Tagger:
    """Every word's label: of windows that share a third of their tokens, from the one in which the
    nearer end is farthest away.

    Raises: ValueError where there are labels, but only of words without a token.
    """
    windows: list[Item] = []
    # By sentence and word: distance to the nearer end, window, position there.
    places: list[list[tuple[int, int, int]]] = []
    long = set()
    encodings = tokenize(
        tokenizer,
        examples.words,
        None,
        limit,
        is_split_into_words=True,
        return_overflowing_tokens=True,
        stride=limit // 3,
    )
    for encoded, i in encodings:
        owners = encoded["overflow_to_sample_mapping"]
        begins = i == 0 or owners[i - 1] != owners[i]
        if begins:
            places.append([(-1, -1, -1)] * len(examples.words[len(places)]))
        else:
            long.add(len(places))
        item = item_of(encoded, i)
        # A window may begin inside of a word. Nowhere is an end nearer, so that the word's first
        # piece, in a window before, has as much room at least: of equals the earlier one wins.
        for position, word in first_pieces(encoded.word_ids(i)):
            room = min(position, len(item["input_ids"]) - 1 - position)
            if room > places[-1][word][0]:
                places[-1][word] = (room, len(windows), position)
        windows.append(item)
    if long:
        notes.append(
            f"{examples.file}: {len(long)} of {len(examples)} sentences have more than {limit} "
            "tokens and are read in windows"
        )
    scored = [
        room
        for sentence, labels in zip(places, examples.labels, strict=True)
        for (room, _, _), label in zip(sentence, labels, strict=True)
        if label != NO_LABEL
    ]
    if scored and max(scored) < 0:
        raise ValueError(f"{examples.file}: no word with a label has a token in this model")
    if lost := sum(room < 0 for sentence in places for room, _, _ in sentence):
        notes.append(f"{examples.file}: {lost} words have no token in this model, and so no label")

    def tag(model: nn.Module) -> list[list[str | None]]:
        logits = outputs_of(model, windows, collate, "logits")
        best = [found.argmax(-1) for (found,) in logits]
        return [
            [names[best[window][at]] if room >= 0 else None for room, window, at in sentence]
            for sentence in places
        ]

    return tag


def _evaluation(
    examples: Words, names: Sequence[str], tag: Tagger
) -> Callable[[nn.Module], Metrics]:
    def evaluate(model: nn.Module) -> Metrics:
        predicted, wanted = [], []
        for found, labels in zip(tag(model), examples.labels, strict=True):
            scored = [
                (name, label)
                for name, label in zip(found, labels, strict=True)
                if name is not None and label != NO_LABEL
            ]
            predicted.append([name for name, _ in scored])
            wanted.append([label for _, label in scored])
        flat = [np.array([name for row in rows for name in row]) for rows in (predicted, wanted)]
        entity = entity_scores(predicted, wanted) if is_bio(names) else {}
        return {"accuracy": accuracy(*flat), **entity}

    return evaluate


def _prediction(examples: Words, tag: Tagger) -> Callable[[nn.Module, Path], object]:
    def predict(model: nn.Module, folder: Path) -> object:
        rows = zip(examples.words, tag(model), strict=True)
        return write_rows(folder, ({"tokens": words, "labels": labels} for words, labels in rows))

    return predict
