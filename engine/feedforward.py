"""The last block's feed-forward layer, computed only for the tokens whose final state is read.

Keys and values come before it, so nothing else depends on it; of a prompt only the last token's state is ever read. The
layer is two to three quarters of a block's work. For all other tokens its output is 0.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

NAMES = ("mlp", "ffn")  # of a block's feed-forward layer


class _Forward:
    """The layer's `forward`, among the tokens `read` where that is set."""

    def __init__(self, layer: nn.Module):
        self.whole, self.read = layer.forward, None

    def __call__(self, hidden: torch.Tensor, *args, **kwargs):
        if self.read is None:
            return self.whole(hidden, *args, **kwargs)
        # A residual (BLOOM, MPT) is read at the same tokens.
        each = [x.reshape(-1, x.shape[-1])[self.read][None] for x in (hidden, *args)]
        result = torch.zeros_like(hidden).flatten(0, -2)
        if len(self.read):
            result = result.index_put((self.read,), self.whole(*each, **kwargs)[0])
        return result.view(hidden.shape)


def stack(backbone: nn.Module, blocks: int) -> nn.ModuleList | None:
    """The list of the model's blocks, which are so many; None if it has none."""
    return next((m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == blocks), None)


def last(backbone: nn.Module, blocks: int) -> _Forward | None:
    """The feed-forward layer of the last of so many blocks, made able to leave tokens out; None for a model whose layer
    has another name, or that has several in a block (a mixture of experts)."""
    found = stack(backbone, blocks)
    layers = [getattr(found[-1], name, None) for name in NAMES] if found is not None else []
    layer = next((layer for layer in layers if layer is not None), None)
    # A mixture of experts may also return how it chose among them.
    if layer is None or any("expert" in name or "router" in name for name, _ in layer.named_modules()):
        return None
    if not isinstance(layer.forward, _Forward):
        layer.forward = _Forward(layer)
    return layer.forward


@contextlib.contextmanager
def only(layer: _Forward | None, read: torch.Tensor | None) -> Iterator[None]:
    """In here the layer computes only the tokens `read`: (n,) indices into (rows x tokens); None: all of them."""
    if layer is None:
        yield
        return
    layer.read = read
    try:
        yield
    finally:
        layer.read = None
