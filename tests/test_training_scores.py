"""Metrics of the fine-tuning tasks against scikit-learn's, and by hand."""

import json

import numpy as np
import pytest

from bert_fast.training.classes import classification
from bert_fast.training.embedding import embedding
from bert_fast.training.loop import Settings
from bert_fast.training.scores import entity_scores, macro_f1, matthews
from bert_fast.training.tags import tokens
from bert_fast.training.tasks import Job

from . import tiny


@pytest.mark.parametrize("classes", [2, 5])
def test_as_scikit_learn_has_them(classes):
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    wanted = draw.integers(0, classes, 200)
    predicted = np.where(draw.random(200) < 0.6, wanted, draw.integers(0, classes, 200))
    predicted[0] = 7  # never wanted
    expected = metrics.f1_score(wanted, predicted, average="macro", zero_division=0)
    assert macro_f1(predicted, wanted) == pytest.approx(expected)
    assert matthews(predicted, wanted) == pytest.approx(
        metrics.matthews_corrcoef(wanted, predicted)
    )


def test_by_hand():
    predicted, wanted = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])
    assert macro_f1(predicted, wanted) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert matthews(predicted, wanted) == pytest.approx((2 * 1 - 1 * 0) / np.sqrt(2 * 3 * 1 * 2))
    assert matthews(predicted * 0, wanted) == 0.0 and matthews(wanted, wanted) == 1.0
    tags = ["B-A", "I-A", "O", "B-B"]
    found = entity_scores([["B-A", "I-A", "B-A", "B-A"]], [tags])
    assert found == {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5}
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def job(task, tmp_path, rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Job(task, tiny.save(tmp_path / "model"), Settings(tmp_path / "out"), file, file)


def test_tasks_tell_them(tmp_path):
    rows = [{"text": "a cat", "label": "x"}, {"text": "a dog", "label": "y"}]
    task = classification(job("classification", tmp_path, rows))
    assert set(task.evaluate(task.model)) == {"accuracy", "macro_f1", "matthews"}
    rows = [{"tokens": ["a", "cat"], "labels": ["O", "B-PET"]}]
    task = tokens(job("tokens", tmp_path, rows))
    assert set(task.evaluate(task.model)) == {"accuracy", "precision", "recall", "f1"}


def test_columns_that_are_not_used_are_named(tmp_path):
    pytest.importorskip("sentence_transformers")
    row = {"id": "7", "anchor": "a cat", "positive": "the cat", "negative": "a dog"}
    notes = embedding(job("embedding", tmp_path, [row])).notes
    assert any(note.endswith("columns not used: 'id', 'negative'") for note in notes)
    del row["negative"], row["id"]
    assert not any(
        "not used" in note for note in embedding(job("embedding", tmp_path, [row])).notes
    )
