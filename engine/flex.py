"""Attention of a packed sequence (attention.py) on a card, by torch's flex_attention: rows without padding, a prefix
that is there once, trees, grouped queries, and layers with a sliding window.

Prefix, past and own tokens are one row of keys. What a token sees is said by two numbers of every key: counting prompts
and trees depth first, a token's descendants are those numbered from its own number to the last one below it, so a key
is seen by the queries in between. All keys of a prefix last for ever. The kernel skips blocks of tokens that do not see
each other, and masks nothing in those that see each other whole.

flex_attention must be compiled to be one kernel; a C compiler and Triton are needed. Without them, or where its numbers
differ, loading.check chooses padded rows. Off a card it runs as it is, slowly, for tests.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from engine.attention import Packing, Row

BLOCK = 128  # tokens; numbers of tokens are rounded up to it, so that one kernel serves all
UNSEEN = 2**30  # the number of a key that no query sees


@dataclass(frozen=True)
class Numbers:
    """What is known of every token of a packed sequence, the keys of prefix and past in front.

    Attributes:
        keys: (3, keys) each key's number, the number after its last descendant's, and its position.
        queries: (2, tokens) each own token's number and position.
    """

    keys: torch.Tensor
    queries: torch.Tensor


def serves(device: torch.device) -> bool:
    """Whether packed rows on this device attend by flex_attention."""
    return device.type != "cpu"


def depth_first(parents: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """Each node's number depth first, how many nodes are below it (itself included), and its depth."""
    sizes, numbers, depths = [1] * len(parents), [0] * len(parents), [0] * len(parents)
    for node in range(len(parents) - 1, 0, -1):
        sizes[parents[node]] += sizes[node]
    free = [1] * len(parents)  # the number of a node's next child
    for node, parent in enumerate(parents[1:], 1):
        numbers[node], depths[node] = free[parent], depths[parent] + 1
        free[node] = numbers[node] + 1
        free[parent] += sizes[node]
    return numbers, sizes, depths


def numbered(packing: Packing, prefix: int, past: int) -> Numbers:
    """prefix, past: tokens in front of the packed sequence's own (see PackedLayer). All sizes are rounded up to blocks.

    The prefix, there or as the first row, is seen by all; what no row has before it is seen by none.
    """
    tokens = packing.rows[-1].stop
    shared = prefix + packing.inside
    keys = [[UNSEEN] * (prefix + past + tokens), [0] * (prefix + past + tokens), [0] * (prefix + past + tokens)]

    def place(places: list[int], numbers, ends, positions) -> None:
        for of_all, of_these in zip(keys, (numbers, ends, positions)):
            for at, number in zip(places, of_these):
                of_all[at] = number

    place(list(range(prefix)), range(prefix), [UNSEEN] * prefix, range(prefix))
    own, first = prefix + past, prefix
    for i, row in enumerate(packing.rows):
        places = list(range(own + row.start, own + row.stop))
        if i == 0 and packing.inside:
            place(places, range(len(places)), [UNSEEN] * len(places), range(len(places)))
            first += len(places)
            continue
        if packing.before:
            places = [*range(*(prefix + at for at in packing.before[i])), *places]
        place(places, *_of_row(row, len(places), first, shared))
        first += len(places)
    queries = [keys[0][own:], keys[2][own:]]
    return Numbers(_in_blocks(keys, [UNSEEN, 0, 0]), _in_blocks(queries, [of_all[-1] for of_all in queries]))


def _of_row(row: Row, size: int, first: int, shared: int) -> tuple[list[int], list[int], list[int]]:
    """Numbers from `first` on, ends and positions of a row of so many tokens, what it has before it included."""
    numbers, sizes, depths = depth_first(row.parents or (-1,))
    root = size - len(numbers)  # the token that is the tree's root
    return (
        [*range(first, first + root), *(first + root + number for number in numbers)],
        [*[first + size] * root, *(first + root + number + below for number, below in zip(numbers, sizes))],
        [*range(shared, shared + root), *(shared + root + depth for depth in depths)],
    )


def _in_blocks(rows: list[list[int]], fillers: list[int]) -> torch.Tensor:
    """(rows, numbers) rounded up to whole blocks, two at least: torch compiles sizes of 1 apart. A query that fills up
    sees what the last one does: a query without any key would be NaN."""
    more = max(2 * BLOCK - len(rows[0]), -len(rows[0]) % BLOCK)
    return torch.tensor([row + [filler] * more for row, filler in zip(rows, fillers)], dtype=torch.int32)


def mask(numbers: Numbers, window: int | None = None) -> torch.Tensor:
    """The mask of a packed sequence, in the form that models pass on to their attention unread: a tensor of four
    dimensions, here of one value, with the true mask as its attribute `blocks`."""
    carrier = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=numbers.keys.device)
    carrier.blocks = block_mask(numbers, window)
    return carrier


def block_mask(numbers: Numbers, window: int | None = None) -> BlockMask:
    """Which blocks of queries and keys see each other, computed where the numbers are, without waiting for a card.

    window: a token sees only keys at so many of the last positions, its own included.
    """
    (key, end, at), (query, here) = numbers.keys, numbers.queries

    def seen(batch, head, q, k):
        return (key[k] <= query[q]) & (query[q] < end[k])

    def near(batch, head, q, k):
        return seen(batch, head, q, k) & (here[q] - at[k] < window)

    # 1. Of each block of queries (rows) and of keys (columns), the smallest and the largest numbers.
    (low_q, high_q), (low_here, high_here) = (_range(x)[..., None] for x in (query, here))
    (low_k, high_k), (low_end, high_end), (low_at, high_at) = (_range(x) for x in (key, end, at))
    # 2. Blocks of which some queries may see some keys, and those of which all see all.
    some = (low_k <= high_q) & (low_q < high_end)
    whole = (high_k <= low_q) & (high_q < low_end)
    if window is not None:
        some &= low_here - high_at < window
        whole &= high_here - low_at < window
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen if window is None else near,
        seq_lengths=(len(query), len(key)),
    )


def _range(x: torch.Tensor) -> torch.Tensor:
    """(2, blocks): the smallest and the largest of every block."""
    return torch.stack(x.view(-1, BLOCK).aminmax(dim=1))


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(queries, keys) booleans -> (1, 1, queries) how many, and (1, 1, queries, keys) which ones first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return blocks.sum(-1, dtype=torch.int32)[None, None], order[None, None]


@functools.cache
def _compiled():
    # Torch finds out by itself that numbers of tokens vary; whatever else does (gradients, windows) is compiled apart,
    # and beyond this limit torch would go on without compiling, with all scores in memory.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention)


def packed_flex(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """query (1, heads, tokens, size), key and value of PackedLayer.update, attention_mask of `mask`
    -> (1, tokens, heads, size), None."""
    prefix, past, _ = key.packed_with
    tokens, blocks = query.shape[2], attention_mask.blocks
    queries, keys = blocks.shape[-2:]

    def row(i: int, own: torch.Tensor) -> torch.Tensor:
        parts = [part[i].to(query.dtype) for part in (prefix, past) if part] + [own.to(query.dtype)]
        filler = own.new_zeros(*own.shape[:2], keys - sum(part.shape[2] for part in parts), own.shape[3])
        return torch.cat([*parts, filler.to(query.dtype)], dim=2)

    attend = _compiled() if query.is_cuda else flex_attention
    output = attend(
        nn.functional.pad(query, (0, 0, 0, queries - tokens)),
        row(0, key),
        row(1, value),
        block_mask=blocks,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[:, :, :tokens].transpose(1, 2), None


AttentionInterface.register(packed_flex.__name__, packed_flex)
