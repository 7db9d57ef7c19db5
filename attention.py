"""Attention to a prefix that all rows share, without a copy of it for every row: the same numbers, in less time.

The rows' queries meet the prefix's keys as one long row, and their own keys row by row. Softmax over both together is
a mean of the two results, weighted by the sums of exponentials that they were divided by (Hydragen: Juravsky et al.
2024, https://arxiv.org/abs/2402.05099). For the CPU and without gradient: its kernel gives these sums, but no gradient
of them.
"""

import contextlib
from collections.abc import Iterator

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer

NAME = "shared_prefix"
SHORTEST = 128  # tokens; with a shorter prefix there is nothing to gain


class PrefixLayer(DynamicLayer):
    """The cache of one layer: the rows' own keys and values, and beside them the prefix's (1, heads, tokens, size)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.prefix = keys, values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Own keys and values (rows, heads, tokens, size); the prefix goes along as an attribute of the keys."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        keys.prefix = self.prefix
        return keys, values


def fits(model: PreTrainedModel) -> bool:
    """Whether this can be done for the model: float32 on a CPU, attention by transformers' exchangeable functions."""
    weight = model.get_output_embeddings().weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and getattr(model, "_supports_attention_backend", False)
        and model.config.get_text_config()._attn_implementation == "sdpa"
    )


@contextlib.contextmanager
def in_use(model: PreTrainedModel) -> Iterator[None]:
    """In here the model's attention expects a cache of PrefixLayers and a mask (rows, 1, tokens, own tokens) of 0 and
    -inf for the rows' own tokens alone."""
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def shared_prefix(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """query (rows, heads, tokens, size), key and value of PrefixLayer.update -> (rows, tokens, heads, size), None."""
    keys, values = key.prefix
    rows, heads, tokens, size = query.shape
    groups = heads // keys.shape[1]
    grouped = query.view(rows, -1, groups, tokens, size).transpose(0, 1)  # (key heads, rows, groups, tokens, size)
    prefix, prefix_sum = _attend(grouped.reshape(1, grouped.shape[0], -1, size), keys, values, None, scaling)
    prefix = prefix.reshape(grouped.shape).transpose(0, 1).reshape(query.shape)
    prefix_sum = prefix_sum.reshape(grouped.shape[:-1]).transpose(0, 1).reshape(query.shape[:-1])
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    own, own_sum = _attend(query, key, value, attention_mask, scaling)
    mean = torch.lerp(own, prefix, torch.sigmoid(prefix_sum - own_sum)[..., None])
    return mean.transpose(1, 2).contiguous(), None


def _attend(query, key, value, mask, scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (rows, heads, tokens, size), and the logarithms (rows, heads, tokens) of the sums of exponentials."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask, scale=scaling)


AttentionInterface.register(NAME, shared_prefix)
