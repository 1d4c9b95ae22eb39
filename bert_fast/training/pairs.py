"""Next-sentence prediction: pairs of text, half of them consecutive, drawn anew in every epoch.

As in BERT's recipe (Devlin et al., arXiv 1810.04805, appendix A.2): whole sentences fill a target
length, which is what fits, in 10 % of the examples less; they are cut in two at random, A and what
follows it, B; in half of the examples B is from another document instead. Two differences. An
example starts at a random sentence in each N-th part of the corpus, so that an epoch covers it and
every epoch has as many. And foreign Bs are those of other examples, as long as what they replace:
lengths, stops and kinds of documents tell nothing about the answer, as they would otherwise.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from .corpus import Corpus
from .masking import Masking

SPECIALS = 3  # [CLS] A [SEP] B [SEP]
SHORT = 0.1  # share of shorter targets
LEAST = 2  # tokens of a pair


class Plan(NamedTuple):
    """The pairs of one epoch: int64 [N] token ranges of A and B, bool [N] where B is foreign."""

    a_start: np.ndarray
    a_end: np.ndarray
    b_start: np.ndarray
    b_end: np.ndarray
    foreign: np.ndarray

    def lengths(self) -> np.ndarray:
        return self.a_end - self.a_start + self.b_end - self.b_start + SPECIALS


class SentencePairs:
    """A map-style dataset of masked pairs; item i is a function of (seed, epoch, i).

    Items: {"input_ids", "token_type_ids", "labels": int64 [S]; "next_sentence_label": 1 where B
    does not follow A}.
    """

    def __init__(
        self,
        corpus: Corpus,
        documents: np.ndarray,
        tokenizer: Any,
        masking: Masking,
        max_length: int,
        seed: int,
    ) -> None:
        """
        Args:
            documents: numbers of the documents to draw from; those of one sentence are left out.
            max_length: tokens of a pair, specials included.
        Raises: ValueError for fewer than two documents of two sentences.
        """
        counts = corpus.documents[documents + 1] - corpus.documents[documents]
        documents = documents[counts >= 2]
        if len(documents) < 2:
            raise ValueError(
                f"{len(documents)} of {len(counts)} documents have two sentences or more, and "
                "pairs need two of them: separate documents by blank lines"
            )
        self.corpus, self.masking = corpus, masking
        self.room, self.seed, self.epoch = max_length - SPECIALS, seed, 0
        self.cls, self.sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        # First and last sentence of each document, and the tokens up to its end.
        self.begin, self.end = corpus.documents[documents], corpus.documents[documents + 1]
        self.total = np.cumsum(corpus.sentences[self.end] - corpus.sentences[self.begin])
        self.count = max(1, round(int(self.total[-1]) / self.room))
        self.plan = functools.lru_cache(maxsize=2)(self._plan)

    def __len__(self) -> int:
        return self.count

    def any_maskable(self) -> bool:
        """Whether some token may be chosen: not where the tokenizer knows none of them."""
        ranges = zip(self.begin.tolist(), self.end.tolist(), strict=True)
        sentences, special = self.corpus.sentences, self.masking.special
        return any(
            not special[self.corpus.tokens(sentences[begin], sentences[end])].all()
            for begin, end in ranges
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def lengths(self, epoch: int) -> np.ndarray:
        """Tokens of every example of an epoch, int64 [N]."""
        return self.plan(epoch).lengths()

    def __getitem__(self, index: int) -> dict[str, Any]:
        plan = self.plan(self.epoch)
        a = self.corpus.tokens(plan.a_start[index], plan.a_end[index])
        b = self.corpus.tokens(plan.b_start[index], plan.b_end[index])
        ids = np.concatenate([[self.cls], a, [self.sep], b, [self.sep]])
        masked, labels = self.masking(ids, np.random.default_rng((self.seed, self.epoch, index)))
        return {
            "input_ids": masked,
            "token_type_ids": (np.arange(len(ids)) >= len(a) + 2).astype(np.int64),
            "labels": labels,
            "next_sentence_label": int(plan.foreign[index]),
        }

    def _plan(self, epoch: int) -> Plan:
        """All pairs of an epoch at once, without a loop over them."""
        random = np.random.default_rng((self.seed, epoch))
        n, sentences = self.count, self.corpus.sentences
        # A random token in each of n equal parts of the corpus names a document and a sentence,
        # the last but one of its document at most.
        place = ((np.arange(n) + random.random(n)) * (self.total[-1] / n)).astype(np.int64)
        document = np.searchsorted(self.total, place, side="right")
        token = sentences[self.end[document]] - (self.total[document] - place)
        first = np.searchsorted(sentences, token, side="right") - 1
        first = np.minimum(first, self.end[document] - 2)
        target = np.where(
            random.random(n) < SHORT, random.integers(LEAST, self.room + 1, n), self.room
        )
        # Whole sentences up to the target: two at least, none of the next document.
        last = np.searchsorted(sentences, sentences[first] + target)
        last = np.minimum(np.maximum(last, first + 2), self.end[document])
        middle = first + 1 + _below(random, last - first - 1)
        pairs = Plan(
            sentences[first], sentences[middle], sentences[middle], sentences[last],
            np.zeros(n, bool),
        )  # fmt: skip
        return _exchange(random, document, _cut(random, target, pairs))


def _cut(random: np.random.Generator, target: np.ndarray, plan: Plan) -> Plan:
    """Takes tokens off the longer of A and B, at either end, until both fit the target."""
    a, b = plan.a_end - plan.a_start, plan.b_end - plan.b_start
    excess = np.maximum(a + b - target, 0)
    # The longer gives until they are equal, then both by turns.
    by_turns = np.maximum(excess - np.abs(a - b), 0)
    from_a = np.where(a > b, excess - by_turns, 0) + (by_turns + (a > b)) // 2
    from_b = excess - from_a
    front_a, front_b = random.binomial(from_a, 0.5), random.binomial(from_b, 0.5)
    return Plan(
        plan.a_start + front_a,
        plan.a_end - (from_a - front_a),
        plan.b_start + front_b,
        plan.b_end - (from_b - front_b),
        plan.foreign,
    )


def _exchange(random: np.random.Generator, document: np.ndarray, plan: Plan) -> Plan:
    """Gives half of the pairs the B of another such pair: as long, and of another document.

    The other's A is about as long too, so that both were cut alike.
    """
    chosen = random.permutation(len(document))[: len(document) // 2]
    a, b = plan.a_end - plan.a_start, plan.b_end - plan.b_start
    chosen = chosen[np.lexsort((a[chosen], b[chosen]))]
    donor = np.arange(len(document))
    for shift in range(1, min(9, len(chosen))):  # the first may be of the same document
        same = document[donor[chosen]] == document[chosen]
        donor[chosen[same]] = np.roll(chosen, shift)[same]
    foreign = document[donor] != document
    donor = np.where(foreign, donor, np.arange(len(document)))
    b_start = plan.b_start[donor]
    length = np.minimum(b, b[donor])
    return plan._replace(b_start=b_start, b_end=b_start + length, foreign=foreign)


def _below(random: np.random.Generator, bounds: np.ndarray) -> np.ndarray:
    """A random integer in [0, bound) for every bound; 0 for a bound of 0."""
    return (random.random(len(bounds)) * bounds).astype(np.int64)
