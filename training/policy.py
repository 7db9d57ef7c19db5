"""The policy: distributions over the answer space, read from the engine's states; and the critic's values."""

from collections.abc import Iterator

import torch
from torch import nn

from engine.batches import grouped
from engine.engine import Engine
from engine.trees import MASKED, LabelTrie, Tree


def label_log_probs(engine: Engine, trie: LabelTrie, states: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """(rows, nodes, hidden) states of the trie's nodes -> (rows, labels) log-probabilities of whole labels."""
    return trie.label_log_probs(trie.log_probs(engine.logits(states, trie.vocabulary), temperature))


def label_batches(
    engine: Engine, trie: LabelTrie, prompts: list[list[int]], temperature: float = 1.0
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield (row numbers, (rows, labels) log-probabilities) with gradient, one micro-batch at a time.

    Every objective over a label set, PPO's and SFT's, has this forward. See Engine.training_batches.
    """
    for rows, states in engine.training_batches(prompts, [trie.tree] * len(prompts)):
        yield rows, label_log_probs(engine, trie, states, temperature)


class Policy:
    """One distribution for sampling, old, new and reference log-probabilities: same temperature, same mask.

    Args:
        engine: on the model in training.
        value_head: (hidden) -> (1).
        temperature: of sampling, and of all log-probabilities.
        labels: the task's labels, if it has any that the tokenizer tells apart.
        masked: only these may be answered; else any token (free mode).
        use_CoT: an analysis of any tokens comes before the label.
    """

    def __init__(
        self,
        engine: Engine,
        value_head: nn.Module,
        temperature: float,
        labels: LabelTrie | None,
        masked: bool,
        use_CoT: bool = False,
    ):
        self.engine, self.value_head, self.temperature = engine, value_head, temperature
        self.trie, self.use_CoT = labels if masked else None, use_CoT
        # The tokens so far at which labels part, and the tokens that they go on with.
        parts = {} if labels is None else {tuple(labels.tree.path(node)): on for node, on in labels.allowed.items()}
        self.label_choices: dict[tuple[int, ...], list[int]] = parts

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

    def label_choice(self, tree: Tree, node: int) -> list[int] | None:
        """The tokens that labels go on with at a node of an answer; None where no choice among labels is made."""
        if self.trie is not None:
            return (self.trie if self.only_labels else tree).allowed.get(node)
        return None if self.use_CoT else self.label_choices.get(tuple(tree.path(node)))

    def entropy(self, log_probs: torch.Tensor, choices: list[list[int] | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, columns) log-probabilities at n nodes, and the `label_choice` at each -> (n,) entropy of the choice, 0
        where there is none; and (n,) where there is one, which earns the bonus.

        Over the whole vocabulary a bonus would pay for junk: entropy is cheapest where no label stands. So an analysis
        earns none, and in free mode only the tokens count at which the spellings of labels part.
        """
        paid = torch.tensor([tokens is not None for tokens in choices])
        if not self.only_labels:
            most = max((len(tokens) for tokens in choices if tokens), default=1)
            padded = [[*(tokens or [0]), *[-1] * (most - len(tokens or [0]))] for tokens in choices]
            columns = self.engine.to_device(torch.tensor(padded))  # (n, most)
            chosen = log_probs.gather(-1, columns.clamp(min=0)).masked_fill(columns < 0, MASKED)
            log_probs = torch.log_softmax(chosen, dim=-1)
        paid = self.engine.to_device(paid)
        return -(log_probs.exp() * log_probs).sum(-1) * paid, paid

    def values(self, states: torch.Tensor) -> torch.Tensor:
        """(..., hidden) states -> (...) values. The states are detached: the critic does not shape the policy."""
        return self.value_head(states.detach().float())[..., 0]
