"""ALiBi models (MPT, BLOOM, Falcon where it has no rotary embedding) at positions of our own choice.

ALiBi adds to every attention score a bias that grows with the key's position. transformers takes the column of the
attention matrix, or the count of tokens in a padding mask, for that position, which is wrong in a tree or a packed
sequence. The bias of a head depends on the key alone (a softmax ignores what all keys of a query have in common), so
here it is a product: queries get a feature 1, and keys a feature that is the bias at their position. Keys carry it
through every KV cache, and the rest is attention as in other models, with any mask, padded or packed.
(ALiBi: Press et al. 2022, https://arxiv.org/abs/2108.12409)
"""

import contextlib
import math
import sys
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AttentionInterface

FEATURES = 8  # what a head grows by: cards have fast kernels for multiples of eight


class Alibi:
    """The attention layers of one model. In `at`, they compute with these positions, this mask and this attention."""

    def __init__(self, backbone: nn.Module, layers: list[nn.Module]):
        self._backbone, self._heads = backbone, backbone.num_heads
        self._table = torch.zeros(self._heads, 0)  # (heads, positions) of biases
        self._bias = self._mask = None
        for layer in layers:
            layer.forward = _Forward(layer, self)

    @property
    def active(self) -> bool:
        return self._bias is not None

    @property
    def biases(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Biases and mask that the layers compute with now."""
        return self._bias, self._mask

    @contextlib.contextmanager
    def using(self, biases: tuple[torch.Tensor | None, torch.Tensor | None]) -> Iterator[None]:
        """In here the layers compute with these `biases` once more."""
        before, (self._bias, self._mask) = self.biases, biases
        try:
            yield
        finally:
            self._bias, self._mask = before

    @contextlib.contextmanager
    def at(self, positions: torch.Tensor, mask: torch.Tensor | None, longest: int) -> Iterator[torch.Tensor | None]:
        """In here the layers compute so; gives the mask for the model, which builds biases and masks of its own from it
        that nobody reads. positions (rows, tokens), all below `longest`; mask as the attention in use takes it, None:
        causal."""
        if longest > self._table.shape[1]:
            self._table = self._biases(2 * longest, positions.device)
        with self.using((self._table[:, positions].transpose(0, 1), mask)):  # (rows, heads, tokens)
            # MPT goes on with a mask of four dimensions as it is; BLOOM and Falcon refuse one.
            mpt = hasattr(self._backbone, "build_mpt_alibi_tensor")
            yield torch.ones(1, 1, 1, 1, dtype=torch.bool, device=positions.device) if mpt else None

    def attend(self, layer: nn.Module, query, key, value, scale: float, cache, **more) -> torch.Tensor:
        """query, key and value (rows, heads, tokens, size), and the KV cache -> (rows, tokens, heads x size)."""
        rows, heads, tokens, size = query.shape
        # 1. The features. In two parts, as bfloat16 has eight bits and a bias of a thousand tokens needs more.
        bias = self._bias[..., None]
        high = bias.to(query.dtype)
        parts = [high, (bias - high.float()).to(query.dtype), bias.new_zeros(*bias.shape[:3], FEATURES - 2)]
        features = torch.cat([part.to(query.dtype) for part in parts], dim=-1)
        ones = query.new_ones(rows, heads, tokens, FEATURES)
        query = torch.cat([query * scale, ones], dim=-1)
        # Heads that share a key have biases of their own.
        key, value = (x.expand(rows, heads, tokens, size) for x in (key, value))
        key, value = torch.cat([key, features], dim=-1), nn.functional.pad(value, (0, FEATURES))
        # 2. Attention.
        if cache is not None:
            key, value = cache.update(key, value, layer.layer_idx)
        attention = AttentionInterface()[self._backbone.config._attn_implementation]
        output, _ = attention(layer, query, key, value, self._mask, scaling=1.0, **more)
        return output[..., :size].reshape(rows, tokens, heads * size)

    def _biases(self, length: int, device: torch.device) -> torch.Tensor:
        """(heads, length): what the model's own code adds for a key at each position, and 0 for the first one."""
        model, dtype = self._backbone, self._backbone.dtype
        if hasattr(model, "build_mpt_alibi_tensor"):
            biases = model.build_mpt_alibi_tensor(self._heads, length, device=device)[:, 0]
            return biases - biases[:, :1]
        build = sys.modules[type(model).__module__].build_alibi_tensor
        biases = build(torch.ones(1, length, dtype=torch.long, device=device), self._heads, dtype)[:, 0].float()
        falcon = hasattr(model, "use_alibi")  # which scales the bias as the scores
        return biases / math.sqrt(model.config.hidden_size // self._heads) if falcon else biases


def fit(backbone: nn.Module) -> Alibi | None:
    """The ALiBi of a model of transformers' own code; None for a model without it, or of other code."""
    if not type(backbone).__module__.startswith("transformers.models.") or not getattr(backbone, "use_alibi", True):
        return None
    layers = [layer for layer in backbone.modules() if type(layer).__name__ in PROJECTIONS]
    exact = any(getattr(layer, "slow_but_exact", False) and layer.pretraining_tp > 1 for layer in layers)
    if not layers or exact:
        return None
    known = vars(layers[0]).get("forward")
    return known.alibi if isinstance(known, _Forward) else Alibi(backbone, layers)


class _Forward:
    """An attention layer's `forward`; outside of `Alibi.at` it is the layer's own."""

    def __init__(self, layer: nn.Module, alibi: Alibi):
        self.layer, self.alibi = layer, alibi

    def __call__(self, hidden: torch.Tensor, *args, **kwargs):
        if not self.alibi.active:
            return type(self.layer).forward(self.layer, hidden, *args, **kwargs)
        return PROJECTIONS[type(self.layer).__name__](self.layer, self.alibi.attend, hidden, *args, **kwargs), None


def _mpt(layer, attend, hidden, position_bias=None, past_key_values=None, attention_mask=None, **kwargs):
    projected = layer.Wqkv(hidden)
    if layer.clip_qkv:
        projected = projected.clamp(min=-layer.clip_qkv, max=layer.clip_qkv)
    heads = (x.unflatten(2, (layer.n_heads, layer.head_dim)).transpose(1, 2) for x in projected.chunk(3, dim=2))
    dropout = layer.attn_dropout_p if layer.training else 0.0
    return layer.out_proj(attend(layer, *heads, layer.softmax_scale, past_key_values, dropout=dropout))


def _bloom(layer, attend, hidden, residual, layer_past=None, **kwargs):
    heads = layer._reshape(layer.query_key_value(hidden))
    dropout = layer.attention_dropout.p if layer.training else 0.0
    output = layer.dense(attend(layer, *heads, layer.inv_norm_factor, layer_past, dropout=dropout))
    return residual + nn.functional.dropout(output, layer.hidden_dropout, layer.training)


def _falcon(layer, attend, hidden, layer_past=None, **kwargs):
    heads = (x.transpose(1, 2) for x in layer._split_heads(layer.query_key_value(hidden)))
    dropout = layer.attention_dropout.p if layer.training else 0.0
    return layer.dense(attend(layer, *heads, layer.inv_norm_factor, layer_past, dropout=dropout))


PROJECTIONS = {"MptAttention": _mpt, "BloomAttention": _bloom, "FalconAttention": _falcon}
