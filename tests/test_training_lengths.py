"""How many tokens of a text are kept: what is asked for, as far as the model's positions go."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification
from typer.testing import CliRunner

from bert_fast.cli import app
from bert_fast.training.embedding import embedding
from bert_fast.training.loop import Settings
from bert_fast.training.pretrain import Recipe, prepare
from bert_fast.training.tasks import Job, token_limit

from . import prose, tiny


@pytest.mark.parametrize(
    ("own", "asked", "kept"), [(8, None, 8), (8, 20, 20), (8, 24, 24), (99, None, 24)]
)
def test_embedding_keeps_what_is_asked_for(tmp_path, own, asked, kept):
    library = pytest.importorskip("sentence_transformers")
    made = library.SentenceTransformer(str(tiny.save(tmp_path / "model")), device="cpu")
    made.max_seq_length = own
    made.save(str(tmp_path / "own"))
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"text": "the cat " * 30, "text_b": "a dog"}) + "\n")
    job = Job("embedding", tmp_path / "own", Settings(tmp_path), file, max_length=asked)
    task = embedding(job)
    assert task.items[0]["meet"] == kept
    task.save(tmp_path / "out")
    assert library.SentenceTransformer(str(tmp_path / "out"), device="cpu").max_seq_length == kept


def test_embedding_refuses_more_than_the_positions(tmp_path):
    pytest.importorskip("sentence_transformers")
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"text": "the cat", "text_b": "a dog"}) + "\n")
    model = tiny.save(tmp_path / "model")
    with pytest.raises(ValueError, match="--max-length is 25, expected 8 to 24"):
        embedding(Job("embedding", model, Settings(tmp_path), file, max_length=25))


def test_a_model_that_says_more_than_its_positions(tmp_path):
    model = tiny.save(tmp_path / "model")
    (model / "sentence_bert_config.json").write_text('{"max_seq_length": 26}')
    text = tmp_path / "texts.txt"
    text.write_text("the cat " * 30 + "\n")
    line = ["embed", text, "-o", tmp_path / "x.npy", "--model", model]
    result = CliRunner().invoke(app, [*map(str, line)])
    assert "1 of 1 texts were cut to 24 tokens" in result.stderr, result.output
    assert np.load(tmp_path / "x.npy").shape == (1, 32)


def test_positions_behind_that_of_padding(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=30, max_position_embeddings=22, pad_token_id=1, **sizes)
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(config)
    tokenizer = AutoTokenizer.from_pretrained(tiny.save(tmp_path / "model"))
    tokenizer.model_max_length = 12  # which bounds what is not asked for alone
    assert [token_limit(model, tokenizer, asked) for asked in (None, 20)] == [12, 20]
    assert token_limit(model, tokenizer, None, usual=9) == 9
    with pytest.raises(ValueError, match="expected 8 to 20"):
        token_limit(model, tokenizer, 21)


@pytest.mark.parametrize("longest", [64, 600])
def test_a_pretrained_models_tokenizer_says_what_it_takes(tmp_path, longest):
    text = prose.write(tmp_path / "text.txt", 120)
    recipe = Recipe([text], vocab_size=100, layers=1, hidden=32, heads=2, max_length=longest)
    made = prepare(recipe, Settings(tmp_path / "out", device="cpu"))
    assert made.tokenizer.model_max_length == made.model.config.max_position_embeddings
    assert made.tokenizer.model_max_length == max(512, longest)
