"""scripts/setup.sh and the scripts that start with it, without a network.

Most tests run a copy of the scripts in a temporary checkout, with a stand-in for Python that only writes down how it
was called; one makes a real environment from hand-made wheels.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("ppo", "sft", "classify", "fewshot", "inference")

# `python -m venv DIR` copies the stand-in into DIR, `python -m pip install ... -r FILE` appends FILE's name to `calls`,
# and fails, is killed or has begun to install, as the requirements file says. Any other call prints its arguments.
STAND_IN = r"""#!/usr/bin/env bash
case "$1 $2" in
    "-V ") echo "Python ${VERSION:-3.11.7}" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo venv >>"$CALLS" ;;
    "-m pip")
        [ "$3" = install ] || exit 0
        file="${@: -1}"
        echo "$(basename "$file")$([[ "$*" != *--no-deps* ]] || echo " --no-deps")" >>"$CALLS"
        ! grep -q wait "$file" || { echo "in pip" >"$GATE" && head -n 1 "$GATE"; }
        ! grep -q begun "$file" || echo "Installing collected packages: begun"
        ! grep -q killed "$file" || kill -9 $PPID "$(cat "$CHECKOUT/pid")"
        ! grep -q interrupted "$file" || kill -INT "$(cat "$CHECKOUT/pid")"
        ! grep -q broken "$file" || { echo "ERROR: No matching distribution found for broken==1" && exit 1; }
        ;;
    *) "$REAL" -c "$SHOW" "$@" ;;
esac
"""
SHOW = 'import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("WANDB_PROJECT")]))'


class Checkout:
    """A temporary checkout, in a folder with a space in its name, and the stand-in for Python beside it."""

    def __init__(self, folder: Path):
        self.root = folder / "a check out"
        (self.root / "scripts").mkdir(parents=True)
        for script in (ROOT / "scripts").glob("*.sh"):
            shutil.copy(script, self.root / "scripts")
        for name in ("requirements.txt", "requirements-embedded.txt", "requirements-test.txt"):
            (self.root / name).write_text("good==1\n")
        self.python = folder / "python"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)
        self.calls_file = folder / "calls"
        self.venv = self.root / ".venv"
        self.folder = folder

    def run(self, script: str = "setup", *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs a script from another folder. The shell's process id is put where the stand-in finds it."""
        names = ("TASK", "MODEL", "OUTPUT_DIR", "SEED", "PROJECT", "FROM_LOCAL", "USE_COT", "NUM_SHOTS", "CDPATH")
        known = {key: value for key, value in os.environ.items() if key not in names}
        mine = {"PYTHON": str(self.python), "CALLS": str(self.calls_file), "CHECKOUT": str(self.root), "SHOW": SHOW}
        return subprocess.run(
            ["bash", "-c", 'echo $$ >"$CHECKOUT/pid" && exec bash "$@"', "bash"]
            + [str(self.root / "scripts" / f"{script}.sh"), *arguments],
            cwd=self.folder,
            env=known | mine | {"REAL": sys.executable} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            # Where the tests run in the background, interrupts are ignored, and a shell would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def calls(self) -> list[str]:
        """What the stand-in was asked for since the last look."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return lines

    def looks_complete(self) -> bool:
        stamped = any((self.venv / stamp).exists() for stamp in (".setup", ".setup-test"))
        return stamped and not (self.venv / ".unfinished").exists()


PLAIN = ["requirements.txt", "requirements-embedded.txt --no-deps"]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_installs_once(checkout: Checkout):
    first = checkout.run()
    assert first.returncode == 0, first.stderr
    assert checkout.calls() == ["venv", *PLAIN]
    assert first.stdout == ""  # a script's own output is not mixed with the set-up's
    second = checkout.run()
    assert (second.returncode, second.stdout, second.stderr, checkout.calls()) == (0, "", "", [])


def test_tests_need_more_and_cover_the_rest(checkout: Checkout):
    assert checkout.run().returncode == 0
    checkout.calls()
    assert checkout.run("setup", "--test").returncode == 0
    assert checkout.calls() == [*PLAIN, "requirements-test.txt"]
    assert checkout.run("setup", "--test").returncode == checkout.run().returncode == 0
    assert checkout.calls() == []


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-embedded.txt"])
def test_changed_requirements_are_installed_in_place(checkout: Checkout, name: str):
    checkout.run()
    (checkout.venv / "mine").touch()
    checkout.calls()
    (checkout.root / name).write_text("good==2\n")
    assert checkout.run().returncode == 0
    assert checkout.calls() == PLAIN
    assert (checkout.venv / "mine").exists()


def test_environment_without_a_stamp_is_adopted(checkout: Checkout):
    checkout.run()
    (checkout.venv / ".setup").unlink()
    checkout.calls()
    assert checkout.run().returncode == 0
    assert checkout.calls() == PLAIN


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-embedded.txt"])
def test_failed_first_install_says_what_and_leaves_nothing(checkout: Checkout, name: str):
    (checkout.root / name).write_text("broken==1\n")
    run = checkout.run()
    assert run.returncode == 1
    assert f"pip could not install {name}" in run.stderr
    assert "No matching distribution found for broken==1" in run.stderr
    assert not checkout.venv.exists()
    (checkout.root / name).write_text("good==1\n")
    checkout.calls()
    assert checkout.run().returncode == 0
    assert checkout.calls() == ["venv", *PLAIN]


def test_failed_update_keeps_what_pip_did_not_touch(checkout: Checkout):
    checkout.run()
    (checkout.root / "requirements.txt").write_text("broken==1\n")
    run = checkout.run()
    assert run.returncode == 1 and "pip could not install requirements.txt" in run.stderr
    assert checkout.venv.exists() and not checkout.looks_complete()
    (checkout.root / "requirements.txt").write_text("good==2\n")
    checkout.calls()
    assert checkout.run().returncode == 0
    assert checkout.calls() == PLAIN


def test_failed_update_removes_what_pip_had_begun_to_change(checkout: Checkout):
    checkout.run()
    (checkout.root / "requirements.txt").write_text("begun broken==1\n")
    assert checkout.run().returncode == 1
    assert not checkout.venv.exists()


def test_killed_set_up_is_made_anew(checkout: Checkout):
    (checkout.root / "requirements.txt").write_text("killed\n")
    assert checkout.run().returncode == -signal.SIGKILL
    assert checkout.venv.exists() and not checkout.looks_complete()
    (checkout.root / "requirements.txt").write_text("good==1\n")
    checkout.calls()
    run = checkout.run()
    assert run.returncode == 0 and "incomplete" in run.stderr
    assert checkout.calls() == ["venv", *PLAIN]


def test_interrupted_set_up_cleans_up(checkout: Checkout):
    (checkout.root / "requirements.txt").write_text("interrupted\n")
    run = checkout.run()
    assert run.returncode == 130 and "interrupted" in run.stderr
    assert not checkout.venv.exists()


def test_another_python_makes_the_environment_anew(checkout: Checkout):
    checkout.run()
    other = checkout.folder / "python3.12"
    other.write_text(STAND_IN.replace("3.11.7", "3.12.1"))
    other.chmod(0o755)
    checkout.calls()
    assert checkout.run(PYTHON=str(other)).returncode == 0
    assert checkout.calls() == ["venv", *PLAIN]
    assert checkout.run(PYTHON="").returncode == 0  # none named: the environment's own goes on serving
    assert checkout.calls() == []


@pytest.mark.parametrize("version", ["3.10.14", "2.7.18"])
def test_old_python_is_refused_in_one_sentence(checkout: Checkout, version: str):
    run = checkout.run(VERSION=version)
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1
    assert "Python 3.11 or newer is needed" in run.stderr and version in run.stderr and "PYTHON=" in run.stderr
    assert not checkout.venv.exists()


def test_missing_python_is_refused_in_one_sentence(checkout: Checkout):
    run = checkout.run(PYTHON="no-such-python")
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1
    assert "Python 3.11 or newer is needed, but 'no-such-python' is: command not found" in run.stderr


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock command")
def test_two_set_ups_at_once_install_once(checkout: Checkout):
    # The stand-in's pip waits at a named pipe until the second set-up has said that it waits for the first.
    gate = checkout.folder / "gate"
    os.mkfifo(gate)
    (checkout.root / "requirements.txt").write_text("wait\n")
    environment = os.environ | {"PYTHON": str(checkout.python), "CALLS": str(checkout.calls_file), "GATE": str(gate)}
    command = ["bash", str(checkout.root / "scripts" / "setup.sh")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as first:
        assert gate.read_text() == "in pip\n"  # so it has the lock
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as second:
            assert "another set-up of this checkout is running" in second.stderr.readline()
            gate.write_text("go on\n")
            assert [first.wait(60), second.wait(60)] == [0, 0]
    assert checkout.calls() == ["venv", *PLAIN]


def wheel(folder: Path, name: str, needs: str | None = None) -> None:
    """The smallest wheel that pip accepts: one module with nothing in it."""
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n" + (f"Requires-Dist: {needs}\n" if needs else "")
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_real_environment(checkout: Checkout):
    wheel(checkout.folder, "trained")
    wheel(checkout.folder, "embedded", needs="not-to-be-had")
    (checkout.root / "requirements.txt").write_text("trained==1.0\n")
    (checkout.root / "requirements-embedded.txt").write_text("embedded==1.0\n")
    local = {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": checkout.folder.as_uri()}
    run = checkout.run(**local)
    assert run.returncode == 0, run.stderr
    subprocess.run([checkout.venv / "bin" / "python", "-c", "import trained, embedded"], check=True)
    (checkout.root / "requirements.txt").write_text("trained==1.0\nabsent==1.0\n")
    run = checkout.run(**local)
    assert run.returncode == 1 and "pip could not install requirements.txt" in run.stderr and "absent" in run.stderr
    assert not checkout.looks_complete()


def pairs(arguments: list[str]) -> dict[str, str]:
    return {name.removeprefix("--"): value for name, value in zip(arguments[::2], arguments[1::2], strict=True)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_passes_defaults_environment_and_arguments(checkout: Checkout, script: str):
    run = checkout.run(script)
    assert run.returncode == 0, run.stderr
    (program, *arguments), folder, project = json.loads(run.stdout)
    assert Path(program) == checkout.root / f"{script}.py"
    assert Path(folder) == checkout.folder  # relative paths mean what they mean to whoever typed them
    assert pairs(arguments) == {"train_model_name": "SmolLM2-135M-Instruct"}  # the task is the data's, or MR
    assert project

    environment = {"TASK": "RTE", "MODEL": "a b", "OUTPUT_DIR": "c d", "SEED": "3", "PROJECT": "GLUE"}
    environment |= {"FROM_LOCAL": "True", "USE_COT": "True"}
    analysis = {} if script == "classify" else {"use_CoT": "True"}  # a head writes none
    run = checkout.run(script, "--seed", "4", "--data_path", "e f", **environment)
    (_, *arguments), _, project = json.loads(run.stdout)
    assert arguments[-4:] == ["--seed", "4", "--data_path", "e f"]
    expected = {"task": "RTE", "train_model_name": "a b", "output_dir": "c d", "seed": "4", "from_local": "True"}
    assert pairs(arguments) == expected | analysis | {"data_path": "e f"}
    assert project == "GLUE"


@pytest.mark.parametrize(
    ("script", "variable", "value"),
    [("sft", "datafolder_path", "data/a suite"), ("sft", "lines_per_file", "30000"), ("fewshot", "num_shots", "5")],
)
def test_script_passes_its_own_variables(checkout: Checkout, script: str, variable: str, value: str):
    run = checkout.run(script, **{variable.upper(): value})
    assert pairs(json.loads(run.stdout)[0][1:])[variable] == value


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_can_be_edited(checkout: Checkout, script: str):
    """Every commented option, with the comment sign taken away, reaches the program as one name and one value."""
    path = checkout.root / "scripts" / f"{script}.sh"
    text, count = re.subn(r"^    # (--\w+ )", r"    \1", path.read_text(), flags=re.MULTILINE)
    assert count >= 8
    path.write_text(text)
    run = checkout.run(script)
    assert run.returncode == 0, run.stderr
    assert len(pairs(json.loads(run.stdout)[0][1:])) == count + 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_failed_set_up_stops_the_script(checkout: Checkout, script: str):
    (checkout.root / "requirements.txt").write_text("broken==1\n")
    run = checkout.run(script)
    assert run.returncode != 0 and run.stdout == ""


def test_test_script_fails_if_a_check_fails(checkout: Checkout):
    """Every check runs, arguments go to pytest alone, and any failure is the script's."""
    run = checkout.run("test", "-k", "name")
    assert run.returncode == 0, run.stderr
    called = [" ".join(json.loads(line)[0]) for line in run.stdout.splitlines()]
    assert called == [
        "-m ruff check .",
        "-m ruff format --check .",
        "-m pytest -n 2 --dist loadfile --no-loadscope-reorder -k name",
    ]
    stand_in = checkout.venv / "bin" / "python"
    stand_in.write_text(stand_in.read_text().replace('"-m pip")', '"-m ruff") exit 3 ;;\n    "-m pip")'))
    run = checkout.run("test", PYTHON="")
    assert run.returncode == 3 and '"pytest"' in run.stdout


@pytest.mark.parametrize(
    ("said", "status", "expected"),
    [("3 passed in 1s", 0, 0), ("==== 12 passed, 1 skipped in 1s ====", 0, 0), ("4 skipped in 1s", 0, 1)]
    + [("no tests ran in 1s", 5, 5), ("1 failed, 3 passed in 1s", 1, 1)],
)
def test_ci_fails_if_tests_fail_or_none_ran(checkout: Checkout, said: str, status: int, expected: int):
    (checkout.root / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", checkout.root / ".ci")
    tests = f'echo "$HF_HUB_OFFLINE $WANDB_MODE"; echo "{said}"; exit {status}\n'
    (checkout.root / "scripts" / "test.sh").write_text(tests)
    run = subprocess.run(["bash", checkout.root / ".ci" / "run"], cwd=checkout.folder, capture_output=True, text=True)
    assert run.returncode == expected
    assert "1 offline" in run.stdout
