"""The yardstick for models: outputs and every parameter's gradient against Hugging Face's.

As for the ops: error against HF in fp64 at most 2x (gradients 3x) that of HF in the same dtype,
plus one ulp. Errors are root mean squares over a tensor: after many layers the single worst
element of a bias gradient is a matter of luck on both sides. So is, now and then, the error of a
whole tensor; `misses` tells that from a fault.
"""

from __future__ import annotations

import copy
import math
import statistics
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


Results = dict[str, Tensor]
NEIGHBOURS = 8
LUCK = 10.0  # times its budget; single draws of rounding were seen at up to 1.4 times


def misses(
    model: nn.Module, theirs: Callable[[Any], Results], ours: Callable[[Any], Results]
) -> list[str]:
    """What exceeds its budget for a model, and for its neighbours too, in words.

    theirs, ours: the results of a copy of the model that they may do with as they like, by Hugging
        Face's forward and by ours.

    Both errors are one draw each of what rounding may do, so that their quotient has tails: with
    other random weights 1 in 70 models has a tensor whose error is over 3 times HF's, where HF's is
    small by chance. What exceeds its budget is therefore measured once more, where luck has no
    reason to repeat itself and a fault has: on neighbours of the model. Not where it is exceeded
    `LUCK` times over: what comes and goes (a race) may be large and rare. The budget is the same,
    of the median errors: where the maximum of a pooling moves to another token, one says nothing.
    """

    def over(models: list[nn.Module]) -> dict[str, tuple[str, float]]:
        draws = [
            (theirs(copy.deepcopy(m).double()), theirs(copy.deepcopy(m)), ours(copy.deepcopy(m)))
            for m in models
        ]
        return _over_budget(draws)

    first = over([model])
    if not first or not all(times <= LUCK for _, times in first.values()):
        return [words for words, _ in first.values()]
    again = over([model, *(_neighbour(model, seed) for seed in range(NEIGHBOURS))])
    told = f"; with {NEIGHBOURS} neighbours "
    return [words + told + again[name][0] for name, (words, _) in first.items() if name in again]


def _neighbour(model: nn.Module, seed: int) -> nn.Module:
    """The model with the lower half of its weights' digits drawn anew: all roundings differ."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.mul_(1 + noise * torch.finfo(weight.dtype).eps ** 0.5)
    return model


def over_budget(exact: Results, plain: Results, found: Results) -> list[str]:
    """What exceeds its budget, in words; empty when all is well."""
    return [words for words, _ in _over_budget([(exact, plain, found)]).values()]


def _over_budget(
    draws: list[tuple[Results, Results, Results]],
) -> dict[str, tuple[str, float]]:
    """By name, what exceeds its budget in the median of draws (exact, HF's and our results): in
    words, and how many times over."""
    exact, _, found = draws[0]
    told = {name: (f"only one side has {name}", math.inf) for name in exact.keys() ^ found.keys()}
    for name in exact.keys() & found.keys():
        if not exact[name].numel():
            continue
        columns = list(zip(*(_errors(name, *draw) for draw in draws), strict=True))
        error, yardstick, last_place = map(statistics.median, columns)
        budget = (3 if name.startswith("d") else 2) * yardstick + last_place
        if not error <= budget or not all(map(math.isfinite, columns[0])):
            words = f"{name}: {error:.3e} > {budget:.3e} (HF itself {yardstick:.3e})"
            told[name] = words, error / budget if budget else math.inf
    return told


def _errors(name: str, exact: Results, plain: Results, found: Results) -> tuple[float, ...]:
    """Our error, that of HF, and one ulp."""
    # Softmax ignores a constant added to all scores, so a key bias has gradient zero and both
    # sides return rounding noise; its scale is that of the projection it is packed with.
    scale = exact[_projected(name)].abs().max().item()
    ours, theirs = (
        (side[name].double() - exact[name]).square().mean().sqrt().item() for side in (found, plain)
    )
    return ours, theirs, ulp(scale, found[name].dtype)


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

    def results(side: nn.Module) -> Results:
        found = _joined([run(side, _like(side, inputs), rows) for inputs, rows in cases])
        return {name: x for name, x in found.items() if gradients or not name.startswith("d")}

    told = misses(model.to(dtype), results, lambda copied: results(bert_fast.accelerate(copied)))
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
