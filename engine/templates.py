"""Chat templates: programs that come with a tokenizer and turn a conversation into text. They are chosen and tried when
a tokenizer is loaded, and rendered here alone, as what they do is not known: they may raise, ask for the date, leave
texts out, or begin every answer with a thought."""

import contextlib
import re
from collections.abc import Iterator
from datetime import datetime

from machine.errors import ModelError

USER, ANSWER, THOUGHT = "text0of0a0user", "text0of0an0answer", "text0of0a0thought"  # no template has these words
TAG = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|◁[^◁▷]*▷")
OF_A_THOUGHT = re.compile(r"think|thought|reason", re.IGNORECASE)
CLOSING = re.compile(r"/|end", re.IGNORECASE)


def prepare(tokenizer, name: str) -> None:
    """Settle on one chat template if there are several, and try it. Raises ModelError.

    name: the model's, for the message.
    """
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        if "default" not in templates:
            raise ModelError(
                f"the model {name} has several chat templates ({', '.join(sorted(templates))}), and none of them is "
                "called default; rename one, or choose another model"
            )
        tokenizer.chat_template = templates["default"]
    check(tokenizer)
    thought_end(tokenizer)


def check(tokenizer, demonstrations: int = 0) -> None:
    """ModelError if the tokenizer's template cannot render a question behind so many solved ones, or leaves texts out:
    a template that keeps the last question only would take the demonstrations away in silence."""
    if tokenizer.chat_template is None:
        return
    turns = range(demonstrations + 1)
    messages = conversation([f"{USER}{i}." for i in turns], [f"{ANSWER}{i}." for i in turns[1:]])
    text, end = render(tokenizer, messages), 0
    for message in messages:
        found = text.find(message["content"], end)
        if found < 0:
            raise ModelError(
                f"the chat template of {tokenizer.name_or_path} leaves out the {message['role']}'s text in "
                f"{_roles(messages)}; correct its chat_template, or choose another model"
            )
        end = found + len(message["content"])


def set_time(tokenizer, moment: datetime) -> None:
    """Render the tokenizer's template, which may ask for the date, as if it were this moment (a naive local time)."""
    tokenizer.template_time = moment


def conversation(users: list[str], answers: list[str]) -> list[dict[str, str]]:
    """The turns of a user and an assistant, by turns, as a chat template takes them."""
    messages = []
    for i, user in enumerate(users):
        messages.append({"role": "user", "content": user})
        messages += [{"role": "assistant", "content": answer} for answer in answers[i : i + 1]]
    return messages


def render(tokenizer, messages: list[dict[str, str]], begin_answer: bool = True) -> str:
    """The conversation as text, with the beginning of an assistant's turn (`begin_answer`) behind it.

    Raises ModelError if the template cannot be rendered.
    """
    try:
        with _clock(getattr(tokenizer, "template_time", None)):
            # enable_thinking is for models that would otherwise reason at length first; other templates ignore it.
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=begin_answer, enable_thinking=False
            )
    except Exception as error:  # a template is somebody else's program, and may raise anything
        lines = str(error).strip().splitlines()
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} cannot render {_roles(messages)} "
            f"({type(error).__name__}: {lines[0] if lines else 'no message'}); correct its chat_template, or choose "
            "another model"
        ) from error


def thought_end(tokenizer) -> str:
    """What ends the thought that the tokenizer's template begins every answer with; "" if it begins none.

    Raises ModelError if the template shows no way to end it: the answer would be a part of the thought.
    """
    if tokenizer.chat_template is None:
        return ""
    begun = render(tokenizer, conversation([USER], [])).rpartition(USER)[2]
    tags = [tag for tag in TAG.findall(begun) if OF_A_THOUGHT.search(tag)]
    if not tags or CLOSING.search(tags[-1]):
        return ""
    messages = [*conversation([USER], []), {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}]
    with contextlib.suppress(ModelError):
        text = render(tokenizer, messages, begin_answer=False)
        between = re.search(f"{THOUGHT}(.*?){ANSWER}", text, re.DOTALL)
        if between and any(CLOSING.search(tag) for tag in TAG.findall(between[1])):
            return between[1]
    # The template drops thoughts, or leaves them to the text; it, or the vocabulary, may know the tag all the same.
    newline, known = begun.endswith("\n"), tokenizer.get_added_vocab()
    for tag in _closing_tags(tags[-1]):
        if tag in tokenizer.chat_template or tag in known:
            return f"\n{tag}\n\n" if newline else tag
    raise ModelError(
        f"the chat template of {tokenizer.name_or_path} begins every answer with a thought ({tags[-1]}) and shows no "
        "way to end it, so no answer could stand behind it; correct its chat_template, or choose another model"
    )


def _closing_tags(opening: str) -> list[str]:
    """<think> -> </think>; <|think|> -> <|/think|>, too; <|begin_of_thought|> -> <|end_of_thought|>."""
    tags = [f"{opening[0]}/{opening[1:]}"]
    tags += [f"<|/{opening[2:]}"] if opening.startswith("<|") else []
    for begin, end in (("begin", "end"), ("start", "end"), ("BEGIN", "END"), ("START", "END")):
        tags += [opening.replace(begin, end)] if begin in opening else []
    return tags


def _roles(messages: list[dict[str, str]]) -> str:
    return "a conversation of " + ", ".join(message["role"] for message in messages)


@contextlib.contextmanager
def _clock(moment: datetime | None) -> Iterator[None]:
    """`strftime_now` in a template gives this moment; None: the real one."""
    if moment is None:
        yield
        return

    from transformers.utils import chat_template_utils

    class Clock:
        @staticmethod
        def now() -> datetime:
            return moment

    real, chat_template_utils.datetime = chat_template_utils.datetime, Clock
    try:
        yield
    finally:
        chat_template_utils.datetime = real
