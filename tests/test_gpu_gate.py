"""The GPU gate's script, run on the CPU with tiny shapes: every section, and every way to fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases, gpu_gate, measure
from bert_fast.ops import OPS

ONE_TEST = "tests/test_gpu_gate.py -k squad_lengths"
QUICK = ("--device", "cpu", "--quick", "--pytest", ONE_TEST)


def run(out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    code = gpu_gate.main([*QUICK, "--out", str(out), *more])
    return code, json.loads(out.read_text())


def test_squad_lengths_have_the_published_mean() -> None:
    lengths = cases.squad_lengths(1000)
    assert abs(sum(lengths) / len(lengths) - cases.SQUAD_MEAN) < 4
    assert max(lengths) <= 384 and lengths == cases.squad_lengths(1000)


def test_cases_cover_every_op_and_pass_its_checks() -> None:
    found = list(cases.op_cases(cases.TINY, 64, torch.device("cpu"), torch.float32))
    assert {case.op for case in found} == set(OPS)
    for case in found:
        OPS[case.op].check(*case.make())


@pytest.mark.slow
def test_whole_gate(tmp_path: Path) -> None:
    code, result = run(tmp_path / "deep" / "gate.json")
    assert code == 0 and result["failed"] == []
    assert result["schema"] == gpu_gate.SCHEMA
    assert result["tests"]["passed"] == 1 and result["tests"]["failed"] == 0
    assert result["ceilings"]["copy_gb_per_s"] > 0
    assert {row["op"] for row in result["ops"]} == set(OPS)
    for row in result["ops"]:
        times = [s["forward"] for s in row["kernels"].values() if "ms" in s.get("forward", {})]
        assert times and all(t["ms"] > 0 and t["share_of_copy"] > 0 for t in times), row
    assert [row["workload"] for row in result["models"]] == list(cases.WORKLOADS)
    for row in result["models"]:
        assert set(row["contenders"]) == {"hf_sdpa", "hf_compile", "bert_fast"}
        assert all(found["real_tokens_per_s"] > 0 for found in row["contenders"].values())


def test_failures_are_recorded_and_do_not_stop_the_rest(tmp_path: Path, monkeypatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(measure.Clock, "ceilings", broken)  # a whole section
    monkeypatch.setattr(gpu_gate, "load_pair", broken)
    monkeypatch.setattr(OPS["pool"], "cost", broken)  # one row of a section
    code, result = run(tmp_path / "gate.json", "--pytest", "no_such_file.py")
    assert code == 1
    assert result["failed"] == ["ceilings", "tests", "ops", "models"]
    assert "broken" in result["ceilings"]["error"] and "broken" in result["errors"]["models"]
    rows = {row["case"]: row for row in result["ops"]}
    assert any("broken" in row.get("error", "") for row in rows.values())
    assert any("ms" in kernel.get("forward", {}) for row in rows.values()
               for kernel in row["kernels"].values())  # fmt: skip


def test_wrong_values_get_no_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(measure.Errors, "holds", property(lambda errors: False))
    gate = gpu_gate.Gate(
        gpu_gate.parser().parse_args([*QUICK, "--out", str(tmp_path / "gate.json")])
    )
    gate.section("ops", gpu_gate.run_ops, 1.0)
    found = [s for row in gate.result["ops"] for k in row["kernels"].values() for s in k.values()]
    assert gate.result["failed"] == ["ops"]
    assert all("ms" not in step for step in found) and any("wrong" in step for step in found)


def test_no_time_left_is_recorded(tmp_path: Path) -> None:
    gate = gpu_gate.Gate(
        gpu_gate.parser().parse_args(
            [*QUICK, "--out", str(tmp_path / "gate.json"), "--budget", "0"]
        )
    )
    gate.section("ops", gpu_gate.run_ops, 1.0)
    assert {row.get("skipped") for row in gate.result["ops"]} == {"time budget"}
    assert gate.result["failed"] == []


def test_a_gpu_is_asked_for_by_default(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit):
        gpu_gate.main([])
    assert "sees no GPU" in capsys.readouterr().err
