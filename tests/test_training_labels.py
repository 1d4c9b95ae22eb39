"""Labels that say there is none, and columns of which only some are named."""

import json

import pytest
from typer.testing import CliRunner

from bert_fast.cli import app
from bert_fast.training.readers import (
    Columns,
    classes_of,
    labelled,
    labels_of,
    names_of,
    read_texts,
)

from . import tiny
from .test_cli import refused


def with_labels(tmp_path, labels, column="label", name="rows.jsonl"):
    file = tmp_path / name
    rows = [{"text": f"a cat {i}", column: label} for i, label in enumerate(labels)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file, column="label"):
    return read_texts(file, pairs=False, columns=Columns("text", None, column))


# -- no label -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "column", "kept"),
    [
        ([0, -1, 2, 1], "label", [0, 2, 3]),
        (["0", "-1", "1"], "label", [0, 2]),
        ([-1, 1, -1], "label", [0, 1, 2]),  # two classes
        ([-1, "yes", "no"], "label", [0, 1, 2]),
        ([-1, -2, 1, 0], "label", [0, 1, 2, 3]),
        (["neutral", "-", "contradiction"], "gold_label", [0, 2]),
        (["0", "-", "-1", "1"], "gold_label", [0, 3]),
        (["+", "-", "+"], "label", [0, 1, 2]),
    ],
)
def test_rows_without_a_label(tmp_path, labels, column, kept):
    examples = read(with_labels(tmp_path, labels, column), column)
    found = labelled(examples, names_of(examples) - {"-1"})
    assert found.labels == [labels[i] for i in kept]
    assert found.texts == [f"a cat {i}" for i in kept]
    assert [found.where(row) for row in range(len(kept))] == [examples.where(i) for i in kept]


def test_minus_one_may_be_a_class(tmp_path):
    examples = read(with_labels(tmp_path, [-1, 0, 1]))
    assert len(labelled(examples, names_of(examples))) == 3


def test_sentiments_are_three_classes(tmp_path):
    examples = read(with_labels(tmp_path, [-1, 0, 1] * 12))
    assert classes_of(examples, {}) == {"-1", "0", "1"}
    examples = read(with_labels(tmp_path, [0, 1] * 101 + [-1]))
    assert classes_of(examples, {}) == {"0", "1"}
    assert classes_of(examples, {"-1": 0}) == {"-1", "0", "1"}


def test_no_row_with_a_label(tmp_path):
    examples = read(with_labels(tmp_path, [-1, -1]))
    with pytest.raises(ValueError, match=r"rows\.jsonl: no row has a label"):
        labelled(examples, ["0", "1"])


def test_torchs_label_for_none(tmp_path):
    examples = read(with_labels(tmp_path, [1, -100, 0]))
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2, column 'label': label -100"):
        labels_of(examples)
    assert labels_of(examples, regression=True).regression


def test_rows_left_out_are_counted(tmp_path):
    train = with_labels(tmp_path, [0, 1] * 101 + [-1])
    dev = with_labels(tmp_path, [-1, -1, 0], name="dev.jsonl")
    line = ["finetune", "--task", "classification", "--train", train, "--validation", dev]
    line += ["--model", tiny.save(tmp_path / "model"), "--output", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, line), "--max-steps", "1"])
    assert result.exit_code == 0, result.output
    assert "rows.jsonl: 1 of 203 rows left out: their label -1 says" in result.stderr
    assert "dev.jsonl: 2 of 3 rows left out" in result.stderr
    assert "202 examples, 2 labels" in result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label2id"] == {"0": 0, "1": 1}
    # A model that has learnt it as a class goes on with it.
    config |= {"label2id": {"-1": 0, "0": 1, "1": 2}, "id2label": {0: "-1", 1: "0", 2: "1"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, [*map(str, line), "--max-steps", "1"])
    assert "203 examples, 3 labels" in result.stderr, result.output
    line[4] = with_labels(tmp_path, [0, -100, 1], name="hundred.jsonl")
    refused(CliRunner().invoke(app, [*map(str, line)]), "hundred.jsonl, line 2", "label -100")


# -- columns --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "asked", "pairs", "found"),
    [
        ("text,text_b,gold", (None, None, "gold"), None, ("text", "text_b", "gold")),
        ("text,text_b,gold,label", (None, None, "gold"), None, ("text", "text_b", "gold")),
        (
            "sentence1,sentence2,label",
            (None, None, "label"),
            None,
            ("sentence1", "sentence2", "label"),
        ),
        (
            "question1,question2,gold",
            (None, None, "gold"),
            True,
            ("question1", "question2", "gold"),
        ),
        ("sentence,gold", (None, None, "gold"), None, ("sentence", None, "gold")),
        ("text,other,label", (None, "other", None), None, ("text", "other", "label")),
        ("text,text_b,label", ("text", None, None), None, ("text", None, "label")),  # one is named
        ("a,text_b,label", ("a", None, None), True, ("a", "text_b", "label")),
        (
            "question1,question2,is_duplicate",
            ("question1", None, None),
            True,
            ("question1", "question2", "is_duplicate"),
        ),
    ],
)
def test_what_is_not_asked_for_is_as_usual(tmp_path, columns, asked, pairs, found):
    file = tmp_path / "a.csv"
    names = columns.split(",")
    file.write_text(f"{columns}\n{columns}\n")  # every value is its column's name
    examples = read_texts(file, pairs=pairs, columns=Columns(*asked))
    assert examples.texts == [found[0]] and examples.texts_b == (found[1] and [found[1]])
    assert examples.labels == [found[2]] and found[2] in names


@pytest.mark.parametrize(
    ("columns", "asked", "label"),
    [
        ("anchor,positive,score", ("anchor", "positive", None), "score"),
        ("anchor,positive,score", (None, None, "score"), "score"),
        ("query,positive", ("query", None, None), None),
        ("sentence1,sentence2,score", ("sentence1", None, None), "score"),
        ("a,b,label", ("a", "b", None), "label"),
        ("text,text_b,similarity", (None, None, None), "similarity"),
        ("sentence1,sentence2,similarity_score", (None, None, None), "similarity_score"),
        ("anchor,positive,label", (None, None, None), "label"),
        ("anchor,positive,row", (None, None, None), None),
    ],
)
def test_pairs_that_need_no_label(tmp_path, columns, asked, label):
    file = tmp_path / "a.csv"
    first, second = columns.split(",")[:2]
    file.write_text(f"{columns}\n{columns}\n")
    examples = read_texts(file, pairs=True, columns=Columns(*asked), labelled=False)
    assert (examples.texts, examples.texts_b) == ([first], [second])
    assert examples.labels == ([label] if label else [])


@pytest.mark.parametrize(
    ("asked", "pairs", "told"),
    [
        ((None, None, "gold"), None, "no column 'gold'.*--label-column"),
        (("body", None, None), None, "no column 'body'.*--text-column"),
        ((None, "other", None), None, "no column 'other'.*--text-b-column"),
        ((None, None, "label"), True, "no column 'text_b'.*--text-b-column"),
    ],
)
def test_columns_that_are_not_there(tmp_path, asked, pairs, told):
    file = tmp_path / "a.csv"
    file.write_text("text,label\na,b\n")
    with pytest.raises(ValueError, match=told):
        read_texts(file, pairs=pairs, columns=Columns(*asked))
