"""Masked language modelling, as BERT's recipe has it: 15 % of the tokens are to be predicted.

Of these 80 % become [MASK], 10 % a random token, 10 % stay (Devlin et al., arXiv 1810.04805,
section 3.1). Special tokens are never chosen, nor put in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..console import vocabulary_size
from ..ops.masked_lm_loss import IGNORED

SHARE = 0.15


@dataclass(frozen=True)
class Masking:
    """Which tokens are chosen, and what they become.

    mask: id of [MASK]; special: bool [V], tokens that are neither chosen nor put in; continues:
    bool [V], tokens that go on with a word ("##ing"), or None, where words are not kept whole;
    share: how many of the tokens are chosen.
    """

    mask: int
    special: np.ndarray
    ordinary: np.ndarray
    continues: np.ndarray | None = None
    share: float = SHARE

    @classmethod
    def of(cls, tokenizer: Any, whole_words: bool = False, share: float = SHARE) -> Masking:
        """For a tokenizer of the WordPiece kind.

        Raises: ValueError where it has no [MASK], [CLS], [SEP] or [PAD], or no "##" pieces to make
            words of.
        """
        for name in ("mask", "cls", "sep", "pad"):
            if getattr(tokenizer, f"{name}_token_id") is None:
                raise ValueError(f"the tokenizer has no {name} token")
        pieces = tokenizer.convert_ids_to_tokens(list(range(vocabulary_size(tokenizer))))
        unused = [piece is None for piece in pieces]
        special = np.isin(np.arange(len(pieces)), tokenizer.all_special_ids) | unused
        continues = np.array([(piece or "").startswith("##") for piece in pieces]) & ~special
        if whole_words and not continues.any():
            raise ValueError("--whole-word: the tokenizer has no pieces that start with ##")
        return cls(
            tokenizer.mask_token_id,
            special,
            np.flatnonzero(~special),
            continues if whole_words else None,
            share,
        )

    def __call__(self, ids: np.ndarray, random: np.random.Generator) -> tuple[Any, Any]:
        """Masks one sequence.

        Args:
            ids: int64 [S], with special tokens.
            random: all choices come from it.
        Returns: ids with the chosen tokens replaced, and labels: the id where chosen, else -100.
            round(share x ordinary tokens) are chosen, one at least; with whole words all pieces of
            a word or none, in random order while they fit.
        """
        candidates = np.flatnonzero(~self.special[ids])
        count = min(len(candidates), max(1, round(self.share * len(candidates))))
        if self.continues is None:
            chosen = random.permutation(candidates)[:count]
        else:
            chosen = self._whole_words(ids, candidates, count, random)
        masked, labels = ids.copy(), np.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        fate = random.random(len(chosen))
        masked[chosen[fate < 0.8]] = self.mask
        swapped = chosen[fate >= 0.9]
        masked[swapped] = random.choice(self.ordinary, len(swapped))
        return masked, labels

    def _whole_words(
        self, ids: np.ndarray, candidates: np.ndarray, count: int, random: np.random.Generator
    ) -> np.ndarray:
        assert self.continues is not None
        # A word starts where a piece does not continue one, or follows a special token.
        follows = np.concatenate([[False], np.diff(candidates) == 1])
        starts = np.flatnonzero(~(self.continues[ids[candidates]] & follows))
        words = np.split(candidates, starts[1:])
        chosen: list[int] = []
        for word in random.permutation(len(words)).tolist():
            if len(chosen) + len(words[word]) <= count or not chosen:
                chosen += words[word].tolist()
        return np.array(chosen, np.int64)
