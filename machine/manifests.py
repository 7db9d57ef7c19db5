"""What lies in a checkpoint folder, written down with it: manifest.json names every file, its size and its SHA-256.

A folder is compared with its manifest before anything in it is loaded, so that a file that was cut short, changed or
lost is told by its name, and not by what a library makes of it.
"""

import hashlib
import json
import os
from pathlib import Path

from machine.errors import CheckpointError

FILE = "manifest.json"


def write(folder: Path, **about) -> None:
    """Write the manifest of a folder whose files are complete, and bring them all to the disk.

    about: what else it shall say (step, run, score).
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            # Else a power cut could leave the manifest, and the folder under its name, but empty files in it.
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    with open(folder / FILE, "w", encoding="utf-8") as file:
        json.dump({**about, "files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict | None:
    """A folder's manifest, nothing compared; None if there is none that can be read."""
    try:
        manifest = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def verify(folder: Path) -> dict:
    """The manifest of a folder that holds exactly what was written into it. CheckpointError names the first fault."""
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
