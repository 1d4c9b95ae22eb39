"""The training loop: balanced batches, exact means, exact resume, two processes."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from rich.progress import Progress
from transformers import BertForMaskedLM, Trainer
from typer.testing import CliRunner

import bert_fast
from bert_fast.cli import app
from bert_fast.training.batches import BalancedBatches
from bert_fast.training.loop import Settings, train

from . import prose
from .models import tiny


class Texts:
    """Random ids of random lengths; every third token is scored, so that counts are uneven."""

    def __init__(self, count: int = 24) -> None:
        random = np.random.default_rng(0)
        self.lengths = random.integers(3, 30, count)
        self.ids = [torch.from_numpy(random.integers(1, 99, n)) for n in self.lengths]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.ids[index]


def collate(items):
    ids = torch.nn.utils.rnn.pad_sequence(items, batch_first=True)
    labels = torch.where((ids > 0) & (ids % 3 == 0), ids, -100)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def run(folder: Path, dropout: float = 0.0, **settings):
    model = bert_fast.accelerate(tiny(BertForMaskedLM, hidden_dropout_prob=dropout))
    texts = Texts()
    settings = {"epochs": 2, "batch_tokens": 60, "lr": 1e-3, "device": "cpu", **settings}
    history = train(model, texts, Settings(folder, **settings), collate, lengths=texts.lengths)
    return model, history


def losses(history):
    return [row["loss"] for row in history if "loss" in row]


# -- batches --------------------------------------------------------------------------------


def test_batches_are_balanced_and_a_function_of_the_epoch():
    costs = np.random.default_rng(1).integers(5, 100, 500)
    batches = BalancedBatches(lambda epoch: costs, 512, 1, 4, seed=3)
    first = list(batches)
    assert len(first) == len(batches) and len(first) % 4 == 0
    assert sorted(itertools.chain(*first)) == list(range(500))
    loads = [costs[batch].sum() for batch in first]
    assert max(loads) <= 512 and max(loads) - min(loads) < 40
    assert list(batches) == first
    batches.set_epoch(1)
    assert list(batches) != first and len(list(batches)) == len(first)
    assert {frozenset(b) for b in batches} != {frozenset(b) for b in first}
    other = BalancedBatches(lambda epoch: costs, 512, 2, 2, seed=4)
    assert list(other) != first


def test_batches_of_a_size():
    batches = list(BalancedBatches(lambda epoch: np.ones(100, int), 32, 1, 1, seed=0))
    assert [len(batch) for batch in batches] == [25] * 4


@pytest.mark.parametrize(("lengths", "budget"), [([1] * 1001, 1), ([400] * 5, 512)])
def test_no_batch_is_empty(lengths, budget):
    """The last step of an epoch takes fewer batches, where there are too few examples."""
    batches = BalancedBatches(
        lambda epoch: np.array(lengths), budget, 1, 8 if budget == 1 else 4, 0
    )
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths))) and all(batches)


def test_batches_of_uneven_fit_are_found_at_once():
    """Texts of which a batch takes one, where the tokens alone would fill it with 1.7."""
    looks = []

    class Counted(BalancedBatches):
        def _batches(self, epoch):
            looks.append(self.count)
            return super()._batches(epoch)

    batches = Counted(lambda epoch: np.full(3_000, 300), 512, 1, 1, seed=0)
    assert len(batches) == 3_000 and len(looks) < 10


def test_batches_refuse():
    with pytest.raises(ValueError, match="60 tokens, but one example has 99"):
        BalancedBatches(lambda epoch: np.array([1, 99]), 60, 1, 1, 0)
    with pytest.raises(ValueError, match="2 training examples are fewer than the 4 batches"):
        BalancedBatches(lambda epoch: np.array([1, 2]), 60, 2, 2, 0)
    with pytest.raises(ValueError, match="5 training examples do not make batches of at most 1 "):
        BalancedBatches(lambda epoch: np.ones(5, int), 1, 2, 1, 0)


def test_every_epoch_is_announced_and_a_resumed_one_too(tmp_path):
    class Announced(Texts):
        epochs: list[int]

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    def epochs_of(resume: bool, **settings) -> list[int]:
        texts = Announced()
        texts.epochs = []
        model = bert_fast.accelerate(tiny(BertForMaskedLM))
        kept = Settings(tmp_path, epochs=3, batch_size=8, device="cpu", resume=resume, save_steps=4)
        train(model, texts, kept, collate)
        return list(dict.fromkeys(texts.epochs))

    assert epochs_of(resume=False) == [0, 1, 2]  # three steps each
    shutil.rmtree(tmp_path / "checkpoint-9")
    assert epochs_of(resume=True) == [2]  # from step 8, within epoch 2


# -- the loss -------------------------------------------------------------------------------


def test_a_split_batch_has_the_loss_of_the_whole(tmp_path):
    texts = Texts()
    tokens = int(texts.lengths.sum())
    whole = tiny(BertForMaskedLM)(**collate(texts.ids)).loss.item()
    _, history = run(tmp_path, epochs=1, batch_tokens=tokens, accumulation=3)
    assert len(losses(history)) == 1
    assert losses(history)[0] == pytest.approx(whole, rel=1e-6)


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # what torchrun sets
    os.environ.update({name: str(value) for name, value in names.items()})
    _, history = run(Path(folder), epochs=1)
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses(history)))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = tmp_path / "two"
    two.mkdir()
    mp.spawn(worker, args=(port, str(two)), nprocs=2)
    _, history = run(tmp_path / "one", epochs=1, accumulation=2)
    found = json.loads((two / "losses.json").read_text())
    assert len(found) == len(losses(history)) > 2
    assert found == pytest.approx(losses(history), rel=1e-5)
    saved = BertForMaskedLM.from_pretrained(two)
    expected = BertForMaskedLM.from_pretrained(tmp_path / "one")
    for (name, a), b in zip(saved.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_what_a_run_writes(tmp_path):
    seen = []
    model, texts = bert_fast.accelerate(tiny(BertForMaskedLM)), Texts()

    def evaluate(given):
        seen.append(given.training)
        return {"accuracy": 0.5}

    settings = Settings(tmp_path, epochs=2, batch_size=6, save_steps=3, eval_steps=3, device="cpu")
    history = train(model, texts, settings, collate, evaluate=evaluate)
    assert [row["step"] for row in history if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in history if "eval_accuracy" in row] == [3, 4, 6, 8]
    assert seen == [False] * 4
    assert history[-2]["num_input_tokens_seen"] == 2 * texts.lengths.sum()
    with (tmp_path / "metrics.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert [float(row["loss"]) for row in rows] == losses(history)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    loaded = BertForMaskedLM.from_pretrained(tmp_path)  # transformers' own class and forward
    batch = collate(texts.ids)
    with torch.no_grad():
        expected, found = model.eval()(**batch).loss, loaded.eval()(**batch).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_bf16_trains_masters_in_fp32(tmp_path, optimizer):
    model, history = run(tmp_path, epochs=1, dtype="bf16", optimizer=optimizer, lr=1e-2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert np.mean(losses(history)[-3:]) < np.mean(losses(history)[:3]) - 0.05
    _, exact = run(tmp_path / "fp32", epochs=1, optimizer=optimizer, lr=1e-2)
    assert losses(history) != losses(exact)
    assert losses(history) == pytest.approx(losses(exact), rel=0.02)


# -- resume ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", ["batch_tokens", "batch_size"])
def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path, lengths):
    options = {"dropout": 0.1, "epochs": 3, "save_steps": 3}
    options |= {"batch_tokens": None, "batch_size": 5} if lengths == "batch_size" else {}
    _, whole = run(tmp_path / "whole", **options)
    steps = len(losses(whole))
    last = max((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    shutil.rmtree(last)  # as if it had stopped after the one before, in the last epoch
    _, resumed = run(tmp_path / "whole", **options, resume=True)
    assert losses(resumed) == losses(whole) and len(losses(resumed)) == steps


@pytest.mark.parametrize("more", [{"epochs": 2}, {"max_steps": 4}])
def test_a_run_that_was_done_is_only_saved_again(tmp_path, more):
    def go(resume: bool):
        texts, model = Texts(), bert_fast.accelerate(tiny(BertForMaskedLM))
        options = {"batch_tokens": 60, "lr": 1e-3, "device": "cpu", "save_steps": 2, **more}
        settings = Settings(tmp_path, resume=resume, **options)

        def evaluate(model):
            return {"sum": sum(p.sum() for p in model.parameters())}

        history = train(model, texts, settings, collate, lengths=texts.lengths, evaluate=evaluate)
        return history, model.state_dict()

    history, weights = go(resume=False)
    assert "eval_sum" in history[-1] and (tmp_path / f"checkpoint-{len(losses(history))}").exists()
    for _ in range(2):
        again, same = go(resume=True)
        assert again == history and all(torch.equal(same[name], w) for name, w in weights.items())


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    text = prose.write(tmp_path / "text.txt")
    line = ["pretrain", text, "--vocab-size", "100", "--layers", "1", "--hidden", "32"]
    line += ["--heads", "2", "--max-length", "32", "--batch-size", "8", "--epochs", "6"]
    line += ["--lr", "1e-3", "--save-steps", "10", "--device", "cpu"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "bert_fast.cli", *line, "-o", str(killed)]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    running = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    while running.poll() is None and not (killed / "checkpoint-20/trainer_state.json").exists():
        time.sleep(0.005)
    running.kill()
    assert running.wait() == -9
    for more in (["-o", str(killed), "--resume"], ["-o", str(whole)]):
        done = CliRunner().invoke(app, [*line, *more])
        assert done.exit_code == 0, done.output
    found, expected = (
        json.loads((folder / "metrics.json").read_text()) for folder in (killed, whole)
    )
    assert losses(found["history"]) == losses(expected["history"])
    assert len(losses(found["history"])) > 40
    for name in ("mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy"):
        assert found[name] == expected[name]


def test_half_a_checkpoint_is_passed_over(tmp_path):
    _, whole = run(tmp_path, save_steps=3)
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    half = tmp_path / "checkpoint-99"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"epoch": 1')
    assert losses(run(tmp_path, save_steps=3, resume=True)[1]) == losses(whole)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_checkpoint_needs_the_random_state_of_every_process(tmp_path, damage):
    options = {"dropout": 0.1, "save_steps": 3}
    _, whole = run(tmp_path, **options)
    last = max(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    state = last / "rng_state.pth"
    state.write_bytes(state.read_bytes()[:-30])
    if damage == "gone":
        state.unlink()
    assert losses(run(tmp_path, **options, resume=True)[1]) == losses(whole)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processes": 2}))
    with pytest.warns(UserWarning, match="holds no checkpoint to resume"):
        run(tmp_path, **options, resume=True)


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\n")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"cannot save a checkpoint to .*unexpected pos 64 vs 0$"):
        run(tmp_path, save_steps=3)


def test_a_run_that_fails_gives_the_terminal_back(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("out of memory")

    stopped = []
    monkeypatch.setattr(Trainer, "training_step", fail)
    monkeypatch.setattr(Progress, "stop", lambda self: stopped.append(self))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path)
    assert stopped


def test_nothing_to_resume_is_told(tmp_path):
    with pytest.warns(UserWarning, match="holds no checkpoint to resume: starting at step 1"):
        assert run(tmp_path, resume=True)


def test_resume_refuses_other_settings(tmp_path):
    run(tmp_path, save_steps=3)
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"with lr 0\.1: it was started with 0\.001"):
        run(tmp_path, lr=0.1, resume=True)
    texts, model = Texts(20), bert_fast.accelerate(tiny(BertForMaskedLM))
    same = Settings(tmp_path, 2, lr=1e-3, batch_tokens=60, device="cpu", save_steps=3, resume=True)
    with pytest.raises(ValueError, match="with examples 20: it was started with 24"):
        train(model, texts, same, collate, lengths=texts.lengths)
    texts = Texts()
    with pytest.raises(ValueError, match="with max_length 9: it was started with None"):
        train(model, texts, same, collate, lengths=texts.lengths, about={"max_length": 9})
    other = tiny(BertForMaskedLM, intermediate_size=38)
    with pytest.raises(ValueError, match=r"with parameters \d+: it was started with"):
        train(other, texts, same, collate, lengths=texts.lengths)
    (tmp_path / "settings.json").write_text("")
    with pytest.raises(ValueError, match=r"cannot resume .*settings\.json"):
        train(model, texts, same, collate, lengths=texts.lengths)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"warmup": -0.1}, "warmup is -0.1"),
        ({"warmup": float("inf")}, "warmup is inf"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8', expected one of fp32, bf16"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_settings_refuse(wrong, told):
    with pytest.raises(ValueError, match=told):
        Settings(Path("out"), **wrong)


def test_a_batch_without_labels_costs_no_loss(tmp_path):
    """Its mean is of nothing, and was NaN in all that followed."""
    none = [{**collate([ids]), "labels": torch.full((1, len(ids)), -100)} for ids in Texts().ids]

    class Few(Texts):
        def __getitem__(self, index):
            return none[index] if index % 4 else collate([self.ids[index]])

    model, texts = tiny(BertForMaskedLM), Few()
    settings = Settings(tmp_path, epochs=1, batch_size=1, accumulation=3, lr=1e-3, device="cpu")
    found = losses(train(model, texts, settings, lambda items: items[0]))
    assert np.isfinite(found).all() and all(p.isfinite().all() for p in model.parameters())
