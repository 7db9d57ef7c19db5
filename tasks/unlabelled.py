"""Tables of new texts, whose labels nobody knows yet."""

from __future__ import annotations

from pathlib import Path

from machine.errors import DataError
from tasks.guessing import TEXT
from tasks.readers import find_column
from tasks.table import Task
from tasks.tables import is_table, read_table


def unlabelled_rows(task: Task, path: str | Path) -> list[dict] | None:
    """The rows of a table that has the task's texts and no labels; None for every other file.

    The texts stand in columns of the task's own names; those of a task of one text may also bear a usual name, such as
    `text`. Raises DataError for a table that cannot be read, and for an empty text.
    """
    if task.candidates or not is_table(str(path)) or not Path(path).is_file():
        return None
    table = read_table(path)
    columns = {name: find_column(table.columns, task.columns[name]) or name for name in task.fields}
    if len(task.fields) == 1 and columns[task.fields[0]] not in table.columns:
        usual = [column for name in TEXT for column in table.columns if column.casefold() == name]
        columns = {task.fields[0]: next(iter(usual), "")}
    label = find_column(table.columns, task.columns["label"])
    if not all(column in table.columns for column in columns.values()) or (label and table.values(label)):
        return None
    rows: list[dict] = []
    for number, record in table.records:
        for column in columns.values():
            if not (record[column] or "").strip():
                raise DataError(f"{path}, row {number}: {column} is empty; leave the row out, or write a text there.")
        rows.append({"id": len(rows), **{n: record[c] for n, c in columns.items()}, "label": None})
    return rows
