"""How prompts share a prefix and are divided into micro-batches."""

from collections.abc import Iterator, Sized


def common_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all prompts share at their start; at least one token of every prompt stays outside."""
    if not prompts:
        return 0
    shortest, longest = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    length = 0
    while length < limit and shortest[length] == longest[length]:
        length += 1
    return length


def micro_batches(lengths: list[int], budget: int, packed: bool = False) -> list[list[int]]:
    """Row numbers by length, longest first, in batches of at most `budget` tokens (but at least one row).

    A padded batch has rows x longest row tokens, a `packed` one the sum of its rows' tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    room = longest = 0
    for i in order:
        if not batches or (lengths[i] if packed else longest) > room:
            batches.append([])
            room, longest = budget, lengths[i]
        batches[-1].append(i)
        room -= lengths[i] if packed else longest
    return batches


def grouped(states: list[Sized], most: int = 128) -> Iterator[range]:
    """Ranges of prompts whose states (nodes, hidden) are multiplied by the output layer at once: at most so many nodes,
    but at least one prompt. Its weights, the largest matrix of a small model, are then read once for all of them."""
    start = nodes = 0
    for i, state in enumerate(states):
        if nodes and nodes + len(state) > most:
            yield range(start, i)
            start, nodes = i, 0
        nodes += len(state)
    if nodes:
        yield range(start, len(states))
