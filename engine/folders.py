"""How a model is named on the command line, and whether the folder that is named can hold one.

Nothing here loads a model, so a wrong name is refused before torch and transformers are imported.
"""

import json
from pathlib import Path

from machine.errors import ModelError
from machine.files import write_json

EMBEDDED = "SmolLM2-135M-Instruct"  # its wheel is installed by scripts/setup.sh
ADAPTER_CONFIG = "adapter_config.json"
LORA_R, LORA_ALPHA = 16, 32  # of a new adapter
HEAD = "head.json"  # in the folder of a head that classify.py trained: what it tells apart


def check_folder(name: str, from_local: bool) -> None:
    """ModelError for a folder that does not exist, holds neither a model nor an adapter, or needs `--from_local`."""
    folder = Path(name)
    if not from_local:
        if name != EMBEDDED and (folder / ADAPTER_CONFIG).exists():
            raise ModelError(f"--train_model_name {name} is an adapter folder; add --from_local True to load it")
        return
    if not folder.is_dir():
        raise ModelError(
            f"--train_model_name {name} is no folder; with --from_local True it must be a model or checkpoint folder"
        )
    if not (folder / "config.json").exists() and not (folder / ADAPTER_CONFIG).exists():
        raise ModelError(
            f"--train_model_name {name} holds neither config.json nor adapter_config.json; "
            "give a checkpoint folder such as model/<task>/<run>/best"
        )


def write_head(folder: Path, task: str, labels: tuple[str, ...]) -> None:
    """Mark a folder as a trained head's. labels: the names of its classes, in order; none for a number."""
    write_json(folder / HEAD, {"task": task, "labels": list(labels)})


def head_labels(folder: Path) -> tuple[str, ...] | None:
    """The class names of the head in a folder, () for a number; None if no trained head lies there. ModelError if its
    file cannot be read."""
    try:
        return tuple(json.loads((folder / HEAD).read_text(encoding="utf-8"))["labels"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / HEAD} cannot be read ({error}); copy the folder again, or train again") from error
