"""Help and bad input come at once: nobody waits for torch to hear that an option is misspelled."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from run.parser import Parser, option

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "pandas", "scipy", "sklearn", "matplotlib")
# Runs a script to its end and then says which of these modules it has imported.
PROGRAM = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *[name for name in {HEAVY} if name in sys.modules]))
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCRIPTS = ("ppo", "sft", "inference", "fewshot")
REFUSED = {
    "an option": (["--sead", "1"], "did you mean --seed?"),
    "a value": (["--seed", "one"], "--seed"),
    "a task": (["--task", "RTEE"], "Did you mean 'RTE'?"),
    "a choice": (["--answer_space", "words"], "--answer_space words must be one of labels"),
    "the data": (["--data_path", "/no/such/file.tsv"], "/no/such/file.tsv: no such file or folder"),
    "the model": (["--from_local", "True", "--train_model_name", "/no/such/model"], "/no/such/model is no folder"),
}


def start(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, str(ROOT / f"{script}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


@pytest.mark.parametrize("script", [*SCRIPTS, "report"])
def test_help_imports_nothing_heavy(script):
    result = start(script, "--help")
    assert result.returncode == 0 and "--output_dir" in result.stdout, result.stderr
    assert result.stdout.endswith("imported:\n")


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_input_is_refused_before_anything_heavy_is_imported(script, what):
    arguments, sentence = REFUSED[what]
    result = start(script, "--report_to", "none", *arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"{script}.py: error: ") and sentence in result.stderr, result.stderr
    assert result.stdout == "imported:\n"


@pytest.mark.parametrize("arguments", [["--rans", "model"], ["--runs", "/no/such/folder"]])
def test_report_refuses_bad_input_as_early(arguments):
    result = start("report", *arguments)
    assert result.returncode == 2 and result.stderr.startswith("report.py: error: "), result.stderr
    assert result.stdout == "imported:\n"


# ----------------------------------------------------------------------------------------------------- the command line


@dataclass
class Options:
    """What the tests below parse."""

    learning_rate: float | None = option(None, "PPO", "step size")
    from_local: bool = option(False, "model", "a folder")
    same_shots: bool = option(True, "model", "the same")
    output_dir: str = option("", "run", "where, 100% of it")


def parse(*arguments: str) -> dict:
    return vars(Parser(Options, "A test.", prog="test.py").parse_args(arguments))


DEFAULTS = {"learning_rate": None, "from_local": False, "same_shots": True, "output_dir": ""}


@pytest.mark.parametrize(
    "given, expected",
    [
        ([], {}),
        (["--learning_rate", "1e-3"], {"learning_rate": 1e-3}),
        (["--learning_rate=1e-3"], {"learning_rate": 1e-3}),
        (["--learning-rate=1e-3"], {"learning_rate": 1e-3}),
        (["--output-dir", "a-b_c"], {"output_dir": "a-b_c"}),
        (["--output_dir", "a=b"], {"output_dir": "a=b"}),
        (["--from_local"], {"from_local": True}),
        (["--from-local", "yes"], {"from_local": True}),
        (["--from_local", "True", "--from_local", "0"], {"from_local": False}),
        (["--same_shots", "false"], {"same_shots": False}),
        (["--no_same_shots"], {"same_shots": False}),
        (["--no-same-shots"], {"same_shots": False}),
    ],
)
def test_every_spelling_of_an_option(given, expected):
    assert parse(*given) == DEFAULTS | expected


@pytest.mark.parametrize("given", [["--from_local", "maybe"], ["--learning", "1"], ["--learning_rate", "fast"], ["x"]])
def test_what_is_no_option_ends_with_one_sentence(given, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*given)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("test.py: error: ") and said.count("\n") == 1


def test_help_shows_one_spelling_of_each_option_in_its_group(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    said = capsys.readouterr().out
    assert said.index("\nrun:\n") < said.index("\nmodel:\n") < said.index("\nPPO:\n")
    assert "--output_dir TEXT" in said and "100% of it" in said and "--output-dir" not in said and "--no_" not in said
    assert "(default: True)" in said and "(default: None)" not in said
