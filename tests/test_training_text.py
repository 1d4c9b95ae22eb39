"""Texts that are large, and those that are none."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from bert_fast.cli import app
from bert_fast.training.embedding import _nearest
from bert_fast.training.readers import read_texts
from bert_fast.training.squad import read_squad
from bert_fast.training.text import read_documents, split_sentences
from bert_fast.training.words import read_words

from . import tiny
from .test_cli import refused


def test_a_long_document_is_copied_once():
    class Counted(str):
        copied = 0

        def __getitem__(self, place):
            found = super().__getitem__(place)
            Counted.copied += len(found)
            return found

    text = Counted("It ran. " * 1_000)
    assert len(split_sentences(text)) == 1_000
    assert Counted.copied <= 3 * len(text)


def test_nearest_of_many_by_parts():
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                self.seen = max(self.seen, found.numel())
            return found

    torch.manual_seed(0)
    first, second = torch.randn(2, 2_300, 4).double()
    with Largest() as largest:
        found = _nearest(first, second)
    assert largest.seen <= 1_000 * 2_300
    assert found.tolist() == (first @ second.T).argmax(-1).tolist()


# -- half of a character --------------------------------------------------------------------

HALF = r"bad \ud83d here"  # as JSON spells it
SQUAD = '{{"id": "{}", "question": "{}", "context": "{}", "answers": {}}}'
ANSWER = '[{{"text": "{}", "answer_start": 0}}]'


def texts(file):
    return read_texts(file, pairs=False)


def documents(file):
    return list(read_documents([file]))


@pytest.mark.parametrize(
    ("read", "line", "where"),
    [
        (texts, f'{{"text": "{HALF}", "label": 1}}', "line 2, column 'text'"),
        (texts, f'{{"text": "a", "label": "{HALF}"}}', "line 2, column 'label'"),
        (read_words, f'{{"tokens": ["a", "{HALF}"], "labels": [0, 1]}}', "line 2, column 'tokens'"),
        (read_words, f'{{"tokens": ["a"], "labels": ["{HALF}"]}}', "line 2, column 'labels'"),
        (read_squad, SQUAD.format("7", HALF, "a", "[]"), "line 2.question"),
        (read_squad, SQUAD.format("7", "a", HALF, "[]"), "line 2.context"),
        (read_squad, SQUAD.format(HALF, "a", "a", "[]"), "line 2.id"),
        (read_squad, SQUAD.format("7", "a", "a", ANSWER.format(HALF)), r"answers\[0\].text"),
        (documents, f'{{"text": "{HALF}"}}', "line 2, field 'text'"),
    ],
)  # fmt: skip
def test_half_a_character(tmp_path, read, line, where):
    good = line.replace(HALF, r"good \ud83d\ude00 here").replace('"7"', '"8"')
    good = good.replace('"id": "good', '"id": "better')
    file = tmp_path / "a.jsonl"
    file.write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl.*{where}: \\ud83d at character"):
        read(file)
    file.write_text(f"{good}\n")
    read(file)


def test_half_a_character_to_embed(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "good"}) + f'\n{{"text": "{HALF}"}}\n')
    line = ["embed", file, "-o", tmp_path / "x.npy", "--model", tiny.save(tmp_path / "model")]
    refused(CliRunner().invoke(app, [*map(str, line)]), "a.jsonl, line 2, field 'text'", "ud83d")
