"""y = act(u), u = x W^T + b; du = dy act'(u), then the gradients of linear.

The bias and the activation (exact erf GELU too) are the GEMM's epilogue, on its float32
accumulator. Backward applies act' in a pass of its own, which also sums db: inside the GEMMs it
would stand between memory and the tensor cores, once for dx and again for dW.
"""

import torch

from . import bias_gelu, linear


def samples(dtype: torch.dtype, device: torch.device, full: bool):
    """Calls that reach the shipped configs, as (label, arguments of `forward`)."""
    for label, args in linear.samples(dtype, device, full):
        yield f"{label} gelu", (*args, "gelu")
    if full:
        for activation in ("gelu_tanh", "relu", "silu"):
            x = torch.empty((16384, 768), dtype=dtype, device=device)
            yield activation, (x, x.new_empty((3072, 768)), x.new_empty(3072), activation)


def forward(x, weight, bias, activation, save):
    y = x.new_empty((x.shape[0], weight.shape[0]))
    u = torch.empty_like(y) if save else y.new_empty(0)
    linear.gemm(x, weight.t(), bias, y, u if save else None, activation)
    return y, u


def backward(dy, x, weight, bias, activation, u, needs):
    du = torch.empty_like(u)
    dbias = torch.empty_like(bias) if bias is not None and needs[2] else None
    bias_gelu.act_backward(dy, u, None, activation, du, dbias)
    return *linear.gemm_backward(du, x, weight, needs), dbias
