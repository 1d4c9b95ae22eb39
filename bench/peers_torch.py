"""The benchmark's contenders inside PyTorch: bert_fast, transformers and torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from inspect import signature

import torch
from torch import Tensor, nn

import bert_fast
from bert_fast.verification import IN_8_BITS

Batch = Mapping[str, Tensor]
Forward = Callable[[Batch], Tensor]


class LastHidden(nn.Module):
    """An encoder alone: one tensor out, and no pooler."""

    def __init__(self, model: nn.Module, attention: str, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = copy.deepcopy(model).to(dtype)
        self.model.set_attn_implementation(attention)
        self.model.pooler = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def build_bert_fast(
    model: nn.Module, batches: Sequence[Batch], dtype: torch.dtype, narrow: str | None = None
) -> Forward:
    """narrow: the precision of products, as `accelerate` takes it."""
    encoder = LastHidden(model, "sdpa", dtype)
    bert_fast.accelerate(encoder, dtype=narrow, graphs=True)
    if not isinstance(encoder.model, bert_fast.BertModel):
        raise RuntimeError(f"accelerate left the model as it was: {bert_fast.report(encoder)}")
    if narrow:
        with torch.inference_mode():
            told = bert_fast.explain(encoder, min(batches, key=lambda b: b["input_ids"].numel()))
        if not any(map(IN_8_BITS[narrow], told.choices)):
            raise RuntimeError(f"8-bit products do not run here: {told}")
    return _inference(encoder)


def build_transformers(model: nn.Module, attention: str, dtype: torch.dtype) -> Forward:
    return _inference(LastHidden(model, attention, dtype))


def build_compiled(model: nn.Module, batches: Sequence[Batch], dtype: torch.dtype) -> Forward:
    """torch.compile with inductor, dynamic shapes and freezing; on a GPU with max-autotune.

    That mode replays a CUDA graph for each shape, as bert_fast does.
    Freezing packs the weights for oneDNN; without it inductor is slower than eager here.
    `fullgraph` makes a graph break, or the limit of recompilations, an error instead of a silent
    fallback.
    """
    import torch._inductor.config as inductor

    encoder = LastHidden(model, "sdpa", dtype)
    apart = {"isolate_recompiles": True}  # newer than the oldest torch that is supported
    if "isolate_recompiles" not in signature(torch.compile).parameters:
        apart = {}
    mode = "max-autotune" if on_gpu(batches[0]) else None
    compiled = torch.compile(encoder, dynamic=True, fullgraph=True, mode=mode, **apart)
    seen: set[torch.Size] = set()

    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        shape = batch["input_ids"].shape
        if shape in seen:
            return compiled(**batch)
        # A new shape may compile again (a batch of one text does), and freezing is global.
        with inductor.patch(freezing=True):
            hidden = compiled(**batch)
        seen.add(shape)
        return hidden

    forward(min(batches, key=lambda batch: batch["input_ids"].numel()))
    return forward


def on_gpu(batch: Batch) -> bool:
    return batch["input_ids"].is_cuda


def _inference(encoder: nn.Module) -> Forward:
    @torch.inference_mode()
    def forward(batch: Batch) -> Tensor:
        return encoder(**batch)

    return forward
