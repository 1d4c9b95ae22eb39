"""Embeds a corpus: bulk tokenising, length-sorted batches by tokens, no padding anywhere.

    texts -> tokens [T] -> packed encoder [T, H] -> pool [B, H] -> rows of the result, in order

Sorting gives each batch sequences of like length, so that attention's work is even, and a budget
in tokens (not in texts) gives each batch the same work. Mean pooling and its normalisation:
Reimers & Gurevych, arXiv 1908.10084.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from . import ops
from .convert import check_backend, is_encoder, why_not_packed
from .families import family_of
from .inputs import most_tokens, texts_of
from .modeling import encode
from .ops.locks import OneAtATime
from .ops.pool import MODES
from .packed import options_of
from .paths import Backend, chosen
from .sentence import SERVED, sentence_classes, settings_of
from .structure import hooked

TEXTS_AT_ONCE = 8_192  # bounds what the tokenizer's Python lists take, not what is kept
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus: ids int32 [T] of all texts, bounds int64 [n + 1], texts cut short."""

    ids: np.ndarray
    bounds: np.ndarray
    truncated: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)

    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """A text number for each distinct token sequence; for each text, which of these it is."""
        numbers: dict[bytes, int] = {}
        firsts: list[int] = []
        which = np.empty(len(self), np.int64)
        for text in range(len(self)):
            tokens = self.ids[self.bounds[text] : self.bounds[text + 1]].tobytes()
            which[text] = numbers.setdefault(tokens, len(numbers))
            if len(firsts) < len(numbers):
                firsts.append(text)
        return np.array(firsts, np.int64), which


def embed(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_tokens: int = 16_384,
    pooling: str | None = None,
    normalize: bool | None = None,
    max_length: int | None = None,
    backend: Backend | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """One vector per text, in the order given; equal texts are computed once.

    Args:
        model: a transformers encoder, or a module with one inside; on any device, in fp32, bf16
            or fp16. Accelerated or not; accelerated with dtype="int8" or "fp8", in that. It runs
            in evaluation mode and is left as it was; several threads may ask, if none trains it.
            What is None below, a SentenceTransformer says itself; also how many columns to keep,
            and whether texts lose their capitals.
        tokenizer: its fast tokenizer.
        texts: n strings; an empty one gives the embedding of the empty text.
        batch_tokens: tokens per batch; a longer text gets a batch of its own.
        pooling: "mean" over a text's tokens, or "cls", its first token; None: "mean".
        normalize: divide each vector by its L2 norm; None: yes.
        max_length: tokens kept of each text; None: as many as model and tokenizer take.
        backend: as in `bert_fast.accelerate`; None: what the model was accelerated with, or "auto".
        progress: called after each batch with how many (texts, tokens) it has answered.

    Returns: float32 [n, H]. Pooling and norms are computed in fp32, whatever the model's dtype.
    Raises: ValueError for a model without an encoder that can run packed (with the reasons), or
        whose vectors are more than the encoder's, a tokenizer that is not fast, an unknown
        pooling, a max_length over the model's positions. TypeError for what is no text.
    Warns: UserWarning with the number of texts cut to `max_length`, if there are any, and for a
        prompt that a SentenceTransformer would put before the texts.
    """
    own, encoder = settings_of(model), _packable(model)
    limit = _limit(encoder, tokenizer, max_length, own.max_length)
    if own.lower:
        texts = [text.lower() for text in texts_of(texts)]
    if own.prompt:
        warnings.warn(f"its prompt {own.prompt!r} is not put before the texts", stacklevel=2)
    tokens = tokenize(tokenizer, texts, limit)
    if tokens.truncated:
        warnings.warn(truncation_note(tokens, limit), stacklevel=2)
    pooling = pooling or own.pooling or "mean"
    normalize = own.normalize is not False if normalize is None else normalize
    with evaluating(model):
        vectors = _vectors(encoder, tokens, batch_tokens, pooling, normalize, backend, progress)
    return vectors[:, : own.dimensions]


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> Tokens:
    """The ids of every text with its special tokens, cut to `max_length`, without padding.

    Raises: ValueError for a tokenizer that is not fast; TypeError for what is no text, and for one
        text instead of several.
    """
    check_fast(tokenizer)
    texts = texts_of(texts)
    pieces, counts, truncated = [np.empty(0, np.int32)], [0], 0
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        found = tokenizer(
            texts[start : start + TEXTS_AT_ONCE],
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        counts.extend(map(len, found["input_ids"]))
        pieces.append(np.concatenate([np.asarray(x, np.int32) for x in found["input_ids"]]))
        truncated += sum(bool(encoding.overflowing) for encoding in found.encodings)
    return Tokens(np.concatenate(pieces), np.cumsum(counts, dtype=np.int64), truncated)


def check_fast(tokenizer: Any) -> None:
    """Raises: ValueError for a tokenizer of Python, which does not say where a token is from."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json)")


def embed_tokens(
    model: nn.Module,
    tokens: Tokens,
    *,
    batch_tokens: int = 16_384,
    pooling: str = "mean",
    normalize: bool = True,
    backend: Backend | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """`embed` for a corpus that is tokenised already; the arguments are those of `embed`."""
    encoder = _packable(model)
    with evaluating(model):
        return _vectors(encoder, tokens, batch_tokens, pooling, normalize, backend, progress)


def _vectors(
    encoder: nn.Module,
    tokens: Tokens,
    batch_tokens: int,
    pooling: str,
    normalize: bool,
    backend: Backend | None,
    progress: Progress | None,
) -> np.ndarray:
    if pooling not in MODES:
        raise ValueError(f"pooling is {pooling!r}, expected one of {MODES}")
    if not isinstance(batch_tokens, Integral) or batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens!r}, expected a number of at least 1")
    if backend is not None:
        check_backend(backend)
    options = options_of(encoder)
    backend = options.backend if backend is None else backend
    firsts, which = tokens.distinct()
    lengths, times = tokens.lengths[firsts], np.bincount(which, minlength=len(firsts))
    out = np.empty((len(firsts), encoder.config.hidden_size), np.float32)

    def collect(rows: np.ndarray, vectors: Tensor) -> None:
        out[rows] = vectors.cpu().numpy()
        if progress is not None:
            progress(int(times[rows].sum()), int((times * lengths)[rows].sum()))

    running: tuple[np.ndarray, Tensor] | None = None
    for rows in batches(lengths, batch_tokens):
        ids, cu_seqlens = _packed(tokens, firsts[rows], encoder.device)
        read = cu_seqlens[:-1].long() if pooling == "cls" else None
        longest = int(lengths[rows[0]])
        hidden = encode(
            encoder, ids, cu_seqlens, longest, backend=backend, rows=read, dtype=options.dtype
        )  # [T, H], or [B, H] of the first tokens
        bounds = cu_seqlens
        if read is not None:
            bounds = torch.arange(len(read) + 1, dtype=torch.int32, device=read.device)
        vectors = ops.pool(
            hidden.float(), bounds, pooling, normalize, chosen(backend, "pool")
        )  # [B, H]
        # One batch behind: a GPU has the next one queued while this one is copied out.
        if running is not None:
            collect(*running)
        running = rows, vectors
    if running is not None:
        collect(*running)
    return out if len(firsts) == len(tokens) else out[which]


class _Evaluated:
    """users: a token for each thread that evaluates the model now; before: the modes that the last
    of them puts back, if any module was in training."""

    def __init__(self) -> None:
        self.users: set[object] = set()
        self.before: list[tuple[nn.Module, bool]] = []


_evaluated: WeakKeyDictionary[nn.Module, _Evaluated] = WeakKeyDictionary()
_modes = OneAtATime()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation and inference mode; every module is then back in the mode it was in, once no
    other thread evaluates the model either."""
    user = object()
    try:
        with _modes:  # Ctrl-C may come anywhere: what is to be put back is noted before it is set
            now = [(module, module.training) for module in model.modules()]
            entry = _evaluated.setdefault(model, _Evaluated())
            entry.users.add(user)
            if any(mode for _, mode in now):
                entry.before = now
                model.eval()
        with torch.inference_mode():
            yield
    finally:
        with _modes:
            if found := _evaluated.get(model):
                found.users.discard(user)
                if not found.users:
                    _put_back(model, found.before)
                    del _evaluated[model]


def _put_back(model: nn.Module, before: list[tuple[nn.Module, bool]]) -> None:
    if before:
        model.train(before[0][1])  # packed encoders drop their copies
    for module, mode in before:
        module.training = mode


def batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Positions in `lengths`, longest first, cut where a batch would exceed `batch_tokens`."""
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    start = used = 0
    while start < len(order):
        stop = max(start + 1, int(np.searchsorted(ends, used + batch_tokens, side="right")))
        yield order[start:stop]
        start, used = stop, int(ends[stop - 1])


def token_limit(
    model: nn.Module, tokenizer: Any, max_length: int | None = None, usual: int | None = None
) -> int:
    """The tokens kept of each text: `max_length`, or `usual` as far as the positions go; None:
    what the tokenizer says.

    Raises: ValueError for a max_length that leaves no token of a text, or is over the model's
        position table.
    """
    return _limit(_packable(model), tokenizer, max_length, usual)


def _limit(encoder: nn.Module, tokenizer: Any, max_length: int | None, usual: int | None) -> int:
    positions = most_tokens(encoder.embeddings)
    if max_length is None:
        return min(positions, int(usual or tokenizer.model_max_length))
    least = tokenizer.num_special_tokens_to_add() + 1
    if not least <= max_length <= positions:
        raise ValueError(
            f"max_length is {max_length}, expected {least} (special tokens and one) to {positions} "
            "(positions)"
        )
    return max_length


def truncation_note(tokens: Tokens, max_length: int) -> str:
    return f"{tokens.truncated} of {len(tokens)} texts were cut to {max_length} tokens"


def _packable(model: nn.Module) -> nn.Module:
    """The one encoder inside `model`, or a ValueError that says why it cannot run packed."""
    found = [module for module in model.modules() if is_encoder(module)]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} contains {len(found)} transformers encoders, expected one"
        )
    encoder, family = found[0], family_of(found[0])
    assert family is not None
    if told := _around(model, encoder):
        raise ValueError(f"{type(model).__name__} is more than its encoder: {told}")
    if why := why_not_packed(encoder, family):
        raise ValueError(f"{type(model).__name__} cannot run packed: {'; '.join(why)}")
    if type(encoder.embeddings).__module__ != family.module:
        own = type(encoder.embeddings).__qualname__
        raise ValueError(f"{type(model).__name__}: its {own} may count positions by itself")
    return encoder


def _around(model: nn.Module, encoder: nn.Module) -> str | None:
    """What else makes the vectors of `model`, and would be left out here."""
    if hooked(encoder):
        return f"a hook or a replaced method sits on its {type(encoder).__name__}"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "it puts learned tokens before each text"
    if kinds := sentence_classes(model):
        if "SentenceTransformer" not in kinds:
            return "its vectors are not those that pooling gives"
        others = {type(module).__name__ for module in model.children()} - SERVED
        return f"it has {', '.join(sorted(others))}" if others else None
    return None


def _packed(tokens: Tokens, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """The ids [T] of the texts `rows`, one after the other, and where each starts [B + 1]."""
    bounds = tokens.bounds
    ids = np.concatenate([tokens.ids[bounds[row] : bounds[row + 1]] for row in rows])
    cu_seqlens = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(bounds[rows + 1] - bounds[rows], out=cu_seqlens[1:])
    return _to(ids, device), _to(cu_seqlens, device)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    # From pageable memory the copy would wait for the GPU to finish the batch before.
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
