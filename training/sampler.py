"""The order of the rows in an epoch: every batch has about the label shares of the whole data."""

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
