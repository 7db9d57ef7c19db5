"""Files and folders that are written whole or not at all, and JSON Lines, which grow line by line."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from machine.errors import DataError

UNFINISHED_PREFIX = ".new-"  # of what is still being written; a killed run leaves it behind


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write(file)` on a file beside `path` and rename it: a reader sees the old file or the new one, no part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{UNFINISHED_PREFIX}{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # temporary files are private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, data: dict) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines of text to a file; on return they are on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path, convert: Callable[[dict], dict] = dict) -> Iterator[dict]:
    """The converted objects of a JSON Lines file. A last line without its end was cut off by a kill, and is left out.

    Raises DataError, with the path and the line, for any other line that is not an object or that `convert` refuses.
    """
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith("\n"):
                return
            try:
                line = json.loads(text)
                if not isinstance(line, dict):
                    raise ValueError("not an object")
                line = convert(line)
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{path}, line {number} cannot be read ({error}); correct it, or remove it and all lines after it"
                ) from error
            yield line


def free_name(path: Path) -> Path:
    """This name, or the first of name-2, name-3, ... that is not taken."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def remove_folder(folder: Path) -> None:
    """Remove a folder, if there is one; a kill in the middle leaves no half of it under its name."""
    if folder.is_dir():
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".old-"))
        os.replace(folder, aside)
        shutil.rmtree(aside)


def fsync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, so that a power cut cannot undo a rename in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
