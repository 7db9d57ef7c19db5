"""A model's engine: loaded, checked against the plain forward, and ready to be asked or trained."""

import torch

from engine import attention, models
from engine.engine import Engine
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
) -> Engine:
    """The engine of a model, sharded if it was launched for that, and checked.

    longest: tokens of a prompt and its answer at most. The others: see models.load_model.
    Raises ModelError, also if the model cannot read so many tokens.
    """
    model = models.load_model(name, from_local, bits, trust_remote_code=trust_remote_code)
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
        print(f"This model does not fit the shared-prefix forward ({reason}); the plain one is used, which is slower.")
    return engine


def load_frozen_engine(
    name: str,
    longest: int,
    tokens_per_micro_batch: int | None = None,
    from_local: bool = False,
    bits: int = 0,
    trust_remote_code: bool = False,
) -> Engine:
    """`load_engine` for a model that is only asked. tokens_per_micro_batch: None: by free memory. Raises ModelError."""
    tokenizer = models.load_tokenizer(name, from_local, trust_remote_code)
    engine = load_engine(name, tokenizer, longest, from_local, bits, trust_remote_code)
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
    the plain forward. Returns why, or None.

    longest: tokens of a prompt and its answer at most: the example is too short to show what an attention window leaves
    out. Raises ModelError for a model whose logits are not its output layer applied to its last hidden state.
    """
    network = engine.network
    # 1. An example, and its states by the plain forward.
    size = min(network.head.weight.shape[0], 1000)
    prompts = [[(7 * i + 3) % size for i in range(12)], [(7 * i + 3) % size for i in range(5)] + [11, 12]]
    tree = Tree([-1, 5 % size, 6 % size, 7 % size], [-1, 0, 0, 1], [0, 1, 1, 2])
    plain = network.plain_states(prompts, [tree, tree]).float()
    # 2. Logits: the model's own against the engine's.
    weights_type = network.head.weight.dtype
    tolerance = tolerance if plain.dtype == weights_type else 5e-2
    logits = network.causal_lm(torch.tensor([prompts[0]], device=network.device)).logits[0, -1].float()
    found = network.logits(plain[0, 0].to(weights_type))
    if not torch.allclose(found, logits, rtol=tolerance, atol=10 * tolerance):
        raise ModelError(
            "this model changes its logits after the output layer, which is not supported; "
            "choose another --train_model_name"
        )
    # 3. States, in every layout that may be used.
    reason = None
    window = attention.window(network.causal_lm.config.get_text_config())
    if window and longest > window:
        reason = f"it attends to the last {window} tokens, and there may be {longest}"
    layouts = ((False, None), (False, 1), (True, 1)) if network.packed else ((False, None),)
    for packed, min_separate_prefix in layouts:
        try:
            with network.layout(packed, min_separate_prefix):
                shared = torch.stack(engine.states(prompts, [tree, tree])).float()
            error = float((shared - plain).norm() / plain.norm())
            reason = reason or (f"relative error {error:.1e}" if not error < tolerance else None)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError) as problem:
            reason = reason or f"{type(problem).__name__}: {problem}".splitlines()[0]
    network.plain = reason is not None
    return reason
