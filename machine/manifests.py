"""manifest.json lists every file of a checkpoint folder with its size and SHA-256.

A folder is compared with its manifest before anything in it is loaded. A file that was truncated, changed or lost is
then reported by its name, and not by whatever error a library raises on it.
"""

import hashlib
import json
import os
from pathlib import Path

from machine.errors import CheckpointError

FILE = "manifest.json"


def write(folder: Path, **about) -> None:
    """Write the manifest of a folder whose files are complete, and bring all of them to the disk.

    about: further entries (step, run, score).
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            # Without it a power cut could leave the manifest, and the folder's final name, but empty files.
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    with open(folder / FILE, "w", encoding="utf-8") as file:
        json.dump({**about, "files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict | None:
    """A folder's manifest, without comparing anything; None if there is none that can be read."""
    try:
        manifest = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def verify(folder: Path) -> dict:
    """The manifest of a folder whose files are as they were written. CheckpointError names the first that is not."""
    manifest = read(folder)
    if manifest is None:
        raise CheckpointError(f"{folder} has no readable {FILE}: this program did not write it, or not to its end")
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{path} was written with {expected['size']} bytes and now has {size}")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise CheckpointError(f"{path} is not what was written (its SHA-256 differs)")
    return manifest
