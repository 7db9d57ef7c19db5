"""Tables of any kind: CSV, TSV, JSON Lines, Parquet and XLSX, read by pandas.

A cell is a text or None; whole numbers are written without decimals, however the file stores them. `row` in an error
counts as a spreadsheet does, the header being row 1; of JSON Lines it is the line.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from machine.errors import DataError
from tasks.readers import Record, read_jsonl, read_text, short_repr

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx")


@dataclass(frozen=True)
class Table:
    """A table's column names, its records, and the columns that the file itself stores as dates."""

    columns: list[str]
    records: list[Record]  # rows without any content are left out
    dates: set[str]

    def values(self, column: str) -> list[str]:
        """The column's cells that are not empty."""
        return [record[column] for _, record in self.records if (record[column] or "").strip()]


def is_table(path: str) -> bool:
    """Whether a path has a table's suffix."""
    return Path(path).suffix.lower() in SUFFIXES


def check_suffix(path: str | Path) -> None:
    """DataError for a file that is no table."""
    if not is_table(str(path)):
        raise DataError(f"{path}: is no table; a task's file ends in {', '.join(SUFFIXES)}.")


def read_table(path: str | Path) -> Table:
    """The table in a file. DataError if it cannot be read, or has no rows."""
    path = Path(path)
    check_suffix(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path.")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        return _from_objects(path)
    table = _from_frame(path, _spreadsheet(path, suffix) if suffix in (".xlsx", ".parquet") else _delimited(path))
    if not table.records:
        raise DataError(f"{path}: has a header but no rows.")
    return table


def _from_objects(path: Path) -> Table:
    """JSON Lines, or one JSON list of objects."""
    records = _json_list(path) if path.suffix.lower() == ".json" else None
    records = list(read_jsonl(path)) if records is None else records
    columns = list(dict.fromkeys(name for _, record in records for name in record))
    for number, record in records:
        nested = next((name for name, value in record.items() if isinstance(value, dict | list)), None)
        if nested is not None:
            raise DataError(f"{path}, line {number}: {nested} {short_repr(record[nested])} is not a text or a number.")
    return Table(columns, [(number, {c: _cell(r.get(c)) for c in columns}) for number, r in records], set())


def _json_list(path: Path) -> list[Record] | None:
    """The objects of a file that is one JSON list, numbered from 1; None if it is not."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}).") from error
    if not found or not all(isinstance(record, dict) for record in found):
        raise DataError(f"{path}: must hold a list of objects, or one object a line.")
    return list(enumerate(found, 1))


def _from_frame(path: Path, frame) -> Table:
    """The table of a pandas DataFrame."""
    columns = [str(name).strip() for name in frame.columns]
    unnamed = {c for c in columns if not c or re.fullmatch(r"Unnamed: \d+", c)}
    twice = next((c for c in columns if columns.count(c) > 1 and c not in unnamed), None)
    if twice is not None:
        raise DataError(f"{path}: has two columns {twice!r}; rename one.")
    kept = [i for i, name in enumerate(columns) if name not in unnamed]
    dates = {columns[i] for i in kept if frame.dtypes.iloc[i].kind == "M"}
    cells = {columns[i]: [_cell(value) for value in frame.iloc[:, i].tolist()] for i in kept}
    records = []
    for row in range(len(frame)):
        record = {name: values[row] for name, values in cells.items()}
        if any(value is not None and value.strip() for value in record.values()):
            records.append((row + 2, record))
    return Table(list(cells), records, dates)


def _cell(value) -> str | None:
    """A cell as text; None if it is empty."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else str(int(value)) if value.is_integer() else repr(value)
    if type(value).__name__ in ("NaTType", "NAType"):
        return None
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _spreadsheet(path: Path, suffix: str):
    """XLSX (the first sheet) or Parquet as a DataFrame."""
    import pandas

    try:
        if suffix == ".parquet":
            return pandas.read_parquet(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # styles that openpyxl does not know
            return pandas.read_excel(path, keep_default_na=False, na_values=[""])
    except Exception as error:  # whatever the reader raises: the file is not what its name says
        reason = " ".join(str(error).split())[:150]
        raise DataError(f"{path}: cannot be read as {suffix[1:].upper()} ({reason}).") from error


def _delimited(path: Path):
    """CSV or TSV as a DataFrame of texts."""
    import pandas

    text = read_text(path).replace("\r\n", "\n")
    if "\x00" in text:
        raise DataError(f"{path}: holds zero bytes, so it is no table of texts; save it as CSV with UTF-8.")
    separator = "\t" if path.suffix.lower() == ".tsv" else _separator(text)
    how = dict(sep=separator, dtype=str, keep_default_na=False, skip_blank_lines=False, header=None)
    if separator == "\t" and _unquoted(text):
        how["quoting"] = csv.QUOTE_NONE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            frame = pandas.read_csv(io.StringIO(text), **how)
    except (ValueError, pandas.errors.ParserWarning) as error:
        reason = " ".join(str(error).removeprefix("Error tokenizing data. C error: ").split())[:150]
        raise DataError(
            f"{path}: {reason}; a separator, a line break or a quotation mark is missing or too many."
        ) from error
    frame.columns = ["" if pandas.isna(name) else name for name in frame.iloc[0]]
    return frame.iloc[1:].reset_index(drop=True)


def _separator(text: str) -> str:
    """What stands most often between the names in the first line of a CSV file."""
    first = re.sub(r'"[^"]*"', "", text.lstrip("\n").split("\n", 1)[0])
    return max((",", ";", "\t", "|"), key=first.count)


def _unquoted(text: str) -> bool:
    """Whether a TSV file's quotation marks are part of its texts: each line has as many tabs as the header, and with
    quotes that close over line ends there would be fewer rows."""
    lines = [line for line in text.split("\n") if line.strip()]
    if any(line.count("\t") != lines[0].count("\t") for line in lines):
        return False
    try:
        rows = sum(1 for cells in csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True) if any(cells))
    except csv.Error:
        return True
    return rows < len(lines)


def to_number(text: str) -> float:
    """A number, with a comma or a point before its decimals. ValueError if it is none."""
    return float(text.strip().replace(",", "."))
