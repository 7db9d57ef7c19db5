"""The one hot path: states, log-probabilities and answers of a causal language model, for all four scripts.

An episode here is a prompt and a *tree* of answer tokens (trees.py). Node 0 is the state after the prompt; every other
node is the state after one more token. All samples of one prompt (or all spellings of a task's labels) are paths in the
same tree, so the prompt is pushed through the network once, however many answers are looked at. All savings are exact:

1. The tokens with which all prompts begin (instruction, demonstrations) go through the network once per call, not once
   per row; in training their keys and values are leaves that collect the micro-batches' gradients, which go back
   through the prefix once. On a CPU they are not even copied for every row (attention.py).
2. Rows are sorted by length and cut into micro-batches by a budget of tokens, not by a count. On a CPU the rows of a
   micro-batch lie behind one another, without padding.
3. The vocabulary projection, and the last block's feed-forward layer (feedforward.py), see only the states where an
   answer token is chosen.
4. Tokens that end an answer, or that the label set forces, are never pushed through the network.
5. Rows that are one micro-batch take the prefix along in front of them, and a rollout of such rows keeps its graph: the
   first update on it has no forward of its own.

`check()` compares all this with the plain forward once; a model it does not fit falls back to the plain forward.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from engine import attention, feedforward, lora
from engine.batches import common_prefix, grouped, micro_batches
from engine.decoding import Sampling
from engine.trees import Answer, Tree, draw, random_stream
from machine import memory, processes, sharding
from machine.errors import ModelError

TOKENS_PER_MICRO_BATCH = 1024
Result = TypeVar("Result")


class Engine:
    """States and answers of `model` (a causal language model, with or without a LoRA adapter)."""

    def __init__(self, model: nn.Module, tokenizer, tokens_per_micro_batch: int = TOKENS_PER_MICRO_BATCH):
        self.model = model
        memory.keep_freed()
        lora.fuse(model)
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.backbone = causal_lm.base_model
        self.causal_lm = causal_lm
        self.head = causal_lm.get_output_embeddings()
        self.tokenizer = tokenizer
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.lockstep = sharding.active()  # all processes must run the same number of blocks
        # Cut up weights are brought together by the calls of their modules, so every process must make all of them.
        layers = causal_lm.config.get_text_config().num_hidden_layers
        self.last_feedforward = None if self.lockstep else feedforward.last(self.backbone, layers)
        self.packed = attention.fits(causal_lm)
        self.min_separate_prefix = attention.SHORTEST if self.packed else None  # tokens of a prefix
        self.plain = False  # set by check() for a model that the shared prefix does not fit
        self.tokens_computed = 0
        self.frozen = False  # nobody changes the weights as long as this engine lives
        self.shared_length: int | None = None  # tokens that all prompts there will be begin with, where that is known
        self._lasting_prefix: tuple[tuple[int, ...], list] = (), []  # of the frozen or the reference model
        self._columns: dict[tuple[int, ...], torch.Tensor] = {}  # vocabularies, where the output layer is

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    # ------------------------------------------------------------------------------------------------- states

    def logits(self, states: torch.Tensor, vocabulary: list[int] | None = None) -> torch.Tensor:
        """(..., hidden) states -> (..., tokens) float32 logits, of `vocabulary`'s columns only if given."""
        if vocabulary is None:
            return self.head(states).float()
        # In bfloat16 the product would round labels to steps of an eighth, and make close ones equal.
        if tuple(vocabulary) not in self._columns:
            self._columns[tuple(vocabulary)] = torch.tensor(vocabulary, device=self.device)
        columns = self._columns[tuple(vocabulary)]
        bias = None if self.head.bias is None else self.head.bias[columns].float()
        return nn.functional.linear(states.float(), self.head.weight[columns].float(), bias)

    def retry_with_smaller_batches(self, work: Callable[[], Result]) -> Result:
        """`work()`; whenever memory runs out in it, the token budget is halved and it is begun again.

        Raises MemoryError if one row at a time is still too much.
        """
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not memory.ran_out(error):
                    raise
                message = str(error).splitlines()[0][:100]
            # Only here is the traceback gone, and with it the tensors that its frames hold.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.lockstep:
                raise MemoryError(f"out of memory ({message}), and with weights cut up none can begin again alone")
            if self.tokens_per_micro_batch <= memory.SMALLEST_BUDGET:
                raise MemoryError(f"out of memory with one row at a time ({message})")
            self.tokens_per_micro_batch //= 2
            print(f"Out of memory: going on with micro-batches of {self.tokens_per_micro_batch} tokens.", flush=True)

    def states(
        self, prompts: list[list[int]], trees: list[Tree], reference: bool = False, keep: bool = False
    ) -> list[torch.Tensor]:
        """The hidden state of every node, per prompt (nodes, hidden). `reference`: with the adapter switched off.

        keep: with gradient if all rows are one micro-batch, so that training on them needs no second forward.
        """
        return self.retry_with_smaller_batches(lambda: self._states(prompts, trees, reference, keep))

    def _states(self, prompts, trees, reference: bool, keep: bool) -> list[torch.Tensor]:
        result: list = [None] * len(prompts)
        length = self._prefix_length(prompts, reference)
        batches = self._batches(prompts, trees, length)
        whole = self._whole(batches)
        with (
            self._reference_model() if reference else contextlib.nullcontext(),
            torch.set_grad_enabled(keep and whole),
        ):
            prefix = self._prefix(prompts, reference, whole)
            for rows in self.lockstep_batches(batches):
                if rows is None:
                    self.dummy_forward()
                    continue
                states = self._forward([prompts[i] for i in rows], [trees[i] for i in rows], prefix)
                for i, state in zip(rows, states):
                    result[i] = state[: len(trees[i])]
        return result

    def training_batches(self, prompts: list[list[int]], trees: list[Tree]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield (row numbers, states (rows, nodes, hidden)) with gradient, one micro-batch at a time.

        The caller runs backward on each before asking for the next; after the last one the gradients that collected in
        the shared prefix's keys and values are sent through it. Memory holds one micro-batch and the prefix.
        """
        length = self._prefix_length(prompts)
        batches = self._batches(prompts, trees, length)
        if self._whole(batches):
            (rows,) = batches
            prefix = self._prefix(prompts, whole=True)
            yield rows, self._forward([prompts[i] for i in rows], [trees[i] for i in rows], prefix)
            return
        pairs, leaves, last = [], [], None
        someone = self._anyone(length > 0)
        if length:
            pairs, last = self._run_prefix(prompts[0][:length])
            leaves = [tuple(x.detach().requires_grad_() for x in pair) for pair in pairs]
        elif someone:
            last = self.dummy_forward()
        for rows in self.lockstep_batches(batches):
            if rows is None:
                self.dummy_forward().mean().mul(0).backward()
                continue
            yield rows, self._forward([prompts[i] for i in rows], [trees[i] for i in rows], (length, leaves))
        # Without an adapter in front of it (keys of the first layer, say) a tensor carries no gradient.
        sent = [
            (x, leaf.grad)
            for pair, leaf_pair in zip(pairs, leaves)
            for x, leaf in zip(pair, leaf_pair)
            if x.requires_grad and leaf.grad is not None
        ]
        if self.lockstep and last is not None:
            # Cut up weights are brought together when a block's output has a gradient, be it zero as the last one's.
            sent.append((last, torch.zeros_like(last)))
        if sent:
            torch.autograd.backward([x for x, _ in sent], [grad for _, grad in sent])

    def _batches(self, prompts, trees, prefix_length: int) -> list[list[int]]:
        lengths = [len(p) - prefix_length + len(t) for p, t in zip(prompts, trees)]
        if self.plain:  # every path is a sequence of its own
            lengths = [(len(t) - len({*t.parents[1:]})) * (len(p) + max(t.depths)) for p, t in zip(prompts, trees)]
        return micro_batches(lengths, self.tokens_per_micro_batch, self.packed and not self.plain)

    def _prefix_length(self, prompts: list[list[int]], reference: bool = False) -> int:
        """How many tokens of these prompts go through the network apart. Where that lasts for the whole run it is what
        all prompts share, not what a few have in common by chance."""
        length = 0 if self.plain else common_prefix(prompts)
        lasts = (reference or self.frozen) and self.shared_length is not None
        return min(length, self.shared_length) if lasts else length

    def _whole(self, batches: list[list[int]]) -> bool:
        """Whether one pass through the network is enough for all rows."""
        return len(batches) == 1 and not self.lockstep

    def _prefix(self, prompts: list[list[int]], reference: bool = False, whole: bool = False) -> tuple[int, list]:
        """(length, keys and values per layer (1, heads, length, size)) of the tokens that all prompts begin with.

        The list is empty if these tokens had better go through the network in front of the rows: where the rows need
        only one pass (`whole`) and can lie behind one another, so few tokens are not worth a pass of their own.
        """
        length, lasts = self._prefix_length(prompts, reference), reference or self.frozen
        if whole and self.packed and not lasts:
            return length, []
        ids = tuple(prompts[0][:length]) if length else ()
        known, pairs = self._lasting_prefix if lasts else ((), [])
        # Any longer prefix that was computed before begins with this one.
        missing = known[:length] != ids
        if self._anyone(missing) and not missing:
            self.dummy_forward()
        if not missing:
            return length, [(k[:, :, :length], v[:, :, :length]) for k, v in pairs] if length else []
        pairs, _ = self._run_prefix(list(ids))
        if lasts:
            self._lasting_prefix = (ids, pairs)
        return length, pairs

    def _run_prefix(self, ids: list[int]) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """Keys and values per layer, and what the network returns (1, tokens, hidden), which is of no use but with cut
        up weights."""
        self.tokens_computed += len(ids)
        cache = DynamicCache()
        ids = self.to_device(torch.tensor([ids]))
        nowhere = torch.zeros(0, dtype=torch.long, device=self.device)
        with feedforward.only(self.last_feedforward, nowhere):
            states = self.backbone(ids, past_key_values=cache, use_cache=True).last_hidden_state
        return [(layer.keys, layer.values) for layer in cache.layers], states

    def lockstep_batches(self, batches: list) -> Iterator:
        """The batches; where weights are cut up, then None for as long as another process has a batch left."""
        most = max(processes.all_gather([len(batches)])) if self.lockstep else len(batches)
        yield from batches
        yield from [None] * (most - len(batches))

    def _anyone(self, flag: bool) -> bool:
        """Whether the flag is set here or, where weights are cut up, in any process."""
        return any(processes.all_gather([flag])) if self.lockstep else flag

    def dummy_forward(self) -> torch.Tensor:
        """Run every block once for the other processes' sake. Returns states that nobody needs."""
        return self.backbone(torch.tensor([[0]], device=self.device), use_cache=False).last_hidden_state

    def _cache(self, pairs: list, rows: int, own: list = ()) -> DynamicCache:
        """A cache that begins with the prefix's keys and values, expanded over the rows; of a long prefix, which would
        be copied for each row in every layer, it has them apart. own: the rows' own keys and values, per layer."""
        cache = DynamicCache()
        cache.layers = []
        length = pairs[0][0].shape[2] if pairs else 0
        apart = self.min_separate_prefix and length >= self.min_separate_prefix and not torch.is_grad_enabled()
        for i in range(max(len(pairs), len(own))):
            layer = attention.PrefixLayer(*pairs[i]) if apart else DynamicLayer()
            parts = [[x.expand(rows, -1, -1, -1) for x in pairs[i]]] if pairs and not apart else []
            parts += own[i : i + 1]
            if parts:
                layer.lazy_initialization(*parts[0])
                layer.keys, layer.values = (torch.cat(x, dim=2) if own else x[0] for x in zip(*parts))
            cache.layers.append(layer)
        return cache

    def _forward(self, prompts, trees, prefix: tuple[int, list]) -> torch.Tensor:
        """States (rows, nodes, hidden) of the trees' nodes; rows are padded to the largest tree."""
        if self.plain:
            return self._plain_forward(prompts, trees)
        return self._forward_to_go_on(prompts, trees, prefix)[0]

    def _forward_to_go_on(self, prompts, trees, prefix: tuple[int, list]) -> tuple[torch.Tensor, Callable, Callable]:
        """The states, and for trees of one node what returns a cache with which the rows can go on, and what returns
        the states (nodes, hidden) of each tree after it has grown (packed rows only)."""
        return (self._packed_forward if self.packed else self._padded_forward)(prompts, trees, prefix)

    def _packed_forward(self, prompts, trees, prefix: tuple[int, list]) -> tuple[torch.Tensor, Callable, Callable]:
        """All rows lie behind one another in one: a prompt after the prefix, its tree's tokens, the next prompt.

        A prefix whose keys and values are not known goes in front of them.
        """
        length, pairs = prefix
        inside = 0 if pairs else length
        ids = prompts[0][:inside]
        positions = list(range(inside))
        rows: list[attention.Row] = [(0, inside, None)] if inside else []
        nodes: list[list[int]] = []
        for prompt, tree in zip(prompts, trees):
            start, rest = len(ids), len(prompt) - length
            ids += prompt[length:] + tree.tokens[1:]
            positions += [*range(length, len(prompt)), *(len(prompt) + depth - 1 for depth in tree.depths[1:])]
            rows.append((start, len(ids), _branches(tree, rest)))
            nodes.append(list(range(start + rest - 1, len(ids))))
        layers = self.causal_lm.config.get_text_config().num_hidden_layers
        cache = [attention.PackedLayer(pair, rows, inside) for pair in pairs or [None] * layers]
        read = torch.tensor([place for places in nodes for place in places])
        hidden = self._run_packed(ids, positions, cache, read)
        most = max(map(len, nodes))
        where = torch.tensor([_padded_list(places, most) for places in nodes])
        own = [(start, stop) for start, stop, _ in rows[-len(prompts) :]]

        def goes_on() -> DynamicCache:
            width = max(stop - start for start, stop in own)
            places = torch.tensor([[min(start + i, stop - 1) for i in range(width)] for start, stop in own])
            shared = [layer.shared() for layer in cache] if length else []
            return self._cache(shared, len(own), [layer.padded(places) for layer in cache])

        def grown(trees: list[Tree]) -> list[torch.Tensor]:
            roots = [hidden[stop - 1 : stop] for _, stop in own]
            return self._packed_trees(prompts, trees, roots, cache, own)

        return hidden[where], goes_on, grown

    def _packed_trees(self, prompts, trees, roots: list[torch.Tensor], cache: list, own: list) -> list[torch.Tensor]:
        """The states (nodes, hidden) of trees whose prompts have been computed: only the other nodes go through the
        network. roots: the states (1, hidden) after the prompts; cache: their layers; own: each prompt's place there.
        """
        ids = [token for tree in trees for token in tree.tokens[1:]]
        if not ids:
            return roots
        positions = [len(p) + depth - 1 for p, tree in zip(prompts, trees) for depth in tree.depths[1:]]
        sizes = [len(tree) - 1 for tree in trees]
        ends = list(itertools.accumulate(sizes))
        rows = [(end - size, end, _branches(tree, 0)) for end, size, tree in zip(ends, sizes, trees) if size]
        before = [place for size, place in zip(sizes, own) if size]
        layers = [attention.PackedLayer(layer.shared(), rows, past=layer, before=before) for layer in cache]
        states = self._run_packed(ids, positions, layers)
        return [torch.cat(pair) for pair in zip(roots, states.split(sizes))]

    def _run_packed(self, ids: list[int], positions: list[int], layers: list, read=None) -> torch.Tensor:
        """ids and positions of tokens behind one another, and their cache's layers -> states (tokens, hidden)."""
        self.tokens_computed += len(ids)
        cache = DynamicCache()
        cache.layers = layers
        mask = torch.ones(1, 1, 1, dtype=torch.bool)  # nobody looks at it
        return self._run_blocks(torch.tensor([ids]), mask, torch.tensor([positions]), cache, read)[0]

    def _padded_forward(self, prompts, trees, prefix: tuple[int, list]) -> tuple[torch.Tensor, Callable, None]:
        """Columns: the prompts after the prefix, padded on the right to the longest, then the trees' tokens.

        A tree token sees its own prompt and its ancestors, and stands where it would in a plain sequence.
        """
        length, pairs = prefix
        rests = [p[length:] for p in prompts]
        width, nodes = max(map(len, rests)), max(map(len, trees)) - 1
        rows, pad = len(rests), self.tokenizer.pad_token_id
        self.tokens_computed += rows * (width + nodes)
        ids = torch.tensor(
            [r + [pad] * (width - len(r)) + t.tokens[1:] + [pad] * (nodes + 1 - len(t)) for r, t in zip(rests, trees)]
        )
        sizes = torch.tensor([len(r) for r in rests])
        positions = length + torch.cat(
            [
                torch.arange(width).expand(rows, width),
                torch.tensor(
                    [[len(r) + d - 1 for d in _padded(t.depths, nodes)] for r, t in zip(rests, trees)],
                    dtype=torch.long,  # without a node the list is empty, and its type would be float
                ).view(rows, nodes),
            ],
            dim=1,
        )
        mask = torch.ones(rows, width + nodes, length + width + nodes, dtype=torch.bool)
        mask[:, :width, length:] = torch.ones(width, width + nodes, dtype=torch.bool).tril()
        if nodes:
            mask[:, width:, length : length + width] = (torch.arange(width) < sizes[:, None])[:, None]
            mask[:, width:, length + width :] = torch.stack([_ancestors(t.parents, nodes) for t in trees])
        cache = self._cache(pairs, rows)
        nodes_of = torch.arange(width, width + nodes).expand(rows, nodes)
        read = torch.arange(rows)[:, None] * (width + nodes) + torch.cat([sizes[:, None] - 1, nodes_of], dim=1)
        read = self.to_device(read)  # (rows, nodes)
        hidden = self._run_blocks(ids, mask, positions, cache, read.flatten())
        return hidden.flatten(0, 1)[read], lambda: cache, None

    def _run_blocks(self, ids, mask, positions, cache: DynamicCache, read: torch.Tensor | None = None) -> torch.Tensor:
        """ids, positions (rows, tokens) and mask (rows, tokens, all tokens so far) -> states (rows, tokens, hidden).

        read: (n,) the tokens whose states are wanted, counted through the rows; None: all of them.
        """
        with contextlib.ExitStack() as stack:
            read = None if read is None else self.to_device(read)
            stack.enter_context(feedforward.only(self.last_feedforward, read))
            kind = type(cache.layers[0]) if cache.layers else None
            if kind is attention.PackedLayer:
                stack.enter_context(attention.in_use(self.causal_lm, attention.packed))
            if kind is attention.PrefixLayer:
                stack.enter_context(attention.in_use(self.causal_lm, attention.shared_prefix))
                own = mask[:, :, cache.layers[0].prefix[0].shape[2] :]
                mask = torch.zeros(own.shape).masked_fill(~own, -torch.inf)
            return self.backbone(
                self.to_device(ids),
                attention_mask=self.to_device(mask[:, None]),
                position_ids=self.to_device(positions),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where the model is; a card takes it from pinned memory when it gets there, and nobody waits for that (`to`
        alone would wait for all that the card has still to do)."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _plain_forward(self, prompts: list[list[int]], trees: list[Tree]) -> torch.Tensor:
        """The same states by the plain way: every path through a tree is a padded sequence of its own."""
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
        where: list[list] = [[(0, 0)] * max(map(len, trees)) for _ in prompts]
        for sequence, (row, node) in enumerate(owners):
            while node >= 0:
                where[row][node] = (sequence, len(prompts[row]) - 1 + trees[row].depths[node])
                node = trees[row].parents[node]
        index = self.to_device(torch.tensor(where))
        return hidden[index[..., 0], index[..., 1]]

    # --------------------------------------------------------------------------------------------- generation

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        keep: bool = False,
        extend: Callable[[list[Tree], list[list[Answer]]], None] | None = None,
    ) -> tuple[list[Tree], list[list[Answer]], list[torch.Tensor]]:
        """Answer every prompt `sampling.samples` times.

        An answer ends at the end-of-sequence token, by the stop rule, or after `max_new_tokens`. Samples of a prompt
        that agree so far share their forward; a row whose answers have all ended leaves the batch.
        Returns, per prompt: the tree of all tokens that had to be pushed through the network, the answers, and the
        states (nodes, hidden) at which their tokens were chosen. Sampling draws on the CPU. keep: see `states`. extend:
        called with trees and answers when all have ended, it lets the trees grow once more before their states are
        returned.
        """
        seeds = sampling.seeds(len(prompts))
        return self.retry_with_smaller_batches(lambda: self._generate(prompts, sampling, seeds, keep, extend))

    @torch.no_grad()
    def _generate(self, prompts, sampling: Sampling, seeds: list[int | None], keep: bool, extend):
        trees = [Tree() for _ in prompts]
        answers = [[Answer([], [], False, "") for _ in range(sampling.samples)] for _ in prompts]
        states: list = [None] * len(prompts)
        length = self._prefix_length(prompts)
        # Room for the answers: a decoding row holds its prompt and about as many nodes as tokens are generated.
        room = min(sampling.samples * sampling.max_new_tokens, 64)
        batches = micro_batches([len(p) - length + room for p in prompts], 4 * self.tokens_per_micro_batch)
        whole = self._whole(batches)
        # The prompts' keys and values can be kept for a graph only as packed rows.
        keeps = keep and whole and self.packed and not self.plain and self._whole(self._batches(prompts, trees, length))
        grown = None
        prefix = self._prefix(prompts, whole=whole)
        for rows in self.lockstep_batches(batches):
            if rows is None:
                self.dummy_forward()
                for _ in range(sampling.max_new_tokens):
                    if not self._anyone(False):
                        break
                    self.dummy_forward()
                continue
            streams = [random_stream(seeds[i]) for i in rows]
            batch_states, grown = self._decode(
                [prompts[i] for i in rows],
                [trees[i] for i in rows],
                [answers[i] for i in rows],
                prefix,
                sampling,
                streams,
                keeps,
            )
            for i, state in zip(rows, batch_states):
                states[i] = state
        if extend is not None:
            extend(trees, answers)
        if grown is not None and self._whole(self._batches(prompts, trees, length)):
            (rows,) = batches
            with torch.enable_grad():
                for i, state in zip(rows, grown([trees[i] for i in rows])):
                    states[i] = state
        elif extend is not None:
            grown = None  # it holds the prompts' graph
            states = self._states(prompts, trees, False, keep)
        return trees, answers, states

    def _decode(self, prompts, trees, answers, prefix, sampling: Sampling, streams, keep):
        """Grow the trees level by level; all arguments are the rows of one micro-batch. Returns states per row.

        keep: and what gives them with gradient, of trees that may have grown since. Steps that grow the trees leave
        none: each of them would hold the keys and values of all tokens anew. The trees go through the network again.
        """
        cache = grown = None
        if self.plain:
            root = self._plain_forward(prompts, trees)
        else:
            with torch.set_grad_enabled(keep):
                root, goes_on, grown = self._forward_to_go_on(prompts, trees, prefix)
            cache, goes_on = goes_on(), None  # it holds the prompts' keys and values too
            grown = grown if keep else None
        root = root[:, 0].detach()  # (rows, hidden)
        states = [[state] for state in root]
        rows = list(range(len(prompts)))  # rows still in the batch, in the cache's order
        width = max(map(len, prompts)) - prefix[0]
        visible = torch.ones(len(prompts), prefix[0] + width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            visible[row, len(prompt) :] = False
        columns: list[dict[int, int]] = [{} for _ in prompts]  # node -> its column in the cache
        fresh: list[list[int]] = [[0] for _ in prompts]  # nodes whose state is known and whose next token is not chosen
        latest = root[:, None]
        for step in range(sampling.max_new_tokens):
            choices = self._choices(
                [latest[place, : len(fresh[row])] for place, row in enumerate(rows)], sampling.temperature
            )
            new_nodes: list[list[int]] = []
            for choice, row in zip(choices, rows):  # in this order `choices` comes to its end, and frees what it holds
                where = dict(zip(fresh[row], choice))
                last = step + 1 == sampling.max_new_tokens
                new_nodes.append(self._choose(trees[row], answers[row], where, streams[row], sampling.stop, step, last))
            going = [place for place, new in enumerate(new_nodes) if new]
            if not self._anyone(bool(going)):
                break
            if not going:
                self.dummy_forward()
                continue
            if len(going) < len(rows):
                rows, new_nodes = [rows[p] for p in going], [new_nodes[p] for p in going]
                if cache is not None:
                    cache.batch_select_indices(torch.tensor(going, device=self.device))
                visible = visible[going]
            for row, new in zip(rows, new_nodes):
                fresh[row] = new
            if self.plain:
                full = self._plain_forward([prompts[r] for r in rows], [trees[r] for r in rows])
                latest = torch.stack(
                    [full[p][_padded_list(fresh[r], max(map(len, new_nodes)))] for p, r in enumerate(rows)]
                )
            else:
                latest, visible = self._extend(prompts, trees, rows, new_nodes, columns, visible, cache)
            for place, row in enumerate(rows):
                states[row].extend(latest[place, : len(fresh[row])])
        return [torch.stack(s) for s in states], grown

    def _extend(self, prompts, trees, rows, grown, columns, visible, cache):
        """Push the grown nodes (one level of every tree) through the network. Returns their states and the new mask."""
        seen, width = visible.shape[1], max(map(len, grown))
        pad = self.tokenizer.pad_token_id
        self.tokens_computed += len(rows) * width
        ids = torch.full((len(rows), width), pad)
        positions = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, seen + width, dtype=torch.bool)
        mask[:, :, :seen] = visible[:, None]
        for place, (row, new) in enumerate(zip(rows, grown)):
            tree = trees[row]
            for i, node in enumerate(new):
                columns[row][node] = seen + i
                ids[place, i] = tree.tokens[node]
                positions[place, i] = len(prompts[row]) + tree.depths[node] - 1
                while node > 0:
                    mask[place, i, columns[row][node]] = True
                    node = tree.parents[node]
            for i in range(len(new), width):
                mask[place, i, seen + i] = True  # padding sees itself: a row without any key would be NaN
        latest = self._run_blocks(ids, mask, positions, cache)
        hidden = torch.zeros(len(rows), width, dtype=torch.bool)
        return latest, torch.cat([visible, hidden], dim=1)

    def _choices(self, states: list[torch.Tensor], temperature: float) -> Iterator[torch.Tensor]:
        """Per row its states (nodes, hidden) -> on the CPU (nodes, vocabulary) the probabilities to draw from, or with
        temperature 0 (nodes,) the most probable token. A card is waited for once per group of rows, not per row."""
        for group in grouped(states):
            logits = self.logits(torch.cat([states[i] for i in group]))
            best = torch.softmax(logits / temperature, -1) if temperature > 0 else logits.argmax(-1)
            yield from best.cpu().split([len(states[i]) for i in group])

    def _choose(self, tree, answers, where: dict[int, torch.Tensor], stream, stop, step, last) -> list[int]:
        """Choose the next token of every unfinished answer of one row; returns the nodes that must be computed next.

        where: the row's fresh nodes and what `_choices` says of each.
        """
        groups: dict[int, list[Answer]] = {}
        for answer in answers:
            if not answer.ended and len(answer.tokens) == step:
                node = tree.child(answer.nodes[-1], answer.tokens[-1]) if step else 0
                groups.setdefault(node, []).append(answer)
        new: list[int] = []
        texts: dict[tuple[int, int], tuple[str, bool]] = {}
        for node, group in groups.items():
            choice = where[node]
            drawn = [int(choice)] * len(group) if stream is None else draw(choice, len(group), stream)
            for answer, token in zip(group, drawn):
                answer.nodes.append(node)
                answer.tokens.append(token)
                if (node, token) not in texts:
                    texts[node, token] = self._text_after(answer, stop)
                answer.text, answer.ended = texts[node, token]
                if not answer.ended and not last:
                    child = tree.child(node, token)
                    if child not in new:
                        new.append(child)
        return new

    def _text_after(self, answer: Answer, stop) -> tuple[str, bool]:
        if answer.tokens[-1] == self.tokenizer.eos_token_id:
            return self.tokenizer.decode(answer.tokens[:-1], clean_up_tokenization_spaces=False), True
        text = self.tokenizer.decode(answer.tokens, clean_up_tokenization_spaces=False)
        return text, stop(text)

    # ------------------------------------------------------------------------------------------------- safety

    @contextlib.contextmanager
    def _reference_model(self):
        if hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                yield
        else:
            yield

    @torch.no_grad()
    def check(self, longest: int = 0, tolerance: float = 1e-3) -> str | None:
        """Compare with the plain forward on a small example; on a mismatch fall back to it and return why.

        longest: tokens of a prompt and its answer at most. An example is too short to show what a window leaves out.
        Raises ModelError for a model whose logits are not its output layer applied to its last hidden state.
        """
        n = min(self.head.weight.shape[0], 1000)
        prompts = [[(7 * i + 3) % n for i in range(12)], [(7 * i + 3) % n for i in range(5)] + [11, 12]]
        tree = Tree([-1, 5 % n, 6 % n, 7 % n], [-1, 0, 0, 1], [0, 1, 1, 2])
        plain = self._plain_forward(prompts, [tree, tree]).float()
        logits = self.causal_lm(torch.tensor([prompts[0]], device=self.device)).logits[0, -1].float()
        loose = tolerance if plain.dtype == self.head.weight.dtype else 5e-2
        if not torch.allclose(self.logits(plain[0, 0].to(self.head.weight.dtype)), logits, rtol=loose, atol=10 * loose):
            raise ModelError(
                "this model changes its logits after the output layer, which is not supported; "
                "choose another --train_model_name"
            )
        usual, reason = (self.packed, self.min_separate_prefix), None
        window = attention.window(self.causal_lm.config.get_text_config())
        if window and longest > window:
            reason = f"it attends to the last {window} tokens, and there may be {longest}"
        for self.packed, self.min_separate_prefix in (
            ((False, None), (False, 1), (True, 1)) if usual[0] else ((False, None),)
        ):
            try:
                shared = torch.stack(self.states(prompts, [tree, tree])).float()
                error = float((shared - plain).norm() / plain.norm())
                reason = reason or (f"relative error {error:.1e}" if not error < loose else None)
            except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError) as problem:
                reason = reason or f"{type(problem).__name__}: {problem}".splitlines()[0]
        self.packed, self.min_separate_prefix = usual
        self.plain = reason is not None
        return reason


def _branches(tree: Tree, prompt: int) -> torch.Tensor | None:
    """(tokens, tokens) 0 where one of a prompt's and its tree's tokens sees another, else -inf; None if all see all
    before them."""
    if all(parent == node - 1 for node, parent in enumerate(tree.parents)):
        return None
    size = prompt + len(tree) - 1
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    seen[prompt:, prompt:] = _ancestors(tree.parents, len(tree) - 1)
    return torch.zeros(size, size).masked_fill(~seen, -torch.inf)


def _padded(depths: list[int], nodes: int) -> list[int]:
    return depths[1:] + [1] * (nodes + 1 - len(depths))


def _padded_list(items: list[int], size: int) -> list[int]:
    return items + [0] * (size - len(items))


def _ancestors(parents: list[int], nodes: int) -> torch.Tensor:
    """(nodes, nodes): which tree tokens (root not counted) a tree token sees; padding sees itself."""
    seen = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, len(parents)):
        if parents[node] > 0:
            seen[node - 1] |= seen[parents[node] - 1]
    return seen
