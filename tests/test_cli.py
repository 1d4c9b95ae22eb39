"""The command line: what it writes, what it refuses, and how fast it answers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

import bert_fast
from bert_fast import console, doctor
from bert_fast.cli import app, save
from bert_fast.encode import embed
from bert_fast.ops.backends import best_isa

from . import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder):
    model = AutoModel.from_pretrained(folder).eval()
    return embed(model, AutoTokenizer.from_pretrained(folder), tiny.TEXTS)


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"{text}\n" for text in tiny.TEXTS))
    return file


@pytest.fixture
def bert_fast_embed(folder, tmp_path):
    """Runs `bert-fast embed`; gives the result and the array, None where none was written."""

    def run(*arguments, model=folder, stdin=None):
        out = tmp_path / "out.npy"
        out.unlink(missing_ok=True)
        line = ["embed", *map(str, arguments), "-o", str(out), "--model", str(model)]
        result = CliRunner().invoke(app, line, input=stdin)
        return result, np.load(out) if out.exists() else None

    return run


def refused(result, *words):
    """Exit code 2 and one line that holds these words."""
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2, result.output
    assert len(lines) == 1 and lines[0].startswith("bert-fast: "), lines
    assert all(str(word) in lines[0] for word in words), lines


def test_text(bert_fast_embed, text_file, expected):
    result, array = bert_fast_embed(text_file)
    assert result.exit_code == 0, result.output
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, expected, atol=5e-6)
    assert "7 texts, " in result.stderr and "texts/s" in result.stderr


def test_stdin(bert_fast_embed, text_file, expected):
    _, array = bert_fast_embed("-", stdin=text_file.read_bytes())
    np.testing.assert_allclose(array, expected, atol=5e-6)


def test_json_lines(bert_fast_embed, tmp_path, expected):
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(tiny.TEXTS)]
    lines[1] = ""  # TEXTS[1] is the empty text
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    _, array = bert_fast_embed(tmp_path / "texts.jsonl")
    np.testing.assert_allclose(array, expected, atol=5e-6)


def test_a_named_field_makes_any_input_json_lines(bert_fast_embed, expected):
    lines = "".join(json.dumps({"body": text}) + "\n" for text in tiny.TEXTS)
    _, array = bert_fast_embed("-", "--text-field", "body", stdin=lines)
    np.testing.assert_allclose(array, expected, atol=5e-6)


@pytest.mark.parametrize(
    ("data", "rows"),
    [(b"", 0), (b"\n", 1), (b"a", 1), (b"a\n", 1), (b"a\r\nb\r\n", 2), (b"a\n\n\nb", 4)],
)
def test_one_row_per_line(bert_fast_embed, tmp_path, data, rows):
    (tmp_path / "in.txt").write_bytes(data)
    _, array = bert_fast_embed(tmp_path / "in.txt")
    assert array.shape == (rows, 32)


def test_line_ends_and_byte_order_mark_are_no_text(bert_fast_embed):
    _, plain = bert_fast_embed("-", stdin=b"a cat\na dog\n")
    _, windows = bert_fast_embed("-", stdin=b"\xef\xbb\xbfa cat\r\na dog\r\n")
    np.testing.assert_array_equal(plain, windows)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_lower_precision(bert_fast_embed, text_file, expected, dtype):
    if dtype == "int8" and best_isa() == 0:
        pytest.skip("8-bit products of models need AVX2")
    _, array = bert_fast_embed(text_file, "--dtype", dtype)
    assert array.dtype == np.float32
    assert (array * expected).sum(1).min() > 0.999
    assert np.abs(array - expected).max() > 1e-5


def test_pooling_and_norm_as_asked(bert_fast_embed, text_file, folder):
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = embed(model, tokenizer, tiny.TEXTS, pooling="cls", normalize=False)
    _, array = bert_fast_embed(text_file, "--pooling", "cls", "--no-normalize")
    np.testing.assert_allclose(array, expected, atol=5e-6)


def test_pooling_and_norm_as_the_model_says(bert_fast_embed, text_file, tmp_path):
    own = tiny.save(tmp_path / "own")
    (own / "1_Pooling").mkdir()
    (own / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (own / "modules.json").write_text('[{"type": "x.Pooling", "path": "1_Pooling"}]')
    _, array = bert_fast_embed(text_file, model=own)
    _, asked = bert_fast_embed(text_file, "--pooling", "cls", "--no-normalize")
    np.testing.assert_array_equal(array, asked)
    _, mean = bert_fast_embed(text_file, "--pooling", "mean", "--no-normalize", model=own)
    assert not np.allclose(array, mean, atol=1e-3)


def test_truncation_is_one_warning(bert_fast_embed, text_file):
    result, array = bert_fast_embed(text_file, "--max-length", "8")
    assert array.shape == (7, 32)
    assert result.stderr.count("warning: 3 of 7 texts were cut to 8 tokens") == 1


def test_wrong_options(bert_fast_embed, text_file):
    refused(bert_fast_embed(text_file, "--dtype", "fp4")[0], "unknown dtype 'fp4'", "bf16")
    refused(bert_fast_embed(text_file, "--pooling", "max")[0], "unknown pooling 'max'", "mean")
    refused(bert_fast_embed(text_file, "--device", "tpu")[0], "unknown device 'tpu'", "cuda")
    refused(bert_fast_embed(text_file, "--max-length", "0")[0], "max_length is 0")
    refused(bert_fast_embed(text_file, "--max-length", "99")[0], "max_length is 99", "24")
    refused(bert_fast_embed(text_file, "--batch-tokens", "0")[0], "batch_tokens is 0")
    refused(bert_fast_embed(text_file, "--backend", "abacus")[0], "abacus")


def test_wrong_models(bert_fast_embed, text_file, tmp_path):
    missing = tmp_path / "nowhere"
    refused(bert_fast_embed(text_file, model=missing)[0], "no model at", missing)
    refused(bert_fast_embed(text_file, model=tmp_path)[0], tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{")
    refused(bert_fast_embed(text_file, model=tmp_path)[0], "cannot load", tmp_path)
    broken = tiny.save(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    refused(bert_fast_embed(text_file, model=broken)[0], "cannot load", broken)


def test_weights_that_are_not_the_models(bert_fast_embed, text_file, tmp_path):
    """transformers loads what fits, warns in its log, and leaves the rest random."""
    wrapped, other = tiny.save(tmp_path / "wrapped"), tiny.save(tmp_path / "other")
    weights = load_file(wrapped / "model.safetensors")
    save_file({f"module.{name}": w for name, w in weights.items()}, wrapped / "model.safetensors")
    told = "embeddings.LayerNorm.bias is not in its weights; so for"
    refused(bert_fast_embed(text_file, model=wrapped)[0], "cannot load", wrapped, told)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 50}))
    told = "is [37] in its weights, [50] by its config.json"
    refused(bert_fast_embed(text_file, model=other)[0], "cannot load", other, told)
    pooler = {name: w for name, w in weights.items() if not name.startswith("pooler")}
    save_file(pooler, wrapped / "model.safetensors", {"format": "pt"})  # which masked LM has not
    assert bert_fast_embed(text_file, model=wrapped)[0].exit_code == 0


def test_as_many_tokens_as_the_model_says(bert_fast_embed, text_file, tmp_path):
    own = tiny.save(tmp_path / "own")
    (own / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    result, found = bert_fast_embed(text_file, model=own)
    assert "3 of 7 texts were cut to 8 tokens" in result.stderr
    np.testing.assert_array_equal(found, bert_fast_embed(text_file, "--max-length", 8)[1])


def test_small_letters_and_prompts_as_the_model_says(bert_fast_embed, tmp_path, folder):
    own = tiny.save(tmp_path / "own")
    (own / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (own / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps({**settings, "do_lower_case": False}))
    text = tmp_path / "texts.txt"
    text.write_text("The CAT\n")
    result, found = bert_fast_embed(text, model=own)
    assert "its prompt 'query' is not put before the texts" in result.stderr
    text.write_text("the cat\n")
    np.testing.assert_array_equal(found, bert_fast_embed(text, model=folder)[1])


def test_wrong_inputs(bert_fast_embed, tmp_path):
    file, lines = tmp_path / "in.txt", tmp_path / "in.jsonl"
    refused(bert_fast_embed(tmp_path / "none.txt")[0], "none.txt", "No such file")
    refused(bert_fast_embed(tmp_path)[0], tmp_path, "Is a directory")
    refused(bert_fast_embed(tmp_path / "in.CSV")[0], "in.CSV: .csv is not read")
    file.write_bytes("naïve\n".encode() + "naïve\n".encode("latin-1"))
    refused(bert_fast_embed(file)[0], "in.txt, line 2: not UTF-8")
    lines.write_text('{"text": "a"}\n{"text": \n')
    refused(bert_fast_embed(lines)[0], "in.jsonl, line 2: not JSON")
    lines.write_text('{"text": "a"}\n{"body": "b"}\n')
    refused(bert_fast_embed(lines)[0], "in.jsonl, line 2: no field 'text'")
    lines.write_text('{"text": "a"}\n["b"]\n')
    refused(bert_fast_embed(lines)[0], "in.jsonl, line 2: no field 'text'")
    lines.write_text('{"text": 1}\n')
    refused(bert_fast_embed(lines)[0], "in.jsonl, line 1: field 'text' is 1, expected a string")


def test_wrong_outputs(folder, text_file, tmp_path):
    for out, word in (
        (tmp_path, "is a folder"), (tmp_path / "no" / "x.npy", "no folder"),
        (text_file, "is the input"),
    ):  # fmt: skip
        line = ["embed", str(text_file), "-o", str(out), "--model", str(folder)]
        refused(CliRunner().invoke(app, line), word)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    class Unwritable:
        def __array__(self, *args, **kwargs):
            raise ValueError("no")

    out = tmp_path / "out.npy"
    save(out, np.arange(3))
    with pytest.raises(ValueError, match="no"):
        save(out, Unwritable())
    np.testing.assert_array_equal(np.load(out), np.arange(3))
    assert list(tmp_path.iterdir()) == [out]


def test_explain(folder):
    result = CliRunner().invoke(app, ["explain", str(folder)])
    assert result.exit_code == 0, result.output
    assert "tokens of" in result.stdout and "encoder" in result.stdout
    refused(CliRunner().invoke(app, ["explain", str(folder / "none")]), "no model at")


def test_doctor():
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for word in ("torch", "transformers", "bert_fast", "GPU", "attention", "add_layernorm"):
        assert word in result.stdout
    refused(CliRunner().invoke(app, ["doctor", "--dtype", "fp4"]), "unknown dtype")


def test_what_is_not_installed_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "versions", lambda: {"transformers": "not installed"})
    assert "transformers is not installed: `pip install transformers`." in doctor.advice()
    monkeypatch.setitem(sys.modules, "transformers", None)
    folder = tiny.save(tmp_path / "model")
    refused(CliRunner().invoke(app, ["explain", str(folder)]), "pip install transformers")


def test_doctor_where_nothing_is_installed():
    code = (
        "import sys; sys.modules.update({'triton': None, 'bert_fast._C': None});"
        "from bert_fast.cli import app; app(['doctor'])"
    )
    wide = {**os.environ, "COLUMNS": "250"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, env=wide)
    assert done.returncode == 0, done.stderr
    assert "not built" in done.stdout and "--no-build-isolation" in done.stdout
    assert "triton is not installed" in done.stdout


def test_help_and_version_import_nothing_heavy():
    for argument in ("--help", "--version"):
        code = (
            "import sys; from bert_fast.cli import app; app(sys.argv[1:], standalone_mode=False);"
            "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
        )
        line = [sys.executable, "-c", code, argument]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_verify_passes_and_writes_json(folder, tmp_path):
    out = tmp_path / "out.json"
    line = ["verify", str(folder), "--dtype", "bf16", "--json", str(out)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert "as exact as Hugging Face" in result.output and "padding spared" in result.output
    found = json.loads(out.read_text())
    assert found["passed"] and found["dtype"] == "bfloat16" and len(found["states"]) == 3
    assert found["cosine"] > 0.99 and found["gradient"]["relative"] > 0


def test_verify_fails_where_an_error_is_over(folder, monkeypatch):
    for module in ("structure", "modeling"):
        monkeypatch.setattr(f"bert_fast.{module}.activation_name", lambda _: "gelu_tanh")
    result = CliRunner().invoke(app, ["verify", str(folder), "--no-gradients"])
    assert result.exit_code == 1 and "NOT as exact" in result.output and "over" in result.output


def test_verify_takes_a_class_of_ours_for_what_it_is(folder, monkeypatch):
    for module in ("structure", "modeling"):
        monkeypatch.setattr(f"bert_fast.{module}.activation_name", lambda _: "gelu_tanh")
    model = bert_fast.BertModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not bert_fast.verify(model, tiny.TEXTS, tokenizer, gradients=False).passed


def test_where_it_may_write(text_file, folder, tmp_path):
    def run(out):
        line = ["embed", str(text_file), "-o", str(out), "--model", str(folder)]
        return CliRunner().invoke(app, line)

    real, link = tmp_path / "real.npy", tmp_path / "link.npy"
    real.write_text("old")
    link.symlink_to(real)
    assert run(link).exit_code == 0
    assert link.is_symlink() and len(np.load(real)) == len(tiny.TEXTS)
    os.mkfifo(tmp_path / "pipe")
    refused(run(tmp_path / "pipe"), "pipe is a device or a pipe")
    refused(run("-"), "- is no file to write")
    before = text_file.read_text()
    line = ["verify", str(folder), "--texts", str(text_file), "--json", str(text_file)]
    refused(CliRunner().invoke(app, line), "is the input")
    assert text_file.read_text() == before


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "the cat\nsat\n".encode("utf-16-le"), "line 1: a NUL byte, expected UTF-8"),
        ("a.jsonl", b"[" * 200_000, "line 1: "),
        ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"1" * 5_000 + b"}", "line 2: "),
    ],
)
def test_what_is_not_read(bert_fast_embed, tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    refused(bert_fast_embed(tmp_path / name)[0], name, told)


def test_a_warning_is_one_line(folder, text_file, tmp_path):
    line = ["embed", str(text_file), "-o", str(tmp_path / "v.npy"), "--model", str(folder)]
    result = CliRunner().invoke(app, [*line, "--dtype", "int8", "--backend", "reference"])
    assert result.exit_code == 0, result.output
    told = [row for row in result.stderr.splitlines() if "not in 8 bits" in row]
    assert len(told) == 1 and told[0].startswith("bert-fast: warning: the layers run in"), told


def test_verify_refuses_bad_input(folder, tmp_path):
    refused(CliRunner().invoke(app, ["verify", str(tmp_path / "no")]), "no model at")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    line = ["verify", str(folder), "--texts", str(empty)]
    refused(CliRunner().invoke(app, line), "0 texts given")


def test_lines_of_the_log_are_not_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console.log, "_width", 20)
    console.log.print("a line of a log that is longer than twenty columns")
    assert capsys.readouterr().err.count("\n") == 1
