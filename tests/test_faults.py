"""What can happen to a run of ppo.py or sft.py, each made to happen: it ends with one sentence, or goes on unharmed."""

import errno
import os
import signal
import tempfile
from pathlib import Path

import forked
import peft
import pytest
import safetensors
import torch
from forked import argv, contents, lines, names, read

import ppo
from machine import manifests
from run import checkpoints, faults, progress
from run.history import append_history
from training import ppo_trainer

STEPS = dict(max_steps=3, eval_steps=3, save_methods="step", save_freq=1)


@pytest.fixture(scope="module")
def straight(model_folder, data_root, tmp_path_factory) -> Path:
    """The run that nothing happens to."""
    root = tmp_path_factory.mktemp("straight")
    result = forked.run("ppo", argv(model_folder, data_root, root / "run", **STEPS), root / "out.txt")
    assert result.code == 0, result.text
    return root / "run"


def same(folder: Path, straight: Path) -> bool:
    found, expected = contents(folder), contents(straight)
    return found.keys() == expected.keys() and all(found[key] == expected[key] for key in expected)


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_ends_the_run_after_its_step(name, code, straight, model_folder, data_root, tmp_path):
    folder = tmp_path / "run"
    given = argv(model_folder, data_root, folder, **{**STEPS, "save_freq": 9})  # no checkpoint is due
    result = forked.run("ppo", given, tmp_path / "out.txt", fault=("send", 2, name))
    assert result.code == code, result.text
    assert f"{name}: saving a checkpoint at the end of this step" in result.text
    assert f"stopped at step 2 by {name}; the last checkpoint is {folder}/step-2. Go on with:" in result.text
    assert f"bash scripts/ppo.sh --resume {folder}\n" in result.text and "Traceback" not in result.text
    assert [path.name for path in checkpoints.checkpoints_of(folder)] == ["step-2"]
    result = forked.run("ppo", ["--resume", str(folder)], tmp_path / "out.txt")
    assert result.code == 0 and f"Going on from {folder}/step-2" in result.text
    assert lines(folder) == lines(straight)
    for file in ("adapter_model.safetensors", "optimizer.pt"):
        assert (folder / "step-3" / file).read_bytes() == (straight / "step-3" / file).read_bytes()


@pytest.mark.parametrize("script", ["ppo", "sft"])
def test_a_signal_does_not_wait_for_the_evaluation_after_the_last_step(script, model_folder, data_root, tmp_path):
    """The step is saved, and what is missing is evaluated by a resume."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    given = {**STEPS, "save_freq": 9}
    fault = ("send_in_evaluation", 2, "SIGTERM")
    result = forked.run(script, argv(model_folder, data_root, folder, **given), tmp_path / "out.txt", fault=fault)
    assert result.code == 143 and "Traceback" not in result.text, result.text
    assert f"stopped at once by SIGTERM; the last checkpoint is {folder}/step-3" in result.text
    assert {line["step"] for line in lines(folder) if "eval/score" in line} == {0}
    result = forked.run(script, ["--resume", str(folder)], tmp_path / "out.txt")
    assert result.code == 0, result.text
    assert forked.run(script, argv(model_folder, data_root, whole, **given), tmp_path / "out.txt").code == 0
    assert lines(folder) == lines(whole) and names(folder) == names(whole)


@pytest.mark.parametrize("script", ["ppo", "sft"])
def test_a_second_interrupt_ends_it_at_once(script, model_folder, data_root, tmp_path):
    folder = tmp_path / "run"
    given = argv(model_folder, data_root, folder, **STEPS)
    result = forked.run(script, given, tmp_path / "out.txt", fault=("send", 2, "SIGINT", "SIGINT"))
    assert result.code == 130 and "Traceback" not in result.text, result.text
    assert f"stopped at once by SIGINT; the last checkpoint is {folder}/step-1" in result.text
    assert not [path for path in folder.iterdir() if path.name.startswith((".new-", "step-2"))]


def test_a_second_hangup_does_not_cut_the_checkpoint_short(model_folder, data_root, tmp_path):
    """A shell that ends sends another one to what the kernel has told already."""
    given = argv(model_folder, data_root, tmp_path / "run", **STEPS)
    result = forked.run("ppo", given, tmp_path / "out.txt", fault=("send", 2, "SIGHUP", "SIGHUP", "SIGTERM"))
    assert result.code == 129 and "step-2" in names(tmp_path / "run"), result.text


def test_nohup_stays_in_force(capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with faults.guard("ppo.py"):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_before_training_says_so(capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell lets it be ignored
    try:
        with pytest.raises(SystemExit) as end, faults.guard("ppo.py"):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    assert capsys.readouterr().err == "ppo.py: stopped at once by SIGINT; there is no checkpoint yet\n"


# -------------------------------------------------------------------------------------------------- nobody reads output


def test_the_terminal_goes_away(straight, model_folder, data_root, tmp_path):
    """A real one: the kernel sends SIGHUP, and every print after it fails with EIO."""
    folder = tmp_path / "run"
    given = argv(model_folder, data_root, folder, **STEPS)
    pid = forked.start("ppo", given, tmp_path / "out.txt", fault=("send", 2, "SIGSTOP"), stdout="terminal")
    assert forked.wait(pid) == -signal.SIGSTOP
    forked.hang_up(pid)
    assert forked.wait(pid) == 129
    assert [path.name for path in checkpoints.checkpoints_of(folder)] == ["step-1", "step-2"]
    assert forked.run("ppo", given, tmp_path / "out.txt").code == 0 and same(folder, straight)


def test_a_closed_pipe_does_not_end_the_run(straight, model_folder, data_root, tmp_path):
    given = argv(model_folder, data_root, tmp_path / "run", **STEPS)
    assert forked.run("ppo", given, tmp_path / "out.txt", stdout="closed").code == 0
    assert same(tmp_path / "run", straight)


# ------------------------------------------------------------------------------------------------------------ full disk


@pytest.mark.parametrize("script", ["ppo", "sft"])
def test_a_disk_that_fills_up(script, straight, model_folder, data_root, tmp_path):
    """No file may grow beyond 50 kB from step 2 on, which is what the kernel does to a write when the disk is full."""
    folder = tmp_path / "run"
    given = argv(model_folder, data_root, folder, **STEPS)
    result = forked.run(script, given, tmp_path / "out.txt", fault=("limit_files", 2, 50_000))
    assert result.code == 1, result.text
    said = result.text[result.text.index(f"{script}.py: stopped:") :]
    assert f"{folder}/step-2 could not be written at step 2" in said and "untouched: step-1" in said
    assert f"bash scripts/{script}.sh --resume {folder}" in said and "Traceback" not in result.text
    assert {"step-1", "best"} < names(folder) and not [n for n in names(folder) if n.startswith((".new-", "step-2"))]
    result = forked.run(script, given, tmp_path / "out.txt")  # there is room again
    assert result.code == 0, result.text
    assert script == "sft" or same(folder, straight)


def raising(error: Exception):
    def write(*args, **kwargs):
        raise error

    return write


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
WRITES = {
    "weights": (peft.peft_model, "safe_save_file", safetensors.SafetensorError("I/O error: No space left on device")),
    "value head": (ppo_trainer, "save_file", safetensors.SafetensorError("I/O error: No space left on device")),
    "optimizer": (torch, "save", RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")),
    "manifest": (manifests, "write", FULL),
    "rename": (os, "replace", FULL),
    "folder": (tempfile, "mkdtemp", FULL),
}


@pytest.mark.parametrize("kind", WRITES)
def test_any_write_of_a_checkpoint_that_fails(kind, model_folder, data_root, tmp_path, monkeypatch, capsys):
    folder, (module, name, error) = tmp_path / "run", WRITES[kind]
    original = ppo_trainer.PPOTrainer._save_checkpoint

    def save(self, *args):
        if self.state.global_step == 2:
            monkeypatch.setattr(module, name, raising(error))
        original(self, *args)

    monkeypatch.setattr(ppo_trainer.PPOTrainer, "_save_checkpoint", save)
    with pytest.raises(SystemExit) as end:
        ppo.main(argv(model_folder, data_root, folder, **{**STEPS, "eval_size": 2}))
    monkeypatch.undo()
    text = capsys.readouterr().err
    assert end.value.code == 1 and "could not be written at step 2" in text and "untouched: step-1" in text, text
    assert not [n for n in names(folder) if n.startswith((".new-", "step-2"))] or kind == "rename"
    checkpoints.verify(folder / "step-1")
    manifests.verify(folder / "best")


def test_a_history_that_cannot_be_written(model_folder, data_root, tmp_path, monkeypatch, capsys):

    original = append_history

    def append(folder, step, figures, task=""):
        if step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "history.jsonl"))
        original(folder, step, figures, task)

    monkeypatch.setattr(progress, "append_history", append)
    with pytest.raises(SystemExit) as end:
        ppo.main(argv(model_folder, data_root, tmp_path / "run", **{**STEPS, "eval_size": 2}))
    text = capsys.readouterr().err
    assert end.value.code == 1 and "No space left on device" in text and "history.jsonl" in text
    assert f"the last checkpoint is {tmp_path}/run/step-1. Go on with:" in text


# ----------------------------------------------------------------------------------------------------- reward functions


def test_a_reward_function_that_raises(model_folder, data_root, tmp_path):
    folder = tmp_path / "run"
    given = argv(model_folder, data_root, folder, **STEPS)
    result = forked.run("ppo", given, tmp_path / "out.txt", fault=("failing_reward", 3))
    assert result.code == 1 and "Traceback" not in result.text, result.text
    assert "the reward function broken raised KeyError: 'no such label'" in result.text
    assert f"forked.py, line {broken_line()}) at step 3; the last checkpoint is {folder}/step-2" in result.text


def broken_line() -> int:
    texts = Path(forked.__file__).read_text().splitlines()
    return next(number for number, text in enumerate(texts, start=1) if "no such label" in text)


# --------------------------------------------------------------------------------------------------------- a second run


def test_a_second_run_in_the_same_folder(straight, model_folder, data_root, tmp_path):
    folder = tmp_path / "run"
    given = argv(model_folder, data_root, folder, **STEPS)
    pid = forked.start("ppo", given, tmp_path / "out.txt", fault=("send", 2, "SIGSTOP"))
    assert forked.wait(pid) == -signal.SIGSTOP
    before = names(folder)
    second = forked.run("ppo", given, tmp_path / "second.txt")
    assert second.code == 2 and f"{folder} is in use: the run of process {pid} on " in second.text, second.text
    assert names(folder) == before
    os.kill(pid, signal.SIGKILL)
    assert forked.wait(pid) == -signal.SIGKILL
    third = forked.run("ppo", given, tmp_path / "third.txt")  # the kernel has let go
    assert third.code == 0 and same(folder, straight), third.text


# ---------------------------------------------------------------------------------------------------------------- wandb


def test_wandb_is_killed_in_the_middle(straight, model_folder, data_root, tmp_path):
    given = argv(model_folder, data_root, tmp_path / "run", **{**STEPS, "report_to": "wandb"})
    result = forked.run("ppo", given, tmp_path / "out.txt", fault=("kill_wandb", 2))
    assert result.code == 0, result.text
    assert result.text.count("The run goes on without it.") == 1 and "Traceback" not in result.text, result.text
    assert lines(tmp_path / "run") == lines(straight)


KEY = "0123456789abcdef" * 2 + "01234567"


def test_wandb_cannot_be_reached(straight, model_folder, data_root, tmp_path):
    """With a key, and a server that refuses every connection: the run is kept offline, and the key nowhere."""
    given = argv(model_folder, data_root, tmp_path / "run", **{**STEPS, "report_to": "wandb"})
    environment = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
    result = forked.run("ppo", given, tmp_path / "out.txt", env=environment)
    assert result.code == 0 and "Traceback" not in result.text, result.text
    assert result.text.count("The run is kept offline") == 1, result.text
    assert lines(tmp_path / "run") == lines(straight)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert KEY not in result.text
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holding == []
    assert KEY not in str(read(tmp_path / "run" / "run.json"))
