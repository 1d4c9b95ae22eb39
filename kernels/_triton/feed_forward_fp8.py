"""y = act(x U^T + b) D^T on e4m3 factors: two GEMMs, and between them one byte an element.

The first GEMM rounds the activation in its epilogue, by powers of two that the pass over x found
from the lengths of its rows: a tile of the product does not see the greatest of a row.
"""

import torch

from . import linear, linear_fp8, tiles


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""
    if tiles.family(device) not in linear.FP8 or dtype == torch.float32:
        return

    def weight(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
        e4m3 = torch.empty((rows, cols), dtype=torch.float8_e4m3fn, device=device)
        return e4m3, torch.empty((rows, 1), dtype=torch.float32, device=device)

    shapes = [(16384, 768, 3072)]
    if full:
        shapes += [(16, 768, 3072), (256, 768, 3072), (100, 37, 41), (16384, 1024, 4096)]
    for n_rows, hidden, inner in shapes:
        x = torch.empty((n_rows, hidden), dtype=dtype, device=device)
        bias, reach = x.new_empty(inner), x.new_empty(2, dtype=torch.float32)
        factors = (*weight(inner, hidden), bias, *weight(hidden, inner))
        yield f"{n_rows}x{hidden}x{inner}", (x, *factors, reach, "gelu")


def forward(
    x,  # [T, H]
    up,  # [F, H] e4m3
    up_scale,  # [F, 1] float32
    up_bias,  # [F] or None
    down,  # [H, F] e4m3
    down_scale,  # [H, 1] float32
    reach,  # [2] float32: max |U[n]|, max |b[n]|
    activation,
    save,
):
    q, x_scale, inner_scale = linear_fp8.quantize(x, reach)
    inner = q.new_empty((x.shape[0], up.shape[0]))
    linear.gemm(
        q, up.t(), up_bias, inner, act=activation,
        a_scale=x_scale, b_scale=up_scale, y_scale=inner_scale,
    )  # fmt: skip
    y = x.new_empty((x.shape[0], down.shape[0]))
    linear.gemm(inner, down.t(), None, y, a_scale=inner_scale, b_scale=down_scale)
    return (y,)
