"""SQuAD's files as `bert-fast finetune --task spans` reads them, in every shape they come in."""

import json

import pytest

from bert_fast.training.squad import locate, read_squad

from .test_training_data import write


def squad(*questions, context="The cat sat.", **more):
    return {
        "data": [{"title": "t", "paragraphs": [{"context": context, "qas": questions}]}],
        **more,
    }


def cat(key="1", **more):
    answers = [{"text": "cat", "answer_start": 4}]
    return {"id": key, "question": "Who sat?", "answers": answers, **more}


def read(tmp_path, document, name="squad.json"):
    text = document if isinstance(document, str) else json.dumps(document)
    return read_squad(write(tmp_path / name, text))


def test_squad_1(tmp_path):
    found = read(tmp_path, squad(cat(), cat("2"), version="1.1"))
    assert found.version == 1 and [q.id for q in found.questions] == ["1", "2"]
    assert found.questions[0].answers == (("cat", 4),)


def test_squad_2(tmp_path):
    gone = {"id": "3", "question": "Who ran?", "answers": [], "is_impossible": True}
    gone["plausible_answers"] = [{"text": "cat", "answer_start": 4}]
    found = read(tmp_path, squad(cat(is_impossible=False), gone))
    assert found.version == 2
    assert [(len(q.answers), q.labelled) for q in found.questions] == [(1, True), (0, True)]


def test_squad_without_answers(tmp_path):
    found = read(tmp_path, squad({"question": "Who?"}, version="v2.0"))
    assert found.version == 2 and not found.questions[0].labelled
    assert "data[0].paragraphs[0].qas[0]" in found.questions[0].id


def test_squad_as_rows(tmp_path):
    row = {"id": "1", "question": "Who?", "context": "The cat sat."}
    row["answers"] = {"text": ["cat"], "answer_start": [4]}
    found = read(tmp_path, json.dumps(row), "rows.jsonl")
    assert found.version == 1 and found.questions[0].answers == (("cat", 4),)


ROW = {"id": "1", "question": "Who?", "context": "The cat sat.", "answers": []}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([ROW, ROW | {"id": "2"}]),
        json.dumps({"data": [ROW, ROW | {"id": "2"}]}, indent=2),
        f"{json.dumps(ROW)}\n\n{json.dumps(ROW | {'id': '2'})}\n",
        json.dumps(squad(ROW, ROW | {"id": "2"})["data"]),
        f"{json.dumps(squad(ROW)['data'][0])}\n{json.dumps(squad(ROW | {'id': '2'})['data'][0])}\n",
    ],
    ids=["rows", "rows as data", "lines of rows", "articles", "lines of articles"],
)
def test_squad_in_other_shapes(tmp_path, text):
    found = read(tmp_path, text).questions
    assert [(q.id, q.context, q.labelled) for q in found] == [
        (key, "The cat sat.", True) for key in ("1", "2")
    ]


@pytest.mark.parametrize(
    ("answers", "starts"),
    [
        ([{"text": "cat", "answer_start": 4.0}], [4]),
        ([{"text": "cat", "answer_start": "4"}], [4]),
        ([{"text": "cat", "answer_start": None}, {"text": "cat"}], [-1, -1]),
        ({"text": "cat", "answer_start": 4}, [4]),
        ({"text": ["cat"], "answer_start": [None]}, [-1]),
        ({"text": ["cat", "cat"]}, [-1, -1]),
    ],
)
def test_offsets_of_answers(tmp_path, answers, starts):
    """What a table has made of them; where none is told, the answer is looked for."""
    (question,) = read(tmp_path, squad(cat(answers=answers))).questions
    assert question.answers == tuple(("cat", start) for start in starts)


def test_an_id_that_comes_twice(tmp_path):
    file = write(tmp_path / "a.json", json.dumps(squad(cat(), cat("2"), cat(is_impossible=None))))
    assert [q.id for q in read_squad(file, answered=False).questions] == ["1", "2", "1"]
    first, second = read_squad(file).questions
    assert first.answers == (("cat", 4),) * 2 and second.answers == (("cat", 4),)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("[]", ["has no questions"]),
        ("{", ["not JSON"]),
        ({"data": []}, ["has no questions"]),
        ({"data": [{"title": "t"}]}, ["data[0]: no 'paragraphs'"]),
        (squad({"id": "1"}), ["qas[0]: no 'question'"]),
        ({"data": [{"context": "A cat."}]}, ["data[0]: no 'question'"]),
        ('{"data": []}\n{"data": []}', ["line 1: no 'question'"]),
        (squad(cat(), cat(question="Who?")), ["qas[1]: id '1' is also that of", "qas[0]"]),
        (squad(cat(answers=[{"answer_start": 4}])), ["qas[0].answers[0]: no 'text'"]),
        (squad(cat(answers="cat")), ["answers is str, expected a list"]),
        *(
            (
                squad(cat(answers=[{"text": "cat", "answer_start": value}])),
                ["answers[0]: answer_start is", "expected a whole number"],
            )
            for value in ("four", 4.5, True, [4], float("inf"))
        ),
        (squad(cat(is_impossible="false")), ["is_impossible is 'false', expected true or false"]),
        (squad(cat(), context=None), ["context is NoneType, expected str"]),
        (squad("Who?"), ["qas[0]: str, expected an object"]),
    ],
)
def test_squad_refused(tmp_path, document, words):
    with pytest.raises(ValueError) as told:
        read(tmp_path, document)
    assert all(word in str(told.value) for word in words), told.value


@pytest.mark.parametrize(
    ("context", "text", "start", "where"),
    [
        ("a cat, a cat", "cat", 2, (2, 5)),
        ("a cat, a cat", "cat", 9, (9, 12)),
        ("a cat, a cat", "cat", 7, (9, 12)),  # an offset that is off: the nearest
        ("a cat, a cat", "cat", -1, (2, 5)),
        ("a cat, a cat", " cat ", 1, (2, 5)),  # without white space around it
        ("the  big\ncat", "big cat", 5, (5, 12)),  # other white space inside
        ("The Cat", "the cat", 0, (0, 7)),
        ("a+b (c)", "(c)", 0, (4, 7)),
        ("a cat", "dog", 0, None),
        ("a cat", " ", 1, None),
        ("", "cat", 0, None),
    ],
)
def test_locate(context, text, start, where):
    assert locate(context, text, start) == where
