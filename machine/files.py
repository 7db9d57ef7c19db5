"""Files and folders that are written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def write_atomically(path: Path, write: Callable) -> None:
    """Writes beside the target and renames, so that `path` is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # temporary files are private
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def write_json(path: Path, data: dict) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".new-{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json_lines(path: Path, convert: Callable[[dict], dict] = dict) -> Iterator[dict]:
    """The converted objects of a JSON Lines file. A last line without its end was cut off by a kill, and is left out.

    Raises ValueError, with the path and the line, for any other line that is not an object or that `convert` refuses.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith("\n"):
                return
            try:
                line = json.loads(text)
                if not isinstance(line, dict):
                    raise ValueError("not an object")
                line = convert(line)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path} line {number} cannot be read ({error})") from error
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
    """So that a power cut cannot undo a rename in this folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
