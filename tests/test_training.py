"""Training beside transformers: loss curves, dropout, checkpointing, mixed precision, memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForPreTraining, BertForSequenceClassification

import bert_fast

from .models import ids, masks, tiny
from .parity import DEVICE

BATCH, LENGTH = 8, 16
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def batches(count: int, task: str) -> Iterator[dict[str, Any]]:
    """Ragged batches with something to learn: the parity of a token decides everything."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(count):
        tokens = torch.randint(3, 99, (BATCH, LENGTH), generator=generator)
        lengths = torch.randint(5, LENGTH + 1, (BATCH, 1), generator=generator)
        mask = torch.arange(LENGTH) < lengths
        label = tokens[:, 1] % 2
        batch = {"input_ids": tokens, "attention_mask": mask.long()}
        if task == "classification":
            batch["labels"] = label
        else:
            chosen = (torch.rand(BATCH, LENGTH, generator=generator) < 0.15) & mask
            chosen[:, 2] = True
            batch["labels"] = tokens.masked_fill(~chosen, -100)
            batch["input_ids"] = tokens.masked_fill(chosen, 2)
            batch["next_sentence_label"] = label
        yield {name: value.to(DEVICE) for name, value in batch.items()}


def fresh(task: str, **changes: Any) -> Any:
    cls = BertForSequenceClassification if task == "classification" else BertForPreTraining
    torch.manual_seed(0)
    model = tiny(cls, **changes)
    for parameter in model.parameters():  # near BERT's own initialisation, so that it learns
        parameter.data.mul_(0.3)
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            parameter.data.fill_(1.0)
    return model.train()


def curve(model: Any, task: str, steps: int) -> Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    losses = []
    for batch in batches(steps, task):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("task", ["pre-training", "classification"])
def test_fifty_steps_without_dropout(task: str) -> None:
    plain = fresh(task)
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    expected, found = curve(plain, task, 50), curve(ours, task, 50)
    assert expected[-5:].mean() < expected[:5].mean()  # it does learn
    assert ((found - expected).abs() / expected).max() < 1e-4
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        # A key bias has no gradient but rounding noise, which Adam blows up on both sides.
        if not name.endswith("key.bias"):
            assert (a - b).norm() / b.norm() < 1e-3, name


def test_loss_curve_with_dropout() -> None:
    """The mean over 5 seeds lies as near to transformers' as its own seeds lie to each other."""
    curves = {}
    for side in ("theirs", "ours"):
        found = []
        for seed in range(5):
            model = fresh("pre-training", **DROPOUT)
            if side == "ours":
                bert_fast.accelerate(model)
            torch.manual_seed(seed)
            found.append(curve(model, "pre-training", 50))
        curves[side] = torch.stack(found)
    assert not torch.equal(curves["ours"][0], curves["ours"][1])
    spread = curves["theirs"].std(0).mean() * (2 / 5) ** 0.5  # of a difference of two means
    difference = (curves["ours"].mean(0) - curves["theirs"].mean(0)).abs().mean()
    assert difference < 2 * spread, (difference, spread)


def step(model: Any, seed: int = 1) -> list[Tensor]:
    """[loss, every gradient] of one step with dropout."""
    torch.manual_seed(seed)
    model.zero_grad()
    (batch,) = batches(1, "pre-training")
    loss = model(**batch).loss
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *grads]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_checkpointing_redraws_the_same_dropout() -> None:
    """A mask drawn anew in backward is the mask of the forward: gradients are equal bit for bit."""
    model = fresh("pre-training", **DROPOUT)
    expected = step(bert_fast.accelerate(model))
    assert not equal(step(model, seed=2), expected)  # there is dropout
    for checkpoint in ("selective", "full"):
        assert equal(step(bert_fast.accelerate(model, checkpoint=checkpoint)), expected)
    bert_fast.accelerate(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = step(model)
        if reentrant:  # which adds up a tensor's gradients in another order
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        else:
            assert equal(found, expected)
        model.gradient_checkpointing_disable()
    with pytest.raises(ValueError, match="checkpoint is 'some', expected one of"):
        bert_fast.accelerate(model, checkpoint="some")


def test_deterministic_run_to_run() -> None:
    model = bert_fast.accelerate(fresh("pre-training", **DROPOUT))
    torch.use_deterministic_algorithms(True)
    try:
        expected = step(model)
        assert all(equal(step(model), expected) for _ in range(3))
    finally:
        torch.use_deterministic_algorithms(False)


def kept(model: Any) -> int:
    """Bytes that the encoder keeps for backward, beside its parameters; storages count once."""
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and tensor.is_floating_point():
            seen.add(storage.data_ptr())
            alive.append(tensor)
            total += storage.nbytes()
        return tensor

    alive: list[Tensor] = []  # so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=ids(4, 32), attention_mask=masks(4, 32)["full"]).last_hidden_state.sum()
    return total


def test_a_trained_weight_written_to_is_seen() -> None:
    """Through `.data` and off the diagonal, of which nothing tells: no copy is kept of it."""
    model = bert_fast.accelerate(tiny()).eval()
    batch = {"input_ids": ids(2, 9)}
    before = model(**batch).last_hidden_state
    model.encoder.layer[0].attention.self.value.weight.data[0, -1] += 5.0
    assert (model(**batch).last_hidden_state - before).abs().max() > 1e-3


def test_what_training_keeps() -> None:
    """Per token and layer, in hidden sizes: 8 and the inner width once, 8, or 1."""
    tokens, hidden, layers, inner = 4 * 32, 64, 6, 4 * 64
    model = tiny(num_hidden_layers=layers, intermediate_size=inner, **DROPOUT).train()
    found = {}
    for checkpoint, width in (
        ("none", 8 * hidden + inner),
        ("selective", 8 * hidden),
        ("full", hidden),
    ):
        found[checkpoint] = kept(bert_fast.accelerate(model, checkpoint=checkpoint))
        # Statistics, seeds, and what lies outside the layers: a tenth, and two tensors.
        bound = 4 * tokens * (layers * width * 1.1 + 2 * hidden)
        assert found[checkpoint] < bound, (checkpoint, found[checkpoint], bound)
    assert found["full"] < found["selective"] < found["none"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_scaled_gradients(dtype: torch.dtype) -> None:
    """As Trainer trains: fp32 weights under autocast, fp16 with a GradScaler."""
    plain = fresh("pre-training")
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    (batch,) = batches(1, "pre-training")
    exact = copy.deepcopy(plain).double()
    exact(**batch).loss.backward()
    worst = {}
    for side, model in (("theirs", plain), ("ours", ours)):
        scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == torch.float16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with torch.autocast(DEVICE.type, dtype):
            loss = model(**batch).loss
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        errors = [
            (p.grad - q.grad).norm() / q.grad.norm()
            for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True)
            if not name.endswith("key.bias")
        ]
        worst[side] = torch.stack(errors)
        assert scaler.step(optimizer) is None
    assert worst["ours"].isfinite().all()
    assert worst["ours"].mean() < 1.5 * worst["theirs"].mean(), worst
    assert worst["ours"].max() < 3 * worst["theirs"].max(), worst
