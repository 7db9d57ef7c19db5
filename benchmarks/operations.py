"""Floating-point operations that one PPO step in the default setting needs at least.

Counted, for every pass (PPO epoch) over a batch, are the multiplications and additions of float32 matrix products:

    T        tokens: the shared prefix once, and every prompt's own tokens; no padding
    P, L     parameters of the linear layers of all blocks, and of their LoRA parts, r * (inputs + outputs) each; those
             of the last block's feed-forward layer count only for the token before an answer, one per prompt
    pairs    (query, key) pairs of causal attention: p (p + 1) / 2 once for the prefix of p tokens, n p + n (n + 1) / 2
             for a prompt with n tokens of its own

    blocks      forward 2 P T, gradients of the activations 2 P T (the frozen weights need no gradient)
    LoRA        forward 2 L T, gradients of the activations 2 L T, and of the adapter's weights 2 L T
    attention   forward 4 q pairs per layer (queries times keys, and weights times values; q = heads x head size),
                backward twice that
    vocabulary  only at the answer's position and only for the label tokens: 2 h forward and 2 h backward for each

Not counted: embeddings, norms, activations, softmax, the optimizer, and the reference's forward pass on a few prompts,
which is only logged. Two things are counted that could be avoided: the gradients of the first layer's input, and the
last layer's queries before the answer (together about 1% for a model of 30 layers). Labels are taken to be one token
long, so an answer adds no token to its prompt.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """The sizes that matter. linears: (inputs, outputs) of every linear layer of one block, the feed-forward layer's
    last."""

    layers: int
    hidden: int
    query: int
    linears: tuple[tuple[int, int], ...]
    feed_forward: int  # how many of them are the feed-forward layer's
    rank: int

    def uses(self, sizes: list[int], tokens: int, read: int) -> int:
        """How often `tokens` tokens use the parameters of all linear layers; only `read` of them need the last block's
        feed-forward layer. sizes: the parameters of each linear layer of a block."""
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

    lengths: tokens of each prompt of the batch; prefix: how many tokens all prompts share at their start;
    label_tokens: tokens to choose from; passes: PPO epochs. ValueError if a prompt is not longer than the prefix.
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
