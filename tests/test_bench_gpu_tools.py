"""`bench.tiles` and `bench.profile`, as far as a CPU runs them."""

from __future__ import annotations

import pytest
import torch

from bench import profile, tiles
from bert_fast.ops.backends import triton_interprets, triton_missing

from .parity import DEVICE

ON_CPU = pytest.mark.skipif(
    bool(triton_missing()) or DEVICE.type != "cpu" or not triton_interprets(),
    reason="Triton does not interpret here",
)


@ON_CPU
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_products_error_tells_right_from_wrong(dtype: str) -> None:
    product = tiles.Product(70, 72, 256, dtype, "cpu")
    product.y.fill_(torch.nan)
    product.run((32, 32, 128, 4, 1))
    assert product.error() <= tiles.OFF[dtype]
    product.bias[3] += 1.0
    assert product.error() > tiles.OFF[dtype]


@ON_CPU
def test_what_is_shipped_is_among_the_candidates() -> None:
    from bert_fast._triton import linear_tma

    assert set(linear_tma.TILES["sm90"]) <= set(tiles.CANDIDATES)
    # Some Triton releases miscompile 64 rows with four warps for Hopper.
    assert all(m != 64 or warps != 4 for m, _, _, warps, _ in tiles.CANDIDATES)
    assert linear_tma.tile("sm90", 43_956, 3_072, 132) == (128, 128, 128, 4, 3)
    assert linear_tma.tile("sm90", 512, 3_072, 132) == (128, 64, 128, 4, 4)
    assert linear_tma.tile("sm90", 100, 768, 132) == (64, 64, 128, 8, 4)


def test_rows_are_told() -> None:
    about = {"dtype": "bf16", "m": 1_000, "n": 100, "k": 50, "tile": (1, 2)}
    line = tiles.told({**about, "us": 10.0, "shipped": True})
    assert "10.0 us" in line and " 1 TFLOP/s" in line and line.endswith("shipped")
    assert tiles.told({**about, "failed": "wrong"}).rstrip().endswith("wrong")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tiles_want_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tiles.main([])
    assert "sees no GPU" in capsys.readouterr().err


def test_a_forward_is_profiled(capsys: pytest.CaptureFixture[str]) -> None:
    profile.main(["--model", "minilm-l6", "--workload", "single16/2", "--rows", "3"])
    told = capsys.readouterr().out
    assert "32 tokens" in told and "back to back" in told
    assert "bert_fast_" in told or "aten::" in told or "_kernel" in told  # a row of the table


def test_a_step_is_profiled_with_what_the_processor_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "batch_of", lambda size, lengths: 1)
    for name in ("WARM_UPS", "TIMED", "PROFILED"):
        monkeypatch.setattr(profile, name, 1)
    profile.main(["--training", "tiny", "--rows", "200", "--host"])
    told = capsys.readouterr().out
    assert "training tiny by bert_fast" in told and "the processor: " in told
    assert told.count("_fused_adamw_") >= 2, told  # in both tables on a CPU; of the whole step


def test_times_are_of_one_call() -> None:
    calls: list[int] = []

    def run() -> None:
        calls.append(1)
        torch.ones(2000, 2000).sum()

    found = profile.kernels(run, torch.device("cpu"))
    times, us = found["aten::sum"]
    assert times == 1.0 and us > 0 and len(calls) == profile.PROFILED
