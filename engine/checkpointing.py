"""Gradient checkpointing: a block keeps its input, and is computed once more in the backward pass.

transformers' own (Chen et al. 2016, https://arxiv.org/abs/1604.06174) takes the KV cache away, through which the
engine's rows see their prefix. Here a block that is computed again finds its cache and attention as they were before.
"""

import contextlib
import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from engine import feedforward
from engine.alibi import Alibi


def enable(backbone: nn.Module, blocks: int, alibi: Alibi | None) -> None:
    """Let all of so many blocks but the last compute so: that one's feed-forward layer sees but a few tokens
    (feedforward.py). ValueError for a model whose blocks are no list."""
    stack = feedforward.stack(backbone, blocks)
    if stack is None:
        raise ValueError(f"the {blocks} blocks of {type(backbone).__name__} are no list, so none can be computed again")
    for index, block in enumerate(stack[:-1]):
        if not isinstance(block.forward, _Forward):
            block.forward = _Forward(block, index, backbone.config.get_text_config(), alibi)


class _Forward:
    """A block's `forward`. Without gradients it is the block's own."""

    def __init__(self, block: nn.Module, index: int, config, alibi: Alibi | None):
        self.whole, self.index, self.config, self.alibi = block.forward, index, config, alibi

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.whole(*args, **kwargs)
        first = [(args, kwargs)]  # given up after the first run: its cache holds the keys and values of all blocks
        kept = [self._cache_before(x) for x in args], {name: self._cache_before(x) for name, x in kwargs.items()}
        attention, biases = self.config._attn_implementation, self.alibi and self.alibi.biases

        def run(*_):
            if first:
                args, kwargs = first.pop()
                return self.whole(*args, **kwargs)
            args = [self._cache_before(x) for x in kept[0]]  # a copy, should the backward pass come twice
            kwargs = {name: self._cache_before(x) for name, x in kept[1].items()}
            now, self.config._attn_implementation = self.config._attn_implementation, attention
            try:
                with self.alibi.using(biases) if self.alibi else contextlib.nullcontext():
                    return self.whole(*args, **kwargs)
            finally:
                self.config._attn_implementation = now

        return checkpoint(run, *args, use_reentrant=False)

    def _cache_before(self, value):
        """A copy of a KV cache that has this block's part alone; any other value as it is."""
        if not isinstance(value, Cache):
            return value
        cache = copy.copy(value)
        cache.layers = [None] * self.index + [copy.copy(layer) for layer in value.layers[self.index : self.index + 1]]
        return cache
