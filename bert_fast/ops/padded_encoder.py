"""padded_encoder: from a padded batch of ids to its states and the pooler's output, in one call.

    x = embed_layernorm(ids) of the tokens that are kept,  h = encoder(x)
    states = pad(h),  pooled = tanh(states[:, 0] W^T + b)

C++ for a CPU, in inference: a short input takes less time in these steps than between them. It is
not in the registry, whose ops give one tensor; who calls it has checked that it may (`one_call`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import openmp, out_of_range
from .embed_layernorm import OP as EMBED
from .encoder import OP as ENCODER
from .encoder import WeightTable


class Settings(NamedTuple):
    """padding_idx: positions count the ids of a row that are not this one, from the number after
    it, which itself is the position of the others (RoBERTa's); -1: they are columns.
    """

    norm_eps: float
    padding_idx: int
    heads: int
    eps: float
    activation: str
    int8: bool


class Parts(NamedTuple):
    """The tensors around the layers: tables [rows, H], the weight and bias of the embeddings'
    LayerNorm [H], the pooler's [H, H] and [H]; None for those that a model does not have."""

    word: Tensor
    position: Tensor
    token_type: Tensor | None
    norm: Tensor
    norm_bias: Tensor
    pooler: Tensor | None
    pooler_bias: Tensor | None


def reference(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    mask: Tensor | None,
    parts: Parts,
    weights: Sequence[Tensor],
    settings: Settings,
    first_only: bool = False,
) -> tuple[Tensor, Tensor | None]:
    batch, length = input_ids.shape
    keep = input_ids.new_ones(batch, length).bool() if mask is None else mask.bool()
    real = keep.clone()
    real[:, 0] = True  # what reads first tokens reads it; it is no key where it is masked
    bounds = F.pad(real.sum(1).cumsum(0), (1, 0)).int()
    key_start = bounds[:-1] + (~keep[:, 0]).int()
    columns = torch.arange(length).expand(batch, length)
    if settings.padding_idx >= 0:
        counted = input_ids.ne(settings.padding_idx).long()
        columns = counted.cumsum(1) * counted + settings.padding_idx
    types = None if token_type_ids is None else token_type_ids.expand(batch, length)[real]
    x = EMBED.reference(
        input_ids[real], types, columns[real], *parts[:5], settings.norm_eps, -1, 0.0, None
    )
    h = ENCODER.reference(
        x, bounds, key_start, None, None, weights, settings.heads, length, settings.eps,
        settings.activation, settings.int8,
    )  # fmt: skip
    states = h.new_zeros(batch, length, h.shape[1])
    states[real] = h
    states = states[:, :1] if first_only else states
    if parts.pooler is None:
        return states, None
    return states, torch.tanh(F.linear(states[:, 0], parts.pooler, parts.pooler_bias))


def padded_encoder(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    mask: Tensor | None,
    parts: Parts,
    table: WeightTable,
    settings: Settings,
    isa: int,
    first_only: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """States [B, S, H], zero at padding, and the pooler's output [B, H], None without a pooler.

    Args:
        input_ids: [B, S] int32 or int64, not empty, on the CPU.
        token_type_ids: [B or 1, S] likewise, or None (type 0).
        mask: [B, S] int32, int64 or bool, 0 at padding; None: there is none.
        parts, settings: as above; all tensors fp32, bf16 or fp16.
        table: of the layers' weights, made for this instruction set, dtype, heads and int8.
        isa: one of `backends.ISAS`' numbers.
        first_only: states of first tokens [B, 1, H]; after its attention, the last layer computes
            no others.

    Raises: IndexError for an id, type or position that its table does not have; RuntimeError for
        other dtypes, shapes and devices.
    """
    kind = parts.token_type
    with out_of_range():
        states, pooled = torch.ops.bert_fast_cpu.padded_encoder(
            input_ids, None if kind is None else token_type_ids, mask, settings.padding_idx,
            parts.word, parts.position, kind, parts.norm, parts.norm_bias, settings.norm_eps,
            table.table, settings.eps, settings.activation, parts.pooler, parts.pooler_bias,
            first_only, openmp(), isa,
        )  # fmt: skip
    return states, None if parts.pooler is None else pooled
