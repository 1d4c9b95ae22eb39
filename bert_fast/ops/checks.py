"""Argument checks shared by the op pages: each names the op, the value and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def shape(op: str, name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(
            f"bert_fast.{op}: {name} has shape {tuple(tensor.shape)}, expected {expected}"
        )


def rank(op: str, name: str, tensor: Tensor, expected: int) -> None:
    if tensor.dim() != expected:
        raise ValueError(
            f"bert_fast.{op}: {name} has shape {tuple(tensor.shape)}, "
            f"expected {expected} dimensions"
        )


def integers(op: str, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and (tensor.is_floating_point() or tensor.element_size() < 4):
        raise TypeError(f"bert_fast.{op}: {name} is {tensor.dtype}, expected int32 or int64")


def dropout(op: str, p: float, seed: Tensor | None) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"bert_fast.{op}: p is {p}, expected 0 <= p < 1")
    if p > 0.0 and seed is None:
        raise ValueError(f"bert_fast.{op}: p is {p} but seed is None; pass an int64 [1] tensor")
    shape(op, "seed", seed, (1,))
    if seed is not None and seed.dtype != torch.int64:
        raise TypeError(f"bert_fast.{op}: seed is {seed.dtype}, expected int64")


def activation(op: str, value: str) -> None:
    if value not in ACTIVATIONS:
        raise ValueError(f"bert_fast.{op}: activation is {value!r}, expected one of {ACTIVATIONS}")


def for_inference(op: str, name: str, weight: Tensor) -> None:
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError(f"bert_fast.{op}: {name} wants a gradient; 8 bits are for inference")


def cu_seqlens(op: str, value: Tensor) -> None:
    if value.dtype.is_floating_point or value.element_size() != 4:
        raise TypeError(f"bert_fast.{op}: cu_seqlens is {value.dtype}, expected int32")
    if value.shape[0] == 0:
        raise ValueError(f"bert_fast.{op}: cu_seqlens is empty, expected B + 1 values")


def bounds(op: str, values: list[int], rows: int) -> None:
    """Of cu_seqlens that were read already: to read them is to wait for a GPU."""
    if values[0] != 0 or values[-1] != rows or values != sorted(values):
        raise ValueError(
            f"bert_fast.{op}: cu_seqlens is {values}, expected ascending numbers from 0 to {rows}, "
            "the number of rows"
        )


def indices(op: str, value: Tensor) -> None:
    if value.dtype.is_floating_point or value.element_size() != 8:
        raise TypeError(f"bert_fast.{op}: indices is {value.dtype}, expected int64")
