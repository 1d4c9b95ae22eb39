"""Examples as the models take them: tokenised, padded into batches, and run without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..encode import batches, check_fast, evaluating
from ..ops.masked_lm_loss import IGNORED

Item = dict[str, Any]  # input_ids (and token_type_ids) int32 [L], and what the loss needs
Collate = Callable[[Sequence[Item]], dict[str, Tensor]]

TEXTS_AT_ONCE = 1000  # bounds the memory of the tokeniser's own encodings
EVALUATION_TOKENS = 8192


def lengths_of(items: Sequence[Item]) -> np.ndarray:
    return np.array([len(item["input_ids"]) for item in items], np.int64)


def tokenize(
    tokenizer: Any,
    texts: Sequence[Any],
    texts_b: Sequence[str] | None,
    max_length: int,
    **more: Any,
) -> Iterator[tuple[Any, int]]:
    """(encodings, index in them) of every text, cut to `max_length` tokens, special ones included.

    Raises: ValueError for a tokeniser that is not fast.
    """
    check_fast(tokenizer)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = slice(start, start + TEXTS_AT_ONCE)
        encoded = tokenizer(
            list(texts[part]),
            list(texts_b[part]) if texts_b is not None else None,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            **more,
        )
        for i in range(len(encoded["input_ids"])):
            yield encoded, i


def item_of(encoded: Any, i: int) -> Item:
    """The model's inputs of one encoding."""
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    return {name: np.asarray(encoded[name][i], np.int32) for name in names}


def was_cut(encoded: Any, i: int) -> bool:
    return bool(encoded.encodings[i].overflowing)


def collator(tokenizer: Any) -> Collate:
    """Pads on the right to a batch's longest; labels per token with -100."""
    fill = {"input_ids": tokenizer.pad_token_id or 0, "labels": IGNORED}

    def collate(items: Sequence[Item]) -> dict[str, Tensor]:
        lengths = lengths_of(items)
        longest = int(lengths.max())
        batch = {"attention_mask": torch.from_numpy(np.arange(longest) < lengths[:, None]).long()}
        for name, value in items[0].items():
            if np.ndim(value) == 0:
                batch[name] = torch.tensor([item[name] for item in items])
                continue
            padded = np.full((len(items), longest), fill.get(name, 0), np.int64)
            for row, item in zip(padded, items, strict=True):
                row[: len(item[name])] = item[name]
            batch[name] = torch.from_numpy(padded)
        return batch

    return collate


def outputs_of(
    model: nn.Module, items: Sequence[Item], collate: Collate, *names: str
) -> list[tuple[np.ndarray, ...]]:
    """For each item the model's outputs of these names, float32 and without the batch's dimension.

    Batches are of similar lengths. What an output says behind an item's tokens is padding.
    """
    found: list[tuple[np.ndarray, ...]] = [()] * len(items)
    device = next(model.parameters()).device
    with evaluating(model):
        for rows in batches(lengths_of(items), EVALUATION_TOKENS):
            batch = collate([items[row] for row in rows])
            outputs = model(**{name: value.to(device) for name, value in batch.items()})
            columns = [outputs[name].float().cpu().numpy() for name in names]
            for i, row in enumerate(rows):
                found[row] = tuple(column[i] for column in columns)
    return found
