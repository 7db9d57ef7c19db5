"""Batches with the whole data's share of every label."""

import torch


class StratifiedSampler(torch.utils.data.Sampler):
    """Every epoch a new order in which each run of rows has about the whole set's share of each label.

    A batch in which one label is more frequent than in the data moves the policy's preference for that label before
    anything about the texts is learned; sampling then sees one label only, and the policy collapses onto it.
    """

    def __init__(self, strata: list, seed: int):
        self.members: dict = {}
        for i, stratum in enumerate(strata):
            self.members.setdefault(stratum, []).append(i)
        self.size, self.seed, self.epoch = len(strata), seed, 0

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
        return iter([i for _, i in sorted(placed)])
