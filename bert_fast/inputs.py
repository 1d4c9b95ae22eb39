"""What a user may hand to an encoder, read, checked, and packed.

Masks and ids are taken as Hugging Face takes them; what it would misread in silence (an additive
2D mask, an int 4D mask, a mask of another batch) is named.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.modes import tracing, valueless
from .padding import Packing, pack_full, pack_mask, progression
from .structure import Embeddings, Structure


@dataclass(frozen=True)
class Batch:
    """A call's inputs, checked: ids [B, S] or inputs_embeds [B, S, E], and how they are packed.

    bias: a 4D mask as an additive bias of the scores, or None.
    position_ids: None where somebody else's embeddings count them by themselves.
    extra: embedding inputs of the family beyond these.
    """

    packing: Packing
    bias: Tensor | None
    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Rows that the encoder computes."""
        packing = self.packing
        count = packing.batch * packing.length
        return count if packing.indices is None else packing.indices.shape[0]

    def embedding_inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of Hugging Face's own embedding layer."""
        named = {
            "input_ids": self.input_ids,
            "inputs_embeds": self.inputs_embeds,
            "token_type_ids": self.token_type_ids,
            "position_ids": self.position_ids,
            **self.extra,
        }
        # Of positions None is told, as transformers does.
        return {n: value for n, value in named.items() if value is not None or n == "position_ids"}


def read_batch(
    structure: Structure, inputs: Mapping[str, Any], keep_padding: bool = False
) -> Batch:
    """Checks and packs a call's inputs [B, S], by the names of Hugging Face's arguments;
    `cu_seq_lens_q` marks inputs that are packed already.

    keep_padding: padded tokens stay as queries (never as keys), for a head that reads them.

    Raises: ValueError or TypeError that names the argument, its value and what is allowed.
    """
    family, embeddings = structure.family, structure.embeddings
    input_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    given = embeds if input_ids is None else input_ids
    if given is None or (input_ids is not None and embeds is not None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    table = embeddings.words
    if input_ids is not None:
        _check_ids("input_ids", input_ids)
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {_shape(input_ids)}, expected (batch, length)")
    elif given.dim() != 3 or given.shape[2] != table.shape[1] or not _fits(given, table):
        raise ValueError(
            f"inputs_embeds is {given.dtype} of shape {_shape(given)}, expected {table.dtype} of "
            f"(batch, length, {table.shape[1]})"
        )
    batch, length = given.shape[:2]
    bounds, longest = inputs.get("cu_seq_lens_q"), inputs.get("max_length_q")
    if bounds is not None:
        if not isinstance(bounds, Tensor):
            raise TypeError(f"cu_seq_lens_q is {bounds!r}, expected a tensor [batch + 1] of int32")
        _check_bounds(bounds, length, longest)
        bounds = bounds.to(given.device, torch.int32)
    position_ids = inputs.get("position_ids")
    if position_ids is None and embeddings.known:
        position_ids = _positions(embeddings, input_ids, given, bounds, longest)
    elif position_ids is None and bounds is not None:
        raise ValueError(
            "position_ids has to be given with cu_seq_lens_q: "
            f"{type(embeddings.module).__qualname__} is not transformers' and may count otherwise"
        )
    token_type_ids = inputs.get("token_type_ids")
    if token_type_ids is not None and token_type_ids.dim() == 1:  # for all texts, as in torch
        token_type_ids = token_type_ids.unsqueeze(0)
    if position_ids is not None and position_ids.dim() == 1:
        position_ids = position_ids.unsqueeze(0)
    for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if ids is not None:
            _check_ids(name, ids)
            if ids.dim() != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != length:
                raise ValueError(
                    f"{name} has shape {_shape(ids)}, expected (1 or {batch}, {length})"
                )
    extra = {}
    for name, trailing in family.extra.items():
        value = inputs.get(name)
        if value is None and trailing is not None:
            value = torch.zeros(batch, length, *trailing, dtype=torch.int64, device=given.device)
        if value is not None:
            extra[name] = value
    packing, bias = _pack(
        inputs.get("attention_mask"), bounds, longest, batch, length, given.device, table.dtype,
        whole=keep_padding, in_place=family.bias is not None,
    )  # fmt: skip
    return Batch(packing, bias, input_ids, embeds, token_type_ids, position_ids, extra)


def texts_of(texts: Any) -> list[str]:
    """The texts, as a list.

    Raises: TypeError for one text, whose characters would be taken for texts, and for what is none.
    """
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise TypeError(f"texts is {texts!r}, expected several texts")
    found = list(texts)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}] is {text!r}, expected a str")
    return found


def first_position(embeddings: Any) -> int:
    """Of a text's first token: RoBERTa's kin leave room for padding before it."""
    padding_idx = vars(embeddings).get("padding_idx")
    return 0 if padding_idx is None else padding_idx + 1


def most_tokens(embeddings: Any) -> int:
    """Of a text, by the position table of a model's `embeddings`, if it has one."""
    table = getattr(getattr(embeddings, "position_embeddings", None), "weight", None)
    return sys.maxsize if table is None else int(table.shape[0]) - first_position(embeddings)


def _positions(
    embeddings: Embeddings,
    input_ids: Tensor | None,
    given: Tensor,
    bounds: Tensor | None,
    longest: int | None,
) -> Tensor:
    """Columns; or, in RoBERTa's kin, the count of ids that are not padding, from padding_idx + 1.

    Of packed inputs, counted within each sequence.
    """
    length, limit = given.shape[1], most_tokens(embeddings.module)
    first = first_position(embeddings.module)
    by_id = first and input_ids is not None
    if by_id:
        real = input_ids.ne(first - 1).long()  # type: ignore[union-attr]
        columns = real.cumsum(1)
        if bounds is None and length > limit and not valueless(columns):
            _check_length(int(columns[:, -1].max()), limit)
    if not by_id or bounds is not None:
        _check_length(length if bounds is None else longest or 0, limit)
    if not by_id:
        columns = progression((1, length), first, 1, torch.int64, given.device)
    if bounds is not None:
        starts, lengths = bounds[:-1].long(), (bounds[1:] - bounds[:-1]).long()
        before = F.pad(columns[0], (1, 0))[starts] if by_id else starts
        columns = columns - torch.repeat_interleave(before, lengths, output_size=length)
    return columns * real + first - 1 if by_id else columns


def _check_bounds(bounds: Tensor, length: int, longest: int | None) -> None:
    """Of those on the host: a GPU would be waited for."""
    if bounds.device.type != "cpu" or tracing():
        return
    found = bounds.tolist() if bounds.dim() == 1 else []
    if not found or found[0] != 0 or found[-1] != length or found != sorted(found):
        raise ValueError(
            f"cu_seq_lens_q is {bounds.tolist()}, expected ascending numbers from 0 to {length}"
        )
    actual = max((end - start for start, end in pairwise(found)), default=0)
    if longest is not None and longest < actual:
        raise ValueError(
            f"max_length_q is {longest}, but cu_seq_lens_q has a sequence of {actual} tokens"
        )


def _check_length(length: int, limit: int) -> None:
    if length > limit:
        raise ValueError(
            f"input length {length} exceeds max_position_embeddings = {limit}; truncate the "
            "input or pass position_ids"
        )


def _pack(
    mask: Tensor | None,
    bounds: Tensor | None,
    longest: int | None,
    batch: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    whole: bool,
    in_place: bool,
) -> tuple[Packing, Tensor | None]:
    """The packing, and a 4D mask as a bias.

    whole: no row may be dropped; a 2D mask becomes a bias too.
    in_place: a learned bias counts columns, so that no column between two kept ones may go.
    """
    if bounds is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q goes with a batch of 1, got a batch of {batch}")
        return Packing(1, length, None, bounds, None, int(longest or length)), None
    if mask is None:
        return pack_full(batch, length, device), None
    if mask.dim() != 2:
        bias = _additive(mask, batch, length, dtype, device)
        return pack_full(batch, length, device), bias
    if tuple(mask.shape) != (batch, length):
        raise ValueError(f"attention_mask has shape {_shape(mask)}, expected ({batch}, {length})")
    if _looks_additive(mask):
        warnings.warn(
            "attention_mask is a float mask without positive entries. A 2D mask keeps every "
            "non-zero entry, so an additive mask (0 keeps, -inf drops) is read inverted, as "
            "transformers reads it; pass 1 for tokens to keep and 0 for padding",
            stacklevel=4,
        )
    mask = mask.to(device)
    if whole or (in_place and _has_holes(mask)):
        packing, keep = pack_full(batch, length, device), mask.bool()
        if not whole:  # zeros at padding here too; column 0 is read
            first = torch.arange(length, device=device) == 0
            packing = replace(packing, real=keep | first)
        return packing, _additive(keep[:, None, None, :], batch, length, dtype, device)
    return pack_mask(mask), None


def _has_holes(mask: Tensor) -> bool:
    """Whether tokens are dropped between kept ones, or before them (column 0 stays a query)."""
    if valueless(mask):
        return True
    keep = mask.bool()
    return bool((keep[:, 1:] & ~keep[:, :-1]).any())


def _looks_additive(mask: Tensor) -> bool:
    # Asking about values would stall a GPU's queue, so only a mask on the host is looked at.
    if valueless(mask) or not mask.is_floating_point():
        return False
    return mask.device.type == "cpu" and mask.numel() > 0 and not bool((mask > 0).any())


def _additive(
    mask: Tensor, batch: int, length: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A 4D mask as an additive bias [B or 1, N or 1, S, S]."""
    if mask.dim() != 4:
        raise ValueError(
            f"attention_mask has shape {_shape(mask)}, expected ({batch}, {length}) or "
            f"({batch}, 1 or heads, {length}, {length})"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"attention_mask is a 4D mask of {mask.dtype}; use bool (True keeps) or a float mask "
            "that is added to the scores"
        )
    rows = mask.shape[2]
    if mask.shape[0] not in (1, batch) or rows not in (1, length) or mask.shape[3] != length:
        raise ValueError(
            f"attention_mask has shape {_shape(mask)}, expected ({batch}, 1 or heads, {length}, "
            f"{length})"
        )
    mask = mask.to(device).expand(-1, -1, length, -1)  # once, or every layer would copy it
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=dtype, device=device)
        return zero.where(mask, -torch.inf)
    return mask.to(dtype).contiguous()


def _fits(embeds: Tensor, table: Tensor) -> bool:
    if torch.is_autocast_enabled(table.device.type):
        return embeds.is_floating_point()
    # As in transformers, whose sum with the other embeddings widens them.
    return torch.promote_types(embeds.dtype, table.dtype) == table.dtype


def _check_ids(name: str, ids: Any) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} is a {type(ids).__name__}, expected a tensor of int32 or int64")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {ids.dtype}, expected int32 or int64")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
