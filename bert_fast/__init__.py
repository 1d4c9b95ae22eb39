"""bert_fast: a Hugging Face BERT with the same answers, faster.

`accelerate(model)` swaps a model's encoder in place; `restore` undoes it; `report` and `explain`
tell what runs and why. Importing this package imports neither transformers nor triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .convert import BertModel, accelerate, report, restore
    from .explanation import explain

_HOMES = {
    "BertModel": "convert",
    "accelerate": "convert",
    "report": "convert",
    "restore": "convert",
    "explain": "explanation",
}

__all__ = ["BertModel", "accelerate", "explain", "report", "restore"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
