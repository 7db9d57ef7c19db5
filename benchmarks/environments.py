"""Virtual environments of the baselines, each created once from its pinned requirements."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE / ".envs"


class EnvironmentProblem(RuntimeError):
    """An environment that could not be created; the message names it and its log."""


def python(name: str) -> Path:
    """The interpreter of an environment, which is created if it is missing or its requirements have changed.

    name: `trl-0.11.4` has its requirements in requirements-trl-0.11.4.txt. Raises EnvironmentProblem.
    """
    requirements = HERE / f"requirements-{name}.txt"
    folder = FOLDER / name
    interpreter, stamp, log = folder / "bin" / "python", folder / ".requirements", FOLDER / f"{name}.log"
    wanted = requirements.read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return interpreter
    FOLDER.mkdir(exist_ok=True)
    print(f"Creating {folder} from {requirements.name}: takes some minutes, once.", flush=True)
    install = ["-m", "pip", "install", "--no-input", "--disable-pip-version-check", "-r", str(requirements)]
    with open(log, "w", encoding="utf-8") as file:
        for command in ([sys.executable, "-m", "venv", str(folder)], [str(interpreter), *install]):
            if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
                raise EnvironmentProblem(
                    f"{folder} could not be created from {requirements.name}; {log} says why. To start again, remove it"
                )
    stamp.write_text(wanted, encoding="utf-8")
    return interpreter
