"""The documents: every command runs, every option, link and test that they name exists.

A command in a ```bash block is run for real, with the embedded model and as little work as possible. One in a ```text
block takes hours, several processes or files that are not here: its options, methods and files are checked.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_server import chat, completion, serving

from classify import HeadArguments
from evaluation.arguments import InferenceArguments
from export import ExportArguments
from fewshot import FewshotArguments
from ppo import PPOArguments
from report import ReportArguments
from run.parser import options_of
from sft import SFTArguments
from tasks import loaders, own

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
READ_ONLY = [ROOT / "data" / "README.md", ROOT / "CHANGELOG.md"]  # nothing to run: downloads, and no commands
GENERATED = ROOT / "docs" / "arguments.md"  # its own test makes and compares it
LONGEST = {"README.md": 170, "RESULTS.md": 150, "benchmarks/README.md": 150}  # lines
TINY = ["--eval_size", "4", "--batch_sentence_num", "2", "--report_to", "none"]
TINY_TRAINING = [*TINY, "--max_steps", "1"]
ARGUMENTS = {
    "ppo": PPOArguments,
    "sft": SFTArguments,
    "classify": HeadArguments,
    "inference": InferenceArguments,
    "fewshot": FewshotArguments,
    "report": ReportArguments,
    "export": ExportArguments,
}
OPTIONS = {
    program: {field.name for field in options_of(kind)} | {"config", "help"} for program, kind in ARGUMENTS.items()
}
BENCHMARK_OPTIONS = {
    option
    for path in (ROOT / "benchmarks").glob("*.py")
    for option in re.findall(r'"--(\w+)"', path.read_text(encoding="utf-8"))
}
QUEUES = ("billing", "bug", "other")
OTHER_OPTIONS = {"config_file", "num_processes"}  # accelerate's


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_document = pytest.mark.parametrize("document", [*DOCUMENTS, *READ_ONLY], ids=name_of)


def blocks(document: Path, kind: str) -> list[str]:
    """The texts of the fenced blocks of this kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(kind: str) -> list[str]:
    """Every line of these blocks of all documents once, without its comment; a line that ends in \\ goes on."""
    found = "\n".join(block for document in DOCUMENTS for block in blocks(document, kind))
    lines = (line.split(" #")[0].strip() for line in found.replace("\\\n", " ").splitlines() if line[:1] != "#")
    return list(dict.fromkeys(line for line in lines if line))


COMMANDS = commands("bash")


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


@pytest.fixture(scope="session")
def exported(trained) -> Path:
    """The model of that run, exported by the documented command."""
    (command,) = [command for command in COMMANDS if "export.sh" in command]
    folder = trained.parent / "exported"
    command = command.replace("model/MR/RUN/best", str(trained / "best"))
    assert succeeded(run(command.replace("--output_dir exported", f"--output_dir {folder}"), []))
    return folder


def test_the_readme_names_the_two_commands_first():
    assert COMMANDS[:2] == ["bash scripts/ppo.sh", "bash scripts/test.sh"]


def test_the_run_command_trains_and_leaves_a_whole_run(trained):
    assert {"best", "history.jsonl", "summary.json", "arguments.json"} <= {path.name for path in trained.iterdir()}


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_command(command, trained, tmp_path, request):
    if "scripts/test.sh" in command:
        named = [] if "tests/" in command else ["tests/test_tasks.py"]
        result = run(command, ["--collect-only", "-q", *named])
        assert re.search(r"tests/test_\w+\.py", result.stdout), result.stdout[-2000:] + result.stderr[-2000:]
    elif "benchmarks/run.sh" in command:
        result = run(command, ["--list"])
        assert succeeded(result) and "-m benchmarks." in result.stdout
    elif "export.sh" in command:
        assert (request.getfixturevalue("exported") / "README.md").is_file()
    elif "--text " in command:
        folder = request.getfixturevalue("exported")
        result = run(command.replace("--train_model_name exported", f"--train_model_name {folder}"), [])
        assert succeeded(result) and result.stdout.splitlines()[-1].count("\t") == 2
    elif "report.py" in command:
        folder = tmp_path / "report"
        assert succeeded(run(command, ["--runs", str(trained.parent), "--output_dir", str(folder)]))
        assert (folder / "report.html").is_file()
    elif "-m reporting." in command:
        keeps_and_reads_a_ledger(command, trained, tmp_path)
    elif "-m benchmarks.trl_grpo" in command:  # it trains for hours; tests/test_benchmarks.py runs it
        said = run(" ".join(command.split()[:3]), ["--help"]).stdout
        assert set(re.findall(r"--\w+", command)) <= set(re.findall(r"--\w+", said))
    else:
        runs_a_script(command, trained, tmp_path / "run")


def keeps_and_reads_a_ledger(command: str, trained: Path, folder: Path) -> None:
    """The ledger of a trained run, and the tables from it."""
    ledger = folder / "runs.csv"
    command = command.replace("reporting.ledger model", f"reporting.ledger {trained}").replace("/my/data", str(folder))
    if "reporting.claims" in command:
        assert succeeded(run(f".venv/bin/python -m reporting.ledger {trained}", ["--csv", str(ledger)]))
        assert succeeded(run(command, ["--csv", str(ledger), "--output", str(folder / "claims.md")]))
        assert "MR" in (folder / "claims.md").read_text(encoding="utf-8")
    else:
        assert (
            succeeded(run(command, ["--csv", str(ledger)])) and len(ledger.read_text().splitlines()) == 3
        )  # before and after


def own_task(folder: Path) -> Path:
    """A folder with a table such as the README speaks of, and the README's YAML file about it."""
    rows = [f'"{q} {i}","my {q}, it ""is"" {i}",{q},"{q} number {i}",{q}' for i in range(10) for q in QUEUES]
    (folder / "tickets.csv").write_text("\n".join(["subject,body,queue,text,label", *rows]) + "\n")
    (folder / "tickets.yaml").write_text(blocks(ROOT / "README.md", "yaml")[0], encoding="utf-8")
    return folder


def runs_a_script(command: str, trained: Path, folder: Path) -> None:
    """One of the scripts with the embedded model, and the folder that it leaves."""
    if "MODEL=" in command:
        pytest.skip("needs a model hub")
    if "TASK=SST" in command and not (ROOT / "data" / "GLUE" / "SST").is_dir():
        pytest.skip("needs the original files of SST")
    command = command.replace("model/MR/RUN/best", str(trained / "best"))
    command = re.sub(r"tickets\.(csv|yaml)", lambda file: str(own_task(folder.parent) / file[0]), command)
    command = command.replace("_name exported", f"_name {trained / 'best'}")
    training = any(script in command for script in ("ppo.sh", "sft.sh", "classify.sh"))
    with serving(lambda path, _: chat("yes") if "/chat/" in path else completion("yes")) as server:
        command = re.sub(r"--endpoint \S+", f"--endpoint {server.url}", command)
        assert succeeded(run(command, [*(TINY_TRAINING if training else TINY), "--output_dir", str(folder)]))
    assert (folder / "summary.json").is_file()


def programs(command: str) -> Iterator[tuple[str, str]]:
    """The programs of a command by their short names, each with what follows it."""
    names = "|".join(ARGUMENTS)
    for found in re.finditer(rf"\b({names})\.(?:sh|py)\b|benchmarks\.ours_(ppo)\b", command):
        yield found[1] or found[2], command[found.end() :]


@pytest.mark.parametrize("command", [*COMMANDS, *commands("text")])
def test_what_a_command_names_exists(command):
    for program, rest in programs(command):
        assert set(re.findall(r"--(\w+)", rest)) <= OPTIONS[program]
    if "benchmarks/run.sh" in command:
        assert set(re.findall(r"--(\w+)", command)) <= BENCHMARK_OPTIONS
    for configuration in re.findall(r"--config_file (\S+)", command):
        assert (ROOT / configuration).is_file()
    if "scripts/results.sh" in command:
        script = (ROOT / "scripts" / "results.sh").read_text(encoding="utf-8")
        for method in command.split("results.sh")[1].split(" (")[0].split():
            assert f'*" {re.sub("-[0-9]+$", "-", method)}"' in script


@each_document
def test_every_option_in_the_text_exists(document):
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    known = set().union(*OPTIONS.values(), BENCHMARK_OPTIONS, OTHER_OPTIONS)
    assert set(re.findall(r"`--(\w+)", text)) <= known


@each_document
def test_every_link_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, heading = target.partition("#")
            linked = document.parent / path if path else document
            assert linked.exists() or linked.resolve() == GENERATED, target
            if heading:
                headings = re.findall(r"^#+ (.+)", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


@each_document
def test_documents_are_short_and_their_lines_too(document):
    lines = document.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST.get(name_of(document), len(lines))
    prose = re.sub(r"^```text.*?^```", "", "\n".join(lines), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_the_readme_s_own_task_is_a_task_with_a_wording(tmp_path):
    task = own.read_task(own_task(tmp_path) / "tickets.yaml")
    assert task.labels == QUEUES and task.metrics == ("accuracy", "macro_f1") and len(loaders.load(task, "train")) == 30
    assert "bug: something is broken." in task.wording.instruction and task.wording.question == "Queue ({words}):"


def test_every_test_that_the_table_of_faults_names_exists():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    files = dict((letter, name) for name, letter in re.findall(r"`(tests/test_\w+\.py)` ([A-Z])\b", text))
    named = 0
    for row in [line for line in text.splitlines() if line.startswith("| ")][1:]:
        for part in row.strip("| ").rsplit(" | ", 1)[-1].split("; "):
            letters = re.match(r"(?:[A-Z], )*[A-Z]\b", part)[0].split(", ")
            for letter in letters:
                functions = re.findall(r"def (test_\w+)", (ROOT / files[letter]).read_text(encoding="utf-8"))
                for name in re.findall(r"`(\w+)`", part):
                    assert any(name in function for function in functions), (files[letter], name)
                    named += 1
    assert named > 30


@pytest.mark.parametrize("program", ["ppo", "sft", "classify", "inference", "fewshot"])
def test_every_argument_has_its_line(program):
    script = (ROOT / "scripts" / f"{program}.sh").read_text(encoding="utf-8")
    assert [f.name for f in options_of(ARGUMENTS[program]) if not re.search(rf"--{f.name}\b", script)] == []
