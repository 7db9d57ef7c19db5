"""A task of one's own as a YAML file: what a Task and its Wording hold, checked field by field.

    name: tickets                     # the file's name without its suffix, if left out
    files: tickets.csv                # or train, validation and test, each a file beside this one
    columns: {subject: subject, body: body, label: queue}      # the prompt's names of the columns
    labels: [billing, bug]            # as the file spells them; left out: those of the training file
    words: [money, bug]               # as the model answers; left out: the labels in lower case
    descriptions: {billing: invoices and refunds}              # what labels mean, for the instruction
    instruction: "Choose the queue of a ticket. {descriptions} Possible answers: {answers}."
    body: "Subject: {subject}\\n{body}"
    question: "Queue ({words}):"
    metrics: [accuracy, macro_f1]     # their mean is the score
    range: [0, 10]                    # a number task's lowest and highest number, in place of labels
    step: 0.5                         # between its answers

The same file is kept in a run's folder as task.yaml, so a checkpoint knows its task. `task: SST` begins with a task of
the table, and the other fields replace what they name.
"""

from __future__ import annotations

import difflib
import string
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from pathlib import Path

from machine.errors import DataError
from machine.files import write_atomically
from tasks import guessing, tables, wording
from tasks.labels import fold
from tasks.table import CLASS_METRICS, NUMBER_METRICS, OWN_METRICS, TASKS, Task, get
from tasks.wording import Wording

FILE = "task.yaml"  # in a run's folder
SUFFIXES = (".yaml", ".yml")
SPLITS = ("train", "validation", "test")
TEXTS = ("name", "task", "instruction", "body", "question", "step", "version")
FIELDS = (*TEXTS, "files", "columns", "passage", "labels", "words", "descriptions", "range", "metrics")
MOST_NUMBERS = 1001  # answers of a number task


class _Field(Exception):
    """What is wrong with a field: its name, and a sentence about it."""


def is_task_file(name: str) -> bool:
    """Whether a path has the suffix of a YAML file."""
    return Path(name).suffix.lower() in SUFFIXES


def read_task(path: str | Path) -> Task:
    """The task in a YAML file. Without `labels` or `columns` its training file is read too.

    Raises DataError that names the file, the field, its value and the way out.
    """
    path = Path(path)
    given = _read(path)
    try:
        return _task(path, given)
    except _Field as error:
        name, problem = error.args
        raise DataError(f"{path}: `{name}` {problem}.") from error


def write_task(path: str | Path, task: Task, files: bool = True) -> None:
    """Write the file from which `read_task` reads this very task, wherever the file lies.

    files: name the task's own tables; without them it can be asked, and its paths are told to nobody.
    """
    import yaml

    known = TASKS.get(task.name) if task.format != "table" else None
    content: dict = {"task" if task.name in TASKS else "name": task.name}
    if known is None:
        if files:
            paths = {split: [str(_absolute(task, name)) for name in names] for split, names in task.files.items()}
            content["files"] = paths
        content["columns"] = {name: task.columns[name] for name in (*task.fields, "label")}
        content |= {"passage": list(task.passage), "metrics": list(task.metrics), "version": task.version}
    if known is None or (known.labels, known.words) != (task.labels, task.words):
        if task.number:
            content |= {"range": [task.words[0], task.words[-1]]}
            content |= {"step": str(Decimal(task.words[1]) - Decimal(task.words[0]))}
        else:
            content |= {"labels": list(task.labels), "words": list(task.words)}
    if task.wording is not None:
        content |= {name: getattr(task.wording, name) for name in ("instruction", "body", "question")}
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=120)
    write_atomically(Path(path), lambda file: file.write(text.encode()))


def _absolute(task: Task, name: str) -> Path:
    return (Path(task.folder) / name).absolute()


def _read(path: Path) -> dict:
    """A YAML file's fields; every scalar is a text, so that no label becomes a truth value or a number."""
    import yaml

    try:
        given = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; --task names a task, a table or a YAML file.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:200]}).") from error
    if not isinstance(given, dict):
        raise DataError(f"{path}: a task's file must hold lines of the form `name: value`; its fields are "
                        f"{', '.join(FIELDS)}.")  # fmt: skip
    for name in given:
        if name not in FIELDS:
            near = difflib.get_close_matches(str(name), FIELDS, n=1)
            meant = f"did you mean `{near[0]}`? " if near else ""
            raise DataError(f"{path}: `{name}` is no field of a task; {meant}The fields are {', '.join(FIELDS)}.")
    for name in TEXTS:
        if name in given and (not isinstance(given[name], str) or not given[name].strip()):
            raise DataError(f"{path}: `{name}` must be a text, not {given[name]!r}.")
    return given


def _task(path: Path, given: dict) -> Task:
    base = _base(path, given)
    task = base or Task(name=path.stem, folder="", files={}, columns={}, fields=(), metrics=())
    task = replace(task, name=given.get("name", task.name), version=_version(given, task))
    if base is None or "files" in given:
        task = replace(task, folder="", files=_files(path, given), format="table", header=(), trim=False)
        task = replace(task, hub=("", None), hub_splits={}, wheel="")
    if "columns" in given or not task.columns:
        columns = _columns(given) if "columns" in given else guessing.guess_columns(_training_file(task))
        fields = tuple(name for name in columns if name != "label")
        task = replace(task, columns=columns, fields=fields, passage=fields)
    if "passage" in given:
        task = replace(task, passage=_passage(given, task))
    task = _with_answers(given, task)
    task = replace(task, metrics=_metrics(given, task))
    return replace(task, wording=_wording(given, task))


def _base(path: Path, given: dict) -> Task | None:
    """The table's task that `task` names."""
    if "task" not in given:
        name = given.get("name", path.stem)
        if name in TASKS:
            raise _Field("name", f"{name} is a task of the table; choose another, or write `task: {name}` to change it")
        return None
    try:
        base = get(given["task"])
    except ValueError as error:
        raise _Field("task", f"{given['task']}: {str(error).rstrip('.')}") from error
    if given.get("name", base.name) != base.name:
        raise _Field("name", f"{given['name']} is not that of `task`, {base.name}; leave it out")
    return base


def _version(given: dict, task: Task) -> int:
    text = given.get("version", str(task.version))
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise _Field("version", f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def _files(path: Path, given: dict) -> dict[str, tuple[str, ...]]:
    files = given.get("files")
    if files is None and "columns" in given and ("labels" in given or "range" in given):
        return {}  # all that asking texts needs
    if isinstance(files, str):
        files = {"train": files}
    if not isinstance(files, dict) or not files:
        raise _Field("files", "must name a table, or one for each of train, validation and test")
    found = {}
    for split, names in files.items():
        names = [names] if isinstance(names, str) else names
        if split not in SPLITS:
            raise _Field("files", f"has {split!r}, which is none of {', '.join(SPLITS)}")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            raise _Field("files", f"must name a file for {split}, not {names!r}")
        found[split] = tuple(str((path.parent / name).absolute()) for name in names)
        tables.check_suffix(found[split][0])
    return found


def _training_file(task: Task) -> str:
    if "train" not in task.files:
        raise _Field("files", "names no training file, so `columns` and `labels` must be given")
    return task.files["train"][0]


def _columns(given: dict) -> dict[str, str]:
    columns = given["columns"]
    if not isinstance(columns, dict) or not all(isinstance(c, str) and c for c in columns.values()):
        raise _Field("columns", "must name a column for each field, such as {text: message, label: queue}")
    if "label" not in columns or len(columns) < 2:
        raise _Field("columns", "must name a column for `label`, and one for a field of any name")
    for name in columns:
        if not name.isidentifier() or name in guessing.RESERVED - {"label"}:
            raise _Field("columns", f"has the field {name!r}; choose a word of letters, digits and _, none of "
                                    f"{', '.join(sorted(guessing.RESERVED))}")  # fmt: skip
    return columns


def _passage(given: dict, task: Task) -> tuple[str, ...]:
    names = given["passage"] if isinstance(given["passage"], list) else [given["passage"]]
    for name in names:
        if name not in task.fields:
            raise _Field("passage", f"has {name!r}, which is none of {', '.join(task.fields)}")
    return tuple(names)


def _with_answers(given: dict, task: Task) -> Task:
    """The task with its labels and words, or its numbers."""
    if "range" in given or "step" in given:
        for name in ("labels", "words", "descriptions"):
            if name in given:
                raise _Field(name, "has no place beside `range`: a number task has no labels")
        return replace(task, number=True, labels=(), words=_numbers(given))
    if "labels" in given:
        labels = _distinct("labels", given["labels"])
        task = replace(task, number=False, labels=labels, words=_words(labels), submission_words=(), submission="")
    elif task.format == "table" and not task.labels and not task.number:
        task = guessing.with_answers(task, _training_file(task))
    if "words" in given:
        if task.number:
            raise _Field("words", "has no place in a number task; give `range` and `step`")
        words = given["words"]
        if isinstance(words, dict):
            words = [_of_label("words", words, task).get(label, label) for label in task.labels]
        words = _words(_distinct("words", words))
        if len(words) != len(task.labels):
            raise _Field("words", f"has {len(words)} words for {len(task.labels)} labels ({', '.join(task.labels)})")
        task = replace(task, words=words)
    return task


def _numbers(given: dict) -> tuple[str, ...]:
    ends = given.get("range")
    if not isinstance(ends, list) or len(ends) != 2:
        raise _Field("range", "must be the lowest and the highest number, such as [0, 10]")
    try:
        low, high = (Decimal(end) for end in ends)
        step = Decimal(given.get("step", str(guessing.step_for(float(low), float(high)))))
        wrong = not low.is_finite() or not high.is_finite() or not step.is_finite() or low >= high or step <= 0
    except (InvalidOperation, TypeError, ValueError, OverflowError) as error:
        raise _Field("range", f"{ends} and `step` {given.get('step', '')} must be numbers") from error
    if wrong:
        raise _Field("range", f"{ends} must rise, and `step` be greater than 0")
    steps = (high - low) / step
    if steps != int(steps) or steps >= MOST_NUMBERS:
        raise _Field("step", f"{step} must divide `range` {ends} into whole steps, at most {MOST_NUMBERS - 1}")
    return guessing.numbers(low, high, step)


def _distinct(name: str, values) -> tuple[str, ...]:
    """A list of two or more texts that answers can tell apart."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _Field(name, "must be a list of texts")
    problem = guessing.label_problem(values)
    if problem:
        raise _Field(name, problem)
    return tuple(values)


def _words(labels: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(label.lower() for label in labels)


def _of_label(name: str, values: dict, task: Task) -> dict[str, str]:
    """A text for some of the labels."""
    for label, text in values.items():
        if label not in task.labels:
            near = next((known for known in task.labels if fold(known) == fold(label)), None)
            hint = f"; did you mean {near!r}?" if near else f"; the labels are {', '.join(task.labels)}"
            raise _Field(name, f"has {label!r}, which is no label{hint}")
        if not isinstance(text, str) or not text.strip():
            raise _Field(name, f"must have a text for {label!r}, not {text!r}")
    return values


def _metrics(given: dict, task: Task) -> tuple[str, ...]:
    if "metrics" not in given:
        return task.metrics or (NUMBER_METRICS if task.number else OWN_METRICS)
    names = given["metrics"] if isinstance(given["metrics"], list) else [given["metrics"]]
    two = len(task.labels) == 2
    known = NUMBER_METRICS if task.number else tuple(m for m in CLASS_METRICS if two or m != "f1")
    known += tuple(m for m in task.metrics if m not in known)
    wrong = next((name for name in names if name not in known), None)
    if wrong is not None or not names or len(set(names)) < len(names):
        raise _Field("metrics", f"must be some of {', '.join(known)}, each once, not {wrong or names!r}")
    return tuple(names)


def _wording(given: dict, task: Task) -> Wording | None:
    """The wording that the fields give; what is left out is built, and a table's task keeps its own."""
    descriptions = given.get("descriptions", {})
    if not isinstance(descriptions, dict):
        raise _Field("descriptions", "must have a text for each label, such as {billing: invoices and refunds}")
    descriptions = _of_label("descriptions", descriptions, task)
    texts = {name: given[name] for name in ("instruction", "body", "question") if name in given}
    if task.name in TASKS:  # its own wording is in prompts.py, whole
        if 0 < len(texts) < 3 or (descriptions and not texts):
            raise _Field("instruction", "must be given together with `body` and `question`")
        if not texts:
            return None
    words = {task.words[task.labels.index(label)]: text for label, text in descriptions.items()}
    columns = {field: task.columns[field] for field in task.fields}
    usual = wording.built(columns, task.columns["label"], task.words, task.number, words)
    found = replace(usual, **texts)
    if descriptions and "instruction" in given:
        if "{descriptions}" not in found.instruction:
            raise _Field("instruction", "has no {descriptions}, but there are `descriptions`")
        meanings = wording.escaped(" ".join(wording.described(word, text) for word, text in words.items()))
        found = replace(found, instruction=found.instruction.replace("{descriptions}", meanings))
    _check_places("instruction", found.instruction, {"words", "answers"}, task)
    _check_places("body", found.body, {"words", *task.fields}, task)
    _check_places("question", found.question, {"words", *task.fields}, task)
    for field in task.fields:
        if f"{{{field}}}" not in found.body + found.question:
            raise _Field("body", f"has no {{{field}}}, so the model would not see that column")
    return found


def _check_places(name: str, text: str, known: set[str], task: Task) -> None:
    """_Field if braces in a text are not these places."""
    try:
        found = [place for _, place, _, _ in string.Formatter().parse(text) if place is not None]
    except ValueError as error:
        raise _Field(name, f"has a brace that is not closed ({error}); write {{{{ for a brace") from error
    for place in found:
        if place not in known:
            what = ", ".join(f"{{{place}}}" for place in sorted(known))
            raise _Field(name, f"has {{{place}}}; what can stand in braces here is {what}")
    if name == "instruction" and any(f"{{{field}}}" in text for field in task.fields):
        raise _Field(name, "must be the same for every row; put the row's texts into `body`")


def keep_task(folder: Path, task: Task) -> None:
    """Write a run's task.yaml, unless it is the table's task as it stands there."""
    if TASKS.get(task.name) != task:
        write_task(folder / FILE, task)


def task_of_run(folder: Path, name: str) -> Task:
    """The task of this name that a run in this folder was of. ValueError if there is none."""
    return read_task(folder / FILE) if (folder / FILE).is_file() else get(name)


def kept_task(model: str) -> Path | None:
    """The task.yaml of the run that a checkpoint's folder belongs to, or that lies in the folder itself."""
    folder = Path(model)
    return next((path for path in (folder / FILE, folder.absolute().parent / FILE) if path.is_file()), None)
