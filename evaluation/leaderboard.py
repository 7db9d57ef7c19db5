"""Leaderboard files of GLUE (TSV) and SuperGLUE (JSON Lines), and the zip that holds a suite's files.

Every id is copied from its row. A file appears under its name only when it is complete.
"""

import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tasks
from evaluation.metrics import Label, check_lengths, chosen_rows
from machine.files import write_atomically
from tasks import Task
from tasks.labels import number_range

HEADER = "index\tprediction"
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the same files give the same zip


def write_submission(
    path: str | Path,
    task: Task,
    rows: list[dict],
    predictions: Sequence[Label],
    majority_label: int | float,
    scores: Sequence[float] | None = None,
) -> int:
    """Write one leaderboard file. Returns how many of its answers were filled in because there was no valid one.

    A prediction of None is written as `majority_label`, the training set's most frequent class id (for a number task
    its mean). For ReCoRD an answer is a query's entity, chosen as in `metrics.chosen_rows` with `scores`, P(yes) per
    row; a query without one gets its first candidate. ValueError if the task has no leaderboard file, or if rows and
    predictions do not match.
    """
    if not task.submission:
        raise ValueError(f"{task.name} has no leaderboard file")
    check_lengths(task, rows, predictions, scores)
    if task.format == "record":
        chosen = chosen_rows(rows, predictions, scores)
        first = chosen_rows(rows, [1] * len(rows))
        filled = sum(position is None for position in chosen.values())
        entities = {query: rows[first[query] if at is None else at]["entity"] for query, at in chosen.items()}
        lines = [_json({"idx": query, "label": entity}) for query, entity in entities.items()]
    else:
        filled = sum(prediction is None for prediction in predictions)
        values = [_written(task, majority_label if p is None else p) for p in predictions]
        ids = [row["id"] for row in rows]
        if task.format == "multirc":
            lines = _multirc_lines(ids, values)
        elif task.submission.endswith(".tsv"):
            lines = [HEADER] + [f"{i}\t{value}" for i, value in zip(ids, values, strict=True)]
        else:
            lines = [_json({"idx": i, "label": value}) for i, value in zip(ids, values, strict=True)]
    text = "".join(line + "\n" for line in lines)
    write_atomically(Path(path), lambda file: file.write(text.encode()))
    return filled


def check_submission(path: str | Path, task: Task, rows: list[dict]) -> None:
    """Check a leaderboard file: one answer for each row (for ReCoRD: query), in order, each with a legal value.

    Raises ValueError with the file and the first line that is wrong.
    """
    path = Path(path)
    if path.name != task.submission:
        raise ValueError(f"{path}: {task.name}'s leaderboard file is named {task.submission}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    if lines.pop() != "":
        raise ValueError(f"{path}: the last line is incomplete; the file was cut off")
    tsv = path.suffix == ".tsv"
    if tsv and (not lines or lines.pop(0) != HEADER):
        raise ValueError(f"{path}, line 1: the header must be index<TAB>prediction")
    found = []  # (line number, id, value)
    for number, line in enumerate(lines, start=2 if tsv else 1):
        try:
            found += [(number, key, value) for key, value in _entries(task, line, tsv)]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {line[:80]!r} is not an answer of {task.name}") from error
    expected = _expected(task, rows)
    for (number, key, value), (wanted, legal) in zip(found, expected, strict=False):
        if key != (str(wanted) if tsv else wanted):
            raise ValueError(f"{path}, line {number}: the id is {key!r}, but {wanted!r} comes next")
        if not legal(value):
            raise ValueError(f"{path}, line {number}: {value!r} is not what {task.name} is answered with")
    if len(found) != len(expected):
        raise ValueError(f"{path}: {len(found)} answers, but {len(expected)} are expected")


def write_suite_zip(path: str | Path, suite: str, files: Iterable[str | Path]) -> None:
    """Pack a suite's leaderboard files, and nothing else, into a flat zip.

    Raises ValueError with every file that is missing (not given, or not there), unknown or given twice; then no zip is
    written.
    """
    wanted = [task.submission for task in tasks.suite(suite)]
    given = [Path(file) for file in files]
    names = [file.name for file in given]
    missing = [name for name in wanted if name not in names] + [str(file) for file in given if not file.is_file()]
    if missing:
        raise ValueError(f"the {suite} zip is not complete, missing: {', '.join(missing)}")
    unexpected = sorted({name for name in names if name not in wanted or names.count(name) > 1})
    if unexpected:
        raise ValueError(
            f"the {suite} zip holds each of its files once; unknown or given twice: {', '.join(unexpected)}"
        )

    def pack(target) -> None:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(given, key=lambda file: wanted.index(file.name)):
                entry = zipfile.ZipInfo(file.name, ZIP_TIME)
                archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)

    write_atomically(Path(path), pack)


def _written(task: Task, prediction: int | float) -> str | int:
    """How the leaderboard spells a class id or a number."""
    if task.number:
        low, high = number_range(task)
        return f"{min(max(float(prediction), low), high):.3f}"
    if prediction not in range(len(task.submission_words)):
        last = len(task.submission_words) - 1
        raise ValueError(f"{task.name}: prediction {prediction!r} is no class id; they are 0 to {last}")
    return task.submission_words[int(prediction)]


def _multirc_lines(ids: list[Sequence], values: list) -> list[str]:
    """One line per paragraph, questions and answers nested in it, all in the order of the rows."""
    paragraphs: dict = {}
    for (paragraph, question, answer), value in zip(ids, values, strict=True):
        answers = paragraphs.setdefault(paragraph, {}).setdefault(question, [])
        answers.append({"idx": answer, "label": value})
    return [
        _json({"idx": p, "passage": {"questions": [{"idx": q, "answers": a} for q, a in questions.items()]}})
        for p, questions in paragraphs.items()
    ]


def _entries(task: Task, line: str, tsv: bool) -> list[tuple]:
    """The (id, value) pairs that one line holds; ValueError, KeyError or TypeError if it is no such line."""
    if tsv:
        key, value = line.split("\t")
        return [(key, value)]
    entry = json.loads(line)
    if task.format != "multirc":
        return [(entry["idx"], entry["label"])]
    return [
        ((entry["idx"], question["idx"], answer["idx"]), answer["label"])
        for question in entry["passage"]["questions"]
        for answer in question["answers"]
    ]


def _expected(task: Task, rows: list[dict]) -> list[tuple[object, Callable]]:
    """The ids in the file's order, each with a test for the values it may have."""
    if task.format == "record":
        entities: dict = {}
        for row in rows:
            entities.setdefault(row["id"], []).append(row["entity"])
        return [(query, candidates.__contains__) for query, candidates in entities.items()]
    if task.number:
        return [(row["id"], lambda value: _is_written_number(task, value)) for row in rows]
    words = task.submission_words
    legal = [str(word) for word in words] if task.submission.endswith(".tsv") else list(words)

    def allowed(value: object) -> bool:
        return value in legal and not isinstance(value, bool)  # True == 1

    if task.format == "multirc":  # a paragraph's and a question's answers stand together in the file
        order: dict = {}
        for row in rows:
            paragraph, question, _ = row["id"]
            order.setdefault(paragraph, {}).setdefault(question, []).append(tuple(row["id"]))
        return [(key, allowed) for questions in order.values() for keys in questions.values() for key in keys]
    return [(row["id"], allowed) for row in rows]


def _is_written_number(task: Task, value: str) -> bool:
    whole, point, decimals = value.partition(".")
    plain = point and len(decimals) == 3 and (whole + decimals).isascii() and (whole + decimals).isdigit()
    low, high = number_range(task)
    return bool(plain) and low <= float(value) <= high


def _json(entry: dict) -> str:
    return json.dumps(entry, ensure_ascii=False)
