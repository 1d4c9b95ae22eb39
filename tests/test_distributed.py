"""Two gloo processes: data parallel and sharded training give the gradients of one process."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertForMaskedLM, BertForSequenceClassification

import bert_fast

from .models import ids, masks, tiny

BATCH = 4


def loss_of(model: nn.Module, rows: slice) -> Tensor:
    mask = masks(BATCH, 11)["right"][rows]
    labels = ids(BATCH, 1, 2).flatten()[rows]
    return model(input_ids=ids(BATCH, 11)[rows], attention_mask=mask, labels=labels).loss


def check_one_step(rank: int, kind: str) -> None:
    """The gradients are those of one process on the whole batch."""
    plain = tiny(BertForSequenceClassification)
    ours = bert_fast.accelerate(copy.deepcopy(plain))
    if kind == "ddp":
        wrapped: nn.Module = DistributedDataParallel(ours)
    else:
        mesh = init_device_mesh("cpu", (2,))
        if kind == "fsdp2_layers":
            for layer in ours.bert.encoder.layer:
                fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(ours, mesh=mesh)
    loss_of(wrapped, slice(2 * rank, 2 * rank + 2)).backward()
    loss_of(plain, slice(0, BATCH)).backward()
    for (name, found), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        grad = found.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def masked_lm_batch(step: int, rows: slice) -> dict[str, Tensor]:
    """Two scored tokens a row, so that the mean over processes is the mean over the batch."""
    tokens, mask = ids(BATCH, 11), masks(BATCH, 11)["right"]
    tokens = (tokens + step) % 99
    labels = torch.full_like(tokens, -100)
    labels[:, 1:3] = tokens[:, 1:3]
    found = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {name: value[rows] for name, value in found.items()}


def check_losses(rank: int, kind: str) -> None:
    """Four steps at equal global batch: the losses are those of one process."""
    plain = tiny(BertForMaskedLM).train()
    ours = bert_fast.accelerate(copy.deepcopy(plain), sparse_logits=True)
    if kind == "ddp":
        wrapped: nn.Module = DistributedDataParallel(ours)
    else:
        wrapped = fully_shard(ours, mesh=init_device_mesh("cpu", (2,)))
    rate = 0.05
    alone, together = (torch.optim.SGD(m.parameters(), lr=rate) for m in (plain, wrapped))
    for i in range(4):
        expected = plain(**masked_lm_batch(i, slice(0, BATCH))).loss
        found = wrapped(**masked_lm_batch(i, slice(2 * rank, 2 * rank + 2))).loss
        found.backward()
        expected.backward()
        mean = found.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / 2, expected.detach(), rtol=1e-5, atol=1e-5)
        for optimizer in (alone, together):
            optimizer.step()
            optimizer.zero_grad()


CHECKS = {check_one_step: ("ddp", "fsdp2", "fsdp2_layers"), check_losses: ("ddp", "fsdp2")}


def worker(rank: int, rendezvous: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    for check, kinds in CHECKS.items():
        for kind in kinds:
            # The parameters of single layers are then no plain tensors: there it has to fall back.
            action = "ignore" if kind == "fsdp2_layers" else "error"
            warnings.filterwarnings(action, "bert_fast: Hugging Face's own forward runs")
            try:
                check(rank, kind)
            except Exception as error:
                raise AssertionError(f"{check.__name__}, {kind}") from error
    dist.destroy_process_group()


def test_two_processes_as_one(tmp_path: Path) -> None:
    """All of `CHECKS` in one pair of processes: to start it takes longer than to check."""
    mp.spawn(worker, args=(f"file://{tmp_path}/rendezvous",), nprocs=2)
