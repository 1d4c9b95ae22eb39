"""Small random BERTs and batches for the model tests."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import bert_fast

from .parity import DEVICE


def tiny(cls: type = BertModel, seed: int = 0, **changes: Any) -> Any:
    """A seeded model whose sizes are awkward on purpose; dropout is off unless asked for."""
    config = {
        "vocab_size": 99,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **changes,
    }
    torch.manual_seed(seed)
    model = cls(BertConfig(**config))
    for parameter in model.parameters():  # HF's 0.02 init hides errors in nearly linear layers
        torch.nn.init.normal_(parameter, std=0.15)
    return model.to(DEVICE).eval()


def small(module: str, name: str, **changes: Any) -> Any:
    """As `tiny`, of any family: the class `name` of transformers' `module`."""
    cls = getattr(importlib.import_module(module), name)
    torch.manual_seed(0)
    config = cls.config_class(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=37, max_position_embeddings=24, pad_token_id=1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes,
    )  # fmt: skip
    model = cls(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    for part, parameter in model.named_parameters():
        if "relative_attention_bias" in part:  # to train it is left to transformers' own forward
            parameter.requires_grad_(False)
    return model.to(DEVICE).eval()


def ids(batch: int, length: int, high: int = 99) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(high, (batch, length), generator=generator).to(DEVICE)


def masks(batch: int, length: int) -> dict[str, Tensor | None]:
    """Every kind of mask a user may hand over, by name."""
    right = torch.ones(batch, length, dtype=torch.int64)
    for b in range(batch):
        right[b, 3 + 2 * b :] = 0
    holes = torch.rand(batch, length, generator=torch.Generator().manual_seed(5)) < 0.6
    holes[:, 0] = True
    first_hidden = right.clone()
    first_hidden[1, 0] = 0
    nothing = right.clone()
    nothing[0] = 0
    pair = torch.rand(batch, 1, length, length, generator=torch.Generator().manual_seed(6)) < 0.7
    additive = torch.zeros(pair.shape).masked_fill(~pair, -torch.inf)
    found = {
        "none": None,
        "full": torch.ones(batch, length),
        "right": right,
        "left": right.flip(1),
        "holes": holes,
        "float": right.float() * 0.5,
        "first_hidden": first_hidden,
        "nothing_left": nothing,
        "4d_bool": pair,
        "4d_broadcast": right.bool()[:, None, None, :],
        "4d_additive": additive,
    }
    return {name: None if mask is None else mask.to(DEVICE) for name, mask in found.items()}


def read_rows(mask: Tensor | None, batch: int, length: int) -> Tensor:
    """Rows of the output that mean something: kept tokens, and column 0, which heads read."""
    if mask is None or mask.dim() == 4:
        return torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
    rows = mask.bool().clone()
    rows[:, 0] = True
    return rows


def accelerated(model: nn.Module) -> bool:
    """Whether every encoder and head inside runs packed."""
    told = bert_fast.report(model)
    return bool(told.swapped) and not told.skipped
