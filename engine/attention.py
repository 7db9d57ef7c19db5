"""Attention to a prefix that all rows share, without a copy of it for every row: the same numbers, in less time.

The rows' queries attend to the prefix's keys as one long row, and to their own keys row by row. Softmax over both is a
mean of the two results, weighted by their sums of exponentials (Hydragen: Juravsky et al. 2024,
https://arxiv.org/abs/2402.05099). The gradient splits in the same way: each part's is the usual one, with the sum of
exponentials and the output of both (as in ring attention: Liu et al. 2023, https://arxiv.org/abs/2310.01889).

`packed`: the rows are one packed sequence, without padding, with or without gradient; for the CPU, whose kernel returns
and takes these sums (a card has flex.py). `shared_prefix`: the rows of a padded batch that grows token by token,
without gradient. `masked` is attention to a padded batch without such a part.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from engine import alibi, masks

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

SHORTEST = 128  # tokens; with a shorter prefix `shared_prefix` gains nothing
Shared = tuple[torch.Tensor, torch.Tensor]  # keys and values
NOTHING = None, None


@dataclass(frozen=True)
class Row:
    """One row of a packed sequence: the tokens of a prompt, and then those of its tree.

    Attributes:
        start: its first token.
        stop: the one after its last.
        parents: of the tree's nodes, the root included; None: every token sees all before it.
    """

    start: int
    stop: int
    parents: tuple[int, ...] | None = None

    @functools.cached_property
    def mask(self) -> torch.Tensor | None:
        """(tokens, tokens) 0 where one of its tokens sees another, else -inf; None: causal."""
        if self.parents is None:
            return None
        size, nodes = self.stop - self.start, len(self.parents) - 1
        seen = torch.ones(size, size, dtype=torch.bool).tril()
        seen[size - nodes :, size - nodes :] = masks.ancestors(self.parents, nodes)
        return masks.additive(seen)


@dataclass(frozen=True)
class Packing:
    """Where the rows are in a packed sequence.

    Attributes:
        rows: in order, without gaps.
        inside: the first tokens are a prefix that all rows see; these tokens are then the first row.
        before: where the keys and values that each row alone sees before its tokens are in those of another layer, its
            past; None if there is none.
    """

    rows: list[Row]
    inside: int = 0
    before: list[tuple[int, int]] | None = None


class PrefixLayer(DynamicLayer):
    """The KV cache of one layer: the rows' own keys and values, and the prefix's (1, heads, tokens, size) apart."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.prefix = keys, values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Own keys and values (rows, heads, tokens, size); the prefix is passed on as an attribute of the keys."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        keys.prefix = self.prefix
        return keys, values


class PackedLayer(DynamicLayer):
    """The KV cache of one layer: keys and values (1, heads, tokens, size) of a packed sequence.

    prefix: keys and values from elsewhere that all rows see. past: another layer with what each row alone sees before
    its tokens, at `packing.before`.
    """

    def __init__(self, packing: Packing, prefix: Shared | None = None, past: "PackedLayer | None" = None):
        super().__init__()
        self.packing, self.prefix = packing, prefix
        self.past = (past.keys, past.values) if past else None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        # Not the layer itself: it holds these keys, and a reference cycle would wait for the garbage collector.
        keys.packed_with = self.prefix, self.past, self.packing
        return keys, values

    def shared(self) -> Shared | None:
        """The prefix's keys and values (1, heads, prefix, size); None without a prefix."""
        inside = self.packing.inside
        return (self.keys[:, :, :inside], self.values[:, :, :inside]) if inside else self.prefix

    def padded(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """places (rows, width), numbers of tokens -> their keys and values (rows, heads, width, size)."""
        return tuple(x[0][:, places].transpose(0, 1) for x in (self.keys, self.values))


def fits(model: PreTrainedModel) -> bool:
    """Whether this works for the model where every token attends to all tokens before it: in float32 or bfloat16, and
    attention through transformers' AttentionInterface or alibi.py."""
    weight, config = model.get_output_embeddings().weight, model.config.get_text_config()
    return weight.dtype in (torch.float32, torch.bfloat16) and (
        alibi.fit(model.base_model) is not None
        or getattr(model, "_supports_attention_backend", False)
        and config._attn_implementation == "sdpa"
        and set(getattr(config, "layer_types", None) or []) <= {"full_attention", "sliding_attention"}
        and not getattr(config, "attn_logit_softcapping", None)
    )


@contextlib.contextmanager
def in_use(model: PreTrainedModel, function: Callable) -> Iterator[None]:
    """In here the model's attention is `packed`, with a cache of PackedLayers and no mask; or `shared_prefix`, with a
    cache of PrefixLayers and a mask (rows, 1, tokens, own tokens) of 0 and -inf for the rows' own tokens alone; or
    `masked`, with any other cache."""
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, function.__name__
    try:
        yield
    finally:
        config._attn_implementation = before


def shared_prefix(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """query (rows, heads, tokens, size), key and value of PrefixLayer.update -> (rows, tokens, heads, size), None."""
    dtype = query.dtype
    query, key, value, keys, values = (x.float() for x in (query, key, value, *key.prefix))
    rows, heads, tokens, size = query.shape
    groups = heads // keys.shape[1]
    grouped = query.view(rows, -1, groups, tokens, size).transpose(0, 1)  # (key heads, rows, groups, tokens, size)
    prefix, prefix_sum = _attend(grouped.reshape(1, grouped.shape[0], -1, size), keys, values, None, scaling)
    prefix = prefix.reshape(grouped.shape).transpose(0, 1).reshape(query.shape)
    prefix_sum = prefix_sum.reshape(grouped.shape[:-1]).transpose(0, 1).reshape(query.shape[:-1])
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    own, own_sum = _attend(query, key, value, attention_mask, scaling)
    mean = torch.lerp(own, prefix, torch.sigmoid(prefix_sum - own_sum)[..., None])
    return mean.transpose(1, 2).to(dtype).contiguous(), None


def masked(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """query, key, value (rows, heads, tokens, size), attention_mask (rows, 1, tokens, keys) or None for a causal one
    -> (rows, tokens, heads, size), None."""
    causal = attention_mask is None
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
    )
    return output.transpose(1, 2), None


def packed(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """query (1, heads, tokens, size), key and value of PackedLayer.update -> (1, tokens, heads, size), None."""
    prefix, past, packing = key.packed_with
    # In float32 throughout: results and gradients of several parts are added up, each of which would be rounded.
    parts = [x if x is None else x.float() for x in (query, key, value, *(prefix or NOTHING), *(past or NOTHING))]
    return Packed.apply(*parts, packing, scaling).to(query.dtype), None


class Packed(torch.autograd.Function):
    """Attention of every row's tokens to themselves, to the row's own past, and to the prefix that all rows see.

    query (1, heads, tokens, size); key, value (1, key heads, tokens, size); the others as in PackedLayer
    -> (1, tokens, heads, size). A row without a mask is causal.
    """

    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, past_key, past_value, packing: Packing, scaling):
        _, heads, tokens, size = query.shape
        groups = heads // key.shape[1]
        output = query.new_empty(1, tokens, heads, size)
        sums = query.new_empty(groups, key.shape[1], tokens)
        # Heads that share their keys take the batch dimension: keys are not copied, and all threads have work.
        q, out = _grouped(query, groups), _grouped(output.transpose(1, 2), groups)
        k, v = _expanded(groups, key, value)

        def also(mine: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
            """Let the tokens `mine` attend to more keys, all of them."""
            other, other_sums = flash(q[:, :, mine], keys, values, scale=scaling)
            out[:, :, mine].lerp_(other, torch.sigmoid(other_sums - sums[:, :, mine])[..., None])
            sums[:, :, mine] = torch.logaddexp(sums[:, :, mine], other_sums)

        for row in packing.rows:
            own, mask = slice(row.start, row.stop), row.mask
            out[:, :, own], sums[:, :, own] = flash(
                q[:, :, own], k[:, :, own], v[:, :, own], is_causal=mask is None, attn_mask=mask, scale=scaling
            )
        if past_key is not None:
            past = tuple(_expanded(groups, past_key, past_value))
            for row, (first, end) in zip(packing.rows, packing.before):
                also(slice(row.start, row.stop), *(x[:, :, first:end] for x in past))
        if prefix_key is not None:
            also(slice(None), *_expanded(groups, prefix_key, prefix_value))
        if inside := packing.inside:
            also(slice(inside, None), k[:, :, :inside], v[:, :, :inside])
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, past_key, past_value, output, sums)
        ctx.packing, ctx.scaling = packing, scaling
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, prefix_key, prefix_value, past_key, past_value, output, sums = ctx.saved_tensors
        packing, groups = ctx.packing, len(sums)
        q, out, grad = (_grouped(x, groups) for x in (query, output.transpose(1, 2), gradient.transpose(1, 2)))
        of_query = torch.empty_like(gradient).transpose(1, 2)
        of_key, of_value = torch.empty_like(key), torch.empty_like(value)
        of_q, of_prefix, of_past = _grouped(of_query, groups), (None, None), (None, None)
        k, v = _expanded(groups, key, value)

        def also(mine: slice, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """The gradients (1, key heads, keys, size) of more keys and values that the tokens `mine` attended to."""
            inputs = grad[:, :, mine], q[:, :, mine], keys, values, out[:, :, mine], sums[:, :, mine]
            dq, dk, dv = flash_backward(*inputs, dropout_p=0.0, is_causal=False, scale=ctx.scaling)
            of_q[:, :, mine] += dq
            return dk.sum(0, keepdim=True), dv.sum(0, keepdim=True)

        for row in packing.rows:
            own, mask = slice(row.start, row.stop), row.mask
            inputs = (x[:, :, own] for x in (grad, q, k, v, out, sums))
            of_q[:, :, own], dk, dv = flash_backward(
                *inputs, dropout_p=0.0, is_causal=mask is None, attn_mask=mask, scale=ctx.scaling
            )
            of_key[:, :, own], of_value[:, :, own] = dk.sum(0), dv.sum(0)
        if past_key is not None:
            of_past = torch.zeros_like(past_key), torch.zeros_like(past_value)
            past = tuple(_expanded(groups, past_key, past_value))
            for row, (first, end) in zip(packing.rows, packing.before):
                found = also(slice(row.start, row.stop), *(x[:, :, first:end] for x in past))
                for total, part in zip(of_past, found):
                    total[:, :, first:end] = part
        if prefix_key is not None:
            of_prefix = also(slice(None), *_expanded(groups, prefix_key, prefix_value))
        if inside := packing.inside:
            found = also(slice(inside, None), k[:, :, :inside], v[:, :, :inside])
            for total, part in zip((of_key, of_value), found):
                total[:, :, :inside] += part
        return of_query, of_key, of_value, *of_prefix, *of_past, None, None


def _expanded(groups: int, *tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """(1, key heads, tokens, size) for each of the groups of heads, without a copy."""
    return (x.expand(groups, -1, -1, -1) for x in tensors)


def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    """A view of (1, heads, tokens, size) as (groups, key heads, tokens, size)."""
    return x[0].unflatten(0, (-1, groups)).transpose(0, 1)


def _attend(query, key, value, mask, scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (rows, heads, tokens, size), and the logarithms (rows, heads, tokens) of the sums of exponentials."""
    if query.device.type == "cpu":
        return flash(query, key, value, attn_mask=mask, scale=scaling)
    # A card's kernels take a mask or return the sums, not both. Decoding has few tokens, so their scores are small.
    return _attend_by_scores(query, key, value, mask, scaling)


def _attend_by_scores(query, key, value, mask, scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """`_attend` by its definition."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if mask is None else scores + mask
    sums = scores.logsumexp(-1)
    return (scores - sums[..., None]).exp() @ value, sums


for function in (packed, shared_prefix, masked):
    AttentionInterface.register(function.__name__, function)
