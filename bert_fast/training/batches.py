"""Batches of about equal work: as few as hold a budget of tokens (or of texts) each.

The encoder drops padding, so a batch costs what its real tokens cost, and texts of any lengths may
share one. Batches of equal token counts keep the processes of a parallel run from waiting for each
other, without sorting by length: every batch holds long texts and short ones.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler


class BalancedBatches(Sampler[list[int]]):
    """Lists of indices, another partition in every epoch, a function of the seed and the epoch.

    Longest first, each item goes to the batch that holds least so far (Graham's LPT rule); items
    of one length come in random order, and so do the batches.
    """

    def __init__(
        self,
        costs: Callable[[int], np.ndarray],
        budget: int,
        processes: int,
        accumulation: int,
        seed: int,
    ) -> None:
        """
        Args:
            costs: gives the cost of every item (tokens, or ones) in an epoch, integers [n]. The
                number of batches is settled by epoch 0, and kept: costs should vary little.
            budget: what a batch may cost.
            processes, accumulation: the number of batches is a multiple of their product, so that
                every step takes as many; of `processes` alone where there are too few items.
            seed: of the order.
        Raises: ValueError for fewer items than a step takes batches, an item above the budget, and
            items that batches within the budget cannot share out evenly to the processes.
        """
        first, multiple = costs(0), processes * accumulation
        if len(first) < multiple:
            raise ValueError(
                f"{len(first)} training examples are fewer than the {multiple} batches of one "
                "step (processes x accumulation)"
            )
        if first.max() > budget:
            raise ValueError(
                f"a batch may hold {budget} tokens, but one example has {first.max()}: "
                "raise batch_tokens or lower the maximal length"
            )
        self.costs, self.seed, self.epoch = costs, seed, 0
        most = len(first) // processes * processes  # else a batch would be empty
        self.count = min(math.ceil(first.sum() / budget / multiple) * multiple, most)
        while (most_full := max(int(first[batch].sum()) for batch in self._batches(0))) > budget:
            if self.count == most:
                raise ValueError(
                    f"{len(first)} training examples do not make batches of at most {budget} for "
                    f"{processes} processes: raise batch_size or batch_tokens"
                )
            # by as much as is over, not one by one: each look deals out all examples
            enough = math.ceil(self.count * most_full / budget / multiple) * multiple
            self.count = min(max(self.count + multiple, enough), most)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches(self.epoch))

    def _batches(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng((self.seed, epoch))
        costs = self.costs(epoch)
        shuffled = random.permutation(len(costs))
        longest_first = shuffled[np.argsort(-costs[shuffled], kind="stable")]
        order = random.permutation(self.count)
        batches: list[list[int]] = [[] for _ in range(self.count)]
        loads = [(0, int(rank), index) for index, rank in enumerate(order)]
        heapq.heapify(loads)
        for item in longest_first.tolist():
            load, rank, index = loads[0]
            batches[index].append(item)
            heapq.heapreplace(loads, (load + int(costs[item]), rank, index))
        return batches
