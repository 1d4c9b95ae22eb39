"""Windows of long contexts, where answers stand in them, and answers out of logits."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from bert_fast.training.spans import Prediction, make_features, predict
from bert_fast.training.squad import Question

from . import tiny

CONTEXT = "The cat sat on  the mat. A dog, running in the rain, sat under the sun!\n\nThe dog ran."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.save(tmp_path_factory.mktemp("model")))


def ask(answer=None, context=CONTEXT, question="a dog", start=None):
    answers = ()
    if answer is not None:
        answers = ((answer, context.index(answer) if start is None else start),)
    return Question("id", question, context, answers, True)


def answer_of(feature, context=CONTEXT):
    """The characters that a feature's answer tokens cover; None where it says "not here"."""
    if feature.start == feature.end == feature.cls:
        return None
    first, last = feature.start - feature.first, feature.end - feature.first
    return context[feature.offsets[first, 0] : feature.offsets[last, 1]]


@pytest.mark.parametrize(
    ("max_length", "doc_stride"), [(64, 8), (16, 0), (16, 3), (16, 8), (13, 5)]
)
def test_windows_cover_the_context(tokenizer, max_length, doc_stride):
    features, _ = make_features([ask(), ask()], tokenizer, max_length, doc_stride)
    whole = tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    question = tokenizer("a dog", add_special_tokens=False)["input_ids"]
    head = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id]
    for owner in (0, 1):
        windows = [feature for feature in features if feature.question == owner]
        ids = []
        for number, window in enumerate(windows):
            assert len(window) <= max_length
            tokens = window.inputs["input_ids"].tolist()
            assert tokens[: window.first] == head and tokens[-1] == tokenizer.sep_token_id
            context = tokens[window.first : -1]
            assert len(context) == len(window.offsets)
            shared = doc_stride if number else 0
            assert context[:shared] == ids[len(ids) - shared :]
            ids += context[shared:]
        assert ids == whole


@pytest.mark.parametrize(
    ("answer", "covered"),
    [
        ("cat", "cat"),
        ("sat on  the mat.", "sat on  the mat."),
        ("unn", "running"),  # inside of a word: the tokens that share a character with it
        ("g, run", "dog, running"),
        (" A dog", "A dog"),
        ("!", "!"),
        ("ran.", "ran."),
    ],
)
@pytest.mark.parametrize("max_length", [64, 20])
def test_answers(tokenizer, answer, covered, max_length):
    features, lost = make_features([ask(answer)], tokenizer, max_length, 8)
    found = [answer_of(feature) for feature in features]
    assert not lost
    assert covered in {text for text in found if text} and set(found) <= {covered, None}


def test_a_window_with_half_an_answer_has_none(tokenizer):
    answer = "sat on  the mat. A dog, running in the rain, sat"
    features, _ = make_features([ask(answer)], tokenizer, 16, 4)
    assert len(features) > 2
    assert {answer_of(feature) for feature in features} == {None}


def test_what_the_tokenizer_drops_belongs_to_an_answer(tokenizer):
    context = "\u200b\u200bcat sat\u200b"  # characters without a token, at either end
    features, _ = make_features([ask(context, context)], tokenizer, 32, 4)
    assert [answer_of(feature, context) for feature in features] == ["cat sat"]


def test_answers_that_do_not_stand_in_the_context(tokenizer):
    questions = [ask("cat"), ask("owl", start=4), ask()]
    features, lost = make_features(questions, tokenizer, 64, 8)
    assert lost == [1]
    assert [answer_of(feature) for feature in features] == ["cat", None, None]


@pytest.mark.parametrize("doc_stride", [8, 12])
def test_odd_questions_and_contexts(tokenizer, doc_stride):
    questions = [
        ask("cat", question=" \n "),
        ask("cat", question="the dog ran. " * 50),
        ask("cat", context="cat"),
        ask(context=""),
        ask(context="\u200b"),
    ]
    features, lost = make_features(questions, tokenizer, 24, doc_stride)
    assert not lost and max(map(len, features)) <= 24
    assert {feature.question for feature in features} == set(range(5))
    assert "cat" in {answer_of(feature) for feature in features if feature.question == 1}
    logits = [np.zeros(len(feature)) for feature in features]
    found = predict(questions, features, logits, logits, null_allowed=False)
    assert [bool(prediction.text) for prediction in found] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("max_length", "doc_stride", "words"),
    [(64, 33, "--doc-stride is 33, expected 0 to 32"), (64, -1, "-1"), (11, 0, "--max-length")],
)
def test_sizes_refused(tokenizer, max_length, doc_stride, words):
    with pytest.raises(ValueError, match=words):
        make_features([ask()], tokenizer, max_length, doc_stride)


# -- answers out of logits ------------------------------------------------------------------


def run(questions, features, seed=0, **options) -> tuple[list[Prediction], list, list]:
    """Predictions from random logits with NaN behind each feature's tokens."""
    random = np.random.default_rng(seed)
    longest = max(map(len, features))
    logits = random.normal(size=(2, len(features), longest)).astype(np.float32)
    for row, feature in enumerate(features):
        logits[:, row, len(feature) :] = np.nan
    starts, ends = logits
    return predict(questions, features, starts, ends, **options), starts, ends


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [1, 3, 30])
def test_the_best_span_of_all_windows(tokenizer, seed, longest):
    questions = [ask(), ask(context="A cat. " * 3)]
    features, _ = make_features(questions, tokenizer, 16, 4)
    options = {"null_allowed": False, "max_answer_tokens": longest}
    found, starts, ends = run(questions, features, seed, **options)
    for owner, prediction in enumerate(found):
        best, text, null = -np.inf, "", np.inf
        for feature, start, end in zip(features, starts, ends, strict=True):
            if feature.question != owner:
                continue
            null = min(null, start[0] + end[0])
            for i in range(len(feature.offsets)):
                for j in range(i, min(i + longest, len(feature.offsets))):
                    score = start[feature.first + i] + end[feature.first + j]
                    if score > best:
                        best = score
                        piece = slice(feature.offsets[i, 0], feature.offsets[j, 1])
                        text = questions[owner].context[piece]
        assert prediction.text == text
        assert prediction.n_best[0].score == pytest.approx(best)
        assert prediction.null_odds == pytest.approx(null - best, abs=1e-5)
        texts = [answer.text for answer in prediction.n_best]
        assert len(set(texts)) == len(texts) <= 20
        assert sum(answer.probability for answer in prediction.n_best) == pytest.approx(1)


def test_no_answer_where_allowed_and_far_enough_ahead(tokenizer):
    questions = [ask()]
    features, _ = make_features(questions, tokenizer, 64, 8)
    ((prediction,), _, _) = run(questions, features, null_allowed=True, null_threshold=-100.0)
    assert prediction.text == "" and "" in [answer.text for answer in prediction.n_best]
    odds = prediction.null_odds
    for threshold, none in [(odds - 0.01, True), (odds + 0.01, False)]:
        options = {"null_allowed": True, "null_threshold": threshold}
        ((prediction,), _, _) = run(questions, features, **options)
        assert (prediction.text == "") is none
    ((prediction,), _, _) = run(questions, features, null_allowed=False, null_threshold=-100.0)
    assert prediction.text and "" not in [answer.text for answer in prediction.n_best]


def test_every_window_has_to_say_that_there_is_no_answer(tokenizer):
    questions = [ask()]
    features, _ = make_features(questions, tokenizer, 16, 4)
    assert len(features) > 1
    starts, ends = ([np.zeros(len(f)) for f in features] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        start[0] = end[0] = 9.0
    starts[1][0] = ends[1][0] = -9.0
    (prediction,) = predict(questions, features, starts, ends, null_allowed=True)
    assert prediction.text and prediction.null_odds == -18
