"""Metrics of the fine-tuning tasks: accuracy, F1, correlations, and entities found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def accuracy(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """The share of equal ids."""
    return float(np.mean(predicted == wanted))


def macro_f1(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """The mean of the F1 of every class that is predicted or wanted."""
    table = _confusion(predicted, wanted)
    return float(np.mean(2 * table.diagonal() / (table.sum(0) + table.sum(1))))


def matthews(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """Matthews' correlation of classes, for any number of them (Gorodkin 2004); 0.0 where all
    predicted or all wanted ones are the same.
    """
    table = _confusion(predicted, wanted)
    found, true, n = table.sum(0), table.sum(1), table.sum()
    size = float(np.sqrt((n * n - found @ found) * (n * n - true @ true)))
    return float(n * table.trace() - found @ true) / size if size else 0.0


def _confusion(predicted: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How often class i was wanted and j predicted, for the classes that occur, [C, C]."""
    both, ids = np.unique(np.concatenate([wanted, predicted]), return_inverse=True)
    table = np.zeros((len(both), len(both)))
    np.add.at(table, (ids[: len(wanted)], ids[len(wanted) :]), 1)
    return table


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of two [n]; 0.0 where either is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else 0.0


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of the ranks, where equal values share their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def is_bio(names: Sequence[str]) -> bool:
    """Whether tags are O, B-kind and I-kind, so that they spell out entities."""
    return any(name.startswith("B-") for name in names) and all(
        name == "O" or name[:2] in ("B-", "I-") for name in names
    )


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first, last + 1) of every entity in the BIO tags of one sentence.

    As in CoNLL's script, an I- that continues no entity of its kind begins one.
    """
    found, begin, kind = set(), 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, this = tag.partition("-")
        if kind and not (mark == "I" and this == kind):
            found.add((kind, begin, i))
            kind = ""
        if mark != "O" and not kind:
            begin, kind = i, this
    return found


def entity_scores(
    predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Precision, recall and F1 of entities, right where kind and both ends are, over all sentences
    (CoNLL 2003); 0.0 where there are none.
    """
    right = found = true = 0
    for ours, gold in zip(predicted, wanted, strict=True):
        a, b = entities(ours), entities(gold)
        right, found, true = right + len(a & b), found + len(a), true + len(b)
    return {
        "precision": right / found if found else 0.0,
        "recall": right / true if true else 0.0,
        "f1": 2 * right / (found + true) if found + true else 0.0,
    }
