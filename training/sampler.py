"""The order of the rows in an epoch: every batch has about the label shares of the whole data, and is of one task."""

import itertools
from collections.abc import Iterator

import torch


def stratum(label: int | float | None) -> int | None:
    """What a row counts as: its class, or its number rounded to a whole one."""
    return round(label) if isinstance(label, float) else label


def first_epoch_seed(args) -> int:
    """The sampler's seed for a trainer's arguments: epoch n has one order, whichever run it is in."""
    return args.seed + args.epoch_offset


class StratifiedSampler(torch.utils.data.Sampler):
    """A new order each epoch, in which any consecutive rows have about the label shares of the whole data.

    A batch in which one label is more frequent than in the data shifts the policy towards that label before it has
    learned anything about the texts; sampling then sees that label only, and the policy collapses onto it.
    """

    def __init__(self, strata: list, seed: int, size: int | None = None):
        """strata: every row's label. size: rows of an epoch, if not all."""
        self.members: dict = {}
        for i, stratum in enumerate(strata):
            self.members.setdefault(stratum, []).append(i)
        self.size = len(strata) if size is None else size
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        placed = []
        for members in self.members.values():
            order = torch.randperm(len(members), generator=random).tolist()
            jitter = torch.rand(len(members), generator=random).tolist()
            placed += [((rank + u) / len(members), members[i]) for rank, (i, u) in enumerate(zip(order, jitter))]
        return iter([i for _, i in sorted(placed)][: self.size])


def steps_per_epoch(sizes: list[int], batch: int, evenly: bool) -> list[int]:
    """How many steps each task has in an epoch, from its number of rows and those of a step: its whole batches, or
    (`evenly`) as many as the task with the most."""
    steps = [size // batch for size in sizes]
    return [max(steps)] * len(steps) if evenly else steps


class TaskSampler(torch.utils.data.Sampler):
    """The rows of several tasks, which are concatenated in the data: `batch` rows in a row are of one task.

    The tasks take turns so that any consecutive steps have about their shares; `evenly`, each has one of so many steps
    as there are tasks, and a small one goes over its rows again, each time in another order. A task's rows come in the
    order of a StratifiedSampler, as they do where it is alone.
    """

    def __init__(self, strata: list[list], batch: int, seed: int, evenly: bool = False):
        """strata: by task every row's label. ValueError for a task that fills no batch."""
        if min(map(len, strata)) < batch:
            raise ValueError(f"a task has {min(map(len, strata))} rows, and a step takes {batch}")
        self.rows = [StratifiedSampler(labels, seed) for labels in strata]
        self.first_rows = [0, *itertools.accumulate(map(len, strata))]
        self.steps = steps_per_epoch([len(labels) for labels in strata], batch, evenly)
        self.turns = [task for task, steps in enumerate(self.steps) for _ in range(steps)]
        self.batch, self.seed, self.epoch = batch, seed, 0

    def __len__(self) -> int:
        return self.batch * len(self.turns)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = StratifiedSampler(self.turns, self.seed)
        order.set_epoch(self.epoch)
        batches = [self._batches(task) for task in range(len(self.rows))]
        for turn in order:
            yield from next(batches[self.turns[turn]])

    def _batches(self, task: int) -> Iterator[list[int]]:
        """A task's batches from the beginning of this epoch on."""
        rows, first = self.rows[task], self.first_rows[task]
        batches = len(rows) // self.batch
        passes = -(-self.steps[task] // batches)  # of an epoch over the task's rows
        for number in itertools.count(self.epoch * passes):
            rows.set_epoch(number)
            order = [first + i for i in rows]
            yield from (order[i * self.batch : (i + 1) * self.batch] for i in range(batches))
