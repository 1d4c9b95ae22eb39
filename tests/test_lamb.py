"""LAMB beside its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bert_fast.training.lamb import Lamb


@pytest.mark.parametrize("decay", [0.02, 0.0])
@pytest.mark.parametrize("scale", [1.0, 0.0])
@pytest.mark.parametrize("shape", [(5, 3), (15,)])
def test_lamb_is_its_formula(shape, scale, decay):
    draw = np.random.default_rng(0)
    truth = scale * draw.standard_normal(shape)
    weight = torch.nn.Parameter(torch.from_numpy(truth.copy()))
    optimizer = Lamb([weight], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    m = v = 0.0
    for t in range(1, 5):
        gradient = draw.standard_normal(shape)
        weight.grad = torch.from_numpy(gradient)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        r = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6) + decay * truth
        size = np.linalg.norm(truth) if len(shape) > 1 else 0.0
        truth = truth - 0.1 * (size / np.linalg.norm(r) if size else 1.0) * r
        np.testing.assert_allclose(weight.detach().numpy(), truth, rtol=1e-12)


def test_lamb_refuses():
    with pytest.raises(ValueError, match="betas"):
        Lamb([torch.nn.Parameter(torch.ones(1))], betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="lr -1"):
        Lamb([torch.nn.Parameter(torch.ones(1))], lr=-1)
