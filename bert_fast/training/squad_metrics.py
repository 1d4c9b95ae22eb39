"""Exact match and F1 of answers, as the evaluation scripts of SQuAD 1.1 and 2.0 define them.

An answer is compared after normalising: lower case, then no punctuation, then no articles, then
single spaces. A question's score is the best over its gold answers; a file's is the mean, in
percent. Version 2 adds questions whose right answer is none, written as the empty string.

Sources: Rajpurkar et al. 2016 (arXiv 1606.05250), section 6.1, and 2018 (arXiv 1806.03822),
section 4; the edge cases are those of the scripts published with them.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII's only


def normalize(answer: str) -> str:
    """Lower case, no ASCII punctuation, no articles, no white space but single spaces inside."""
    bare = answer.lower().translate(WITHOUT_PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", bare).split())


def exact(prediction: str, gold: str) -> float:
    """1.0 where both are the same once normalised, else 0.0."""
    return float(normalize(prediction) == normalize(gold))


def f1(prediction: str, gold: str, version: int = 1) -> float:
    """Harmonic mean of precision and recall over words, each counted as often as it occurs.

    Where a side has no words left, version 2 gives 1.0 if neither has any; version 1 gives 0.0.
    """
    found, wanted = normalize(prediction).split(), normalize(gold).split()
    if version == 2 and not (found and wanted):
        return float(found == wanted)
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def golds_of(answers: Sequence[str], version: int = 1) -> list[str]:
    """What a prediction is compared with.

    Version 2 drops answers that normalise to nothing; a question without any wants none: [""].
    """
    if version == 1:
        return list(answers)
    return [answer for answer in answers if normalize(answer)] or [""]


def evaluate(
    golds: Mapping[str, Sequence[str]], predictions: Mapping[str, str], version: int = 1
) -> dict[str, float]:
    """The scores of a file.

    Args:
        golds: the gold answers of each question id; none where it cannot be answered.
        predictions: the predicted answer of each id, "" for none. An id that is not there scores
            0 in version 1 and is left out of the mean in version 2, as in the scripts.
        version: 1 or 2, the SQuAD version whose rules hold.

    Returns: `exact_match` and `f1` in percent and `total`, the number of questions; in version 2
        also HasAns_exact, HasAns_f1, HasAns_total and the same for NoAns, where there are any.
    Raises: ValueError for a version other than 1 and 2.
    """
    if version not in (1, 2):
        raise ValueError(f"SQuAD version is {version!r}, expected 1 or 2")
    scores: dict[str, tuple[float, float]] = {}
    for key, answers in golds.items():
        if key not in predictions:
            if version == 1:
                scores[key] = (0.0, 0.0)
            continue
        pairs = [(predictions[key], gold) for gold in golds_of(answers, version)]
        scores[key] = (
            max((exact(*pair) for pair in pairs), default=0.0),
            max((f1(*pair, version) for pair in pairs), default=0.0),
        )
    result = _means(scores, ("exact_match", "f1", "total"))
    if version == 2:
        for prefix, wanted in (("HasAns", True), ("NoAns", False)):
            part = {key: score for key, score in scores.items() if bool(golds[key]) is wanted}
            if part:
                result |= _means(part, (f"{prefix}_exact", f"{prefix}_f1", f"{prefix}_total"))
    return result


def _means(scores: Mapping[str, tuple[float, float]], names: Sequence[str]) -> dict[str, float]:
    count = len(scores)
    exact_sum, f1_sum = (sum(score[i] for score in scores.values()) for i in (0, 1))
    return dict(
        zip(
            names,
            (100 * exact_sum / max(count, 1), 100 * f1_sum / max(count, 1), count),
            strict=True,
        )
    )
