"""verify(model, texts): is the accelerated model as exact as the user's own, on the user's texts?

The truth is Hugging Face's forward in fp64. The yardstick is Hugging Face's forward in the model's
own dtype: bert_fast passes where its error is at most twice that (three times for gradients), plus
the dtype's epsilon. States are those of inference, without gradients; only the gradient is that of
training. Errors are root mean squares over the real tokens. Products in 8 bits are never
that exact: they pass where no text's and no token's vector is turned by much (SENTENCE, TOKEN).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convert import accelerate, is_encoder, restore
from .explanation import Explanation, explain
from .inputs import most_tokens, texts_of
from .packed import reasons_against_call
from .paths import Backend
from .swap import put_back

MAX_TEXTS = 64
SENTENCE, TOKEN = 0.998, 0.98  # least cosines to the truth with products in 8 bits
# How `explain` tells that they were.
IN_8_BITS = {
    "int8": lambda choice: "int8" in choice.on or choice.op.endswith("_int8"),
    "fp8": lambda choice: choice.op.endswith("_fp8"),
}


@dataclass(frozen=True)
class Error:
    """Of one tensor: bert_fast's error, Hugging Face's own in this dtype, and what is allowed.

    Relative errors are root mean squares divided by that of the truth.
    """

    name: str
    max_abs: float
    relative: float
    hf_relative: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.allowed


@dataclass(frozen=True)
class Verification:
    """The result; `str()` is a report for a terminal, `to_json()` plain values.

    no_gradient: why it was not compared, where it was asked for.
    """

    model: str
    dtype: str
    texts: int
    states: list[Error]
    gradient: Error | None
    cosine: float
    token_cosine: float
    rank_agreement: float | None
    explanation: Explanation
    no_gradient: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        if self.dtype in IN_8_BITS:
            near = self.cosine >= SENTENCE and self.token_cosine >= TOKEN
            return near and any(map(IN_8_BITS[self.dtype], self.explanation.choices))
        errors = self.states + ([self.gradient] if self.gradient else [])
        return not self.explanation.fallback and all(error.passed for error in errors)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        exact = "near the truth" if self.dtype in IN_8_BITS else "as exact as Hugging Face"
        lines = [
            f"{self.model} in {self.dtype} on {self.texts} texts: "
            + (exact if self.passed else f"NOT {exact}"),
            f"{'':<12}{'max |error|':>12}{'relative':>12}{'HF itself':>12}{'allowed':>12}",
        ]
        for e in self.states + ([self.gradient] if self.gradient else []):
            numbers = (e.max_abs, e.relative, e.hf_relative, e.allowed)
            row = "".join(f"{number:>12.2e}" for number in numbers)
            over = not e.passed and self.dtype not in IN_8_BITS
            lines.append(f"{e.name:<12}{row}" + "  over" * over)
        if self.no_gradient:
            lines.append(f"the gradient is not compared: {'; '.join(self.no_gradient)}")
        lines.append(f"smallest cosine of a text's mean embedding to the truth: {self.cosine:.8f}")
        lines.append(
            f"smallest cosine of a token's last state to the truth: {self.token_cosine:.8f}"
        )
        if self.rank_agreement is not None:
            lines.append(f"rank agreement of the texts' similarities: {self.rank_agreement:.6f}")
        return "\n".join([*lines, str(self.explanation)])


def verify(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: Any,
    backend: Backend = "auto",
    gradients: bool = True,
    dtype: str | None = None,
) -> Verification:
    """Compares `model` through bert_fast with the same model through transformers.

    Args:
        model: a transformers encoder, or a head on one: the encoder is compared, as `backend` and
            `dtype` here say, whatever it was accelerated with. It is copied (three times, once in
            fp64) and left as it is.
        texts: 1 to 64 texts, run as one padded batch.
        tokenizer: its tokenizer.
        backend: as in `bert_fast.accelerate`.
        gradients: also compare the gradient of a random projection of the last hidden states with
            respect to the encoder's parameters. Not where there is none: products in 8 bits, a
            frozen model; nor where training it is left to Hugging Face's own forward.
        dtype: as in `bert_fast.accelerate`.

    Returns: errors by hidden state (the embeddings, then each layer), of the gradient, the smallest
        cosines of a text and of a token, the Spearman correlation of all pairwise similarities, and
        what ran.
    Raises: ValueError for no or too many texts, and for a model that cannot be accelerated;
        TypeError for one text that is not in a list.
    """
    texts = texts_of(texts)
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise ValueError(f"{len(texts)} texts given, expected 1 to {MAX_TEXTS}")
    inner = [module for module in model.modules() if is_encoder(module)]
    if len(inner) != 1:
        raise ValueError(f"{type(model).__name__} contains {len(inner)} encoders, expected one")
    encoder: Any = restore(copy.deepcopy(inner[0])).eval()
    put_back(encoder)  # a class of ours by name has nothing to restore
    weight = encoder.embeddings.word_embeddings.weight
    limit = min(most_tokens(encoder.embeddings), int(tokenizer.model_max_length))
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
    ).to(weight.device)
    kept = batch["attention_mask"].bool()
    three = (
        copy.deepcopy(encoder).double(),
        encoder,
        accelerate(copy.deepcopy(encoder), backend, dtype=dtype),
    )
    with torch.no_grad():
        explanation = explain(three[-1], batch)
        truth, plain, ours = (_states(m, batch, kept) for m in three)
    names = ["embeddings", *(f"layer {i}" for i in range(len(truth) - 1))]
    states = [
        _error(name, results, weight.dtype, 2)
        for name, *results in zip(names, truth, plain, ours, strict=True)
    ]
    gradient, against = None, _reasons_against_gradient(three[-1], batch, dtype)
    if gradients and not against:
        gradient = _error("gradient", [_gradient(m, batch, kept) for m in three], weight.dtype, 3)
    vectors, found = (_pooled(states[-1], kept) for states in (truth, ours))
    return Verification(
        type(model).__name__,
        dtype or str(weight.dtype).removeprefix("torch."),
        len(texts),
        states,
        gradient,
        (vectors * found).sum(-1).min().item(),
        F.cosine_similarity(truth[-1], ours[-1], dim=-1).min().item(),
        _rank_agreement(vectors, found),
        explanation,
        against if gradients else [],
    )


def _states(encoder: nn.Module, batch: Mapping[str, Tensor], kept: Tensor) -> list[Tensor]:
    """[tokens, H] each, in fp64, of the real tokens only.

    The last is of a run of its own: where no other is asked for, all layers may run in one call.
    """
    states = encoder(**batch, output_hidden_states=True).hidden_states[:-1]
    return [state[kept].double() for state in (*states, encoder(**batch).last_hidden_state)]


def _pooled(last: Tensor, kept: Tensor) -> Tensor:
    """The mean over each text's tokens, of unit length [B, H]."""
    means = [tokens.mean(0) for tokens in last.split(kept.sum(1).tolist())]
    return F.normalize(torch.stack(means), dim=-1)


def _reasons_against_gradient(
    encoder: nn.Module, batch: Mapping[str, Tensor], dtype: str | None
) -> list[str]:
    """Why there is no gradient of ours to compare."""
    if dtype:
        return ["products in 8 bits have none"]
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        return ["no parameter is trained"]
    with torch.enable_grad():
        return reasons_against_call(type(encoder), encoder, dict(batch))


def _gradient(encoder: nn.Module, batch: Mapping[str, Tensor], kept: Tensor) -> Tensor:
    """Of a random projection of the last hidden states, with respect to what is trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        last = encoder(**batch).last_hidden_state
        weight = torch.randn(last.shape, generator=generator, dtype=torch.float64).to(last)
        parameters = [p for p in encoder.parameters() if p.requires_grad]
        loss = (last * weight)[kept].sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.double().flatten() for g in grads if g is not None])


def _error(name: str, results: Sequence[Tensor], dtype: torch.dtype, factor: int) -> Error:
    truth, plain, ours = results
    scale = truth.square().mean().sqrt().item() or 1.0

    def relative(found: Tensor) -> float:
        return (found - truth).square().mean().sqrt().item() / scale

    allowed = factor * relative(plain) + torch.finfo(dtype).eps
    error = (ours - truth).abs().max().item()
    return Error(name, error, relative(ours), relative(plain), allowed)


def _rank_agreement(truth: Tensor, ours: Tensor) -> float | None:
    """Spearman's correlation of all pairwise similarities; None for fewer than three texts."""
    if truth.shape[0] < 3:
        return None
    rows, cols = torch.triu_indices(truth.shape[0], truth.shape[0], 1)
    ranks = [(x @ x.T)[rows, cols].argsort().argsort().double() for x in (truth, ours)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()
