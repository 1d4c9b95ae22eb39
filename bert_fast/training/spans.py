"""Extractive question answering: features out of SQuAD questions, answers out of logits.

A context that is longer than the model reads is cut into windows that overlap by `doc_stride`
tokens. In training, a window that does not hold the whole answer has its answer at [CLS]; so has a
question without one. In prediction every window proposes spans; the best over all windows is the
answer, or none where the score of [CLS] is better by more than a threshold (Devlin et al. 2019,
arXiv 1810.04805, sections 4.2 and 4.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..encode import check_fast
from .squad import Question, locate

QUESTIONS_AT_ONCE = 1000  # bounds the memory of the tokeniser's own encodings
N_BEST = 20


@dataclass(frozen=True)
class Feature:
    """One window of one question.

    Attributes:
        question: index of the question.
        inputs: input_ids and what else the model takes, int32 [L] each, without padding.
        first: position in `inputs` of the window's first context token.
        offsets: int32 [C, 2], where each of its C context tokens stands in the context.
        cls: position of [CLS], which stands for "no answer here".
        start, end: positions of the answer's first and last token; `cls` where it has none here.
    """

    question: int
    inputs: dict[str, np.ndarray]
    first: int
    offsets: np.ndarray
    cls: int
    start: int
    end: int

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class Answer:
    """A candidate: its text, its logits' sum, and its share among the n best."""

    text: str
    score: float
    probability: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """The answer of a question, "" for none; the n best, and none where it is allowed; how far
    "none" is ahead of the best.
    """

    text: str
    n_best: list[Answer]
    null_odds: float


def make_features(
    questions: Sequence[Question], tokenizer: Any, max_length: int, doc_stride: int
) -> tuple[list[Feature], list[int]]:
    """The windows of every question, in order, and the numbers of those whose answer is not found.

    The first answer of a question is the one trained on. Questions are cut to half of `max_length`,
    and to what leaves a window more room than `doc_stride`. A question whose answer does not stand
    in its context gets features like one without an answer: leave them out of training.

    Raises: ValueError for a tokeniser that is not fast, and sizes that leave no room for windows.
    """
    check_fast(tokenizer)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length < 4 * special:
        raise ValueError(f"--max-length is {max_length}, expected at least {4 * special}")
    if not 0 <= doc_stride <= max_length // 2:
        raise ValueError(
            f"--doc-stride is {doc_stride}, expected 0 to {max_length // 2}: at most half of "
            f"--max-length {max_length}"
        )
    most = min(max_length // 2, max_length - doc_stride - 1) - special  # of a question
    features: list[Feature] = []
    lost = []
    for start in range(0, len(questions), QUESTIONS_AT_ONCE):
        part = questions[start : start + QUESTIONS_AT_ONCE]
        places = [locate(q.context, *q.answers[0]) if q.answers else None for q in part]
        lost += [i for i, q in enumerate(part, start) if q.answers and not places[i - start]]
        asked = _cut([q.question.strip() for q in part], tokenizer, most)
        encoded = tokenizer(
            asked,
            [q.context for q in part],
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        features += _windows(encoded, part, places, start, tokenizer.cls_token_id)
    return features, lost


def _cut(texts: list[str], tokenizer: Any, most: int) -> list[str]:
    """Texts cut after `most` tokens."""
    offsets = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    return [
        text[: found[most - 1][1]] if len(found) > most else text
        for text, found in zip(texts, offsets, strict=True)
    ]


def _windows(
    encoded: Any,
    questions: Sequence[Question],
    places: Sequence[tuple[int, int] | None],
    base: int,
    cls_id: int,
) -> Iterator[Feature]:
    owners = encoded["overflow_to_sample_mapping"]
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    for i, owner in enumerate(owners):
        context = np.flatnonzero([side == 1 for side in encoded.sequence_ids(i)])
        first = int(context[0]) if len(context) else len(encoded["input_ids"][i])
        offsets = np.asarray(encoded["offset_mapping"][i], np.int32)[context].reshape(-1, 2)
        cls = encoded["input_ids"][i].index(cls_id)
        start = end = cls
        place = places[owner]
        if place is not None and len(offsets):
            # What the tokeniser drops at either end of a context belongs to the window there.
            is_first = i == 0 or owners[i - 1] != owner
            is_last = i + 1 == len(owners) or owners[i + 1] != owner
            low = 0 if is_first else int(offsets[0, 0])
            high = len(questions[owner].context) if is_last else int(offsets[-1, 1])
            # Tokens that share a character with the answer, whose ends may be inside of them.
            inside = np.flatnonzero((offsets[:, 1] > place[0]) & (offsets[:, 0] < place[1]))
            if low <= place[0] and place[1] <= high and len(inside):
                start, end = first + int(inside[0]), first + int(inside[-1])
        inputs = {name: np.asarray(encoded[name][i], np.int32) for name in names}
        yield Feature(base + owner, inputs, first, offsets, cls, start, end)


def predict(
    questions: Sequence[Question],
    features: Sequence[Feature],
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    *,
    null_allowed: bool,
    null_threshold: float = 0.0,
    max_answer_tokens: int = 30,
) -> list[Prediction]:
    """The answer of every question from its windows' logits.

    Args:
        start_logits, end_logits: by feature, at least as long as the feature; what is behind its
            tokens (padding) is not read.
        null_allowed: whether "no answer" is one. It is chosen where the best window's score of
            [CLS] exceeds that of the best span by more than `null_threshold`.
        max_answer_tokens: the longest span considered.

    Returns: one `Prediction` for each question, in order.
    """
    spans: list[list[Answer]] = [[] for _ in questions]
    nulls = [np.inf] * len(questions)
    for feature, start, end in zip(features, start_logits, end_logits, strict=True):
        context = questions[feature.question].context
        spans[feature.question] += _spans(feature, context, start, end, max_answer_tokens)
        # Every window may say that it has no answer: the question has none if all say so.
        null = float(start[feature.cls] + end[feature.cls])
        nulls[feature.question] = min(nulls[feature.question], null)
    return [
        _best(found, null, null_allowed, null_threshold)
        for found, null in zip(spans, nulls, strict=True)
    ]


def _spans(
    feature: Feature, context: str, start: np.ndarray, end: np.ndarray, longest: int
) -> Iterator[Answer]:
    """The best spans of one window, best first."""
    where = slice(feature.first, feature.first + len(feature.offsets))
    starts = np.argsort(-start[where], kind="stable")[:N_BEST]
    ends = np.argsort(-end[where], kind="stable")[:N_BEST]
    score = start[where][starts][:, None] + end[where][ends][None, :]
    tokens = ends[None, :] - starts[:, None] + 1
    rows, columns = np.nonzero((tokens >= 1) & (tokens <= longest))
    order = np.argsort(-score[rows, columns], kind="stable")[:N_BEST]
    for row, column in zip(rows[order], columns[order], strict=True):
        first, last = feature.offsets[starts[row], 0], feature.offsets[ends[column], 1]
        yield Answer(context[first:last].strip(), float(score[row, column]))


def _best(
    found: list[Answer], null: float, null_allowed: bool, null_threshold: float
) -> Prediction:
    by_text: dict[str, Answer] = {}
    for answer in sorted(found, key=lambda answer: -answer.score):
        if answer.text:
            by_text.setdefault(answer.text, answer)
    n_best = list(by_text.values())[:N_BEST]
    best = n_best[0] if n_best else Answer("", null)  # a context without a token
    odds = null - best.score
    text = "" if null_allowed and odds > null_threshold else best.text
    if null_allowed or not n_best:
        n_best = sorted([*n_best, Answer("", null)], key=lambda answer: -answer.score)
    scores = np.array([answer.score for answer in n_best])
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    n_best = [Answer(a.text, a.score, float(p)) for a, p in zip(n_best, shares, strict=True)]
    return Prediction(text, n_best, float(odds))
