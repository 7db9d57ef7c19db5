"""The options that decide what is made of the labels' probabilities: checked, filled in, and put in words."""

from collections.abc import Iterable

from machine.errors import ArgumentError
from run.arguments import Arguments, one_of
from tasks import Task

NUMBER_ANSWERS = ("mean", "likeliest")
CALIBRATIONS = ("none", "contextual", "batch", "pmi")


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


def check_calibration(arguments: Arguments) -> None:
    """ArgumentError unless `--calibration` has probabilities of the labels right after the prompt to correct."""
    one_of("calibration", arguments.calibration, CALIBRATIONS)
    if arguments.calibration == "none":
        return
    if arguments.answer_space == "free" or arguments.use_CoT or arguments.do_sample:
        raise ArgumentError(
            f"--calibration {arguments.calibration} corrects the labels' probabilities right after the prompt: use "
            "--answer_space labels or score, and leave --use_CoT and --do_sample at False"
        )
    if arguments.calibration == "pmi" and arguments.answer_space != "score":
        raise ArgumentError(
            "--calibration pmi compares the labels' likelihoods among all tokens: use --answer_space score, or "
            "--calibration contextual"
        )


def answers_text(arguments: Arguments, chosen: Iterable[Task]) -> str:
    """How these tasks are answered, for people: "labels answers"; where numbers are among them, also which, and a
    calibration."""
    of_numbers = {"mean": ", the mean of the numbers", "likeliest": ", the likeliest number", "": ""}
    more = of_numbers[arguments.number_answer] if any(task.number for task in chosen) else ""
    calibration = getattr(arguments, "calibration", "none")
    more += "" if calibration == "none" else f", {calibration} calibration"
    return f"{arguments.answer_space} answers{more}"
