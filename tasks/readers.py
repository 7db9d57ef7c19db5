"""TSV, CSV and JSON Lines files to flat records. An error names the file and the line."""

from __future__ import annotations

import csv
import io
import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from machine.errors import DataError
from tasks.table import Task

WHOLE_NUMBER = re.compile("0|[1-9][0-9]{0,17}")  # an id that is the same when it is written out again
Record = tuple[int, dict]  # (1-based line number, column name -> value)

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


def short_repr(value: object) -> str:
    """A value for an error message: whole if it is short, and never too deeply nested to print."""
    return _repr.repr(value)


def read_records(task: Task, path: Path) -> Iterator[Record]:
    """A file's records, as its suffix says: .jsonl and .json hold an object a line, .csv has quotes, all else tabs."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        return read_jsonl(path)
    return _read_table(task, path, _csv_cells(path) if suffix == ".csv" else _tsv_cells(path))


def read_lines(path: Path) -> list[str]:
    """A text file's lines without their ends, and without empty lines at the end of the file."""
    # str.splitlines would also cut at characters such as U+2028 and U+0085, which stand inside texts.
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    while not lines[-1]:
        lines.pop()
    return lines


def find_column(names: Iterable[str], key: str) -> str:
    """The first of the alternatives "x|y" that is among the names; "" if none is."""
    return next((name for name in key.split("|") if name in names), "")


def read_text(path: Path) -> str:
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


def _tsv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Tab-separated lines, quoting off: hundreds of fields begin with a lone quotation mark."""
    return ((number, line.split("\t")) for number, line in enumerate(read_lines(path), 1))


def _csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Comma-separated values with quoting on: here a text may hold commas and line breaks."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    number, blank = 1, 0
    try:
        for cells in reader:
            if blank and cells:  # blank lines are of no account at the end alone
                yield blank, []
            blank = 0 if cells else number
            if cells:
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {number}: {error}; a quotation mark is not closed or not doubled.") from error


def _read_table(task: Task, path: Path, lines: Iterator[tuple[int, list[str]]]) -> Iterator[Record]:
    """Records from cells. A header is known by the names of the text columns; the order of the columns is free."""
    number, cells = next(lines)
    header, rest = cells, lines
    if not all(find_column(header, task.columns[name]) for name in task.fields):
        if not task.header or len(cells) != len(task.header):
            names, found = ", ".join(task.columns[name] for name in task.fields), ", ".join(map(short_repr, cells))
            raise DataError(
                f"{path}, line 1: no header with the columns {names} but {found[:300]}; is it {task.name}'s file?"
            )
        header, rest = list(task.header), chain([(number, cells)], lines)
    width, index = len(header), find_column(header, task.columns.get("id", ""))
    for number, cells in rest:
        # Empty surplus columns are allowed. The label stands last: RTE's train row 2164 has one just before it.
        while len(cells) > width and not cells[-2]:
            del cells[-2]
        while len(cells) > width and not cells[-1]:
            cells.pop()
        if len(cells) != width:
            found = f"{len(cells)} columns instead of {width} in {short_repr(cells)}"
            raise DataError(f"{path}, line {number}: {found}; a separator or line break is missing or too many.")
        record = dict(zip(header, cells, strict=True))
        if index and WHOLE_NUMBER.fullmatch(record[index]):
            record[index] = int(record[index])  # as the hub has it
        yield number, record


def read_jsonl(path: Path) -> Iterator[Record]:
    """The objects of a JSON Lines file."""
    for number, line in enumerate(read_lines(path), 1):
        try:
            record = json.loads(line)
            if "\\u" in line:
                json.dumps(record, ensure_ascii=False).encode()  # an escape can be half of a character
        except UnicodeEncodeError as error:
            found = f"{short_repr(error.object[error.start])} is half of a character"
            raise DataError(f"{path}, line {number}: {found}, whose other half is missing; correct it.") from error
        except (ValueError, RecursionError) as error:
            found = f"not JSON ({error}) in {short_repr(line)}"
            raise DataError(f"{path}, line {number}: {found}; the file needs one object a line.") from error
        if not isinstance(record, dict):
            found = f"{short_repr(line)} is not a JSON object"
            raise DataError(f"{path}, line {number}: {found}; the file needs one a line.")
        yield number, record
