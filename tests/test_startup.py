"""Help and bad input come at once: nobody waits for torch to hear that an option is misspelled."""

import subprocess
import sys
from pathlib import Path

import pytest

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
SCRIPTS = ("ppo", "sft", "classify", "inference", "fewshot")
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


@pytest.mark.parametrize("script", [*SCRIPTS, "report", "export"])
def test_help_imports_nothing_heavy(script):
    result = start(script, "--help")
    assert result.returncode == 0 and "--output_dir" in result.stdout, result.stderr
    assert result.stdout.endswith("imported:\n")


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_input_is_refused_before_anything_heavy_is_imported(script, what):
    arguments, sentence = REFUSED[what]
    if (script, what) == ("classify", "a choice"):  # a head's answers have no other space
        sentence = "unrecognized arguments: --answer_space words"
    result = start(script, "--report_to", "none", *arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"{script}.py: error: ") and sentence in result.stderr, result.stderr
    assert result.stdout == "imported:\n"


@pytest.mark.parametrize("arguments", [["--rans", "model"], ["--runs", "/no/such/folder"]])
def test_report_refuses_bad_input_as_early(arguments):
    result = start("report", *arguments)
    assert result.returncode == 2 and result.stderr.startswith("report.py: error: "), result.stderr
    assert result.stdout == "imported:\n"


@pytest.mark.parametrize("arguments", [["--checkpont", "model"], ["--checkpoint", "/no/such/folder"], []])
def test_export_refuses_bad_input_as_early(arguments):
    result = start("export", *arguments)
    assert result.returncode == 2 and result.stderr.startswith("export.py: error: "), result.stderr
    assert result.stdout == "imported:\n"


def test_the_classifier_is_imported_before_anything_heavy():
    code = f"import sys; from inference import Classifier; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.stdout == "[]\n", result.stderr
