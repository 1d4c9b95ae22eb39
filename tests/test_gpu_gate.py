"""The GPU gate's script, run on the CPU with small shapes: every section, and every way to fail."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import cases, gpu_gate, measure, models, noise, results, workloads
from bert_fast.ops import OPS

ONE_TEST = "tests/test_gpu_gate.py -k squad_lengths"
QUICK = ("--device", "cpu", "--quick", "--pytest", ONE_TEST)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Sections, so that what a test puts in the place of theirs is seen; and whatever disturbs
    them: the other tests do, and no time that they find is looked at."""

    def filled(path: Path, options: Any) -> None:
        gpu_gate.fill(results.new_run("test", torch.device("cpu")), path, options)

    monkeypatch.setattr(noise.Others, "disturbed", lambda others: False)
    monkeypatch.setattr(noise.Probe, "quiet", lambda probe: True)
    monkeypatch.setattr(measure, "MEDIANS", 1)
    if "alone" not in request.node.name:
        monkeypatch.setattr(gpu_gate, "alone", filled)


@pytest.fixture
def small_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(device: torch.device, quick: bool) -> Any:
        for case in cases.op_cases(workloads.TINY, 64, device, torch.bfloat16):
            yield case, torch.bfloat16, True

    monkeypatch.setattr(gpu_gate, "op_cases", few)


@pytest.fixture
def ops_only(monkeypatch: pytest.MonkeyPatch, small_ops: None) -> None:
    """The other sections are those of `test_whole_gate`."""
    monkeypatch.setattr(gpu_gate, "run_tests", lambda *args: None)
    monkeypatch.setattr(gpu_gate, "bench_models", lambda *args: [])
    monkeypatch.setattr("bench.training_gpu.measure", lambda *args, **kwargs: [])


def run(out: Path, *more: str) -> tuple[int, results.Run]:
    code = gpu_gate.main([*QUICK, "--out", str(out), *more])
    return code, results.load(out)


def test_squad_lengths_have_the_published_mean() -> None:
    lengths = workloads.spread(workloads.SQUAD, 1000)
    assert abs(sum(lengths) / len(lengths) - 172) < 4
    assert max(lengths) <= 384 and lengths == workloads.spread(workloads.SQUAD, 1000)


def test_cases_cover_every_op_and_pass_its_checks() -> None:
    found = list(cases.op_cases(workloads.TINY, 64, torch.device("cpu"), torch.float32))
    assert {case.op for case in found} == set(OPS)
    for case in found:
        OPS[case.op].check(*case.make())


@pytest.mark.slow
def test_whole_gate(tmp_path: Path, small_ops: None) -> None:
    code, result = run(tmp_path / "deep" / "gate.json")
    assert code == 0 and result.failed == []
    assert result.tests and result.tests["passed"] == 1 and result.tests["failed"] == 0
    assert result.ceilings["copy_gb_per_s"] > 0
    assert {row.op for row in result.ops} == set(OPS)
    for op in OPS:
        timed = [row for row in result.ops if row.op == op and row.ms]
        assert {"forward", "forward_backward"} == {row.step for row in timed}
        eight = op.endswith(("_int8", "_fp8"))  # of which there is no ceiling
        assert all(bool(row.share) != eight for row in timed if row.step == "forward")
    plans = gpu_gate.SMALL_PLANS.values()
    assert {e.workload for e in result.models} == {name for p in plans for name in p.workloads}
    assert {(row["model"], row["side"]) for row in result.training} == {
        ("tiny", "sdpa"), ("tiny", "bert_fast")
    }  # fmt: skip
    assert all(row["ms"] > 0 and row["share"] > 0 for row in result.training)
    for entry in result.models:
        assert entry.tokens_per_s and entry.cosine and entry.cosine > 0.99
        assert (entry.ratio is None) == (entry.contender == "bert_fast")


def test_failures_are_recorded_and_do_not_stop_the_rest(
    tmp_path: Path, small_ops: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("bench.models.load", broken)  # whole sections
    monkeypatch.setattr("bench.training_gpu.measure", broken)
    monkeypatch.setattr("bench.measure.Yardstick.check", broken)  # each row of a section
    code, result = run(tmp_path / "gate.json", "--pytest", "no_such_file.py")
    assert code == 1 and len(result.failed) > 3
    assert any(told.startswith("tests: RuntimeError") for told in result.failed)
    for section in ("served", "training", "models"):
        assert any(told.startswith(f"{section}: RuntimeError: broken") for told in result.failed)
    assert any("broken" in (row.failed or "") for row in result.ops)


def test_a_section_alone_may_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_gate, "run_tests", lambda *args: None)
    monkeypatch.setattr(gpu_gate, "SHARES", {"tests": 1, "ops": 1, "models": 1})
    dying = "import os; os.abort()"

    def died(command: list[str], seconds: float) -> tuple[int, str]:
        assert command[1:4] == ["-m", "bench.gpu_gate", "--section"]
        if command[4] == "ops":
            part = results.new_run("test", torch.device("cpu"))
            part.ops = [results.OpEntry("pad", "c", "fp32", "avx2", "forward", 0, 1, 0.5)]
            part.save(Path(command[6]))  # what it had when it died
        return ended([sys.executable, "-c", dying], seconds)

    ended = gpu_gate.ended
    monkeypatch.setattr(gpu_gate, "ended", died)
    code, result = run(tmp_path / "gate.json")
    assert code == 1 and [e.ms for e in result.ops] == [0.5]
    names = [told.partition(":")[0] for told in result.failed]
    assert names == ["ops", "models"] and "exited with -6" in result.failed[0]
    assert [path.name for path in tmp_path.iterdir()] == ["gate.json"]


def test_an_op_without_memory_does_not_end_the_section(
    tmp_path: Path, ops_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(measure.Yardstick, "_results", full)
    code, result = run(tmp_path / "gate.json")
    assert code == 1 and {row.op for row in result.ops} == set(OPS)
    assert all("no memory" in str(row.failed) for row in result.ops)


def test_a_call_without_memory_is_the_failure_of_its_rows(
    tmp_path: Path, ops_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(measure.Clock, "ceilings", lambda *args: {})
    monkeypatch.setattr(measure.Clock, "times_ms", full)
    code, result = run(tmp_path / "gate.json")
    assert code == 1 and {row.op for row in result.ops} == set(OPS)
    assert any("no memory" in str(row.failed) for row in result.ops)


def test_tests_that_are_cut_off_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # or starting may take all its time
    (tmp_path / "test_a.py").write_text(
        "import time\ndef test_one(): pass\ndef test_two(): time.sleep(60)\n"
    )
    report = tmp_path / "report.xml"
    start = time.monotonic()
    line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    code, told = gpu_gate.ended([*line, f"--junitxml={report}"], 12.0)
    assert signal.signal(signal.SIGINT, before) == signal.SIG_IGN
    assert time.monotonic() - start < 12 + gpu_gate.LAST_WORDS
    assert code == pytest.ExitCode.INTERRUPTED
    assert gpu_gate.read_junit(report)["passed"] == 1, told


LOST = "assert 1 == 2, 'why it failed' + 500 * '.'"


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        (f"def test_a(): {LOST}\n", 1, "test_a::test_a: AssertionError: why it failed...."),
        ("import no_such_module\n", 2, "No module named 'no_such_module'"),
    ],
)
def test_why_tests_failed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, code: int, told: str
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(gpu_gate, "SHARES", {"tests": 1.0})
    (tmp_path / "test_a.py").write_text(body)
    out = tmp_path / "gate.json"
    failed, result = run(out, "--pytest", f"-p no:cacheprovider {tmp_path}/test_a.py")
    assert failed == 1 and result.tests and result.tests["exit_code"] == code
    (one,) = result.tests["failing"]
    assert told in one and len(one) < gpu_gate.MESSAGE + 100
    assert f"pytest exited with {code}: " in result.failed[0] and told in result.failed[0]
    whole = out.with_name("gate.json.junit.xml").read_text()
    assert LOST not in body or 500 * "." in whole
    assert gpu_gate.read_junit(out.with_name("gate.json.junit.xml"))["failing"] == [one]


@pytest.mark.parametrize(("took", "told"), [(59.0, "exited with 2"), (60.0, "its time was up")])
def test_the_clock_tells_whether_pytest_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, took: float, told: str
) -> None:
    ticks = iter((0.0, took))
    monkeypatch.setattr(gpu_gate, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(gpu_gate, "ended", lambda *args: (2, ""))
    (tmp_path / "gate.json.junit.xml").write_text("of a gate before")
    with pytest.raises(RuntimeError, match=f"{told} and wrote no report"):
        gpu_gate.run_tests(
            results.new_run("test", torch.device("cpu")), tmp_path / "gate.json", (), 0.0, True
        )


@pytest.mark.parametrize(("cores", "workers"), [(None, "8"), (4, "4"), (64, "16")])
def test_workers_are_as_many_as_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, workers: str
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert gpu_gate.parallel()[:2] == ["-n", workers]


def test_wrong_values_get_no_time(
    tmp_path: Path, ops_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure.Errors, "holds", property(lambda errors: False))
    code, result = run(tmp_path / "gate.json")
    assert code == 1 and result.ops and all(row.ms is None for row in result.ops)
    told = [row.failed for row in result.ops if row.failed and row.failed.startswith("wrong: ")]
    assert any("output has error" in one for one in told)
    assert any("weight has error" in one for one in told)  # the gradients by their names


def test_no_time_left_is_recorded(tmp_path: Path, ops_only: None) -> None:
    code, result = run(tmp_path / "gate.json", "--budget", "0")
    assert code == 0 and "the time was up" in result.missing["ops"]


def test_a_gpu_is_asked_for_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit):
        gpu_gate.main([])
    assert "sees no GPU" in capsys.readouterr().err


def test_sections_share_the_time_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, float] = {}
    monkeypatch.setattr(gpu_gate, "run_tests", lambda *args: found.update(tests=args[3]))
    monkeypatch.setattr(
        gpu_gate, "alone", lambda path, options: found.update({options.section: options.budget})
    )
    run(tmp_path / "gate.json", "--budget", "365")  # --quick leaves "compiled" out
    assert list(found) == ["tests", "ops", "served", "training", "models"]
    assert found["tests"] == pytest.approx(150, rel=0.05)
    assert found["models"] > 300  # the others took none of theirs
    found.clear()
    run(tmp_path / "gate.json", "--budget", "100", "--only", "training,ops")
    assert list(found) == ["ops", "training"]
    assert found["ops"] == pytest.approx(100 * 70 / 105, rel=0.05)
    assert found["training"] == pytest.approx(100, rel=0.05)


def test_only_names_sections(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_gate.main([*QUICK, "--only", "ops,kernels"])
    assert "no section ['kernels']" in capsys.readouterr().err


def rows_of(failed: dict[str, str | None]) -> Any:
    def rows(device: Any, sizes: Any, sides: Any, *args: Any, **kwargs: Any) -> Any:
        return [{"model": sizes[0], "lengths": "l", "dtype": "d", "side": side,
                 "failed": failed.get(side, "as asked")} for side in sides]  # fmt: skip

    return rows


@pytest.mark.parametrize("side", ["sdpa", "bert_fast"])
def test_training_fails_the_gate_where_it_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    other = {"sdpa": "bert_fast", "bert_fast": "sdpa"}[side]
    told = {"failed": None, "ms": 1.0, "ratio": 1.0, "beside": "sdpa", "tokens_per_s": 1.0,
            "sequences_per_s": 1.0, "share": 0.5, "peak_mb": None}  # fmt: skip

    def rows(*args: Any, **kwargs: Any) -> Any:
        return [row | (told if row["side"] == other else {}) for row in rows_of({})(*args)]

    monkeypatch.setattr("bench.training_gpu.measure", rows)
    code, result = run(tmp_path / "gate.json", "--only", "training")
    assert [row["side"] for row in result.training] == ["sdpa", "bert_fast"]
    failed = ["training tiny: as asked"] if side == "bert_fast" else []
    assert result.failed == failed and code == len(failed)


@pytest.mark.parametrize("seconds", [0.0, 30.0, 1_000.0])
def test_a_step_is_compiled_only_where_time_is_left(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr("bench.training_gpu.measure", rows_of({}))
    found = results.new_run("test", torch.device("cpu"))
    options = SimpleNamespace(device="cpu", budget=seconds, quick=False)
    for _ in gpu_gate.training(found, options):  # type: ignore[arg-type]
        pass
    done = [(row["model"], row["side"]) for row in found.training]
    every = [(size, side) for size, sides in gpu_gate.TRAINED for side in sides]
    assert done == every[: {0.0: 0, 30.0: 4, 1_000.0: 6}[seconds]]
    assert len(found.missing) == {0.0: 3, 30.0: 1, 1_000.0: 0}[seconds]


def test_parts_are_merged() -> None:
    whole, part = (results.new_run("test", torch.device("cpu")) for _ in range(2))
    whole.training, part.training = [{"side": "a"}], [{"side": "b"}]
    entry = results.Entry("m", "squad/256", "arrival", "bert_fast", "bf16")
    whole.models, part.models = [entry], [entry, replace(entry, contender="torch_compile")]
    gpu_gate.merge(whole, part)
    assert [row["side"] for row in whole.training] == ["a", "b"]
    assert [e.contender for e in whole.models] == ["bert_fast", "torch_compile"]


@pytest.mark.parametrize("plan", [*gpu_gate.PLANS.values(), *gpu_gate.SMALL_PLANS.values()])
def test_plans_name_what_there_is(plan: models.Plan) -> None:
    assert {p.precision for p in plan.peers()} == set(plan.precisions)
    for name in plan.models:
        assert len(models.workloads_of(plan, workloads.MODELS[name])) == len(plan.workloads)
