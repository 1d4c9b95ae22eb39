"""The op bench for kernel engineers, through pytest-benchmark: checked first, then timed.

    pytest bench/test_ops.py -k "attention and avx512 and bf16" --benchmark-sort=name

`extra_info` holds GFLOP/s, GB/s and the error against fp64 beside what is allowed. The same cases
in turns with whole models, into the repository's own schema: `bert-fast bench --parts ops`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import Case, op_cases
from bench.measure import Clock, Yardstick, short
from bench.ops import runners
from bench.workloads import MODELS
from bert_fast.ops import OPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16,) if DEVICE.type == "cuda" else (torch.float32, torch.bfloat16)
MODEL, TOKENS = MODELS["bert-base"], 1_024
CASES = [(case, dtype) for dtype in DTYPES for case in op_cases(MODEL, TOKENS, DEVICE, dtype)]
PARAMETERS = [
    pytest.param(
        case, dtype, kernel.backend, id=f"{case.op}-{case.name}-{short(dtype)}-{kernel.backend}"
    )
    for case, dtype in CASES
    for kernel in OPS[case.op].kernels
]


@pytest.mark.parametrize(("case", "dtype", "kernel"), PARAMETERS)
def test_op(benchmark: Any, case: Case, dtype: torch.dtype, kernel: str) -> None:
    op, args = OPS[case.op], case.make()
    call = runners(op, args, Clock(DEVICE, quick=False))[kernel]
    if isinstance(call, list):
        pytest.skip("; ".join(call))
    errors = Yardstick(op, args, backward=False).check(call)
    assert all(e.holds for e in errors.values()), errors
    flop, moved = op.cost(*args)

    def run() -> None:
        call(*args)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        benchmark(run)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "gflop_per_s": flop / seconds / 1e9,
        "gb_per_s": moved / seconds / 1e9,
        "error": errors["output"].error,
        "budget": errors["output"].budget,
    }
