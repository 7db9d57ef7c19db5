"""The text around a task's row, and how it is made of a table's column and label names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MOST_IN_TAGS, MOST_CHARACTERS = 10, 600  # of labels that a built instruction lists, or lists at all
MOST_IN_QUESTION = 4


@dataclass(frozen=True)
class Wording:
    """The text around a task's row.

    `{words}` stands for the task's label words ("negative or positive") and, in the instruction, `{answers}` for the
    same words between tags; of a number task both are a few of its numbers. All other braces are fields of the row.
    The instruction has none of them, because all prompts of the task share it.
    """

    instruction: str
    body: str
    question: str


def escaped(text: str) -> str:
    """Text as it stands in a wording: its braces are no fields."""
    return text.replace("{", "{{").replace("}", "}}")


def spoken(name: str) -> str:
    """A column's name in a sentence: `customer_message` -> `customer message`."""
    return " ".join(name.replace("_", " ").split())


def built(
    columns: Mapping[str, str], label: str, words: Sequence[str], number: bool, descriptions: Mapping[str, str]
) -> Wording:
    """The wording of a table's task.

    columns: the row's fields with their columns' names. label: the label's column. descriptions: what some of the
    words mean, by word.
    """
    label = escaped(spoken(label))
    noun = "a text" if len(columns) == 1 else "the parts of a text"
    if number:
        task = f"Read {noun} and give its {label} as a number from {words[0]} to {words[-1]}."
    else:
        task = f"Read {noun} and choose its {label}."
    meanings = "".join(f" {escaped(described(word, text))}" for word, text in descriptions.items())
    if number or (len(words) <= MOST_IN_TAGS and sum(map(len, words)) <= MOST_CHARACTERS):
        answers = " Possible answers: {answers}."
    elif sum(map(len, words)) <= MOST_CHARACTERS:
        answers = " Possible answers: {words}."
    else:  # a prompt has no room for them; the labels mode chooses among them all the same
        answers = ""
    names = {field: escaped(spoken(column)) for field, column in columns.items()}
    few = not number and len(words) <= MOST_IN_QUESTION and sum(map(len, words)) <= MOST_CHARACTERS // 10
    return Wording(
        instruction=f"{task}{meanings}{answers}",
        body="\n".join(f"{name[:1].upper()}{name[1:]}: {{{field}}}" for field, name in names.items()),
        question=f"{label[:1].upper()}{label[1:]}" + (" ({words}):" if few else ":"),
    )


def described(word: str, text: str) -> str:
    """A label's meaning as a sentence of an instruction."""
    text = text.strip()
    return f"{word}: {text}" + ("" if text.endswith((".", "!", "?")) else ".")
