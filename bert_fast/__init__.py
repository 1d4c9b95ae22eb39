"""bert_fast: a Hugging Face BERT with the same answers, faster.

`accelerate(model)` swaps a model's encoder in place; `restore` undoes it; `report` and `explain`
tell what runs and why. Importing this package imports neither transformers nor triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .attention_interface import register_attention
    from .convert import accelerate, report, restore
    from .explanation import explain
    from .heads import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertLMHeadModel,
        BertModel,
    )
    from .masked_lm import splade
    from .verification import verify

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
    "accelerate",
    "explain",
    "register_attention",
    "report",
    "restore",
    "splade",
    "verify",
]

_HOMES = {name: "heads" for name in __all__ if name.startswith("Bert")}
_HOMES |= {"accelerate": "convert", "report": "convert", "restore": "convert"}
_HOMES |= {"explain": "explanation", "verify": "verification"}
_HOMES |= {"register_attention": "attention_interface", "splade": "masked_lm"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
