"""verify: that it sees what runs in inference, and what it says where there is no gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, MPNetConfig, MPNetModel

from bert_fast import one_call
from bert_fast.ops.backends import best_isa
from bert_fast.ops.encoder import OP as ENCODER
from bert_fast.ops.padded_encoder import padded_encoder
from bert_fast.verification import Verification, verify

from . import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def verified(folder: Path) -> Callable[[Any], Verification]:
    return lambda model: verify(model, tiny.TEXTS, AutoTokenizer.from_pretrained(folder))


@pytest.mark.skipif(best_isa() == 0, reason="without AVX2 the layers run op by op")
@pytest.mark.parametrize("states", ["all", "last"])
def test_what_runs_in_inference_is_compared(
    states: str, verified: Callable[..., Verification], folder: Path, monkeypatch: Any
) -> None:
    model, infer = AutoModel.from_pretrained(folder), ENCODER.infer
    found = verified(model)
    assert found.passed and found.gradient is not None and not found.no_gradient
    assert "encoder" in [choice.op for choice in found.explanation.choices]

    def scaled(kernel: Any, args: tuple[Any, ...]) -> torch.Tensor:
        several = len(args[ENCODER.names.index("weights")]) > 16  # all layers in one call
        return infer(kernel, args) * (1.001 if several or states == "all" else 1.0)

    def all_scaled(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        last, pooled = padded_encoder(*args)
        return last * 1.001, pooled

    monkeypatch.setattr(ENCODER, "infer", scaled)
    if states == "last":
        monkeypatch.setattr(one_call, "padded_encoder", all_scaled)
    assert not verified(model).passed


def test_a_frozen_model(verified: Callable[..., Verification], folder: Path) -> None:
    found = verified(AutoModel.from_pretrained(folder).requires_grad_(False))
    assert found.passed and found.gradient is None
    assert "the gradient is not compared: no parameter is trained" in str(found)


def test_a_bias_that_trains_in_hugging_face(verified: Callable[..., Verification]) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 37}
    model = MPNetModel(MPNetConfig(**sizes, num_attention_heads=4, max_position_embeddings=24))
    found = verified(model)
    assert found.passed and found.gradient is None
    assert "the relative position bias is being trained" in str(found)
    model.encoder.relative_attention_bias.requires_grad_(False)
    found = verified(model)
    assert found.passed and found.gradient is not None
