"""embed_layernorm: y = dropout(LayerNorm(word[ids] + token_type[types] + position[positions])).

BERT's input layer (Devlin et al., arXiv 1810.04805, section 3) in one pass: three gathers, their
sum and LayerNorm. With z the sum of the three rows and dz as in add_layernorm (dy first masked
by dropout):

    dword[v] = sum of dz over tokens with ids == v (padding_idx excluded, as nn.Embedding does),
    dposition, dtoken_type likewise;  dweight, dbias as in add_layernorm.

Kernels return dz; the scatter into the tables is ATen's, or a product's. Saved: the inputs, mean
and rstd. Given embeddings instead of ids: pass them as `word` with ids 0..T-1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .backends import cpu_kernels, cuda_kernel, triton_kernel, widest_row
from .products import product_fp32, sums_as_fp32
from .registry import Chooser, Kernel, Op, Sample
from .rng import dropout

SMALL_TABLE = 1_024  # rows: of positions and types, not of words


def reference(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    padding_idx: int,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    z = F.embedding(input_ids, word, padding_idx if padding_idx >= 0 else None)
    if token_type is not None:
        z = z + (
            token_type[0] if token_type_ids is None else F.embedding(token_type_ids, token_type)
        )
    z = z + F.embedding(position_ids, position)
    return dropout(F.layer_norm(z, weight.shape, weight, bias, eps), seed, p)


def check(
    input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias, eps,
    padding_idx, p, seed,
) -> None:  # fmt: skip
    op = "embed_layernorm"
    checks.rank(op, "input_ids", input_ids, 1)
    for name, ids in (
        ("input_ids", input_ids),
        ("token_type_ids", token_type_ids),
        ("position_ids", position_ids),
    ):
        checks.integers(op, name, ids)
        checks.shape(op, name, ids, tuple(input_ids.shape))
    for name, table in (("word", word), ("position", position), ("token_type", token_type)):
        if table is not None and (table.dim() != 2 or table.shape[1] != word.shape[1]):
            raise ValueError(
                f"bert_fast.{op}: {name} has shape {tuple(table.shape)}, "
                f"expected (rows, {word.shape[-1]})"
            )
    checks.shape(op, "weight", weight, (word.shape[1],))
    checks.shape(op, "bias", bias, (word.shape[1],))
    checks.dropout(op, p, seed)


def fake(
    input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias, eps,
    padding_idx, p, seed, *, save,
) -> tuple[Tensor, ...]:  # fmt: skip
    y = word.new_empty(input_ids.shape[0], word.shape[1])
    statistics = y.new_empty(y.shape[0], dtype=torch.float32)
    return y, statistics, torch.empty_like(statistics)


def _scattering(kernel: Kernel) -> Kernel:
    """The kernel with its dz scattered into the three tables."""
    inner = kernel.backward
    assert inner is not None

    def backward(dy: Tensor, *rest: Any, needs: list[bool]) -> Sequence[Tensor | None]:
        input_ids, types, positions, word, position, token_type, *_, padding_idx, _, _ = rest[:12]
        dz, dweight, dbias = inner(dy, *rest, needs=needs)
        tables: list[Tensor | None] = []
        for need, table, ids, skip in (
            (needs[0], word, input_ids, padding_idx),
            (needs[1], position, positions, -1),
            (needs[2], token_type, types, -1),
        ):
            if not need or table is None:
                tables.append(None)
                continue
            ids = torch.zeros_like(input_ids) if ids is None else ids
            tables.append(_scattered(dz, ids, table.shape[0], skip))
        return (*tables, dweight, dbias)

    return replace(kernel, backward=backward)


def _scattered(dz: Tensor, ids: Tensor, rows: int, skip: int) -> Tensor:
    """[rows, H]: row r is the sum of dz [T, H] over tokens with ids == r; zeros for row `skip`."""
    # On a GPU ATen sorts the ids first, which takes longer than all else here. In fp32 that stays:
    # its products may be TF32's.
    on_tensor_cores = dz.dtype in (torch.float16, torch.bfloat16) and sums_as_fp32(dz)
    if on_tensor_cores and skip < 0 and rows <= SMALL_TABLE and dz.shape[0]:
        return summed_by_product(dz, ids, rows)
    return torch.ops.aten.embedding_dense_backward(dz, ids, rows, skip, False)


def summed_by_product(dz: Tensor, ids: Tensor, rows: int) -> Tensor:
    """The same as a product with a matrix of zeros and ones: sums in fp32, always in one order.

    What is no number in one row of dz, comes into all that are summed, as in any weight's gradient.
    """
    each = torch.arange(rows, dtype=ids.dtype, device=ids.device)
    return product_fp32((each.unsqueeze(1) == ids).to(dz.dtype), dz).to(dz.dtype)


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def ids(high: int, tokens: int, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, (tokens,), generator=generator).to(device, kind)

    seed = torch.tensor([987654321987654321], device=device)
    for name, tokens, hidden, types, p, padding_idx in (
        ("bert", 41, 128, "given", 0.0, 0),
        ("types_default", 9, 64, "default", 0.0, -1),
        ("no_types", 9, 64, "none", 0.0, -1),
        ("base_hidden", 6, 768, "given", 0.0, 0),
        ("odd_hidden", 13, 37, "given", 0.0, 0),
        ("dropout", 24, 96, "given", 0.2, 0),
        ("empty", 0, 64, "given", 0.0, 0),
    ):
        yield Sample(
            name,
            (
                ids(19, tokens),
                ids(2, tokens) if types == "given" else None,
                ids(50, tokens),
                draw(19, hidden),
                draw(50, hidden),
                None if types == "none" else draw(2, hidden),
                draw(hidden) + 1.0,
                draw(hidden),
                1e-12,
                padding_idx,
                p,
                seed if p else None,
            ),
        )
    int32 = torch.int32
    small = (draw(11, 64) * 1e-3, draw(11, 64) * 1e-3, draw(2, 64) * 1e-3)
    yield Sample(
        "int32_small_variance",
        (
            *(ids(11, 7, int32), ids(2, 7, int32), ids(11, 7, int32), *small),
            *(draw(64) + 1.0, draw(64), 1e-5, -1, 0.0, None),
        ),
    )


def cost(input_ids, token_type_ids, position_ids, word, *rest) -> tuple[int, int]:
    elements = input_ids.numel() * word.shape[1]
    # The position and type rows stay in cache; the word row is read and y written.
    return 10 * elements, 2 * elements * word.element_size()


_LEAD = 3
OP = Op(
    name="embed_layernorm",
    arguments="Tensor input_ids, Tensor? token_type_ids, Tensor position_ids, Tensor word, "
    "Tensor position, Tensor? token_type, Tensor weight, Tensor bias, float eps, "
    "int padding_idx, float p, Tensor? seed",
    reference=reference,
    check=check,
    fake=fake,
    kernels=tuple(
        _scattering(kernel)
        for kernel in (
            *cpu_kernels("embed_layernorm", _LEAD),
            cuda_kernel("embed_layernorm", _LEAD, widest_row(4096, _LEAD)),
            triton_kernel("embed_layernorm", _LEAD, widest_row(8192, _LEAD)),
        )
    ),
    samples=samples,
    cost=cost,
    differentiable=("word", "position", "token_type", "weight", "bias"),
    residuals=2,
    lead="word",
)


def embed_layernorm(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    padding_idx: int = -1,
    p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | Chooser = "auto",
) -> Tensor:
    """dropout(LayerNorm(word[ids] + token_type[types] + position[positions])); arXiv 1810.04805.

    Args:
        input_ids, position_ids: [T], int32 or int64, packed tokens.
        token_type_ids: [T] or None (type 0 everywhere).
        word [V, H], position [P, H], token_type [Y, H] or None: the embedding tables.
        weight, bias: [H], LayerNorm's scale and shift; eps is added to the variance.
        padding_idx: the row of `word` that takes no gradient; -1 for none.
        p, seed: dropout probability in [0, 1) and its int64 [1] seed (None when p is 0).
        backend: "auto" or the name of one kernel; a forced one that cannot run raises.

    Returns: [T, H] in the tables' dtype.
    Raises: ValueError or TypeError for wrong shapes, dtypes, devices; on the CPU IndexError or
        RuntimeError for an id outside its table. On a GPU the CUDA kernel traps, as torch's
        embedding does, and the Triton kernel returns NaN for that token.
    """
    return OP(
        input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias, eps,
        padding_idx, p, seed, backend=backend,
    )  # fmt: skip
