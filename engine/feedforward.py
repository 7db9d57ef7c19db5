"""The last block's feed-forward layer, computed only for the tokens whose final state somebody reads.

Keys and values are made before it, so nothing else depends on it: of a prompt only the last token's is ever read. It is
two to three quarters of a block. What it gives for the other tokens is 0.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class _Forward:
    """The layer's `forward`, among the tokens `read` where that is set."""

    def __init__(self, layer: nn.Module):
        self.whole, self.read = layer.forward, None

    def __call__(self, hidden: torch.Tensor, *args, **kwargs):
        if self.read is None:
            return self.whole(hidden, *args, **kwargs)
        flat = hidden.reshape(-1, hidden.shape[-1])
        result = torch.zeros_like(flat)
        if len(self.read):
            result = result.index_put((self.read,), self.whole(flat[self.read][None], *args, **kwargs)[0])
        return result.view(hidden.shape)


def last(backbone: nn.Module, blocks: int) -> _Forward | None:
    """The last of so many blocks' feed-forward layer, made able to leave tokens out; None for a model that has it in
    another place than most, or more than one in a block."""
    stacks = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == blocks]
    layer = getattr(stacks[0][-1], "mlp", None) if stacks else None
    # A mixture of experts may also return how it chose among them.
    if layer is None or any("expert" in name or "router" in name for name, _ in layer.named_modules()):
        return None
    if not isinstance(layer.forward, _Forward):
        layer.forward = _Forward(layer)
    return layer.forward


@contextlib.contextmanager
def only(layer: _Forward | None, read: torch.Tensor | None) -> Iterator[None]:
    """In here the layer computes the tokens `read` alone: (n,) places in (rows, tokens, hidden), rows after rows."""
    if layer is None:
        yield
        return
    layer.read = read
    try:
        yield
    finally:
        layer.read = None
