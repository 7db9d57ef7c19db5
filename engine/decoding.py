"""Generation: the answers of one micro-batch grow token by token, as trees.

Samples of a prompt that agree so far are one path of its tree, so they share their forward. A row whose answers have
all ended leaves the batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from engine.batches import grouped
from engine.network import Network, PackedForward, Prefix, padded
from engine.trees import Answer, Tree, draw, row_seeds


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


@dataclass
class DecodingRow:
    """One prompt and what has been generated for it.

    Attributes:
        answers: all of them; they share the tree.
        stream: of random numbers; None if nothing is sampled.
        states: (hidden,) of every node of the tree, in order.
        fresh: nodes whose state is known and whose next token has not been chosen.
        columns: every node's column in the KV cache.
    """

    prompt: list[int]
    tree: Tree
    answers: list[Answer]
    stream: torch.Generator | None
    states: list[torch.Tensor] = field(default_factory=list)
    fresh: list[int] = field(default_factory=lambda: [0])
    columns: dict[int, int] = field(default_factory=dict)


def decode(
    network: Network, rows: list[DecodingRow], prefix: Prefix, sampling: Sampling, keep: bool
) -> PackedForward | None:
    """Generate the answers of all rows; their trees and states grow with them.

    keep: return the prompts' forward with gradient, for trees that may grow further. The steps that grow the trees keep
    none: each of them would hold the keys and values of all tokens anew.
    """
    # 1. The prompts: their last states, and their KV cache.
    with torch.set_grad_enabled(keep):
        forward = network.forward([row.prompt for row in rows], [row.tree for row in rows], prefix)
    latest, cache = forward.states.detach(), forward.cache()  # (rows, nodes, hidden) of the fresh nodes
    forward = forward if keep else None  # else its keys and values would be held for nothing
    for row, state in zip(rows, latest):
        row.states.append(state[0])
    visible = _visible_prompts([len(row.prompt) for row in rows], prefix.length)  # (rows, columns)
    for step in range(sampling.max_new_tokens):
        # 2. The next token of every answer that has not ended.
        choices = _choices(network, [state[: len(row.fresh)] for state, row in zip(latest, rows)], sampling.temperature)
        for choice, row in zip(choices, rows):  # in this order `choices` comes to its end, and frees what it holds
            row.fresh = _append_tokens(network.tokenizer, row, choice, sampling, step)
        # 3. Rows with nothing left to compute leave the batch.
        going = [place for place, row in enumerate(rows) if row.fresh]
        if not network.any_process(bool(going)):
            break
        if not going:
            rows = []
            network.dummy_forward()
            continue
        if len(going) < len(rows):
            rows, visible = [rows[place] for place in going], visible[going]
            if cache is not None:
                cache.batch_select_indices(torch.tensor(going, device=network.device))
        # 4. The new nodes go through the network.
        if network.plain:
            latest = _plain_states(network, rows)
        else:
            latest, visible = _extend(network, rows, visible, cache)
        for state, row in zip(latest, rows):
            row.states.extend(state[: len(row.fresh)])
    return forward


def _visible_prompts(lengths: list[int], prefix: int) -> torch.Tensor:
    """(rows, columns): which columns of a padded batch's KV cache hold a token of the row's prompt."""
    visible = torch.ones(len(lengths), max(max(lengths), prefix), dtype=torch.bool)
    for row, length in enumerate(lengths):
        visible[row, length:] = False
    return visible


def _choices(network: Network, states: list[torch.Tensor], temperature: float) -> Iterator[torch.Tensor]:
    """Per row its states (nodes, hidden) -> on the CPU (nodes, vocabulary) the probabilities to draw from, or with
    temperature 0 (nodes,) the most probable token. A card is waited for once per group of rows, not per row."""
    for group in grouped(states):
        logits = network.logits(torch.cat([states[i] for i in group]))
        best = torch.softmax(logits / temperature, -1) if temperature > 0 else logits.argmax(-1)
        yield from best.cpu().split([len(states[i]) for i in group])


def _append_tokens(tokenizer, row: DecodingRow, choices: torch.Tensor, sampling: Sampling, step: int) -> list[int]:
    """Choose the next token of every unfinished answer of one row; returns the nodes that must be computed next.

    choices: what `_choices` says of each fresh node.
    """
    choice_at = dict(zip(row.fresh, choices))
    groups: dict[int, list[Answer]] = {}
    for answer in row.answers:
        if not answer.ended and len(answer.tokens) == step:
            node = row.tree.child(answer.nodes[-1], answer.tokens[-1]) if step else 0
            groups.setdefault(node, []).append(answer)
    new: list[int] = []
    texts: dict[tuple[int, int], tuple[str, bool]] = {}
    for node, group in groups.items():
        choice = choice_at[node]
        drawn = [int(choice)] * len(group) if row.stream is None else draw(choice, len(group), row.stream)
        for answer, token in zip(group, drawn):
            answer.nodes.append(node)
            answer.tokens.append(token)
            if (node, token) not in texts:
                texts[node, token] = _text_and_end(tokenizer, answer.tokens, sampling.stop)
            answer.text, answer.ended = texts[node, token]
            if not answer.ended and step + 1 < sampling.max_new_tokens:
                child = row.tree.child(node, token)
                if child not in new:
                    new.append(child)
    return new


def _text_and_end(tokenizer, tokens: list[int], stop: Callable[[str], bool]) -> tuple[str, bool]:
    """The text of an answer's tokens, and whether it ends with them."""
    ended = tokens[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(tokens[:-1] if ended else tokens, clean_up_tokenization_spaces=False)
    return text, ended or stop(text)


def _plain_states(network: Network, rows: list[DecodingRow]) -> torch.Tensor:
    """The fresh nodes' states (rows, nodes, hidden) by the plain forward, which computes the whole trees."""
    states = network.plain_states([row.prompt for row in rows], [row.tree for row in rows])
    width = max(len(row.fresh) for row in rows)
    return torch.stack([state[padded(row.fresh, width)] for state, row in zip(states, rows)])


def _extend(
    network: Network, rows: list[DecodingRow], visible: torch.Tensor, cache: DynamicCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Push the fresh nodes, one level of every tree, through the network. Returns their states (rows, nodes, hidden),
    and which columns of the KV cache are visible to all of a row's nodes: the new ones are not."""
    seen, width = visible.shape[1], max(len(row.fresh) for row in rows)
    network.tokens_computed += len(rows) * width
    ids = torch.full((len(rows), width), network.tokenizer.pad_token_id)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, seen + width, dtype=torch.bool)
    mask[:, :, :seen] = visible[:, None]
    for place, row in enumerate(rows):
        tree = row.tree
        for i, node in enumerate(row.fresh):
            row.columns[node] = seen + i
            ids[place, i] = tree.tokens[node]
            positions[place, i] = len(row.prompt) + tree.depths[node] - 1
            while node > 0:
                mask[place, i, row.columns[node]] = True
                node = tree.parents[node]
        for i in range(len(row.fresh), width):
            mask[place, i, seen + i] = True  # padding sees itself: a row without any key would be NaN
    latest = network.run_blocks(ids, positions, mask, cache)
    hidden = torch.zeros(len(rows), width, dtype=torch.bool)
    return latest, torch.cat([visible, hidden], dim=1)
