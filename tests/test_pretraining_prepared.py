"""What pre-training makes of text, tokenizer and model before its first step, and what it tells."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from accelerate import PartialState
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

import bert_fast.training.pretrain as pretraining
from bert_fast.training.loop import Settings
from bert_fast.training.pretrain import Recipe, prepare, pretrain

from . import prose

SIZES = {"vocab_size": 100, "layers": 1, "hidden": 32, "heads": 2}


def test_a_checkpoint_in_16_bits_is_trained_in_32(tmp_path):
    text = prose.write(tmp_path / "text.txt", 120)
    recipe = Recipe([text], vocab_size=100, layers=1, hidden=32, heads=2)
    made = prepare(recipe, Settings(tmp_path / "out", device="cpu"))
    made.model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    made.tokenizer.save_pretrained(tmp_path / "half")
    more = dataclasses.replace(recipe, model=tmp_path / "half")
    assert prepare(more, Settings(tmp_path / "more", device="cpu")).model.dtype == torch.float32


def test_the_main_process_alone_learns_the_tokenizer(tmp_path, monkeypatch):
    text = prose.write(tmp_path / "text.txt", 120)
    recipe = Recipe([text], vocab_size=100, layers=1, hidden=32, heads=2)
    settings = Settings(tmp_path / "out", device="cpu")
    made = prepare(recipe, settings)
    monkeypatch.setattr(PartialState, "is_main_process", False)
    monkeypatch.setattr(pretraining, "train_tokenizer", None)
    assert prepare(recipe, settings).tokenizer.get_vocab() == made.tokenizer.get_vocab()


def test_a_refused_run_leaves_the_other_as_it_was(tmp_path):
    text = prose.write(tmp_path / "text.txt", 120)
    recipe = Recipe([text], vocab_size=100, layers=1, hidden=32, heads=2)
    settings = Settings(tmp_path / "out", device="cpu")
    prepare(recipe, settings)
    (settings.output_dir / "checkpoint-1").mkdir()
    before = {file: file.stat().st_mtime_ns for file in settings.output_dir.rglob("*")}
    with pytest.raises(ValueError, match="checkpoints of another run"):
        prepare(dataclasses.replace(recipe, vocab_size=60), settings)
    assert before == {file: file.stat().st_mtime_ns for file in settings.output_dir.rglob("*")}


def test_held_back_text_is_masked_as_ever(tmp_path):
    text = prose.write(tmp_path / "text.txt", 120)
    recipe = Recipe([text], vocab_size=100, layers=1, hidden=32, heads=2, mlm_probability=0.4)
    prepared = prepare(recipe, Settings(tmp_path / "out", device="cpu"))

    def share(pairs):
        batch = prepared.collate([pairs[i] for i in range(len(pairs))])
        return ((batch["labels"] != -100).sum() / batch["attention_mask"].sum()).item()

    assert share(prepared.pairs) == pytest.approx(0.4, abs=0.04)
    assert share(prepared.held) == pytest.approx(0.15, abs=0.02)


def test_a_mimetic_start_attends_to_what_is_near(tmp_path):
    text = prose.write(tmp_path / "text.txt", 120)
    recipe = Recipe([text], vocab_size=100, layers=1, hidden=64, heads=2, start="mimetic")
    prepared = prepare(recipe, Settings(tmp_path / "out", device="cpu"))
    model, mask = prepared.model.eval(), prepared.tokenizer.mask_token_id
    std = model.config.initializer_range
    assert model.bert.embeddings.position_embeddings.weight.std().item() == pytest.approx(std, 0.1)
    # What knows only its place sees its neighbours above all, the nearer the better.
    model.set_attn_implementation("eager")
    output = model(torch.full((1, 21), mask), output_attentions=True)
    seen = output.attentions[0].mean(1)[0, 10].detach()
    assert seen[10] > seen[11] > seen[12] > 1 / 21 > seen[20]
    assert seen[10] > seen[9] > seen[8] > 1 / 21 > seen[0]


@pytest.mark.parametrize("change", ["words", "tokenizer"])
def test_a_run_is_not_resumed_on_other_text(tmp_path, change):
    """Even where there is as much of it."""
    text = tmp_path / "text.txt"
    prose.write(text)
    first = prepare(Recipe([text], **SIZES), Settings(tmp_path / "first", device="cpu"))
    first.tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = Recipe([text], tokenizer=tmp_path / "tokenizer", max_length=32, **SIZES)
    settings = Settings(tmp_path / "out", device="cpu", max_steps=2, save_steps=1)
    pretrain(recipe, settings)
    if change == "words":
        text.write_text(text.read_text().replace(" cat ", " dog "))
    else:
        vocab = first.tokenizer.get_vocab()
        cat, dog = vocab["cat"], vocab["dog"]
        other = BertTokenizer(vocab=vocab | {"cat": dog, "dog": cat})
        other.save_pretrained(tmp_path / "tokenizer")
    more = dataclasses.replace(settings, resume=True, max_steps=2)
    with pytest.raises(ValueError, match=r"with text and tokenizer .*: it was started with"):
        pretrain(recipe, more)


def test_documents_that_are_left_out_are_told(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The cat sat.\n\n" * 7 + "\n\n".join(prose.documents(40)))
    with pytest.warns(UserWarning, match="7 of 47 documents are left out: they have one sentence"):
        prepare(Recipe([text], **SIZES), Settings(tmp_path / "out", device="cpu"))


def test_one_document_that_outweighs_all_is_told(tmp_path):
    text = tmp_path / "text.txt"
    prose.write(text)
    recipe = Recipe([text], validation_fraction=0.0, **SIZES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(recipe, Settings(tmp_path / "out", device="cpu"))
    whole = " ".join(prose.documents(200))
    text.write_text("\n\n".join([whole, *prose.documents(5)]))
    with pytest.warns(UserWarning, match="the second is of another document, half is BERT's"):
        prepare(recipe, Settings(tmp_path / "out", device="cpu"))


def saved(folder, vocab, **specials):
    """A tokenizer of words, with ids as they are given."""
    words = BertTokenizer(vocab=vocab).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=words, **specials).save_pretrained(folder)
    return folder


NAMED = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def test_ids_that_no_token_has(tmp_path):
    text = prose.write(tmp_path / "text.txt")
    vocab = prepare(Recipe([text], **SIZES), Settings(tmp_path, device="cpu")).tokenizer.get_vocab()
    gaps = {word: i if i < 50 else i + 20 for word, i in vocab.items()}
    recipe = Recipe([text], tokenizer=saved(tmp_path / "gaps", gaps, **NAMED), **SIZES)
    made = prepare(recipe, Settings(tmp_path / "out", device="cpu"))
    assert made.model.config.vocab_size == max(gaps.values()) + 1
    batch = made.collate([made.pairs[i] for i in range(len(made.pairs))])
    ids = batch["input_ids"]
    assert ids.max() == made.model.config.vocab_size - 1 and not ((ids >= 50) & (ids < 70)).any()


@pytest.mark.parametrize("name", ["cls", "sep", "pad"])
def test_a_tokenizer_without_a_special_token(tmp_path, name):
    text = prose.write(tmp_path / "text.txt")
    vocab = prepare(Recipe([text], **SIZES), Settings(tmp_path, device="cpu")).tokenizer.get_vocab()
    some = {key: value for key, value in NAMED.items() if key != f"{name}_token"}
    recipe = Recipe([text], tokenizer=saved(tmp_path / "some", vocab, **some), **SIZES)
    with pytest.raises(ValueError, match=f"the tokenizer has no {name} token"):
        prepare(recipe, Settings(tmp_path / "out", device="cpu"))


def test_text_that_the_tokenizer_knows_nothing_of(tmp_path):
    text = prose.write(tmp_path / "text.txt")
    made = prepare(Recipe([text], **SIZES), Settings(tmp_path / "a", device="cpu"))
    made.tokenizer.save_pretrained(tmp_path / "english")
    other = tmp_path / "other.txt"
    other.write_text("\u4f60\u597d\u3002\u518d\u89c1\u3002\n\n" * 8)
    recipe = Recipe([other], tokenizer=tmp_path / "english", **SIZES)
    with pytest.raises(ValueError, match="the tokenizer knows no token of the documents to train"):
        prepare(recipe, Settings(tmp_path / "b", device="cpu"))


def test_a_config_of_another_family(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "distilbert", "dim": 32}))
    recipe = Recipe([prose.write(tmp_path / "text.txt")], config=config, vocab_size=100)
    with pytest.raises(ValueError, match=r"config.json is the config of a 'distilbert', expected"):
        prepare(recipe, Settings(tmp_path / "out", device="cpu"))


def test_the_tokenizer_says_what_the_model_takes(tmp_path):
    config = tmp_path / "config.json"
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config.write_text(json.dumps({**sizes, "max_position_embeddings": 40}))
    text = prose.write(tmp_path / "text.txt")
    recipe = Recipe([text], config=config, vocab_size=100, max_length=32)
    made = prepare(recipe, Settings(tmp_path / "out", device="cpu"))
    assert made.tokenizer.model_max_length == 40


def test_nothing_to_resume_learns_the_tokenizer_anew(tmp_path):
    text = prose.write(tmp_path / "text.txt")
    settings = Settings(tmp_path / "out", device="cpu", resume=True)
    prepare(Recipe([text], **SIZES), settings)
    other = dataclasses.replace(Recipe([text], **SIZES), vocab_size=60)
    assert len(prepare(other, settings).tokenizer) == 60
    assert len(AutoTokenizer.from_pretrained(settings.output_dir / "tokenizer")) == 60
