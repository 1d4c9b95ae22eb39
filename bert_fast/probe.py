"""Whether the transformers installed computes what the rows of `families` say.

The truth is asked, not the source: a small model of the same class, with random weights, must
give the same through its own forward and through the packed one.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .families import Family
from .inputs import read_batch
from .masked_lm import packed_head
from .modeling import packed_forward
from .ops.locks import OneAtATime
from .packed import packed_class
from .reading import reading_head
from .structure import structure_of
from .swap import encoder_of, original_of, put_back


def strange(model: nn.Module, family: Family) -> str | None:
    """What tells that an encoder's class is not as its row says; None if all is as known."""
    return _probe(model, functools.partial(_difference, family=family))


def strange_head(model: nn.Module) -> str | None:
    """The same of a masked-LM head: its loss and logits."""
    return _probe(model, _head_difference)


def strange_reading_head(model: nn.Module) -> str | None:
    """The same of a head that reads a part of the states: its logits."""
    return _probe(model, _reading_difference)


_told: dict[tuple[type, frozenset[Any]], str | None] = {}
_asking = OneAtATime()
_this_thread = threading.local()


def _probe(model: nn.Module, difference: Callable[..., float]) -> str | None:
    """In a thread of its own: OpenMP keeps the threads of one that has used it, and where a server
    forks its workers after `accelerate`, the child's would wait for threads that it does not have.
    """
    original = original_of(model)
    forwards = frozenset(type(m).forward for m in model.modules())
    if hasattr(_this_thread, "asking"):
        # A constructor that accelerates what it makes comes back here from within the probe.
        return _asked(original, forwards, difference)
    with _asking:
        if (original, forwards) not in _told:
            with ThreadPoolExecutor(1, initializer=_begin) as apart:
                return apart.submit(_asked, original, forwards, difference).result()
        return _told[original, forwards]


def _begin() -> None:
    _this_thread.asking = set()


def _asked(original: Any, forwards: frozenset[Any], difference: Callable[..., float]) -> str | None:
    """What is told, which is kept but where something was raised: that may pass (no memory, another
    thread that makes every new model a meta one)."""
    key, asking = (original, forwards), _this_thread.asking
    if key in _told or key in asking:
        return _told.get(key)
    asking.add(key)
    try:
        found = difference(original)
    except Exception as error:  # whatever an unknown class raises, the user's model must not
        return _unknown(original, f"{type(error).__name__}: {error}")
    finally:
        asking.discard(key)
    _told[key] = None if found < 1e-4 else _unknown(original, f"outputs differ by {found:.1e}")
    return _told[key]


def _unknown(original: Any, told: str) -> str:
    return (
        f"bert_fast does not know {original.__name__} as it is in transformers "
        f"{transformers.__version__} ({told}); the model is left as it was"
    )


def _small(original: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of the class with random weights, and a padded batch for it."""
    generator = torch.Generator().manual_seed(0)
    config = original.config_class(
        vocab_size=128, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=24, pad_token_id=1,
    )  # fmt: skip
    model = original(config).float().eval()
    for module in model.modules():  # a constructor may have accelerated what it made
        put_back(module)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    ids = torch.randint(2, 128, (2, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return model, {"input_ids": ids, "attention_mask": mask}


def _apart() -> Any:
    """Probes neither move the user's random numbers nor land on the user's device."""
    return torch.random.fork_rng(devices=[])


def _difference(original: Any, family: Family) -> float:
    """The largest difference, over the real tokens, between a small model's two forwards."""
    with torch.device("cpu"), _apart(), torch.no_grad():
        model, inputs = _small(original)
        expected = model(**inputs).last_hidden_state
        structure = structure_of(model, family)
        batch = read_batch(structure, inputs)
        found = batch.packing.pad(packed_forward(model, structure, batch, "reference"))
    rows = inputs["attention_mask"].bool()
    return (found[rows] - expected[rows]).abs().max().item()


def _head_difference(original: Any) -> float:
    """The largest difference between the losses and between the logits of real tokens."""
    with torch.device("cpu"), _apart(), torch.no_grad():
        model, inputs = _small(original)
        ours = _packed_copy(model, packed_head(original))
        row = ours.bert_fast_head
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        if row.pair is not None:
            inputs[row.pair.labels] = torch.tensor([1, 0])
        expected, found = model(**inputs), ours(**inputs)
    rows = inputs["attention_mask"].bool()
    logits = (found[row.logits] - expected[row.logits])[rows].abs().max()
    return max(logits.item(), (found["loss"] - expected["loss"]).abs().item())


def _reading_difference(original: Any) -> float:
    """The largest difference between the logits."""
    with torch.device("cpu"), _apart(), torch.no_grad():
        model, inputs = _small(original)
        if original.__name__.endswith("MultipleChoice"):  # the texts are choices of one question
            inputs = {name: value.unsqueeze(0) for name, value in inputs.items()}
        ours = _packed_copy(model, reading_head(original))
        expected, found = model(**inputs), ours(**inputs)
        if ours.bert_fast_reads.what == "first tokens":
            return (found.logits - expected.logits).abs().max().item()
    rows = inputs["attention_mask"].bool()
    return max(
        (found[name] - expected[name])[rows].abs().max().item()
        for name in ("start_logits", "end_logits")
    )


def _packed_copy(model: Any, cls: type) -> Any:
    """A copy as a packed head of class `cls` on a packed encoder."""
    ours = copy.deepcopy(model)
    encoder = encoder_of(ours)
    encoder.__class__ = packed_class(encoder.__class__)
    ours.__class__ = cls
    return ours
