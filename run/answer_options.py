"""The options that decide what is made of the labels' probabilities: checked, filled in, and put in words."""

from collections.abc import Iterable

from machine.errors import ArgumentError
from run.arguments import Arguments, one_of
from tasks import Task

NUMBER_ANSWERS = ("mean", "likeliest")


def fill_in_number_answer(arguments: Arguments) -> None:
    """`--number_answer`: by default the mean. ArgumentError for one where answers are generated or sampled."""
    if arguments.answer_space != "free" and not getattr(arguments, "do_sample", False):
        arguments.number_answer = arguments.number_answer or NUMBER_ANSWERS[0]
        one_of("number_answer", arguments.number_answer, NUMBER_ANSWERS)
    elif arguments.number_answer:
        raise ArgumentError(
            f"--number_answer {arguments.number_answer} is decided by the labels' probabilities, and --answer_space "
            "free and --do_sample True answer what was generated; leave it out"
        )


def answers_text(arguments: Arguments, chosen: Iterable[Task]) -> str:
    """How these tasks are answered, for people: "labels answers"; where numbers are among them, also which."""
    of_numbers = {"mean": ", the mean of the numbers", "likeliest": ", the likeliest number", "": ""}
    more = of_numbers[arguments.number_answer] if any(task.number for task in chosen) else ""
    return f"{arguments.answer_space} answers{more}"
