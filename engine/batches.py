"""How prompts share a prefix and are cut into micro-batches."""

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
    """Row numbers sorted by length, longest first, cut so that a batch's tokens <= budget (at least one row).

    A batch has rows x longest row tokens or, `packed`, those of its rows.
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
    """Prompts whose states (nodes, hidden), or nodes, meet the vocabulary at once, at most so many nodes (at least one
    prompt): its weights, the largest matrix of a small model, are read once for all of them."""
    start = nodes = 0
    for i, state in enumerate(states):
        if nodes and nodes + len(state) > most:
            yield range(start, i)
            start, nodes = i, 0
        nodes += len(state)
    if nodes:
        yield range(start, len(states))
