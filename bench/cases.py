"""Named shapes for the benchmarks: models, token counts, batches, and every op's arguments.

Data are random: zeros would run faster than real data. A tensor's values depend on the case alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

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
TOKENS = {"1k": 1_024, "8k": 8_192, "32k": 32_768}

# Lengths of SQuAD v1.1's training features, cut at 384: every fifth percentile of 88,641
# (Krell et al., arXiv 2107.02027). Mean 172.
SQUAD = (36, 84, 107, 117, 124, 130, 135, 141, 147, 153, 159, 166, 174, 182, 191, 203, 217, 235,
         260, 299, 384)  # fmt: skip
SQUAD_MEAN = 172


def squad_lengths(count: int) -> list[int]:
    """`count` lengths spread evenly over the quantiles, in a fixed shuffled order."""
    found = []
    for i in range(count):
        place = (i + 0.5) / count * (len(SQUAD) - 1)
        low = int(place)
        found.append(round(SQUAD[low] + (place - low) * (SQUAD[low + 1] - SQUAD[low])))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order]


def lengths_of(workload: str, tokens: int) -> list[int]:
    """Sequence lengths of a workload with about `tokens` real tokens (exactly, without ragging)."""
    if workload == "squad":
        return squad_lengths(max(1, round(tokens / SQUAD_MEAN)))
    size = {"full128": 128, "full512": 512}[workload]
    return [size] * max(1, tokens // size)


WORKLOADS = ("squad", "full128", "full512")


@dataclass(frozen=True)
class Case:
    """One op at one shape; `make` draws its arguments."""

    op: str
    name: str
    make: Callable[[], tuple[Any, ...]]


class _Draw:
    """Random tensors on a device, from one seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        wide = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return wide.to(self.dtype)

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def bounds(self, lengths: list[int]) -> Tensor:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return ends.to(self.device, torch.int32)


def op_cases(model: Model, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every op as one layer of `model` calls it on `tokens` packed tokens."""
    hidden, inner = model.hidden, model.intermediate

    def case(op: str, variant: str, make: Callable[[_Draw], tuple[Any, ...]]) -> Case:
        name = "/".join(part for part in (model.name, f"T{tokens}", variant) if part)
        return Case(op, name, lambda: make(_Draw(device, dtype)))

    def norm(draw: _Draw) -> tuple[Tensor, Tensor]:
        return draw.normal(hidden) * 0.1 + 1.0, draw.normal(hidden)

    def linear(draw: _Draw, outer: int) -> tuple[Tensor, Tensor, Tensor]:
        weight = draw.normal(outer, hidden, scale=hidden**-0.5)
        return draw.normal(tokens, hidden), weight, draw.normal(outer)

    def qkv_linear(draw: _Draw) -> tuple[Tensor, ...]:
        x, weight, bias = linear(draw, 3 * hidden)
        return x, *weight.chunk(3), *bias.chunk(3)

    def attention(draw: _Draw, lengths: list[int]) -> tuple[Any, ...]:
        width = hidden // model.heads
        qkv = draw.normal(sum(lengths), 3, model.heads, width)
        return qkv, draw.bounds(lengths), None, None, max(lengths), width**-0.5, 0.0, None

    def embeddings(draw: _Draw) -> tuple[Any, ...]:
        ids = (draw.ids(model.vocab, tokens), draw.ids(2, tokens))
        positions = torch.arange(tokens, device=device) % model.positions
        tables = (model.vocab, model.positions, 2)
        return *ids, positions, *(draw.normal(n, hidden) for n in tables), *norm(draw), \
            1e-12, 0, 0.0, None  # fmt: skip

    def kept(draw: _Draw) -> Tensor:
        """Half of 2 T padded rows, in order."""
        order = torch.randperm(2 * tokens, generator=draw.generator, device=device)
        return order[:tokens].sort().values

    yield case("embed_layernorm", "", embeddings)
    yield case("qkv_linear", "", qkv_linear)
    yield case("linear", "out", lambda draw: linear(draw, hidden))
    yield case("linear_gelu", "", lambda draw: (*linear(draw, inner), "gelu"))
    for workload in WORKLOADS:
        make = functools.partial(attention, lengths=lengths_of(workload, tokens))
        yield case("attention", workload, make)
    yield case(
        "add_layernorm",
        "",
        lambda draw: (
            draw.normal(tokens, hidden),
            draw.normal(hidden),
            draw.normal(tokens, hidden),
            *norm(draw),
            1e-12,
            0.0,
            None,
        ),
    )
    yield case(
        "bias_gelu", "", lambda draw: (draw.normal(tokens, inner), draw.normal(inner), "gelu")
    )
    squad = lengths_of("squad", tokens)
    yield case(
        "pool",
        "squad",
        lambda draw: (draw.normal(sum(squad), hidden), draw.bounds(squad), "mean", True),
    )
    yield case("unpad", "", lambda draw: (draw.normal(2 * tokens, hidden), kept(draw)))
    yield case("pad", "", lambda draw: (draw.normal(tokens, hidden), kept(draw), 2 * tokens))


def padded_batch(model: Model, lengths: list[int], device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask of right-padded sequences, as a tokenizer returns them."""
    generator = torch.Generator().manual_seed(0)
    width = max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, model.vocab, mask.shape, generator=generator) * mask
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
