"""Spans and SQuAD's files, each rule by itself: what bugs planted there once survived."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from bert_fast.training import spans as spans_module
from bert_fast.training.answers import _training_items
from bert_fast.training.spans import Feature, make_features, predict
from bert_fast.training.squad import Question, Squad, locate, read_squad

from . import tiny

CONTEXT = "the cat sat on the mat."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.save(tmp_path_factory.mktemp("model")))


def ask(answers=(), context=CONTEXT, question="a dog"):
    return Question("id", question, context, tuple(answers), True)


def feature(context_tokens=25, first=1, cls=0):
    """A window of words of one letter with a space behind each."""
    offsets = np.array([(2 * i, 2 * i + 1) for i in range(context_tokens)], np.int32)
    ids = {"input_ids": np.zeros(first + context_tokens + 1, np.int32)}
    return Feature(0, ids, first, offsets, cls, cls, cls)


def letters(n=25):
    return " ".join(chr(ord("a") + i) for i in range(n))


def test_questions_in_parts_keep_their_numbers(tokenizer, monkeypatch):
    """More questions than are tokenised at once: numbers of windows and of lost answers."""
    monkeypatch.setattr(spans_module, "QUESTIONS_AT_ONCE", 2)
    questions = [ask([("cat", 4)]), ask(), ask([("mat", 19)]), ask([("owl", 0)])]
    features, lost = make_features(questions, tokenizer, 64, 8)
    assert [f.question for f in features] == [0, 1, 2, 3] and lost == [3]


def test_a_second_question_begins_with_a_first_window(tokenizer):
    """What the tokeniser drops before a context is the answer's, of every question."""
    odd = ask([("\u200bcat", 0)], "\u200bcat sat")
    also = ask([("sat\u200b", 4)], "cat sat\u200b")
    features, _ = make_features([odd, odd, also, also], tokenizer, 32, 4)
    assert all(f.start > 0 for f in features)
    whole = [f.offsets[[f.start - f.first, f.end - f.first]].tolist() for f in features]
    assert whole[0] == whole[1] and whole[2] == whole[3]


def test_an_answer_without_a_token_is_none(tokenizer):
    features, _ = make_features([ask([("\u200b", 4)], "cat \u200b sat")], tokenizer, 32, 4)
    assert [(f.start, f.end) for f in features] == [(f.cls, f.cls) for f in features]


def test_cls_where_it_stands():
    """[CLS] need not come first."""
    one = feature(3, first=1, cls=4)
    start = np.array([9.0, 0, 1, 0, 2])
    (found,) = predict([ask(context=letters(3))], [one], [start], [start], null_allowed=True)
    assert found.null_odds == 2.0


def test_a_long_question_keeps_what_there_is_room_for(tokenizer):
    question = "the dog ran. " * 50
    (one, *_), _ = make_features([ask(question=question)], tokenizer, 24, 4)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    most = min(24 // 2, 24 - 4 - 1) - special
    assert one.first == most + 2  # [CLS] question [SEP]
    (one, *_), _ = make_features([ask(question="the " * most)], tokenizer, 24, 4)
    assert one.first == most + 2


def test_the_first_answer_is_trained_on(tokenizer):
    (one,), _ = make_features([ask([("mat", 19), ("cat", 4)])], tokenizer, 64, 8)
    assert one.offsets[one.start - one.first].tolist() == [19, 22]


def test_the_twentieth_best_start_counts():
    """The best span may begin far from the best start, where all later ends are worse."""
    n = 25
    start, end = np.zeros(n + 2), np.full(n + 2, -50.0)
    start[1 : n + 1] = np.arange(n)  # the best starts stand last, where no end is
    end[1 + 8] = 0.0
    (found,) = predict([ask(context=letters(n))], [feature(n)], [start], [end], null_allowed=False)
    assert found.text == "i" and len(found.n_best) > 1
    (found,) = predict(
        [ask(context=letters(n))], [feature(n)], [end[::-1].copy()], [start[::-1].copy()],
        null_allowed=False,
    )  # fmt: skip
    assert found.text == "q"


def test_a_span_does_not_end_before_it_begins():
    start, end = np.zeros(7), np.zeros(7)
    start[5], end[1] = 9, 9
    (found,) = predict([ask(context=letters(5))], [feature(5)], [start], [end], null_allowed=False)
    assert found.text and found.n_best[0].score == 9
    assert all(a.text for a in found.n_best) and len(found.n_best) == 15


def test_n_best_and_probabilities_of_large_logits():
    start = np.array([-800.0, 900, 899, 0, 0])
    (found,) = predict([ask(context=letters(3))], [feature(3)], [start], [start], null_allowed=True)
    assert found.text == "a" and len(found.n_best) == 7
    scores = [a.score for a in found.n_best]
    assert scores == sorted(scores, reverse=True)
    assert found.n_best[0].probability == pytest.approx(1 / (1 + np.exp(-1) + np.exp(-2)))
    start[0] = 1000
    (found,) = predict([ask(context=letters(3))], [feature(3)], [start], [start], null_allowed=True)
    assert found.text == "" and found.n_best[0].text == ""


def test_as_far_ahead_as_the_threshold_is_not_further():
    start = np.array([1.0, 1, 0, 0, 0])
    (found,) = predict([ask(context=letters(3))], [feature(3)], [start], [start], null_allowed=True)
    assert found.null_odds == 0 and found.text == "a"


def test_an_answer_of_white_space_is_none():
    """Tokens that cover nothing but white space are no answer, nor is white space about one."""
    offsets = np.array([[0, 1], [1, 2], [2, 4]], np.int32)
    one = Feature(0, {"input_ids": np.zeros(5, np.int32)}, 1, offsets, 0, 0, 0)
    start = np.array([0.0, 0, 9, 5, 0])
    end = np.array([0.0, 0, 9, 5, 0])
    (found,) = predict([ask(context="a  b")], [one], [start], [end], null_allowed=False)
    assert found.text == "b" and "" not in [a.text for a in found.n_best]


def test_unlabelled_questions_are_not_trained_on(tokenizer):
    questions = [ask([("cat", 4)]), dataclasses.replace(ask(), labelled=False)]
    features, lost = make_features(questions, tokenizer, 64, 8)
    items, _ = _training_items(Squad(Path("train.json"), questions, 1), features, set(lost), [])
    assert len(features) == 2 and len(items) == 1


# -- SQuAD's files -------------------------------------------------------------------------------


def written(tmp_path, *paragraph, **more):
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": list(paragraph)}], **more}))
    return file


def cat(key="1", **more):
    answers = [{"text": "cat", "answer_start": 4}]
    return {"id": key, "question": "Who sat?", "answers": answers, **more}


HERE = {"context": "The cat sat."}


@pytest.mark.parametrize("other", [{"context": "One cat ran."}, {"no_answers": True}])
def test_one_id_of_two_contexts_is_refused(tmp_path, other):
    second = cat()
    if other.pop("no_answers", False):
        del second["answers"]
    file = written(tmp_path, HERE | {"qas": [cat()]}, HERE | other | {"qas": [second]})
    with pytest.raises(ValueError, match="is also that of"):
        read_squad(file)


def test_answers_of_one_id_in_their_order(tmp_path):
    again = cat(answers=[{"text": "sat", "answer_start": 8}])
    (question,) = read_squad(written(tmp_path, HERE | {"qas": [cat(), again]})).questions
    assert question.answers == (("cat", 4), ("sat", 8))


@pytest.mark.parametrize(
    ("question", "version"),
    [
        (cat(is_impossible=False), 2),  # says that others may be impossible
        (cat(answers=[]), 2),  # no answer is the answer
        ({"id": "1", "question": "Who sat?"}, 1),  # nothing told
    ],
)
def test_the_version_is_told_by_the_questions(tmp_path, question, version):
    assert read_squad(written(tmp_path, HERE | {"qas": [question]})).version == version


def test_a_paragraphs_context_is_its_questions(tmp_path):
    file = written(tmp_path, HERE | {"qas": [cat(context="The dog sat.")]})
    assert read_squad(file).questions[0].context == "The cat sat."


def test_an_impossible_questions_answers_are_none(tmp_path):
    """As in old files, which name a plausible one there; without any list it is labelled too."""
    bare = {"id": "2", "question": "Who ran?", "is_impossible": True}
    file = written(tmp_path, HERE | {"qas": [cat(is_impossible=True), bare]})
    found = read_squad(file).questions
    assert [(q.answers, q.labelled) for q in found] == [((), True), ((), True)]


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (cat(answers={"text": ["cat", "sat"], "answer_start": [4]}), "2 texts but 1 offsets"),
        (cat(key=["1"]), "expected a string"),
    ],
)
def test_wrong_fields_are_told(tmp_path, question, words):
    with pytest.raises(ValueError, match=words):
        read_squad(written(tmp_path, HERE | {"qas": [question]}))


@pytest.mark.parametrize(
    ("context", "text", "start", "where"),
    [
        ("cat   cat", "    cat", 2, (6, 9)),  # the offset is that of the space before it
        ("cat  cat cat", " cat    ", 4, (5, 8)),  # what is behind does not move it
        ("a cat, cat", "cat", -3, (2, 5)),  # no offset is from the end
        ("The  Cat", "the cat", 0, (0, 8)),  # white space and case differ both
    ],
)
def test_where_an_answer_stands(context, text, start, where):
    assert locate(context, text, start) == where
