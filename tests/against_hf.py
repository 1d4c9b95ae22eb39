"""The yardstick for models: outputs and every parameter's gradient against Hugging Face's.

As for the ops: error against HF in fp64 at most 2x (gradients 3x) that of HF in the same dtype,
plus one ulp. Errors are root mean squares over a tensor: after many layers the single worst
element of a bias gradient is a matter of luck on both sides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import bert_fast
from bench.measure import ulp


def run(
    model: nn.Module, inputs: dict[str, Any], rows: Tensor, call: Callable[..., Any] | None = None
) -> dict[str, Tensor]:
    """Outputs that a user reads and the gradient of each parameter, in one dictionary.

    rows: [B, S] bool, the rows of the last hidden state that mean something; a pooled output
        means something where column 0 does.
    """
    output = (call or model)(**inputs)
    read = {"last": output.last_hidden_state[rows]}
    if getattr(output, "pooler_output", None) is not None:
        read["pooled"] = output.pooler_output[rows[:, 0]]
    generator = torch.Generator().manual_seed(11)
    loss = 0.0
    for value in read.values():
        weight = torch.randn(value.shape, generator=generator).to(value)
        loss = loss + (value * weight).sum()
    loss.backward()
    found = {name: value.detach() for name, value in read.items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"d{name}"] = parameter.grad
            parameter.grad = None
    return found


def over_budget(
    exact: dict[str, Tensor], plain: dict[str, Tensor], found: dict[str, Tensor]
) -> list[str]:
    """What exceeds its budget, in words; empty when all is well."""
    told = [f"only one side has {name}" for name in exact.keys() ^ found.keys()]
    for name in exact.keys() & found.keys():
        truth = exact[name]
        # Softmax ignores a constant added to all scores, so a key bias has gradient zero and both
        # sides return rounding noise; its scale is that of the projection it is packed with.
        scale = exact[_projected(name)].abs().max().item() if truth.numel() else 0.0
        if not truth.numel():
            continue
        error = (found[name].double() - truth).square().mean().sqrt().item()
        yardstick = (plain[name].double() - truth).square().mean().sqrt().item()
        budget = (3 if name.startswith("d") else 2) * yardstick
        budget += ulp(scale, found[name].dtype)
        if not error <= budget:
            told.append(f"{name}: {error:.3e} > {budget:.3e} (HF itself {yardstick:.3e})")
    return told


def _projected(name: str) -> str:
    for key, value in (
        ("key.bias", "value.bias"),
        ("k_lin.bias", "v_lin.bias"),
        ("attn.k.bias", "attn.v.bias"),
    ):
        name = name.replace(key, value)
    return name


def compare(
    model: nn.Module,
    dtype: torch.dtype,
    *cases: tuple[dict[str, Any], Tensor],
    gradients: bool = True,
) -> None:
    """Asserts the budget for a model in `dtype`, forward and (where asked) backward.

    cases: the inputs and the rows of a `run`. Errors are taken over all of them at once: where
        softmax is near its limits, those of queries and keys are a few numbers' luck in each.
    """
    model = model.to(dtype)
    sides = copy.deepcopy(model).double(), model, bert_fast.accelerate(copy.deepcopy(model))
    exact, plain, found = (
        _joined([run(side, _like(side, inputs), rows) for inputs, rows in cases]) for side in sides
    )
    if not gradients:
        for results in (exact, plain, found):
            for name in [name for name in results if name.startswith("d")]:
                del results[name]
    told = over_budget(exact, plain, found)
    assert not told, "; ".join(told)


def _like(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, in fp64 for a model in fp64."""
    wide = next(model.parameters()).dtype == torch.float64
    return {
        k: v.double() if wide and torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }


def _joined(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = {name: None for result in results for name in result}
    return {name: torch.cat([r[name].flatten() for r in results if name in r]) for name in names}
