"""What a run says while it goes on: a bar on a terminal, plain lines elsewhere, and a few sample episodes."""

import io
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm

import tasks
from machine import terminal
from machine.terminal import Progress, time_left
from run.history import episodes, history
from run.progress import RunCallback, step_line


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch) -> Terminal:
    """Put standard output and error on one terminal; returns what is written to it."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


class Words:
    """A tokenizer whose tokens are words."""

    def decode(self, ids: list[str], skip_special_tokens: bool = False) -> str:
        return " ".join(word for word in ids if not (skip_special_tokens and word.startswith("<|")))


def train(folder, steps: int, first: int = 0, until: int | None = None, method: str = "ppo") -> RunCallback:
    """RunCallback as a trainer would call it: in PPO every step has episodes, in SFT every evaluation."""
    callback, task = RunCallback(folder, Words()), tasks.get("SST")
    callback.trainer = SimpleNamespace(episodes=[], step_task="")
    state = SimpleNamespace(global_step=first, max_steps=steps, is_world_process_zero=True)

    def sample() -> None:
        rows = [{"id": n, "sentence": f"film {state.global_step}{n}", "label": 1} for n in "abc"]
        callback.trainer.episodes = [  # two samples of each row
            {"prompt": ["<|user|>", row["sentence"]], "answer": "positive", "reward": 1.0, "row": row, "task": task}
            for row in rows
            for _ in range(2)
        ]

    callback.on_train_begin(None, state, None)
    for step in range(first + 1, (until or steps) + 1):
        callback.on_step_begin(None, state, None)
        state.global_step = step
        callback.on_step_end(None, state, None)
        if method == "ppo":
            sample()
        callback.on_log(None, state, None, {"objective/reward": 0.25, "train_runtime": 1.0})
        if method == "sft":
            sample()
            callback.on_log(None, state, None, {"eval/score": 0.5, "eval/seconds": 1.0})
    callback.on_train_end(None, state, None)
    return callback


def test_a_file_gets_one_plain_line_per_step(tmp_path, capsys):
    train(tmp_path, 3)
    said = capsys.readouterr()
    assert said.err == "" and "\r" not in said.out and "\x1b" not in said.out
    lines = [line for line in said.out.splitlines() if line.startswith("step")]
    assert lines == ["step 1/3  reward 0.250  0 s left", "step 2/3  reward 0.250  0 s left", "step 3/3  reward 0.250"]
    assert [line["step"] for line in history(tmp_path)] == [1, 2, 3]


def test_on_a_terminal_the_bar_stays_below_the_lines(tmp_path, monkeypatch):
    terminal = on_terminal(monkeypatch)
    train(tmp_path, 3)
    screen = terminal.getvalue()
    assert " left" not in screen
    lines = [written.rpartition("\r")[2] for written in screen.split("\n")]  # what remains of each line of the screen
    assert [line for line in lines if line.startswith("step ")] == [f"step {n}/3  reward 0.250" for n in (1, 2, 3)]
    assert [n for n, line in enumerate(lines) if "it/s" in line or "step/s" in line] == [len(lines) - 2]
    assert "100%" in lines[-2] and not tqdm._instances


def test_the_first_and_the_last_episodes_are_shown(tmp_path, capsys):
    train(tmp_path, 30)
    said = capsys.readouterr().out
    shown = [line for line in said.splitlines() if line.startswith("  | Review")]
    assert shown == [f"  | Review: film {name}" for name in ("1a", "1b", "30a", "30b")]
    assert said.count("  answer: 'positive'   gold: positive   reward: +1.00") == 4


@pytest.mark.parametrize("method", ["ppo", "sft"])
def test_episodes_are_kept_every_few_steps_and_over_a_resume_once(method, tmp_path, capsys):
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    train(tmp_path / "whole", 35, method=method)
    train(tmp_path / "resumed", 35, until=17, method=method)
    train(tmp_path / "resumed", 35, first=17, method=method)
    kept = episodes(tmp_path / "whole")
    assert [line["step"] for line in kept] == [1, 1, 11, 11, 21, 21, 31, 31, 35, 35]
    assert kept == episodes(tmp_path / "resumed") and kept[0]["prompt"] == "film 1a"


def test_a_long_run_keeps_no_more_episodes_than_a_short_one(tmp_path, capsys):
    train(tmp_path, 5000)
    assert len(episodes(tmp_path)) <= 2 * 102


def test_a_line_has_the_largest_shares():
    shares = {f"objective/share/{word}": share for word, share in zip("abcdef", (0.1, 0.3, 0.2, 0.1, 0.25, 0.05))}
    figures = {"objective/reward": 0.25, "objective/kl": 0.021, "policy/loss": 1.0, **shares}
    assert step_line(12, 72, figures) == "step 12/72  reward 0.250  KL 0.021  [b 0.30 e 0.25 c 0.20 a 0.10]"
    evaluated = {"eval/score": 0.5, "eval/seconds": 2.0}
    assert step_line(12, 72, evaluated) == "step 12/72  held-out: score 0.500  (2 s)"


@pytest.mark.parametrize(
    "seconds, text",
    [(59, "59 s left"), (89, "1 min left"), (170, "3 min left"), (5300, "88 min left"), (7500, "2 h 5 min left")],
)
def test_time_left(seconds, text):
    assert time_left(seconds) == text


def test_answers_to_a_file_are_counted_in_tenths(capsys, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: next(clock))
    with Progress("SST", "row", 100, 40) as progress:
        for _ in range(12):
            progress.advance(5)
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines()[-2:] == ["SST: 90/100 rows, 1 s left", "SST: 100/100 rows"]
    assert len(said.out.splitlines()) == 6


def test_answers_on_a_terminal_are_a_bar(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with Progress("SST", "row", 10, 0) as progress:
        progress.advance(10)
    assert "SST: 100%" in terminal.getvalue() and "rows" not in terminal.getvalue()


def test_processes_beside_the_main_one_show_nothing(capsys):
    with Progress("SST", "row", 10, 0, show=False) as progress:
        progress.advance(10)
    assert capsys.readouterr() == ("", "")
