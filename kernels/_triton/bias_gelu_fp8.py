"""y = act(x + bias) 2^-e as e4m3: what stands between two GEMMs of e4m3 that have no epilogue.

`bias_gelu` with another output: the powers are known before (`linear_fp8.quantize`), so no program
has to see all of a row.
"""

import torch

from . import bias_gelu, linear, tiles


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""
    if tiles.family(device) not in linear.FP8 or dtype == torch.float32:
        return
    for label, (x, bias, activation) in bias_gelu.samples(dtype, device, full):
        if not full and label != "3072 gelu":
            continue  # what the others compile, bias_gelu's own samples show
        yield label, (x, bias, activation, x.new_empty((x.shape[0], 1), dtype=torch.float32))


def forward(
    x,  # [T, F]
    bias,  # [F] or None
    activation,
    scale,  # [T, 1] float32
    save,
):
    y = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    bias_gelu.act_forward(x, bias, activation, y, scale)
    return (y,)
