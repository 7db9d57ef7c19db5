"""Writes what the documents say about options: docs/arguments.md, and the comments in scripts/*.sh.

    .venv/bin/python -m scripts.arguments

Options, defaults and help texts are written down in the scripts' dataclasses alone.
"""

import re
from itertools import groupby
from pathlib import Path

import classify
import export
import fewshot
import ppo
import report
import sft
from evaluation.arguments import InferenceArguments
from run.arguments import CONFIG_HELP
from run.parser import GROUPS, options_of

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "ppo": ppo.PPOArguments,
    "sft": sft.SFTArguments,
    "classify": classify.HeadArguments,
    "inference": InferenceArguments,
    "fewshot": fewshot.FewshotArguments,
    "report": report.ReportArguments,
    "export": export.ExportArguments,
}
WITHOUT_CONFIG = ("report", "export")  # nor a list of options in a shell script
INTRODUCTION = """# Arguments

`.venv/bin/python -m scripts.arguments` writes this page from the scripts. `--seed 1` and `--seed=1` are read
alike; a boolean takes True or False. The command line overrides the file of `--config`, which overrides the arguments
of the run that `--resume` continues, which override the defaults. `bash scripts/ppo.sh` and its siblings pass on every
option.
"""


def options(script: str) -> list[tuple[str, object, str, str]]:
    """Name, default, group and help of every option, as `--help` lists them."""
    found = [(f.name, f.default, f.metadata["group"], f.metadata["help"]) for f in options_of(KINDS[script])]
    found += [("config", "", "run", CONFIG_HELP)] if script not in WITHOUT_CONFIG else []
    return sorted(found, key=lambda option: GROUPS.index(option[2]))


def reference() -> str:
    """docs/arguments.md."""
    parts = [INTRODUCTION]
    for script, kind in KINDS.items():
        parts.append(f"## {script}.py\n")
        for group, members in groupby(options(script), key=lambda option: option[2]):
            rows = [(f"`--{name}`", _code(default), text) for name, default, _, text in members]
            parts.append(_table((group, "default", "meaning"), rows))
        if kind is ppo.PPOArguments:
            parts.append("What `--policy_gradient` decides by recipe:\n")
            names = ppo.RECIPES["expected"]
            rows = [(f"`--{name}`", *(_code(recipe[name]) for recipe in ppo.RECIPES.values())) for name in names]
            parts.append(_table(("default by recipe", *ppo.RECIPES), rows))
    return "\n".join(parts)


def _code(value) -> str:
    return "" if value in (None, "") else f"`{value}`"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def commented(text: str, script: str) -> str:
    """A shell script's text with every option's help behind its line: those of its variables, and those listed."""
    helps = {name: help_ for name, _, _, help_ in options(script)}
    for option, variable in re.findall(r'--(\w+) "\$(\w+)"', text):
        text = re.sub(rf'^({variable}="\S*" +# ).*$', rf"\g<1>{helps[option]}", text, flags=re.MULTILINE)
    return re.sub(r"^(    (?:# )?--(\w+) .*?# ).*$", lambda found: found[1] + helps[found[2]], text, flags=re.MULTILINE)


def files() -> dict[Path, str]:
    """What every generated file should hold."""
    shells = {script: ROOT / "scripts" / f"{script}.sh" for script in KINDS if script not in WITHOUT_CONFIG}
    found = {path: commented(path.read_text(encoding="utf-8"), script) for script, path in shells.items()}
    return {ROOT / "docs" / "arguments.md": reference()} | found


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
