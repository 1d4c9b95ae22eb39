"""Every Triton kernel compiles for GPUs that are not here, without spills and within memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bert_fast import aot

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "_triton"

pytest.importorskip("triton")


def compiled(out: Path) -> list[dict]:
    """The table of the gate, compiled where kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bert_fast.aot", "--quick", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    faults = [line for line in done.stdout.splitlines() if "<--" in line]
    assert done.returncode == 0, "\n".join(faults) + done.stderr[-4000:]
    return json.loads(out.read_text())


def test_every_kernel_for_every_target(tmp_path):
    # One test, because every worker would compile the table anew.
    rows = compiled(tmp_path / "table.json")
    defined = {
        f"{path.stem}.{name}"
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert len(defined) > 10
    # What is NVIDIA's: e4m3 and the copy engine.
    without = {"gfx942": {"linear_fp8._quantize_kernel", "linear_tma.gemm_kernel"}}
    for target, _ in aot.QUICK:
        expected = defined - without.get(target, set())
        assert {row["kernel"] for row in rows if row["target"] == target} == expected
    for row in rows:  # the gate's own verdict, looked at from outside: numbers are there and sane
        assert 0 < row["registers"] <= 512, row
        assert row["shared"] <= aot.TARGETS[row["target"]][3], row
        assert row["spills"] <= aot.SLACK, row


def test_every_module_has_samples():
    """A module with a launch of its own is run by the gate, or its kernels would go unseen."""
    for path in KERNELS.glob("*.py"):
        text = path.read_text()
        if re.search(r"^def forward\(", text, re.M):
            assert re.search(r"^def samples\(|import samples$", text, re.M), path.name


def test_interpreter_is_refused():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bert_fast.aot"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
