"""One forward of a causal language model: prompts with a shared prefix, and the trees of tokens that follow them.

Rows take one of three layouts: a packed sequence without padding (attention.py; on a card flex.py), a padded batch,
or, for a model that neither fits, a plain padded batch with a sequence for every path through a tree.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from engine import alibi, attention, feedforward, flex, lora, masks
from engine.output import Transform, transforms
from engine.trees import Tree
from machine import processes, sharding

KeysValues = tuple[torch.Tensor, torch.Tensor]  # of one layer, each (rows, heads, tokens, size)


@dataclass
class Prefix:
    """The first `length` tokens of all prompts, and their keys and values (1, heads, length, size) per layer.

    Without keys and values (but with a length) the prefix is computed in front of the rows, in the same forward.
    """

    length: int = 0
    keys_values: list[KeysValues] = field(default_factory=list)


class Network:
    """The forward of `model`, a causal language model with or without a LoRA adapter.

    Attributes:
        packed: rows are one packed sequence; else a padded batch.
        flex: packed rows attend by flex_attention, which knows windows too.
        min_separate_prefix: in a padded batch a prefix of so many tokens is not copied for every row; None: it always
            is.
        plain: the model fits neither, and takes the plain forward (see loading.check).
        window: some layers see only so many of the last tokens; None: every token is seen by all after it.
        transform: what the model does to its logits after the output layer.
        lockstep: weights are sharded, so all processes must run the same number of blocks.
        tokens_computed: tokens pushed through the network so far, padding included.
    """

    def __init__(self, model: nn.Module, tokenizer):
        self.tokenizer = tokenizer
        self.plain = False
        self.tokens_computed = 0
        self.lockstep = sharding.active()
        self.set_model(model)
        config = self.causal_lm.config.get_text_config()
        self.transform: Transform = next(transforms(config))
        self.set_window(masks.window(config))

    def set_window(self, window: int | None) -> None:
        """Let some layers see only so many of the last tokens; None: no prompt with its answer is longer than that.
        On a CPU only rows without a window can be packed, and nowhere can they have a separate prefix."""
        self.window = window
        self.flex = flex.serves(self.device)
        self.packed = (self.flex or window is None) and attention.fits(self.causal_lm)
        self.min_separate_prefix = attention.SHORTEST if self.packed and window is None else None

    def set_model(self, model: nn.Module) -> None:
        """Compute with `model` from here on: this network's own with an adapter put on it, for one."""
        self.model = model
        lora.fuse(model)
        self.causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.backbone = self.causal_lm.base_model
        self.head = self.causal_lm.get_output_embeddings()
        self.layers = self.causal_lm.config.get_text_config().num_hidden_layers
        self.alibi = alibi.fit(self.backbone)
        # Sharded weights are all-gathered by the calls of their modules, so every process must make all of them.
        self.last_feedforward = None if self.lockstep else feedforward.last(self.backbone, self.layers)
        self._columns: dict[tuple[int, ...], torch.Tensor] = {}  # vocabularies, on the output layer's device

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the model's device, without waiting for a card: from pinned memory the copy is asynchronous."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def logits(self, states: torch.Tensor, vocabulary: list[int] | None = None) -> torch.Tensor:
        """(..., hidden) states -> (..., tokens) float32 logits, of `vocabulary`'s columns only if given."""
        if vocabulary is None:
            return self.transform(self.head(states).float())
        # In bfloat16 the product would round labels to steps of an eighth, and make close ones equal.
        if tuple(vocabulary) not in self._columns:
            self._columns[tuple(vocabulary)] = self.to_device(torch.tensor(vocabulary))
        columns = self._columns[tuple(vocabulary)]
        bias = None if self.head.bias is None else self.head.bias[columns].float()
        return self.transform(nn.functional.linear(states.float(), self.head.weight[columns].float(), bias))

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """In here the model computes without its adapter. Without one its weights may have changed: ValueError."""
        if not hasattr(self.model, "disable_adapter"):
            raise ValueError("a model without an adapter is no reference; ask a frozen_copy of its engine")
        with self.model.disable_adapter():
            yield

    @contextlib.contextmanager
    def layout(self, packed: bool, min_separate_prefix: int | None) -> Iterator[None]:
        """In here rows are laid out like this (see the attributes of these names)."""
        before = self.packed, self.min_separate_prefix
        self.packed, self.min_separate_prefix = packed, min_separate_prefix
        try:
            yield
        finally:
            self.packed, self.min_separate_prefix = before

    # ----------------------------------------------------------------------------------------- lockstep of processes

    def dummy_forward(self) -> torch.Tensor:
        """Run every block once for the other processes' sake. Returns states that nobody needs."""
        return self.backbone(torch.tensor([[0]], device=self.device), use_cache=False).last_hidden_state

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set here or, where weights are sharded, in any process."""
        return any(processes.all_gather([flag])) if self.lockstep else flag

    def lockstep_batches(self, batches: list) -> Iterator:
        """The batches; where weights are sharded, then None for as long as another process has a batch left."""
        most = max(processes.all_gather([len(batches)])) if self.lockstep else len(batches)
        yield from batches
        yield from [None] * (most - len(batches))

    # ------------------------------------------------------------------------------------------------------ forwards

    def states(self, prompts: list[list[int]], trees: list[Tree], prefix: Prefix) -> torch.Tensor:
        """States (rows, nodes, hidden) of the trees' nodes; rows are padded to the largest tree."""
        return self.forward(prompts, trees, prefix).states

    def forward(self, prompts: list[list[int]], trees: list[Tree], prefix: Prefix) -> "Forward | PackedForward":
        """The states of the trees' nodes; with trees of one node, the rows can go on from there."""
        if self.plain:
            return Forward(self.plain_states(prompts, trees), None)
        return (self._packed_forward if self.packed else self._padded_forward)(prompts, trees, prefix)

    def run_prefix(self, ids: list[int]) -> tuple[list[KeysValues], torch.Tensor]:
        """Keys and values per layer, and the last states (1, tokens, hidden), of use only where weights are sharded."""
        self.tokens_computed += len(ids)
        cache = DynamicCache()
        ids = self.to_device(torch.tensor([ids]))
        nowhere = torch.zeros(0, dtype=torch.long, device=self.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(feedforward.only(self.last_feedforward, nowhere))
            mask = None  # causal
            if self.alibi:
                positions = torch.arange(ids.shape[1], device=self.device)[None]
                stack.enter_context(attention.in_use(self.causal_lm, attention.masked))
                mask = stack.enter_context(self.alibi.at(positions, None, ids.shape[1]))
            states = self.backbone(ids, attention_mask=mask, past_key_values=cache, use_cache=True).last_hidden_state
        return [(layer.keys, layer.values) for layer in cache.layers], states

    def plain_states(self, prompts: list[list[int]], trees: list[Tree]) -> torch.Tensor:
        """The states by the plain forward: every path through a tree is a padded sequence of its own."""
        sequences, owners = [], []
        for row, (prompt, tree) in enumerate(zip(prompts, trees)):
            inner = set(tree.parents)
            for node in range(len(tree)):
                if node not in inner:
                    sequences.append(prompt + tree.path(node))
                    owners.append((row, node))
        width, pad = max(map(len, sequences)), self.tokenizer.pad_token_id
        self.tokens_computed += width * len(sequences)
        ids = self.to_device(torch.tensor([s + [pad] * (width - len(s)) for s in sequences]))
        mask = self.to_device(torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences]))
        hidden = self.backbone(ids, attention_mask=mask, use_cache=False).last_hidden_state
        # Where every node's state is: a sequence, and a token of it.
        where: list[list] = [[(0, 0)] * max(map(len, trees)) for _ in prompts]
        for sequence, (row, node) in enumerate(owners):
            while node >= 0:
                where[row][node] = (sequence, len(prompts[row]) - 1 + trees[row].depths[node])
                node = trees[row].parents[node]
        index = self.to_device(torch.tensor(where))
        return hidden[index[..., 0], index[..., 1]]

    def _packed_forward(self, prompts: list[list[int]], trees: list[Tree], prefix: Prefix) -> "PackedForward":
        """One packed sequence: a prompt after the prefix, its tree's tokens, the next prompt."""
        # 1. A prefix whose keys and values are not known goes in front.
        inside = 0 if prefix.keys_values else prefix.length
        ids = prompts[0][:inside]
        positions = list(range(inside))
        rows = [attention.Row(0, inside)] if inside else []
        # 2. The rows, each at the positions of a plain sequence.
        nodes: list[list[int]] = []  # per row its nodes' places
        for prompt, tree in zip(prompts, trees):
            start, rest = len(ids), len(prompt) - prefix.length
            ids += prompt[prefix.length :] + tree.tokens[1:]
            positions += [*range(prefix.length, len(prompt)), *(len(prompt) + depth - 1 for depth in tree.depths[1:])]
            rows.append(_row(start, len(ids), tree))
            nodes.append(list(range(start + rest - 1, len(ids))))
        # 3. One pass, and the nodes' states.
        packing = attention.Packing(rows, inside)
        layers = [attention.PackedLayer(packing, pair) for pair in prefix.keys_values or [None] * self.layers]
        read = torch.tensor([place for places in nodes for place in places])
        hidden = self.run_packed(ids, positions, layers, read)
        where = self.to_device(torch.tensor([padded(places, max(map(len, nodes))) for places in nodes]))
        spans = [(row.start, row.stop) for row in rows[-len(prompts) :]]
        return PackedForward(self, prompts, hidden[where], hidden, layers, spans)

    def _padded_forward(self, prompts: list[list[int]], trees: list[Tree], prefix: Prefix) -> "Forward":
        """A padded batch. Columns: the prompts after the prefix, padded on the right, then the trees' tokens.

        A tree token sees its own prompt and its ancestors, and has the position of a plain sequence.
        """
        length, pad = prefix.length, self.tokenizer.pad_token_id
        rests = [p[length:] for p in prompts]
        rows, width, nodes = len(rests), max(map(len, rests)), max(map(len, trees)) - 1
        self.tokens_computed += rows * (width + nodes)
        # 1. Tokens and positions.
        ids = torch.tensor(
            [padded(rest, width, pad) + padded(tree.tokens[1:], nodes, pad) for rest, tree in zip(rests, trees)]
        )
        sizes = torch.tensor([len(rest) for rest in rests])
        depths = [padded(tree.depths[1:], nodes, 1) for tree in trees]
        tree_positions = torch.tensor(
            [[len(rest) + depth - 1 for depth in of_tree] for rest, of_tree in zip(rests, depths)],
            dtype=torch.long,  # without a node the list is empty, and its type would be float
        ).view(rows, nodes)
        positions = length + torch.cat([torch.arange(width).expand(rows, width), tree_positions], dim=1)
        # 2. What each token sees: (rows, tokens, prefix and tokens).
        mask = torch.ones(rows, width + nodes, length + width + nodes, dtype=torch.bool)
        mask[:, :width, length:] = torch.ones(width, width + nodes, dtype=torch.bool).tril()
        if nodes:
            mask[:, width:, length : length + width] = (torch.arange(width) < sizes[:, None])[:, None]
            mask[:, width:, length + width :] = torch.stack([masks.ancestors(tree.parents, nodes) for tree in trees])
        # 3. One pass, and the nodes' states.
        cache = self.kv_cache(prefix.keys_values, rows)
        nodes_at = torch.arange(width, width + nodes).expand(rows, nodes)
        read = torch.arange(rows)[:, None] * (width + nodes) + torch.cat([sizes[:, None] - 1, nodes_at], dim=1)
        read = self.to_device(read)  # (rows, nodes)
        hidden = self.run_blocks(ids, positions, mask, cache, read.flatten())
        return Forward(hidden.flatten(0, 1)[read], cache)

    # ------------------------------------------------------------------------------------------------- shared parts

    def kv_cache(self, prefix: list[KeysValues], rows: int, own: list[KeysValues] | None = None) -> DynamicCache:
        """A KV cache that begins with the prefix's keys and values, expanded over the rows; a long prefix, which would
        be copied for each row in every layer, is kept beside it. own: the rows' own keys and values, per layer."""
        length, own = prefix[0][0].shape[2] if prefix else 0, own or []
        width = length + (own[0][0].shape[2] if own else 0)
        cache = masks.KVCache(torch.arange(width, device=self.device).expand(rows, width))
        separate = self.min_separate_prefix and length >= self.min_separate_prefix and not torch.is_grad_enabled()
        for i in range(max(len(prefix), len(own))):
            layer = attention.PrefixLayer(*prefix[i]) if separate else DynamicLayer()
            parts = [[x.expand(rows, -1, -1, -1) for x in prefix[i]]] if prefix and not separate else []
            parts += own[i : i + 1]
            if parts:
                layer.lazy_initialization(*parts[0])
                layer.keys, layer.values = (torch.cat(x, dim=2) if own else x[0] for x in zip(*parts))
            cache.layers.append(layer)
        return cache

    def run_packed(self, ids: list[int], positions: list[int], layers: list, read=None) -> torch.Tensor:
        """A packed sequence's ids and positions, and its cache's layers -> states (tokens, hidden)."""
        self.tokens_computed += len(ids)
        cache = DynamicCache()
        cache.layers = layers
        mask = torch.ones(1, 1, 1, dtype=torch.bool)  # not read
        return self.run_blocks(torch.tensor([ids]), torch.tensor([positions]), mask, cache, read)[0]

    def run_blocks(self, ids, positions, mask, cache: DynamicCache, read: torch.Tensor | None = None) -> torch.Tensor:
        """ids, positions (rows, tokens) and mask (rows, tokens, all tokens so far) -> states (rows, tokens, hidden).

        read: (n,) the tokens whose states are wanted, counted through the rows; None: all of them.
        """
        with contextlib.ExitStack() as stack:
            read = None if read is None else self.to_device(read)
            stack.enter_context(feedforward.only(self.last_feedforward, read))
            longest = int(positions.max()) + 1  # before they are on a card, which would be waited for
            positions, mask = self.to_device(positions), self.to_device(mask)
            # 1. The attention for the kind of cache; None: the model's own.
            kind = type(cache.layers[0]) if cache.layers else None
            packed = flex.packed_flex if self.flex else attention.packed
            functions = {attention.PackedLayer: packed, attention.PrefixLayer: attention.shared_prefix}
            function = functions.get(kind, attention.masked if self.alibi else None)
            if function:
                stack.enter_context(attention.in_use(self.causal_lm, function))
            # 2. The mask that it takes.
            if kind is attention.PackedLayer:
                mask = self._packed_mask(cache.layers[0]) if self.flex else mask[:, None]
            elif kind is attention.PrefixLayer:
                mask = masks.additive(mask[:, :, cache.layers[0].prefix[0].shape[2] :])[:, None]
            else:
                if self.window is not None:
                    cache.positions = torch.cat([cache.positions, positions], dim=1)
                mask = masks.for_model(self.causal_lm, mask, self.window, positions, cache)
            if self.alibi:
                mask = stack.enter_context(self.alibi.at(positions, mask, longest))
            return self.backbone(
                self.to_device(ids),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state

    def _packed_mask(self, layer: attention.PackedLayer):
        """The mask of a packed sequence for flex_attention, or one for each kind of layer."""
        prefix, past = (0 if pair is None else pair[0].shape[2] for pair in (layer.prefix, layer.past))
        numbers = flex.numbered(layer.packing, prefix, past)
        numbers = flex.Numbers(self.to_device(numbers.keys), self.to_device(numbers.queries))
        return masks.by_layer(self.causal_lm, lambda window: flex.mask(numbers, window), self.window)


class Forward:
    """The result of a padded or plain forward: `states` (rows, nodes, hidden)."""

    def __init__(self, states: torch.Tensor, cache: DynamicCache | None):
        self.states, self._cache = states, cache

    def cache(self) -> DynamicCache | None:
        """The rows' KV cache, to go on with; None after a plain forward."""
        return self._cache


class PackedForward:
    """The result of a packed forward: `states` (rows, nodes, hidden)."""

    def __init__(self, network: Network, prompts, states, hidden, layers, spans: list[tuple[int, int]]):
        """hidden: states (tokens, hidden) of all tokens; layers: their cache; spans: each row's first token, and the
        one after its last."""
        self.states = states
        self._network, self._prompts, self._hidden, self._layers, self._spans = network, prompts, hidden, layers, spans

    def _prefix(self) -> list[KeysValues]:
        return [shared for layer in self._layers if (shared := layer.shared()) is not None]

    def cache(self) -> DynamicCache:
        """A padded KV cache, to go on with. Trees must have one node."""
        width = max(stop - start for start, stop in self._spans)
        places = torch.tensor([[min(start + i, stop - 1) for i in range(width)] for start, stop in self._spans])
        places = self._network.to_device(places)
        own = [layer.padded(places) for layer in self._layers]
        return self._network.kv_cache(self._prefix(), len(self._spans), own)

    def grow(self, trees: list[Tree]) -> list[torch.Tensor]:
        """The states (nodes, hidden) of trees that had one node and have grown: only new nodes are computed."""
        roots = [self._hidden[stop - 1 : stop] for _, stop in self._spans]
        ids = [token for tree in trees for token in tree.tokens[1:]]
        if not ids:
            return roots
        positions = [len(p) + depth - 1 for p, tree in zip(self._prompts, trees) for depth in tree.depths[1:]]
        sizes = [len(tree) - 1 for tree in trees]
        ends = list(itertools.accumulate(sizes))
        rows = [_row(end - size, end, tree) for end, size, tree in zip(ends, sizes, trees) if size]
        packing = attention.Packing(rows, before=[span for size, span in zip(sizes, self._spans) if size])
        layers = [attention.PackedLayer(packing, layer.shared(), past=layer) for layer in self._layers]
        states = self._network.run_packed(ids, positions, layers)
        return [torch.cat(pair) for pair in zip(roots, states.split(sizes))]


def padded(items: list[int], size: int, filler: int = 0) -> list[int]:
    """The items, and fillers up to this size."""
    return items + [filler] * (size - len(items))


def _row(start: int, stop: int, tree: Tree) -> attention.Row:
    """A packed row whose last tokens are the tree's."""
    branched = any(parent != node - 1 for node, parent in enumerate(tree.parents))
    return attention.Row(start, stop, tuple(tree.parents) if branched else None)
