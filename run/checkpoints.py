"""The checkpoint folders of a run: which there are, whether they are whole, and which one to resume from.

Names that begin with `.new-` are being written, those that begin with `.old-` are being removed. A killed run leaves
them behind, and the resume removes them.
"""

import contextlib
import json
import re
import shutil
from pathlib import Path

from machine import manifests
from machine.errors import CheckpointError
from machine.files import UNFINISHED_PREFIX, free_name, remove_folder

CHECKPOINT_NAME = re.compile(r"(step|epoch)-\d+")
ADAPTER_FILE, STATE_FILE = "adapter_model.safetensors", "trainer_state.json"
OLD_BEST = ".old-best"  # the best/ of the last checkpoint, while a better one is ahead of any checkpoint


def run_id(folder: Path) -> str | None:
    """The run's own name, from run.json; None for a folder without one."""
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8"))["id"] if path.exists() else None


def step_of(checkpoint: Path | None) -> int:
    """The step that a checkpoint was written at; 0 for None, -1 if it does not say."""
    if checkpoint is None:
        return 0
    manifest = manifests.read(checkpoint)
    if manifest is not None and "step" in manifest:
        return manifest["step"]
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads((checkpoint / STATE_FILE).read_text())["global_step"]
    return -1


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run by their steps, whether they are whole or not."""
    found = [path for path in run.glob("*-*") if path.is_dir() and CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def verify(checkpoint: Path) -> None:
    """CheckpointError unless this is a whole checkpoint of the run whose folder it lies in."""
    manifest = manifests.verify(checkpoint)
    if manifest.get("run") != run_id(checkpoint.parent):
        raise CheckpointError(f"{checkpoint} belongs to another run ({manifest.get('run')})")
    if STATE_FILE not in manifest["files"]:
        raise CheckpointError(f"{checkpoint} holds no {STATE_FILE}, so no run can resume from it")


def newest_whole(run: Path) -> tuple[Path | None, dict[Path, CheckpointError]]:
    """The newest checkpoint that is whole, if there is one, and what is wrong with each newer one."""
    problems: dict[Path, CheckpointError] = {}
    for checkpoint in reversed(checkpoints_of(run)):
        try:
            verify(checkpoint)
            return checkpoint, problems
        except CheckpointError as error:
            problems[checkpoint] = error
    return None, problems


def checkpoint_to_resume(run: Path, named: Path | None = None) -> Path | None:
    """The checkpoint to resume from: the newest that is whole, or None if the run has none yet.

    Newer ones that are not whole get `-broken` behind their names, which is printed. `named`: the checkpoint that the
    user asked for; CheckpointError if it is not whole, or not the newest (the history would not lead to the newer
    ones that stay). CheckpointError too if there are checkpoints but none is whole.
    """
    good, problems = newest_whole(run)
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


def clear_up(run: Path, step: int) -> None:
    """Before a resume from the checkpoint of `step` (-1: from the start): remove what a killed run left behind.

    best/ becomes what it was at that step, so that a better score that is reached again is saved again.
    """
    for path in [*run.glob(f"{UNFINISHED_PREFIX}*"), *run.glob(".old-*")]:
        if path.name != OLD_BEST:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    best, old = run / "best", run / OLD_BEST
    ahead = best.is_dir() and step_of(best) > step
    if old.is_dir() and (ahead or not best.is_dir()) and step_of(old) <= step:
        remove_folder(best)
        old.rename(best)
    elif ahead and step_of(best) == 0:
        remove_folder(best)  # from the evaluation before training, which is done again
    elif ahead:
        best.rename(free_name(run / f"best-step-{step_of(best)}"))
    remove_folder(old)
