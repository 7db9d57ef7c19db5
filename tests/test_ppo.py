"""ppo.py as its users run it, with a tiny model: what it writes, how it goes on, and how bad input ends."""

import importlib.metadata
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import ppo
import tasks
from engine import models
from run import arguments
from run import folder as run_folder
from run.folder import make_folder
from run.history import episodes, history

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
GOOD = ("a warm and funny film", "every minute is a joy", "tender and wise", "i laughed all the way")
BAD = ("a dull and noisy film", "every minute is a chore", "shallow and loud", "i slept all the way")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A saved random model with the embedded model's tokenizer, so that prompts are rendered by a chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    tokens = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model = tiny_model(vocab_size=len(tokenizer), initializer_range=0.1, **tokens)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_sst(folder: Path, rows: int = 24, held_out: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train.tsv", rows), ("dev.tsv", held_out)):
        lines = [f"{(BAD, GOOD)[i % 2][i // 2 % 4]} number {i} \t{i % 2}" for i in range(count)]
        (folder / name).write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def sst(tmp_path_factory) -> Path:
    return write_sst(tmp_path_factory.mktemp("data") / "SST")


@pytest.fixture
def run_ppo(tiny_folder, sst, monkeypatch):
    """Run ppo.main in this process; keyword arguments are options, None leaves one out."""
    monkeypatch.setattr(sys, "argv", ["ppo.py"])

    def run(**options) -> None:
        ppo.main(argv(tiny_folder, sst, **options))

    return run


def argv(model: Path, data: Path, **options) -> list[str]:
    options = {"task": "SST", "data_path": data, "train_model_name": model, "from_local": True, "report_to": "none",
               "batch_sentence_num": 8, **options}  # fmt: skip
    return [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]


def start(arguments: list[str], folder: Path) -> subprocess.Popen:
    """The real script, on a machine without a wandb account; what it prints lies beside its folder."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("WANDB_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "NETRC": "/no/such/file", "WANDB_LOG_MODEL": "end"}
    with open(folder.with_suffix(".txt"), "w") as output:
        return subprocess.Popen(
            [sys.executable, ROOT / "ppo.py", *arguments, "--output_dir", folder],
            stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder.parent,
        )  # fmt: skip


def read(folder: Path) -> tuple[dict, list[dict]]:
    """summary.json and the lines of history.jsonl."""
    return json.loads((folder / "summary.json").read_text()), history(folder)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def without_times(history: list[dict]) -> list[dict]:
    return [{n: v for n, v in line.items() if not n.startswith("time/") and n != "eval/seconds"} for line in history]


# ---------------------------------------------------------------------------------------------------------- real runs


SAMPLED = dict(
    policy_gradient="sampled", repeat_time=2, max_steps=9, end_epoch=9, eval_steps=3, save_methods="step", save_freq=1
)


@pytest.fixture(scope="module")
def processes(tiny_folder, sst, tmp_path_factory) -> dict[str, Path]:
    """Four runs side by side, as they would be typed; by name, their folders."""
    root = tmp_path_factory.mktemp("runs")
    config = root / "run.yaml"
    config.write_text("learning_rate: 1e-3\nmax_steps: 50\nsave_methods: step\nsave_freq: 4\neval_steps: 4\nseed: 3\n")
    options = {
        "labels": dict(config=config, max_steps=10, end_epoch=4, warmup_steps=0),
        "free": dict(answer_space="free", report_to="wandb", end_epoch=2, max_steps=4, repeat_time=2, eval_size=4),
        "killed": SAMPLED,
        "bad": dict(task="SSTT"),
    }
    folders = {name: root / name for name in options}
    running = {name: start(argv(tiny_folder, sst, **given), folders[name]) for name, given in options.items()}
    deadline = time.time() + 600
    while not (folders["killed"] / "step-2").exists() and running["killed"].poll() is None and time.time() < deadline:
        time.sleep(0.02)
    running["killed"].send_signal(signal.SIGKILL)
    try:
        for name, code in {"labels": 0, "free": 0, "bad": 2}.items():
            assert running[name].wait(timeout=max(1, deadline - time.time())) == code, output(folders[name])
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return folders


def output(folder: Path) -> str:
    return folder.with_suffix(".txt").read_text()


def test_a_run_with_labels_leaves_a_summary_a_history_and_checkpoints(processes, tiny_folder):
    folder = processes["labels"]
    summary, history = read(folder)
    written = {".lock", "run.json", "arguments.json", "summary.json", "history.jsonl", "episodes.jsonl"}
    written |= {"predictions-before.jsonl", "predictions.jsonl"}
    assert names(folder) == {*written, "best", "step-4", "step-8", "step-10"}
    # command line over YAML over defaults
    given = summary["arguments"]
    assert (given["max_steps"], given["learning_rate"], given["seed"], given["batch_sentence_num"]) == (10, 1e-3, 3, 8)
    assert given == json.loads((folder / "arguments.json").read_text())
    assert (given["answer_space"], given["policy_gradient"]) == ("labels", "expected")
    assert summary["method"] == "ppo" and summary["task"] == "SST" and summary["model"] == str(tiny_folder)
    assert (summary["seed"], summary["steps"], summary["samples"], summary["answer_space"]) == (3, 10, 80, "labels")
    assert summary["train_seconds"] > 0 and summary["peak_memory_bytes"] > 1e8 and len(summary["data_hash"]) == 16
    assert summary["versions"]["torch"] == importlib.metadata.version("torch") and summary["versions"]["commit"]
    for moment, step in {"before": 0, "after": 10, "best": summary["best_step"]}.items():
        figures = summary["metrics"][moment]
        assert figures["step"] == step and {"accuracy", "score", "invalid_rate"} <= set(figures)
        assert figures["invalid_rate"] == 0 and 0 <= figures["accuracy"] <= 1
    assert summary["metrics"]["best"]["score"] == max(
        summary["metrics"][m]["score"] for m in ("before", "after", "best")
    )
    assert [line["step"] for line in history if "eval/score" in line] == [0, 4, 8, 10]
    steps = [line for line in history if "policy/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    wanted = {"objective/reward", "objective/reward_std", "objective/kl", "objective/entropy", "objective/invalid_rate",
              "objective/accuracy", "objective/share/negative", "objective/share/positive", "policy/loss",
              "policy/clip_fraction", "policy/approx_kl", "policy/learning_rate", "policy/grad_norm",
              "time/seconds_per_step", "time/samples_per_second", "time/tokens_per_second"}  # fmt: skip
    assert all(wanted <= set(line) for line in steps)
    assert all(math.isfinite(value) for line in history for value in line.values())
    assert steps[0]["policy/learning_rate"] == pytest.approx(1e-3)


def test_sample_episodes_lie_in_the_folder(processes):
    kept = episodes(processes["labels"])
    assert [line["step"] for line in kept] == [1, 1, 10, 10]
    for line in kept:
        assert {"step", "id", "prompt", "answer", "gold", "reward"} == set(line)
        assert line["gold"] in ("negative", "positive") and "Review: " in line["prompt"]
        assert "<|im_" not in line["prompt"] and line["reward"] == (1 if line["gold"] in line["answer"] else -1)


def test_a_checkpoint_is_whole(processes):
    files = {"adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"}
    resumable = {"trainer_state.json", "optimizer.pt", "scheduler.pt"}
    for name in ("step-4", "step-10"):
        assert files | resumable <= names(processes["labels"] / name)
    assert files <= names(processes["labels"] / "best")
    assert [path.name for path in processes["labels"].rglob(".*")] == [".lock"]


def test_what_is_printed_is_readable(processes):
    text = output(processes["labels"])
    assert "SST: 24 training rows, 8 held out" in text and "held-out" in text and "gold:" in text
    assert f"Everything lies in {processes['labels']}" in text
    figures = r"reward -?\d\.\d{3}  accuracy \d\.\d{3}  invalid 0\.000  entropy \d\.\d{3}  KL -?\d\.\d{3}"
    for step in range(1, 11):  # one line for each; to a file no bar and no control character
        left = r"  \d+ s left" if step < 10 else ""
        (line,) = re.findall(rf"^step {step}/10  reward.*$", text, re.MULTILINE)
        assert re.fullmatch(rf"step {step}/10  {figures}  \[\w+ \d\.\d\d \w+ \d\.\d\d\]{left}", line), line
    assert not [character for character in text if ord(character) < 32 and character != "\n"] and "\x7f" not in text
    assert text.count("  answer: ") == 4 and "<|im_" not in text  # two episodes of the first step, two of the last
    assert text.count("  | Review: ") == text.count("  | Sentiment (negative or positive):") == 4
    assert "Traceback" not in text and "Warning" not in text, text


def wandb_records(path: Path) -> list:
    """The records of an offline run: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, message, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        rest = 32768 - place % 32768
        if rest < 7:
            place += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(message))
            message = b""
    return records


def wandb_figures(records: list) -> list[dict]:
    """What was logged, line by line."""
    lines = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items} for items in lines]


def test_a_free_run_reports_to_wandb_without_an_account(processes):
    folder = processes["free"]
    summary, history = read(folder)
    assert summary["answer_space"] == "free" and summary["arguments"]["policy_gradient"] == "sampled"
    assert summary["samples"] == 4 * 8 * 2 and summary["metrics"]["before"]["invalid_rate"] == 1.0  # a random model
    assert {"epoch-1", "best", "step-4"} <= names(folder)
    steps = [line for line in history if "policy/loss" in line]
    assert {"value/loss", "value/explained_variance", "policy/ratio", "objective/response_length"} <= set(steps[0])
    assert steps[0]["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert steps[0]["objective/invalid_rate"] > 0.9 and steps[0]["objective/reward"] < -2.5
    (path,) = folder.rglob("*.wandb")
    records = wandb_records(path)
    figures = wandb_figures(records)
    logged = [line["objective/reward"] for line in figures if "objective/reward" in line]
    assert logged == [pytest.approx(line["objective/reward"]) for line in steps]
    assert [line["eval/score"] for line in figures if "eval/score" in line] == [
        pytest.approx(line["eval/score"]) for line in history if "eval/score" in line
    ]
    assert [line["episodes/nrows"] for line in figures if "episodes/nrows" in line] == [0, 8]
    assert [line["train/samples"] for line in figures if "eval/score" in line] == [0, 4 * 8 * 2]
    assert all(line["time/peak_memory_bytes"] > 1e6 for line in figures if "policy/loss" in line)
    (about,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (about.run_group, about.job_type) == ("SST", "ppo")
    (kept,) = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"
               and record.artifact.type == "model"]  # fmt: skip
    assert "adapter_model.safetensors" in {entry.path for entry in kept.manifest.contents}


@pytest.mark.parametrize("dashboard", ["tensorboard", "trackio"])
def test_other_dashboards_get_the_same_names(dashboard, tiny_folder, sst, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = tmp_path / "run"
    running = start(argv(tiny_folder, sst, report_to=dashboard, max_steps=2, eval_size=4), folder)
    assert running.wait(timeout=300) == 0, output(folder)
    _, history = read(folder)
    wanted = [(n, line["step"], v) for line in history for n, v in line.items() if n != "step"]
    found = {"tensorboard": tensorboard_figures, "trackio": trackio_figures}[dashboard](tmp_path)
    assert len(wanted) > 40
    for name, step, value in wanted:  # the last step and the evaluation after it have the same number
        assert pytest.approx(value, rel=1e-5, abs=1e-7) in [v for n, s, v in found if (n, s) == (name, step)], name


def tensorboard_figures(folder: Path) -> list[tuple[str, int, float]]:
    """What was logged to TensorBoard: names, steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard")).Reload()
    return [(name, point.step, point.value) for name in events.Tags()["scalars"] for point in events.Scalars(name)]


def trackio_figures(folder: Path) -> list[tuple[str, int, float]]:
    """What was logged to trackio; read in a process that has the folder from its start."""
    program = (
        "import json; from trackio import SQLiteStorage as s; "
        "print(json.dumps([s.get_logs('nlu', run) for run in s.get_runs('nlu')], default=str))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    (lines,) = json.loads(said.splitlines()[-1])
    return [(name, line["train/global_step"], value) for line in lines for name, value in line.items()]


def test_a_killed_run_goes_on_where_it_was(processes, run_ppo, tmp_path, capsys):
    """`kill -9` in the middle, then --resume alone: the same figures and weights as a run that was left in peace."""
    killed, straight = processes["killed"], tmp_path / "straight"
    assert not (killed / "summary.json").exists()
    with open(killed / "history.jsonl", "a") as file:  # figures of a step after the last checkpoint
        file.write(json.dumps({"step": 99, "policy/loss": 0.0}) + "\n")
    ppo.main(["--resume", str(killed)])
    assert "Going on from" in capsys.readouterr().out
    run_ppo(output_dir=straight, **SAMPLED)
    (resumed, history), (expected, expected_history) = read(killed), read(straight)
    assert without_times(history) == without_times(expected_history)
    assert resumed["metrics"] == expected["metrics"] and resumed["steps"] == expected["steps"] == 9
    assert resumed["data_hash"] == expected["data_hash"] and resumed["samples"] == expected["samples"] == 9 * 8 * 2
    for file in ("adapter_model.safetensors", "value_head.safetensors"):
        assert (killed / "step-9" / file).read_bytes() == (straight / "step-9" / file).read_bytes()
    assert {f"step-{i}" for i in range(1, 10)} < names(straight)


def test_a_finished_run_is_prolonged(run_ppo, tmp_path, monkeypatch):
    run_ppo(output_dir=tmp_path / "run", max_steps=1)
    config = tmp_path / "more.yaml"
    config.write_text("max_steps: 2\nlearning_rate: 0.5\n")
    ppo.main(["--resume", str(tmp_path / "run"), "--config", str(config), "--learning_rate", "1e-4"])
    summary, history = read(tmp_path / "run")
    assert summary["steps"] == 2 and summary["arguments"]["learning_rate"] == 1e-4
    assert [line["step"] for line in history if "policy/loss" in line] == [1, 2]
    assert summary["metrics"]["before"]["step"] == 0 and summary["metrics"]["after"]["step"] == 2


def test_folders_are_named_by_task_model_batch_rate_and_time(run_ppo, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    run_ppo(start_epoch=2, end_epoch=4, max_steps=0, learning_rate=2e-4, eval_size=2)
    (folder,) = (tmp_path / "model" / "SST").iterdir()
    assert re.fullmatch(r"tiny-8-0\.0002-\d{8}-\d{6}", folder.name)
    assert {"epoch-3", "epoch-4", "best", "summary.json"} <= names(folder)  # 24 rows, 8 at once: 3 steps an epoch
    summary, _ = read(folder)
    assert summary["steps"] == 6
    settings = arguments.Arguments(train_model_name="Some/Model 7B", batch_sentence_num=4)
    task = tasks.get("SuperGLUE/RTE")
    first, second = make_folder(settings, task, 1e-5), make_folder(settings, task, 1e-5)
    assert first.parent == tmp_path / "model" / "SuperGLUE-RTE" and first.name.startswith("Model-7B-4-1e-05-")
    assert first != second and first.exists() and second.exists()


def test_an_adapter_is_trained_further(run_ppo, tmp_path, tiny_folder):
    """PPO on top of a checkpoint: the new checkpoint carries the old adapter, and the two load together."""
    run_ppo(output_dir=tmp_path / "first", max_steps=1, learning_rate=1e-2)
    run_ppo(
        output_dir=tmp_path / "second", max_steps=1, learning_rate=1e-2, train_model_name=tmp_path / "first" / "step-1"
    )
    before, _ = read(tmp_path / "second")
    after, _ = read(tmp_path / "first")
    assert before["metrics"]["before"]["score"] == after["metrics"]["after"]["score"]
    both = models.load_model(str(tmp_path / "second" / "step-1"), from_local=True)
    first = models.load_model(str(tmp_path / "first" / "step-1"), from_local=True)
    base = models.load_model(str(tiny_folder), from_local=True)
    weights = [dict(m.named_parameters())["model.layers.0.self_attn.q_proj.weight"] for m in (base, first, both)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


KINDS_OF_RUNS = {
    "sampled labels": dict(policy_gradient="sampled", repeat_time=3, ppo_epochs=2, num_minibatches=2, kl_coef=0.05),
    "groups": dict(policy_gradient="sampled", repeat_time=3, advantage="group", clip_range_high=0.3),
    "MaxRL": dict(success_order=4, kl_coef=0.05, kl_target=0.1, entropy_coef=0.1, entropy_end=0.0),
    "expected, several updates": dict(ppo_epochs=2, num_minibatches=4, kl_coef=0.05, entropy_coef=0.01),
    "free": dict(answer_space="free", repeat_time=2, max_response_length=3, strict_format=True),
    "analysis and labels": dict(use_CoT=True, max_response_length=4, repeat_time=2),
    "free analysis": dict(use_CoT=True, answer_space="free", max_response_length=4, repeat_time=2),
    "numbers": dict(task="STS-B", data_path=FIXTURES / "GLUE" / "STS-B", batch_sentence_num=2),
    "free numbers": dict(
        task="STS-B", data_path=FIXTURES / "GLUE" / "STS-B", batch_sentence_num=2, answer_space="free"
    ),
    "candidates": dict(task="ReCoRD", data_path=FIXTURES / "SuperGLUE" / "ReCoRD", batch_sentence_num=2),
    "free candidates": dict(
        task="ReCoRD", data_path=FIXTURES / "SuperGLUE" / "ReCoRD", batch_sentence_num=2, answer_space="free"
    ),
    "labels from the file": dict(task="MentalHealth", data_path=FIXTURES / "MentalHealth", batch_sentence_num=2),
}


@pytest.mark.parametrize("kind", KINDS_OF_RUNS)
def test_kinds_of_runs(kind, run_ppo, tmp_path):
    run_ppo(output_dir=tmp_path / "run", **{"max_steps": 2, "end_epoch": 9, **KINDS_OF_RUNS[kind]})
    summary, history = read(tmp_path / "run")
    assert summary["steps"] == 2 and {"before", "after", "best"} == set(summary["metrics"])
    assert all(math.isfinite(value) for line in history for value in line.values())
    if summary["answer_space"] == "labels":
        assert summary["metrics"]["after"]["invalid_rate"] == 0
        assert all(line["objective/invalid_rate"] == 0 for line in history if "policy/loss" in line)
        shares = [v for line in history for n, v in line.items() if n.startswith("objective/share/")]
        assert sum(shares) == pytest.approx(2.0, abs=1e-3)


def test_rewards_are_arguments(run_ppo, tmp_path):
    run_ppo(output_dir=tmp_path / "run", max_steps=1, answer_space="free", reward_invalid=-7, repeat_time=2)
    _, history = read(tmp_path / "run")
    (step,) = [line for line in history if "policy/loss" in line]
    assert step["objective/reward"] <= -6 and step["objective/invalid_rate"] > 0.8


# ---------------------------------------------------------------------------------------------------------- bad input


def expect_error(capsys, run, *parts: str, **options) -> None:
    """Exit code 2 and one line on standard error that holds all the parts."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(**options)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("ppo.py: error: ") and captured.err.count("\n") == 1, captured.err
    assert all(part in captured.err for part in parts), captured.err
    assert len(captured.err) < 700 and "Traceback" not in captured.err


BAD_OPTIONS = [
    (dict(task="SSTT"), ["--task SSTT", "SST"]),
    (dict(learning_rate=0), ["--learning_rate 0", "greater than 0"]),
    (dict(learning_rate=-1e-4), ["--learning_rate -0.0001"]),
    (dict(learning_rate="nan"), ["--learning_rate nan"]),
    (dict(learning_rate="fast"), ["--learning_rate", "fast"]),
    (dict(num_minibatches=3), ["--batch_sentence_num 8", "--num_minibatches 3"]),
    (dict(batch_sentence_num=0), ["--batch_sentence_num 0"]),
    (dict(batch_sentence_num=25), ["--batch_sentence_num 25", "24 training rows"]),
    (dict(batch_sentence_num="many"), ["--batch_sentence_num", "many"]),
    (dict(model_temperature=0), ["--model_temperature 0"]),
    (dict(kl_coef=-1), ["--kl_coef -1"]),
    (dict(kl_target=0.1), ["--kl_target 0.1", "--kl_coef"]),
    (dict(kl_target=-1), ["--kl_target -1"]),
    (dict(clip_range_high=0), ["--clip_range_high 0"]),
    (dict(entropy_end=-1), ["--entropy_end -1"]),
    (dict(success_order=0.5), ["--success_order 0.5", "at least 1"]),
    (dict(success_order=2, policy_gradient="sampled"), ["--success_order 2", "--policy_gradient expected"]),
    (dict(advantage="group"), ["--advantage group", "--policy_gradient sampled"]),
    (dict(advantage="best", policy_gradient="sampled"), ["--advantage best", "group_mean, batch"]),
    (dict(advantage="group", policy_gradient="sampled", repeat_time=1), ["--advantage group", "--repeat_time 2"]),
    (dict(end_epoch=0), ["--end_epoch 0", "--start_epoch 0"]),
    (dict(max_prompt_length=10), ["--max_prompt_length"]),
    (dict(answer_space="words"), ["--answer_space words", "labels, free"]),
    (dict(policy_gradient="exact"), ["--policy_gradient exact"]),
    (dict(policy_gradient="expected", answer_space="free"), ["--policy_gradient expected", "--answer_space labels"]),
    (dict(policy_gradient="expected", use_CoT=True), ["--policy_gradient expected", "--use_CoT False"]),
    (dict(save_methods="day"), ["--save_methods day", "step, epoch"]),
    (dict(report_to="paper"), ["--report_to paper", "none, wandb"]),
    (dict(from_local="maybe"), ["--from_local", "maybe"]),
    (dict(learning_rat=1), ["--learning_rat", "did you mean --learning_rate?"]),
    (dict(train_model_name="/no/such/model"), ["/no/such/model"]),
    (dict(train_model_name="/no/such/model", from_local=False), ["/no/such/model"]),
    (dict(train_model_name="no-such-user/no-such-model", from_local=False), ["no-such-user/no-such-model"]),
    (dict(data_path="/no/such/file.tsv"), ["/no/such/file.tsv"]),
    (dict(config="/no/such/file.yaml"), ["/no/such/file.yaml"]),
    (dict(resume="/no/such/run"), ["/no/such/run"]),
]


@pytest.mark.parametrize(
    "options, parts", BAD_OPTIONS, ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else ""
)
def test_a_bad_option_ends_with_one_sentence(options, parts, run_ppo, tmp_path, capsys):
    expect_error(capsys, run_ppo, *parts, output_dir=tmp_path / "run", **options)
    assert not names(tmp_path)


BAD_FILES = {
    "columns": (b"sentence\tlabel\na film \t1\na\tfilm \t0\n", ["train.tsv", "3"]),
    "label": (b"sentence\tlabel\na film \t1\nno film \t2\n", ["train.tsv", "3", "2"]),
    "empty": (b"", ["train.tsv"]),
    "header alone": (b"sentence\tlabel\n", ["train.tsv"]),
    "long text": (b"sentence\tlabel\na film \t1\n" + b"a " * 25_000 + b"\t0\n", ["train.tsv", "3", "50"]),
    "bytes": (b"sentence\tlabel\na film \t1\ncaf\xe9 \t0\n", ["train.tsv", "3"]),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_data_names_file_and_line(kind, run_ppo, tmp_path, capsys):
    content, parts = BAD_FILES[kind]
    data = write_sst(tmp_path / "data")
    (data / "train.tsv").write_bytes(content)
    for place in (data, data / "train.tsv"):
        expect_error(capsys, run_ppo, *parts, output_dir=tmp_path / "run", data_path=place)
    (data / "dev.tsv").write_bytes(content)
    write_sst(tmp_path / "good")
    (data / "train.tsv").write_bytes((tmp_path / "good" / "train.tsv").read_bytes())
    parts = [part.replace("train", "dev") for part in parts]
    expect_error(capsys, run_ppo, *parts, output_dir=tmp_path / "run", data_path=data)
    assert names(tmp_path) == {"data", "good"}


def test_a_folder_without_the_files(run_ppo, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    expect_error(capsys, run_ppo, "train.tsv", output_dir=tmp_path / "run", data_path=tmp_path / "data")


def test_a_model_folder_without_a_model(run_ppo, tmp_path, capsys):
    folder = tmp_path / "empty"
    folder.mkdir()
    expect_error(capsys, run_ppo, str(folder), "config.json", output_dir=tmp_path / "run", train_model_name=folder)
    (folder / "config.json").write_text("{}")
    expect_error(capsys, run_ppo, str(folder), output_dir=tmp_path / "run", train_model_name=folder)
    (folder / "config.json").write_text("not JSON")
    expect_error(capsys, run_ppo, str(folder), output_dir=tmp_path / "run", train_model_name=folder)
    assert names(tmp_path) == {"empty"}


def test_a_model_that_does_not_fit(run_ppo, tmp_path, capsys, monkeypatch):
    load = models.load_model

    def with_other_logits(*args, **options):
        model = load(*args, **options)
        model.register_forward_hook(lambda module, inputs, result: setattr(result, "logits", result.logits.sin()))
        return model

    monkeypatch.setattr(models, "load_model", with_other_logits)
    expect_error(capsys, run_ppo, "--train_model_name", "not its output layer", output_dir=tmp_path / "run")
    assert names(tmp_path) == set()


def test_an_output_folder_that_cannot_be_written(run_ppo, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file" / "run", tmp_path / "file"):
        expect_error(capsys, run_ppo, "--output_dir", str(folder), output_dir=folder)
    assert (tmp_path / "file").read_text() == "mine" and names(tmp_path) == {"file"}


def test_another_run_is_never_overwritten(run_ppo, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "arguments.json").write_text("{}")
    expect_error(capsys, run_ppo, "--output_dir", "not empty", "--resume", output_dir=tmp_path / "run")
    assert (tmp_path / "run" / "arguments.json").read_text() == "{}" and names(tmp_path / "run") == {"arguments.json"}


@pytest.mark.parametrize(
    "text, parts",
    [
        ("learning_rat: 1\n", ["learning_rat'", "unknown key", "did you mean learning_rate?"]),
        ("- a\n- b\n", ["name: value"]),
        ("a: b: c\n", ["cannot be read"]),
        ("max_steps: [1, 2]\n", ["max_steps"]),
        ("learning_rate: soon\n", ["learning_rate", "soon"]),
        ("seed: 1.5\n", ["seed", "1.5"]),
        ("use_CoT: 3\n", ["use_CoT", "3"]),
        ("task: 5\n", ["task", "5"]),
    ],
)
def test_a_bad_config(text, parts, run_ppo, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    options = {"task": None, "config": config, "output_dir": tmp_path / "run"}
    expect_error(capsys, run_ppo, *parts, **options)
    assert names(tmp_path) == {"run.yaml"}


def test_a_broken_resume_folder(run_ppo, tmp_path, capsys):
    (tmp_path / "arguments.json").write_text("{")
    expect_error(capsys, run_ppo, str(tmp_path), resume=tmp_path)


def test_the_command_itself_ends_so_too(processes):
    text = output(processes["bad"])
    assert text.startswith("ppo.py: error: --task SSTT") and text.count("\n") == 1
    assert not processes["bad"].exists()
