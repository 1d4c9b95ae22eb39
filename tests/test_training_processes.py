"""What several processes of a training share: how long they wait, and who tidies up."""

import datetime
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState

from bert_fast.training.loop import Settings
from bert_fast.training.pretrain import Recipe, main_first, prepare

from . import prose


@pytest.fixture
def first_of_two(monkeypatch):
    """This process as the first of two that `torchrun` starts; the group has it alone."""
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**names, "OMP_NUM_THREADS": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    make = dist.init_process_group

    def alone(backend, rank, world_size, **more):
        make(backend, store=dist.HashStore(), rank=0, world_size=1, **more)

    monkeypatch.setattr(dist, "init_process_group", alone)
    PartialState._reset_state()
    yield
    dist.destroy_process_group()
    PartialState._reset_state()


@pytest.fixture
def recipe(tmp_path):
    text = prose.write(tmp_path / "text.txt", 120)
    return Recipe([text], vocab_size=100, layers=1, hidden=32, heads=2)


@pytest.mark.parametrize("main", [True, False])
def test_others_wait_for_days_while_a_corpus_is_read(first_of_two, monkeypatch, main):
    """And for all else as long as torch has it: a process that hangs ends the run."""
    events = []

    def timeout(group):
        return group._get_backend(torch.device("cpu")).options._timeout

    PartialState(cpu=True)
    monkeypatch.setattr(dist, "barrier", lambda group: events.append(timeout(group)))
    with main_first(SimpleNamespace(num_processes=2, is_main_process=main)):
        events.append("read")
    days = datetime.timedelta(days=2)
    assert events == (["read", days] if main else [days, "read"])
    assert timeout(dist.distributed_c10d._get_default_group()) < datetime.timedelta(days=1)


def test_what_a_killed_run_left_of_a_corpus_is_removed(recipe, tmp_path, monkeypatch):
    settings = Settings(tmp_path / "out", device="cpu")
    prepare(recipe, settings)
    corpora = settings.output_dir / "corpus"
    (whole,) = corpora.iterdir()
    left = corpora / ".part-abc"
    left.mkdir()
    with monkeypatch.context() as other:
        other.setattr(PartialState, "is_main_process", False)  # another one may be making it
        prepare(recipe, settings)
    assert left.exists()
    prepare(recipe, settings)
    assert list(corpora.iterdir()) == [whole]
