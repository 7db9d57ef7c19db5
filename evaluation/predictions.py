"""The files that hold a run's predictions: a line for each row, written whole and read back.

predictions.jsonl has the answers of the last evaluation, to which the summary's `after` belongs (the best evaluation is
chosen on the same rows, so its score is biased upwards). ppo.py and sft.py also keep those of the first evaluation, in
predictions-before.jsonl.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

import rewards
from machine import processes
from machine.errors import ArgumentError
from machine.files import read_json_lines, write_atomically
from tasks import Task
from tasks.labels import label_from_name, label_name

FILE = "predictions.jsonl"
BEFORE = "predictions-before.jsonl"
UNFINISHED = f".{FILE}"  # the same file while batches are still added to it


@dataclass
class Prediction:
    """One answer.

    Attributes:
        label: None if the text does not parse.
        last_label_probability: where it is known.
        probabilities: (labels,) of all labels; files keep those of unlabelled rows, and unfinished ones.
        likeliest: where the label is a mean of numbers the likeliest of them.
    """

    text: str
    label: int | float | None
    last_label_probability: float | None = None
    probabilities: np.ndarray | None = field(default=None, compare=False, repr=False)
    likeliest: float | None = None


def write(
    folder: Path, task: Task, rows: list[dict], prompt_ids: list, found: list[Prediction], tokenizer, first: bool
) -> None:
    """Replace the answers of the last evaluation in training; those of the `first` evaluation are also kept apart."""
    if not processes.is_main():
        return
    data = b"".join(encoded_lines(task, rows, tokenizer.batch_decode(prompt_ids), found))
    for name in (BEFORE, FILE) if first else (FILE,):
        write_atomically(folder / name, lambda file: file.write(data))


def encoded_lines(
    task: Task, rows: list[dict], prompts: list[str], found: list[Prediction], keep_probabilities: bool = False
) -> Iterable[bytes]:
    """The lines of predictions.jsonl for these rows, line ends included.

    keep_probabilities: for an unfinished file, whose labels are chosen when all rows are answered.
    """
    for row, prompt, prediction in zip(rows, prompts, found):
        line = _line(task, row, prompt, prediction)
        if keep_probabilities:
            line["probabilities"] = prediction.probabilities.tolist()
        yield json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _line(task: Task, row: dict, prompt: str, prediction: Prediction) -> dict:
    """What predictions.jsonl holds of one row. Labels are written by name; null: the answer does not parse."""
    line = {"id": row["id"], "prompt": prompt, "answer": prediction.text}
    line |= {"label": label_name(task, prediction.label), "gold": label_name(task, row["label"])}
    if row["label"] is None and prediction.probabilities is not None:  # who asks new texts wants all of them
        line["probabilities"] = [round(float(chance), 6) for chance in prediction.probabilities]
    if row["label"] is not None:
        line["correct"] = rewards.is_correct(task, prediction.label, row["label"])
    if task.candidates:  # what the row's metrics compare
        line |= {"entity": row["entity"], "answers": row["answers"]}
    if prediction.last_label_probability is not None:
        line["probability_of_last_label"] = prediction.last_label_probability
    if prediction.likeliest is not None:
        line["likeliest"] = prediction.likeliest
    return line


def read(path: Path, task: Task, rows: list[dict]) -> list[Prediction]:
    """The predictions in a file, in the order of the rows; an incomplete last line is left out.

    Raises ArgumentError if they are not about these rows, or if a line is broken.
    """
    try:
        lines = list(islice(read_json_lines(path), len(rows)))
    except ValueError as error:
        raise ArgumentError(f"{error}; remove this line and all after it") from error
    found = []
    for line, row in zip(lines, rows):
        if line["id"] != row["id"] or line["gold"] != label_name(task, row["label"]):
            raise ArgumentError(
                f"{path} answers row {line['id']} where the data has row {row['id']}: the data changed; put it back as "
                "it was, or start a new run"
            )
        label = label_from_name(task, line["label"])
        last = line.get("probability_of_last_label")
        probabilities = np.array(line["probabilities"]) if "probabilities" in line else None
        found.append(Prediction(line["answer"], label, last, probabilities, line.get("likeliest")))
    return found
