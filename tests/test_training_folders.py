"""Folders in and out of training: those without a tokenizer, and which checkpoints are kept."""

import json
import shutil

import pytest
import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer
from typer.testing import CliRunner

from bert_fast.cli import app

from . import prose, tiny
from .test_cli import refused
from .test_training_loop import losses, run

ROWS = [
    {"text": f"the {noun} sat", "text_b": f"a {noun}", "label": f"{noun}s"}
    for noun in ("cat", "dog") * 8
]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture
def bare(tmp_path):
    """A model without the files of a tokenizer."""
    folder = tiny.save(tmp_path / "bare")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return folder


def invoke(*line):
    return CliRunner().invoke(app, [*map(str, line)])


# -- tokenizers -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["embed", "verify", "explain"])
def test_a_model_without_a_tokenizer(bare, command, tmp_path):
    text = tmp_path / "texts.txt"
    text.write_text("a cat\na dog\n")
    line = {"embed": ["embed", text, "-o", tmp_path / "x.npy", "--model", bare]}
    refused(invoke(*line.get(command, [command, bare])), bare, "has no tokenizer files")
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize("task", ["classification", "embedding"])
def test_no_training_without_a_tokenizer(bare, rows, task, tmp_path):
    if task == "embedding":
        pytest.importorskip("sentence_transformers")
    line = ["finetune", "--task", task, "--train", rows, "--output", tmp_path / "out"]
    result = invoke(*line, "--model", bare)
    assert result.exit_code == 2 and "has no tokenizer files" in result.stderr, result.output


@pytest.mark.parametrize("option", ["--model", "--tokenizer"])
def test_no_pretraining_without_a_tokenizer(bare, option, tmp_path):
    text = prose.write(tmp_path / "text.txt")
    result = invoke("pretrain", text, "-o", tmp_path / "out", option, bare, "--device", "cpu")
    refused(result, bare, "has no tokenizer files")


def test_a_tokenizer_of_another_model(rows, tmp_path):
    folder = tiny.save(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["owl"])
    tokenizer.save_pretrained(folder)
    told = (folder, f"its tokenizer has {size + 1} tokens, but the model's vocabulary {size}")
    refused(invoke("explain", folder), *told)
    line = ["finetune", "--task", "classification", "--train", rows, "--output", tmp_path / "out"]
    refused(invoke(*line, "--model", folder), *told)


def test_checkpoints_have_their_tokenizer(rows, tmp_path):
    folder = tiny.save(tmp_path / "model")
    line = ["finetune", "--task", "classification", "--train", rows, "--output", tmp_path / "out"]
    line += ["--model", folder, "--epochs", 1, "--batch-size", 8, "--save-steps", 1]
    assert invoke(*line).exit_code == 0
    wanted = AutoTokenizer.from_pretrained(folder).get_vocab()
    for step in (1, 2):
        found = AutoTokenizer.from_pretrained(tmp_path / "out" / f"checkpoint-{step}")
        assert found.get_vocab() == wanted
    text = tmp_path / "texts.txt"
    text.write_text("a cat\n")
    line = ["embed", text, "-o", tmp_path / "x.npy", "--model", tmp_path / "out" / "checkpoint-2"]
    assert invoke(*line).exit_code == 0


# -- checkpoints ----------------------------------------------------------------------------


def names(folder):
    return sorted(path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))


def test_a_users_own_checkpoint_is_kept(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / "mine").write_text("dear")
    _, history = run(tmp_path, epochs=1, batch_tokens=None, batch_size=4, save_steps=1)
    assert len(losses(history)) == 6 and names(tmp_path) == ["5", "6", "best"]
    assert (tmp_path / "checkpoint-best" / "mine").read_text() == "dear"


def test_what_is_just_saved_is_kept_beside_halves_of_later_steps(tmp_path):
    options = {"epochs": 1, "batch_tokens": None, "batch_size": 4, "save_steps": 2}
    _, whole = run(tmp_path, **options)
    shutil.rmtree(tmp_path / "checkpoint-6")
    for step in (98, 99):
        (tmp_path / f"checkpoint-{step}").mkdir()
    _, again = run(tmp_path, **options, resume=True)
    assert losses(again) == losses(whole) and names(tmp_path) == ["4", "6", "98", "99"]


@pytest.mark.parametrize(("then", "kept"), [(2, ["6", "8"]), (None, ["4"])])
def test_steps_between_checkpoints_may_change_at_resume(tmp_path, then, kept):
    options = {"epochs": 1, "batch_tokens": None, "batch_size": 3}
    _, whole = run(tmp_path, **options, save_steps=4)
    shutil.rmtree(tmp_path / "checkpoint-8")
    _, again = run(tmp_path, **options, save_steps=then, resume=True)
    assert losses(again) == losses(whole)
    assert names(tmp_path) == kept


# -- the model that was there before -------------------------------------------------------------


def test_a_model_leaves_nothing_to_the_one_in_its_place(rows, tmp_path):
    folder = tiny.save(tmp_path / "model")
    (folder / "modules.json").write_text("[]")
    (folder / "predictions.jsonl").write_text("{}\n")
    line = ["finetune", "--task", "pairs", "--train", rows, "--max-steps", "1", "--device", "cpu"]
    result = invoke(*line, "--model", folder, "--output", folder)
    assert result.exit_code == 0, result.output
    assert (folder / "metrics.json").exists()
    assert not list(folder.glob("predictions*")) and not (folder / "modules.json").exists()


def test_a_full_disk_is_one_line(rows, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.BertForSequenceClassification, "save_pretrained", full)
    line = ["finetune", "--task", "pairs", "--train", rows, "--max-steps", "1", "--device", "cpu"]
    result = invoke(*line, "--model", tiny.save(tmp_path / "model"), "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.endswith("No space left on device (os error 28)\n")
