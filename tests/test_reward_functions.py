"""Reward functions: TRL's contract, and the user's own by --reward."""

import asyncio
import functools
import json
import os
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_ppo_trainer import LONG_WORDS, MODES, make_trainer, word_reward
from test_startup import start

import ppo
from machine.errors import ArgumentError, TrainingError
from rewards import JUDGEMENT_END
from run.history import episodes, history
from training import reward_functions
from training.reward_functions import ask, check, combine, load, numbers

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(), re.DOTALL)[1]


def given(completions: list[str], **columns) -> dict:
    count = len(completions)
    base = {"prompts": ["p"] * count, "completion_ids": [[1]] * count, "trainer_state": None}
    return {**base, "log_extra": lambda *_: None, "log_metric": lambda *_: None, "completions": completions, **columns}


def named(name: str) -> nullcontext:
    return nullcontext()


# ------------------------------------------------------------------------------------------------- what a function gets


@pytest.mark.parametrize("mode", ["expected", *(mode for mode in MODES if mode != "analysis")])
def test_what_a_function_is_called_with(mode, tmp_path):
    calls = []

    def watching(**columns):
        calls.append(columns)
        return [0.5] * len(columns["completions"])

    config = {**MODES.get(mode, {}), "samples_per_prompt": 1 if mode == "expected" else 3}
    trainer = make_trainer(tmp_path, reward=watching, words=LONG_WORDS, config=config)
    trainer.train()
    (call,) = calls
    texts = call["completions"]
    assert set(call) == {*reward_functions.GIVEN, "id", "label", "prompt_ids", "ended"}
    assert {len(call[name]) for name in ("prompts", "completions", "completion_ids", "id", "label", "ended")} == {24}
    assert call["trainer_state"] is trainer.state
    decode = trainer.processing_class.decode
    assert call["prompts"] == [decode(ids) for ids in call["prompt_ids"]]
    if mode == "free":
        ended = [
            ids[:-1] if ids[-1] == trainer.processing_class.eos_token_id else ids for ids in call["completion_ids"]
        ]
        assert texts == [decode(ids) for ids in ended]
    else:
        tokenize = functools.partial(trainer.processing_class, add_special_tokens=False)
        assert call["completion_ids"] == [tokenize(text).input_ids for text in texts] and all(call["ended"])
    if mode == "expected":
        assert texts == [word + JUDGEMENT_END for word in LONG_WORDS] * 8


def test_a_prompt_of_text_is_given_as_it_is(tmp_path):
    calls = []

    def watching(prompts, completions, **columns):
        calls.append((prompts, "prompt" in columns))
        return [0.0] * len(completions)

    rows = [{"id": i, "prompt": "Text:  red Answer:", "label": 0} for i in range(8)]
    make_trainer(tmp_path, reward=watching, rows=rows).train()
    assert calls == [(["Text:  red Answer:"] * 16, False)]


# --------------------------------------------------------------------------------------------------- what it may return


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([True, False], [1.0, 0.0]),
        ([np.float32(0.5), np.int64(2)], [0.5, 2.0]),
        ([torch.tensor(0.5), torch.tensor(True)], [0.5, 1.0]),
        (np.array([1.0, 2.0]), [1.0, 2.0]),
        (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
        ((x for x in (None, 3)), [None, 3.0]),
    ],
)
def test_numbers_of_every_kind_count(values, found):
    assert numbers(values, 2, print) == found and {type(x) for x in numbers(found, 2, print)} <= {float, type(None)}


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], ["1", "2"], 1.0, None, [[1], [2]]])
def test_what_is_no_number_each_is_refused(values):
    with pytest.raises(TrainingError, match="the reward function print must return one finite number per completion"):
        numbers(values, 2, print)


def test_who_has_no_opinion_abstains(tmp_path, capsys):
    def never(completions, **columns):
        return [None] * len(completions)

    def sometimes(completions, id, **columns):
        return [None if number < 8 else 2.0 for number in id]

    trainer = make_trainer(tmp_path, reward=[never, sometimes], config={"max_steps": 2})
    trainer.train()
    logged = [line["objective/reward"] for line in trainer.state.log_history if "objective/reward" in line]
    assert sum(logged) == pytest.approx(2.0) and {e["reward"] for e in trainer.episodes} <= {0.0, 2.0}
    said = capsys.readouterr().out
    assert said.count("No reward function has an opinion of the answer ") == 1


def test_weights_are_those_of_the_configuration(tmp_path):
    def one(completions, **columns):
        return [1.0] * len(completions)

    config = {"reward_weights": [0.5, 2.0]}
    trainer = make_trainer(tmp_path / "a", reward=[one, functools.partial(one)], config=config)
    trainer.train()
    assert {e["reward"] for e in trainer.episodes} == {2.5}
    with pytest.raises(ValueError, match="2 reward_weights for 1 reward functions"):
        make_trainer(tmp_path / "b", reward=one, config=config)


def test_the_sums_are_those_of_trl():
    from trl import GRPOTrainer

    async def length(completions, **columns):
        return [float(len(text)) for text in completions]

    def gold(completions, label, **columns):
        return [None if number == 1 else number for number in label]

    class Abstaining:
        async def __call__(self, completions, **columns):
            return [None, *([np.float32(0.25)] * (len(completions) - 1))]

    functions, weights, texts = [length, gold, Abstaining()], [0.5, 2.0, 4.0], ["a", "bb", "ccc"]
    call = given(texts, label=[0, 1, 2])
    loop = reward_functions.event_loop(os.getpid())
    stub = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True), reward_funcs=functions, environments=None,
        state=SimpleNamespace(global_step=0),
        reward_processing_classes=[None] * 3, reward_func_names=["length", "gold", "Abstaining"], async_loop=loop,
        _log_completion_extra=None, _log_metric=None, args=SimpleNamespace(report_to=[]),
    )  # fmt: skip
    rows = [{"prompt": "p", "label": number} for number in call["label"]]
    calculate = GRPOTrainer._calculate_rewards
    theirs = getattr(calculate, "__wrapped__", calculate)(stub, rows, call["prompts"], texts, call["completion_ids"])
    ours = ask(functions, call, named)
    as_numbers = torch.tensor([[float("nan") if x is None else x for x in values] for values in ours])
    assert torch.equal(as_numbers.T.nan_to_num(-9), theirs.nan_to_num(-9))
    assert combine(ours, weights) == pytest.approx((theirs * torch.tensor(weights)).nansum(dim=1).tolist())
    assert combine([[None], [None]], [1, 1]) == [None]


# ---------------------------------------------------------------------------------------------------------- async, logs


def test_asynchronous_functions_run_side_by_side_in_one_loop(tmp_path):
    loops, events = set(), {}

    async def waits(completions, trainer_state, **columns):
        loops.add(asyncio.get_running_loop())
        event = events.setdefault(trainer_state.global_step, asyncio.Event())
        await asyncio.wait_for(event.wait(), 60)
        return [1.0] * len(completions)

    async def sets(completions, trainer_state, **columns):
        events.setdefault(trainer_state.global_step, asyncio.Event()).set()
        return [0.5] * len(completions)

    trainer = make_trainer(tmp_path, reward=[waits, sets], config={"max_steps": 2})
    trainer.train()
    assert {e["reward"] for e in trainer.episodes} == {1.5} and len(loops) == 1 and set(events) == {0, 1}


def test_an_asynchronous_function_that_raises_is_named(tmp_path):
    async def broken(completions, **columns):
        raise KeyError("no such judge")

    trainer = make_trainer(tmp_path, reward=[word_reward(), broken])
    where = r"\(.*test_reward_functions.py, line \d+\) at step 1"
    with pytest.raises(TrainingError, match=f"the reward function broken raised KeyError: 'no such judge' {where}"):
        trainer.train()


@pytest.mark.parametrize("mode", ["expected", "free"])
def test_what_functions_log_is_kept(mode, tmp_path):
    def talking(completions, id, log_metric, log_extra, **columns):
        log_metric("length", 3)
        log_metric("length", torch.tensor(4.0))
        log_extra("judge", [f"{number}: {text}" for number, text in zip(id, completions)])
        return [0.0] * len(completions)

    trainer = make_trainer(tmp_path, reward=talking, config=MODES.get(mode))
    trainer.train()
    (logged,) = [line for line in trainer.state.log_history if "objective/reward" in line]
    assert logged["objective/reward/length"] == 3.5
    for episode in trainer.episodes:
        answer = episode["answer"].removesuffix(JUDGEMENT_END)
        assert episode["extra"]["judge"].removesuffix(JUDGEMENT_END) == f"{episode['row']['id']}: {answer}"


# ---------------------------------------------------------------------------------------------------------- trl.rewards


def test_functions_of_trl_get_conversations():
    texts = ["<think>a b</think> c", "a b c"]
    functions = load("trl.rewards:think_format_reward", ["label"])
    assert ask(functions, given(texts), named) == [[1.0, 0.0]]
    from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

    made = [get_repetition_penalty_reward(ngram_size=2), get_soft_overlong_punishment(4, 2)]
    call = given(["", ""], completion_ids=[[5, 5, 5, 5, 5], [1, 2, 3]])
    assert ask(made, call, named) == [[-0.75, 0.0], [-1.0, -0.5]]


def test_a_column_that_a_function_needs_must_be_there():
    with pytest.raises(ArgumentError, match="--reward trl.rewards:accuracy_reward: missing a required .*'solution'"):
        load("trl.rewards:accuracy_reward", ["label", "id"])


# ------------------------------------------------------------------------------------------------------------- --reward


@pytest.mark.parametrize(
    ("reward", "weights", "said"),
    [
        ("", "1,2", "--reward_weights 1,2 weighs what --reward names"),
        ("json", "", "--reward json must name a function as file.py:function"),
        ("no/such.py:f", "", r"--reward no/such.py:f: there is no file /.*/no/such.py; give"),
        ("no_such_package.inner:f", "", "there is no package no_such_package"),
        ("folder/file:f", "", "there is no package folder/file"),
        ("json:dumps", "1", "--reward_weights 1 must be 2 numbers"),
        ("json:dumps", "1,inf", "--reward_weights 1,inf must be numbers"),
        ("json:dumps", "a,b", "--reward_weights a,b must be numbers"),
    ],
)
def test_what_names_nothing_is_refused(reward, weights, said):
    with pytest.raises(ArgumentError, match=said):
        check(reward, weights)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("g = 1", "there is no f in .*mine.py"),
        ("f = 1", "f is no function"),
        ("import nothing_of_this_name", r"raised ModuleNotFoundError: .* \(.*mine.py, line 1\)"),
        ("def f(completions) return", r"raised SyntaxError: .*\(.*mine.py, line 1\)"),
        ("def f(completions, label): pass", "unexpected keyword argument 'prompts'; .* as keyword arguments"),
        ("def f(completions, mood, **columns): pass", "missing a required .*'mood'"),
    ],
)
def test_what_cannot_be_called_is_refused(text, said, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(text + "\n")
    monkeypatch.chdir(tmp_path)
    reward = check("mine.py:f", "")
    assert reward == f"{tmp_path}/mine.py:f"
    with pytest.raises(ArgumentError, match=f"--reward {reward}: .*{said}"):
        load(reward, ["label"])


def test_a_file_imports_what_lies_beside_it_and_hides_nothing(tmp_path):
    (tmp_path / "my_words.py").write_text("GOOD = 'yes'\n")
    (tmp_path / "rewards.py").write_text(
        "from my_words import GOOD\ndef f(completions, **columns): return [text == GOOD for text in completions]\n"
    )
    functions = load(check(f"{tmp_path}/rewards.py:f,{tmp_path}/rewards.py:f", "0,1,2"), ["label"])
    assert ask(functions, given(["yes", "no"]), named) == [[1.0, 0.0]] * 2
    import rewards

    assert Path(rewards.__file__).parent == ROOT


@pytest.mark.parametrize("reward", ["no/such.py:f", "example.py:missing"])
def test_nobody_waits_for_torch_to_hear_of_it(reward, data_root, tmp_path):
    (tmp_path / "example.py").write_text(EXAMPLE)
    place, _, name = reward.rpartition(":")
    named = [f"{tmp_path / place}:{name}", "--task", "SST", "--data_path", str(data_root)]
    result = start("ppo", "--report_to", "none", "--reward", *named)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"ppo.py: error: --reward {tmp_path / place}:{name}: there is no "), result.stderr
    assert result.stdout == "imported:\n"


def test_the_example_of_the_documents(model_folder, data_root, tmp_path, monkeypatch, capsys):
    """It runs, is recorded, and a resume with a changed file is refused."""
    (tmp_path / "my_rewards.py").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    options = [
        "--task", "SST", "--data_path", data_root, "--train_model_name", model_folder, "--from_local", "True",
        "--report_to", "none", "--batch_sentence_num", "8", "--max_steps", "2", "--save_methods", "step",
        "--save_freq", "1", "--eval_size", "4", "--output_dir", "run",
    ]  # fmt: skip
    options += ["--reward", "my_rewards.py:careful,my_rewards.py:short", "--reward_weights", "1,0.5,0.1"]
    ppo.main(list(map(str, options)))
    about = json.loads(Path("run/run.json").read_text())
    paths = [f"{tmp_path}/my_rewards.py:{name}" for name in ("careful", "short")]
    assert list(about["reward_files"]) == paths and {len(digest) for digest in about["reward_files"].values()} == {64}
    steps = [line for line in history(Path("run")) if "objective/reward" in line]
    assert len(steps) == 2 and all({"objective/accuracy", "objective/reward/tokens"} <= set(step) for step in steps)
    costs = {("negative", 1): -4.0, ("positive", 0): -1.0}
    for line in (line for line in episodes(Path("run")) if line["step"]):
        gold = ("negative", "positive").index(line["gold"])
        own = costs.get((line["answer"], gold), 1.0)
        right = 1.0 if line["answer"] == line["gold"] else -1.0
        short = 1 / len(word_tokens(model_folder, line["answer"] + JUDGEMENT_END))
        assert line["reward"] == pytest.approx(right + 0.5 * own + 0.1 * short)

    Path("my_rewards.py").write_text(EXAMPLE + "\n# changed\n")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        ppo.main(["--resume", "run", "--max_steps", "3", "--report_to", "none"])
    assert stopped.value.code == 2 and f"the file of --reward {paths[0]} is not the one" in capsys.readouterr().err
    Path("my_rewards.py").write_text(EXAMPLE)
    ppo.main(["--resume", "run", "--max_steps", "3", "--report_to", "none"])
    assert [line["step"] for line in history(Path("run")) if "objective/reward" in line] == [1, 2, 3]


def word_tokens(model_folder: Path, text: str) -> list[int]:
    from engine.models import load_tokenizer

    return load_tokenizer(str(model_folder), True)(text, add_special_tokens=False).input_ids
