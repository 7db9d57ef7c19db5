"""sft.py with a tiny random model: what it trains on is what inference.py asks and reads, and runs can go on."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import plain_label_log_probs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import inference
import ppo
import prompts
import sft
import tasks
from engine import models
from evaluation import answer_spaces
from machine.errors import ArgumentError, TrainingError
from tasks import loaders, splits
from training.data import TaskData, find_tasks
from training.ppo_trainer import PPOConfig, PPOTrainer
from training.sft_trainer import IGNORED, Finetuner

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
SMALL = dict(batch_sentence_num=8, report_to="none")


def options(model: Path, data: Path, output: Path, **more) -> list[str]:
    given = dict(from_local=True, train_model_name=model, data_path=data, output_dir=output, **SMALL, **more)
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def embedded():
    return models.load_tokenizer(models.EMBEDDED)


# ------------------------------------------------------------------------------------------------ what is learned


@pytest.mark.parametrize("name", ["SST", "CB", "STS-B", "BoolQ", "SIGA-nli"])
@pytest.mark.parametrize("loss_on", ["answer", "full"])
def test_prompt_and_answer_have_the_ids_of_inference(name, loss_on, embedded):
    task = tasks.get(name)
    rows = loaders.load(task, "train", data_root=FIXTURES)
    arguments = sft.SFTArguments(max_prompt_length=512, task=name, loss_on=loss_on)
    table, _ = sft.dataset(arguments, [TaskData(task, rows, rows)], embedded)
    trie = answer_spaces.label_trie(task, embedded)
    for row, entry in zip(rows, table, strict=True):
        asked, _ = prompts.build(task, row, embedded)
        ids, labels = entry["input_ids"], entry["labels"]
        assert ids[: len(asked)] == asked
        number = task.words.index(prompts.answer_word(task, row["label"]))
        spelling = trie.spellings[number]
        answer = ids[len(asked) :]
        assert answer[: len(spelling)] == spelling
        assert answer[-1] == embedded.eos_token_id
        assert embedded.decode(answer[:-1]) == prompts.target(task, row)
        assert labels[len(asked) :] == answer
        assert set(labels[: len(asked)]) == {IGNORED} if loss_on == "answer" else labels == ids


def test_rows_are_repeated_and_limited_per_task(embedded):
    task = tasks.get("SST")
    arguments = sft.SFTArguments(
        max_prompt_length=512, task="SST", data_path=str(FIXTURES), repeat_time=3, lines_per_file=2
    )
    parts = sft.load(arguments, [(task, splits.task_path(task, arguments.data_path))])
    assert len(parts[0].train) == 2
    table, _ = sft.dataset(arguments, parts, embedded)
    assert len(table) == 6


@pytest.mark.parametrize("loss_on", ["label", "answer"])
def test_balanced_tasks_have_the_same_number_of_rows(loss_on, embedded):
    """Three rows of SST and two of CB, up to seven: every row as often as any other of its task, or once more."""
    arguments = sft.SFTArguments(
        max_prompt_length=512, data_path=str(FIXTURES), lines_per_file=7, balance_tasks=True, loss_on=loss_on
    )
    known = [tasks.get("SST"), tasks.get("CB")]
    rows = [loaders.load(task, "train", data_root=FIXTURES)[:size] for task, size in zip(known, (3, 2))]
    table, _ = sft.dataset(arguments, [TaskData(task, part, part) for task, part in zip(known, rows)], embedded)
    ids = table["prompt_ids" if loss_on == "label" else "input_ids"]
    counts = [sorted(Counter(map(tuple, part)).values()) for part in (ids[:7], ids[7:])]
    assert counts == [[2, 2, 3], [3, 4]]
    again, _ = sft.dataset(arguments, [TaskData(task, part, part) for task, part in zip(known, rows)], embedded)
    assert again[:] == table[:]


@pytest.mark.parametrize("loss_on", ["answer", "full"])
def test_loss_and_gradient_are_those_of_plain_cross_entropy(loss_on, model_folder, data_root, tmp_path):
    arguments = sft.SFTArguments(
        max_prompt_length=512, task="SST", data_path=str(data_root), batch_sentence_num=6, max_steps=1
    )
    arguments.loss_on, arguments.report_to = loss_on, "none"
    tokenizer = models.load_tokenizer(str(model_folder), True)
    sft.check(arguments)
    parts = sft.load(arguments, find_tasks(arguments))
    table, _ = sft.dataset(arguments, parts, tokenizer)
    torch.manual_seed(0)
    trainer = Finetuner(
        models.load_model(str(model_folder), True),
        sft.trainer_config(arguments, tmp_path, 6),
        train_dataset=table,
        eval_dataset=table.select([0]),
        processing_class=tokenizer,
        peft_config=models.lora_config(init_lora_weights=False),
        evaluate_with=lambda engine: {},
        on_save=lambda folder: None,
    )
    assert trainer.args.shared_prefix == (loss_on == "answer")
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["input_ids"]) == 6
    weights = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    count = (batch["labels"][:, 1:] != IGNORED).sum()
    loss = trainer.training_step(trainer.model, dict(batch), count)
    found = {name: weight.grad.clone() for name, weight in weights.items()}
    trainer.model.zero_grad()
    network = trainer.engine.network
    hidden = network.backbone(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits, labels = network.head(hidden)[:, :-1], batch["labels"][:, 1:]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    plain.backward()
    assert float(loss) == pytest.approx(plain.item(), rel=1e-4)
    for name, weight in weights.items():
        assert torch.allclose(found[name], weight.grad, rtol=1e-3, atol=1e-6 + 1e-4 * float(weight.grad.norm())), name

    def full(*_args, **_more):
        raise MemoryError("DefaultCPUAllocator: can't allocate memory")

    if loss_on == "answer":
        trainer.engine.training_batches = full
        with pytest.raises(TrainingError, match=r"one row at a time.*step 1; there is no checkpoint yet"):
            trainer.training_step(trainer.model, dict(batch), count)


# ---------------------------------------------------------------------------------------- loss on the choice of a label


def random_finetuner(arguments, table, tokenizer, model_folder: Path, folder: Path, **more) -> Finetuner:
    """A trainer whose adapter does something from the start."""
    torch.manual_seed(0)
    return Finetuner(
        models.load_model(str(model_folder), True),
        sft.trainer_config(arguments, folder, len(table)),
        train_dataset=table,
        eval_dataset=table.select([0]),
        processing_class=tokenizer,
        peft_config=models.lora_config(init_lora_weights=False),
        evaluate_with=lambda engine: {},
        on_save=lambda folder: None,
        **more,
    )


def label_trainer(arguments, parts: list[TaskData], model_folder: Path, folder: Path) -> Finetuner:
    tokenizer = models.load_tokenizer(str(model_folder), True)
    sft.check(arguments)
    table, _ = sft.dataset(arguments, parts, tokenizer)
    tries = [answer_spaces.label_trie(part.task, tokenizer) for part in parts]
    return random_finetuner(arguments, table, tokenizer, model_folder, folder, label_tries=tries)


def expected_weights(part: TaskData, row: dict, soft: bool, smoothing: float) -> torch.Tensor:
    """(labels,) of the cross-entropy."""
    words, gold = part.task.words, row["label"]
    weights = [float(i == gold) for i in range(len(words))]
    if part.task.number:
        distance = [abs(float(word) - gold) for word in words]
        nearest = distance.index(min(distance))
        weights = [math.exp(-d / 0.5) if soft else float(i == nearest) for i, d in enumerate(distance)]
    return torch.tensor([(1 - smoothing) * w / sum(weights) + smoothing / len(words) for w in weights])


FILMS = ("a warm film", "a dull film", "slow", "an odd and long film")
FILM = [{"id": i, "sentence": text, "label": i % 3} for i, text in enumerate(FILMS)]
PHRASES = dataclasses.replace(tasks.get("SST"), words=("good", "good enough", "not good at all"))


@pytest.mark.parametrize(
    "names, options",
    [
        (["phrases"], {}),
        (["phrases"], {"label_smoothing": 0.2}),
        (["STS-B"], {}),
        (["STS-B"], {"number_target": "soft"}),
        (["phrases", "STS-B"], {"number_target": "soft", "label_smoothing": 0.1}),
    ],
)
def test_loss_on_labels_is_cross_entropy_over_whole_label_strings(names, options, model_folder, tmp_path):
    """Among the phrases one label begins with another, and numbers share their first tokens."""
    numbers = loaders.load(tasks.get("STS-B"), "train", data_root=FIXTURES)[:3]
    known = {"phrases": TaskData(PHRASES, FILM, FILM), "STS-B": TaskData(tasks.get("STS-B"), numbers, numbers)}
    parts = [known[name] for name in names]
    count = sum(len(part.train) for part in parts)
    arguments = sft.SFTArguments(
        max_prompt_length=512, loss_on="label", batch_sentence_num=count, max_steps=1, report_to="none", **options
    )
    trainer = label_trainer(arguments, parts, model_folder, tmp_path)
    trainer.engine.tokens_per_micro_batch = 100  # several micro-batches behind a shared prefix
    (batch,) = trainer.get_train_dataloader()
    assert len(batch["rows"]) == count
    weights = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    loss = trainer.training_step(trainer.model, batch)
    found = torch.cat([weight.grad.flatten() for weight in weights.values()])
    trainer.model.zero_grad()
    total = 0.0
    for part, trie in zip(parts, trainer.label_tries):
        spellings = [[*spelling, trie.close_token] for spelling in trie.spellings]
        for row in part.train:
            asked, _ = prompts.build(part.task, row, trainer.processing_class)
            target = expected_weights(part, row, options.get("number_target") == "soft", arguments.label_smoothing)
            plain = -(target * plain_label_log_probs(trainer.model, asked, spellings)).sum() / count
            plain.backward()  # row by row: the graphs of all 51 numbers of all rows are large
            total += plain.item()
    plain = torch.cat([weight.grad.flatten() for weight in weights.values()])
    assert float(loss) == pytest.approx(total, rel=1e-4)
    assert float((found - plain).norm() / plain.norm()) < 1e-4


def test_loss_on_labels_sees_the_rows_in_the_order_of_ppo(model_folder, data_root, tmp_path):
    given = dict(task="SST", data_path=str(data_root), batch_sentence_num=8, max_steps=2, report_to="none", seed=3)
    arguments = sft.SFTArguments(max_prompt_length=512, loss_on="label", **given)
    parts = sft.load(arguments, find_tasks(arguments))
    trainer = label_trainer(arguments, parts, model_folder, tmp_path)
    config = PPOConfig(output_dir=str(tmp_path), seed=3, use_cpu=True, report_to=[])
    rows = [{**row, "prompt_ids": [1]} for row in parts[0].train]
    theirs = PPOTrainer(
        models.load_model(str(model_folder), True),
        lambda completions, **columns: [0.0] * len(completions),
        config,
        rows,
        trainer.processing_class,
        answer_spaces.AnswerFormat(parts[0].task),
        models.lora_config(),
    )
    assert list(trainer._get_train_sampler()) == list(theirs._get_train_sampler())


def test_a_run_with_loss_on_labels(model_folder, data_root, tmp_path):
    run = tmp_path / "run"
    given = options(model_folder, data_root, run, task="SST", loss_on="label", max_steps=6, learning_rate=1e-2)
    sft.main([*given, "--label_smoothing", "0.1"])
    lines = [line for line in history(run) if "train/loss" in line]
    assert len(lines) == 6 and lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert all(0 <= line["train/accuracy"] <= 1 and 0 <= line["train/entropy"] < math.log(2) + 1e-4 for line in lines)
    assert summary(run)["arguments"]["loss_on"] == "label"


def test_a_task_without_labels_to_choose_among_is_refused():
    part = TaskData(dataclasses.replace(PHRASES, words=()), FILM, FILM)
    with pytest.raises(ArgumentError, match="--loss_on label: SST has no label set; use --loss_on answer"):
        sft.check_label_sets(sft.SFTArguments(max_prompt_length=512, loss_on="label"), [part])


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def trained(model_folder, data_root, tmp_path_factory) -> Path:
    """A run of the script on one task: four steps, a checkpoint after every second one."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    given = dict(task="SST", max_steps=4, save_methods="step", save_freq=2, eval_steps=2, learning_rate=1e-2)
    command = [sys.executable, str(ROOT / "sft.py"), *options(model_folder, data_root, folder, **given)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"bash scripts/ppo.sh --task SST --data_path {data_root} --from_local True" in result.stdout
    return folder


def test_a_run_leaves_checkpoints_history_and_summary(trained):
    files = {".lock", "run.json", "history.jsonl", "episodes.jsonl", "summary.json", "arguments.json"}
    files |= {"predictions-before.jsonl", "predictions.jsonl"}
    assert {"step-2", "step-4", "best", *files} == {path.name for path in trained.iterdir()}
    for name in ("step-2", "step-4", "best"):
        inside = {path.name for path in (trained / name).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= inside
    lines = history(trained)
    assert [line["step"] for line in lines if "eval/score" in line] == [0, 2, 4]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    written = summary(trained)
    assert written["method"] == "sft" and written["samples"] == 32 and written["steps"] == 4
    assert set(written["metrics"]) == {"before", "after", "best"} and written["train_seconds"] > 0
    assert written["metrics"]["best"]["score"] == max(line["eval/score"] for line in lines if "eval/score" in line)


def test_a_resumed_run_ends_where_the_whole_one_does(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("step-4", "summary.json"))
    sft.main(["--resume", str(folder), "--output_dir", str(folder)])
    for name in ("step-2", "step-4"):
        kept, again = (load_file(f / name / "adapter_model.safetensors") for f in (trained, folder))
        assert kept.keys() == again.keys() and all(torch.allclose(kept[n], again[n], atol=1e-6) for n in kept)
    assert [line["step"] for line in history(folder)] == [line["step"] for line in history(trained)]
    assert summary(folder)["metrics"] == summary(trained)["metrics"]


def merged(weights: dict[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """The weights with alpha / r * B A of an adapter on top."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    result = dict(weights)
    for name in [n for n in tensors if "lora_A" in n]:
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        result[target] = result[target] + config["lora_alpha"] / config["r"] * update
    return result


def test_ppo_goes_on_from_sft_and_inference_loads_both(trained, model_folder, data_root, tmp_path):
    run = tmp_path / "ppo"
    given = dict(task="SST", max_steps=2, learning_rate=1e-2, save_methods="step", save_freq=2)
    ppo.main(options(trained / "step-4", data_root, run, **given))
    last = run / "step-2"
    base = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    expected = merged(merged(base, trained / "step-4"), last)
    found = models.load_model(str(last), True).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.allclose(expected[name], found[name], atol=1e-5) for name in expected)
    assert any(not torch.allclose(expected[name], base[name], atol=1e-3) for name in expected)
    # inference.py asks the same rows and gets the figures that training reported.
    shutil.move(run, tmp_path / "moved")
    answered = tmp_path / "inference"
    inference.main(options(tmp_path / "moved" / "step-2", data_root, answered, task="SST"))
    after = {name: value for name, value in summary(tmp_path / "moved")["metrics"]["after"].items() if name != "step"}
    assert summary(answered)["metrics"]["after"] == pytest.approx(after)
    assert summary(answered)["method"] == "trained"
    keys = set(summary(tmp_path / "moved"))
    of_training = {"steps", "best_step", "tasks", "trained", "trained_weights"}
    assert keys <= set(summary(trained)) and keys - of_training <= set(summary(answered))


def test_all_tasks_of_a_folder_in_one_model(model_folder, tmp_path):
    run = tmp_path / "run"
    given = options(model_folder, FIXTURES, run, max_steps=1, lines_per_file=2, eval_size=2)
    sft.main([*given, "--datafolder_path", str(FIXTURES / "GLUE"), "--batch_sentence_num", "4"])
    written = summary(run)
    names = ["CoLA", "SST", "MRPC", "STS-B", "QQP", "MNLI-m", "QNLI", "RTE", "WNLI"]
    assert written["task"] == "GLUE" and written["tasks"] == names
    after = written["metrics"]["after"]
    assert after["score"] == pytest.approx(sum(after[f"{name}/score"] for name in names) / len(names))


@pytest.mark.parametrize("below", ["", "GLUE", "SuperGLUE"])
def test_a_folders_tasks_are_found_once_each(below):
    found = splits.found_below(FIXTURES / below)
    names = {task.name for task, _ in found}
    assert len(names) == len(found) and "MNLI-mm" not in names and not any(name.startswith("AX") for name in names)
    suites = {task.suite for task, _ in found if task.suite}
    assert suites == ({below} if below else set(tasks.SUITES))
    for task, place in found:
        assert loaders.load(splits.labelled(task, place), "train", data_path=place)


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--use_CoT", "True"], "holds no analyses to learn from"),
        (["--loss_on", "prompt"], "--loss_on prompt must be one of label, answer, full"),
        (["--loss_on", "answer", "--label_smoothing", "0.1"], "--label_smoothing 0.1 needs --loss_on label"),
        (["--loss_on", "label", "--label_smoothing", "1"], "--label_smoothing 1 must be at least 0 and less than 1"),
        (["--number_target", "soft", "--loss_on", "full"], "--number_target soft needs --loss_on label"),
        (["--loss_on", "label", "--number_target", "far"], "--number_target far must be one of nearest, soft"),
        (
            ["--loss_on", "label", "--number_target", "soft", "--task", "SST", "--data_path", str(FIXTURES)],
            "--number_target soft: no task here has numbers",
        ),
        (["--datafolder_path", "nowhere"], "--datafolder_path nowhere holds no task's training file"),
        (
            ["--task", "AX"],
            "--task AX: AX has no training data, as the model of MNLI-m answers it; name MNLI-m in its place",
        ),
        (["--task", "SST,AX"], "as the model of MNLI-m answers it; leave it out"),
        (["--lines_per_file", "0"], "--lines_per_file 0 must be greater than 0"),
        (["--learning_rate", "-1"], "--learning_rate -1.0 must be greater than 0"),
        (["--max_steps", "-1"], "--max_steps -1 must not be negative"),
        (["--start_epoch", "2", "--end_epoch", "2"], "--end_epoch 2 must be greater than --start_epoch 2"),
        (["--save_methods", "never"], "--save_methods never must be one of step, epoch"),
        (["--answer_space", "score", "--do_sample", "True"], "--answer_space score samples nothing"),
        (["--task", "SST,RTE", "--data_path", __file__], "is one file, but --task names 2 tasks"),
        (["--task", "SST", "--data_path", str(FIXTURES)], "is more than the 3 training rows"),
    ],
)
def test_bad_arguments_end_with_one_sentence(given, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        sft.main(["--report_to", "none", *given])
    assert stopped.value.code == 2
    left = capsys.readouterr().err.strip()
    assert said in left and "Traceback" not in left
