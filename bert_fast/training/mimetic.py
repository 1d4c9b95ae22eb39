"""A start for BERT from which masked LM needs far fewer tokens to see context.

From BERT's normal start a model first learns how often each token occurs and stays there for long:
its attention is uniform, so what stands beside a mask is one of a hundred values averaged. Mimetic
initialisation (Trockman and Kolter, arXiv 2305.09828) gives the weights the form that trained ones
have. Of it, what makes attention local:

- positions are sinusoids (Vaswani et al., arXiv 1706.03762, section 3.5), so near ones are alike;
- each key projection equals its query projection, so what is alike attends to each other;
- the [MASK] token and the segments, which would add the same to many positions, start at zero.

The weights are BERT's, all trained as before; only their first values differ.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def sinusoids(positions: int, width: int) -> Tensor:
    """[positions, width] fp32 of mean square 1/2: sines at even, cosines at odd columns."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(positions).unsqueeze(1) * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :width]


@torch.no_grad()
def start_mimetic(model: Any, mask_token_id: int) -> None:
    """Sets a new BertForPreTraining's first values in place; draws no random numbers."""
    embeddings, scale = model.bert.embeddings, model.config.initializer_range
    positions = embeddings.position_embeddings.weight
    positions.copy_(sinusoids(*positions.shape) * (scale * math.sqrt(2)))  # as large as the words
    embeddings.token_type_embeddings.weight.zero_()
    embeddings.word_embeddings.weight[mask_token_id] = 0
    for layer in model.bert.encoder.layer:
        layer.attention.self.key.weight.copy_(layer.attention.self.query.weight)
