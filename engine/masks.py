"""Attention masks: what every token sees, in the form that a model's attention takes.

The network says it as booleans (rows, tokens, keys). Eager attention adds its mask to the scores, so there it is given
as numbers. Layers with a sliding window see less; their window counts positions, as columns would also count padding
and the other branches of a tree.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

Mask = TypeVar("Mask")
# Rotary embeddings whose frequencies depend on the longest sequence of a batch.
BY_LENGTH = ("longrope",)


class KVCache(DynamicCache):
    """A KV cache that also knows the position of every key: `positions` (rows, columns)."""

    def __init__(self, positions: torch.Tensor):
        super().__init__()
        self.layers = []
        self.positions = positions

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only."""
        super().batch_select_indices(indices)
        self.positions = self.positions[indices]


def window(config: PretrainedConfig) -> int | None:
    """How many of the last tokens some layer sees; None if all layers see all tokens."""
    kinds = set(getattr(config, "layer_types", None) or [])
    # A configuration without a list of layers may have one window for all of them, and may have it switched off.
    in_use = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", None) is not False
    return getattr(config, "sliding_window", None) if in_use else None


def unsupported(config: PretrainedConfig, longest: int) -> str | None:
    """Why these masks and positions would not do for a prompt and its answer of so many tokens; None if they do."""
    lower = f"and a prompt with its answer may have {longest}; a lower --max_prompt_length avoids that"
    if "local" in (getattr(config, "attention_layers", None) or []):
        return "some of its layers see only the last columns of a batch, whatever is in them"
    if "chunked_attention" in (getattr(config, "layer_types", None) or []) and longest > config.attention_chunk_size:
        return f"it attends in chunks of {config.attention_chunk_size} tokens, {lower}"
    rope = getattr(config, "rope_parameters", None) or {}
    limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rope.get("rope_type") in BY_LENGTH and limit and longest > limit:
        return f"it encodes positions in another way beyond {limit} tokens, {lower}"
    return None


def for_model(
    model: PreTrainedModel, seen: torch.Tensor, size: int | None, positions: torch.Tensor, cache: DynamicCache
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask (rows, 1, tokens, keys) that the model takes, or one for each kind of layer.

    seen: (rows, tokens, keys) booleans, on the model's device. size: of the window, None if it leaves nothing out.
    positions: (rows, tokens) of the tokens. cache: with the positions of all keys where there is a window.
    """
    config, dtype = model.config.get_text_config(), model.get_output_embeddings().weight.dtype

    def form(mask: torch.Tensor) -> torch.Tensor:
        if config._attn_implementation == "eager":
            mask = additive(mask, dtype)
        return mask[:, None]

    def of_window(window: int | None) -> torch.Tensor:
        near = cache.positions[:, None] > positions[..., None] - window if window else True
        return form(seen & near)

    return by_layer(model, of_window, size)


def by_layer(model: PreTrainedModel, mask: Callable[[int | None], Mask], size: int | None) -> Mask | dict[str, Mask]:
    """`mask` of a window of this size (None: without one) as the model takes it: one, or one for each kind of layer."""
    if size is None or getattr(model.config.get_text_config(), "layer_types", None) is None:
        return mask(size)
    return {"full_attention": mask(None), "sliding_attention": mask(size)}


def additive(seen: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """0 where a token is seen, else -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def ancestors(parents: Sequence[int], nodes: int) -> torch.Tensor:
    """(nodes, nodes): which tree tokens (root not counted) a tree token sees; padding sees itself."""
    seen = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, len(parents)):
        if parents[node] > 0:
            seen[node - 1] |= seen[parents[node] - 1]
    return seen
