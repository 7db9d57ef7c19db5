"""How answers are generated."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.trees import row_seeds


@dataclass(frozen=True)
class Sampling:
    """How answers are generated: when they end, how many there are of each prompt, and how tokens are chosen.

    Attributes:
        stop: `stop(text so far)` says that an answer is over.
        max_new_tokens: tokens of an answer at most.
        samples: answers per prompt.
        temperature: of sampling; 0 takes the most probable token each time.
        generator: source of the rows' random streams; None: torch's own.
        row_offset: the first prompt's number among those of all processes (see `row_seeds`).
    """

    stop: Callable[[str], bool]
    max_new_tokens: int
    samples: int = 1
    temperature: float = 0.0
    generator: torch.Generator | None = None
    row_offset: int = 0

    def seeds(self, prompts: int) -> list[int | None]:
        """The seed of every prompt's random stream, drawn anew at each call; None for each if nothing is sampled."""
        if self.temperature > 0:
            return row_seeds(prompts, self.generator, self.row_offset)
        return [None] * prompts
