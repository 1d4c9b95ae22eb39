"""The GPU gate: tests, every kernel of every op, whole models and steps of training, on one GPU.

    python -m bench.gpu_gate [--out FILE] [--budget SECONDS] [--commit ID] [--only ops,training]
                             [--device cpu --quick]

All is in one JSON file. The cases, the checks and the schema are those of `bench.run`; a training
step's are in `bench.training_gpu`. Each section is a process of its own:
an illegal access ends all that its process does on the GPU. One that fails is recorded as such and
does not stop the others; the exit code is 1 if any failed. Ops and models write what they have
after every step to FILE.ops and the like, which FILE takes in when they end; pytest's own report
stays in FILE.junit.xml. `--device cpu --quick` runs all of it on small shapes.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bert_fast.ops.backends import cuda_missing, triton_missing

from . import results
from .measure import Clock
from .models import Plan, bench_models
from .noise import Probe
from .ops import bench_ops
from .run import op_cases

PLAN = Plan(
    models=("bert-base", "bert-large"),
    workloads=("squad", "full128", "full512", "sentence", "single128"),
    contenders=("bert_fast", "hf_sdpa"),
    precisions=("bf16", "fp32", "fp8", "int8"),
    batches=4,
    flop=math.inf,
    seconds=4.0,
)
# What a server has that waits for texts: enough of them for the GPU to be busy in every kernel.
SERVED = replace(
    PLAN,
    workloads=("squad/256", "full512/256"),
    precisions=("bf16", "fp8", "int8"),
    batches=2,
)
# Last, as torch.compile may take all the time that is left, and by itself: a fault ends all.
COMPILED = replace(
    PLAN,
    workloads=("squad/256", "full512"),
    contenders=("bert_fast", "torch_compile"),
    precisions=("bf16",),
)
SMALL = Plan(
    models=("minilm-l6",),
    workloads=("single16", "sentence"),
    contenders=("bert_fast", "hf_sdpa"),
    precisions=("fp32",),  # most CPUs emulate bf16
    batches=1,
    flop=0.01e12,
    seconds=0.5,
)
PLANS = {"served": SERVED, "models": PLAN, "compiled": COMPILED}
SMALL_PLANS = {"served": replace(SMALL, workloads=("single16/4",)), "models": SMALL}
TRAINED = (
    ("base", ("sdpa", "bert_fast")),
    ("large", ("sdpa", "bert_fast")),
    ("base", ("bert_fast", "compiled")),
)
STEPS = 12  # of training that are timed
COMPILING = 120.0  # seconds that a compiled step is ready in; with fewer left it is not begun
GRACE = 60.0  # seconds that a section may take over its share, for the step it is at
MESSAGE = 300  # characters of why a test failed; pytest's report, beside the result, has all
LAST_WORDS = 20.0  # seconds that an interrupted process has, pytest for its report
# Of the time that is left, beside those of the sections to come: seconds of some 380.
SHARES = {"tests": 150, "ops": 70, "served": 50, "training": 35, "models": 60, "compiled": 15}


def run_tests(
    run: results.Run, path: Path, arguments: Sequence[str], seconds: float, quick: bool
) -> None:
    """pytest in a process of its own; counts by outcome, and what failed, and why.

    Its whole report stays beside `path`: a GPU is not there a second time to ask.
    """
    report = path.with_name(f"{path.name}.junit.xml").resolve()  # pytest runs in another folder
    report.unlink(missing_ok=True)  # of a gate before this one
    command = [sys.executable, "-m", "pytest", *arguments, "-q", f"--junitxml={report}"]
    if importlib.util.find_spec("xdist") is not None and not quick:
        command += parallel()
    start, limit = time.monotonic(), max(seconds, 60)
    code, told = ended(command, limit)
    run.tests = {"exit_code": code, "command": " ".join(command[1:])}
    print(told[-4_000:])
    # By the clock, as pytest interrupts itself too, with the same code, where a file does not load.
    late = time.monotonic() - start >= limit
    why = "was stopped when its time was up" if late else f"exited with {code}"
    if not report.exists():
        raise RuntimeError(f"pytest {why} and wrote no report:\n{told[-1_500:]}")
    run.tests.update(read_junit(report))
    if code != 0:
        raise RuntimeError(f"pytest {why}: {run.tests['failing'][:5]}")


def parallel() -> list[str]:
    """Options of pytest: most of its time goes to compiling Triton kernels, one core each."""
    # More than 16 processes would have a CUDA context each, and little to do.
    workers = min(16, os.cpu_count() or 8)
    return ["-n", str(workers), "--dist", "worksteal", "--durations=15"]


def ended(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Exit code and output of a process that is interrupted when its time is up.

    pytest then writes its report of what it has run. Workers that outlive it would disturb the
    timings.
    """
    # What a shell started with `&` ignores interrupts, and so would all that it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(
        command, cwd=results.ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    with running:
        try:
            told, _ = running.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGINT)
            try:  # reading on: a full pipe would keep it from its report
                told, _ = running.communicate(timeout=LAST_WORDS)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                told, _ = running.communicate()
    return running.returncode, told


def read_junit(report: Path) -> dict[str, Any]:
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    count = {k: sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors")}
    skipped = sum(int(s.get("skipped", 0)) for s in suites)
    cases = [case for suite in suites for case in suite.iter("testcase")]
    bad = [told for case in cases for told in failures(case)]
    passed = count["tests"] - count["failures"] - count["errors"] - skipped
    return {"passed": passed, "failed": count["failures"], "errors": count["errors"],
            "skipped": skipped, "failing": bad[:50]}  # fmt: skip


def failures(case: ElementTree.Element) -> list[str]:
    """classname::name: message, of each failure of a test."""
    found = [*case.iter("failure"), *case.iter("error")]
    return [f"{case.get('classname')}::{case.get('name')}: {message(one)}" for one in found]


def message(failure: ElementTree.Element) -> str:
    """The beginning; of a file that does not load, where pytest's message says just that, the end
    of its trace."""
    told = failure.get("message") or ""
    if told in ("", "collection failure"):
        return (failure.text or "").strip()[-MESSAGE:]
    return told[:MESSAGE]


def ops(run: results.Run, options: argparse.Namespace) -> Iterable[None]:
    device, quick = torch.device(options.device), bool(options.quick)
    clock = Clock(device, quick)
    run.ceilings = clock.ceilings([torch.bfloat16, torch.float32])
    cases = op_cases(device, quick)
    return bench_ops(run, cases, clock, options.budget, False, partial(print, flush=True))


def models(run: results.Run, options: argparse.Namespace) -> Iterable[None]:
    device, end = torch.device(options.device), time.monotonic() + options.budget
    plan = (SMALL_PLANS if options.quick else PLANS)[options.section]
    probe = Probe(device)
    for _ in bench_models(run, plan, device, probe, partial(print, flush=True)):
        run.noise = probe.summary()
        yield
        if time.monotonic() > end:
            run.missing[options.section] = "the time was up: the last workloads were left out"
            return


def training(run: results.Run, options: argparse.Namespace) -> Iterable[None]:
    from .training_gpu import measure, told

    device, end = torch.device(options.device), time.monotonic() + options.budget
    quick = bool(options.quick)
    steps, batch, dtype = (2, 2, torch.float32) if quick else (STEPS, None, torch.bfloat16)
    for size, sides in [("tiny", ("sdpa", "bert_fast"))] if quick else TRAINED:
        compiling = COMPILING if "compiled" in sides else 0.0
        if time.monotonic() + compiling > end:
            run.missing[f"training {size} {' '.join(sides)}"] = "the time was up"
            continue
        for row in measure(device, (size,), sides, steps, quick, batch=batch, dtype=dtype):
            run.training.append(row)
            if row.get("compared") is False:
                run.missing[f"values of {row['side']}, training {size}"] = "nothing to compare with"
            print(told(row), flush=True)
        yield


SECTIONS = {"ops": ops, "served": models, "training": training, "models": models,
            "compiled": models}  # fmt: skip


def fill(run: results.Run, path: Path, options: argparse.Namespace) -> None:
    """Runs one section in this process."""
    try:
        for _ in SECTIONS[options.section](run, options):
            run.save(path)
    except (Exception, KeyboardInterrupt) as error:  # the latter where its time is up
        traceback.print_exc()
        run.failed.append(f"{options.section}: {type(error).__name__}: {error}"[:2_000])
    run.save(path)


def alone(path: Path, options: argparse.Namespace) -> None:
    """`fill` in a process of its own. Raises: RuntimeError where that ended by no will of its."""
    command = [sys.executable, "-m", "bench.gpu_gate", "--section", options.section]
    command += ["--out", str(path.resolve()), "--device", options.device]
    command += ["--budget", str(options.budget), *(["--quick"] if options.quick else [])]
    command += ["--commit", options.commit] if options.commit else []
    path.unlink(missing_ok=True)  # of a gate that was killed
    code, told = ended(command, options.budget + GRACE)
    print(told)
    if code not in (0, 1) or not path.exists():
        raise RuntimeError(f"exited with {code}:\n{told[-1_500:]}")


def merge(run: results.Run, part: results.Run) -> None:
    known = {entry.key for entry in run.models}  # bert_fast is in two sections
    run.models += [entry for entry in part.models if entry.key not in known]
    run.ops += part.ops
    run.training += part.training
    run.failed += part.failed
    run.missing |= part.missing
    run.ceilings |= part.ceilings
    run.noise = run.noise or part.noise


def gate(run: results.Run, path: Path, options: argparse.Namespace) -> None:
    """Fills `run`, section by section, in the order of `SHARES`."""
    deadline = time.monotonic() + options.budget
    if options.device == "cuda":  # tests of what is not there are skipped
        run.failed += cuda_missing() + triton_missing()
    left_out = {"compiled"} if options.quick else set()
    names = [n for n in SHARES if n in (options.only or SHARES) and n not in left_out]
    for i, name in enumerate(names):
        run.save(path)
        share = SHARES[name] / sum(SHARES[later] for later in names[i:])
        seconds = share * max(deadline - time.monotonic(), 0.0)
        part = path.with_name(f"{path.name}.{name}")
        try:
            if name == "tests":
                run_tests(run, path, options.pytest.split(), seconds, bool(options.quick))
            else:
                chosen = {**vars(options), "section": name, "budget": seconds}
                alone(part, argparse.Namespace(**chosen))
        except Exception as error:
            traceback.print_exc()
            run.failed.append(f"{name}: {type(error).__name__}: {error}"[:2_000])
        if part.exists():
            merge(run, results.load(part))
            part.unlink()
    # A peer that fails is its own affair; bert_fast may not.
    run.failed += [
        " ".join((*e.key, e.failed)) for e in run.models if e.failed and e.contender == "bert_fast"
    ]
    run.failed += [
        f"training {row['model']}: {row['failed']}"
        for row in run.training
        if row["failed"] and row["side"] == "bert_fast"
    ]
    run.save(path)


def sections(text: str) -> list[str]:
    """Of `--only`. Raises: ArgumentTypeError for a name that is no section's."""
    found = text.split(",")
    if unknown := [name for name in found if name not in SHARES]:
        raise argparse.ArgumentTypeError(f"no section {unknown}, expected some of {[*SHARES]}")
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_gate", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions")
    parser.add_argument("--out", type=Path, help="default: bench/results/cuda-<gpu>-<commit>.json")
    parser.add_argument("--commit", help="what to record where this is no git checkout")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds in all (400)")
    parser.add_argument("--only", type=sections, help=f"these of {','.join(SHARES)}")
    parser.add_argument("--section", choices=tuple(SECTIONS), help="this one, in this process")
    parser.add_argument("--pytest", default="-m gpu", help="arguments of pytest ('-m gpu')")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("this torch sees no GPU; `--device cpu --quick` exercises the script")
    device = torch.device(options.device)
    run = results.new_run(" ".join(("python -m bench.gpu_gate", *given)), device, options.commit)
    path = options.out or results.default_path(run, options.device)
    (fill if options.section else gate)(run, path, options)
    print(f"{path}: " + ("failed: " + "; ".join(run.failed) if run.failed else "all passed"))
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
