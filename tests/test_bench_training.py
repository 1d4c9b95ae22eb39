"""The training bench: what it counts, what it times, and what gets no time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bert_fast
from bench import measure, training, training_cases, training_gpu, workloads

CPU = torch.device("cpu")


def test_flop_of_a_step_by_hand() -> None:
    shape = workloads.Model("by hand", 1, 4, 1, 8, vocab=10)
    batch = {
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "labels": torch.tensor([[-100, 3, -100], [7, -100, -100]]),
    }
    # A token: 2 (4 4^2 + 2 4 8) = 256. Attention: 4 4 (3^2 + 1^2). A scored one: 2 (4^2 + 4 10).
    assert training_cases.step_flop(shape, batch) == 3 * (4 * 256 + 160 + 2 * 112)


def test_batches_have_the_lengths_that_are_asked_for() -> None:
    texts = [int(b["attention_mask"].sum()) for b in training_cases.mlm_batches("fixed", 3, 2, 99)]
    assert texts == [3 * 128] * 2
    batches = training_cases.mlm_batches("wiki512", 32, 8, 30_522)
    lengths = torch.cat([b["attention_mask"].sum(1) for b in batches]).float()
    assert abs(float(lengths.mean()) - 256) < 8 and lengths.max() == 512
    for batch in batches:
        scored = batch["labels"] != training_cases.IGNORED
        assert not scored[batch["attention_mask"] == 0].any()
        assert torch.equal(batch["labels"][scored], batch["input_ids"][scored])
    share = sum(int((b["labels"] >= 0).sum()) for b in batches) / float(lengths.sum())
    assert abs(share - training_cases.SCORED) < 0.01
    assert training_cases.batch_of("base", "wiki512") == 64
    assert training_cases.batch_of("large", "wiki512") == 32


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        training_cases.SIZES, "tiny", workloads.Model("tiny", 2, 64, 2, 128, vocab=300)
    )
    monkeypatch.setattr(measure.Clock, "ceilings", lambda clock, dtypes: {
        f"matmul_{measure.short(dtype)}_tflop_per_s": 2.0 for dtype in dtypes
    })  # fmt: skip


def rows_of(*sides: str, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Any]]:
    found = training_gpu.measure(
        CPU, ("tiny",), sides, 3, True, lengths="fixed", batch=2, dtype=dtype
    )
    return {row["side"]: row for row in found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_for_each_side(small: None, dtype: torch.dtype) -> None:
    rows = rows_of("sdpa", "bert_fast", "selective", dtype=dtype)
    assert list(rows) == ["sdpa", "bert_fast", "selective"]
    shape = training_cases.SIZES["tiny"]
    batches = training_cases.mlm_batches("fixed", 2, 3, shape.vocab)
    for row in rows.values():
        assert row["failed"] is None and row["tokens"] == 3 * 2 * 128 and row["peak_mb"] is None
        assert len(row["seconds"]) == 3 and row["ms"] == 1e3 * sorted(row["seconds"])[1]
        assert row["sequences_per_s"] == pytest.approx(2e3 / row["ms"])
        assert row["tokens_per_s"] == pytest.approx(256e3 / row["ms"])
        flop = [training_cases.step_flop(shape, batch) for batch in batches]
        rates = [n / s / 1e12 for n, s in zip(flop, row["seconds"], strict=True)]
        assert row["share"] == pytest.approx(sorted(rates)[1] / 2.0)
        assert "of sdpa's" in training_gpu.told(row)
    assert rows["sdpa"]["ratio"] == 1.0
    assert training_gpu.table(rows.values()).row_count == 3


class Scaled(nn.Module):
    """A model whose gradients, or loss and gradients, are off."""

    def __init__(self, model: nn.Module, loss: float, gradient: float) -> None:
        super().__init__()
        self.model, self.loss, self.gradient = model, loss, gradient

    def forward(self, **batch: Tensor) -> Any:
        found = self.model(**batch)
        loss = found.loss * self.gradient
        found.loss = loss + (self.loss * found.loss - loss).detach()
        return found


@pytest.mark.parametrize(
    ("loss", "gradient", "told"),
    [(1.05, 1.0, "the loss is"), (float("nan"), 1.0, "the loss is nan"),
     (1.0, 1.3, "a gradient is off by 0.3 beside sdpa"), (1.0, 0.5, "off by 0.5")],
)  # fmt: skip
def test_wrong_values_get_no_time(
    small: None, monkeypatch: pytest.MonkeyPatch, loss: float, gradient: float, told: str
) -> None:
    def off(model: nn.Module) -> nn.Module:
        return Scaled(bert_fast.accelerate(model), loss, gradient)

    monkeypatch.setitem(training_cases.SIDES, "bert_fast", off)
    rows = rows_of("sdpa", "bert_fast")
    assert told in rows["bert_fast"]["failed"] and rows["bert_fast"]["seconds"] == []
    assert rows["sdpa"]["ms"] and "failed: wrong" in training_gpu.told(rows["bert_fast"])


@pytest.mark.parametrize("when", ["build", "step"])
def test_a_side_without_memory_leaves_the_others(
    small: None, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    timed = training_gpu.Side.timed
    if when == "build":
        monkeypatch.setitem(training_cases.SIDES, "sdpa", full)
    else:
        monkeypatch.setattr(
            training_gpu.Side, "timed",
            lambda side, *args: (full if side.name == "sdpa" else timed)(side, *args),
        )  # fmt: skip
    rows = rows_of("sdpa", "bert_fast")
    assert "no memory" in rows["sdpa"]["failed"]
    assert rows["bert_fast"]["ms"] and rows["bert_fast"]["ratio"] is None
    assert "beside none" in training_gpu.told(rows["bert_fast"])


def test_dropout_is_on_where_it_is_timed(small: None) -> None:
    side = training_gpu.Side("sdpa", CPU, torch.float32)
    (batch,) = training_cases.mlm_batches("fixed", 2, 1, 300)
    side.prepare("tiny", [batch])
    rates = {m.p for m in side.model.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.1} and side.model.training
    assert all(p.grad is None for p in side.model.parameters())
    with torch.no_grad():
        assert side.forward(batch) != side.forward(batch)


def test_defaults_follow_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*arguments: str) -> tuple[Any, ...]:
        args = training.options_of(arguments)
        return args.sides, args.dtype, args.lengths, args.batch

    assert asked() == (["eager", "sdpa", "bert_fast"], "fp32", "ragged", 32)
    assert asked("--memory")[2] == "fixed"
    assert asked("--lengths", "wiki512", "--batch", "4")[2:] == ("wiki512", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu = ["sdpa", "bert_fast", "compiled"], "bf16", "wiki512"
    assert asked("--device", "cuda", "--size", "base") == (*on_gpu, 64)
    assert asked("--device", "cuda", "--size", "large") == (*on_gpu, 32)
    for wrong in (("--sides", "sdpa,jax"), ("--device", "cuda", "--memory")):
        with pytest.raises(SystemExit):
            asked(*wrong)
    assert "unknown sides ['jax']" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        asked("--device", "cuda")


def test_memory_leaves_the_other_sides_out(monkeypatch: pytest.MonkeyPatch) -> None:
    side = training_gpu.Side("sdpa", torch.device("cuda"), torch.float32, held=100)
    monkeypatch.setattr(side, "step", lambda batch: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000)  # 900 of others
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    asked = iter(range(0, 40, 10))  # of CUDA so far; between the steps by others
    stats = {"num_device_free": 0}
    monkeypatch.setattr(
        torch.cuda, "memory_stats", lambda device: stats | {"num_device_alloc": next(asked)}
    )
    for most in (1_300, 1_200):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device, most=most: most)
        side.timed({}, measure.Clock(CPU, True))
    assert side.peak == 400 and len(side.seconds) == 2
    assert side.mallocs == 20
