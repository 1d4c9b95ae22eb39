"""What a user can get wrong: a clear error that names it, or the right empty result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import bert_fast
from bert_fast.ops import OPS

from .models import ids, tiny
from .parity import DEVICE

LIMIT = 40
MASK = torch.ones(2, 6, device=DEVICE)
CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too long": ({"input_ids": ids(1, LIMIT + 1)}, ValueError, "length 41 exceeds max_position_"),
    "float ids": ({"input_ids": ids(2, 6).float()}, TypeError, "input_ids is torch.float32"),
    "a list of ids": ({"input_ids": [[1, 2]]}, TypeError, "input_ids is a list, expected a tensor"),
    "bounds in a list": (
        {"input_ids": ids(1, 6), "cu_seq_lens_q": [0, 6]},
        TypeError,
        r"cu_seq_lens_q is \[0, 6\]",
    ),
    "bounds beyond the ids": (
        {"input_ids": ids(1, 6), "cu_seq_lens_q": torch.tensor([0, 2, 5])},
        ValueError,
        r"cu_seq_lens_q is \[0, 2, 5\], expected ascending numbers from 0 to 6",
    ),
    "bounds that go back": (
        {"input_ids": ids(1, 6), "cu_seq_lens_q": torch.tensor([0, 5, 2, 6])},
        ValueError,
        r"cu_seq_lens_q is \[0, 5, 2, 6\]",
    ),
    "a longest sequence that is not": (
        {
            "input_ids": ids(1, 6),
            "cu_seq_lens_q": torch.tensor([0, 2, 6]),
            "max_length_q": 3,
        },
        ValueError,
        "max_length_q is 3, but cu_seq_lens_q has a sequence of 4 tokens",
    ),
    "one-dimensional ids": ({"input_ids": ids(1, 6)[0]}, ValueError, r"shape \(6,\), expected"),
    "nothing": ({}, ValueError, "exactly one of input_ids or inputs_embeds"),
    "mask of another batch": (
        {"input_ids": ids(2, 6), "attention_mask": torch.ones(3, 6)},
        ValueError,
        r"attention_mask has shape \(3, 6\), expected \(2, 6\)",
    ),
    "3D mask": (
        {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 6, 6)},
        ValueError,
        r"attention_mask has shape \(2, 6, 6\)",
    ),
    "4D mask of another length": (
        {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 1, 6, 5).bool()},
        ValueError,
        r"attention_mask has shape \(2, 1, 6, 5\)",
    ),
    "4D mask of another batch": (
        {"input_ids": ids(2, 6), "attention_mask": torch.ones(3, 1, 6, 6).bool()},
        ValueError,
        r"attention_mask has shape \(3, 1, 6, 6\)",
    ),
    "4D mask of other queries": (
        {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 1, 5, 6).bool()},
        ValueError,
        r"attention_mask has shape \(2, 1, 5, 6\)",
    ),
    "4D int mask": (
        {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 1, 6, 6).long()},
        TypeError,
        "4D mask of torch.int64; use bool",
    ),
    "token types of another length": (
        {"input_ids": ids(2, 6), "token_type_ids": ids(2, 5, 2)},
        ValueError,
        r"token_type_ids has shape \(2, 5\)",
    ),
    "embeddings of another dtype": (
        {"inputs_embeds": torch.randn(2, 6, 64, device=DEVICE).double()},
        ValueError,
        "inputs_embeds is torch.float64 of shape",
    ),
    "packed batch of two": (
        {"input_ids": ids(2, 6), "cu_seq_lens_q": torch.tensor([0, 6])},
        ValueError,
        "cu_seq_lens_q goes with a batch of 1, got a batch of 2",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_named_errors(case: str) -> None:
    inputs, error, message = CASES[case]
    with pytest.raises(error, match=message):
        bert_fast.accelerate(tiny())(**inputs)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the kernel traps and ends the context")
@pytest.mark.parametrize("value", [99, -1, 2**31])
def test_ids_outside_the_vocabulary(value: int) -> None:
    tokens = ids(2, 6)
    tokens[1, 3] = value
    model = bert_fast.accelerate(tiny())
    with pytest.raises(IndexError, match=str(value)), torch.inference_mode():
        model(tokens)
    with pytest.raises(IndexError, match="7"):
        model(ids(2, 6), token_type_ids=torch.full((2, 6), 7))
    for wrong in (LIMIT, -1):
        with pytest.raises(IndexError, match=str(wrong)):
            model(ids(2, 6), position_ids=torch.full((1, 6), wrong))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0), (0, 0)])
def test_empty_batches_give_empty_outputs(shape: tuple[int, int]) -> None:
    output = bert_fast.accelerate(tiny())(ids(*shape), output_hidden_states=True)
    assert output.last_hidden_state.shape == (*shape, 64)
    assert len(output.hidden_states) == 3


@pytest.mark.parametrize("backend", [None, 3, ["triton"]])
def test_a_backend_that_is_none(backend: Any) -> None:
    with pytest.raises(TypeError, match=r"backend is .*, expected a name"):
        bert_fast.accelerate(tiny(), backend=backend)


def test_length_over_the_limit_is_allowed_with_positions() -> None:
    tokens = ids(1, LIMIT + 5)
    positions = torch.arange(LIMIT + 5, device=DEVICE).unsqueeze(0) % LIMIT
    plain = tiny()
    expected = plain(tokens, position_ids=positions)[0]
    found = bert_fast.accelerate(plain)(tokens, position_ids=positions)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="asking a GPU mask would stall its queue")
def test_additive_2d_mask_warns() -> None:
    mask = torch.zeros(2, 6)
    mask[:, 4:] = -1e4
    with pytest.warns(UserWarning, match="read inverted"):
        bert_fast.accelerate(tiny())(ids(2, 6), attention_mask=mask)


def test_ids_outside_a_table_are_nan_by_triton() -> None:
    """A kernel cannot raise: what it must not do is read something else."""
    op = OPS["embed_layernorm"]
    sample = next(op.samples(DEVICE, torch.float32)).args
    ids, words = sample[0].clone(), sample[3]
    ids[1], ids[2] = words.shape[0], -1
    y = op(ids, *sample[1:], backend="triton")
    assert y[1:3].isnan().all() and y[3:].isfinite().all() and y[0].isfinite().all()
    for name, table in (("token_type_ids", "token_type"), ("position_ids", "position")):
        args = list(sample)
        at = op.names.index(name)
        args[at] = args[at].clone()
        args[at][1], args[at][2] = args[op.names.index(table)].shape[0], -1
        y = op(*args, backend="triton")
        assert y[1:3].isnan().all() and y[3:].isfinite().all() and y[0].isfinite().all(), name


def test_a_tensor_without_memory_is_no_weight() -> None:
    """What is left of a FakeTensorMode calls itself a CPU's."""
    with FakeTensorMode():
        x = torch.empty(2, 8)
    with pytest.raises((RuntimeError, NotImplementedError)):
        OPS["qkv_linear"](x, x, x, x, None, None, None)
