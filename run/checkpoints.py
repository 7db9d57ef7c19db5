"""What the trainers of ppo.py and sft.py share: evaluation on held-out rows, and the run's checkpoint folders.

Names that begin with `.new-` are being written, those with `.old-` are on their way out; a killed run leaves them
behind, and the next one to go on removes them.
"""

import contextlib
import json
import re
import shutil
from pathlib import Path

from machine import manifests
from machine.errors import CheckpointError
from machine.files import free_name, remove_folder

CHECKPOINT_NAME = re.compile(r"(step|epoch)-\d+")
ADAPTER_FILE, STATE_FILE = "adapter_model.safetensors", "trainer_state.json"
OLD_BEST = ".old-best"  # the best/ of the last checkpoint, while a better one is ahead of any checkpoint


def run_id(folder: Path) -> str | None:
    """The name that a run has for itself (run.json); None for a folder without one."""
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8"))["id"] if path.exists() else None


def step_of(checkpoint: Path | None) -> int:
    """How many steps a checkpoint has behind it; 0 for None, -1 if it does not say."""
    if checkpoint is None:
        return 0
    manifest = manifests.read(checkpoint)
    if manifest is not None and "step" in manifest:
        return manifest["step"]
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads((checkpoint / STATE_FILE).read_text())["global_step"]
    return -1


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, the one with the fewest steps first, whether they are whole or not."""
    found = [path for path in run.glob("*-*") if path.is_dir() and CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def verify(checkpoint: Path) -> None:
    """CheckpointError unless this is a whole checkpoint of the run whose folder it lies in."""
    manifest = manifests.verify(checkpoint)
    if manifest.get("run") != run_id(checkpoint.parent):
        raise CheckpointError(f"{checkpoint} belongs to another run ({manifest.get('run')})")
    if STATE_FILE not in manifest["files"]:
        raise CheckpointError(f"{checkpoint} holds no {STATE_FILE}, so nothing can go on from it")


def to_resume(run: Path, named: Path | None = None) -> Path | None:
    """The checkpoint that a run goes on from: the newest that is whole, or None if there is none at all yet.

    Newer ones that are not whole get `-broken` behind their names, and that is said. With `named`, a checkpoint that
    was asked for, nothing is chosen: CheckpointError if it is not whole, or not the newest (the newer ones would stay
    beside a history that no longer leads to them). CheckpointError too if there are checkpoints but none is whole.
    """
    problems: dict[Path, CheckpointError] = {}
    good = None
    for checkpoint in reversed(checkpoints_of(run)):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            problems[checkpoint] = error
            continue
        good = checkpoint
        break
    instead = f"the newest whole checkpoint is {good}: --resume {run} goes on from it"
    if problems and good is None:
        raise CheckpointError(
            f"{run} holds no checkpoint to go on from: {next(iter(problems.values()))}; start again in another folder"
        )
    if named is not None and good is None:
        raise CheckpointError(f"--resume {named}: {run} has no checkpoint yet; --resume {run} starts it again")
    if named is not None and named.resolve() != good.resolve():
        try:
            verify(named)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {instead}") from error
        raise CheckpointError(f"--resume {named} is not the run's last checkpoint; move the newer away, or: {instead}")
    for checkpoint, problem in problems.items():
        aside = free_name(checkpoint.with_name(f"{checkpoint.name}-broken"))
        checkpoint.rename(aside)
        print(f"Not used: {problem}. It is now {aside.name}; going on from {good}.")
    return good


def settle(run: Path, step: int) -> None:
    """Before a run goes on from a checkpoint with `step` steps (-1: from the start): clear up what a kill left.

    best/ becomes what it was at that step, so that a better score which is reached again is kept again.
    """
    for path in [*run.glob(".new-*"), *run.glob(".old-*")]:
        if path.name != OLD_BEST:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    best, old = run / "best", run / OLD_BEST
    ahead = best.is_dir() and step_of(best) > step
    if old.is_dir() and (ahead or not best.is_dir()) and step_of(old) <= step:
        remove_folder(best)
        old.rename(best)
    elif ahead and step_of(best) == 0:
        remove_folder(best)  # the start's own; it is evaluated again
    elif ahead:
        best.rename(free_name(run / f"best-step-{step_of(best)}"))
    remove_folder(old)
