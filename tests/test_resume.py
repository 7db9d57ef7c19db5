"""A run that is killed goes on to what it would have been, and what must not be gone on from is refused."""

import json
import random
import re
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import forked
import pytest
import torch
from forked import argv, contents, lines, names, read
from transformers.trainer_pt_utils import safe_globals

import fewshot
import ppo
import prompts
import sft
from engine import models
from evaluation import predictions
from machine import manifests
from machine.errors import CheckpointError, DataError, ModelError
from run import checkpoints, prompt_record
from run.folder import lock
from run.history import append_episodes, append_history, episodes, history, trim_history
from training import ppo_trainer, sft_trainer, training_run

STEPS = 3
SAMPLED = dict(
    policy_gradient="sampled", repeat_time=2, max_steps=STEPS, eval_steps=2, save_methods="step", save_freq=1
)


def stopped(folder: Path, capsys, script=ppo, **options) -> str:
    """The one sentence on standard error with which a run ends that cannot begin (exit code 2)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        script.main([part for name, value in options.items() for part in (f"--{name}", str(value))])
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.count("\n") == 1 and "Traceback" not in text, text
    return text


# ------------------------------------------------------------------------------------------------ kill -9 at any moment


@pytest.fixture(scope="module")
def straight(model_folder, data_root, tmp_path_factory) -> tuple[Path, int]:
    """A run that nothing happens to, and how many changes it makes in its folder."""
    root = tmp_path_factory.mktemp("straight")
    given = argv(model_folder, data_root, root / "run", **SAMPLED)
    result = forked.run("ppo", given, root / "out.txt", fault=("count", root / "run", root / "changes"))
    assert result.code == 0, result.text
    return root / "run", int((root / "changes").read_text())


@pytest.mark.parametrize("seed", range(8))
def test_a_run_killed_again_and_again_ends_as_if_left_in_peace(seed, straight, model_folder, data_root, tmp_path):
    """Twenty kills in all, drawn from the seed: four runs are killed four times each, four more once, late."""
    whole, changes = straight
    draw, folder = random.Random(seed), tmp_path / "run"
    if seed < 4:
        places = sorted(draw.sample(range(1, int(0.9 * changes)), 4))
        kills = [place - before for before, place in zip([0, *places], places)]
    else:
        kills = [draw.randint(int(0.6 * changes), changes)]
    given = argv(model_folder, data_root, folder, **SAMPLED)
    for number in kills:
        result = forked.run("ppo", given, tmp_path / "out.txt", fault=("kill", folder, number))
        assert result.code == -9, result.text
    # The same command again; or, once there is a run to speak of, --resume.
    if (folder / "arguments.json").exists() and seed % 2:
        given = ["--resume", str(folder)]
    result = forked.run("ppo", given, tmp_path / "out.txt")
    assert result.code == 0, (kills, result.text)
    expected, found = contents(whole), contents(folder)
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == [], kills


def test_the_kills_reach_the_middle_of_a_write(straight):
    """Among the counted moments are those at which half of a checkpoint's file is written."""
    _, changes = straight
    assert changes > 80  # 3 steps, 3 checkpoints of some 15 files, best/


def test_sft_goes_on_too(model_folder, data_root, tmp_path):
    given = dict(max_steps=3, eval_steps=1, save_methods="step", save_freq=1)
    ends = {}
    for name, faults in {"straight": [()], "broken": [("send", 2, "SIGKILL"), ()]}.items():
        command = argv(model_folder, data_root, tmp_path / name, **given)
        ends[name] = [forked.run("sft", command, tmp_path / f"{name}.txt", fault=fault).code for fault in faults]
    assert ends == {"straight": [0], "broken": [-9, 0]}
    assert "holds this very run, interrupted" in (tmp_path / "broken.txt").read_text()
    expected, found = contents(tmp_path / "straight"), contents(tmp_path / "broken")
    assert [key for key in expected if found[key] != expected[key]] == [] and found.keys() == expected.keys()


def test_a_run_on_top_of_an_adapter_goes_on_too(interrupted, data_root, tmp_path):
    """Its checkpoints carry the first adapter in start/, which must not become a part of the second."""
    given = dict(max_steps=3, eval_steps=9, save_methods="step", save_freq=1)
    for name, faults in {"straight": [()], "broken": [("send", 3, "SIGKILL"), ()]}.items():
        command = argv(interrupted / "step-2", data_root, tmp_path / name, **given)
        codes = [forked.run("ppo", command, tmp_path / f"{name}.txt", fault=fault).code for fault in faults]
        assert codes[-1] == 0
    assert (tmp_path / "broken" / "step-3" / "start" / "adapter_model.safetensors").exists()
    assert contents(tmp_path / "broken") == contents(tmp_path / "straight")


# --------------------------------------------------------------------------------------------------------- what resumes


@pytest.fixture(scope="module")
def interrupted(model_folder, data_root, tmp_path_factory) -> Path:
    """A run stopped in its third step, with checkpoints of the first two."""
    root = tmp_path_factory.mktemp("interrupted")
    given = argv(model_folder, data_root, root / "run", max_steps=STEPS, eval_steps=1, save_methods="step", save_freq=1)
    assert forked.run("ppo", given, root / "out.txt", fault=("send", 3, "SIGKILL")).code == -9
    assert {"step-1", "step-2", "best", "run.json"} < names(root / "run")
    return root / "run"


@pytest.fixture
def run(interrupted, tmp_path) -> Path:
    shutil.copytree(interrupted, tmp_path / "run")
    return tmp_path / "run"


def test_run_json_says_from_the_start_what_was_run(interrupted, model_folder):
    about = read(interrupted / "run.json")
    assert about["task"] == "SST" and about["task_version"] and re.fullmatch("[0-9a-f]{16}", about["data_hash"])
    assert about["arguments"]["train_model_name"] == str(model_folder) and about["arguments"]["learning_rate"] == 1e-2
    assert about["arguments"] == read(interrupted / "arguments.json")
    assert {"python", "torch", "commit"} < set(about["versions"]) and about["resumed"] == []


def test_other_arguments_or_a_finished_run_are_refused(run, model_folder, data_root, capsys):
    same = dict(task="SST", data_path=data_root, train_model_name=model_folder, from_local=True, report_to="none",
                eval_size=8, batch_sentence_num=8, learning_rate=1e-2, max_steps=STEPS, eval_steps=1,
                save_methods="step", save_freq=1, output_dir=run)  # fmt: skip
    before = names(run)
    assert "is not empty" in stopped(run, capsys, **{**same, "learning_rate": 1e-3})
    (run / "summary.json").write_text("{}")
    text = stopped(run, capsys, **same)
    assert "is not empty" in text and f"--resume {run}" in text and names(run) == before | {"summary.json"}


def test_a_data_file_that_changed_is_refused(run, data_root, tmp_path, capsys):
    shutil.copytree(data_root, tmp_path / "data")
    (tmp_path / "data/GLUE/SST/train.tsv").write_text(
        (data_root / "GLUE/SST/train.tsv").read_text().replace("dull", "dim")
    )
    before = (run / "history.jsonl").read_bytes(), names(run)
    text = stopped(run, capsys, resume=run, data_path=tmp_path / "data")
    assert "the training rows are not those that the run began with" in text and "start a new run" in text
    assert (run / "history.jsonl").read_bytes() == before[0] and names(run) == before[1]
    assert "the held-out rows are not those" in stopped(run, capsys, resume=run, eval_size=7)


def test_another_first_epoch_is_refused(run, capsys):
    text = stopped(run, capsys, resume=run, start_epoch=1, end_epoch=3)
    assert "--start_epoch 1" in text and "began with epoch 0" in text


def spoil(kind: str, checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif kind == "changed":  # one bit of a weight
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif kind == "missing":
        (checkpoint / "optimizer.pt").unlink()
    elif kind == "no manifest":
        (checkpoint / manifests.FILE).unlink()
    else:  # "foreign": whole, but of another run
        manifests.write(checkpoint, step=2, run="another")


SPOILT = {
    "truncated": "adapter_model.safetensors was written with",
    "changed": "adapter_model.safetensors is not what was written",
    "missing": "optimizer.pt is missing",
    "no manifest": "has no readable manifest.json",
    "foreign": "belongs to another run",
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_checkpoint_is_named_and_not_used(kind, run, capsys):
    spoil(kind, run / "step-2")
    text = stopped(run, capsys, resume=run / "step-2")
    assert SPOILT[kind] in text and f"the newest whole checkpoint is {run}/step-1: --resume {run}" in text
    assert {"step-1", "step-2"} < names(run)
    assert checkpoints.checkpoint_to_resume(run) == run / "step-1"
    said = capsys.readouterr().out
    assert SPOILT[kind] in said and "going on from" in said and "step-2-broken" in names(run)


def test_without_a_whole_checkpoint_nothing_goes_on(run, capsys):
    for name in ("step-1", "step-2"):
        spoil("truncated", run / name)
    before = names(run)
    text = stopped(run, capsys, resume=run)
    assert "holds no checkpoint to go on from" in text and "adapter_model.safetensors" in text and names(run) == before


def test_only_the_last_checkpoint_is_gone_on_from(run, tmp_path):
    assert checkpoints.checkpoint_to_resume(run, run / "step-2") == run / "step-2"
    with pytest.raises(CheckpointError, match=f"not the run's last checkpoint.*--resume {run}"):
        checkpoints.checkpoint_to_resume(run, run / "step-1")
    with pytest.raises(CheckpointError, match="step-7 has no readable manifest"):
        checkpoints.checkpoint_to_resume(run, run / "step-7")
    with pytest.raises(CheckpointError, match="holds no trainer_state.json"):
        checkpoints.checkpoint_to_resume(run, run / "best")
    (tmp_path / "empty").mkdir()
    assert checkpoints.checkpoint_to_resume(tmp_path / "empty") is None


def test_a_spoilt_model_is_not_loaded(run, capsys):
    spoil("truncated", run / "best")
    with pytest.raises(ModelError, match="adapter_model.safetensors was written with"):
        models.load_model(str(run / "best"), from_local=True)


def test_nothing_in_a_checkpoint_has_to_be_unpickled(interrupted):
    """Every file that torch wrote loads with weights_only, which runs nothing; Trainer loads them in no other way."""
    for name in ("step-1", "best"):
        found = {path.name for path in (interrupted / name).iterdir() if path.suffix in (".pt", ".pth", ".bin", ".pkl")}
        assert found == ({"optimizer.pt", "scheduler.pt", "rng_state.pth"} if name != "best" else set())
    with safe_globals():  # numpy's random state
        for path in interrupted.rglob("*.pt*"):
            torch.load(path, weights_only=True)


def test_code_in_a_checkpoint_is_not_run(run, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was-run",))

    checkpoint = run / "step-2"
    torch.save({"state": Evil()}, checkpoint / "optimizer.pt")
    manifests.write(checkpoint, step=2, run=checkpoints.run_id(run))
    with pytest.raises(SystemExit) as end:
        ppo.main(["--resume", str(run)])
    text = capsys.readouterr().err
    assert end.value.code == 1 and "loaded only by running code" in text and str(checkpoint) in text
    assert not (tmp_path / "was-run").exists()


def test_best_goes_back_to_what_it_was_at_the_checkpoint(tmp_path):
    def folder(name: str, step: int) -> None:
        (tmp_path / name).mkdir()
        manifests.write(tmp_path / name, step=step)

    folder("best", 7)
    folder(".old-best", 3)
    folder(".new-step-8-x", 8)
    folder(".old-abc", 1)
    (tmp_path / ".new-run.json-x").write_text("{")
    checkpoints.clear_up(tmp_path, 5)
    assert names(tmp_path) == {"best"} and checkpoints.step_of(tmp_path / "best") == 3
    folder(".old-best", 2)
    checkpoints.clear_up(tmp_path, 5)
    assert names(tmp_path) == {"best"} and checkpoints.step_of(tmp_path / "best") == 3
    (tmp_path / "best").rename(tmp_path / ".old-best")  # killed between two renames
    checkpoints.clear_up(tmp_path, 5)
    assert names(tmp_path) == {"best"} and checkpoints.step_of(tmp_path / "best") == 3
    checkpoints.clear_up(tmp_path, 1)  # later checkpoints were moved away: what was the best is kept under its step
    assert names(tmp_path) == {"best-step-3"}


# -------------------------------------------------------------------------------------------------------- history.jsonl


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    whole = "".join(json.dumps({"step": step, "train/loss": 0.5}) + "\n" for step in (1, 2, 3))
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        (tmp_path / "history.jsonl").write_text(whole[:-cut])
        trim_history(tmp_path, 9)
        kept = [line["step"] for line in history(tmp_path)]
        assert kept == [1, 2], cut
        append_history(tmp_path, 4, {"train/loss": 0.25})
        assert [line["step"] for line in history(tmp_path)] == [*kept, 4]
    (tmp_path / "history.jsonl").write_bytes(whole.encode() + b"\0\0\0\xff")  # what a power cut can leave
    trim_history(tmp_path, 2)
    assert (tmp_path / "history.jsonl").read_text() == "".join(whole.splitlines(keepends=True)[:2])


@pytest.mark.parametrize("broken", ['{"step": 2, "train', "", "[2]", '{"loss": 1}', '{"step": "two"}'])
def test_a_broken_line_in_the_middle_is_named(broken, tmp_path):
    text = f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n'
    (tmp_path / "history.jsonl").write_text(text)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/history.jsonl, line 2 cannot be read")):
        trim_history(tmp_path, 1)
    assert (tmp_path / "history.jsonl").read_text() == text


def test_episodes_after_the_checkpoint_are_dropped(tmp_path):
    for step in (1, 11, 21):
        append_episodes(tmp_path, step, [{"answer": "é"}, {"answer": "yes"}])
    whole = (tmp_path / "episodes.jsonl").read_bytes()
    trim_history(tmp_path, 11)
    assert [line["step"] for line in episodes(tmp_path)] == [1, 1, 11, 11]
    append_episodes(tmp_path, 21, [{"answer": "é"}, {"answer": "yes"}])
    assert (tmp_path / "episodes.jsonl").read_bytes() == whole


# ---------------------------------------------------------------------------------------------- the prompts' own date


def on(day: datetime, monkeypatch) -> None:
    """Let runs begin on this day."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return day

    monkeypatch.setattr(prompt_record, "datetime", Clock)


@pytest.fixture
def dated_folder(model_folder, tmp_path) -> Path:
    """A model whose chat template writes the date into every prompt."""
    shutil.copytree(model_folder, tmp_path / "dated")
    template = tmp_path / "dated" / "chat_template.jinja"
    template.write_text("{{ 'Today: ' + strftime_now('%d %B %Y') + '. ' }}" + template.read_text())
    return tmp_path / "dated"


def take_back(run: Path, step: int) -> None:
    """Make a finished run one that was cut off after a step."""
    (run / "summary.json").unlink()
    for path in [run / "best", *checkpoints.checkpoints_of(run)]:
        if checkpoints.step_of(path) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("script", [ppo, sft], ids=["ppo", "sft"])
def test_a_resume_on_another_day_asks_the_same(script, dated_folder, data_root, tmp_path, monkeypatch):
    run, given = tmp_path / "run", dict(max_steps=3, eval_steps=1, save_methods="step", save_freq=1)
    on(datetime(2023, 4, 5), monkeypatch)
    script.main(argv(dated_folder, data_root, run, **given))
    before, about = contents(run), read(run / "run.json")
    assert (
        "Today: 05 April 2023. " in (run / "predictions.jsonl").read_text()
        and about["prompts_time"] == "2023-04-05T00:00:00"
    )
    take_back(run, 1)
    on(datetime(2024, 6, 7), monkeypatch)
    script.main(["--resume", str(run)])
    assert contents(run) == before
    after = read(run / "run.json")
    assert {name: after[name] for name in ("prompts", "prompts_time")} == {
        name: about[name] for name in ("prompts", "prompts_time")
    }


def test_prompts_that_changed_are_refused(dated_folder, data_root, tmp_path, capsys, monkeypatch):
    run, given = tmp_path / "run", dict(max_steps=2, save_methods="step", save_freq=1)
    ppo.main(argv(dated_folder, data_root, run, **given))
    take_back(run, 1)
    template = dated_folder / "chat_template.jinja"
    before, history_before = template.read_text(), (run / "history.jsonl").read_bytes()
    template.write_text(before.replace("Today", "Now"))
    text = stopped(run, capsys, resume=run)
    assert "the prompts of SST are not those that the run began with" in text
    assert "the model's chat template has changed" in text and (run / "history.jsonl").read_bytes() == history_before
    template.write_text(before)
    with monkeypatch.context() as changed:
        changed.setitem(prompts.WORDINGS, "SST", replace(prompts.WORDINGS["SST"], question="So ({words}):"))
        assert "neither the model's chat template nor its vocabulary has changed" in stopped(run, capsys, resume=run)
    # An earlier program's run.json, which says nothing of prompts.
    about = read(run / "run.json")
    (run / "run.json").write_text(json.dumps({k: v for k, v in about.items() if not k.startswith("prompts")}))
    ppo.main(["--resume", str(run)])
    assert read(run / "run.json")["prompts"] == about["prompts"] and (run / "summary.json").exists()


def test_other_prompts_that_were_asked_for_are_no_fault(dated_folder, data_root, tmp_path):
    run, given = tmp_path / "run", dict(max_steps=2, save_methods="step", save_freq=1, task="BoolQ")
    folder = tmp_path / "data" / "SuperGLUE" / "BoolQ"
    folder.mkdir(parents=True)
    for name, size in (("train.jsonl", 16), ("val.jsonl", 8)):
        rows = [
            {"question": f"is it {i}", "passage": "It is so. " * 60, "idx": i, "label": i % 2 == 0} for i in range(size)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    ppo.main(argv(dated_folder, tmp_path / "data", run, **given))
    take_back(run, 1)
    before = read(run / "run.json")["prompts"]["BoolQ"]
    ppo.main(["--resume", str(run), "--max_prompt_length", "200"])
    after = read(run / "run.json")["prompts"]["BoolQ"]
    assert after["hash"] != before["hash"] and after["chat_template"] == before["chat_template"]


def test_answers_that_go_on_another_day_are_to_the_same_prompts(dated_folder, data_root, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    given = dict(task="SST", data_path=data_root, train_model_name=dated_folder, from_local=True, report_to="none",
                 batch_sentence_num=4, output_dir=run, num_shots=2)  # fmt: skip
    on(datetime(2023, 4, 5), monkeypatch)
    fewshot.main([part for name, value in given.items() for part in (f"--{name}", str(value))])
    whole = (run / "predictions.jsonl").read_text()
    assert (
        whole.count("Today: 05 April 2023. ") == 12 and read(run / "run.json")["prompts_time"] == "2023-04-05T00:00:00"
    )

    def cut_off() -> None:
        (run / "summary.json").unlink()
        (run / "predictions.jsonl").rename(run / predictions.UNFINISHED)
        (run / predictions.UNFINISHED).write_text("".join(whole.splitlines(keepends=True)[:4]))

    on(datetime(2024, 6, 7), monkeypatch)
    cut_off()
    fewshot.main(["--resume", str(run)])
    assert (run / "predictions.jsonl").read_text() == whole
    cut_off()
    template = dated_folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("Today", "Now"))
    text = stopped(run, capsys, fewshot, resume=run)
    assert "the prompts of SST are not those" in text and "the model's chat template has changed" in text
    (run / "run.json").unlink()  # as an earlier program left it
    fewshot.main(["--resume", str(run)])
    assert read(run / "run.json")["prompts_time"] == "2024-06-07T00:00:00"


# ------------------------------------------------------------------------------------------ a run that goes on longer


@pytest.mark.parametrize(
    ("script", "rate"), [(ppo, "policy/learning_rate"), (sft, "train/learning_rate")], ids=["ppo", "sft"]
)
def test_more_steps_than_planned_follow_the_new_schedule(script, rate, model_folder, data_root, tmp_path, capsys):
    run, more = tmp_path / "run", {"warmup_steps": 0} if script is ppo else {}
    script.main(argv(model_folder, data_root, run, max_steps=2, save_methods="step", save_freq=2, **more))
    assert [line[rate] for line in lines(run) if rate in line] == [1e-2, 5e-3]
    capsys.readouterr()
    script.main(["--resume", str(run), "--max_steps", "4", "--save_freq", "1", "--eval_steps", "1"])
    assert [line[rate] for line in lines(run) if rate in line] == [1e-2, 5e-3, 5e-3, 2.5e-3]
    said = capsys.readouterr().out
    assert "The learning rate follows the new arguments from step 3 of 4: 0.005, where the checkpoint had 0." in said
    assert {"step-2", "step-3", "step-4"} < names(run)
    assert [line["step"] for line in lines(run) if "eval/score" in line] == [0, 2, 3, 4]


def test_the_same_schedule_is_not_spoken_of(run, capsys):
    ppo.main(["--resume", str(run)])
    assert "learning rate follows" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- what is best


@pytest.mark.parametrize(
    ("scores", "best"), [([0.5, 0.5, 0.5], 2), ([0.5, 0.6, 0.6], 2), ([0.5, 0.7, 0.6], 1), ([0.5, 0.4, 0.4], 0)]
)
def test_of_equal_scores_the_later_is_the_best(scores, best, model_folder, data_root, tmp_path, monkeypatch, capsys):
    answer, given = training_run.HeldOutEvaluation.__call__, iter(scores)
    monkeypatch.setattr(
        training_run.HeldOutEvaluation, "__call__", lambda self, engine: answer(self, engine) | {"score": next(given)}
    )
    ppo.main(argv(model_folder, data_root, tmp_path / "run", max_steps=2, eval_steps=1))
    assert manifests.verify(tmp_path / "run" / "best")["step"] == best
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["best_step"] == best and summary["metrics"]["best"]["score"] == max(scores)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("Training did not help: every later score is below the 0.500 of step 0") == (best == 0)


# ------------------------------------------------------------------------------------------- which checkpoints are kept


def test_the_last_checkpoints_and_the_best_are_kept(model_folder, data_root, tmp_path):
    given = dict(max_steps=5, save_methods="step", save_freq=1, save_total_limit=2, eval_steps=1)
    ppo.main(argv(model_folder, data_root, tmp_path / "run", **given))
    assert [path.name for path in checkpoints.checkpoints_of(tmp_path / "run")] == ["step-4", "step-5"]
    scored = [line for line in lines(tmp_path / "run") if "eval/score" in line]
    best = max(scored, key=lambda line: (line["eval/score"], line["step"]))
    assert manifests.verify(tmp_path / "run" / "best")["step"] == best["step"]


# -------------------------------------------------------------------------------------------------------- --start_epoch


@pytest.mark.parametrize(
    "script, trainer", [(ppo, ppo_trainer.PPOTrainer), (sft, sft_trainer.Finetuner)], ids=["ppo", "sft"]
)
def test_a_later_first_epoch_has_its_own_rows_and_numbers(
    script, trainer, model_folder, data_root, tmp_path, monkeypatch
):
    seen, original = [], trainer.training_step

    def training_step(self, model, inputs, *rest):
        batch = [row["id"] for row in inputs["rows"]] if "rows" in inputs else inputs["input_ids"].tolist()
        seen.append(batch)
        return original(self, model, inputs, *rest)

    monkeypatch.setattr(trainer, "training_step", training_step)
    common = dict(eval_size=2, learning_rate=1e-3)
    script.main(argv(model_folder, data_root, tmp_path / "both", end_epoch=2, **common))
    assert {"epoch-1", "epoch-2"} < names(tmp_path / "both") and len(seen) == 12  # 48 rows, 8 at once
    whole = seen.copy()
    seen.clear()
    given = {**common, "train_model_name": tmp_path / "both" / "epoch-1"}
    script.main(argv(model_folder, data_root, tmp_path / "second", start_epoch=1, end_epoch=2, **given))
    assert seen == whole[6:] != whole[:6]
    assert {"epoch-2", "best"} < names(tmp_path / "second") and "epoch-1" not in names(tmp_path / "second")


# ---------------------------------------------------------------------------------------------------------------- wandb


def test_one_wandb_run_over_all_resumes(model_folder, data_root, tmp_path):
    given = argv(
        model_folder, data_root, tmp_path / "run", max_steps=3, save_methods="step", save_freq=1, report_to="wandb"
    )
    assert forked.run("ppo", given, tmp_path / "out.txt", fault=("send", 2, "SIGKILL")).code == -9
    result = forked.run("ppo", given, tmp_path / "out.txt")
    assert result.code == 0 and "wandb:" not in result.text, result.text
    stored = read(tmp_path / "run" / "run.json")["id"]
    found = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(found) == 2 and {path.name.rsplit("-", 1)[1] for path in found} == {stored}
    assert [line["step"] for line in lines(tmp_path / "run") if "policy/loss" in line] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------------- the lock


def test_a_folder_is_one_runs_at_a_time(run, capsys):
    held = lock(run)
    text = stopped(run, capsys, resume=run)
    assert f"{run} is in use: the run of process" in text and "--output_dir" in text
    held.close()
    lock(run).close()
