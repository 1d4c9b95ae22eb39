"""sentence-transformers models, in memory and as folders: the vectors are those of the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn
from transformers import AutoTokenizer
from typer.testing import CliRunner

import bert_fast
from bert_fast.cli import app
from bert_fast.encode import embed
from bert_fast.sentence import sentence_settings

from . import tiny

library = pytest.importorskip("sentence_transformers")
TEXTS = [*tiny.TEXTS, "The CAT sat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def made(folder: Path, pooling: str = "mean", *more: nn.Module, **settings: Any) -> Any:
    from sentence_transformers.sentence_transformer import modules

    first = modules.Transformer(str(folder))
    pool = modules.Pooling(first.get_embedding_dimension(), pooling)
    return library.SentenceTransformer(modules=[first, pool, *more], device="cpu", **settings)


def normalised() -> nn.Module:
    from sentence_transformers.sentence_transformer.modules import Normalize

    return Normalize()


@pytest.mark.parametrize(
    ("pooling", "normalize", "settings"),
    [("mean", True, {}), ("cls", False, {}), ("mean", False, {"truncate_dim": 24})],
)
def test_what_a_model_says_itself(
    pooling: str, normalize: bool, settings: dict[str, Any], folder: Path, tokenizer: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = made(folder, pooling, *([normalised()] if normalize else []), **settings)
    model.max_seq_length = 6
    expected = model.encode(TEXTS)
    with pytest.warns(UserWarning, match="were cut to 6 tokens"):
        found = embed(model, tokenizer, TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    model.save(str(tmp_path / "st"))
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    line = ["embed", str(tmp_path / "texts"), "-o", str(tmp_path / "v.npy")]
    result = CliRunner().invoke(app, [*line, "--model", str(tmp_path / "st")])
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)


def test_what_is_told_comes_first(folder: Path, tokenizer: Any) -> None:
    model = made(folder, "cls")
    asked = {"pooling": "mean", "normalize": True, "max_length": 5}
    with pytest.warns(UserWarning, match="were cut to 5 tokens"):
        found = embed(model, tokenizer, TEXTS, **asked)
        expected = embed(model[0].auto_model, tokenizer, TEXTS, **asked)
    np.testing.assert_array_equal(found, expected)


def test_a_prompt_is_told_of(folder: Path, tokenizer: Any) -> None:
    model = made(folder, prompts={"query": "the: "}, default_prompt_name="query")
    with pytest.warns(UserWarning, match="its prompt 'query' is not put before the texts"):
        embed(model, tokenizer, ["a cat"])


def test_other_poolings_and_models_are_refused(folder: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="the model pools by max"):
        embed(made(folder, "max"), tokenizer, TEXTS)
    with pytest.raises(ValueError, match="CrossEncoder is more than its encoder"):
        embed(library.CrossEncoder(str(folder), device="cpu"), tokenizer, TEXTS)

    class Mine(library.SentenceTransformer):
        pass

    from sentence_transformers.sentence_transformer.modules import Dense

    dense = made(folder, "mean", Dense(32, 8))
    dense.__class__ = Mine
    with pytest.raises(ValueError, match="more than its encoder: it has Dense"):
        embed(dense, tokenizer, TEXTS)


def test_explain_of_a_model_that_calls_forward_itself(folder: Path) -> None:
    model = bert_fast.accelerate(made(folder))
    found = bert_fast.explain(model, {"input": model.preprocess(TEXTS)})
    assert not found.fallback and found.choices
    assert "forward" not in vars(model[0].auto_model)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ([("a", "b")], r"texts\[0\] is \('a', 'b'\), expected a str"),
        (["a", None], r"texts\[1\] is None"),
        ({"a": 1}, "expected several texts"),
        (None, "texts is None"),
    ],
)
def test_what_is_no_text(texts: Any, told: str, folder: Path, tokenizer: Any) -> None:
    model = made(folder)
    for call in (lambda: embed(model, tokenizer, texts),
                 lambda: bert_fast.verify(model[0].auto_model, texts, tokenizer)):  # fmt: skip
        with pytest.raises(TypeError, match=told):
            call()


def test_texts_of_any_kind_of_many(folder: Path, tokenizer: Any) -> None:
    model = made(folder)
    expected = embed(model, tokenizer, ["a cat", "the dog"])
    for texts in (iter(["a cat", "the dog"]), np.array(["a cat", "the dog"]), ("a cat", "the dog")):
        np.testing.assert_array_equal(embed(model, tokenizer, texts), expected)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("modules.json", "{}", "holds a dict, expected a list"),
        ("modules.json", '[{"idx": 0}]', "does not give each module's type and path"),
        ("modules.json", "[", "modules.json: "),
        ("1_Pooling/config.json", "[]", "holds a list, expected a dict"),
        ("1_Pooling/config.json", "{}", "names no pooling"),
        ("sentence_bert_config.json", '{"max_seq_length": -1}', "max_seq_length is -1"),
        ("sentence_bert_config.json", '{"max_seq_length": "many"}', "max_seq_length is 'many'"),
        ("config_sentence_transformers.json", "[]", "holds a list"),
    ],
)
def test_files_of_another_make(file: str, content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=told) as found:
        sentence_settings(tmp_path)
    assert str(tmp_path / file) in str(found.value)
