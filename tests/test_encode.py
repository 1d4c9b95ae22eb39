"""bert_fast.encode against transformers on padded batches, and its own promises."""

import copy
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertForMaskedLM,
    BertModel,
    MegatronBertConfig,
    MegatronBertModel,
    RobertaConfig,
    RobertaModel,
)
from transformers.models.bert.modeling_bert import BertSelfOutput

import bert_fast
from bench import assets
from bert_fast.encode import batches, embed, tokenize
from bert_fast.ops.backends import best_isa
from bert_fast.sentence import sentence_settings

from . import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(folder):
    return AutoModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def truth(model, tokenizer, texts, pooling="mean", normalize=True):
    """What transformers computes, one text at a time, pooled in float64."""
    rows = []
    for text in texts:
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double()
        row = hidden[0] if pooling == "cls" else hidden.mean(0)
        rows.append(nn.functional.normalize(row, dim=0) if normalize else row)
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("batch_tokens", [1, 20, 16_384])
def test_matches_transformers(model, tokenizer, batch_tokens, pooling, normalize):
    expected = truth(model, tokenizer, tiny.TEXTS, pooling, normalize)
    found = embed(
        model,
        tokenizer,
        tiny.TEXTS,
        batch_tokens=batch_tokens,
        pooling=pooling,
        normalize=normalize,
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_order_is_that_of_the_texts(model, tokenizer):
    found = embed(model, tokenizer, tiny.TEXTS, batch_tokens=9)
    backwards = embed(model, tokenizer, tiny.TEXTS[::-1], batch_tokens=9)
    np.testing.assert_allclose(found, backwards[::-1], atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder, model, tokenizer, dtype):
    half = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    found = embed(half, tokenizer, tiny.TEXTS)
    assert (found * truth(model, tokenizer, tiny.TEXTS)).sum(1).min() > 0.999
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)


def test_accelerated_and_inner_models_are_taken(folder, model, tokenizer):
    plain = embed(model, tokenizer, tiny.TEXTS)
    head = BertForMaskedLM.from_pretrained(folder).eval()
    np.testing.assert_array_equal(embed(head, tokenizer, tiny.TEXTS), plain)
    accelerated = bert_fast.accelerate(model)
    np.testing.assert_array_equal(embed(accelerated, tokenizer, tiny.TEXTS), plain)


def test_no_texts(model, tokenizer):
    found = embed(model, tokenizer, [])
    assert found.shape == (0, 32) and found.dtype == np.float32


def test_training_mode_is_left_as_it_was(model, tokenizer):
    expected = embed(model, tokenizer, tiny.TEXTS)
    model.train()
    np.testing.assert_array_equal(embed(model, tokenizer, tiny.TEXTS), expected)
    assert model.training and model.encoder.training
    model.encoder.eval()  # frozen below a head that is trained, say
    embed(model, tokenizer, tiny.TEXTS)
    assert model.training and not model.encoder.training


def test_a_mode_that_is_set_is_not_set_again(model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(model), "train", lambda self, mode=True: pytest.fail("set again"))
    embed(model, tokenizer, tiny.TEXTS[:1])


def test_progress_adds_up(model, tokenizer):
    seen = []
    embed(model, tokenizer, tiny.TEXTS, batch_tokens=20, progress=lambda n, t: seen.append((n, t)))
    assert len(seen) > 1
    assert sum(n for n, _ in seen) == len(tiny.TEXTS)
    assert sum(t for _, t in seen) == len(tokenize(tokenizer, tiny.TEXTS, 24).ids)


def test_equal_texts_are_computed_once(model, tokenizer):
    """And come out in their places; what is told of progress counts every text."""
    texts = [tiny.TEXTS[i] for i in (2, 0, 2, 1, 0, 2)]
    seen, ran = [], []

    def watch(op, args):
        if op.name == "embed_layernorm":
            ran.append(args[0].shape[0])
        return op.choose(args)

    found = embed(model, tokenizer, texts, backend=watch, progress=lambda n, t: seen.append((n, t)))
    np.testing.assert_array_equal(
        found, embed(model, tokenizer, tiny.TEXTS[:3])[[2, 0, 2, 1, 0, 2]]
    )
    assert ran == [len(tokenize(tokenizer, tiny.TEXTS[:3], 24).ids)]
    assert seen == [(6, len(tokenize(tokenizer, texts, 24).ids))]


def test_what_the_model_was_accelerated_with_holds(model, tokenizer):
    ran = []

    def watch(op, args):
        ran.append(op.name)
        return op.choose(args)

    ours = bert_fast.accelerate(copy.deepcopy(model), backend=watch)
    np.testing.assert_array_equal(
        embed(ours, tokenizer, tiny.TEXTS), embed(model, tokenizer, tiny.TEXTS)
    )
    assert "embed_layernorm" in ran
    ran.clear()
    embed(ours, tokenizer, tiny.TEXTS, backend="auto")
    assert not ran


@pytest.mark.skipif(best_isa() == 0, reason="8-bit products of models need AVX2")
def test_a_model_in_int8_embeds_in_int8(model, tokenizer):
    ours = bert_fast.accelerate(copy.deepcopy(model), dtype="int8")
    found, exact = embed(ours, tokenizer, tiny.TEXTS), embed(model, tokenizer, tiny.TEXTS)
    assert np.abs(found - exact).max() > 1e-5
    assert (found * exact).sum(1).min() > 0.999


def test_the_tokenizer_may_take_fewer_tokens_than_the_model(model, folder):
    shorter = AutoTokenizer.from_pretrained(folder, model_max_length=8)
    with pytest.warns(UserWarning, match="3 of 7 texts were cut to 8 tokens"):
        embed(model, shorter, tiny.TEXTS)


def test_truncation_is_told_once_with_its_count(model, tokenizer):
    with pytest.warns(UserWarning, match="3 of 7 texts were cut to 8 tokens") as told:
        found = embed(model, tokenizer, tiny.TEXTS, max_length=8)
    assert len(told) == 1
    cut = tokenizer(tiny.TEXTS[3], truncation=True, max_length=8, return_tensors="pt")
    with torch.inference_mode():
        mean = model(**cut).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(found[3], nn.functional.normalize(mean, dim=0), atol=5e-6)


def test_a_text_over_the_position_table_is_cut_to_it(model, tokenizer):
    with pytest.warns(UserWarning, match="1 of 2 texts were cut to 24 tokens"):
        found = embed(model, tokenizer, ["the cat " * 50, "a dog"])
    assert np.isfinite(found).all()


def test_positions_that_begin_behind_padding(tokenizer):
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=26, pad_token_id=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="cut to 24 tokens"):
        assert np.isfinite(embed(RobertaModel(config).eval(), tokenizer, ["the cat " * 50])).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "max"}, "pooling is 'max', expected one of"),
        ({"batch_tokens": 0}, "batch_tokens is 0, expected a number of at least 1"),
        ({"max_length": 25}, "max_length is 25, expected 3 .* to 24"),
        ({"max_length": 2}, "max_length is 2, expected 3 "),
        ({"batch_tokens": "7"}, "batch_tokens is '7', expected a number"),
        ({"backend": "nonesuch"}, "nonesuch"),
        ({"backend": {"zz": "reference"}}, "no op 'zz'"),
    ],
)
def test_wrong_arguments_are_named(model, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        embed(model, tokenizer, tiny.TEXTS, **arguments)


def test_a_number_of_numpys_is_a_number(model, tokenizer):
    assert embed(model, tokenizer, ["the cat"], batch_tokens=np.int64(7)).shape[0] == 1


def test_one_text_is_not_its_characters(model, tokenizer):
    for call in (lambda: embed(model, tokenizer, "the cat"),
                 lambda: bert_fast.verify(model, "the cat", tokenizer)):  # fmt: skip
        with pytest.raises(TypeError, match="texts is 'the cat', expected several texts"):
            call()


def test_models_that_cannot_run_packed_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="Linear contains 0 transformers encoders"):
        embed(nn.Linear(2, 2), tokenizer, ["a"])
    other = MegatronBertModel(MegatronBertConfig(num_hidden_layers=1, hidden_size=64))
    with pytest.raises(ValueError, match="MegatronBertModel contains 0 transformers encoders"):
        embed(other, tokenizer, ["a"])
    decoder = AutoModel.from_pretrained(tiny.save(tmp_path, is_decoder=True))
    with pytest.raises(ValueError, match="cannot run packed: it is a decoder"):
        embed(decoder, tokenizer, ["a"])


def test_what_accelerate_refuses_is_not_embedded(model, tokenizer, monkeypatch):
    class Mine(BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="Mine is a subclass with code of its own"):
        embed(Mine(model.config), tokenizer, ["a"])
    forward = BertSelfOutput.forward
    monkeypatch.setattr(BertSelfOutput, "forward", lambda self, h, x: forward(self, h * 1.01, x))
    with pytest.raises(ValueError, match="bert_fast does not know BertModel"):
        embed(model, tokenizer, ["a"])


def test_a_slow_tokenizer_is_refused(model):
    class Slow:
        is_fast = False
        model_max_length = 24

    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        embed(model, Slow(), ["a"])


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_every_text_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths, np.int64)
    found = list(batches(lengths, budget))
    assert sorted(i for rows in found for i in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or lengths[rows].sum() <= budget for rows in found)
    flat = [lengths[i] for rows in found for i in rows]
    assert flat == sorted(flat, reverse=True)
    # No batch is cut short: the next text would not have fitted.
    for rows, after in itertools.pairwise(found):
        assert lengths[rows].sum() + lengths[after[0]] > budget


def test_more_than_an_encoder_is_refused(model, tokenizer):
    """Whatever else makes the vectors would be left out."""
    other = copy.deepcopy(model)
    other.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="a hook or a replaced method sits on its BertModel"):
        embed(other, tokenizer, ["a"])
    prompted = nn.Sequential(model)
    prompted.active_peft_config = SimpleNamespace(is_prompt_learning=True)
    with pytest.raises(ValueError, match="it puts learned tokens before each text"):
        embed(prompted, tokenizer, ["a"])


def sentence_folder(folder, pooling, *kinds):
    modules = [{"type": f"x.{kind}", "path": f"{i}_{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["cls"]}, "cls"),
    ],
)
def test_sentence_settings(tmp_path, pooling, expected):
    folder = sentence_folder(tmp_path, pooling, "Transformer", "Pooling", "Normalize")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 17}')
    found = sentence_settings(folder)
    assert (found.pooling, found.normalize, found.max_length) == (expected, True, 17)


def test_sentence_settings_of_a_plain_folder(tmp_path):
    found = sentence_settings(tmp_path)
    assert (found.pooling, found.normalize, found.max_length) == (None, None, None)


def test_sentence_settings_refuse_what_is_not_served(tmp_path):
    folder = sentence_folder(tmp_path, {"pooling_mode": "max"}, "Transformer", "Pooling")
    with pytest.raises(ValueError, match="pools by max"):
        sentence_settings(folder)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": ["cls", "mean"]}')
    with pytest.raises(ValueError, match=r"pools by cls \+ mean"):
        sentence_settings(folder)
    (folder / "modules.json").write_text('[{"type": "x.Dense", "path": "2_Dense"}]')
    with pytest.raises(ValueError, match="has Dense, which is not served"):
        sentence_settings(folder)


@pytest.mark.slow
def test_real_sentences_match_sentence_transformers():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    try:
        path, texts = assets.minilm(), assets.movie_sentences()[:200]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    encoder = sentence_transformers.SentenceTransformer(str(path), device="cpu")
    own = sentence_settings(path)
    assert (own.pooling, own.normalize, own.max_length) == ("mean", True, 256)
    found = embed(encoder, AutoTokenizer.from_pretrained(path), texts)
    np.testing.assert_allclose(found, encoder.encode(texts), atol=5e-6)
