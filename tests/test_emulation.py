"""The kernels for AVX-512 and AMX where the machine has neither: parity, by stand-ins."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bert_fast.ops.backends import AMX, best_isa, has_isa

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its tests, whose extension has stand-ins for instructions."""
    if platform.machine() not in ("x86_64", "AMD64") or best_isa() == 0:
        pytest.skip("the stand-ins are made of AVX2")
    if has_isa(AMX):
        pytest.skip("this machine has the instructions: the tests of parity run them")
    to = tmp_path_factory.mktemp("emulated")
    build = [sys.executable, "setup.py", "-q", "build_ext", "--emulate", "--build-lib", str(to)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    for name in ("bert_fast", "bench", "tests"):
        ignore = shutil.ignore_patterns("_C.*", "__pycache__", "results")
        shutil.copytree(ROOT / name, to / name, ignore=ignore, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


@pytest.mark.slow
def test_parity_of_emulated_kernels(emulated: Path) -> None:
    """AMX as the best AVX-512 of the machine, and what is without it or without BF16 by number.

    fp16, which is widened and rounded only, by one op; of the encoder's tests those of its threads,
    chunks and rows.
    """
    wanted = (
        "(test_eager and avx512 and (not torch.float16 or bias_gelu)) or lesser_avx512 "
        "or rounds_alike or same_bits or many_chunks or asked_for_often "
        "or (bits_of_its_ops and float32) "
        "or (any_number and bfloat16 and 18)"
    )
    files = ["tests/test_parity.py", "tests/test_int8.py", "tests/test_encoder.py"]
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", wanted, *files]
    done = subprocess.run(run, cwd=emulated, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    told = done.stdout.splitlines()[-1]
    assert " passed" in told and "this CPU" not in done.stdout, told
