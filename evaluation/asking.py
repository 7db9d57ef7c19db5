"""Texts that nobody has labelled: a trained model labels them, from Python or for `inference.py --text`.

    from inference import Classifier

    labels, probabilities = Classifier("exported").predict(["a warm and funny film", "dull"])

A text is a string; for a task of several texts (a premise and a statement, say) it is a dict of them, or the same as
JSON. Prompts, shared prefix and answers are those of every evaluation.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.folders import EMBEDDED
from evaluation.arguments import InferenceArguments, check
from machine.errors import ArgumentError
from machine.files import write_atomically
from run import model_options
from run.arguments import checked
from tasks import Task, splits
from tasks.labels import label_name

if TYPE_CHECKING:
    import numpy as np

    from evaluation.predictions import Prediction

STANDARD_INPUT = "-"
TABLE = "predictions.csv"


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    """What the model's folder says about options of inference.py that are not given otherwise.

    given: all options, as far as they are known. Raises ModelError for a folder that cannot be read; ArgumentError if
    texts are asked and no task is known.
    """
    name = given["train_model_name"]
    if not given["from_local"]:
        return {}
    task = given.get("task")
    if not task:
        task = model_options.task_of_model(Path(name))
        one = bool(task) and ("," not in task or Path(task).is_file())
        if given.get("text") and Path(name).is_dir() and not one:
            raise ArgumentError(
                f"--train_model_name {name} does not say which task it was trained on, or was on several; name one "
                "with --task"
            )
    options = {"task": task} | model_options.of_model(Path(name))
    if given.get("endpoint"):  # whatever the model was trained for, a server answers freely
        options = {name: value for name, value in options.items() if name not in ("answer_space", "number_answer")}
    return options


class Classifier:
    """A model that labels texts.

    Attributes:
        task: what is asked; `task.labels` are the names of the columns of `predict`'s probabilities (of a number task
            `task.words`).
        shortened: of the last texts, how many were too long and lost their end.
    """

    def __init__(self, train_model_name: str = EMBEDDED, task: str = "", **options):
        """train_model_name: an exported folder, a run's best/, or a model's name. task: only where the folder does not
        say it. options: others of inference.py, by their names (docs/arguments.md).

        Raises UserError, whose message is one sentence, for whatever cannot be used.
        """
        given = {"train_model_name": train_model_name, "task": task, "text": [STANDARD_INPUT], **options}
        given.setdefault("from_local", Path(train_model_name).is_dir())
        given["report_to"] = "none"
        known = defaults(given)
        given["task"] = task or known.get("task", "")
        self.arguments = checked(InferenceArguments, known | given)
        chosen = check(self.arguments)
        if len(chosen) > 1:
            raise ArgumentError(f"--task {self.arguments.task} names {len(chosen)} tasks; texts are asked of one")
        self.task = splits.labelled(chosen[0], splits.task_path(chosen[0], self.arguments.data_path))
        # Not at the top: this imports torch and transformers, which takes seconds, and bad input is refused without.
        from engine.loading import load_frozen_engine
        from evaluation import prompt_length

        how = dict(tokens_per_micro_batch=self.arguments.tokens_per_micro_batch, **self.arguments.model_options)
        self.engine = load_frozen_engine(train_model_name, **how)
        if self.arguments.max_prompt_length is None:  # no data say how long texts are: as long as the model can read
            limit = min(prompt_length.limit_of(self.arguments, train_model_name), prompt_length.WHOLE)
            self.arguments.max_prompt_length = int(limit)
        self.shortened = 0

    def predict(
        self, texts: Iterable[str | dict[str, str]], first: int = 1
    ) -> tuple[list[str | float | None], np.ndarray]:
        """Label texts: every text's label (a number, of a number task; None for a free answer that has none), and
        (texts, labels) the probabilities of all labels. These are NaN with --answer_space free, where none are known.

        first: the number of the first text, as errors name it. Raises ArgumentError for a text that is empty or not one
        of the task's; PromptError for one that does not fit.
        """
        import numpy as np

        answers = self.answer(rows_of(self.task, texts, first))
        unknown = np.full(len(self.task.words), np.nan, dtype=np.float32)
        chances = [unknown if answer.probabilities is None else answer.probabilities for answer in answers]
        labels = [label_name(self.task, answer.label) for answer in answers]
        return labels, np.array(chances, dtype=np.float32).reshape(len(answers), len(unknown))

    def answer(self, rows: list[dict]) -> list[Prediction]:
        """The answers to rows of the task, labelled or not."""
        from engine.batches import common_prefix
        from engine.loading import check_vocabulary
        from evaluation import answer_spaces, answering, calibration, predict

        options, engine, answers = self.arguments, self.engine, []
        prompt_ids, self.shortened = answering.build_prompts(
            self.task, rows, engine.tokenizer, [[]] * len(rows), options.use_CoT, options.max_prompt_length
        )
        check_vocabulary(
            engine, options.train_model_name, answer_spaces.largest_token(self.task, engine.tokenizer, prompt_ids)
        )
        engine.shared_length = common_prefix(prompt_ids)
        answer_format = answer_spaces.AnswerFormat(
            self.task, options.use_CoT, options.strict_format, options.number_answer
        )
        for start in range(0, len(rows), options.batch_sentence_num):
            answers += predict.predict(
                engine,
                answer_format,
                [list(ids) for ids in prompt_ids[start : start + options.batch_sentence_num]],
                options.answer_space,
                options.max_response_length,
                options.model_temperature if options.do_sample else 0.0,
                options.seed + start,
            )
        if options.calibration == "none":
            return answers
        asked = options.calibration, engine, answer_format, [[]] * len(rows), options.answer_space
        prior = calibration.prior_of(*asked, options.max_prompt_length)
        return calibration.corrected_predictions(answer_format, answers, prior)


def rows_of(task: Task, texts: Iterable[str | dict[str, str]], first: int = 1) -> list[dict]:
    """Unlabelled rows of a task. Raises ArgumentError for a text that is empty, or has not the task's fields."""
    return [{"id": number, **_fields(task, text, number), "label": None} for number, text in enumerate(texts, first)]


def _fields(task: Task, text: str | dict[str, str], number: int) -> dict[str, str]:
    names = ", ".join(task.fields)
    if len(task.fields) > 1 and isinstance(text, str):
        try:
            text = json.loads(text)
        except ValueError:
            text = None
    if isinstance(text, str) and len(task.fields) == 1:
        text = {task.fields[0]: text}
    if not isinstance(text, dict) or not all(isinstance(text.get(name), str) for name in task.fields):
        example = json.dumps(dict.fromkeys(task.fields, "..."))
        raise ArgumentError(f"text {number} must hold {names} of {task.name}; give {example}")
    for name in task.fields:
        if not text[name].strip():
            raise ArgumentError(
                f"text {number} is empty" + (f" ({name})" if len(task.fields) > 1 else "") + "; leave it out"
            )
    return {name: text[name] for name in task.fields}


def check_texts(arguments: InferenceArguments) -> None:
    """ArgumentError for options that have no place beside `--text`."""
    if arguments.calibration == "batch":
        raise ArgumentError("--calibration batch takes the mean over many rows; use contextual for --text")
    given = {"resume": arguments.resume, "submission": arguments.submission, "split": arguments.split}
    if Path(arguments.data_path or ".").is_file():
        given["data_path"] = arguments.data_path
    for name, value in given.items():
        if value:
            raise ArgumentError(f"--{name} {value} answers rows of files, and --text a text; give one of them")


def read_texts(given: list[str]) -> Iterator[str]:
    """The texts of `--text`, one after the other; `-` stands for the lines of standard input. Raises ArgumentError."""
    for text in given:
        if text == STANDARD_INPUT:
            yield from _lines()
        else:
            yield text


def _lines() -> Iterator[str]:
    first = True
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ArgumentError(f"--text -: line {number} of standard input is not UTF-8; convert it") from error
        first = False
        yield text


def line(task: Task, text: str | dict, label: str | float | None, probabilities: np.ndarray) -> str:
    """One answer for a terminal: the label, its probability where it is known, and the text, with tabs between."""
    known = label is not None and not task.number and probabilities[0] == probabilities[0]
    chance = f"{probabilities[task.labels.index(label)]:.3f}" if known else ""
    shown = f"{label:.3f}" if task.number and label is not None else label if label is not None else "(none)"
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return "\t".join([shown, *([chance] if not task.number else []), " ".join(text.split())])


def write_table(path: Path, task: Task, rows: list[dict], answers: list[Prediction]) -> None:
    """Write predictions.csv: every row's texts, its label and, where they are known, the probabilities of all labels
    (of a number task none)."""
    known = not task.number and all(answer.probabilities is not None for answer in answers)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*task.fields, "label", *(f"probability_{label}" for label in (task.labels if known else ()))])
    for row, answer in zip(rows, answers):
        label = label_name(task, answer.label)
        chances = [f"{chance:.6f}" for chance in answer.probabilities] if known else []
        table.writerow([*(row[name] for name in task.fields), "" if label is None else label, *chances])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
