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

from .workloads import WORKLOADS, Model, texts_of

TOKENS = {"1k": 1_024, "8k": 8_192, "32k": 32_768}
ATTENTION = ("squad", "full128", "full512")  # workloads that attention is timed on


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

    def encoder(draw: _Draw) -> tuple[Any, ...]:
        """One layer."""
        lengths = texts_of(WORKLOADS["squad"], tokens)
        _, *three = qkv_linear(draw)
        square = draw.normal(hidden, hidden, scale=hidden**-0.5)
        up = draw.normal(inner, hidden, scale=hidden**-0.5)
        down = draw.normal(hidden, inner, scale=inner**-0.5)
        weights = [*three, square, draw.normal(hidden), *norm(draw)]
        weights += [up, draw.normal(inner), down, draw.normal(hidden), *norm(draw)]
        settings = (model.heads, max(lengths), 1e-12, "gelu", False)
        x = draw.normal(sum(lengths), hidden)
        return x, draw.bounds(lengths), None, None, None, weights, *settings

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
    yield case("linear_int8", "up", lambda draw: (*linear(draw, inner), "gelu"))
    yield case("linear_row_int8", "up", lambda draw: (*linear(draw, inner), "gelu"))
    yield case("linear_fp8", "up", lambda draw: linear(draw, inner))
    yield case("feed_forward", "", lambda draw: (
        *linear(draw, inner), draw.normal(hidden, inner, scale=inner**-0.5), "gelu", False
    ))  # fmt: skip
    yield case("feed_forward_fp8", "", lambda draw: (
        *linear(draw, inner), draw.normal(hidden, inner, scale=inner**-0.5), "gelu"
    ))  # fmt: skip
    yield case("encoder", "squad", encoder)
    scored = max(1, tokens // 7)
    yield case("masked_lm_loss", "", lambda draw: (
        draw.normal(scored, hidden), draw.normal(model.vocab, hidden, scale=hidden**-0.5),
        draw.normal(model.vocab), draw.ids(model.vocab, scored), True,
    ))  # fmt: skip
    lengths = texts_of(WORKLOADS["squad"], tokens)
    yield case("splade", "", lambda draw: (
        draw.normal(sum(lengths), hidden),
        draw.normal(model.vocab, hidden, scale=hidden**-0.5),
        draw.normal(model.vocab) - 4.0,  # most words absent, as training makes them
        draw.bounds(lengths),
    ))  # fmt: skip
    for workload in ATTENTION:
        make = functools.partial(attention, lengths=texts_of(WORKLOADS[workload], tokens))
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
    squad = texts_of(WORKLOADS["squad"], tokens)
    yield case(
        "pool",
        "squad",
        lambda draw: (draw.normal(sum(squad), hidden), draw.bounds(squad), "mean", True),
    )
    yield case("unpad", "", lambda draw: (draw.normal(2 * tokens, hidden), kept(draw)))
    yield case("pad", "", lambda draw: (draw.normal(tokens, hidden), kept(draw), 2 * tokens))
