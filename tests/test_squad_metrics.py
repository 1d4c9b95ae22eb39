"""Exact match and F1 against values worked out by hand from the definition."""

import pytest

from bert_fast.training.squad_metrics import evaluate, exact, f1, normalize


@pytest.mark.parametrize(
    ("answer", "bare"),
    [
        ("The Cat", "cat"),
        ("  a   cat\tand\nan owl ", "cat and owl"),
        ("the", ""),
        ("", ""),
        ("U.S.A.", "usa"),  # punctuation goes without leaving a space
        ("well-known", "wellknown"),
        ("theatre another A1", "theatre another a1"),  # articles are whole words
        ("a.", ""),  # punctuation goes before articles do
        ("a-the", "athe"),
        ("$5,000", "5000"),
        ("“The cat”", "“ cat”"),  # only ASCII's punctuation goes; \b sees the article
        ("Zürich — Straße", "zürich — straße"),
        ("ＴＨＥ cat", "ｔｈｅ cat"),  # noqa: RUF001
        ("no\u00a0break the\u2003dog", "no break dog"),
    ],
)
def test_normalize(answer, bare):
    assert normalize(answer) == bare


@pytest.mark.parametrize(
    ("prediction", "gold", "same", "overlap"),
    [
        ("the cat", "Cat!", 1, 1),
        ("cat", "dog", 0, 0),
        ("black cat", "cat", 0, 2 / 3),  # precision 1/2, recall 1
        ("cat cat cat", "cat cat dog", 0, 2 / 3),  # repeated words count as often as on both sides
        ("cat", "cat cat cat cat", 0, 2 * 0.25 / 1.25),
        ("b c a", "c b", 0, 1),  # order does not matter to F1
        ("", "cat", 0, 0),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_pairs(prediction, gold, same, overlap, version):
    assert exact(prediction, gold) == same
    assert f1(prediction, gold, version) == pytest.approx(overlap)


def test_nothing_left_on_both_sides():
    assert exact("the", "a!") == 1
    assert f1("the", "a!", version=1) == 0  # no word in common
    assert f1("the", "a!", version=2) == 1


def test_best_gold_counts_for_each_metric_alone():
    found = evaluate({"q": ["dog", "big black cat", "cat"]}, {"q": "black cat"})
    assert found == {"exact_match": 0, "f1": pytest.approx(80), "total": 1}


def test_version_1_counts_questions_that_were_not_answered():
    found = evaluate({"a": ["cat"], "b": ["dog"]}, {"a": "cat"})
    assert found == {"exact_match": 50, "f1": 50, "total": 2}


def test_version_2_by_whether_there_is_an_answer():
    golds = {"a": ["cat"], "b": [], "c": [], "d": ["owl"], "e": ["not asked"]}
    found = evaluate(golds, {"a": "the cat", "b": "", "c": "dog", "d": ""}, version=2)
    assert found == {
        **{"exact_match": 50, "f1": 50, "total": 4},
        **{"HasAns_exact": 50, "HasAns_f1": 50, "HasAns_total": 2},
        **{"NoAns_exact": 50, "NoAns_f1": 50, "NoAns_total": 2},
    }


def test_version_2_gold_without_words_wants_no_answer():
    assert evaluate({"q": ["the", "!"]}, {"q": ""}, version=2)["exact_match"] == 100
    assert evaluate({"q": ["the", "cat"]}, {"q": ""}, version=2)["exact_match"] == 0
    assert evaluate({"q": ["the", "cat"]}, {"q": ""}, version=1)["exact_match"] == 100


def test_unknown_version():
    with pytest.raises(ValueError, match="version is 3, expected 1 or 2"):
        evaluate({}, {}, version=3)
