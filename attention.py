"""Attention to a prefix that all rows share, without a copy of it for every row: the same numbers, in less time.

The rows' queries meet the prefix's keys as one long row, and their own keys row by row. Softmax over both together is
a mean of the two results, weighted by the sums of exponentials that they were divided by (Hydragen: Juravsky et al.
2024, https://arxiv.org/abs/2402.05099). The gradient falls apart in the same way: each part's is the usual one, with
the sum of exponentials and the output of both together (as in ring attention: Liu et al. 2023,
https://arxiv.org/abs/2310.01889). For the CPU, whose kernel gives and takes these sums.

`packed`: the rows' tokens lie behind one another, without padding, with or without gradient. `shared_prefix`: rows of
one padded batch that grow token by token, without gradient.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

SHORTEST = 128  # tokens; with a shorter prefix `shared_prefix` has nothing to gain
Row = tuple[int, int, torch.Tensor | None]  # first token, the one after the last, and (tokens, tokens) 0 or -inf


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


class PackedLayer(DynamicLayer):
    """The cache of one layer: keys and values (1, heads, tokens, size) of all rows behind one another.

    What all rows share is `prefix`, keys and values from elsewhere, or the first `inside` tokens, which are then the
    first row.
    """

    def __init__(self, prefix: tuple[torch.Tensor, torch.Tensor] | None, rows: list[Row], inside: int = 0):
        super().__init__()
        self.prefix, self.rows, self.inside = prefix, rows, inside

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        keys.prefix, keys.rows, keys.inside = self.prefix, self.rows, self.inside
        return keys, values

    def shared(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The prefix's keys and values (1, heads, prefix, size), wherever they are."""
        if not self.inside:
            return self.prefix
        return self.keys[:, :, : self.inside], self.values[:, :, : self.inside]

    def padded(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """places (rows, width): which token stands there -> keys and values (rows, heads, width, size)."""
        return tuple(x[0][:, places].transpose(0, 1) for x in (self.keys, self.values))


def fits(model: PreTrainedModel) -> bool:
    """Whether this can be done for the model: float32 on a CPU, attention by transformers' exchangeable functions, and
    every token sees all before it."""
    weight, config = model.get_output_embeddings().weight, model.config.get_text_config()
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and getattr(model, "_supports_attention_backend", False)
        and config._attn_implementation == "sdpa"
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and (not getattr(config, "sliding_window", None) or getattr(config, "use_sliding_window", None) is False)
        and not getattr(config, "attn_logit_softcapping", None)
    )


@contextlib.contextmanager
def in_use(model: PreTrainedModel, function: Callable) -> Iterator[None]:
    """In here the model's attention is `packed`, with a cache of PackedLayers and no mask, or `shared_prefix`, with a
    cache of PrefixLayers and a mask (rows, 1, tokens, own tokens) of 0 and -inf for the rows' own tokens alone."""
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, function.__name__
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


def packed(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """query (1, heads, tokens, size), key and value of PackedLayer.update -> (1, tokens, heads, size), None."""
    return Packed.apply(query, key, value, *(key.prefix or (None, None)), key.rows, key.inside, scaling), None


class Packed(torch.autograd.Function):
    """Every row's tokens among themselves and the prefix, which all rows see.

    query (1, heads, tokens, size); key, value (1, key heads, tokens, size); prefix_key, prefix_value (1, key heads,
    prefix, size), or None where there is no prefix or the first `inside` tokens are it -> (1, tokens, heads, size).
    A row without a mask is causal.
    """

    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, rows: list[Row], inside: int, scaling):
        _, heads, tokens, size = query.shape
        groups = heads // key.shape[1]
        output = query.new_empty(1, tokens, heads, size)
        sums = query.new_empty(groups, key.shape[1], tokens)
        # Heads that share their keys lie in the place of the batch: keys need no copies, and the threads enough to do.
        q, out = _grouped(query, groups), _grouped(output.transpose(1, 2), groups)
        k, v = (x.expand(groups, -1, -1, -1) for x in (key, value))
        for start, stop, mask in rows:
            own = slice(start, stop)
            out[:, :, own], sums[:, :, own] = flash(
                q[:, :, own], k[:, :, own], v[:, :, own], is_causal=mask is None, attn_mask=mask, scale=scaling
            )
        if prefix_key is not None or inside:
            pk, pv = _prefix(k, v, prefix_key, prefix_value, inside)
            behind = slice(inside, None)
            other, other_sums = flash(q[:, :, behind], pk, pv, scale=scaling)
            out[:, :, behind].lerp_(other, torch.sigmoid(other_sums - sums[:, :, behind])[..., None])
            sums[:, :, behind] = torch.logaddexp(sums[:, :, behind], other_sums)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, output, sums)
        ctx.rows, ctx.inside, ctx.scaling = rows, inside, scaling
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, prefix_key, prefix_value, output, sums = ctx.saved_tensors
        groups = len(sums)
        q, out, grad = (_grouped(x, groups) for x in (query, output.transpose(1, 2), gradient.transpose(1, 2)))
        of_query = torch.empty_like(gradient).transpose(1, 2)
        of_key, of_value = torch.empty_like(key), torch.empty_like(value)
        of_q, of_prefix = _grouped(of_query, groups), (None, None)
        k, v = (x.expand(groups, -1, -1, -1) for x in (key, value))
        for start, stop, mask in ctx.rows:
            own = slice(start, stop)
            of_q[:, :, own], dk, dv = flash_backward(
                *(x[:, :, own] for x in (grad, q, k, v, out, sums)), 0.0, mask is None, attn_mask=mask,
                scale=ctx.scaling
            )  # fmt: skip
            of_key[:, :, own], of_value[:, :, own] = dk.sum(0), dv.sum(0)
        if prefix_key is not None or ctx.inside:
            pk, pv = _prefix(k, v, prefix_key, prefix_value, ctx.inside)
            behind = slice(ctx.inside, None)
            seen = (x[:, :, behind] for x in (grad, q))
            dq, dk, dv = flash_backward(
                *seen, pk, pv, out[:, :, behind], sums[:, :, behind], 0.0, False, scale=ctx.scaling
            )
            of_q[:, :, behind] += dq
            if ctx.inside:
                of_key[:, :, : ctx.inside] += dk.sum(0)
                of_value[:, :, : ctx.inside] += dv.sum(0)
            else:
                of_prefix = dk.sum(0, keepdim=True), dv.sum(0, keepdim=True)
        return of_query, of_key, of_value, *of_prefix, None, None, None


def _prefix(k, v, prefix_key, prefix_value, inside: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (groups, key heads, prefix, size) of the prefix; k, v: those of the tokens."""
    if inside:
        return k[:, :, :inside], v[:, :, :inside]
    return tuple(x.expand(len(k), -1, -1, -1) for x in (prefix_key, prefix_value))


def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    """A view of (1, heads, tokens, size) as (groups, key heads, tokens, size)."""
    return x[0].unflatten(0, (-1, groups)).transpose(0, 1)


def _attend(query, key, value, mask, scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (rows, heads, tokens, size), and the logarithms (rows, heads, tokens) of the sums of exponentials."""
    return flash(query, key, value, attn_mask=mask, scale=scaling)


AttentionInterface.register(packed.__name__, packed)
AttentionInterface.register(shared_prefix.__name__, shared_prefix)
