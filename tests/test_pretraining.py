"""Pre-training: text to sentences, corpus, pairs, masks; the commands from end to end."""

from __future__ import annotations

import csv
import gzip
import json
import time

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForPreTraining, BertTokenizer
from typer.testing import CliRunner

from bert_fast.cli import app
from bert_fast.training import corpus as corpora
from bert_fast.training.corpus import load_corpus
from bert_fast.training.masking import Masking
from bert_fast.training.pairs import Plan, SentencePairs, _exchange
from bert_fast.training.text import find_files, read_documents, split_sentences
from bert_fast.training.tokenizer import train_tokenizer

from . import prose, spy, tiny
from .test_cli import refused


def invoke(*line):
    return CliRunner().invoke(app, [*map(str, line)])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(lambda: prose.documents(60), 100)


@pytest.fixture(scope="module")
def corpus(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    prose.write(folder / "text.txt", 800)
    return load_corpus([folder / "text.txt"], tokenizer, folder / "made", "text")


# -- text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
        ("It cost 3.5 dollars, e.g. in May. (So it was.) 12 went.",
         ["It cost 3.5 dollars, e.g. in May.", "(So it was.)", "12 went."]),
        ("Wait... what? \u00c9t\u00e9 came.", ["Wait... what?", "\u00c9t\u00e9 came."]),
        ("\u4f60\u597d\u3002\u518d\u89c1\u3002", ["\u4f60\u597d\u3002", "\u518d\u89c1\u3002"]),
        ("\u0915\u0964\u0916\u0965 \u0639\u061f \u063a",
         ["\u0915\u0964", "\u0916\u0965", "\u0639\u061f", "\u063a"]),
        ("  ", []),
    ],
)  # fmt: skip
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_a_line_of_dots_is_read_at_once():
    """From each of its dots on, it took minutes."""
    start = time.perf_counter()
    assert split_sentences("." * 100_000 + "x. Two.") == ["." * 100_000 + "x.", "Two."]
    assert time.perf_counter() - start < 10


def test_documents_of_every_format(tmp_path):
    plain = "One line.\nAnd another.\r\n\n \n\nNext document.\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + plain.encode())
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(plain.encode()))
    with (tmp_path / "c.csv").open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerows([["id", "text"], [1, "A row,\n\nwith lines."], [2, ""], [3, "x" * 200_000]])
    lines = [json.dumps({"text": "A line."}), "", json.dumps({"text": "B."})]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    blocks = ["One line. And another.", "Next document."]
    expected = [*blocks, *blocks, "A row, with lines.", "x" * 200_000, "A line.", "B."]
    files = find_files([tmp_path / "*"])
    assert [file.name[0] for file in files] == list("abcd")
    assert list(read_documents(files)) == expected
    assert find_files([tmp_path / "a.txt", tmp_path / "a*"]) == [tmp_path / "a.txt"]


def test_text_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder: name its files, as in .*\*\.txt"):
        find_files([tmp_path])
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        find_files([tmp_path / "none.txt"])
    for name, data, told in (
        ("a.txt", "na\u00efve".encode("latin-1"), "not UTF-8"),
        ("b.jsonl", b'{"body": "x"}', "no field 'text'"),
        ("b.JSONL", b'{"text": null}', "field 'text' is None, expected a string"),
        ("c.jsonl", b'{"text": "a"}\n\n{', "line 3: not JSON"),
        ("d.csv", b"id\n1\n", "line 2: no field 'text'"),
        ("d.csv", b"id,text\n1,a\n2,b, and c\n", "line 3: 3 fields, expected 2 as in the header"),
        ("d.csv", b"id,text\n1\n", "line 2: 1 fields, expected 2"),
        ("d.csv", b'id,text\n1,"a\n2,b\n', "line 2: not CSV"),
        ("d.csv", b"text,text\na,b\n", "names 'text' more than once"),
        ("e.jsonl", b'["x"]', "line 1: no field 'text'"),
        ("f.gz", b"not gzip", "gzip"),
        ("g.tsv", b"text\na\n", ".tsv is not read"),
        ("h.txt", "a cat".encode("utf-16-le"), "a NUL byte, expected UTF-8"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: .*{told}"):
            list(read_documents([tmp_path / name]))


# -- corpus ---------------------------------------------------------------------------------


def test_corpus_holds_every_sentence(corpus, tokenizer):
    documents = prose.documents(800)
    assert len(corpus.documents) == 801
    for d in (0, 17, 799):
        first, last = corpus.documents[d : d + 2]
        expected = split_sentences(documents[d])
        assert last - first == len(expected)
        for s, sentence in zip(range(first, last), expected, strict=True):
            ids = corpus.tokens(corpus.sentences[s], corpus.sentences[s + 1])
            assert ids.tolist() == tokenizer(sentence, add_special_tokens=False)["input_ids"]


def test_corpus_is_made_once_in_shards(tokenizer, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    prose.write(text, 800)
    whole = load_corpus([text], tokenizer, tmp_path / "whole", "text")
    monkeypatch.setattr(corpora, "SHARD", 5_000)
    parts = load_corpus([text], tokenizer, tmp_path / "parts", "text")
    assert len(whole.shards) == 1 and len(parts.shards) > 3
    np.testing.assert_array_equal(np.concatenate(parts.shards), whole.shards[0])
    for start, end in zip(parts.sentences[:-1:97], parts.sentences[1::97], strict=True):
        np.testing.assert_array_equal(parts.tokens(start, end), whole.tokens(start, end))
    monkeypatch.setattr(corpora, "read_documents", None)  # a second run reads no text
    load_corpus([text], tokenizer, tmp_path / "parts", "text")
    monkeypatch.undo()
    text.write_text(text.read_text().replace("Cat", "Dog", 1))
    other = load_corpus([text], tokenizer, tmp_path / "parts", "text")
    assert len(list((tmp_path / "parts").iterdir())) == 2
    assert not np.array_equal(other.shards[0], whole.shards[0])


def test_long_sentences_are_cut(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("cat " * 300)
    found = load_corpus([tmp_path / "a.txt"], tokenizer, tmp_path / "made", "text")
    assert np.diff(found.sentences).tolist() == [128, 128, 44]


# -- pairs ----------------------------------------------------------------------------------


def test_pairs(corpus, tokenizer):
    kept, held = corpus.split(0.1, seed=0)
    assert len(held) == 80 and sorted([*kept, *held]) == list(range(800))
    pairs = SentencePairs(corpus, kept, tokenizer, Masking.of(tokenizer), 48, seed=0)
    plan = pairs.plan(0)
    document = lambda token: np.searchsorted(  # noqa: E731
        corpus.sentences[corpus.documents], token, side="right"
    )
    a, b = document(plan.a_start), document(plan.b_start)
    assert np.isin(a - 1, kept).all() and np.isin(b - 1, kept).all()
    assert (a == document(plan.a_end - 1)).all() and (b == document(plan.b_end - 1)).all()
    assert ((a == b) == ~plan.foreign).all()
    assert plan.foreign.mean() == pytest.approx(0.5, abs=0.01)
    assert (plan.b_start >= plan.a_end)[~plan.foreign].all()
    assert plan.lengths().max() == 48
    assert (plan.a_end > plan.a_start).all() and (plan.b_end > plan.b_start).all()
    full = (plan.lengths() == 48).mean()
    assert 0.4 < full < 0.95  # 10 % are shorter on purpose, and the ends of documents
    covered = np.unique(a)
    assert len(covered) > 0.9 * len(kept)
    again = SentencePairs(corpus, kept, tokenizer, Masking.of(tokenizer), 48, seed=0)
    for one, other in zip(plan, again.plan(0), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(plan.a_start, pairs.plan(1).a_start)


def test_of_one_document_no_b_is_foreign():
    starts = np.arange(0, 60, 10)
    plan = Plan(starts, starts + 4, starts + 4, starts + 9, np.zeros(6, dtype=bool))
    found = _exchange(np.random.default_rng(0), np.zeros(6, dtype=np.int64), plan)
    for one, other in zip(found, plan, strict=True):
        np.testing.assert_array_equal(one, other)


def test_lengths_do_not_tell_whether_b_follows(corpus, tokenizer):
    kept, _ = corpus.split(0.0, seed=0)
    pairs = SentencePairs(corpus, kept, tokenizer, Masking.of(tokenizer), 48, seed=0)
    plans = [pairs.plan(epoch) for epoch in range(8)]
    foreign = np.concatenate([plan.foreign for plan in plans])
    a = np.concatenate([plan.a_end - plan.a_start for plan in plans])
    b = np.concatenate([plan.b_end - plan.b_start for plan in plans])
    stop = tokenizer.convert_tokens_to_ids(".")
    ids = corpus.shards[0]
    stops = np.concatenate([ids[plan.b_end - 1] == stop for plan in plans])
    for told in (a, b, a + b, stops, a == b, np.abs(a - b)):
        # The standard error of a difference of means, which the truth 0 exceeds rarely.
        one, other = told[foreign].astype(float), told[~foreign].astype(float)
        error = np.sqrt(one.var() / len(one) + other.var() / len(other))
        assert abs(one.mean() - other.mean()) < 4 * error


def test_items_are_functions_of_seed_epoch_and_index(corpus, tokenizer):
    kept, _ = corpus.split(0.0, seed=0)
    pairs = SentencePairs(corpus, kept, tokenizer, Masking.of(tokenizer), 48, seed=0)
    first = pairs[5]
    pairs.set_epoch(1)
    second = pairs[5]
    pairs.set_epoch(0)
    again = pairs[5]
    np.testing.assert_array_equal(first["input_ids"], again["input_ids"])
    assert not np.array_equal(first["input_ids"], second["input_ids"])
    ids = np.where(first["labels"] == -100, first["input_ids"], first["labels"])
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert ids[0] == cls and ids[-1] == sep and ids[first["token_type_ids"].argmax() - 1] == sep
    assert (ids == sep).sum() == 2 and (ids == cls).sum() == 1


def test_pairs_refuse(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n\nThree. Four.\n\nFive.\n")
    made = load_corpus([tmp_path / "a.txt"], tokenizer, tmp_path / "made", "text")
    with pytest.raises(ValueError, match=r"1 of 4 documents have two sentences"):
        SentencePairs(made, np.arange(4), tokenizer, Masking.of(tokenizer), 48, 0)
    with pytest.raises(ValueError, match=r"1 of 4 documents .* 2 of them to train on and 2 to"):
        made.split(0.9, 0)


def test_documents_of_one_sentence_are_on_neither_side(tokenizer, tmp_path):
    text = "".join(f"The cat {i}.{' A dog sat.' * (i % 2)}\n\n" for i in range(40))
    (tmp_path / "a.txt").write_text(text)
    made = load_corpus([tmp_path / "a.txt"], tokenizer, tmp_path / "made", "text")
    for seed in range(8):
        train, held = made.split(0.05, seed)
        assert len(held) == 2 and sorted([*train, *held]) == list(range(1, 40, 2))


# -- masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.15, 0.3])
def test_masking_is_80_10_10_of_a_share(tokenizer, share):
    masking = Masking.of(tokenizer, share=share)
    random = np.random.default_rng(0)
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    ids = random.choice(ordinary, 200_000)
    ids[::40] = tokenizer.sep_token_id
    masked, labels = masking(ids, np.random.default_rng(1))
    chosen = labels != -100
    assert chosen.sum() == round(share * (ids != tokenizer.sep_token_id).sum())
    assert not chosen[::40].any()
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(masked[~chosen], ids[~chosen])
    became = masked[chosen]
    hidden = (became == tokenizer.mask_token_id).mean()
    kept = (became == ids[chosen]).mean()
    assert hidden == pytest.approx(0.8, abs=0.01)
    assert kept == pytest.approx(0.1 + 0.1 / len(ordinary), abs=0.01)
    others = became[(became != tokenizer.mask_token_id) & (became != ids[chosen])]
    assert not np.isin(others, tokenizer.all_special_ids).any()
    assert len(np.unique(others)) > 0.9 * len(ordinary)
    short = masking(np.array([2, 7, 3]), np.random.default_rng(0))[1]
    assert (short != -100).sum() == 1


def test_whole_words_are_masked_together():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c", "##d"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    random = np.random.default_rng(0)
    ids = np.array([2, *random.choice([5, 6, 7, 7, 8], 500), 3, 7, 8, 5, 7, 3])
    _, labels = Masking.of(tokenizer, whole_words=True)(ids, random)
    chosen = labels != -100
    pieces = np.isin(ids, [7, 8])
    for i in range(1, len(ids)):
        if pieces[i] and ids[i - 1] not in (2, 3):
            assert chosen[i] == chosen[i - 1], i
    assert 0.12 * len(ids) < chosen.sum() <= 0.15 * len(ids)
    _, single = Masking.of(tokenizer)(ids, random)
    assert any((single[1:] != -100)[pieces[1:]] != (single[:-1] != -100)[pieces[1:]])


# -- commands -------------------------------------------------------------------------------

SIZES = ("--layers", 2, "--hidden", 32, "--heads", 2, "--device", "cpu", "--lr", 3e-3)


def test_pretrain_from_text_to_a_checkpoint(tmp_path, monkeypatch):
    text, out = prose.write(tmp_path / "text.txt", 120), tmp_path / "out"
    line = ["pretrain", text, "-o", out, "--vocab-size", 100, *SIZES, "--max-length", 48]
    line += ["--batch-tokens", 500, "--epochs", 6, "--whole-word", "--optimizer", "adamw"]
    seen = spy.forwards(monkeypatch, BertForPreTraining)
    done = invoke(*line)
    assert done.exit_code == 0, done.output
    wanted = [one.rows for one in seen if one.training]
    assert wanted and all(rows is not None for rows in wanted)  # the scored tokens alone
    metrics = json.loads((out / "metrics.json").read_text())
    history = [row for row in metrics["history"] if "loss" in row]
    first, last = history[0], history[-1]
    assert first["mlm_loss"] == pytest.approx(np.log(100), rel=0.1)
    assert first["nsp_loss"] == pytest.approx(np.log(2), rel=0.1)
    assert last["mlm_loss"] < 0.8 * first["mlm_loss"]
    assert last["loss"] == pytest.approx(last["mlm_loss"] + last["nsp_loss"], rel=1e-5)
    assert metrics["mlm_loss"] < 0.8 * np.log(100)
    assert 0 < metrics["mlm_accuracy"] < 1 and 0 < metrics["nsp_accuracy"] < 1
    with (out / "metrics.csv").open() as opened:
        assert len(list(csv.DictReader(opened))) == len(history)
    # transformers' own classes read what was written.
    model = BertForPreTraining.from_pretrained(out)
    loaded = AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(loaded) and model.config.num_hidden_layers == 2
    batch = loaded("The cat sees.", "A dog.", return_tensors="pt")
    assert torch.isfinite(model(**batch).prediction_logits).all()
    # And it can go on from there, with its own tokenizer.
    more = ["pretrain", text, "-o", tmp_path / "more", "--model", out, "--steps", 2]
    done = invoke(*more, "--batch-size", 8, "--device", "cpu", "--validation-fraction", 0)
    assert done.exit_code == 0, done.output
    row = json.loads((tmp_path / "more" / "metrics.json").read_text())["history"][0]
    assert row["mlm_loss"] < 0.9 * first["mlm_loss"]


def test_train_tokenizer(tmp_path):
    text, out = prose.write(tmp_path / "text.txt"), tmp_path / "out"
    done = invoke("train-tokenizer", text, "-o", out, "--vocab-size", 60)
    assert done.exit_code == 0, done.output
    for cls in (AutoTokenizer, BertTokenizer):
        loaded = cls.from_pretrained(out)
        assert len(loaded) <= 60
        ids = loaded("The C\u00c1T sees", "a dog")["input_ids"]
        assert loaded.decode(ids) == "[CLS] the cat sees [SEP] a dog [SEP]"
    kept = train_tokenizer(lambda: ["The Cat sees a Cat"] * 3, 40, lowercase=False)
    assert "Cat" in kept.get_vocab() or "##at" in kept.get_vocab()
    again = train_tokenizer(lambda: prose.documents(60), 60)
    assert again.get_vocab() == AutoTokenizer.from_pretrained(out).get_vocab()


def test_pretrain_refuses(tmp_path):
    text, out = prose.write(tmp_path / "text.txt"), tmp_path / "out"
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    small = ("pretrain", text, "-o", out, *SIZES, "--vocab-size", 100)
    refused(invoke("pretrain", tmp_path / "none", "-o", out), "none", "no such file")
    refused(invoke("pretrain", empty, "-o", out), "the corpus is empty")
    refused(invoke("pretrain", text, "-o", out, "--vocab-size", 20), "vocab_size is 20")
    refused(invoke(*small, "--hidden", 33), "hidden 33", "heads 2")
    refused(invoke(*small, "--intermediate", 0), "intermediate is 0")
    refused(invoke(*small, "--max-length", 3), "max_length is 3")
    refused(invoke(*small, "--batch-tokens", 10), "one example has")
    refused(invoke(*small, "--batch-size", 0), "batch_size is 0")
    refused(invoke(*small, "--dtype", "fp8"), "unknown dtype 'fp8'")
    refused(invoke(*small, "--optimizer", "sgd"), "unknown optimizer 'sgd'")
    refused(invoke(*small, "--validation-fraction", 1.5), "validation_fraction is 1.5")
    refused(invoke(*small, "--mlm-probability", 1), "mlm_probability is 1.0, expected more than 0")
    refused(invoke(*small, "--start", "zero"), "start is 'zero'", "bert, mimetic")
    refused(invoke(*small, "--tokenizer", tmp_path / "none"), "no folder")
    refused(invoke(*small, "--model", tmp_path / "none"), "no folder")
    refused(invoke(*small, "--config", tmp_path / "none.json"), "no file")
    broken = tiny.save(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    refused(invoke(*small, "--model", broken), "cannot load", "broken")
    config = tmp_path / "config.json"
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config.write_text(json.dumps({**sizes, "max_position_embeddings": 40}))
    refused(invoke(*small, "--config", config), "max_length is 128", "40 positions")
    line = (*small, "--config", config, "--max-length", 32)
    refused(invoke(*line), "tokenizer has", "vocabulary 50")
    refused(invoke("train-tokenizer", empty, "-o", out), "the corpus is empty")
    refused(invoke("train-tokenizer", text, "-o", empty), "empty.txt: File exists")
    refused(invoke("train-tokenizer", text, "-o", broken), "broken holds a model")
