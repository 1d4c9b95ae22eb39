"""`bert-fast bench` (or `python -m bench.run`): the CPU or GPU at hand, into one JSON file.

Contenders take turns on the same batches; a ratio is the median over rounds with its interval, and
no winner is called inside it. No time is given for a wrong result. The file is written after every
step, so a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bert_fast.ops.products import has_native

from . import cases, results
from .measure import DTYPES, Clock
from .models import QUICK, Plan, bench_models
from .noise import Probe
from .ops import bench_ops
from .peers import PEERS
from .scaling import bench_scaling
from .workloads import MODELS, WORKLOADS

PARTS = ("models", "ops", "scaling")
PRECISIONS = ("fp32", "bf16", "int8", "fp8")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bert-fast bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small model, fewer peers")
    parser.add_argument("--parts", default=",".join(PARTS), help="of models,ops,scaling")
    parser.add_argument("--models", help=f"of {','.join(MODELS)}")
    parser.add_argument("--workloads", help=f"of {','.join(WORKLOADS)}")
    parser.add_argument("--contenders", help="names of peers; all that are installed otherwise")
    parser.add_argument("--precisions", help="of fp32,bf16,int8,fp8")
    parser.add_argument("--seconds", type=float, help="for each workload, about (10)")
    parser.add_argument(
        "--out", type=Path, help="bench/results/<cpu or cuda>-<device>-<commit>[-<part>].json"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    return parser


def plan_of(options: argparse.Namespace) -> Plan:
    """Raises: ValueError for a name that is not known."""
    plan = QUICK if options.quick else Plan()
    known: dict[str, Iterable[str]] = {
        "models": MODELS,
        "workloads": WORKLOADS,
        "contenders": {peer.name for peer in PEERS},
        "precisions": PRECISIONS,
    }
    changes: dict[str, Any] = {}
    for name, allowed in known.items():
        if given := getattr(options, name):
            changes[name] = tuple(given.split(","))
            check(name, changes[name], allowed)
    return replace(plan, **changes, seconds=options.seconds or plan.seconds)


def less_than_all(options: argparse.Namespace) -> str:
    """What of a full run this one leaves out, for its file's name: it may not overwrite one."""
    names = ("parts", "models", "workloads", "contenders", "precisions")
    chosen = [getattr(options, n) for n in names if getattr(options, n) != parser().get_default(n)]
    return "-".join([*(["quick"] if options.quick else []), *chosen]).replace(",", "-")


def check(name: str, values: Iterable[str], allowed: Iterable[str]) -> None:
    for value in values:
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}, expected {', '.join(sorted(allowed))}")


def op_cases(device: torch.device, quick: bool) -> Iterator[tuple[cases.Case, torch.dtype, bool]]:
    """(case, dtype, with its backward); what matters most first, in case time runs out."""
    small, large = "minilm-l6", "bert-base"
    shapes: list[tuple[str, int, torch.dtype]]
    if device.type == "cuda" and not quick:
        shapes = [
            (name, tokens, torch.bfloat16)
            for tokens in cases.TOKENS.values()
            for name in (large, "bert-large")
        ]
    else:
        shapes = [(small, 1_024, torch.float32), (small, 1_024, torch.bfloat16)]
        if not quick:
            shapes += [(large, 1_024, torch.float32), (large, 8_192, torch.float32)]
            if has_native(torch.bfloat16):  # emulated products take minutes
                shapes += [(large, 1_024, torch.bfloat16), (large, 8_192, torch.bfloat16)]
    for name, tokens, dtype in shapes:
        for case in cases.op_cases(MODELS[name], tokens, device, dtype):
            yield case, dtype, tokens == 8_192 and device.type == "cuda"


def bench(
    run: results.Run,
    path: Path,
    plan: Plan,
    parts: Sequence[str],
    device: torch.device,
    quick: bool,
    tell: Callable[[str], None] = print,
) -> None:
    """Fills `run` part by part and writes it to `path` after every step."""
    probe, clock = Probe(device), Clock(device, quick)
    dtypes = [DTYPES[p] for p in plan.precisions if p in DTYPES]
    run.ceilings = clock.ceilings(dtypes)
    # The narrowest dtype that this machine multiplies in: in another the peer would be emulated.
    usable = [d for d in dtypes if device.type == "cuda" or has_native(d)]
    native = (usable or [torch.float32])[-1]
    steps: dict[str, Callable[[], Iterable[None]]] = {
        "models": lambda: bench_models(run, plan, device, probe, tell),
        "ops": lambda: bench_ops(
            run, op_cases(device, quick), clock, 60.0 if quick else 150.0, not quick, tell
        ),
        "scaling": lambda: bench_scaling(run, plan.models[0], native, quick, tell),
    }
    if device.type == "cuda" and "scaling" in parts:
        run.missing["scaling"] = "measured on CPUs only: it is a matter of their threads"
        parts = [part for part in parts if part != "scaling"]
    for part in parts:
        for _ in steps[part]():
            run.noise = probe.summary()
            run.save(path)
    run.failed += [
        " ".join((*e.key, e.failed)) for e in run.models if e.failed and e.contender == "bert_fast"
    ]
    run.noise = probe.summary()
    run.save(path)


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    if options.compare:
        from .compare import main as compare

        return compare([str(path) for path in options.compare])
    try:
        plan = plan_of(options)
        parts = options.parts.split(",")
        check("parts", parts, PARTS)
    except ValueError as error:
        parser().error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = results.new_run(" ".join(("bert-fast bench", *given)), device)
    path = options.out or results.default_path(run, device.type, less_than_all(options))
    bench(run, path, plan, parts, device, options.quick, partial(print, flush=True))
    noise = run.noise
    assert noise is not None
    forced = f", {noise.forced} kept though disturbed" if noise.forced else ""
    print(f"{path}: {noise.kept} rounds kept, {noise.dropped} dropped as disturbed{forced}")
    for told in run.failed:
        print(f"failed: {told}")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
