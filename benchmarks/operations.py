"""Floating-point operations that one PPO step of the project's default form cannot do without.

Counted, as multiplications and additions of matrix products in float32, for every pass (PPO epoch) over a batch:

    T        tokens: the shared prefix once, and every prompt's own tokens; no padding
    P, L     parameters of the linear layers of all blocks, and of their LoRA parts, r * (inputs + outputs) each; those
             of the last block's feed-forward layer count for the tokens before an answer only, one per prompt
    pairs    (query, key) pairs that causal attention looks at: of the prefix p (p + 1) / 2 once, of a prompt with n own
             tokens n p + n (n + 1) / 2

    blocks      forward 2 P T, gradients of the activations 2 P T (the frozen weights need no gradient)
    LoRA        forward 2 L T, gradients of the activations 2 L T, and of the adapter's weights 2 L T
    attention   forward 4 q pairs per layer (queries times keys, and weights times values; q = heads x head size),
                backward twice that
    vocabulary  at the answer's position only, and for the label tokens only: 2 h forward and 2 h backward for each

Not counted: embeddings, norms, activations, softmax, the optimizer, and the reference's forward on a few prompts, which
is only logged. A little is counted that could be left out: the first layer's gradients of its input, and the last
layer's queries before the answer (about 1% together for a model of 30 layers). Labels are taken to be one token long,
so that an answer adds no token to its prompt.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """The sizes that matter. linears: (inputs, outputs) of every linear layer of one block, its feed-forward layer's
    at the end."""

    layers: int
    hidden: int
    query: int
    linears: tuple[tuple[int, int], ...]
    feed_forward: int  # how many of them are the feed-forward layer's
    rank: int

    def uses(self, sizes: list[int], tokens: int, read: int) -> int:
        """How often the parameters of linear layers, so many in each of a block's, are used by so many tokens, of which
        some are read."""
        end = sum(sizes[-self.feed_forward :])
        return self.layers * sum(sizes) * tokens - end * (tokens - read)

    def frozen_uses(self, tokens: int, read: int) -> int:
        return self.uses([inputs * outputs for inputs, outputs in self.linears], tokens, read)

    def lora_uses(self, tokens: int, read: int) -> int:
        return self.uses([self.rank * (inputs + outputs) for inputs, outputs in self.linears], tokens, read)


def llama(config, rank: int) -> Network:
    """The network of a transformers LlamaConfig (any block of q, k, v, o and a gated feed-forward layer)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, key = size * config.num_attention_heads, size * config.num_key_value_heads
    linears = ((hidden, query), (hidden, key), (hidden, key), (query, hidden))
    linears += ((hidden, inner), (hidden, inner), (inner, hidden))
    return Network(config.num_hidden_layers, hidden, query, linears, 3, rank)


def training_operations(
    network: Network, lengths: list[int], prefix: int, label_tokens: int, passes: int = 1
) -> dict[str, int]:
    """The operations of one step by part, and their `total`.

    lengths: tokens of every prompt of the batch; prefix: how many of them all prompts share at their start.
    label_tokens: how many tokens are chosen among. passes: PPO epochs. ValueError if a prompt is not longer than the
    prefix.
    """
    own = [length - prefix for length in lengths]
    if min(own) < 1:
        raise ValueError(f"a prompt of {min(lengths)} tokens is not longer than the shared prefix of {prefix}")
    tokens = prefix + sum(own)
    pairs = prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in own)
    parts = {
        "blocks": 4 * network.frozen_uses(tokens, len(lengths)),
        "lora": 6 * network.lora_uses(tokens, len(lengths)),
        "attention": 12 * network.query * network.layers * pairs,
        "vocabulary": 4 * network.hidden * label_tokens * len(lengths),
    }
    parts = {name: passes * count for name, count in parts.items()}
    return {**parts, "total": sum(parts.values())}
