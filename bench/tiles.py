"""Times the tiles of `kernels/_triton/linear_tma.py` on the GPU at hand: what its table is made of.

    python -m bench.tiles [--dtypes bf16,int8] [--seconds 120] [--out FILE.json]

For the first product of a feed-forward network (GELU in its epilogue) at a few numbers of rows,
every candidate is checked against fp64 and timed, beside cuBLAS without an epilogue and the kernel
that ATen's product and a pass for GELU make. "shipped" marks what the table takes now.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast import ops

from .measure import Clock

# (M, N, bytes of K, warps, stages); no 64 rows with four warps, see the table's own comment
CANDIDATES = (
    (128, 128, 128, 4, 2), (128, 128, 128, 4, 3), (128, 128, 128, 8, 3), (128, 128, 64, 4, 6),
    (128, 64, 128, 4, 4), (64, 128, 128, 8, 4), (64, 64, 128, 8, 4), (64, 32, 128, 8, 4),
    (32, 64, 128, 4, 4), (128, 256, 128, 8, 3), (256, 128, 128, 8, 3),
)  # fmt: skip
ROWS = (128, 256, 512, 1_024, 2_048, 8_192, 43_956)
WEIGHTS = ((3_072, 768), (4_096, 1_024))  # [N, K] of BERT-base and BERT-large
CHECKED = 256  # rows that are compared with fp64
OFF = {"bf16": 0.004, "int8": 0.02}  # relative L2 beyond which a tile is wrong
COMPILERS = 12  # processes that compile at once


class Product:
    """y = gelu(x W^T + b) on random factors, in bf16 or rounded to int8."""

    def __init__(self, rows: int, n: int, k: int, dtype: str, device: str = "cuda") -> None:
        from bert_fast._triton import linear_row_int8

        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            wide = torch.randn(*shape, device=device, generator=generator) * scale
            return wide.bfloat16()

        self.x, self.weight, self.bias = draw(rows, k), draw(n, k, scale=k**-0.5), draw(n)
        self.y = self.x.new_empty(rows, n)
        self.factors, self.scales = (self.x, self.weight), (None, None, None)
        if dtype == "int8":
            (q, s), (p, t) = map(linear_row_int8.quantize, (self.x, self.weight))
            self.factors, self.scales = (q, p), (s, t / linear_row_int8.GROUP, None)

    def run(self, tile: tuple[int, ...], warm_up: bool = False) -> None:
        from bert_fast._triton import linear_tma

        a, b = self.factors
        linear_tma.launch(tile, a, b.t(), self.bias, self.y, None, "gelu", self.scales, warm_up)

    def error(self) -> float:
        """Relative L2 of the first rows of y to fp64."""
        u = self.x[:CHECKED].double() @ self.weight.double().t() + self.bias.double()
        exact = torch.nn.functional.gelu(u)
        return float((self.y[:CHECKED].double() - exact).norm() / exact.norm())


def compile_one(job: tuple[str, tuple[int, ...]]) -> None:
    dtype, tile = job
    try:
        Product(CHECKED, 256, 256, dtype).run(tile, warm_up=True)
    except Exception as error:  # told when it is to run
        print(f"{dtype} {tile}: {error}"[:200], file=sys.stderr)


def measure(dtypes: Sequence[str], seconds: float) -> Iterable[dict[str, Any]]:
    """One row for each product and tile; "failed" says what is wrong with one."""
    from bert_fast._triton import linear_tma, tiles

    clock, end = Clock(torch.device("cuda"), True), time.monotonic() + seconds
    family, processors = tiles.family(clock.device), tiles.processors(clock.device)
    with get_context("spawn").Pool(COMPILERS) as pool:
        pool.map(compile_one, [(d, tile) for d in dtypes for tile in CANDIDATES], chunksize=1)
    for dtype in dtypes:
        for n, k in WEIGHTS:
            for rows in ROWS:
                if time.monotonic() > end:
                    return
                product = Product(rows, n, k, dtype)
                x, weight, bias = product.x, product.weight, product.bias
                about = {"dtype": dtype, "m": rows, "n": n, "k": k}
                peers = {
                    "cuBLAS, no epilogue": partial(torch.mm, x, weight.t()),
                    "aten": partial(ops.linear_gelu, x, weight, bias, "gelu", "aten"),
                }
                for name, run in peers.items():
                    yield about | {"tile": name, "us": 1e3 * clock.median_ms(run)}
                shipped = linear_tma.tile(family, rows, n, processors)
                for tile in CANDIDATES:
                    row = about | {"tile": tile, "shipped": tile == shipped}
                    try:
                        product.y.fill_(torch.nan)
                        product.run(tile)
                        if not (off := product.error()) <= OFF[dtype] or product.y.isnan().any():
                            raise RuntimeError(f"wrong: relative L2 {off:.1e}")
                        row["us"] = 1e3 * clock.median_ms(partial(product.run, tile))
                    except Exception as error:
                        row["failed"] = str(error)[:200]
                    yield row


def told(row: dict[str, Any]) -> str:
    flop = 2 * row["m"] * row["n"] * row["k"]
    rate = f"{row['us']:8.1f} us {flop / row['us'] / 1e6:5.0f} TFLOP/s" if "us" in row else ""
    about = f"{row['dtype']} {row['m']} x {row['n']} x {row['k']}"
    mark = " shipped" if row.get("shipped") else ""
    return f"{about:26} {row['tile']!s:26} {rate or row['failed']}{mark}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tiles", description=__doc__)
    parser.add_argument("--dtypes", default="bf16,int8")
    parser.add_argument("--seconds", type=float, default=120.0, help="the last are left out (120)")
    parser.add_argument("--out", type=Path, help="a JSON file with what is printed")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this torch sees no GPU")
    rows = []
    for row in measure(options.dtypes.split(","), options.seconds):
        rows.append(row)
        print(told(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
