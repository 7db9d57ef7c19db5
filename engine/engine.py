"""The one hot path: states, gradients and answers of a causal language model, for all four scripts.

An episode is a prompt and a *tree* of answer tokens (trees.py). Node 0 is the state after the prompt; every other node
is the state after one more token. All samples of one prompt (or all spellings of a task's labels) are paths in the same
tree, so the prompt is pushed through the network once, however many answers are looked at. All savings are exact:

1. The tokens with which all prompts begin (instruction, demonstrations) go through the network once per call, not once
   per row; in training their keys and values are leaves that collect the micro-batches' gradients, which go back
   through the prefix once. They are not even copied for every row (attention.py).
2. Rows are sorted by length and divided into micro-batches by a budget of tokens, not by a count. The rows of a
   micro-batch are a packed sequence, without padding (attention.py; on a card flex.py).
3. The vocabulary projection, and the last block's feed-forward layer (feedforward.py), see only the states where an
   answer token is chosen.
4. Tokens that end an answer, or that the label set forces, are never pushed through the network.
5. Rows that are one micro-batch take the prefix along in front of them, and a rollout of such rows keeps its graph: the
   first update on it has no forward of its own.

loading.check compares all this with the plain forward once; a model that it does not fit falls back to that.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from engine.batches import common_prefix, micro_batches
from engine.checkpointing import enable as enable_checkpointing
from engine.decoding import DecodingRow, Sampling, decode
from engine.network import KeysValues, Network, Prefix
from engine.trees import Answer, Tree, random_stream
from machine import memory
from machine.errors import ModelError

TOKENS_PER_MICRO_BATCH = 1024
DECODING_BUDGET = 4  # micro-batches' tokens that are decoded at once: without gradients a token takes less memory
DECODING_ROOM = 64  # nodes at most that are set aside for a row's answers
Result = TypeVar("Result")


@dataclass
class LastingPrefix:
    """What all prompts of a task begin with, and its keys and values, which last as long as the weights do not change:
    the reference's for a whole run."""

    length: int | None = None  # in tokens; None: it is not known what all prompts share
    ids: tuple[int, ...] = ()  # those that were computed
    keys_values: list[KeysValues] = field(default_factory=list)


class Engine:
    """States and answers of `model` (a causal language model, with or without a LoRA adapter).

    Attributes:
        network: its forward.
        tokens_per_micro_batch: the budget; halved when memory runs out.
        frozen: the weights stay as they are as long as this engine lives.
        lasting_prefix: of the task whose prompts are next.
    """

    def __init__(self, model: nn.Module, tokenizer, tokens_per_micro_batch: int = TOKENS_PER_MICRO_BATCH):
        memory.keep_freed()
        self.network, self.tokenizer = Network(model, tokenizer), tokenizer
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.frozen = False
        self.lasting_prefix = LastingPrefix()

    @property
    def model(self) -> nn.Module:
        return self.network.model

    @property
    def tokens_computed(self) -> int:
        """Tokens pushed through the network so far, padding included."""
        return self.network.tokens_computed

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """See Network.to_device."""
        return self.network.to_device(tensor)

    def logits(self, states: torch.Tensor, vocabulary: list[int] | None = None) -> torch.Tensor:
        """See Network.logits."""
        return self.network.logits(states, vocabulary)

    def start_training(self, model: nn.Module, tokens_per_micro_batch: int, checkpointing: bool = False) -> None:
        """Compute with `model` from here on, which is this engine's own with an adapter put on it, or without one.

        checkpointing: with less memory and more time (checkpointing.py). Raises ModelError if the model cannot.
        """
        network = self.network
        network.set_model(model)
        if checkpointing:
            try:
                enable_checkpointing(network.backbone, network.layers, network.alibi)
            except ValueError as error:
                raise ModelError(f"--gradient_checkpointing True: {error}; leave it at False") from error
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.frozen, self.lasting_prefix = False, LastingPrefix()

    def frozen_copy(self) -> "Engine":
        """An engine on a copy of the model as it is now, which stays as it is."""
        copied = copy.deepcopy(self, {id(self.tokenizer): self.tokenizer})
        copied.model.requires_grad_(False)
        copied.frozen, copied.lasting_prefix = True, LastingPrefix()
        return copied

    # ------------------------------------------------------------------------------------------- states and gradients

    def states(
        self, prompts: list[list[int]], trees: list[Tree], reference: bool = False, keep: bool = False
    ) -> list[torch.Tensor]:
        """The hidden state of every node, per prompt (nodes, hidden). `reference`: with the adapter switched off.

        keep: with gradient if all rows are one micro-batch, so that training on them needs no second forward.
        Raises MemoryError (see retry_with_smaller_batches).
        """
        return self.retry_with_smaller_batches(lambda: self._states(prompts, trees, reference, keep))

    def _states(self, prompts, trees, reference: bool, keep: bool) -> list[torch.Tensor]:
        result: list = [None] * len(prompts)
        # 1. Micro-batches, and the prefix that they share.
        batches = self._batches(prompts, trees, self._prefix_length(prompts, reference))
        single = self._single_pass(batches)
        with (
            self.network.reference() if reference else contextlib.nullcontext(),
            torch.set_grad_enabled(keep and single),
        ):
            prefix = self._prefix(prompts, reference, single)
            # 2. Each micro-batch; without one left, a process keeps step with those that have.
            for rows in self.network.lockstep_batches(batches):
                if rows is None:
                    self.network.dummy_forward()
                    continue
                states = self.network.states([prompts[i] for i in rows], [trees[i] for i in rows], prefix)
                # 3. Back into the prompts' order, without padding.
                for i, state in zip(rows, states):
                    result[i] = state[: len(trees[i])]
        return result

    def training_batches(self, prompts: list[list[int]], trees: list[Tree]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield (row numbers, states (rows, nodes, hidden)) with gradient, one micro-batch at a time.

        The caller runs backward on each before asking for the next; after the last one the gradients that collected in
        the shared prefix's keys and values are sent through it. Memory holds one micro-batch and the prefix.
        """
        network = self.network
        # 1. Rows that are one micro-batch take the prefix along: one forward, one backward.
        length = self._prefix_length(prompts)
        batches = self._batches(prompts, trees, length)
        if self._single_pass(batches):
            (rows,) = batches
            prefix = self._prefix(prompts, single=True)
            yield rows, network.states([prompts[i] for i in rows], [trees[i] for i in rows], prefix)
            return
        # 2. The prefix: its keys and values become leaves, which collect the gradients of all micro-batches.
        keys_values, leaves, last = [], [], None
        any_prefix = network.any_process(length > 0)
        if length:
            keys_values, last = network.run_prefix(prompts[0][:length])
            leaves = [tuple(x.detach().requires_grad_() for x in pair) for pair in keys_values]
        elif any_prefix:
            last = network.dummy_forward()
        # 3. The micro-batches.
        for rows in network.lockstep_batches(batches):
            if rows is None:
                network.dummy_forward().mean().mul(0).backward()
                continue
            yield rows, network.states([prompts[i] for i in rows], [trees[i] for i in rows], Prefix(length, leaves))
        # 4. The collected gradients go through the prefix. A tensor with no adapter in front of it (keys of the first
        #    layer, say) takes none.
        sent = [
            (x, leaf.grad)
            for pair, leaf_pair in zip(keys_values, leaves)
            for x, leaf in zip(pair, leaf_pair)
            if x.requires_grad and leaf.grad is not None
        ]
        if network.lockstep and last is not None:
            # Sharded weights are all-gathered when a block's output has a gradient, be it zero as the last one's.
            sent.append((last, torch.zeros_like(last)))
        if sent:
            torch.autograd.backward([x for x, _ in sent], [grad for _, grad in sent])

    # ------------------------------------------------------------------------------------------------------- answers

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        keep: bool = False,
        extend: Callable[[list[Tree], list[list[Answer]]], None] | None = None,
    ) -> tuple[list[Tree], list[list[Answer]], list[torch.Tensor]]:
        """Answer every prompt `sampling.samples` times.

        An answer ends at the end-of-sequence token, by the stop rule, or after `max_new_tokens`. Sampling draws on the
        CPU. keep: see `states`. extend: called with trees and answers when all have ended, it lets the trees grow once
        more before their states are returned.
        Returns, per prompt: the tree of all tokens that had to be pushed through the network, the answers, and the
        states (nodes, hidden) at which their tokens were chosen. Raises MemoryError (see retry_with_smaller_batches).
        """
        seeds = sampling.seeds(len(prompts))
        return self.retry_with_smaller_batches(lambda: self._generate(prompts, sampling, seeds, keep, extend))

    @torch.no_grad()
    def _generate(self, prompts, sampling: Sampling, seeds: list[int | None], keep: bool, extend):
        network = self.network
        trees = [Tree() for _ in prompts]
        answers = [[Answer([], [], False, "") for _ in range(sampling.samples)] for _ in prompts]
        rows = [DecodingRow(p, t, a, random_stream(s)) for p, t, a, s in zip(prompts, trees, answers, seeds)]
        # 1. Micro-batches: a decoding row holds its prompt, and about as many nodes as tokens are generated.
        length = self._prefix_length(prompts)
        room = min(sampling.samples * sampling.max_new_tokens, DECODING_ROOM)
        lengths = [len(prompt) - length + room for prompt in prompts]
        batches = micro_batches(lengths, DECODING_BUDGET * self.tokens_per_micro_batch)
        single = self._single_pass(batches)
        # Only a packed forward's keys and values can be kept for a graph.
        packed = network.packed and not network.plain
        keep_prompts = keep and single and packed and self._single_pass(self._batches(prompts, trees, length))
        # 2. Generate; without a micro-batch left, a process keeps step with those that have.
        prefix, kept = self._prefix(prompts, single=single), None
        for batch in network.lockstep_batches(batches):
            if batch is None:
                self._dummy_decode(sampling.max_new_tokens)
                continue
            kept = decode(network, [rows[i] for i in batch], prefix, sampling, keep_prompts)
        # 3. What follows the answers.
        if extend is not None:
            extend(trees, answers)
        # 4. States: of kept prompts with gradient, else of extended trees anew, else as generation left them.
        if kept is not None and self._single_pass(self._batches(prompts, trees, length)):
            (batch,) = batches
            states: list = [None] * len(prompts)
            with torch.enable_grad():
                for i, state in zip(batch, kept.grow([trees[i] for i in batch])):
                    states[i] = state
        elif extend is not None:
            kept = None  # it holds the prompts' graph
            states = self._states(prompts, trees, False, keep)
        else:
            states = [torch.stack(row.states) for row in rows]
        return trees, answers, states

    def _dummy_decode(self, max_new_tokens: int) -> None:
        """Take part in the forwards of other processes that decode a micro-batch."""
        self.network.dummy_forward()
        for _ in range(max_new_tokens):
            if not self.network.any_process(False):
                break
            self.network.dummy_forward()

    # ------------------------------------------------------------------------------------------- batches and prefixes

    def _batches(self, prompts, trees, prefix_length: int) -> list[list[int]]:
        """Row numbers per micro-batch."""
        plain, packed = self.network.plain, self.network.packed
        lengths = [len(p) - prefix_length + len(t) for p, t in zip(prompts, trees)]
        if plain:  # every path is a sequence of its own
            lengths = [(len(t) - len({*t.parents[1:]})) * (len(p) + max(t.depths)) for p, t in zip(prompts, trees)]
        return micro_batches(lengths, self.tokens_per_micro_batch, packed and not plain)

    def _single_pass(self, batches: list[list[int]]) -> bool:
        """Whether one pass through the network is enough for all rows."""
        return len(batches) == 1 and not self.network.lockstep

    def _prefix_length(self, prompts: list[list[int]], reference: bool = False) -> int:
        """How many tokens of these prompts are their shared prefix. Where its keys and values last for the whole run it
        is what all prompts of the run share, not what a few have in common by chance."""
        length = 0 if self.network.plain else common_prefix(prompts)
        lasts = (reference or self.frozen) and self.lasting_prefix.length is not None
        return min(length, self.lasting_prefix.length) if lasts else length

    def _prefix(self, prompts: list[list[int]], reference: bool = False, single: bool = False) -> Prefix:
        """The prompts' shared prefix. It is left to the rows' own forward, if they are packed and need a `single` pass:
        so few tokens are not worth a pass of their own."""
        length, lasts = self._prefix_length(prompts, reference), reference or self.frozen
        if single and self.network.packed and not lasts:
            return Prefix(length)
        ids = tuple(prompts[0][:length]) if length else ()
        known = self.lasting_prefix if lasts else LastingPrefix()
        # Any longer prefix that was computed before begins with this one.
        missing = known.ids[:length] != ids
        if self.network.any_process(missing) and not missing:
            self.network.dummy_forward()
        if not missing:
            kept = [(k[:, :, :length], v[:, :, :length]) for k, v in known.keys_values]
            return Prefix(length, kept if length else [])
        keys_values, _ = self.network.run_prefix(list(ids))
        if lasts:
            known.ids, known.keys_values = ids, keys_values
        return Prefix(length, keys_values)

    # -------------------------------------------------------------------------------------------------------- memory

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
            if self.network.lockstep:
                raise MemoryError(
                    f"out of memory ({message}), and with sharded weights no process can begin anew alone"
                )
            if self.tokens_per_micro_batch <= memory.SMALLEST_BUDGET:
                raise MemoryError(f"out of memory with one row at a time ({message})")
            self.tokens_per_micro_batch //= 2
            print(f"Out of memory: going on with micro-batches of {self.tokens_per_micro_batch} tokens.", flush=True)
