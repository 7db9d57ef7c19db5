"""A run's predictions: prompts built for many rows, answered in batches that are saved as they come, and read back.

What ppo.py and sft.py answer when they evaluate is kept in the same form: predictions.jsonl has the answers of the
last evaluation, to which the summary's `after` belongs (the best one is chosen by the same rows, and so looks better
than it is), and predictions-before.jsonl those of the first.
"""

import json
import os
import tempfile
from array import array
from pathlib import Path

from tqdm.auto import tqdm

import prompts
import rewards
from engine.batches import common_prefix
from engine.engine import Engine
from evaluation import predict, scores
from evaluation.predict import Prediction
from machine import processes
from machine.errors import ArgumentError
from tasks import Task, splits

FILE = "predictions.jsonl"
BEFORE = "predictions-before.jsonl"
UNFINISHED = f".{FILE}"  # the same file while batches are still added to it
PROMPTS_AT_ONCE = 1000


def build_prompts(
    task: Task, rows: list[dict], tokenizer, shots: list[list[dict]], use_CoT: bool, max_prompt_length: int
) -> tuple[list[array], int]:
    """Every row's prompt with its demonstrations, and how many prompts lost text. PromptError if one cannot fit.

    The token ids are packed: as Python integers those of some 400,000 rows would take gigabytes.
    """
    packed: list[array] = []
    shortened = 0
    while len(packed) < len(rows):
        start = end = len(packed)
        while end < min(start + PROMPTS_AT_ONCE, len(rows)) and shots[end] is shots[start]:
            end += 1
        built, cut = prompts.build_all(task, rows[start:end], tokenizer, use_CoT, max_prompt_length, shots[start])
        packed += [array("i", ids) for ids in built]
        shortened += cut
    return packed, shortened


def answer(
    folder: Path, task: Task, rows: list[dict], packed: list[array], engine: Engine, batch: int, seed: int, **how
) -> list[Prediction]:
    """The answers to all prompts, also written to predictions.jsonl, which is there only when it is whole.

    What an interrupted run left is kept, in whole batches of `batch` rows, and not computed again; each batch has a
    random stream of its own. `how` goes to evaluation.predict. ArgumentError if the folder's answers are to other rows.
    """
    final, unfinished = folder / FILE, folder / UNFINISHED
    if processes.broadcast_from_main(final.exists):
        return [prediction for prediction, _ in read(final, task, rows)]
    known = processes.broadcast_from_main(lambda: read(unfinished, task, rows) if unfinished.exists() else [])
    if len(known) < len(rows):
        known = known[: len(known) // batch * batch]
    answers = [prediction for prediction, _ in known]
    engine.shared_length = common_prefix(packed)
    main = processes.is_main()
    shown = dict(unit="row", desc=task.name, dynamic_ncols=True, disable=not main)
    with (
        tqdm(total=len(rows), initial=len(known), **shown) as bar,
        open(unfinished, "ab") if main else tempfile.TemporaryFile() as file,
    ):
        file.truncate(sum(len(line.encode()) + 1 for _, line in known))
        for start in range(len(known), len(rows), batch):
            ids = [list(prompt) for prompt in packed[start : start + batch]]
            found = predict.predict(engine, task, ids, seed=seed + start, **how)
            texts = engine.tokenizer.batch_decode(ids)
            lines = [as_line(task, *parts) for parts in zip(rows[start : start + batch], texts, found)]
            file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
            answers += found
            bar.update(len(found))
    if main:
        os.replace(unfinished, final)
    return answers


def write(folder: Path, task: Task, rows: list[dict], packed: list, found: list[Prediction], tokenizer, first: bool):
    """Keep the answers of an evaluation in training in place of the last one's; those of the `first` stay for good."""
    if not processes.is_main():
        return
    folder.mkdir(exist_ok=True)
    texts = tokenizer.batch_decode(packed)
    lines = [json.dumps(as_line(task, *parts), ensure_ascii=False) for parts in zip(rows, texts, found)]
    for name in (BEFORE, FILE) if first else (FILE,):
        aside = folder / f".new-{name}"
        aside.write_bytes("".join(f"{line}\n" for line in lines).encode())
        os.replace(aside, folder / name)


def details(folder: Path, task: Task, rows: list[dict], data_path: str) -> dict:
    """`evaluation.details` of the answers in predictions.jsonl; empty where there are none to these rows."""
    try:
        answers = [prediction for prediction, _ in read(folder / FILE, task, rows)]
    except (FileNotFoundError, ArgumentError) as error:
        print(f"No intervals in summary.json: {error}")
        return {}
    return scores.details(task, rows, answers, splits.majority_label(task, rows, data_path)[0])


def as_line(task: Task, row: dict, prompt: str, prediction: Prediction) -> dict:
    """What predictions.jsonl holds of one row. Labels stand under their names; null: the answer does not parse."""
    line = {"id": row["id"], "prompt": prompt, "answer": prediction.text, "label": named(task, prediction.label)}
    line |= {"gold": named(task, row["label"])}
    if row["label"] is not None:
        line["correct"] = rewards.is_correct(task, prediction.label, row["label"])
    if task.candidates:  # what the row's metrics compare
        line |= {"entity": row["entity"], "answers": row["answers"]}
    return line | (
        {}
        if prediction.last_label_probability is None
        else {"probability_of_last_label": prediction.last_label_probability}
    )


def named(task: Task, label: int | float | None) -> str | float | None:
    """A label as people read it: the class's name, or the number."""
    return label if label is None or task.number else task.labels[label]


def read(path: Path, task: Task, rows: list[dict]) -> list[tuple[Prediction, str]]:
    """The predictions in a file and their lines, in the order of the rows; a last line that was cut off is left out.

    ArgumentError if they are not about these rows.
    """
    known = []
    for line, row in zip(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], rows):
        entry = json.loads(line)
        if entry["id"] != row["id"] or entry["gold"] != named(task, row["label"]):
            raise ArgumentError(
                f"{path} answers row {entry['id']} where the data has row {row['id']}: the data changed"
            )
        label = entry["label"]
        if label is not None and not task.number:
            label = task.labels.index(label)
        known.append((Prediction(entry["answer"], label, entry.get("probability_of_last_label")), line))
    return known
