"""Several tasks in one PPO policy: whose rows a step takes, that it is the step of a run of that task alone, and whole
runs of the script with their figures by task."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import forked
import pytest
import torch
from conftest import tiny_model, with_lora, word_tokenizer
from test_ppo_trainer import (
    LONG_WORDS,
    MODES,
    WORDS,
    answer_format,
    make_config,
    make_rows,
    noisy_reward,
    policy_gradient,
    tokens,
    word_reward,
)

import inference
import ppo
import report
from machine import manifests
from run.history import episodes, evaluations, history
from run.progress import quiet_trainer
from training.ppo_trainer import PPOTrainer
from training.sampler import StratifiedSampler, TaskSampler

# --------------------------------------------------------------------------------------------- whose rows a step takes


def turns(sampler: TaskSampler, batch: int, sizes: list[int]) -> list[int]:
    """The task of every batch of an epoch. All of a batch's rows are one task's."""
    rows, ends, found = list(sampler), [sum(sizes[: i + 1]) for i in range(len(sizes))], []
    assert len(rows) == len(sampler) and len(rows) % batch == 0
    for start in range(0, len(rows), batch):
        (task,) = {next(i for i, end in enumerate(ends) if row < end) for row in rows[start : start + batch]}
        found.append(task)
    return found


def labels(*sizes: int) -> list[list[int]]:
    return [[i % 2 for i in range(size)] for size in sizes]


def test_by_size_a_task_has_as_many_steps_as_it_has_batches():
    sizes = [83, 16, 40]
    sampler = TaskSampler(labels(*sizes), 8, seed=3)
    found = turns(sampler, 8, sizes)
    assert Counter(found) == {0: 10, 1: 2, 2: 5}
    for part in range(1, 18):  # any beginning has about each task's share
        assert all(abs(found[:part].count(task) - part * n / 17) < 2.5 for task, n in enumerate((10, 2, 5)))
    assert list(sampler) == list(sampler) == list(TaskSampler(labels(*sizes), 8, seed=3))
    sampler.set_epoch(1)
    assert Counter(turns(sampler, 8, sizes)) == Counter(found) and turns(sampler, 8, sizes) != found
    assert turns(TaskSampler(labels(*sizes), 8, seed=4), 8, sizes) != found


def test_evenly_every_task_has_one_of_each_few_steps_and_small_ones_repeat():
    sizes = [83, 16, 40]
    sampler = TaskSampler(labels(*sizes), 8, seed=3, evenly=True)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        found = turns(sampler, 8, sizes)
        assert len(found) == 30 and all(sorted(found[i : i + 3]) == [0, 1, 2] for i in range(0, 30, 3))
        assert len({tuple(found[i : i + 3]) for i in range(0, 30, 3)}) > 2
        rows = [row for row in sampler if 83 <= row < 99]
        passes = [rows[i : i + 16] for i in range(0, 80, 16)]
        assert all(sorted(part) == list(range(83, 99)) for part in passes)  # each row once before any comes again
        assert len({tuple(part) for part in passes}) == 5


def test_a_tasks_rows_come_in_the_order_that_they_have_alone():
    both, alone = TaskSampler(labels(24, 40), 8, seed=5), StratifiedSampler(labels(40)[0], 5)
    one = TaskSampler(labels(40), 8, seed=5)
    for epoch in (0, 1):
        for sampler in (both, alone, one):
            sampler.set_epoch(epoch)
        assert [row - 24 for row in both if row >= 24] == list(alone) == list(one)


def test_a_task_that_fills_no_step_is_refused():
    with pytest.raises(ValueError, match="a task has 7 rows, and a step takes 8"):
        TaskSampler(labels(40, 7), 8, seed=0)


# --------------------------------------------------------------------------------- a step is that of the task alone


SETTINGS = {**MODES, "expected": dict(policy_gradient="expected")}


def rows_of(beginning: str, count: int) -> list[dict]:
    return [{**row, "prompt_ids": tokens(beginning) + row["prompt_ids"]} for row in make_rows(16, count)]


ROWS = {"two": rows_of("w1 w2 w3 w4 w5", 2), "three": rows_of("w7 w8", 3)}
FORMATS = {"two": WORDS, "three": LONG_WORDS}


def trainer_of(names: list[str], mode: str, folder: Path, **more):
    """A trainer of these tasks, which have another beginning, other labels and other rewards."""
    use_CoT = mode == "analysis"
    formats = {name: answer_format(FORMATS[name], use_CoT=use_CoT) for name in names}
    rewards = {"two": noisy_reward, "three": [lambda completions, **columns: noisy_reward(completions, **columns)]}
    config = {"kl_coef": 0.05, "entropy_coef": 0.1, "learning_rate": 1e-2, **SETTINGS[mode], **more}
    if mode != "expected":
        config |= {"samples_per_prompt": 3}
    trainer = PPOTrainer(
        with_lora(tiny_model()),
        {name: rewards[name] for name in names},
        make_config(folder, **config),
        {name: ROWS[name] for name in names},
        word_tokenizer(),
        formats,
    )
    quiet_trainer(trainer)
    return trainer


def step_of(trainer, task: str, number: int):
    """The gradients and figures of a step without the optimizer's; number: of the step."""
    names = [part.name for part in trainer.tasks]
    trainer.model.zero_grad()
    trainer.state.global_step = number
    trainer.training_step(trainer.model, {"rows": ROWS[task][4:12], "task": names.index(task)})
    figures = {name: value for name, value in trainer.step_metrics.items() if not name.startswith("time/")}
    head = trainer.model.value_head.weight.grad
    return policy_gradient(trainer.model).clone(), None if head is None else head.clone(), figures


@pytest.mark.parametrize("mode", SETTINGS)
def test_a_step_is_that_of_its_task_alone(mode, tmp_path):
    """Gradients and figures, whatever task had the step before: reference prefix, labels and rewards are its own."""
    both = trainer_of(["two", "three"], mode, tmp_path / "both")
    alone = {name: trainer_of([name], mode, tmp_path / name) for name in ROWS}
    for number, task in enumerate(["two", "three", "three", "two", "three"]):
        gradient, head, figures = step_of(both, task, number)
        wanted, wanted_head, wanted_figures = step_of(alone[task], task, number)
        assert torch.equal(gradient, wanted) and (head is None) == (wanted_head is None)
        assert head is None or torch.equal(head, wanted_head)
        start = "objective/"
        assert figures == {name.replace(start, f"{start}{task}/"): value for name, value in wanted_figures.items()}
        assert both.step_task == task and alone[task].step_task == ""
        assert {episode["answer"] for episode in both.episodes} == {e["answer"] for e in alone[task].episodes}


def test_each_tasks_reference_prefix_is_computed_once(tmp_path):
    trainer = trainer_of(["two", "three"], "expected", tmp_path)
    counted = []
    run_prefix = trainer.engine.network.run_prefix
    trainer.engine.network.run_prefix = lambda ids: counted.append(len(ids)) or run_prefix(ids)
    for number, task in enumerate(["two", "three", "two", "three", "three"]):
        step_of(trainer, task, number)
    assert counted == [len(tokens("w1 w2 w3 w4 w5 Text:")), len(tokens("w7 w8 Text:"))]


@pytest.mark.parametrize("mode", SETTINGS)
def test_a_resumed_run_takes_the_same_tasks_and_comes_to_the_same_weights(mode, tmp_path):
    config = dict(max_steps=5, save_strategy="steps", save_steps=3, balance_tasks=True)
    straight = trainer_of(["two", "three"], mode, tmp_path / "straight", **config)
    straight.train()
    resumed = trainer_of(["two", "three"], mode, tmp_path / "resumed", **config)
    shutil.copytree(tmp_path / "straight" / "step-3", tmp_path / "resumed" / "step-3")
    torch.manual_seed(7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "step-3"))
    ours, theirs = resumed.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logged = [[name for line in t.state.log_history for name in line if "/reward" in name] for t in (straight, resumed)]
    assert logged[0] == logged[1] and len({*logged[0]}) > 2


def test_parts_of_other_tasks_are_refused(tmp_path):
    formats = {"two": answer_format(WORDS)}
    for rewards, rows in ((word_reward(), {"two": ROWS["two"]}), ({"two": word_reward()}, {"three": ROWS["three"]})):
        with pytest.raises(ValueError, match="of one task, or dicts of the same tasks"):
            PPOTrainer(with_lora(tiny_model()), rewards, make_config(tmp_path), rows, word_tokenizer(), formats)


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three tasks: two classes, three classes, numbers; 24, 16 and 20 training rows and 6, 5 and 4 to evaluate on."""
    root = tmp_path_factory.mktemp("data")
    for name in ("GLUE/SST", "GLUE/STS-B", "SuperGLUE/CB"):
        (root / name).mkdir(parents=True)
    for file, size in (("train.tsv", 24), ("dev.tsv", 6)):
        rows = [f"a {('dull', 'warm')[i % 2]} film, {i} \t{i % 2}" for i in range(size)]
        (root / "GLUE/SST" / file).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    for file, size in (("train.tsv", 20), ("dev.tsv", 4)):
        header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
        rows = [f"{i}\tnews\tmine\t2013\t{i}\tnone\tnone\tA cat {i}.\tA dog {i}.\t{i % 6}" for i in range(size)]
        (root / "GLUE/STS-B" / file).write_text("\n".join([header, *rows]) + "\n")
    for file, size in (("train.jsonl", 16), ("val.jsonl", 5)):
        kinds = ("entailment", "contradiction", "neutral")
        rows = [{"premise": f"It rains {i}.", "hypothesis": "It is wet.", "label": kinds[i % 3], "idx": i}
                for i in range(size)]  # fmt: skip
        (root / "SuperGLUE/CB" / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


TASKS = ["SST", "CB", "STS-B"]


def argv(model: Path, data: Path, folder: Path, **more) -> list[str]:
    given = dict(task=",".join(TASKS), batch_sentence_num=4, max_steps=6, eval_size=0, balance_tasks=True, eval_steps=3)
    return forked.argv(model, data, folder, **{**given, **more})


KINDS_OF_RUNS = {
    "expected": dict(kl_coef=0.05, success_order=2),
    "sampled": dict(policy_gradient="sampled", repeat_time=3, ppo_epochs=2, num_minibatches=2, reward_number=4),
    "free": dict(answer_space="free", repeat_time=2, max_response_length=3),
    "analysis": dict(use_CoT=True, max_response_length=4, repeat_time=2),
}


@pytest.mark.parametrize("kind", KINDS_OF_RUNS)
def test_a_run_says_everything_by_task(kind, model_folder, data, tmp_path, capsys):
    run = tmp_path / "run"
    ppo.main(argv(model_folder, data, run, **KINDS_OF_RUNS[kind]))
    said = capsys.readouterr().out
    summary, lines = forked.read(run / "summary.json"), history(run)
    assert summary["tasks"] == TASKS and summary["task"] == "SST,CB,STS-B" and summary["steps"] == 6
    expected = "expected" if kind == "expected" else "sampled"
    assert summary["arguments"]["policy_gradient"] == expected and summary["arguments"]["max_steps"] == 6
    # Steps: evenly, each task has one of three; the figures of its answers bear its name.
    steps = [line for line in lines if "policy/loss" in line]
    assert sorted(line["task"] for line in steps[:3]) == sorted(line["task"] for line in steps[3:]) == sorted(TASKS)
    for line in steps:
        own = {name for name in line if name.startswith("objective/")}
        assert own and all(name.startswith(f"objective/{line['task']}/") for name in own)
        reward = line[f"objective/{line['task']}/reward"]
        assert f"step {line['step']}/6  {line['task']}  reward {reward:.3f}" in said
    # Evaluations: the metrics of each task, and the means, by which the best one is chosen.
    found = evaluations(run)
    assert [line["step"] for line in found] == [0, 3, 6]
    for line in found:
        assert line["score"] == pytest.approx(sum(line[f"{task}/score"] for task in TASKS) / 3)
        assert {"SST/accuracy", "CB/macro_f1", "STS-B/pearson", "CB/invalid_rate"} <= set(line)
    best = max(found, key=lambda line: (line["score"], line["step"]))
    assert manifests.verify(run / "best")["step"] == best["step"] == summary["best_step"]
    assert summary["metrics"]["after"] == {**found[-1]} and set(summary["details"]) == set(TASKS)
    # Answers.
    assert {line["task"] for line in episodes(run)} <= {*TASKS} and all("prompt" in line for line in episodes(run))
    assert [sum(1 for _ in (run / task / "predictions.jsonl").open()) for task in TASKS] == [6, 5, 4]


def test_the_tasks_of_a_folder_or_of_a_suite_by_size(model_folder, data, tmp_path, capsys):
    """An epoch: 24 + 20 rows in steps of 4. A folder's tasks are in the order of the table of tasks."""
    given = dict(datafolder_path=data / "GLUE", max_steps=0, balance_tasks=False, eval_steps=0)
    ppo.main(argv(model_folder, data, tmp_path / "run", **given))
    summary, lines = forked.read(tmp_path / "run" / "summary.json"), history(tmp_path / "run")
    assert summary["task"] == "GLUE" and summary["tasks"] == ["SST", "STS-B"] and summary["steps"] == 11
    assert Counter(line["task"] for line in lines if "policy/loss" in line) == {"SST": 6, "STS-B": 5}
    assert (tmp_path / "run" / "epoch-1").is_dir()
    asked = re.search(r"scripts/inference.sh (.*)", capsys.readouterr().out)[1]
    assert "--task SST,STS-B " in asked and f"--data_path {data / 'GLUE'}" in asked and "--answer_space labels" in asked
    with pytest.raises(SystemExit):  # a suite is all of its tasks, and most are not here; AX is no matter
        ppo.main(argv(model_folder, data, tmp_path / "suite", task="GLUE"))
    assert (
        "no such file or folder (data_path for CoLA)" in capsys.readouterr().err and not (tmp_path / "suite").exists()
    )


def test_the_recipe_is_for_each_task(model_folder):
    given = dict(task="SST,CB,STS-B", train_model_name=str(model_folder), from_local=True)
    for more, steps in (({}, 216), ({"policy_gradient": "sampled"}, 108), ({"max_steps": 5}, 5), ({"end_epoch": 2}, 0)):
        arguments = ppo.PPOArguments(**given, **more)
        ppo.check(arguments, tasks=3)
        assert arguments.max_steps == steps


def test_a_killed_run_goes_on_to_what_it_would_have_been(model_folder, data, tmp_path):
    given = dict(policy_gradient="sampled", repeat_time=2, save_methods="step", save_freq=1)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert forked.run("ppo", argv(model_folder, data, straight, **given), tmp_path / "out.txt").code == 0
    again = argv(model_folder, data, killed, **given)
    assert forked.run("ppo", again, tmp_path / "out.txt", fault=("send", 4, "SIGKILL")).code == -9
    result = forked.run("ppo", again, tmp_path / "out.txt")
    assert result.code == 0, result.text
    assert forked.contents(killed) == forked.contents(straight)


def test_its_checkpoint_answers_each_task_and_the_report_has_each_and_the_mean(model_folder, data, tmp_path):
    runs = tmp_path / "runs"
    two = dict(task="SST,CB", eval_steps=0, learning_rate=1e-3)
    ppo.main(argv(model_folder, data, runs / "both", **two))
    for task in ("SST", "CB"):
        ppo.main(argv(model_folder, data, runs / task, **{**two, "task": task, "max_steps": 3}))
    asked = forked.argv(runs / "both" / "best", data, runs / "asked", task="SST,CB", eval_size=0)
    inference.main(asked[: asked.index("--learning_rate")] + asked[asked.index("--learning_rate") + 2 :])
    after = forked.read(runs / "both" / "summary.json")["metrics"]["best"]
    for task in ("SST", "CB"):
        found = forked.read(runs / "asked" / task / "summary.json")["metrics"]["after"]
        assert found == {name: after[f"{task}/{name}"] for name in found}
    report.main(["--runs", str(runs), "--output_dir", str(tmp_path / "report")])
    text = (tmp_path / "report" / "report.md").read_text()
    header = next(line for line in text.splitlines() if line.startswith("| task"))
    (mean,) = [line for line in text.splitlines() if line.startswith("| mean of SST, CB")]
    methods = [cell.strip() for cell in header.split("|")[4:-1]]
    assert {"PPO (labels, expected)", "PPO on SST,CB (labels, expected)", "zero-shot (labels)"} <= set(methods)
    means = dict(zip(methods, [cell.strip() for cell in mean.split("|")[4:-1]]))
    score = forked.read(runs / "both" / "summary.json")["metrics"]["after"]["score"]
    assert means["PPO on SST,CB (labels, expected)"] == f"{100 * score:.1f}"
    each = [forked.read(runs / task / "summary.json")["metrics"]["after"]["score"] for task in ("SST", "CB")]
    assert means["PPO (labels, expected)"] == f"{100 * sum(each) / 2:.1f}"
    assert "warning" not in text


def test_a_reward_function_is_told_the_task(model_folder, data, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def short(completions, task, log_metric, **columns):\n"
        "    log_metric(task[0].replace('-', ''), len({*task}))\n"
        "    return [float(len(text)) if name == 'SST' else None for text, name in zip(completions, task)]\n"
        "def of_sst(completions, sentence, id, label, prompts, completion_ids, **columns):\n"
        "    return [0.0] * len(completions)\n"
    )
    given = dict(task="SST,CB", max_steps=2, reward=f"{tmp_path}/mine.py:short", reward_weights="1,0.5")
    ppo.main(argv(model_folder, data, tmp_path / "run", **given))
    steps = {line["task"]: line for line in history(tmp_path / "run") if "policy/loss" in line}
    for task, line in steps.items():
        assert line[f"objective/{task}/reward/{task}"] == 1
    assert steps["SST"]["objective/SST/reward"] > 2 > 1 >= steps["CB"]["objective/CB/reward"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        ppo.main(argv(model_folder, data, tmp_path / "other", **{**given, "reward": f"{tmp_path}/mine.py:of_sst"}))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "missing a required argument: 'sentence'" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (dict(task="SST,CB,SST"), "--task SST,CB,SST names a task twice"),
        (
            dict(task="SST,AX"),
            "AX has no training data, as the model of MNLI-m answers it; leave it out",
        ),
        (dict(task="AX-b"), "name SuperGLUE/RTE in its place"),
        (dict(task="SST,Nothing"), "--task Nothing"),
        (dict(task="SST,RTE"), "no such file or folder (data_path for RTE)"),
        (dict(batch_sentence_num=18), "--batch_sentence_num 18 is more than the 16 training rows of CB"),
        (dict(data_path=__file__), "is one file, but --task names 3 tasks"),
        (dict(datafolder_path="/no/such/folder"), "--datafolder_path /no/such/folder holds no task's training file"),
        (dict(policy_gradient="expected", answer_space="free"), "needs --answer_space labels"),
    ],
)
def test_what_cannot_be_learned_together_ends_with_one_sentence(more, said, model_folder, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        ppo.main(argv(model_folder, data, tmp_path / "run", **more))
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and said in text and text.count("\n") == 1 and "Traceback" not in text
    assert not (tmp_path / "run").exists()
