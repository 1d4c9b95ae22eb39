"""How much of the machine a training step uses: its useful operations against a matmul's rate."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ops.masked_lm_loss import IGNORED


@functools.cache
def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matmul: the best of five."""
    if device.type == "cuda":
        return _rate(8192, device, dtype)
    small = _rate(256, device, dtype)
    # Where a dtype has no instructions of its own here, a large one would take seconds.
    return _rate(1024, device, dtype) if small > 1e10 else small


def _rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator(device).manual_seed(0)  # the global one gives a run its dropout
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def training_flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Useful operations of one forward and backward pass: of real tokens and scored rows only.

    Three times the forward's (Kaplan et al., arXiv 2001.08361): 2 per weight of a linear layer and
    token, 4 per channel and pair of tokens in attention; the masked-LM head (`cls.predictions`)
    counts where `labels` score a token. Other heads are small and are left out.

    Args:
        inputs: as the model takes them: input_ids [B, S], attention_mask [B, S] or none.
    """
    mask = inputs.get("attention_mask")
    shape = inputs["input_ids"].shape
    lengths = mask.sum(1) if mask is not None else torch.full(shape[:1], shape[1])
    tokens, pairs = int(lengths.sum()), int((lengths * lengths).sum())
    config = model.config
    body, head = _weights(model)
    labels = inputs.get("labels")
    scored = int((labels != IGNORED).sum()) if head and labels is not None else 0
    attention = 4 * config.num_hidden_layers * config.hidden_size * pairs
    return 3 * (2 * body * tokens + 2 * head * scored + attention)


@functools.lru_cache(maxsize=4)
def _weights(model: nn.Module) -> tuple[int, int]:
    """Weights of the linear layers inside the encoder's layers, and of the masked-LM head."""
    body = head = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features
            if "predictions" in name:
                head += size
            elif ".layer." in f".{name}":
                body += size
    return body, head
