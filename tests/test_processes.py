"""Two processes on one run (gloo) against one process with the same batch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import ppo
from machine import processes

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATIONS = ROOT / "scripts" / "accelerate"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


def options(model: Path, data: Path, **more) -> list[str]:
    given = dict(task="SST", data_path=data, train_model_name=model, from_local=True, **more)
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def launch(
    count: int, script: str, *given: str, check: bool = True, by: str = "processes", **environment
) -> subprocess.CompletedProcess:
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / f"{by}.yaml")]
    launcher = [*launcher, "--num_processes", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, str(ROOT / script), "--report_to", "none", *given]
    done = subprocess.run(
        command, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def figures(folder: Path) -> list[dict]:
    """history.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if not n.startswith("time/") and n != "eval/seconds"} for line in lines]


def test_two_processes_take_the_same_task_in_a_step(model_folder, data_root, tmp_path):
    """Each has a share of the step's rows, with the reference's prefix of the step's task."""
    root = tmp_path / "data"
    shutil.copytree(data_root, root)
    (root / "GLUE" / "RTE").mkdir()
    for name, size in (("train.tsv", 24), ("dev.tsv", 6)):
        rows = [f"{i}\tIt rains, {i}.\tIt is wet.\t{('entailment', 'not_entailment')[i % 2]}" for i in range(size)]
        (root / "GLUE" / "RTE" / name).write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    given = options(model_folder, root, batch_sentence_num=8, max_steps=4, balance_tasks=True, kl_coef=0.05)
    given[given.index("SST")] = "SST,RTE"
    for count in (1, 2):
        launch(count, "ppo.py", *given, "--output_dir", str(tmp_path / str(count)))
    assert_same_run(tmp_path / "1", tmp_path / "2")
    steps = [line["task"] for line in figures(tmp_path / "2") if "task" in line]
    assert sorted(steps[:2]) == sorted(steps[2:]) == ["RTE", "SST"]


def assert_same_run(one: Path, two: Path) -> None:
    first, second = figures(one), figures(two)
    assert [sorted(line) for line in first] == [sorted(line) for line in second]
    for line, other in zip(first, second):
        assert line.pop("task", "") == other.pop("task", "")
        assert other == pytest.approx(line, rel=2e-3, abs=2e-4)
    weights, others = (load_file(folder / "best" / "adapter_model.safetensors") for folder in (one, two))
    for name, weight in weights.items():
        assert float((weight - others[name]).abs().max()) < 2e-4, name
    files = [sorted(folder.rglob("predictions.jsonl")) for folder in (one, two)]
    answers = [[json.loads(line)["label"] for f in found for line in f.read_text().splitlines()] for found in files]
    assert answers[0] == answers[1] != []


@pytest.mark.parametrize(
    "kind",
    [
        ["ppo.py", "--ppo_epochs", "2", "--num_minibatches", "2"],
        ["ppo.py", "--policy_gradient", "sampled", "--repeat_time", "4", "--kl_coef", "0.05"],
        ["ppo.py", "--policy_gradient", "sampled", "--repeat_time", "4", "--advantage", "batch"],
        ["sft.py"],
        ["sft.py", "--loss_on", "label"],
        ["classify.py", "--tokens_per_micro_batch", "40"],
    ],
    ids=["expected", "sampled", "batch", "sft", "sft-label", "classify"],
)
def test_two_processes_learn_what_one_does(kind, model_folder, data_root, tmp_path):
    script, *more = kind
    given = options(model_folder, data_root, batch_sentence_num=8, max_steps=3, eval_steps=2)
    for count in (1, 2):
        launch(count, script, *given, *more, "--output_dir", str(tmp_path / str(count)))
    assert_same_run(tmp_path / "1", tmp_path / "2")
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in "12"]
    assert summaries[0]["samples"] == summaries[1]["samples"] and summaries[0]["steps"] == summaries[1]["steps"] == 3


@pytest.mark.parametrize("script", ["inference.py", "fewshot.py"])
def test_two_processes_answer_what_one_does(script, model_folder, data_root, tmp_path):
    given = options(model_folder, data_root, batch_sentence_num=5, answer_space="free", do_sample=True)
    for count in (1, 2):
        launch(count, script, *given, "--output_dir", str(tmp_path / str(count)))
    one, two = (tmp_path / n / "predictions.jsonl" for n in "12")
    assert one.read_text() == two.read_text()
    metrics = [json.loads((tmp_path / n / "summary.json").read_text())["metrics"] for n in "12"]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("code", [0, 3])
def test_no_thread_keeps_one_of_several_processes_from_ending(code):
    """Threads of gloo have aborted processes whose work was done."""
    program = (
        "import atexit, sys, threading\nfrom machine import processes\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "atexit.register(print, 'said at the end')\n"
        f"processes.run(lambda: sys.exit({code}))\n"
    )
    environment = {**os.environ, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (code, "said at the end\n")


def test_bad_input_is_said_once(model_folder, data_root, tmp_path):
    done = launch(2, "ppo.py", "--task", "SSTT", check=False)
    assert done.returncode != 0 and done.stderr.count("ppo.py: error: --task SSTT") == 1
    done = launch(2, "ppo.py", *options(model_folder, data_root, batch_sentence_num=7), check=False)
    assert "--batch_sentence_num 7 cannot be divided among 2 processes" in done.stderr


def needs_deepspeed(by: str) -> None:
    if by.startswith("zero"):
        pytest.importorskip("deepspeed")


SHARDED = {
    "expected": "ppo.py --ppo_epochs 2 --num_minibatches 2",
    "free": "ppo.py --answer_space free --repeat_time 3 --kl_coef 0.05 --max_response_length 5",
    "sft": "sft.py",
    "sft-label": "sft.py --loss_on label",
    "sft-full": "sft.py --loss_on full",
}


@pytest.mark.parametrize(
    ("by", "kind"),
    [("fsdp", kind) for kind in SHARDED] + [("zero3", "free"), ("zero3", "sft"), ("zero2", "expected")],
)
def test_sharded_weights_learn_the_same(by, kind, model_folder, data_root, tmp_path):
    """The two processes have unequal numbers of rows, micro-batches and generated tokens."""
    needs_deepspeed(by)
    script, *more = SHARDED[kind].split()
    given = options(model_folder, data_root, batch_sentence_num=6, max_steps=3, eval_steps=2, eval_size=7)
    given += more + (["--tokens_per_micro_batch", "48"] if script == "ppo.py" else [])
    launch(1, script, *given, "--output_dir", str(tmp_path / "1"))
    done = launch(2, script, *given, "--output_dir", str(tmp_path / "2"), by=by)
    named = "would shard gradients" if by == "zero2" else "keeps a shard of the frozen weights"
    assert done.stdout.count(named) == 1
    assert_same_run(tmp_path / "1", tmp_path / "2")


def test_a_run_goes_on_with_sharded_weights(model_folder, data_root, tmp_path):
    given = options(model_folder, data_root, batch_sentence_num=6, save_methods="step", save_freq=2, max_steps=4)
    launch(2, "ppo.py", *given, "--output_dir", str(tmp_path / "straight"))
    shutil.copytree(tmp_path / "straight", tmp_path / "sharded")
    shutil.rmtree(tmp_path / "sharded" / "step-4")
    (tmp_path / "sharded" / "summary.json").unlink()
    launch(2, "ppo.py", "--resume", str(tmp_path / "sharded"), by="fsdp")
    # Sharded weights take the prefix through the network in a pass of its own: the same numbers but for rounding.
    found, expected = figures(tmp_path / "sharded"), figures(tmp_path / "straight")
    assert len(found) == len(expected)
    for line, other in zip(found, expected):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    weights, others = (
        load_file(tmp_path / run / "step-4" / "adapter_model.safetensors") for run in ("straight", "sharded")
    )
    assert weights.keys() == others.keys()
    for name in weights:
        assert float((weights[name] - others[name]).norm()) < 1e-3 * float(others[name].norm())


@pytest.mark.parametrize("by", ["fsdp", "zero3"])
def test_sharded_weights_answer_the_same(by, model_folder, data_root, tmp_path):
    needs_deepspeed(by)
    given = options(model_folder, data_root, batch_sentence_num=5, answer_space="free", do_sample=True)
    launch(1, "fewshot.py", *given, "--output_dir", str(tmp_path / "1"))
    launch(2, "fewshot.py", *given, "--output_dir", str(tmp_path / "2"), by=by)
    one, two = (tmp_path / n / "predictions.jsonl" for n in "12")
    assert one.read_text() == two.read_text()


def test_eight_bits_are_not_sharded(monkeypatch, capsys):
    monkeypatch.setattr(processes, "LAUNCHED_FOR", "FSDP")
    with pytest.raises(SystemExit) as stopped:
        ppo.main(["--report_to", "none", "--load_in_8bit", "True"])
    assert stopped.value.code == 2 and "cannot shard 8-bit weights" in capsys.readouterr().err


def test_a_killed_process_ends_the_whole_run(model_folder, data_root, tmp_path):
    """The second process kills itself in its second step; the launcher ends the other one, which waits for it."""
    killer = tmp_path / "sitecustomize.py"
    killer.write_text(
        "import os, signal\n"
        "if os.environ.get('RANK') == '1' and 'KILL' in os.environ:\n"
        "    import torch\n"
        "    step, steps = torch.optim.Adam.step, []\n"
        "    def last(self, *a, **k):\n"
        "        steps.append(1)\n"
        "        if len(steps) == 2:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return step(self, *a, **k)\n"
        "    torch.optim.Adam.step = last\n"
    )
    given = options(model_folder, data_root, batch_sentence_num=8, max_steps=4, output_dir=tmp_path / "run")
    done = launch(2, "ppo.py", *given, check=False, PYTHONPATH=str(tmp_path), KILL="1")
    assert done.returncode != 0 and not (tmp_path / "run" / "summary.json").exists()
