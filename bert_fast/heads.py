"""Hugging Face's BERT heads on the packed encoder: same names, keys, signatures, losses."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.bert import modeling_bert as hf

from .convert import accelerate
from .masked_lm import packed_head
from .packed import packed_class
from .reading import reading_head

BertModel = packed_class(hf.BertModel)


class _Head(nn.Module):
    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if not config.is_decoder:
            accelerate(self)


class BertForPreTraining(_Head, packed_head(hf.BertForPreTraining)):  # type: ignore[misc]
    """transformers' BertForPreTraining (masked LM and next sentence) on the packed encoder."""


class BertForMaskedLM(_Head, packed_head(hf.BertForMaskedLM)):  # type: ignore[misc]
    """transformers' BertForMaskedLM on the packed encoder."""


class BertForNextSentencePrediction(_Head, reading_head(hf.BertForNextSentencePrediction)):  # type: ignore[misc]
    """transformers' BertForNextSentencePrediction on the packed encoder."""


class BertForSequenceClassification(_Head, reading_head(hf.BertForSequenceClassification)):  # type: ignore[misc]
    """transformers' BertForSequenceClassification on the packed encoder."""


class BertForMultipleChoice(_Head, reading_head(hf.BertForMultipleChoice)):  # type: ignore[misc]
    """transformers' BertForMultipleChoice on the packed encoder."""


class BertForTokenClassification(_Head, hf.BertForTokenClassification):
    """transformers' BertForTokenClassification on the packed encoder."""


class BertForQuestionAnswering(_Head, reading_head(hf.BertForQuestionAnswering)):  # type: ignore[misc]
    """transformers' BertForQuestionAnswering on the packed encoder."""


class BertLMHeadModel(_Head, hf.BertLMHeadModel):
    """transformers' BertLMHeadModel; as a decoder it runs Hugging Face's own encoder."""
