"""sft.py with a tiny random model: what it trains on is what inference.py asks and reads, and runs can go on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import inference
import ppo
import prompts
import sft
import tasks
from engine import models
from evaluation import answer_spaces
from machine.errors import TrainingError
from tasks import loaders, splits
from training.data import TaskData
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
    arguments = sft.SFTArguments(task=name, loss_on=loss_on)
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
    arguments = sft.SFTArguments(task="SST", data_path=str(FIXTURES), repeat_time=3, lines_per_file=2)
    parts = sft.load(arguments, [(task, splits.task_path(task, arguments.data_path))])
    assert len(parts[0].train) == 2
    table, _ = sft.dataset(arguments, parts, embedded)
    assert len(table) == 6


@pytest.mark.parametrize("loss_on", ["answer", "full"])
def test_loss_and_gradient_are_those_of_plain_cross_entropy(loss_on, model_folder, data_root, tmp_path):
    arguments = sft.SFTArguments(task="SST", data_path=str(data_root), batch_sentence_num=6, max_steps=1)
    arguments.loss_on, arguments.report_to = loss_on, "none"
    tokenizer = models.load_tokenizer(str(model_folder), True)
    sft.check(arguments)
    parts = sft.load(arguments, sft.find_tasks(arguments))
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


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def trained(model_folder, data_root, tmp_path_factory) -> Path:
    """A run of the script on one task: four steps, a checkpoint after every second one."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    given = dict(task="SST", max_steps=4, save_methods="step", save_freq=2, eval_steps=2, learning_rate=1e-2)
    command = [sys.executable, str(ROOT / "sft.py"), *options(model_folder, data_root, folder, **given)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "bash scripts/ppo.sh --task SST --from_local True --train_model_name" in result.stdout
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
    assert keys <= set(summary(trained)) and keys - {"steps", "best_step"} <= set(summary(answered))


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
        (["--loss_on", "prompt"], "--loss_on prompt must be one of answer, full"),
        (["--datafolder_path", "nowhere"], "--datafolder_path nowhere holds no task's training file"),
        (["--task", "AX"], "is answered by another task's model"),
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
