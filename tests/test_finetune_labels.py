"""`bert-fast finetune` without --train: labels of files, and those of the model."""

import pytest

from . import test_finetune_predict as predict
from .test_cli import refused
from .test_finetune_predict import (
    SENTENCES,
    TAGS,
    TEXTS,
    lines,
    logits_of,
    metrics_of,
    tags_by_hand,
)

run, trained = predict.run, predict.trained  # fixtures


def test_a_model_without_names_of_labels_has_their_numbers(run, trained, tmp_path):
    model = trained(names=("LABEL_0", "LABEL_1"))
    rows = [
        {"text": text, "label": int(logits.argmax())}
        for text, logits in zip(TEXTS, logits_of(model, TEXTS), strict=True)
    ]
    file = lines(tmp_path / "a.jsonl", rows)
    _, found, folder = run("classification", model, validation=file, predict=file)
    assert metrics_of(folder)["accuracy"] == 1.0
    assert [row["label"] for row in found] == [str(row["label"]) for row in rows]


@pytest.mark.parametrize(
    ("names", "spelt", "told"),
    [
        (("1.0", "2.0"), ("1", 2.0), None),
        ((" cat", "dog "), ("cat ", "dog"), None),
        (("LABEL_0", "LABEL_1"), ("LABEL_0", "LABEL_1"), "'LABEL_0 is 0', 'LABEL_1 is 1'"),
        (
            ("NO", "YES"),
            (0, "1"),
            "a.jsonl: its labels are taken for the model's ids: '0 is NO'",
        ),
    ],
)
def test_labels_of_a_file_are_the_models_own(run, trained, tmp_path, names, spelt, told):
    model = trained(names=names)
    best = [int(logits.argmax()) for logits in logits_of(model, TEXTS)]
    assert set(best) == {0, 1}
    rows = [{"text": text, "label": spelt[i]} for text, i in zip(TEXTS, best, strict=True)]
    if isinstance(spelt[0], int):  # -1 may stand beside ids
        rows.append({"text": "a", "label": -1})
    file = lines(tmp_path / "a.jsonl", rows)
    result, _, folder = run("classification", model, validation=file)
    assert metrics_of(folder)["accuracy"] == 1.0, result.output
    assert told in result.stderr if told else "taken for" not in result.stderr


def test_ids_are_no_labels_where_names_are_numbers(run, trained, tmp_path):
    file = lines(tmp_path / "a.jsonl", [{"text": "a", "label": 0}])
    refused(run("classification", trained(names=("5", "x")), validation=file)[0], "'5', 'x'")


@pytest.mark.parametrize("names", [("cat", "dog", "cat"), ("1", "1.0", "2")])
def test_two_labels_of_one_name_are_refused(run, trained, tmp_path, names):
    file = lines(tmp_path / "a.jsonl", [{"text": "a"}])
    result, _, _ = run("classification", trained(names=names), predict=file)
    refused(result, "2 labels with the name", repr(names[0]))


@pytest.mark.parametrize("file", ["a.jsonl", "a.conll"])
def test_tags_may_be_the_models_ids(run, trained, tmp_path, file):
    model = trained("TokenClassification", TAGS)
    (tags,) = tags_by_hand(model, SENTENCES[3:4], 24)
    ids = [TAGS.index(tag) for tag in tags]
    lines(tmp_path / "a.jsonl", [{"tokens": SENTENCES[3], "ner_tags": [-100, *ids[1:]]}])
    words = zip(SENTENCES[3], ids, strict=True)
    (tmp_path / "a.conll").write_text("".join(f"{word} {i}.0\n" for word, i in words))
    result, _, folder = run("tokens", model, "--max-length", 24, validation=tmp_path / file)
    found = metrics_of(folder)
    assert found["accuracy"] == found["f1"] == 1.0, result.output
    assert "'0 is O', '1 is B-PET', '2 is I-PET'" in result.stderr


def test_words_of_which_none_can_be_scored(run, trained, tmp_path):
    row = {"tokens": ["a", "\u200b"], "labels": [-100, "O"]}
    file = lines(tmp_path / "a.jsonl", [row])
    result, _, _ = run("tokens", trained("TokenClassification", TAGS), validation=file)
    refused(result, "a.jsonl: no word with a label has a token")
