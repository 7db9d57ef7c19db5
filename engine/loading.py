"""A model and its engine, loaded, checked and ready to be asked or trained."""

from transformers import PreTrainedModel

from engine import models
from engine.engine import Engine
from machine import sharding
from machine.errors import ModelError
from machine.memory import asking_tokens
from run.arguments import Arguments


def load_model(name: str, tokenizer, arguments: Arguments) -> tuple[PreTrainedModel, str | None]:
    """The model, cut up if it was launched for that, and why its engine must use the plain forward (None: it need not).

    Raises ModelError, also if the model cannot read as many tokens as the arguments allow.
    """
    how = arguments.from_local, arguments.load_in_8bit
    model = models.load_model(name, *how, trust_remote_code=arguments.trust_remote_code)
    check_length(model, name, arguments.max_prompt_length + arguments.max_response_length)
    try:
        problem = Engine(model, tokenizer).check(arguments.max_prompt_length + arguments.max_response_length)
        sharding.cut(model)
    except ValueError as error:
        raise ModelError(f"--train_model_name {name}: {error}") from error
    if problem:
        print(f"This model does not fit the shared-prefix forward ({problem}); the plain one is used, which is slower.")
    return model, problem


def load_engine(name: str, arguments: Arguments) -> Engine:
    """The engine of a model that is only asked. Raises ModelError."""
    tokenizer = models.load_tokenizer(name, arguments.from_local, arguments.trust_remote_code)
    model, problem = load_model(name, tokenizer, arguments)
    engine = Engine(model, tokenizer, arguments.tokens_per_micro_batch or asking_tokens(model))
    engine.plain, engine.frozen = problem is not None, True
    return engine


def check_length(model, name: str, tokens: int) -> None:
    """ModelError if a prompt and its answer, of so many tokens together, are more than the model can read."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and tokens > longest:
        raise ModelError(
            f"--max_prompt_length and --max_response_length make {tokens} tokens, more than the {longest} tokens that "
            f"{name} can read; lower them"
        )
