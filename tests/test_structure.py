"""What is known of a model is looked at once, and again after any change."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import bert_fast
from bert_fast import structure
from bert_fast.families import FAMILIES
from bert_fast.ops import backends

from .models import ids, small


class One:
    pass


class Other(One):
    pass


def replaced(objects: Any, dicts: Any) -> None:
    dicts[0]["a"] = [1]


def renamed(objects: Any, dicts: Any) -> None:
    dicts[0]["c"] = dicts[0].pop("b")


def added(objects: Any, dicts: Any) -> None:
    dicts[1]["c"] = dicts[0]


def removed(objects: Any, dicts: Any) -> None:
    del dicts[1]["b"]


def moved(objects: Any, dicts: Any) -> None:
    dicts[1]["b"] = dicts[0].pop("b")


def reordered(objects: Any, dicts: Any) -> None:
    dicts[0]["a"] = dicts[0].pop("a")


def of_another_class(objects: Any, dicts: Any) -> None:
    objects[1].__class__ = Other


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "change",
    [replaced, renamed, added, removed, moved, reordered, of_another_class],
    ids=lambda f: f.__name__,
)
def test_changes_are_seen(
    change: Callable[[Any, Any], None], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(backends, "extension_missing", lambda: ["not built"])
    elif backends.extension_missing():
        pytest.skip("the extension is not built")
    value = [1]
    dicts: Any = ({"a": value, "b": 2}, {"b": 2} if change is removed else {}, {"a": 0})
    if change is moved:
        dicts[0]["d"] = 3
    objects = One(), One()
    before = [list(one.items()) for one in dicts]
    known = backends.addresses(objects, dicts)
    assert backends.unchanged(objects, dicts, known)
    assert value == [1] and before == [list(one.items()) for one in dicts]
    change(objects, dicts)
    assert not backends.unchanged(objects, dicts, known)


def test_wrong_arguments() -> None:
    if backends.extension_missing():
        pytest.skip("the extension is not built")
    extension = backends.extension()
    known = extension.addresses((1,), ({},))
    for args in (((1,), ({},)), ([1], ({},), known), ((1,), (1,), known), ((1,), ({},), "known")):
        with pytest.raises(TypeError):
            extension.unchanged(*args)
    with pytest.raises(TypeError, match="expected a tuple of dicts"):
        extension.addresses((), ([],))
    assert not extension.unchanged((1,), ({},), known[:-8])
    assert not extension.unchanged((1,), ({},), known + known[:8])


def test_an_extension_of_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pull leaves where nobody builds: it is told, and other kernels run."""
    monkeypatch.setitem(sys.modules, "bert_fast._C", ModuleType("bert_fast._C"))
    for looked_at in (backends.extension, backends.extension_missing):
        monkeypatch.setattr(backends, looked_at.__name__, looked_at.__wrapped__)
    (told,) = backends.extension_missing()
    assert "build it anew" in told


def test_a_checkout_that_nobody_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kernels/_triton` is `bert_fast._triton` by the installation only."""
    found = {"triton": ModuleType("triton")}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    assert "is not installed" in backends.triton_missing.__wrapped__()[0]
    found["bert_fast._triton"] = ModuleType("bert_fast._triton")
    assert not backends.triton_missing.__wrapped__()


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.model)
def test_a_model_is_looked_at_once(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert_fast.accelerate(small(row.module, row.model))
    words, looks = ids(2, 7), []
    look = structure._look

    def counted(*args: Any) -> Any:
        looks.append(1)
        return look(*args)

    monkeypatch.setattr(structure, "_look", counted)
    for _ in range(3):
        with torch.no_grad():
            model(words)
    model.train()
    for states in (False, True, False):
        model(words, output_hidden_states=states)[0].sum().backward()
    assert len(looks) == 1  # the first was `accelerate`; `train` drops what it kept
