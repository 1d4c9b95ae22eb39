"""bert_fast's own BERT classes in the place of Hugging Face's: keys, files, losses, edits."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bert_fast

from .models import accelerated, ids, masks, tiny
from .parity import DEVICE

LABELS: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": {"labels": ids(4, 9)},
    "BertForPreTraining": {"labels": ids(4, 9), "next_sentence_label": ids(4, 1, 2).flatten()},
    "BertForNextSentencePrediction": {"labels": ids(4, 1, 2).flatten()},
    "BertForSequenceClassification": {"labels": ids(4, 1, 2).flatten()},
    "BertForTokenClassification": {"labels": ids(4, 9, 2)},
    "BertForQuestionAnswering": {"start_positions": ids(4, 1, 3), "end_positions": ids(4, 1, 3)},
    "BertForMultipleChoice": {"labels": ids(2, 1, 2).flatten()},
}


def inputs_of(name: str) -> dict[str, Any]:
    tokens, mask, labels = ids(4, 9), masks(4, 9)["right"], dict(LABELS[name])
    if name == "BertForMultipleChoice":
        tokens, mask = tokens.view(2, 2, 9), mask.view(2, 2, 9)
    for key, value in labels.items():
        if value.shape == mask.shape:
            labels[key] = value.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, **labels}


@pytest.mark.parametrize("name", LABELS)
def test_files_go_both_ways(name: str, tmp_path: Path) -> None:
    theirs, ours = getattr(transformers, name), getattr(bert_fast, name)
    assert issubclass(ours, theirs) and ours.__name__ == name
    plain, inputs = tiny(theirs), inputs_of(name)
    expected = plain(**inputs)
    plain.save_pretrained(tmp_path / "theirs")
    model = ours.from_pretrained(tmp_path / "theirs").to(DEVICE)
    assert accelerated(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    found = model(**inputs)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert type(found) is type(expected) and found.keys() == expected.keys()
    model.save_pretrained(tmp_path / "ours")
    back = theirs.from_pretrained(tmp_path / "ours").to(DEVICE)
    torch.testing.assert_close(back(**inputs).loss, expected.loss, rtol=0, atol=0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is ours and accelerated(twin)
        torch.testing.assert_close(twin(**inputs).loss, found.loss, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_tied_and_resized_embeddings(name: str) -> None:
    plain, ours = tiny(getattr(transformers, name)), tiny(getattr(bert_fast, name))
    words = ours.bert.embeddings.word_embeddings.weight
    assert ours.cls.predictions.decoder.weight is words
    tokens = ids(2, 7)
    before = ours(tokens)[0]
    for model in (plain, ours):
        model.resize_token_embeddings(120, mean_resizing=False)
    with torch.no_grad():
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            a.copy_(b)
    grown = ids(2, 7, 120)
    torch.testing.assert_close(ours(grown)[0], plain(grown)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(tokens)[0][..., :99], before, rtol=1e-4, atol=1e-4)


def test_regression_and_several_labels() -> None:
    for problem, labels in (
        ({"num_labels": 1}, torch.randn(3, 1)),
        ({"num_labels": 4, "problem_type": "multi_label_classification"}, torch.ones(3, 4)),
    ):
        name = "BertForSequenceClassification"
        plain, ours = tiny(getattr(transformers, name), **problem), None
        ours = tiny(getattr(bert_fast, name), **problem)
        inputs = {"input_ids": ids(3, 6), "labels": labels.to(DEVICE)}
        torch.testing.assert_close(ours(**inputs).loss, plain(**inputs).loss, rtol=1e-5, atol=1e-5)


def test_a_language_model_head_falls_back() -> None:
    decoder = tiny(bert_fast.BertLMHeadModel, is_decoder=True)
    plain = tiny(transformers.BertLMHeadModel, is_decoder=True)
    tokens = ids(2, 5)
    assert torch.equal(decoder(tokens).logits, plain(tokens).logits)
    found = decoder.generate(tokens[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(found, plain.generate(tokens[:1], max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("which", [1, -1, [0, 2], [-3], [7]])
def test_chosen_hidden_states(which: int | list[int]) -> None:
    model = bert_fast.accelerate(tiny())
    every = model(ids(2, 5), output_hidden_states=True).hidden_states
    found = model(ids(2, 5), output_hidden_states=which).hidden_states
    wanted = {i % 3 for i in ([which] if isinstance(which, int) else which) if -3 <= i < 3}
    assert len(found) == 3
    for i, state in enumerate(found):
        assert (state is not None) == (i in wanted)
        assert state is None or torch.equal(state, every[i])


def test_class_defaults_come_from_the_config() -> None:
    model = bert_fast.accelerate(tiny(output_hidden_states=True, return_dict=False))
    found = model(ids(2, 5))
    assert isinstance(found, tuple) and len(found) == 3 and len(found[2]) == 3
