"""The bench itself: what it calls a winner, what it drops, what gets no time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from bench import measure, models, noise, results, run, workloads
from bench.peers import Peer
from bert_fast.cli import app

DEVICE = torch.device("cpu")


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_workloads(name: str) -> None:
    workload = workloads.WORKLOADS[name]
    mean = {"squad": 172, "wiki512": 256, "sentence": 27, "rerank": 85, "docs": 410}
    found = workloads.spread(workload.quantiles, 2000)
    if name in mean:
        assert abs(np.mean(found) - mean[name]) < 0.05 * mean[name]
    assert max(found) <= 512 and min(found) >= 1
    arrival = workloads.lengths(workload, 3, "arrival")
    ordered = workloads.lengths(workload, 3, "sorted")
    assert sorted(chain(*arrival)) == list(chain(*ordered)) and len(arrival) == 3
    batch = workloads.padded(workloads.TINY.vocab, arrival[0])
    assert workloads.real_tokens(batch) == sum(arrival[0])
    assert batch["input_ids"].shape == (workload.batch, max(arrival[0]))


def test_a_workload_by_name_may_say_its_batch() -> None:
    squad = workloads.WORKLOADS["squad"]
    assert workloads.named("squad") is squad
    large = workloads.named("squad/256")
    assert large.batch == 256 and large.name == "squad/256" and large.quantiles == squad.quantiles
    assert workloads.orders(large, 2) == ("arrival", "sorted")
    assert [len(batch) for batch in workloads.lengths(large, 2, "sorted")] == [256, 256]
    base = workloads.MODELS["bert-base"]
    assert workloads.fitted(large, base, 2, float("inf")) is large
    plan = models.Plan(workloads=("full512/256", "squad"))
    assert [w.batch for w in models.workloads_of(plan, base)] == [256, 16]


@pytest.mark.parametrize("name", ["squat", "squad/", "squad/0", "squad/-1", "squad/x", "/256", ""])
def test_a_bad_workload_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown workload '{name}', expected one of single16"):
        workloads.named(name)


def test_flop_counts_what_the_modules_do() -> None:
    model = workloads.MODELS["minilm-l6"]
    # Published for MiniLM-L6: 2.9 GFLOP for one text of 128 tokens.
    assert abs(workloads.flop(model, [128]) / 1e9 - 2.9) < 0.1


def test_a_ratio_inside_the_noise_is_no_win() -> None:
    draw = np.random.default_rng(1)
    same = draw.normal(1.0, 0.03, (2, 7))
    assert noise.ratio(same[0], same[1], 0.02).verdict == "within noise"
    assert noise.ratio(same[0] * 1.5, same[1], 0.02).verdict == "faster"
    assert noise.ratio(same[0] * 0.6, same[1], 0.02).verdict == "slower"
    found = noise.ratio(same[0] * 1.04, same[1], 0.05)
    assert found.low < 1 < found.high  # the floor alone covers 4 %


def test_disturbed_rounds_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = noise.Probe(DEVICE)
    quiet = iter([True, True, False, True, False, *[True] * 40])
    monkeypatch.setattr(probe, "quiet", lambda: next(quiet))
    monkeypatch.setattr(noise.Others, "disturbed", lambda self: False)
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = noise.interleaved(runs, probe, 4, 60.0)
    assert len(times["a"]) == len(times["b"]) == 4
    assert probe.kept == 4 and probe.dropped == 2
    assert order[:4] == ["a", "b", "b", "a"]  # they take turns in going first


def test_rounds_beside_another_process_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([0.0] * 4 + [5.0] * 40)  # before and after each round
    monkeypatch.setattr(noise.Others, "_taken", staticmethod(lambda: next(taken)))
    probe = noise.Probe(DEVICE)
    monkeypatch.setattr(probe, "quiet", lambda: True)
    noise.interleaved({"a": lambda: None}, probe, 4, 60.0)
    assert (probe.kept, probe.dropped, probe.forced) == (4, 1, 0)
    count = iter(range(1_000))  # never a quiet moment
    monkeypatch.setattr(noise.Others, "_taken", staticmethod(lambda: next(count)))
    probe.kept = probe.dropped = 0
    times = noise.interleaved({"a": lambda: None}, probe, 20, 60.0)
    assert (len(times["a"]), probe.kept, probe.forced) == (noise.LEAST,) * 3


def test_others_sees_a_process_that_computes() -> None:
    if noise.Others._taken() == 0.0:
        pytest.skip("no /proc/stat")
    line = [sys.executable, "-c", "while True: pass"]
    other = subprocess.Popen(line)
    try:
        others = noise.Others()
        time.sleep(1.0)
        assert others.disturbed()
    finally:
        other.kill()
        other.wait()


def test_a_probe_of_a_gpu_outlasts_its_launches() -> None:
    size, elements = noise.extent(torch.device("cuda"))
    assert 2 * size**3 / 60e12 > 1e-3  # seconds, at an H200's rate in fp32
    assert 8 * elements / 4e12 > 1e-4  # read and written
    probe = noise.Probe(torch.device("cpu"))
    assert (probe.a.shape, probe.b.shape) == ((384, 384), (1 << 20,))


def test_a_much_slower_contender_leaves_after_the_first_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = {"a": lambda: None, "slow": lambda: time.sleep(0.002)}
    probe = noise.Probe(DEVICE)
    monkeypatch.setattr(probe, "quiet", lambda: True)
    monkeypatch.setattr(noise.Others, "disturbed", lambda self: False)
    runs["as_fast"] = runs["a"]
    beside = {name: "a" for name in runs}
    times = noise.interleaved(runs, probe, 8, 60.0, beside)
    # The median of fewer rounds than LEAST has no 95 % interval.
    assert len(times["a"]) == 8 and len(times["slow"]) == noise.LEAST
    found = noise.ratio(times["slow"], times["a"], 0.0)
    assert found.verdict == "faster" and found.high >= found.value >= found.low


def test_spread_of_a_median_covers_it() -> None:
    draw, held = np.random.default_rng(0), 0
    for _ in range(400):
        samples = draw.normal(1.0, 0.1, 25)
        held += abs(float(np.median(samples)) - 1.0) <= noise.spread_of_median(samples.tolist())
    assert 0.9 < held / 400 < 0.99
    assert noise.spread_of_median([2.0]) == 0.0


def test_batches_shrink_until_a_pass_fits() -> None:
    base, squad = workloads.MODELS["bert-base"], workloads.WORKLOADS["squad"]
    assert workloads.fitted(squad, base, 2, float("inf")) == squad
    small = workloads.fitted(squad, base, 2, 0.1e12)
    assert small.batch == 2 and small.quantiles == squad.quantiles
    assert workloads.fitted(squad, workloads.MODELS["minilm-l6"], 2, 0.15e12) == squad
    full = workloads.fitted(workloads.WORKLOADS["full512"], base, 2, 0.0)
    pairs = workloads.fitted(squad, base, 2, 0.0)
    assert full.batch == 1 and pairs.batch == 2
    assert workloads.orders(squad, 2) == ("arrival", "sorted")
    assert workloads.orders(full, 2) == workloads.orders(pairs, 2) == ("arrival",)  # as padded


def plan_with(monkeypatch: pytest.MonkeyPatch, peers: Sequence[Peer]) -> models.Plan:
    monkeypatch.setattr(models, "PEERS", tuple(peers))
    tiny = workloads.Model("tiny", 2, 64, 2, 128, vocab=2_000)
    monkeypatch.setitem(workloads.MODELS, "tiny", tiny)
    return models.Plan(
        ("tiny",), ("sentence",), precisions=("fp32", "bf16"), batches=2, flop=2e8, seconds=0.3
    )


def peer(name: str, change: Callable[[Tensor], Tensor]) -> Peer:
    def build(model: nn.Module, folder: Path, batches: Sequence[Any]) -> Any:
        def call(batch: Mapping[str, Tensor]) -> Tensor:
            with torch.inference_mode():
                return change(model(**batch).last_hidden_state)

        return call

    return Peer(name, "fp32", lambda: None, build)


def test_a_wrong_result_and_a_missing_peer_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.02)
        return x

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("a peer's own fault")

    absent = Peer("absent", "fp32", lambda: "not installed", lambda *a: None)  # type: ignore
    emulating = Peer("emulating", "bf16", lambda: None, lambda *a: None)  # type: ignore
    plan = plan_with(monkeypatch, [
        peer("bert_fast", lambda x: x), peer("slow", slow), peer("wrong", lambda x: x * 1.01),
        peer("nan", lambda x: x * float("nan")), peer("broken", broken), absent,
        emulating,
    ])  # fmt: skip
    found = results.new_run("test", DEVICE)
    found.machine |= {"GPU": "none", "oneDNN natively in": "float32"}
    told: list[str] = []
    for _ in models.bench_models(found, plan, DEVICE, noise.Probe(DEVICE), told.append):
        pass
    entries = {(e.contender, e.order): e for e in found.models}
    assert entries["slow", "arrival"].ratio and entries["slow", "arrival"].ratio.value > 1.0
    for name in ("wrong", "nan", "broken"):
        entry = entries[name, "sorted"]
        assert entry.failed and not entry.seconds and entry.ratio is None
    assert "relative L2" in str(entries["wrong", "arrival"].failed)
    # What cannot run here is said once; it is no failure of a workload.
    assert found.missing.keys() == {"absent fp32", "emulating bf16"}
    assert not {"absent", "emulating"} & {e.contender for e in found.models}
    assert "slow" in told[0]


def test_results_survive_their_file(tmp_path: Path) -> None:
    found = results.new_run("test", DEVICE)
    found.models.append(results.Entry("m", "w", "o", "c", "fp32", seconds=[1.0, 2.0]))
    found.models[0].ratio = results.Interval(1.2, 1.1, 1.3)
    found.noise = results.Noise(1.0, 0.1, 3, 1)
    found.training.append({"model": "base", "side": "sdpa", "ms": 1.5, "failed": None})
    found.save(tmp_path / "a" / "run.json")
    assert results.load(tmp_path / "a" / "run.json") == found
    older = json.loads((tmp_path / "a" / "run.json").read_text())
    del older["training"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert results.load(tmp_path / "older.json").training == []
    (tmp_path / "old.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match="not a result of schema"):
        results.load(tmp_path / "old.json")


def test_names_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--models", "gpt"], ["--workloads", "x"], ["--parts", "y"]):
        with pytest.raises(SystemExit):
            run.main(arguments)
        assert "unknown" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_from_anywhere(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    line = [sys.executable, "-m", "bert_fast.cli", "bench", "--quick", "--parts", "models",
            "--workloads", "single16", "--seconds", "1", "--out", str(out)]  # fmt: skip
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results.load(out)
    assert {e.contender for e in found.models} == {"bert_fast", "hf_sdpa"}
    assert found.noise and found.noise.kept >= 3 and "rounds kept" in done.stdout


def test_the_command_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench that outlives the command that was ended disturbs whatever is timed next."""
    found: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: found.append(arguments))
    CliRunner().invoke(app, ["bench", "--quick"])
    ((_, line, environment),) = found
    assert line[1:] == ["-m", "bench.run", "--quick"] and environment["PYTHONPATH"]


def test_a_peer_too_slow_to_repeat_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def crawl(x: Tensor) -> Tensor:
        time.sleep(0.6)
        return x

    plan = plan_with(monkeypatch, [peer("bert_fast", lambda x: x), peer("crawls", crawl)])
    monkeypatch.setattr(models, "LONGEST_PASS", 0.5)
    found = results.new_run("test", DEVICE)
    for _ in models.bench_models(found, plan, DEVICE, noise.Probe(DEVICE), lambda line: None):
        pass
    failed = {str(e.failed) for e in found.models if e.contender == "crawls"}
    # Measured on the texts as they arrive, foretold when they come again sorted. How slow it was
    # is the machine's affair: a busy one takes several seconds.
    assert len(failed) == 2
    assert all(re.fullmatch(r"too slow to repeat: (about )?\d+ s a pass", f) for f in failed)
    assert all(e.seconds for e in found.models if e.contender == "bert_fast")


def contenders() -> models.Contenders:
    return models.Contenders(nn.Identity(), Path(), [])


def batches_of(*texts: list[int]) -> list[dict[str, Tensor]]:
    return [workloads.padded(99, lengths) for lengths in texts]


def test_a_static_shape_is_judged_by_the_largest_batch() -> None:
    def static(batch: Mapping[str, Tensor]) -> Tensor:
        time.sleep(0.05)  # whatever the batch
        return batch["input_ids"]

    # Of the first batch, twenty times as small, a pass would seem to take a second.
    a_pass = contenders().a_pass(peer("static", lambda x: x), static, batches_of([20], [20] * 20))
    assert 0.05 < a_pass < 0.5


def test_one_hold_up_rules_nobody_out() -> None:
    sleeps = iter([2.5, 0.0, 0.3, 0.3, 0.3])  # of a call that takes long, two

    def call(batch: Mapping[str, Tensor]) -> Tensor:
        time.sleep(next(sleeps))
        return batch["input_ids"]

    known, held_up, batches = contenders(), peer("held_up", lambda x: x), batches_of([200])
    assert known.a_pass(held_up, call, batches) < 1.0
    assert known.a_pass(held_up, call, batches) >= 0.3
    assert known.pace[held_up] < 0.3 / 200  # the least, of all workloads


def test_the_longest_text_of_the_last_batch_is_checked() -> None:
    model, batches = models.load(workloads.TINY), batches_of([5, 3, 4, 2, 5, 5], [9, 30, 8])
    exact = models._truth(model, batches)
    assert {place: len(truth) for place, truth in exact.items()} == {
        (0, 0): 5, (0, 1): 3, (0, 2): 4, (0, 3): 2, (1, 1): 30
    }  # fmt: skip
    with torch.inference_mode():
        outputs = [model(**batch).last_hidden_state for batch in batches]
        found = {**models._texts(exact, 0, outputs[0]), **models._texts(exact, 1, outputs[1])}
        assert models._errors(found, exact)[0] < 1e-5
        outputs[1][1, 20] = 0.0
        found |= models._texts(exact, 1, outputs[1])
        assert models._errors(found, exact)[0] > 1e-2


def test_few_texts_of_a_large_batch_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, ...]] = []
    model = models.load(workloads.TINY)

    def seen(module: nn.Module, args: Any, inputs: Any) -> None:
        ran.append(tuple(args[0].shape))

    model.register_forward_pre_hook(seen, with_kwargs=True)  # the copy in fp64 has it too
    texts = workloads.lengths(workloads.named("squad/256"), 2, "sorted")
    exact = models._truth(model, batches_of(*texts))
    longest = texts[1].index(max(texts[1]))
    assert list(exact) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, longest)]
    assert ran == [(1, n) for n in (*texts[0][:4], max(texts[1]))]


def test_a_part_of_a_run_does_not_overwrite_a_full_one() -> None:
    found = results.new_run("test", DEVICE, "0123456789abcdef")

    def name(*arguments: str) -> str:
        part = run.less_than_all(run.parser().parse_args(arguments))
        return results.default_path(found, "cpu", part).name

    assert name().endswith("-0123456789.json") and name("--seconds", "3") == name()
    assert name("--quick", "--parts", "models,ops").endswith("-0123456789-quick-models-ops.json")


def test_scaling_is_not_measured_beside_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Probe", lambda device: noise.Probe(DEVICE))
    monkeypatch.setattr(run, "Clock", lambda device, quick: measure.Clock(DEVICE, quick))
    monkeypatch.setattr(measure.Clock, "ceilings", lambda *args: {})
    found = results.new_run("test", DEVICE)
    plan, gpu = models.Plan(), torch.device("cuda")
    run.bench(found, tmp_path / "run.json", plan, ["scaling"], gpu, quick=True)
    assert not found.scaling and "CPUs only" in found.missing["scaling"]


def test_ceilings_are_the_best_of_several_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 2.0, 3.0, 4.0, 5.0, 8.0, 7.0, 6.0, 1.0, 4.0])
    monkeypatch.setattr(measure.Clock, "median_ms", lambda clock, run: next(times))
    found = measure.Clock(DEVICE, True).ceilings([torch.float32])
    assert found["copy_gb_per_s"] == pytest.approx(2 * (1 << 27) / 2.0 / 1e6)
    assert found["matmul_fp32_tflop_per_s"] == pytest.approx(2 * 1536**3 / 1.0 / 1e9)


def test_the_op_bench_of_pytest_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    line = [sys.executable, "-m", "pytest", "bench/test_ops.py", "-q", "-p", "no:cacheprovider",
            "-k", "pool and fp32 and not triton", "--benchmark-max-time=0.05",
            f"--benchmark-json={out}"]  # fmt: skip
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        line, cwd=results.ROOT, env=alone, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    timed = json.loads(out.read_text())["benchmarks"]
    assert timed and all(row["extra_info"]["error"] <= row["extra_info"]["budget"] for row in timed)
