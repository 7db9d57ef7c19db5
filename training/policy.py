"""The policy: distributions over the answer space, read from the engine's states; and the critic's values."""

from collections.abc import Iterator

import torch
from torch import nn

from engine.batches import grouped
from engine.engine import Engine
from engine.trees import MASKED, LabelTrie, Tree


class Policy:
    """One distribution for sampling, old, new and reference log-probabilities: same temperature, same mask.

    Args:
        engine: on the model in training.
        value_head: (hidden) -> (1).
        temperature: of sampling, and of all log-probabilities.
        first_tokens: those that labels begin with; free mode pays the entropy bonus for the choice among them.
        trie: the labels that may be answered; None in free mode.
        use_CoT: an analysis of any tokens comes before the label.
    """

    def __init__(
        self,
        engine: Engine,
        value_head: nn.Module,
        temperature: float,
        first_tokens: list[int],
        trie: LabelTrie | None = None,
        use_CoT: bool = False,
    ):
        self.engine, self.value_head, self.temperature = engine, value_head, temperature
        self.first_tokens, self.trie, self.use_CoT = first_tokens, trie, use_CoT

    @property
    def only_labels(self) -> bool:
        """Whether every token is chosen among the labels': the columns are the trie's, else the whole vocabulary."""
        return self.trie is not None and not self.use_CoT

    def columns(self, tokens: list[int]) -> list[int]:
        """The tokens as columns of the distributions."""
        if not self.only_labels:
            return tokens
        column = {token: i for i, token in enumerate(self.trie.vocabulary)}
        return [column[token] for token in tokens]

    def log_distributions(self, states: list[torch.Tensor], trees: list[Tree]) -> Iterator[torch.Tensor]:
        """Per prompt its states (nodes, hidden) -> (nodes, columns) log-probabilities."""
        for group in grouped(states):
            nodes = [(i, node) for i in group for node in range(len(states[i]))]
            allowed = [trees[i].allowed.get(node) for i, node in nodes]
            flat = torch.cat([states[i] for i in group])
            log_probs = self.log_softmax(flat, allowed, [node for _, node in nodes])
            yield from log_probs.split([len(states[i]) for i in group])

    def log_softmax(self, states: torch.Tensor, allowed: list[list[int] | None], nodes) -> torch.Tensor:
        """(n, hidden) states of n nodes, and the tokens that each allows (None: all) -> (n, columns)."""
        if self.only_labels:
            logits = self.engine.logits(states, self.trie.vocabulary)
            return self.trie.log_probs(logits, self.temperature, nodes)
        logits = self.engine.logits(states) / self.temperature
        limited = [line for line, tokens in enumerate(allowed) if tokens is not None]
        if limited:
            mask = torch.zeros_like(logits)
            mask[self.engine.to_device(torch.tensor(limited))] = MASKED
            open_ = torch.tensor([(line, token) for line in limited for token in allowed[line]])
            mask[tuple(self.engine.to_device(open_.T))] = 0.0
            logits = logits + mask
        return torch.log_softmax(logits, dim=-1)

    def label_log_probs(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, nodes, hidden) states of the trie's nodes -> (rows, labels) log-probabilities of whole labels."""
        logits = self.engine.logits(states, self.trie.vocabulary)
        return self.trie.label_log_probs(self.trie.log_probs(logits, self.temperature))

    def entropy(
        self, log_probs: torch.Tensor, nodes: torch.Tensor, allowed: list[list[int] | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, columns) log-probabilities at n nodes -> (n,) entropy, 0 where it earns no bonus; and (n,) where it does:
        wherever a choice among labels is made.

        Over the whole vocabulary a bonus would pay for junk: entropy is cheapest where no label stands. So an analysis
        earns none, and in free mode the choice is that among the labels' first tokens, if the answer begins with it.
        """
        if self.trie is None:
            paid = (nodes == 0) & (not self.use_CoT and len(self.first_tokens) > 1)
            first = self.engine.to_device(torch.tensor(self.first_tokens))
            log_probs = torch.log_softmax(log_probs[:, first], dim=-1)
        elif self.use_CoT:
            paid = self.engine.to_device(torch.tensor([tokens is not None for tokens in allowed]))
        else:
            paid = torch.ones_like(nodes, dtype=torch.bool)
        return -(log_probs.exp() * log_probs).sum(-1) * paid, paid

    def values(self, states: torch.Tensor) -> torch.Tensor:
        """(..., hidden) states -> (...) values. The states are detached: the critic does not shape the policy."""
        return self.value_head(states.detach().float())[..., 0]
