"""The GPU gate: tests, every kernel of every op, and whole models, on one GPU, into one JSON file.

    python -m bench.gpu_gate [--out FILE] [--budget SECONDS] [--commit ID] [--device cpu --quick]

No time is reported for a kernel or model whose values are off. A section that fails is recorded as
such and does not stop the others; the exit code is 1 if any failed. The file is rewritten after
every step, so that a run that is cut off leaves what it had. What the budget leaves no time for is
recorded as skipped. `--device cpu --quick` runs all of it on tiny shapes.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast import doctor
from bert_fast.ops import OPS
from bert_fast.ops.registry import Kernel

from . import cases
from .measure import Clock, Yardstick, compare

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
DTYPE = torch.bfloat16
BACKWARD_TOKENS = "8k"  # the one size at which forward + backward is timed too
MODEL_TOKENS = 16_384


class Gate:
    """The result so far, the file it goes to, and the time left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.quick = torch.device(options.device), bool(options.quick)
        self.clock = Clock(self.device, self.quick)
        self.compiler = "eager" if self.quick else "inductor"
        self.deadline = self.section_deadline = time.monotonic() + options.budget
        self.pytest = options.pytest.split()
        self.result: dict[str, Any] = {"schema": SCHEMA, "failed": []}
        self.result["environment"] = environment(self.device, options.commit)
        self.path = options.out or default_path(self.result["environment"])

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.result, indent=1) + "\n")

    def left(self) -> float:
        """Seconds that the current section may still take."""
        return self.section_deadline - time.monotonic()

    def fail(self, where: str) -> None:
        if where not in self.result["failed"]:
            self.result["failed"].append(where)

    def section(self, name: str, run: Callable[[Gate], None], share: float) -> None:
        """Runs a section within a share of the time that is left."""
        start = time.monotonic()
        self.section_deadline = start + share * max(self.deadline - start, 0.0)
        try:
            run(self)
        except Exception as error:
            traceback.print_exc()
            # Beside what the section had found, or in its place.
            self.result.setdefault(name, {"error": describe(error)})
            self.result.setdefault("errors", {})[name] = describe(error)
            self.fail(name)
        self.result.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        self.save()

    def guarded(
        self, where: str, row: dict[str, Any], run: Callable[..., None], *arguments: Any
    ) -> None:
        """Runs one step of a section on a row of the result; an exception is recorded there."""
        try:
            run(self, row, *arguments)
        except Exception as error:
            row["error"] = describe(error)
            self.fail(where)
        self.save()


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2_000]


def output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(device: torch.device, commit: str | None) -> dict[str, Any]:
    cuda = device.type == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "commit": commit or output_of("git", "rev-parse", "HEAD"),
        "modified": bool(output_of("git", "status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "kind": device.type,
        "processors": torch.cuda.get_device_properties(device).multi_processor_count
        if cuda
        else torch.get_num_threads(),
        "driver": output_of(*query) if cuda else None,
        "cuda": torch.version.cuda,
        "versions": doctor.versions(),
        "machine": doctor.machine(),
        "dtype": str(DTYPE).removeprefix("torch."),
    }


def default_path(where: dict[str, Any]) -> Path:
    name = where["device"].lower().replace("nvidia", "") if where["kind"] == "cuda" else "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    commit = (where["commit"] or "unknown")[:10]
    return ROOT / "bench" / "results" / f"gpu-{name}-{commit}.json"


# -- sections ---------------------------------------------------------------------------------


def run_ceilings(gate: Gate) -> None:
    gate.result["ceilings"] = gate.clock.ceilings()


def run_tests(gate: Gate) -> None:
    """pytest in a process of its own; counts by outcome, and the names of what failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *gate.pytest, "-q", f"--junitxml={report}"]
        if importlib.util.find_spec("xdist") is not None and not gate.quick:
            command += ["-n", "8"]  # compiling Triton kernels is what takes the time
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(gate.left(), 60)
        )
        tests = {"exit_code": done.returncode, "command": " ".join(command[1:])}
        gate.result["tests"] = tests
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report:\n{(done.stdout + done.stderr)[-1_500:]}")
        tests.update(read_junit(report))
    print(done.stdout[-1_500:])
    if done.returncode != 0 or tests["failed"] or tests["errors"]:
        gate.fail("tests")


def read_junit(report: Path) -> dict[str, Any]:
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    count = {k: sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors")}
    skipped = sum(int(s.get("skipped", 0)) for s in suites)
    bad = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = count["tests"] - count["failures"] - count["errors"] - skipped
    return {"passed": passed, "failed": count["failures"], "errors": count["errors"],
            "skipped": skipped, "failing": bad[:50]}  # fmt: skip


def run_ops(gate: Gate) -> None:
    rows = gate.result["ops"] = []
    sizes = {"tiny": 64} if gate.quick else cases.TOKENS
    # What matters most comes first, in case time runs out.
    for tokens_name in sorted(sizes, key=(BACKWARD_TOKENS, "32k", "1k", "tiny").index):
        for model in (cases.TINY,) if gate.quick else reversed(cases.MODELS.values()):
            for case in cases.op_cases(model, sizes[tokens_name], gate.device, DTYPE):
                row: dict[str, Any] = {"op": case.op, "case": case.name, "kernels": {}}
                rows.append(row)
                if gate.left() < 0:
                    row["skipped"] = "time budget"
                    continue
                both = gate.quick or tokens_name == BACKWARD_TOKENS
                gate.guarded("ops", row, time_op, case, both)


def time_op(gate: Gate, row: dict[str, Any], case: cases.Case, backward: bool) -> None:
    """Checks, then times every kernel of an op at one shape."""
    op, args = OPS[case.op], case.make()
    flops, moved = op.cost(*args)
    row |= {"flop": flops, "bytes": moved}
    for step in ("forward", "forward_backward")[: 1 + backward]:
        yardstick = Yardstick(op, args, step != "forward")
        for kernel in op.kernels:
            found: dict[str, Any] = {}
            entry = row["kernels"].setdefault(kernel.backend, {})
            why = kernel.why_not(*yardstick.leaves(args))
            if kernel.backend == "triton" and gate.device.type == "cpu":
                why = ["Triton's interpreter is not timed"]
            if why:
                entry[step] = {"not_run": why}
                continue
            entry[step] = found
            gate.guarded("ops", found, time_kernel, yardstick, kernel)
            if "ms" in found and step == "forward":
                found |= rates(gate, found["ms"], flops, moved)
    show_op(row)


def time_kernel(gate: Gate, found: dict[str, Any], yardstick: Yardstick, kernel: Kernel) -> None:
    op, args = yardstick.op, yardstick.args

    def call(*values: Any) -> Tensor:
        return op(*values, backend=kernel.backend)

    errors = yardstick.check(call)
    found["error"] = errors[0].error
    found["budget"] = errors[0].budget
    if not all(e.holds for e in errors):
        found["wrong"] = [{"error": e.error, "budget": e.budget} for e in errors]
        gate.fail("ops")
        return
    if yardstick.backward:
        leaves = yardstick.leaves(args)
        inputs = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        found["ms"] = gate.clock.median_ms(
            lambda: torch.autograd.grad(call(*leaves), inputs, yardstick.dy)
        )
        return
    with torch.inference_mode():
        found["ms"] = gate.clock.median_ms(lambda: call(*args))


def rates(gate: Gate, ms: float, flops: int, moved: int) -> dict[str, float]:
    found = {"gb_per_s": moved / ms / 1e6, "tflop_per_s": flops / ms / 1e9}
    ceilings = gate.result.get("ceilings") or {}
    if ceilings:
        found["share_of_copy"] = found["gb_per_s"] / ceilings["copy_gb_per_s"]
        found["share_of_matmul"] = found["tflop_per_s"] / ceilings["matmul_tflop_per_s"]
    return found


def show_op(row: dict[str, Any]) -> None:
    told = []
    for name, steps in row["kernels"].items():
        for step, found in steps.items():
            short = {"forward": "", "forward_backward": "+bwd"}[step]
            if "ms" in found:
                told.append(f"{name}{short} {found['ms'] * 1e3:.1f}us")
            elif "wrong" in found or "error" in found:
                told.append(f"{name}{short} WRONG" if "wrong" in found else f"{name}{short} FAILED")
    print(f"{row['op']:16} {row['case']:26} {'  '.join(told)}", flush=True)


def run_models(gate: Gate) -> None:
    rows = gate.result["models"] = []
    shapes = (
        (cases.TINY,) if gate.quick else (cases.MODELS["bert-base"], cases.MODELS["bert-large"])
    )
    for shape in shapes:
        truth, plain = load_pair(shape, gate.device)
        for workload in cases.WORKLOADS:
            row: dict[str, Any] = {"model": shape.name, "workload": workload}
            rows.append(row)
            if gate.left() < 0:
                row["skipped"] = "time budget"
                continue
            gate.guarded("models", row, time_model, shape, workload, truth, plain)
            print(json.dumps({k: v for k, v in row.items() if k != "contenders"}), flush=True)
            for name, found in row.get("contenders", {}).items():
                told = {k: found[k] for k in ("real_tokens_per_s", "wrong", "error", "skipped")
                        if k in found}  # fmt: skip
                print(f"  {name}: {told}", flush=True)


def load_pair(shape: cases.Model, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """A randomly initialised Hugging Face BERT in fp32, and the same in bf16."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.positions,
        attn_implementation="sdpa",
    )
    truth = BertModel(config).eval().to(device)
    return truth, copy.deepcopy(truth).to(DTYPE)


def time_model(
    gate: Gate,
    row: dict[str, Any],
    shape: cases.Model,
    workload: str,
    truth: nn.Module,
    plain: nn.Module,
) -> None:
    """bert_fast against Hugging Face with SDPA and with torch.compile, on one batch."""
    import bert_fast

    lengths = cases.lengths_of(workload, 512 if gate.quick else MODEL_TOKENS)
    batch = cases.padded_batch(shape, lengths, gate.device)
    kept = batch["attention_mask"].bool()
    row |= {"sequences": len(lengths), "real_tokens": sum(lengths), "padded_tokens": kept.numel()}
    models = {
        "hf_sdpa": plain,
        "hf_compile": torch.compile(copy.deepcopy(plain), backend=gate.compiler),
        "bert_fast": bert_fast.accelerate(copy.deepcopy(plain)),
    }
    contenders = row["contenders"] = {name: {} for name in models}

    def run(name: str) -> Tensor:
        return models[name](**batch).last_hidden_state

    with torch.inference_mode():
        exact = truth(**batch).last_hidden_state[kept].double()
        reference = run("hf_sdpa")[kept]
        ready: dict[str, Callable[[], Any]] = {}
        for name, found in contenders.items():
            if name == "hf_compile" and gate.left() < 60 and not gate.quick:
                found["skipped"] = "time budget"
                continue

            gate.guarded("models", found, check_model, name, run, exact, reference, kept, ready)
        for name, times in gate.clock.interleaved(ready).items():
            median = statistics.median(times)
            contenders[name] |= {
                "ms": median,
                "ms_all": [round(t, 4) for t in times],
                "real_tokens_per_s": sum(lengths) / median * 1e3,
            }


def check_model(
    gate: Gate,
    found: dict[str, Any],
    name: str,
    run: Callable[[str], Tensor],
    exact: Tensor,
    reference: Tensor,
    kept: Tensor,
    ready: dict[str, Callable[[], Any]],
) -> None:
    """Puts a contender among the `ready` ones if its values at real tokens hold."""
    errors = compare(run(name)[kept], exact, reference, 2.0)
    found |= {"max_error": errors.error, "budget": errors.budget}
    if errors.holds:
        ready[name] = lambda: run(name)
    else:
        found["wrong"] = True
        gate.fail("models")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_gate", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few repetitions")
    parser.add_argument("--out", type=Path, help="default: bench/results/gpu-<gpu>-<commit>.json")
    parser.add_argument("--commit", help="what to record where this is no git checkout")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds in all (400)")
    parser.add_argument("--pytest", default="-m gpu", help="arguments of pytest ('-m gpu')")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("this torch sees no GPU; `--device cpu --quick` exercises the script")
    gate = Gate(options)
    gate.save()
    gate.section("ceilings", run_ceilings, 1.0)
    gate.section("tests", run_tests, 0.4)
    gate.section("ops", run_ops, 0.55)
    gate.section("models", run_models, 1.0)
    failed = ", ".join(gate.result["failed"])
    print(f"{gate.path}: {'failed: ' + failed if failed else 'all passed'}")
    return 1 if gate.result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
