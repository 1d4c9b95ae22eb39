"""What a user may hand to a BERT, read, checked, and packed.

Masks and ids are taken as Hugging Face takes them; what it would misread in silence (an additive
2D mask, an int 4D mask, a mask of another batch) is named.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .modeling import Sequences
from .padding import Packing, pack_full, pack_mask


@dataclass(frozen=True)
class Batch:
    """A call's inputs on packed tokens: ids [T] or inputs_embeds [T, H], positions, sequences."""

    packing: Packing
    sequences: Sequences
    input_ids: Tensor
    inputs_embeds: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor


def read_batch(
    embeddings: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    keep_padding: bool = False,
) -> Batch:
    """Checks and packs a call's inputs [B, S]; `cu_seqlens` marks inputs that are packed already.

    keep_padding: padded tokens stay as queries (never as keys), for a head that reads them.

    Raises: ValueError or TypeError that names the argument, its value and what is allowed.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    given = inputs_embeds if input_ids is None else input_ids
    assert given is not None
    table = embeddings.word_embeddings.weight
    if input_ids is not None:
        _check_ids("input_ids", input_ids)
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {_shape(input_ids)}, expected (batch, length)")
    elif given.dim() != 3 or given.shape[2] != table.shape[1] or given.dtype != table.dtype:
        raise ValueError(
            f"inputs_embeds is {given.dtype} of shape {_shape(given)}, expected {table.dtype} of "
            f"(batch, length, {table.shape[1]})"
        )
    batch, length = given.shape[:2]
    limit = embeddings.position_embeddings.weight.shape[0]
    if position_ids is None:
        if length > limit:
            raise ValueError(
                f"input length {length} exceeds max_position_embeddings = {limit}; truncate the "
                "input or pass position_ids"
            )
        position_ids = torch.arange(length, device=given.device).unsqueeze(0)
    for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if ids is not None:
            _check_ids(name, ids)
            if ids.dim() != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != length:
                raise ValueError(
                    f"{name} has shape {_shape(ids)}, expected (1 or {batch}, {length})"
                )
    bias = None
    if cu_seqlens is not None:
        packing = _already_packed(cu_seqlens, max_seqlen, batch, length, given.device)
    elif attention_mask is None:
        packing = pack_full(batch, length, given.device)
    elif attention_mask.dim() == 2:
        packing = _pack_2d(attention_mask, batch, length, given.device)
        if keep_padding and packing.indices is not None:
            packing = pack_full(batch, length, given.device)
            keys = attention_mask.bool()[:, None, None, :]
            bias = _additive(keys, batch, length, table.dtype, given.device)
    else:
        packing = pack_full(batch, length, given.device)
        bias = _additive(attention_mask, batch, length, table.dtype, given.device)
    packed_embeds = None
    if inputs_embeds is not None:
        packed_embeds = packing.unpad(inputs_embeds)
        input_ids = position_ids.new_empty(batch, length)
    return Batch(
        packing,
        Sequences(packing.cu_seqlens, packing.max_seqlen, packing.key_start, bias),
        packing.unpad_ids(input_ids),
        packed_embeds,
        None if token_type_ids is None else packing.unpad_ids(token_type_ids),
        packing.unpad_ids(position_ids),
    )


def _pack_2d(mask: Tensor, batch: int, length: int, device: torch.device) -> Packing:
    if tuple(mask.shape) != (batch, length):
        raise ValueError(f"attention_mask has shape {_shape(mask)}, expected ({batch}, {length})")
    if _looks_additive(mask):
        warnings.warn(
            "attention_mask is a float mask without positive entries. A 2D mask keeps every "
            "non-zero entry, so an additive mask (0 keeps, -inf drops) is read inverted, as "
            "transformers reads it; pass 1 for tokens to keep and 0 for padding",
            stacklevel=4,
        )
    return pack_mask(mask.to(device))


def _looks_additive(mask: Tensor) -> bool:
    # Asking about values would stall a GPU's queue, so only a mask on the host is looked at.
    if not mask.is_floating_point() or mask.device.type != "cpu" or not mask.numel():
        return False
    return not bool((mask > 0).any())


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
    mask = mask.to(device).expand(-1, -1, length, -1)
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=dtype, device=device)
        return zero.where(mask, -torch.inf)
    return mask.to(dtype)


def _already_packed(
    cu_seqlens: Tensor, max_seqlen: int | None, batch: int, length: int, device: torch.device
) -> Packing:
    """Inputs [1, T] whose sequences start at `cu_seqlens` (sentence-transformers sends these)."""
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q goes with a batch of 1, got a batch of {batch}")
    bounds = cu_seqlens.to(device, torch.int32)
    longest = length if max_seqlen is None else int(max_seqlen)
    return Packing(batch, length, None, bounds, None, longest)


def _check_ids(name: str, ids: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {ids.dtype}, expected int32 or int64")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
