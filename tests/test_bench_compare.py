"""bench.compare on made-up runs: what is flagged, and what cannot be compared."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench import compare
from bench.compare import IMPROVEMENT, NOISE, REGRESSION
from bench.results import Interval, Run

from .made_up_runs import made_up


def verdicts(old: Run, new: Run) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"models": [], "ops": []}
    for change in compare.compare(old, new):
        found["models" if "bert_fast" in change.key else "ops"].append(change.verdict)
    return found


@pytest.mark.parametrize("machine", [1.0, 1.3])
def test_two_draws_of_one_distribution_are_no_change(machine: float) -> None:
    for seed in range(1, 6):
        found = verdicts(made_up(0), made_up(seed, machine=machine))
        assert set(found["models"]) == {NOISE} and len(found["models"]) == 8
        assert set(found["ops"]) == {NOISE}


@pytest.mark.parametrize("machine", [1.0, 0.8, 1.3])
def test_a_planted_slowdown_is_flagged(machine: float) -> None:
    slow = made_up(1, slowdown=1.1, machine=machine)
    found = verdicts(made_up(0), slow)
    assert set(found["models"]) == {REGRESSION}
    kernels = {c.key[3]: c.verdict for c in compare.compare(made_up(0), slow) if "linear" in c.key}
    assert kernels == {"avx2": REGRESSION, "reference": NOISE}
    assert set(verdicts(slow, made_up(0))["models"]) == {IMPROVEMENT}


def test_a_change_of_the_yardstick_alone_is_not_blamed_on_us() -> None:
    old, new = made_up(0), made_up(1)
    for e in new.models:
        if e.contender == "hf_sdpa":
            e.seconds = [s / 1.15 for s in e.seconds]
    assert set(verdicts(old, new)["models"]) == {NOISE}


def test_failures_and_what_cannot_be_compared() -> None:
    old, new = made_up(0), made_up(1)
    before, after = ([e for e in r.models if e.contender == "bert_fast"] for r in (old, new))
    new.models.remove(after[0])
    after[1].median_s, after[1].seconds, after[1].failed = None, [], "wrong: 1e-2"
    before[2].median_s, before[2].seconds, before[2].failed = None, [], "it was broken"
    after[3].seconds = after[3].seconds[:4]
    after[4].tokens += 1
    new.ops[0].ms, new.ops[0].failed = None, "wrong: 1e-2"
    new.failed.append(new.ops[0].failure)
    new.ops[2].ms, new.ops[2].failed = None, "needs AVX2"
    new.ops[4].ms = None
    found = {c.key: c for c in compare.compare(old, new)}
    assert [found[e.key].verdict for e in before[:6]] == [
        compare.VANISHED, REGRESSION, compare.APPEARED, compare.FEW, compare.OTHER, NOISE
    ]  # fmt: skip
    assert "wrong: 1e-2" in found[before[1].key].note
    ops = [found[old.ops[i].key] for i in (0, 2, 4)]
    assert [c.verdict for c in ops] == [REGRESSION, compare.VANISHED, compare.VANISHED]
    assert [c.note for c in ops] == ["wrong: 1e-2", "needs AVX2", "not timed"]
    unpad = next(e for e in old.ops if e.failed)
    assert unpad.key not in found  # failed before and after


def test_without_a_yardstick_times_are_compared_as_they_are() -> None:
    old, slow = made_up(0), made_up(1, machine=1.3)
    for run in (old, slow):
        run.models = [e for e in run.models if e.contender != "hf_sdpa"]
        run.ops = [e for e in run.ops if e.kernel != "reference"]
    changes = compare.compare(old, slow)
    assert {c.verdict for c in changes} == {REGRESSION}
    assert {c.note for c in changes} == {"not normalised"}


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("old.json", "same.json", "slow.json")]
    slow = made_up(2, slowdown=1.1)
    slow.threads = 4
    for file, run in zip(files, (made_up(0), made_up(1), slow), strict=True):
        run.save(file)
    assert compare.main([str(files[0]), str(files[1])]) == 0
    assert "within noise" in capsys.readouterr().out
    assert compare.main([str(files[0]), str(files[2])]) == 1
    told = capsys.readouterr().out
    assert "regression" in told and "threads: 2 became 4" in told and "minilm sentence" in told
    assert compare.main([str(files[0]), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    made_up(0).save(odd := tmp_path / "odd.json")
    odd.write_text(odd.read_text().replace('"contender"', '"name"'))
    assert compare.main([str(files[0]), str(odd)]) == 2
    assert "odd.json is not a whole result" in capsys.readouterr().err
    replace(made_up(0), models=[], ops=[]).save(empty := tmp_path / "empty.json")
    assert compare.main([str(files[0]), str(empty)]) == 2
    assert "nothing that both runs timed" in capsys.readouterr().err


def test_what_did_not_change_widens_what_is_said_of_the_rest() -> None:
    old, slow = made_up(0), made_up(1, slowdown=1.06)
    assert set(verdicts(old, slow)["ops"]) == {NOISE, REGRESSION}
    factors = (0.9, 1.1, 0.93, 1.07, 1.0, 1.08)
    references = [e for e in slow.ops if e.kernel == "reference"]
    for e, factor in zip(references, factors, strict=True):
        e.ms = (e.ms or 0) * factor
    assert set(verdicts(old, slow)["ops"]) == {NOISE}
    noisy = made_up(1, slowdown=1.06)
    for e in noisy.ops:
        e.spread = 0.1
    assert set(verdicts(old, noisy)["ops"]) == {NOISE}


def test_agreement_counts_ratios_whose_intervals_meet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = made_up(0), made_up(1)
    found = compare.agreement(old, new)
    assert len(found) == sum(e.ratio is not None for e in old.models) > 10
    rated = [e for e in new.models if e.ratio]
    rated[0].ratio = Interval(9.0, 8.9, 9.1)
    assert [agrees for *_, agrees in compare.agreement(old, new)].count(False) == 1
    for name, run in (("old", old), ("new", new)):
        run.save(tmp_path / f"{name}.json")
    compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    told = capsys.readouterr().out
    assert f"disagrees: {' '.join(rated[0].key)}" in told
    assert f"{len(found) - 1} of {len(found)} agree within their intervals" in told
    assert "in one run only" not in told


def test_what_only_one_run_has_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = made_up(0), made_up(1)
    peers = [e for e in new.models if e.ratio]
    peers[0].ratio, peers[0].seconds, peers[0].failed = None, [], "too slow to repeat"
    new.models.remove(peers[1])
    next(e for e in old.models if e.key == peers[2].key).ratio = None
    for name, run in (("old", old), ("new", new)):
        run.save(tmp_path / f"{name}.json")
    compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    told = capsys.readouterr().out
    assert "3 ratios are in one run only" in told
    assert re.search(r", 2 vanished$", told, re.M) and "too slow to repeat" in told
