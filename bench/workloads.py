"""What models are timed on: named length distributions, as padded batches.

Quantiles are those published or measured; a workload's lengths are spread evenly over them, so a
small sample has the mean of the whole. Token ids are random: zeros would run faster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Model:
    """The shape of an encoder."""

    name: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab: int = 30_522
    positions: int = 512


MODELS = {
    model.name: model
    for model in (
        Model("minilm-l6", 6, 384, 12, 1536),
        Model("bert-base", 12, 768, 12, 3072),
        Model("bert-large", 24, 1024, 16, 4096),
    )
}
TINY = Model("tiny", 2, 64, 2, 128, vocab=99, positions=512)  # exercises the scripts, not a GPU

# Lengths of SQuAD v1.1's training features, cut at 384: every fifth percentile of 88,641
# (Krell et al., arXiv 2107.02027). Mean 172.
SQUAD = (36, 84, 107, 117, 124, 130, 135, 141, 147, 153, 159, 166, 174, 182, 191, 203, 217, 235,
         260, 299, 384)  # fmt: skip
# Every fifth percentile of Wikipedia pre-training sequences of at most 512 tokens: 16.3 M of them
# (Krell et al., arXiv 2107.02027). Mean 256.
WIKI512 = (5, 36, 48, 59, 70, 84, 100, 120, 143, 171, 204, 243, 288, 342, 407, 484, 512, 512, 512,
           512, 512)  # fmt: skip
# Of the 10,605 movie-review sentences of `bench.assets`, under MiniLM's tokenizer. Mean 27.
SENTENCE = (4, 10, 13, 15, 17, 19, 20, 22, 23, 25, 26, 28, 29, 31, 32, 34, 36, 39, 42, 46, 79)
# A query with a passage, as rerankers see them: log-normal, mean 85, cut at 256.
RERANK = tuple(min(256, round(76.0 * math.exp(0.47 * z))) for z in (
    -2.6, -1.645, -1.282, -1.036, -0.842, -0.674, -0.524, -0.385, -0.253, -0.126, 0.0, 0.126,
    0.253, 0.385, 0.524, 0.674, 0.842, 1.036, 1.282, 1.645, 2.6))  # fmt: skip
# News articles cut at 512 tokens: three fifths are longer. Mean 410.
DOCS = (60, 120, 180, 240, 290, 340, 390, 430, 470, *([512] * 12))


@dataclass(frozen=True)
class Workload:
    """Length quantiles, texts per batch, and whether texts differ in length."""

    name: str
    quantiles: tuple[int, ...]
    batch: int
    about: str

    @property
    def ragged(self) -> bool:
        return len(set(self.quantiles)) > 1


WORKLOADS = {
    w.name: w
    for w in (
        Workload("single16", (16,), 1, "one text of 16 tokens at a time"),
        Workload("single128", (128,), 1, "one text of 128 tokens at a time"),
        Workload("full128", (128,), 8, "texts of exactly 128 tokens: no padding to spare"),
        Workload("full512", (512,), 8, "texts of exactly 512 tokens: no padding to spare"),
        Workload("sentence", SENTENCE, 32, "lengths of sentences from movie reviews"),
        Workload("rerank", RERANK, 32, "lengths of a query with a passage"),
        Workload("squad", SQUAD, 16, "lengths of SQuAD's questions with their contexts"),
        Workload("wiki512", WIKI512, 16, "lengths of Wikipedia sequences of at most 512"),
        Workload("docs", DOCS, 16, "lengths of news articles cut at 512"),
    )
}


def named(name: str) -> Workload:
    """The workload of that name; "squad/256" is squad in batches of 256 texts.

    Raises: ValueError for a name that is none.
    """
    base, slash, batch = name.partition("/")
    if base not in WORKLOADS or (slash and not (batch.isdecimal() and int(batch))):
        raise ValueError(
            f"unknown workload {name!r}, expected one of {', '.join(WORKLOADS)}, "
            "or one with its texts a batch, as squad/256"
        )
    found = WORKLOADS[base]
    return replace(found, name=name, batch=int(batch)) if slash else found


def spread(quantiles: tuple[int, ...], count: int) -> list[int]:
    """`count` lengths, evenly over the quantiles, in a fixed shuffled order."""
    found, top = [], len(quantiles) - 1
    for i in range(count):
        place = (i + 0.5) / count * top
        low = int(place)
        high = min(low + 1, top)
        found.append(round(quantiles[low] + (place - low) * (quantiles[high] - quantiles[low])))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order]


def texts_of(workload: Workload, tokens: int) -> list[int]:
    """The lengths of texts with about `tokens` real tokens in all."""
    mean = sum(spread(workload.quantiles, 1000)) / 1000
    return spread(workload.quantiles, max(1, round(tokens / mean)))


def fitted(workload: Workload, model: Model, batches: int, most: float) -> Workload:
    """`workload` with its batch halved until `batches`, padded, take `most` FLOPs each on average.

    A large model on a small CPU would take minutes a pass otherwise.
    """
    while workload.batch > (2 if workload.ragged else 1):
        padded = [[max(batch)] * len(batch) for batch in lengths(workload, batches, "arrival")]
        if sum(flop(model, batch) for batch in padded) <= most * batches:
            break
        workload = replace(workload, batch=workload.batch // 2)
    return workload


def lengths(workload: Workload, batches: int, order: str) -> list[list[int]]:
    """The texts' lengths, batch by batch; the same texts in either order."""
    found = spread(workload.quantiles, batches * workload.batch)
    if order == "sorted":
        found.sort()
    return [found[i : i + workload.batch] for i in range(0, len(found), workload.batch)]


def orders(workload: Workload, batches: int) -> tuple[str, ...]:
    """As the texts arrive, and sorted by length where that spares 2 % of what is computed."""

    def computed(order: str) -> int:
        return sum(len(batch) * max(batch) for batch in lengths(workload, batches, order))

    differ = computed("sorted") < 0.98 * computed("arrival")
    return ("arrival", "sorted") if differ else ("arrival",)


def padded(vocab: int, texts: list[int], seed: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, S], int64, right-padded, as a tokenizer returns them."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(texts)) < torch.tensor(texts)[:, None]).long()
    ids = torch.randint(1, vocab, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def flop(model: Model, texts: list[int]) -> float:
    """Of the real tokens: 24 L h^2 each for the projections (I = 4 h), 4 L S h for attention."""
    hidden, inner = model.hidden, model.intermediate
    per_token = 2 * model.layers * (4 * hidden * hidden + 2 * hidden * inner)
    return sum(n * per_token + 4 * model.layers * hidden * n * n for n in texts)


def real_tokens(batch: Mapping[str, Tensor]) -> int:
    return int(batch["attention_mask"].sum())
