"""What the training bench trains: BERTs by size, who runs them, and batches of random tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForPreTraining

import bert_fast

from . import workloads

SIZES = {
    "tiny": workloads.Model("tiny", 2, 128, 2, 512),
    "small": workloads.Model("small", 4, 256, 4, 1024),
    "base": workloads.MODELS["bert-base"],
    "large": workloads.MODELS["bert-large"],
}
COMPILED = "compiled"
SIDES: dict[str, Callable[[Any], Any]] = {
    "eager": lambda model: model,
    "sdpa": lambda model: model,
    COMPILED: lambda model: torch.compile(model, dynamic=True),
    "bert_fast": lambda model: bert_fast.accelerate(model, sparse_logits=True),
    "selective": lambda m: bert_fast.accelerate(m, sparse_logits=True, checkpoint="selective"),
    "full": lambda m: bert_fast.accelerate(m, sparse_logits=True, checkpoint="full"),
}
LENGTHS = {"fixed": (128,), "ragged": (64, 128), "wiki512": workloads.WIKI512}
SCORED, IGNORED = 0.15, -100


def batch_of(size: str, lengths: str) -> int:
    """Texts a step where none are asked for: 16,384 tokens of a base model on `wiki512`."""
    return 64 if (size, lengths) == ("base", "wiki512") else 32


def mlm_batches(lengths: str, batch: int, count: int, vocabulary: int) -> list[dict[str, Tensor]]:
    """Random tokens, `SCORED` of them with a label; the lengths are spread over all batches."""
    like = replace(workloads.WORKLOADS["wiki512"], quantiles=LENGTHS[lengths], batch=batch)
    generator, made = torch.Generator().manual_seed(0), []
    for i, texts in enumerate(workloads.lengths(like, count, "arrival")):
        inputs = workloads.padded(vocabulary, texts, i)
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        scored = (torch.rand(ids.shape, generator=generator) < SCORED) & mask
        following = torch.randint(0, 2, (len(texts),), generator=generator)
        labels = ids.masked_fill(~scored, IGNORED)
        made.append({**inputs, "labels": labels, "next_sentence_label": following})
    return made


def step_flop(shape: workloads.Model, batch: dict[str, Tensor]) -> float:
    """Of forward and backward: thrice the encoder on real tokens, and the head on scored ones."""
    texts: Iterable[int] = batch["attention_mask"].sum(1).tolist()
    scored = int((batch["labels"] != IGNORED).sum())
    head = 2 * scored * (shape.hidden**2 + shape.hidden * shape.vocab)
    return 3 * (workloads.flop(shape, list(texts)) + head)


def untrained(size: str, side: str, device: torch.device) -> Any:
    """A random BertForPreTraining in fp32, the same for every side, in training mode."""
    shape = SIZES[size]
    config = BertConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate,
        attn_implementation="eager" if side == "eager" else "sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with device:  # where a large model's numbers are drawn in no time
        return BertForPreTraining(config).train()
