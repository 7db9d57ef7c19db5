"""Answers as trees of tokens (samples of one prompt, or all spellings of a task's labels), and random draws."""

from dataclasses import dataclass, field

import torch
from torch import nn

MASKED = -1e9


@dataclass
class Tree:
    """Answer tokens as a tree: node i > 0 is the state after `tokens[i]`, which follows node `parents[i]` < i.

    `allowed` names the only tokens that may be chosen at a node; a node that is not in it allows every token.
    """

    tokens: list[int] = field(default_factory=lambda: [-1])
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])
    allowed: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self):
        self._children = {(p, t): i for i, (p, t) in enumerate(zip(self.parents, self.tokens)) if i}

    def __len__(self) -> int:
        return len(self.tokens)

    def child(self, node: int, token: int) -> int:
        """The node after `token` at `node`; made if it is not there yet."""
        if (node, token) not in self._children:
            self._children[node, token] = len(self)
            self.tokens.append(token)
            self.parents.append(node)
            self.depths.append(self.depths[node] + 1)
        return self._children[node, token]

    def path(self, node: int) -> list[int]:
        """The tokens from the prompt's end to `node`."""
        tokens = []
        while node > 0:
            tokens.insert(0, self.tokens[node])
            node = self.parents[node]
        return tokens


@dataclass
class Answer:
    """One generated answer: `tokens[t]` was chosen at node `nodes[t]` of its prompt's tree."""

    tokens: list[int]
    nodes: list[int]
    ended: bool  # by the end-of-sequence token, which is not in `text`, or by the stop rule
    text: str
    label: int | None = None  # if it was chosen among the labels of a trie
    probabilities: torch.Tensor | None = None  # (labels,) of the trie, if its label was chosen among them


class LabelTrie:
    """The spellings of a task's labels as a tree, and which tokens may follow at each node.

    Attributes:
        tree: the nodes at which labels part, and those that lead there; other forced tokens have no node.
        vocabulary: (tokens,) the token ids that may be chosen anywhere; all distributions are over these columns.
        mask: (nodes, tokens), 0 where the column's token continues a label (or closes the answer), MASKED elsewhere;
            on the device where it was last needed.
        allowed: the tokens that may be chosen, by node; at the nodes left out nothing is chosen.
        paths: for every label, the decisions [(node, column), ...] that lead to it.
    """

    def __init__(self, spellings: list[list[int]], close_token: int):
        """spellings: token ids of every label, by class id. close_token: what follows a label that is complete; it
        tells a label from a longer one. Raises ValueError if two labels are spelled alike."""
        if len({tuple(s) for s in spellings}) < len(spellings) or not all(spellings):
            raise ValueError("two labels have the same spelling, or one has none: give every label its own word")
        complete = [[*s, close_token] for s in spellings]
        self.spellings, self.close_token = spellings, close_token
        self.tree = Tree()
        choices: dict[int, set[int]] = {}
        self.paths: list[list[tuple[int, int]]] = []
        decisions = []
        for spelling in complete:
            node, path = 0, []
            for t, token in enumerate(spelling):
                options = {other[t] for other in complete if other[:t] == spelling[:t]}
                if len(options) > 1:
                    # The tokens since the last decision were forced: they enter the tree only now that they matter.
                    for known in spelling[self.tree.depths[node] : t]:
                        node = self.tree.child(node, known)
                    choices[node] = options
                    path.append((node, token))
            decisions.append(path)
        self.allowed = {node: sorted(choices[node]) for node in sorted(choices)}
        self.vocabulary = sorted(set().union(*choices.values()))
        column = {token: i for i, token in enumerate(self.vocabulary)}
        # A finite number, so that probability times log-probability is 0 and not NaN for a masked token.
        self.mask = torch.full((len(self.tree), len(self.vocabulary)), MASKED)
        for node, options in choices.items():
            self.mask[node, [column[token] for token in options]] = 0.0
        self.paths = [[(node, column[token]) for node, token in path] for path in decisions]
        self._next = {tuple(path[:t]): path[t][0] for path in self.paths for t in range(len(path))}
        self._label = {tuple(path): label for label, path in enumerate(self.paths)}
        # (labels, decisions of the longest path): indices into (nodes x columns), padded with one that adds nothing.
        places = [[node * len(self.vocabulary) + at for node, at in path] for path in self.paths]
        nothing, most = self.mask.numel(), max(map(len, places))
        self._places = torch.tensor([path + [nothing] * (most - len(path)) for path in places])

    def log_probs(self, logits: torch.Tensor, temperature: float = 1.0, nodes=slice(None)) -> torch.Tensor:
        """(..., nodes, columns) logits of the vocabulary -> log-probs among the tokens that each node allows.

        nodes: their numbers, if they are not all nodes in order.
        """
        self.mask = self.mask.to(logits.device)
        return torch.log_softmax(logits / temperature + self.mask[nodes], dim=-1)

    def full_tree(self) -> tuple[Tree, list[list[tuple[int, int]]]]:
        """All spellings as a tree, forced tokens too, and per label its [(node, token), ...].

        Where a label begins another all are closed: the shorter one would else be at least as likely as the longer.
        """
        begins = {tuple(s[:t]) for s in self.spellings for t in range(1, len(s))}
        closing = [self.close_token] if any(tuple(s) in begins for s in self.spellings) else []
        tree, steps = Tree(), []
        for spelling in self.spellings:
            node, path = 0, []
            for token in [*spelling, *closing]:
                if path:
                    node = tree.child(*path[-1])
                path.append((node, token))
            steps.append(path)
        return tree, steps

    def label_log_probs(self, log_probs: torch.Tensor) -> torch.Tensor:
        """(batch, nodes, columns) log-probs of decisions -> (batch, labels) log-probs of whole labels."""
        self._places = self._places.to(log_probs.device)
        flat = nn.functional.pad(log_probs.flatten(1), (0, 1))
        return flat[:, self._places].sum(-1)

    def choose(self, log_probs: torch.Tensor, generator: torch.Generator | None) -> tuple[int, list[tuple[int, int]]]:
        """(nodes, columns) log-probs of one row, on the CPU -> a label and its decisions [(node, column), ...].

        Token by token, as generation would: sampled, or the most probable token each time if there is no generator.
        """
        path: list[tuple[int, int]] = []
        while tuple(path) not in self._label:
            node = self._next[tuple(path)]
            if generator is None:
                column = int(log_probs[node].argmax())
            else:
                column = draw(log_probs[node].exp(), 1, generator)[0]
            path.append((node, column))
        return self._label[tuple(path)], path


def row_seeds(count: int, generator: torch.Generator | None, row_offset: int = 0) -> list[int]:
    """A seed for every row's own stream, so that neither micro-batches nor processes change what is sampled.

    row_offset: the number of the first of these `count` rows among those of all processes.
    """
    return torch.randint(2**62, (row_offset + count,), generator=generator).tolist()[row_offset:]


def random_stream(seed: int | None) -> torch.Generator | None:
    """A row's random stream; None, where nothing is sampled, for None."""
    return None if seed is None else torch.Generator().manual_seed(seed)


def draw(probabilities: torch.Tensor, count: int, generator: torch.Generator | None) -> list[int]:
    """`count` indices drawn from (n,) probabilities on the CPU. FloatingPointError if they are not finite."""
    if not bool(torch.isfinite(probabilities).all()):
        raise FloatingPointError("the model's probabilities are not finite")
    return torch.multinomial(probabilities, count, replacement=True, generator=generator).tolist()
