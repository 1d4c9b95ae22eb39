"""The command for compute-sanitizer, with a stand-in for NVIDIA's, and its calls on the CPU."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import sanitizer
from bert_fast.ops import OPS
from bert_fast.ops.backends import extension_missing

# Says what each tool says; `PLANS` holds, by tool, errors found or what else happens.
FAKE = """#!{python}
import os, subprocess, sys, time
line = sys.argv[1:]
name = line[-1]
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
with open(os.path.join(os.path.dirname(__file__), name), "w") as file:
    file.write(" ".join(line))
plan = {plans}.get(name, 1 if name == "control" else 0)
if plan == "hangs":
    subprocess.run(["sleep", "60"])
print("========= COMPUTE-SANITIZER")
print("calling attention, ragged, torch.float16")
if plan == "loses track":
    print("========= Internal Sanitizer Error: the launch was not tracked")
    plan = 0
if plan != "dies":
    print("checked 12 calls: all")
if plan == 1:
    print("========= Uninitialized __global__ memory read of size 4 bytes")
kind = "RACECHECK" if "racecheck" in line else "ERROR"
print(f"========= {{kind}} SUMMARY: {{plan if plan != 'dies' else 0}} of them")
sys.exit(99 if plan in (1, 2) else 3 if plan == "dies" else 0)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command where the tools do as planned; the exit code and what the JSON holds."""

    def go(plans: dict[str, Any], *more: str) -> tuple[int, dict[str, Any]]:
        fake = tmp_path / "compute-sanitizer"
        fake.write_text(FAKE.format(python=sys.executable, plans=plans))
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        code = sanitizer.main(["--out", str(tmp_path / "out.json"), *more])
        return code, json.loads((tmp_path / "out.json").read_text())

    return go


def test_clean(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = run({})
    assert code == 0 and list(rows) == [*sanitizer.TOOLS, "control"]
    assert all(row["failed"] is None and row["calls"] == 12 for row in rows.values())
    assert rows["racecheck"]["summary"] == "RACECHECK SUMMARY: 0 of them"
    assert rows["racecheck"]["exit_code"] == 0 and rows["control"]["exit_code"] == 99
    assert "summary ERROR SUMMARY: 0 of them; " in capsys.readouterr().out
    lines = {name: (tmp_path / name).read_text() for name in rows}
    assert all("--kernel-name kns=bert_fast --error-exitcode 99" in x for x in lines.values())
    assert "--tool synccheck " in lines["synccheck"] and "--tool initcheck " in lines["control"]
    assert [name for name, x in lines.items() if "--report-api-errors no" in x] == ["memcheck"]
    assert len({x.partition("--port ")[2].split()[0] for x in lines.values()}) == len(rows)


@pytest.mark.parametrize(
    ("tool", "plan", "failed"),
    [
        ("memcheck", 1, "found errors"),
        ("racecheck", 1, "found errors"),
        ("synccheck", "dies", "did not run to its end"),
        ("synccheck", "loses track", "did not run to its end"),
        ("control", 0, "what was planted is not seen"),
        ("control", 2, "what was planted is not seen"),  # errors, but of no kernel
    ],
)
def test_one_that_fails_fails_all(run: Any, tool: str, plan: Any, failed: str) -> None:
    code, rows = run({tool: plan})
    assert code == 1 and {name for name, row in rows.items() if row["failed"]} == {tool}
    assert rows[tool]["failed"] == failed and "COMPUTE-SANITIZER" in rows[tool]["output"]
    died_in = "attention, ragged, torch.float16" if plan == "dies" else None
    assert rows[tool]["died_in"] == died_in


def test_a_tool_that_hangs_is_stopped(run: Any) -> None:
    start = time.monotonic()
    code, rows = run({"memcheck": "hangs"}, "--tools", "memcheck", "--seconds", "2")
    assert code == 1 and list(rows) == ["memcheck"] and time.monotonic() - start < 30
    assert rows["memcheck"]["failed"] == "stopped after 2 s" and rows["memcheck"]["calls"] == 0


def test_a_missing_sanitizer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitizer, "CUDA_BIN", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        sanitizer.main([])
    assert ended.value.code == 1
    assert "compute-sanitizer is neither on PATH nor in " in capsys.readouterr().err


def test_unknown_tools_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sanitizer.main(["--tools", "memcheck,leakcheck"])
    assert "--tools is memcheck,leakcheck, expected some of memcheck, " in capsys.readouterr().err


def test_chosen_ops_are_passed_on(run: Any, tmp_path: Path, capsys: Any) -> None:
    code, _ = run({}, "--tools", "racecheck", "--ops", "attention,bias_gelu")
    assert code == 0
    assert (
        "--inside racecheck --ops attention,bias_gelu"
        in (tmp_path / "attention,bias_gelu").read_text()
    )
    with pytest.raises(SystemExit):
        sanitizer.main(["--ops", "attention,pooling"])
    assert "--ops is attention,pooling, expected some of " in capsys.readouterr().err


def test_the_process_ends_before_its_static_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a tool their destructors abort, and what was found would not count."""
    ended: list[int] = []
    monkeypatch.setattr(sanitizer, "inside", lambda which, chosen: {"control": 1}.get(which, 0))
    monkeypatch.setattr(sanitizer.os, "_exit", lambda code: ended.append(code) or sys.exit(code))
    for arguments in (["--inside"], ["--inside", "control"]):
        with pytest.raises(SystemExit):
            sanitizer.main(arguments)
    assert ended == [0, 1]


def test_every_kernel_is_in_the_namespace_of_the_filter() -> None:
    folder = sanitizer.ROOT / "kernels" / "csrc" / "cuda"
    texts = [path.read_text() for path in folder.iterdir()]
    found = [text.partition("__global__")[0] for text in texts if "__global__" in text]
    namespace = sanitizer.FILTER.removeprefix("kns=")
    assert found and all(f"namespace {namespace} {{" in text for text in found)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("add_layernorm", "attention", "bias_gelu", "embed_layernorm")
    monkeypatch.setattr(sanitizer, "OPS", {name: OPS[name] for name in names})


def test_every_sample_is_called(few: None, capsys: pytest.CaptureFixture[str]) -> None:
    if extension_missing():
        pytest.skip(extension_missing()[0])
    number = {
        name: 9 * len(list(op.samples(torch.device("cpu"), torch.float32)))
        for name, op in sanitizer.OPS.items()
    }
    assert sanitizer.inside("all", "cpu", "generic") == 0
    assert f"checked {sum(number.values())} calls: {number}; skipped 0" in capsys.readouterr().out


def test_large_samples_are_skipped(
    few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitizer, "OPS", {"bias_gelu": OPS["bias_gelu"]})
    monkeypatch.setattr(sanitizer, "LARGEST", 400)
    assert sanitizer.inside("all", "cpu", "reference") == 0
    samples = list(OPS["bias_gelu"].samples(torch.device("cpu"), torch.float32))
    large = [s for s in samples if any(a.numel() > 400 for a in s.args if torch.is_tensor(a))]
    assert 0 < len(large) < len(samples)
    called = 3 * 2 * (len(samples) - len(large))  # the reference has no backward of its own
    told = f"checked {called} calls: {{'bias_gelu': {called}}}; skipped {3 * len(large)} "
    assert told in capsys.readouterr().out


def test_no_call_at_all_is_a_failure(few: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitizer.inside("all", "cpu", "cuda") == 1  # no kernel of a GPU takes these
    assert "checked 0 calls" in capsys.readouterr().out
    assert sanitizer.inside("all", "cpu", "no such backend") == 1


def test_the_backward_is_that_of_cuda_and_not_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["add_layernorm"]
    theirs = replace(
        next(k for k in op.kernels if k.backend == "cuda"),
        backward=lambda *args, needs: "triton's",
        backward_by="triton",
    )
    monkeypatch.setattr(op, "kernels", (theirs,))
    ours = torch.ops.bert_fast_cuda
    monkeypatch.setattr(ours, "add_layernorm_backward", lambda *args: ("ours",), raising=False)
    kernel = sanitizer.own_kernel(op, "cuda")
    assert kernel is not None and kernel.backward is not None
    assert list(kernel.backward("dy", needs=[])) == ["ours"]
