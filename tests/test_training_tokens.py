"""The task `tokens`: pieces of words in lists, and words without a label."""

import dataclasses
import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from bert_fast.training.loop import Settings
from bert_fast.training.tags import tokens
from bert_fast.training.tasks import Job
from bert_fast.training.words import read_words

from . import tiny

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def byte_level(folder, pre_tokenizer, normalizer=None):
    """A RoBERTa whose tokenizer's class is no model's own; `Ġcat` is a word after a space."""
    pieces = [*SPECIALS, *sorted(ByteLevel.alphabet()), "ca", "cat", "Ġcat"]
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat")]
    made = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
    made.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        made.normalizer = normalizer
    named = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")
    special = dict(zip(named, SPECIALS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=len(pieces), max_position_embeddings=24, **sizes)
    RobertaModel(config).save_pretrained(folder)
    return folder


def job(model, tmp_path, rows):
    file = tmp_path / "train.jsonl"
    lines = [json.dumps({"tokens": words, "labels": labels}) for words, labels in rows]
    file.write_text("\n".join(lines))
    return Job("tokens", model, Settings(tmp_path / "out"), file)


WORDS = [(["cat", "cat"], ["A", "B"])]


@pytest.mark.parametrize("steps", [False, True])
def test_words_of_a_list_have_their_space(tmp_path, steps):
    part = ByteLevel(add_prefix_space=False)
    if steps:
        part = pre_tokenizers.Sequence([pre_tokenizers.Digits(), part])
    model = byte_level(tmp_path / "model", part)
    task = tokens(job(model, tmp_path, WORDS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert task.items[0]["input_ids"].tolist() == tokenizer(" cat cat")["input_ids"]
    assert task.items[0]["labels"].tolist() == [0, 1]
    task.save(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (
        saved(["cat", "cat"], is_split_into_words=True)["input_ids"]
        == saved(" cat cat")["input_ids"]
    )


def test_a_tokenizer_that_only_says_it_puts_a_space(tmp_path):
    model = byte_level(tmp_path / "model", ByteLevel(add_prefix_space=False))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["add_prefix_space"] = True
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    found = tokens(job(model, tmp_path, WORDS)).items[0]["input_ids"].tolist()
    assert found == tokenizer(" cat cat")["input_ids"]


def test_words_of_a_list_without_their_space(tmp_path):
    model = byte_level(tmp_path / "model", ByteLevel(False), normalizers.Replace(" ", "_"))
    with pytest.raises(ValueError, match="model: its tokenizer puts no space before the words"):
        tokens(job(model, tmp_path, WORDS))


# -- words without a label ------------------------------------------------------------------


def test_words_without_a_label(tmp_path):
    rows = [(["cat", "sat", "mats"], [-100, 1, -100]), (["a", "dog"], [0, 1]), (["the"], [-100])]
    model = tiny.save(tmp_path / "model")
    task = tokens(
        dataclasses.replace(job(model, tmp_path, rows), validation=tmp_path / "train.jsonl")
    )
    found = [item["labels"].tolist() for item in task.items]
    # [CLS] cat sat mat ##s [SEP]; a sentence without a label is left out.
    assert found == [[-100, -100, 1, -100, -100, -100], [-100, 0, 1, -100]]
    assert task.model.config.id2label == {0: "0", 1: "1"}
    assert 0 <= task.evaluate(task.model)["accuracy"] <= 1
    with pytest.raises(ValueError, match=r"train\.jsonl: no word has a label"):
        tokens(job(model, tmp_path, rows[2:]))


def test_words_without_a_label_in_conll(tmp_path):
    file = tmp_path / "train.conll"
    file.write_text("cat -100\nsat B\nmat O\n")
    task = tokens(Job("tokens", tiny.save(tmp_path / "model"), Settings(tmp_path / "out"), file))
    assert [item["labels"].tolist() for item in task.items] == [[-100, -100, 0, 1, -100]]


# -- CoNLL ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "# id 5239\tdomain=en\nEU _ _ B-ORG\nrejects _ _ O\n\n# id 5240\tdomain=en\n# _ _ O\n",
        "# sent_id = 1\n# text = EU rejects\nEU\t_\tB-ORG\nrejects\t_\tO\n\n# newdoc\n#\t_\tO\n",
        "#begin document (x)\n\nEU B-ORG\nrejects O\n\n# O\n\n#end\n",
    ],
)
def test_comments_are_no_words(tmp_path, text):
    file = tmp_path / "a.conll"
    file.write_text(text)
    found = read_words(file)
    assert found.words == [["EU", "rejects"], ["#"]]
    assert found.labels == [["B-ORG", "O"], ["O"]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("EU B-ORG\nNew York B-LOC\n", "line 2: 3 fields, expected 2 as in line 1"),
        ("# id 1\nEU _ O\n\n# a b c d\n\nPeter O\n", "line 6: 2 fields, expected 3 as in line 2"),
        ("EU _ O\n# a comment inside\n", "line 2: 4 fields, expected 3"),
        ("# a comment\n#\n", "'#', expected a word and its label"),
    ],
)
def test_other_numbers_of_fields_are_refused(tmp_path, text, told):
    (tmp_path / "a.conll").write_text(text)
    with pytest.raises(ValueError, match=told):
        read_words(tmp_path / "a.conll")
