"""A model's engine: loaded, checked against the plain forward, and ready to be asked or trained."""

import contextlib
from collections.abc import Iterator

import torch

from engine import masks, models
from engine.batches import common_prefix
from engine.engine import Engine
from engine.network import Network, Prefix
from engine.output import verified
from engine.trees import Tree
from machine import memory, sharding
from machine.errors import ModelError

# What configurations call the number of tokens that a model can read: most, GPT-2, MPT, and others.
LENGTH_LIMITS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx"
)  # fmt: skip


def load_engine(
    name: str,
    tokenizer,
    longest: int,
    from_local: bool = False,
    bits: int = 0,
    trust_remote_code: bool = False,
    dtype: str = "",
) -> Engine:
    """The engine of a model, sharded if it was launched for that, and checked.

    longest: tokens of a prompt and its answer at most. dtype: see models.number_format. The others: see
    models.load_model. Raises ModelError, also if the model cannot read so many tokens, and ArgumentError.
    """
    model = models.load_model(name, from_local, bits, models.number_format(dtype), trust_remote_code)
    check_length(model, name, longest)
    models.add_tokens(model, tokenizer, name, from_local, trust_remote_code)
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:  # masked, but it must be a token
        tokenizer.pad_token = tokenizer.eos_token
    engine = Engine(model, tokenizer)
    try:
        reason = check(engine, longest)
        sharding.shard(model)
    except ValueError as error:
        raise ModelError(f"--train_model_name {name}: {error}") from error
    if reason:
        print(f"{name} computes every prompt and answer in full, with the same results but slower: {reason}.")
    return engine


def load_frozen_engine(
    name: str,
    longest: int,
    tokens_per_micro_batch: int | None = None,
    from_local: bool = False,
    bits: int = 0,
    trust_remote_code: bool = False,
    dtype: str = "",
) -> Engine:
    """`load_engine` for a model that is only asked. tokens_per_micro_batch: None: by free memory. Raises ModelError."""
    tokenizer = models.load_tokenizer(name, from_local, trust_remote_code)
    engine = load_engine(name, tokenizer, longest, from_local, bits, trust_remote_code, dtype)
    engine.tokens_per_micro_batch = tokens_per_micro_batch or memory.inference_token_budget(engine.model)
    engine.frozen = True
    return engine


def may_lack_embeddings(engine: Engine) -> bool:
    """Whether the tokenizer has tokens that the model has no embeddings for. Often no text ever holds one."""
    return models.vocabulary_size(engine.tokenizer) > engine.model.get_input_embeddings().num_embeddings


def check_vocabulary(engine: Engine, name: str, largest: int) -> None:
    """ModelError if the model has no embedding for the largest token id of the prompts or their answers."""
    rows = engine.model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ModelError(
            f"the tokenizer of {name} gives token {largest} and has {len(engine.tokenizer)} tokens, but the model has "
            f"embeddings for {rows}: they do not belong together; give a folder with the model's own tokenizer"
        )


def length_limit(config) -> int | None:
    """How many tokens a model of this configuration can read; None if it does not say."""
    found = (getattr(config.get_text_config(), name, None) for name in LENGTH_LIMITS)
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def check_length(model, name: str, longest: int) -> None:
    """ModelError if a prompt and its answer, of so many tokens together, are more than the model can read."""
    limit = length_limit(model.config)
    if limit and longest > limit:
        raise ModelError(
            f"--max_prompt_length and --max_response_length make {longest} tokens, more than the {limit} tokens that "
            f"{name} can read; lower them"
        )


@torch.no_grad()
def check(engine: Engine, longest: int = 0, tolerance: float = 1e-3) -> str | None:
    """Compare an engine's states with the plain forward's on a small example; on a mismatch the engine falls back to
    the padded layout, or to the plain forward. Returns why it takes the plain one, or None.

    longest: tokens of a prompt and its answer at most; 0: not known.
    Raises ModelError for a model whose logits are not a known function of its last hidden state.
    """
    network = engine.network
    config = network.causal_lm.config.get_text_config()
    # 1. An example.
    size = min(network.head.weight.shape[0], 1000)
    prompts = [[(7 * i + 3) % size for i in range(12)], [(7 * i + 3) % size for i in range(5)] + [11, 12]]
    tree = Tree([-1, 5 % size, 6 % size, 7 % size], [-1, 0, 0, 1], [0, 1, 1, 2])
    # 2. Logits: the model's own against the engine's, of one forward: two of 8-bit weights may differ by more.
    transform = verified(network, prompts[0])
    if transform is None:
        raise ModelError(
            "this model's logits are not its output layer applied to its last hidden state, nor that with the factor "
            "or cap that its configuration names, so its answers could not be scored; choose another --train_model_name"
        )
    network.transform = transform
    # 3. States, in every layout that may be used.
    network.set_window(masks.window(config))
    if network.window and 0 < longest <= network.window:
        network.set_window(None)
    reason = masks.unsupported(config, longest)
    if reason is None:
        examples = prompts, [tree, tree]
        with _short_window(network) if network.window else contextlib.nullcontext():
            plain = network.plain_states(*examples)
            allowed = tolerance if plain.dtype == torch.float32 else 5e-2
            differences = [_difference(engine, layout, examples, plain, allowed) for layout in layouts(network)]
        reason = differences[-1]
        if any(differences):
            network.packed, network.min_separate_prefix = False, None
        elif network.packed and network.flex and not network.lockstep:
            network.packed = _gradients_agree(network, examples, 4 * allowed)
    network.plain = reason is not None
    return reason


def layouts(network: Network) -> list[tuple[bool, int | None]]:
    """(packed, min_separate_prefix) of all layouts that the network may choose from; every model that fits any of them
    fits the last one."""
    if not network.packed:
        return [(False, None)]
    separate = None if network.min_separate_prefix is None else 1
    return list(dict.fromkeys([(True, separate), (False, separate), (False, None)]))


def _difference(engine: Engine, layout, examples, plain: torch.Tensor, allowed: float) -> str | None:
    """How the states of the examples in this layout differ from the plain forward's, if by more than is allowed."""
    try:
        with engine.network.layout(*layout):
            states = torch.stack(engine.states(*examples)).float()
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError):
        return "its code does not accept an attention mask, positions or a KV cache from outside"
    error = float((states - plain.float()).norm() / plain.float().norm())
    if error < allowed:
        return None
    return f"with a shared prefix its numbers would differ by {error:.0e} of their size"


def _gradients_agree(network: Network, examples, allowed: float) -> bool:
    """Whether the prefix's keys and values get the same gradients in packed and in padded rows. flex_attention has a
    kernel of its own for them, which the states do not show, and which a card may not be able to run."""
    prompts, trees = examples
    length, found = common_prefix(prompts), []
    keys_values, _ = network.run_prefix(prompts[0][:length])
    try:
        for packed in (True, False):
            leaves = [tuple(x.detach().requires_grad_() for x in pair) for pair in keys_values]
            with network.layout(packed, None), torch.enable_grad():
                states = network.states(prompts, trees, Prefix(length, leaves)).float()
                weights = torch.linspace(-1, 1, states.numel(), device=states.device)
                gradients = torch.autograd.grad(weights @ states.flatten(), [x for pair in leaves for x in pair])
            found.append(torch.cat([x.float().flatten() for x in gradients]))
    except Exception as error:  # a compiler's and a kernel's errors have no type in common
        if memory.ran_out(error):
            raise
        return False
    return float((found[0] - found[1]).norm()) < allowed * float(found[1].norm())


@contextlib.contextmanager
def _short_window(network: Network, size: int = 4) -> Iterator[None]:
    """In here the window is so short that the small example shows whether the masks know it."""
    config, before = network.causal_lm.config.get_text_config(), network.window
    network.window = config.sliding_window = size
    try:
        yield
    finally:
        network.window = config.sliding_window = before
