"""Original TSV, TXT, CSV and JSONL files, or the hub, to rows: plain dicts, one per answer the model has to give.

A row holds `id` as in the file (its position where the file has none), the task's text fields, its extras, and `label`:
a class id, a float (STS-B), or None where it is not known. Every reader turns its source into flat records with the
hub's column names (a dict per row), so that files and hub share one way from there on.

Nothing is skipped, repaired or trimmed in silence. What cannot be read raises `DataError` with file, line and value.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import random
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import chain
from pathlib import Path

from rewards import fold
from tasks import Task

DATA_ROOT = Path(__file__).resolve().parent / "data"
SPLITS = ("train", "validation", "test")
MAX_CHARACTERS = 50_000  # a field this long is no text but a quote or line end that swallowed the rows after it
NEAR_NEUTRAL = 0.5  # MR: a mean rating closer to 0 than this is neither positive nor negative
HELD_OUT = 1000  # MR: rows in each of validation and test
WHOLE_NUMBER = re.compile("0|[1-9][0-9]{0,17}")  # an id that is the same when it is written out again

Row = dict
Record = tuple[int, dict]  # (1-based line number, column name -> value)

_shown = reprlib.Repr()  # a value in an error: whole if it is short, never nested too deeply to print
_shown.maxstring = _shown.maxother = 60


class DataError(ValueError):
    """Data that is missing or cannot be read: one sentence with file, 1-based line, the value, and the way out."""


class MissingData(DataError):
    """A split that is nowhere to be found, as against one that is there and cannot be read."""


def load(task: Task, split: str, data_root: str | Path = DATA_ROOT, data_path: str | Path | None = None) -> list[Row]:
    """The rows of a task's split, in file order.

    data_path: a file in one of the task's formats, or a folder with the task's files; read instead of
    `data_root/<task.folder>`, and then nothing else is tried. Without it, an installed package or the hub answers
    where the file is missing. Rows of train and validation are labelled. The labels of a task without a label set
    stay names until `with_labels` has given it one.

    Raises ValueError for an unknown split, and DataError.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; the splits are {', '.join(SPLITS)}.")
    given = Path(data_path) if data_path is not None else None
    if given is not None and not os.path.isdir(given):  # Path.is_dir raises for some odd paths
        if not os.path.isfile(given):
            raise MissingData(f"{given}: no such file or folder (data_path for {task.name}); check the path.")
        return _from_file(task, split, given)
    folder = given if given is not None else Path(data_root) / task.folder
    candidates = [folder / name for name in task.files.get(split, ())]
    for path in candidates:
        if os.path.isfile(path):
            return _from_file(task, split, path)
    tried = " or ".join(str(path) for path in candidates) or f"a {split} file (there is none for {task.name})"
    if given is not None:
        raise MissingData(f"{task.name} {split}: cannot find {tried}; put the file there or give another data_path.")
    if task.wheel:
        return _from_wheel(task, split, tried)
    return _from_hub(task, split, tried)


def with_labels(task: Task, rows_or_file: Iterable[Row] | str | Path) -> Task:
    """The task with its label set: itself if it has one, else a copy with the sorted labels of training rows.

    rows_or_file: rows that `load` returned for the task without labels, or the training file. Load the rows once more
    with the new task to get class ids. The words are the labels in lower case; labels that no answer could tell apart
    (they differ in case, or "_", "-" and " ", alone) raise DataError, as does a single label.
    """
    if task.labels or task.number:
        return task
    rows = load(task, "train", data_path=rows_or_file) if isinstance(rows_or_file, str | Path) else rows_or_file
    labels = tuple(sorted({row["label"] for row in rows}))
    words = tuple(label.lower() for label in labels)
    if len({fold(word) for word in words}) != len(words) or len(words) < 2:
        raise DataError(f"{task.name}: the labels {_shown.repr(', '.join(labels))} are not two or more distinct words.")
    return replace(task, labels=labels, words=words, submission_words=labels)


def training_rows(task: Task, rows: list[Row], seed: int) -> list[Row]:
    """The rows to train on: all of them, but for a task with candidates one right and one wrong row per id.

    The choice depends on the seed and the row order alone. An id without a right or a wrong candidate gives one row.
    """
    if not task.candidates:
        return rows
    groups: dict = {}
    for row in rows:
        groups.setdefault(row["id"], ([], []))[row["label"]].append(row)
    choose = random.Random(seed).choice
    return [choose(side) for wrong, right in groups.values() for side in (right, wrong) if side]


# ------------------------------------------------------------------------------------------------------- sources


def _from_file(task: Task, split: str, path: Path) -> list[Row]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        records = _read_jsonl(path)
    else:
        records = _read_table(task, path, _csv_cells(path) if suffix == ".csv" else _tsv_cells(path))
    return _finish(task, split, records, str(path), "line")


def _from_wheel(task: Task, split: str, tried: str) -> list[Row]:
    """A file inside an installed package, which is found but never imported: it need not work, only lie there."""
    package, _, inside = task.wheel.partition("/")
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if os.path.isfile(Path(location) / inside):
            return _from_file(task, split, Path(location) / inside)
    raise MissingData(
        f"{task.name} {split}: cannot find {tried}, nor {task.wheel} in an installed package; run scripts/setup.sh, "
        f"which installs {package}, or put the file there."
    )


def _from_hub(task: Task, split: str, tried: str) -> list[Row]:
    name = "/".join(part for part in task.hub if part)
    failed, way_out = f"{task.name} {split}: cannot find {tried}, and", "data/README.md says where the file goes."
    if not name:
        raise MissingData(f"{failed} the hub does not have this task; {way_out}")
    if split not in task.hub_splits:
        raise MissingData(f"{failed} hub {name} has no such split; {way_out}")
    try:
        import datasets  # takes seconds, and only this function needs it

        table = datasets.load_dataset(*task.hub, split=task.hub_splits[split])
    except Exception as error:  # whatever the hub client raises, the user needs both sources in one message
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise MissingData(f"{failed} hub {name} did not answer ({reason}); {way_out}") from error
    return _finish(task, split, enumerate(table, 1), f"hub {name} {task.hub_splits[split]}", "row")


# ------------------------------------------------------------------------------------------------ files to records


def _text(path: Path) -> str:
    """The file's text without a byte order mark."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file's permissions.") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8."
        ) from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty; download it again.")
    return text


def _lines(path: Path) -> list[str]:
    # str.splitlines would also cut at characters such as U+2028 and U+0085, which stand inside texts.
    lines = [line.removesuffix("\r") for line in _text(path).split("\n")]
    while not lines[-1]:
        lines.pop()
    return lines


def _tsv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Tab-separated lines, quoting off: hundreds of fields begin with a lone quotation mark."""
    return ((number, line.split("\t")) for number, line in enumerate(_lines(path), 1))


def _csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Comma-separated values with quoting on: here a text may hold commas and line breaks."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    number = 1
    try:
        for cells in reader:
            yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {number}: {error}; a quotation mark is not closed or not doubled.") from error


def _read_table(task: Task, path: Path, lines: Iterator[tuple[int, list[str]]]) -> Iterator[Record]:
    """Records from cells. A header is known by the names of the text columns; the order of the columns is free."""
    number, cells = next(lines)
    header, rest = cells, lines
    if not all(_find(header, task.columns[name]) for name in task.fields):
        if not task.header or len(cells) != len(task.header):
            names, found = ", ".join(task.columns[name] for name in task.fields), _shown.repr(cells)
            raise DataError(
                f"{path}, line 1: no header with the columns {names} but {found}; is it {task.name}'s file?"
            )
        header, rest = list(task.header), chain([(number, cells)], lines)
    width, index = len(header), _find(header, task.columns.get("id", ""))
    for number, cells in rest:
        # Empty surplus columns are allowed. The label stands last: RTE's train row 2164 has one just before it.
        while len(cells) > width and not cells[-2]:
            del cells[-2]
        while len(cells) > width and not cells[-1]:
            cells.pop()
        if len(cells) != width:
            found = f"{len(cells)} columns instead of {width} in {_shown.repr(cells)}"
            raise DataError(f"{path}, line {number}: {found}; a separator or line break is missing or too many.")
        record = dict(zip(header, cells, strict=True))
        if index and WHOLE_NUMBER.fullmatch(record[index]):
            record[index] = int(record[index])  # as the hub has it
        yield number, record


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), 1):
        try:
            record = json.loads(line)
            if "\\u" in line:
                json.dumps(record, ensure_ascii=False).encode()  # an escape can be half of a character
        except UnicodeEncodeError as error:
            found = f"{_shown.repr(error.object[error.start])} is half of a character"
            raise DataError(f"{path}, line {number}: {found}, whose other half is missing; correct it.") from error
        except (ValueError, RecursionError) as error:
            found = f"not JSON ({error}) in {_shown.repr(line)}"
            raise DataError(f"{path}, line {number}: {found}; the file needs one object a line.") from error
        if not isinstance(record, dict):
            found = f"{_shown.repr(line)} is no JSON object"
            raise DataError(f"{path}, line {number}: {found}; the file needs one a line.")
        yield number, record


# ------------------------------------------------------- records of the formats in which a line is not simply a row


def _mrpc(task: Task, split: str, records: Iterable[Record], source: str) -> Iterator[Record]:
    """msr_paraphrase_train.txt holds train and validation; the id pairs in dev_ids.tsv beside it are validation."""
    path = Path(source)
    if split == "test" or path.name not in ("msr_paraphrase_train.txt", "train.txt"):
        yield from records
        return
    ids = path.with_name("dev_ids.tsv")
    if not os.path.isfile(ids):
        raise DataError(f"{ids}: not found; {path.name} is split by it, put it there or use train.tsv and dev.tsv.")
    pairs = {tuple(line.split("\t")) for line in _lines(ids)}
    for number, record in records:
        if ((record["#1 ID"], record["#2 ID"]) in pairs) == (split == "validation"):
            yield number, record


def _wsc(task: Task, split: str, records: Iterable[Record], source: str) -> Iterator[Record]:
    """The spans lie in `target` in the file; the hub has them flat."""
    return ((number, record | record.get("target", {})) for number, record in records)


def _multirc(task: Task, split: str, records: Iterable[Record], source: str) -> Iterator[Record]:
    """A line per paragraph with its questions and their answers, to a record per answer; the hub has it flat."""
    for number, record in records:
        if "paragraph" in record:
            yield number, record | {"idx": [record["idx"][name] for name in ("paragraph", "question", "answer")]}
            continue
        for question in record["passage"]["questions"]:
            for answer in question["answers"]:
                flat = {"paragraph": record["passage"]["text"], "question": question["question"]}
                flat |= {"idx": [record["idx"], question["idx"], answer["idx"]], "answer": answer["text"]}
                yield number, flat | ({"label": answer["label"]} if "label" in answer else {})


def _record(task: Task, split: str, records: Iterable[Record], source: str) -> Iterator[Record]:
    """A line per passage with its entities and queries, to a record per query and candidate entity.

    Candidates are the distinct entity texts in order of appearance; one that is a gold answer's text is right.
    """
    for number, record in records:
        if "qas" in record:
            passage = record["passage"]["text"]
            spans = sorted((span["start"], span["end"]) for span in record["passage"]["entities"])
            entities = [passage[start : end + 1] for start, end in spans]  # `end` is inclusive
            queries = [
                (qa["query"], qa["idx"], [answer["text"] for answer in qa.get("answers", ())]) for qa in record["qas"]
            ]
        else:
            passage, entities = record["passage"], record["entities"]
            queries = [(record["query"], record["idx"]["query"], record["answers"])]
        for name, texts in (("entities", entities), *(("answers", answers) for _, _, answers in queries)):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"the {name} {_shown.repr(texts)} are not a list of texts")
        if not all(entity.strip() for entity in entities) or not entities:
            raise ValueError("the passage has no entities, or an empty one, so its queries have no candidates")
        for query, index, answers in queries:
            flat = {"idx": index, "passage": passage, "query": query, "answers": list(dict.fromkeys(answers))}
            for entity in dict.fromkeys(entities):
                yield number, flat | {"entity": entity} | ({"label": entity in answers} if answers else {})


def _mr(task: Task, split: str, records: Iterable[Record], source: str) -> Iterator[Record]:
    """Sentences with a mean sentiment in [-4, 4], to positive and negative ones in a fixed split.

    Near-neutral sentences are left out. The others are put in the order of the SHA-256 of their id; the first go to
    test, the next to validation (1000 each, or a fifth if the file is small), the rest to train. Sentences that are
    equal but for case and spaces stay together, under the id of the first of them.
    """
    groups: dict[str, list[Record]] = {}
    for number, record in records:
        sentiment = float(record["sentiment"])
        if not -4 <= sentiment <= 4:
            raise ValueError(f"sentiment {sentiment} is not in [-4, 4]")
        if abs(sentiment) >= NEAR_NEUTRAL:
            text = " ".join(record["text"].split()).casefold()
            groups.setdefault(text, []).append((number, record | {"id": record["id"], "label": int(sentiment > 0)}))
    size = min(HELD_OUT, sum(map(len, groups.values())) // 5)
    parts: dict[str, list[Record]] = {"test": [], "validation": [], "train": []}
    for group in sorted(groups.values(), key=lambda group: sha256(str(group[0][1]["id"]).encode()).digest()):
        part = next((name for name in ("test", "validation") if len(parts[name]) + len(group) <= size), "train")
        parts[part] += group
    yield from sorted(parts[split], key=lambda record: record[0])


FORMATS: dict[str, Callable] = {"mrpc": _mrpc, "wsc": _wsc, "multirc": _multirc, "record": _record, "mr": _mr}


# ------------------------------------------------------------------------------------------------- records to rows


def _finish(task: Task, split: str, records: Iterable[Record], source: str, unit: str) -> list[Row]:
    """Checked rows from records. `source` and `unit` ("line" of a file, "row" of the hub) say in an error where."""
    rows: list[Row] = []
    keys: dict[str, str] = {}
    number = 0  # of the record at work, for errors: a format may read ahead

    def counted() -> Iterator[Record]:
        nonlocal number
        for entry in records:
            number = entry[0]
            yield entry

    unfold = FORMATS.get(task.format)
    ids = {label.lower(): index for index, label in enumerate(task.labels)}
    if not any(name.isdecimal() for name in ids):  # else a number is a name
        ids |= {str(index): index for index in range(len(ids))}
    try:
        for entry in unfold(task, split, counted(), source) if unfold else counted():
            number, record = entry
            if not rows:
                keys = {name: _find(record, key) for name, key in task.columns.items()}
                for name in task.fields if split == "test" else (*task.fields, "label"):
                    if not keys[name]:
                        raise KeyError(task.columns[name])
            row = {"id": len(rows)} | {name: record[key] if key else None for name, key in keys.items()}
            if row["id"] is None:
                row["id"] = len(rows)
            for part in row["id"] if task.format == "multirc" and isinstance(row["id"], list) else [row["id"]]:
                if isinstance(part, bool) or not isinstance(part, int) and not _is_word(part):
                    raise ValueError(f"id {_shown.repr(part)} is neither a whole number nor a word")
            for name in task.fields:
                row[name] = _checked(name, row[name], task.trim)
            if keys["label"]:
                # How a test split says that its labels are secret: nothing, and on the hub -1.
                secret = split == "test" and row["label"] in ((None, -1) if unit == "row" else (None,))
                row["label"] = None if secret else _label(task, ids, row["label"])
            rows.append(row)
    except DataError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        problem = f"the key or column {error} is missing" if isinstance(error, KeyError) else str(error)[:300]
        raise DataError(f"{source}, {unit} {number}: {problem}; correct it, or compare with data/README.md.") from error
    if not rows:
        raise DataError(f"{source}: no {split} rows; the file is cut off, or it is not {task.name}'s file.")
    return rows


def _find(names: Iterable[str], key: str) -> str:
    """The first of the alternatives "x|y" that is among the names, or "" if none is."""
    return next((name for name in key.split("|") if name in names), "")


def _checked(name: str, text, trim: bool) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{name} {_shown.repr(text)} is not a text")
    if len(text) >= MAX_CHARACTERS:
        cause = "a line break or quotation mark before it is probably broken"
        raise ValueError(f"{name} {text[:40]!r}... has {len(text)} characters (limit {MAX_CHARACTERS}): {cause}")
    return text.removesuffix(" ") if trim else text


def _label(task: Task, ids: dict[str, int], value) -> int | float | str:
    """Class id of a label written as word, number or JSON boolean; the float itself; the word if no set is known."""
    if task.number:
        if isinstance(value, bool) or not 0 <= float(value) <= 5:
            raise ValueError(f"label {_shown.repr(value)} is not in [0, 5]")
        return float(value)
    if not task.labels:
        if not value or not _is_word(value) or "<" in value:  # the tag after an answer begins with it
            raise ValueError(f"label {_shown.repr(value)} is not a word")
        return value
    label = ids.get(str(value).lower()) if isinstance(value, str | int | float) else None
    if label is None:
        raise ValueError(f"label {_shown.repr(value)} is none of {', '.join(ids)}")
    return label


def _is_word(value) -> bool:
    """A text on one line, with nothing around it that an answer or a leaderboard file would lose."""
    return isinstance(value, str) and value.isprintable() and value == value.strip()
