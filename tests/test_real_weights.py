"""Trained models, published values: what random weights cannot show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

import bert_fast
from bench import assets
from bert_fast.ops.backends import best_isa

from .parity import DEVICE

# The two chains of the AntiBERTy README (github.com/jeffreyruffolo/AntiBERTy, MIT).
HEAVY = (
    "EVQLVQSGPEVKKPGTSVKVSCKASGFTFMSSAVQWVRQARGQRLEWIGWIVIGSGNTNYAQKFQERVTITRDMSTSTAYMELSSLR"
    "SEDTAVYYCAAPYCSSISCNDGFDIWGQGTMVTVS"
)
LIGHT = (
    "DVVMTQTPFSLPVSLGDQASISCRSSQSLVHSNGNTYLHWYLQKPGQSPKLLIYKVSNRFSGVPDRFSGSGSGTDFTLKISRVEAED"
    "LGVYFCSQSTHVPYTFGGGTKLEIK"
)

# With the model's top-1 through transformers. Each takes half a minute on a CPU.
CHAINS = [(LIGHT, 0.982), (HEAVY, 0.926)][: 2 if DEVICE.type == "cuda" else 1]


def asset(name: str) -> Any:
    try:
        return getattr(assets, name)()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_golden_cosines_of_minilm(dtype: torch.dtype) -> None:
    """all-MiniLM-L6-v2's three sentences, as printed in the sentence-transformers README."""
    path = asset("minilm")
    model = bert_fast.accelerate(BertModel.from_pretrained(path, dtype=dtype).to(DEVICE).eval())
    texts = [
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
    ]
    batch = AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
    batch = {name: value.to(DEVICE) for name, value in batch.items()}
    with torch.inference_mode():
        states = model(**batch).last_hidden_state.float()
    weight = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1))
    found = [(vectors[a] @ vectors[b]).item() for a, b in ((0, 1), (0, 2), (1, 2))]
    tolerance = 5e-5 if dtype == torch.float32 else 5e-3
    assert found == pytest.approx([0.6660, 0.1046, 0.1411], abs=tolerance)


@pytest.mark.skipif(best_isa() == 0, reason="8-bit products of models need AVX2")
def test_int8_of_minilm() -> None:
    """Each sentence's cosine to fp32 is 0.998 or more, and each token's 0.98: all of 2,000 were."""
    path = asset("minilm")
    texts = asset("movie_sentences")[:600:4]
    tokenizer = AutoTokenizer.from_pretrained(path)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    states = []
    for dtype in (None, "int8"):
        model = bert_fast.accelerate(BertModel.from_pretrained(path).eval(), dtype=dtype)
        with torch.inference_mode():
            states.append(model(**batch).last_hidden_state)
    real = batch["attention_mask"].bool()
    means = [(h * real.unsqueeze(-1)).sum(1) for h in states]
    assert torch.cosine_similarity(*means).min() >= 0.998
    assert 0.98 <= torch.cosine_similarity(*(h[real] for h in states)).min() < 0.9999


def antiberty() -> tuple[Any, dict[str, int]]:
    """The model with its masked-LM head, from a checkpoint that still holds `position_ids`."""
    path = asset("antiberty")
    config = BertConfig.from_pretrained(next(path.rglob("config.json")).parent)
    state = torch.load(next(path.rglob("pytorch_model.bin")), weights_only=True, map_location="cpu")
    model = BertForMaskedLM(config)
    missing, _ = model.load_state_dict(state, strict=False)
    assert not missing, missing
    words = next(path.rglob("vocab.txt")).read_text().split()
    return model.to(DEVICE).eval(), {word: i for i, word in enumerate(words)}


@pytest.mark.gpu
@pytest.mark.parametrize(("chain", "expected"), CHAINS)
def test_antiberty_recovers_each_masked_residue(chain: str, expected: float) -> None:
    """Masking every residue in turn; the published model's top-1 through transformers."""
    model, words = antiberty()
    bert_fast.accelerate(model)
    tokens = torch.tensor([words["[CLS]"], *(words[r] for r in chain), words["[SEP]"]])
    batch = tokens.repeat(len(chain), 1)
    rows = torch.arange(len(chain))
    batch[rows, rows + 1] = words["[MASK]"]
    with torch.inference_mode():
        logits = model(batch.to(DEVICE)).logits[rows, rows + 1]
    top1 = (logits.argmax(-1).cpu() == tokens[1:-1]).float().mean().item()
    assert round(top1, 3) == expected
