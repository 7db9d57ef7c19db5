"""The README's commands, each run for real with the embedded model and as little work as possible."""

import os
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from fewshot import FewshotArguments
from inference import InferenceArguments
from ppo import PPOArguments
from sft import SFTArguments

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
COMMANDS = [
    line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip() and line[0] != "#"
]
TINY = ["--eval_size", "4", "--batch_sentence_num", "2", "--report_to", "none"]
TINY_TRAINING = [*TINY, "--max_steps", "1"]


def run(command: str, extra: list[str]) -> subprocess.CompletedProcess:
    parts = shlex.split(command)
    settings = dict(part.split("=", 1) for part in parts if re.match(r"[A-Z_]+=", part))
    words = parts[len(settings) :]
    return subprocess.run(
        [*words, *extra], cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=580
    )


def succeeded(result: subprocess.CompletedProcess) -> bool:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return True


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of the first command, cut short."""
    folder = tmp_path_factory.mktemp("readme") / "ppo"
    assert succeeded(run("bash scripts/ppo.sh", [*TINY_TRAINING, "--output_dir", str(folder)]))
    return folder


def test_the_readme_names_the_two_commands():
    assert COMMANDS[:2] == ["bash scripts/ppo.sh", "bash scripts/test.sh"]


def test_the_run_command_trains_and_leaves_a_whole_run(trained):
    assert {"best", "history.jsonl", "summary.json", "arguments.json"} <= {path.name for path in trained.iterdir()}


def test_the_test_command_collects_tests():
    result = subprocess.run(
        ["bash", "scripts/test.sh", "--collect-only", "-q", "tests/test_tasks.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "test_tasks.py" in result.stdout, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.mark.parametrize("command", COMMANDS[2:])
def test_command(command, trained, tmp_path):
    if "MODEL=" in command:
        pytest.skip("needs a model hub")
    if "TASK=SST" in command and not (ROOT / "data" / "GLUE" / "SST").is_dir():
        pytest.skip("needs the original files of SST")
    command = command.replace("model/MR/RUN/best", str(trained / "best"))
    training = "ppo.sh" in command or "sft.sh" in command
    extra = [*(TINY_TRAINING if training else TINY), "--output_dir", str(tmp_path / "run")]
    assert succeeded(run(command, extra))
    assert (tmp_path / "run" / "summary.json").is_file()


def test_every_test_that_the_table_of_faults_names_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## What happens when ...")[1].split("\n## ")[0]
    files = dict((letter, name) for name, letter in re.findall(r"`(tests/test_\w+\.py)` ([A-Z])\b", section))
    named = 0
    for row in section.splitlines():
        for letters, names in re.findall(r"((?:[A-Z], )*[A-Z]) ((?:`\w+`(?:, )?)+)", row.rsplit(" | ", 1)[-1]):
            for letter in letters.split(", "):
                functions = re.findall(r"def (test_\w+)", (ROOT / files[letter]).read_text(encoding="utf-8"))
                for name in re.findall(r"`(\w+)`", names):
                    assert any(name in function for function in functions), (files[letter], name)
                    named += 1
    assert named > 30


@pytest.mark.parametrize(
    "kind", [PPOArguments, SFTArguments, InferenceArguments, FewshotArguments], ids=lambda kind: kind.__name__
)
def test_every_argument_has_its_line(kind):
    script = (ROOT / "scripts" / f"{kind.__name__.removesuffix('Arguments').lower()}.sh").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [field.name for field in fields(kind)]
    assert [name for name in names if not re.search(rf"--{name}\b", script)] == []
    if kind is PPOArguments:
        assert [name for name in names if not re.search(rf"`--{name}\b", readme)] == []
