"""inference.py and fewshot.py with a tiny random model: what they write, and that nothing is computed twice."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ORIGINALS

import fewshot
import inference
import prompts
import tasks
from engine import models
from engine.engine import Engine
from evaluation import answer_spaces, answering, jobs, leaderboard, metrics, predict, predictions
from evaluation.answer_spaces import AnswerFormat
from machine.errors import DataError
from run.folder import lock
from tasks import loaders, splits

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"


def answer(model_folder, output: Path, *options: str, script=inference, data: Path = FIXTURES) -> Path:
    script.main(
        ["--from_local", "True", "--train_model_name", str(model_folder), "--data_path", str(data)]
        + ["--report_to", "none", "--output_dir", str(output), *options]
    )
    return output


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def refused(capsys, *options: str, script=inference) -> str:
    """The one line that is left on standard error."""
    with pytest.raises(SystemExit) as stopped:
        script.main(["--report_to", "none", *options])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "Traceback" not in said
    return said


# ------------------------------------------------------------------------------------------------- what is written


def test_the_script_runs_and_leaves_predictions_and_a_summary(model_folder, data_root, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, ROOT / "inference.py", "--task", "SST", "--from_local", "True"]
    command += ["--train_model_name", model_folder, "--data_path", data_root, "--output_dir", output]
    command += ["--answer_space", "free", "--max_response_length", "3", "--report_to", "tensorboard"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    for said in ("95% interval", "majority class", "accuracy", "invalid_rate", "gold \\ answer"):
        assert said in result.stdout
    assert {path.name for path in output.iterdir()} == {
        ".lock", "arguments.json", "predictions.jsonl", "run.json", "summary.json", "tensorboard"
    }  # fmt: skip
    found = lines(output)
    tokenizer = models.load_tokenizer(str(model_folder), True)
    task = tasks.get("SST")
    rows = loaders.load(task, "validation", data_root=data_root)
    assert [line["id"] for line in found] == [row["id"] for row in rows]
    for line, row in zip(found, rows):
        assert line["prompt"] == tokenizer.decode(prompts.build(task, row, tokenizer)[0])
        assert line["gold"] == task.labels[row["label"]]
        assert line["correct"] == (line["label"] == line["gold"])
    written = summary(output)
    assert written["method"] == "zero-shot" and written["task"] == "SST" and written["seed"] == 0
    invalid = sum(line["label"] is None for line in found) / len(found)
    accuracy = sum(line["correct"] for line in found) / len(found)
    assert written["metrics"]["after"] == {"accuracy": accuracy, "score": accuracy, "invalid_rate": invalid}
    assert written["metrics"]["best"] == written["metrics"]["after"]
    assert sum(map(sum, written["confusion"])) == len(found)
    assert written["majority"]["accuracy"] == 0.5
    low, high = written["intervals"]["accuracy"]
    assert low <= accuracy <= high


def test_a_suite_has_a_folder_per_task_and_a_score(model_folder, tmp_path, capsys):
    output = answer(model_folder, tmp_path / "run", "--task", "GLUE")
    names = [task.name for task in tasks.suite("GLUE")]
    assert {path.name for path in output.iterdir()} == {*names, ".lock", "arguments.json", "run.json", "GLUE.json"}
    counted = {n: summary(output / n)["metrics"]["after"] for n in names if tasks.get(n).in_suite_score}
    score = json.loads((output / "GLUE.json").read_text())["score"]
    assert score == pytest.approx(metrics.suite_score("GLUE", counted))
    printed = capsys.readouterr().out
    assert f"GLUE score: {100 * score:.1f}" in printed
    assert "65.1" in printed  # beside WNLI
    # The diagnostic set is read and answered in the words of the task whose model answers it.
    assert "Is the statement true (yes, no or unclear):" in lines(output / "AX")[0]["prompt"]


@pytest.mark.parametrize("suite", tasks.SUITES)
def test_the_submission_zip_is_complete_and_every_file_is_checked(suite, model_folder, tmp_path, capsys):
    output = answer(model_folder, tmp_path / "run", "--task", suite, "--submission", "True", "--answer_space", "free")
    with zipfile.ZipFile(output / f"{suite}.zip") as archive:
        assert sorted(archive.namelist()) == sorted(task.submission for task in tasks.suite(suite))
        archive.extractall(tmp_path / "flat")
    for task in tasks.suite(suite):
        rows = loaders.load(task, "test", data_root=FIXTURES)
        leaderboard.check_submission(tmp_path / "flat" / task.submission, task, rows)
    assert "were filled in" in capsys.readouterr().out


def test_every_task_may_have_its_own_model(model_folder, tmp_path):
    for name in ("MNLI-m", "SuperGLUE-RTE"):
        (tmp_path / name).symlink_to(model_folder)
    output = answer(tmp_path / "{task}", tmp_path / "run", "--task", "MNLI-mm,AX,AX-g")
    assert [summary(output / name)["model"] for name in ("MNLI-mm", "AX", "AX-g")] == [
        str(tmp_path / name) for name in ("MNLI-m", "MNLI-m", "SuperGLUE-RTE")
    ]


def test_sampling_depends_on_the_seed_and_greedy_does_not(model_folder, data_root, tmp_path):
    options = ("--task", "SST", "--answer_space", "free", "--max_response_length", "4", "--batch_sentence_num", "5")

    def answers(name: str, *more: str) -> list[str]:
        folder = answer(model_folder, tmp_path / name, *options, *more, data=data_root)
        return [line["answer"] for line in lines(folder)]

    sampled = answers("a", "--do_sample", "True", "--seed", "1")
    assert sampled == answers("b", "--do_sample", "True", "--seed", "1")
    assert sampled != answers("c", "--do_sample", "True", "--seed", "2")
    assert answers("d", "--seed", "1") == answers("e", "--seed", "2")


# ---------------------------------------------------------------------------------------------------------- resume


class Interrupted:
    """evaluation.predict that counts the rows it was asked for, and is interrupted after some calls."""

    def __init__(self, monkeypatch, calls: int | None = None, number: int = signal.SIGTERM):
        self.original, self.calls, self.rows, self.signal = predict.predict, calls, 0, number
        monkeypatch.setattr(predict, "predict", self)

    def __call__(self, engine, answer_format, prompts, **how):
        if self.calls == 0:
            os.kill(os.getpid(), self.signal)
        self.calls = None if self.calls is None else self.calls - 1
        self.rows += len(prompts)
        return self.original(engine, answer_format, prompts, **how)


@pytest.mark.parametrize(
    ("cut", "number", "code"), [("", "SIGINT", 130), ("half a line", "SIGTERM", 143), ("half a batch", "SIGHUP", 129)]
)
def test_an_interrupted_run_goes_on_where_it_stopped(
    model_folder, data_root, tmp_path, monkeypatch, capsys, cut, number, code
):
    options = ("--task", "SST", "--batch_sentence_num", "3", "--do_sample", "True", "--answer_space", "free")
    options += ("--max_response_length", "3")
    whole = answer(model_folder, tmp_path / "whole", *options, data=data_root)
    with monkeypatch.context() as patch:
        Interrupted(patch, 2, signal.Signals[number])
        # pytest may have been started with the signal ignored, as under nohup.
        patch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
        with pytest.raises(SystemExit) as stopped:
            answer(model_folder, tmp_path / "run", *options, data=data_root)
    said = (
        f"stopped at once by {number}; the answers so far are kept. Go on with:\n  bash scripts/inference.sh --resume"
    )
    assert stopped.value.code == code and f"inference.py: {said} {tmp_path / 'run'}\n" in capsys.readouterr().err
    assert not (tmp_path / "run" / "predictions.jsonl").exists()  # never half a file under its name
    with open(tmp_path / "run" / predictions.UNFINISHED, "a") as file:
        third = (whole / "predictions.jsonl").read_text().splitlines()[6]
        file.write({"": "", "half a line": third[:20], "half a batch": third + "\n"}[cut])
    counted = Interrupted(monkeypatch)
    inference.main(["--resume", str(tmp_path / "run"), "--report_to", "none"])
    assert counted.rows == 12 - 6
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert summary(tmp_path / "run")["metrics"] == summary(whole)["metrics"]


def test_a_second_run_in_the_same_folder_is_refused(model_folder, data_root, tmp_path, capsys):
    output = answer(model_folder, tmp_path / "run", "--task", "SST", data=data_root)
    (output / "summary.json").unlink()
    with lock(output):
        assert f"{output} is in use" in refused(capsys, "--resume", str(output))
    inference.main(["--resume", str(output), "--report_to", "none"])
    assert (output / "summary.json").exists()


def test_finished_tasks_are_not_computed_again(model_folder, tmp_path, monkeypatch, capsys):
    output = answer(model_folder, tmp_path / "run", "--task", "SST,CoLA")
    (output / "CoLA" / "summary.json").unlink()
    before = summary(output / "SST"), lines(output / "CoLA")
    counted = Interrupted(monkeypatch)
    inference.main(["--resume", str(output), "--report_to", "none"])
    assert counted.rows == 0  # SST is done, and CoLA's answers are all there
    assert "SST is already done" in capsys.readouterr().out
    assert (summary(output / "SST"), lines(output / "CoLA")) == before
    assert (output / "CoLA" / "summary.json").exists()


def test_a_resumed_run_keeps_its_settings_and_its_data(model_folder, data_root, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        Interrupted(patch, calls=1)
        answer(model_folder, tmp_path / "run", "--task", "SST", "--batch_sentence_num", "4", data=data_root)
    said = refused(capsys, "--resume", str(tmp_path / "run"), "--answer_space", "score")
    assert "--answer_space labels, not score" in said
    unfinished = tmp_path / "run" / predictions.UNFINISHED
    unfinished.write_text(unfinished.read_text().replace('"id": 0', '"id": 9'))
    assert "the data changed" in refused(capsys, "--resume", str(tmp_path / "run"))


# ------------------------------------------------------------------------------------------- the likeliest label


def plain_log_likelihood(model, prompt: list[int], label: list[int]) -> float:
    logits = model(torch.tensor([prompt + label])).logits[0].float()
    log_probs = torch.log_softmax(logits, -1)
    return sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(label))


@pytest.fixture(scope="module")
def scored(model_folder):
    model = models.load_model(str(model_folder), True)
    return model, models.load_tokenizer(str(model_folder), True)


@torch.no_grad()
@pytest.mark.parametrize("name", ["SST", "CB", "STS-B", "SIGA-nli"])
def test_score_is_the_label_with_the_highest_log_likelihood(name, scored):
    model, tokenizer = scored
    task = tasks.get(name)
    rows = loaders.load(task, "train", data_root=FIXTURES)[: 1 if task.number else None]
    built, _ = prompts.build_all(task, rows, tokenizer)
    found = predict.predict(Engine(model, tokenizer), AnswerFormat(task), built, "score", 16)
    spellings = [tokenizer(word, add_special_tokens=False).input_ids for word in task.words]
    for prompt, prediction in zip(built, found):
        totals = torch.tensor([plain_log_likelihood(model, prompt, spelling) for spelling in spellings])
        assert prediction.text == task.words[int(totals.argmax())]
        assert prediction.last_label_probability == pytest.approx(float(torch.softmax(totals, -1)[-1]), abs=1e-5)
        assert prediction.probabilities.tolist() == pytest.approx(torch.softmax(totals, -1).tolist(), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["SST", "CB", "MentalHealth"])
def test_probabilities_are_those_of_the_labels_tokens_among_what_continues_a_label(name, scored):
    model, tokenizer = scored
    task = tasks.get(name)
    rows = loaders.load(task, "train", data_root=FIXTURES)
    task = loaders.with_labels(task, rows)
    built, _ = prompts.build_all(task, rows, tokenizer)
    spelling = answer_spaces.spell(task.words, tokenizer)
    complete = [[*ids, spelling.closing[0]] for ids in spelling.words]
    for use_CoT in (False, True):
        answer_format = AnswerFormat(task, use_CoT)
        found = predict.predict(Engine(model, tokenizer), answer_format, built, "labels", 4)
        assert all(p.probabilities.sum() == pytest.approx(1, abs=1e-4) for p in found)
        assert all((p.last_label_probability is None) == use_CoT for p in found)
    found = predict.predict(Engine(model, tokenizer), AnswerFormat(task), built, "labels", 4)
    for prompt, prediction in zip(built, found):
        expected = []
        for label in complete:
            probability = 1.0
            for t, token in enumerate(label):
                options = sorted({other[t] for other in complete if other[:t] == label[:t]})
                logits = model(torch.tensor([prompt + label[:t]])).logits[0, -1].float()
                probability *= float(torch.softmax(logits[options], -1)[options.index(token)])
            expected.append(probability)
        assert prediction.probabilities.tolist() == pytest.approx(expected, abs=1e-5)
        assert prediction.last_label_probability == prediction.probabilities[-1]


def agrees_with_lm_evaluation_harness(model, tokenizer, rows: list[dict], batch_size: int) -> None:
    harness = pytest.importorskip("lm_eval.models.huggingface")
    task = tasks.get("SST")
    built, _ = prompts.build_all(task, rows, tokenizer)
    judge = harness.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    spellings = [tokenizer(word, add_special_tokens=False).input_ids for word in task.words]
    asked = [(("", word), prompt, ids) for prompt in built for word, ids in zip(task.words, spellings)]
    totals = torch.tensor([value for value, _ in judge._loglikelihood_tokens(asked)]).view(len(built), -1)
    found = predict.predict(Engine(model, tokenizer), AnswerFormat(task), built, "score", 16)
    assert [prediction.label for prediction in found] == totals.argmax(-1).tolist()
    probabilities = [prediction.last_label_probability for prediction in found]
    assert probabilities == pytest.approx(totals.softmax(-1)[:, -1].tolist(), abs=1e-4)


def test_score_agrees_with_lm_evaluation_harness(scored):
    rows = loaders.load(tasks.get("SST"), "train", data_root=FIXTURES)
    agrees_with_lm_evaluation_harness(*scored, rows, batch_size=1)


def test_score_agrees_with_lm_evaluation_harness_on_real_rows():
    pytest.importorskip("lm_eval.models.huggingface")
    if not (ORIGINALS / "GLUE/SST/dev.tsv").is_file():
        pytest.skip(f"no original SST files below {ORIGINALS}")
    model, tokenizer = models.load_model(models.EMBEDDED), models.load_tokenizer(models.EMBEDDED)
    rows = splits.choose(tasks.get("SST"), loaders.load(tasks.get("SST"), "validation", ORIGINALS), 200)
    assert len(rows) == 200
    agrees_with_lm_evaluation_harness(model, tokenizer, rows, batch_size=8)


def test_long_rows_are_saved_a_few_at_a_time_and_short_ones_in_whole_batches():
    found = answering.batches([4000] * 5 + [10] * 600 + [20_000, 1], 256)
    assert [(part.start, part.stop) for part in found] == [
        (0, 2), (2, 4), (4, 260), (260, 516), (516, 605), (605, 606), (606, 607)
    ]  # fmt: skip
    assert answering.batches([5, 5], 256) == [slice(0, 2)]


# ------------------------------------------------------------------------------------------------- which rows


def test_a_choice_of_rows_is_always_the_same_and_in_order():
    rows = [{"id": i, "label": i % 2, "sentence": str(i)} for i in range(50)]
    chosen = splits.choose(tasks.get("SST"), rows, 10)
    assert len(chosen) == 10 and chosen == sorted(chosen, key=lambda row: row["id"])
    assert chosen == splits.choose(tasks.get("SST"), rows, 10)
    assert splits.choose(tasks.get("SST"), rows, 0) == splits.choose(tasks.get("SST"), rows, 99) == rows


def test_rows_that_are_scored_as_one_stay_together():
    pairs = [{"id": i, "hypothesis": str(i // 2)} for i in range(40)]
    chosen = splits.choose(tasks.get("AX-g"), pairs, 7)
    assert all(a["hypothesis"] == b["hypothesis"] for a, b in zip(chosen[::2], chosen[1::2], strict=True))
    answers = [{"id": [0, i // 5, i]} for i in range(60)]
    chosen = splits.choose(tasks.get("MultiRC"), answers, 7)
    assert all(sum(row["id"][1] == q for row in chosen) == 5 for q in {row["id"][1] for row in chosen})


def test_whole_questions_are_drawn_until_there_are_enough_rows():
    """A question with many answers is drawn no more often than one with few."""
    answers = [{"id": [0, q, i]} for q in range(400) for i in range(50 if q % 2 else 1)]
    chosen = splits.choose(tasks.get("MultiRC"), answers, 2000)
    questions = {row["id"][1] for row in chosen}
    assert 2000 <= len(chosen) < 2050 and sum(q % 2 == 0 for q in questions) >= len(questions) / 3


def test_a_tenth_of_each_label_is_held_out_only_where_there_is_no_validation_split(data_root, tmp_path, capsys):
    source, task = data_root / "GLUE" / "SST", tasks.get("SST")
    lines = (source / "train.tsv").read_text().splitlines()
    by_label = sorted(lines[1:], key=lambda line: line[-1])  # the last rows all have one label
    (tmp_path / "train.tsv").write_text("\n".join([lines[0], *by_label]) + "\n")
    train, held_out = splits.train_and_held_out(task, str(tmp_path), 400, seed=0)
    assert len(train) + len(held_out) == 48 and [row["label"] for row in held_out] == [0, 0, 1, 1]
    assert "No validation split of SST found: 4 of its training rows are held out" in capsys.readouterr().out
    assert held_out == splits.held_out(task, str(tmp_path), 0)
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    again = splits.train_and_held_out(task, str(tmp_path), 2, seed=1)
    assert {row["sentence"] for row in again[1]} <= {row["sentence"] for row in held_out} and len(again[0]) == 44
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nbroken\n")
    with pytest.raises(DataError, match=r"dev\.tsv, line 2"):
        splits.train_and_held_out(task, str(tmp_path), 400, seed=0)


# --------------------------------------------------------------------------------------------------- few-shot


def test_fewshot_runs_as_a_script(model_folder, data_root, tmp_path):
    command = [sys.executable, ROOT / "fewshot.py", "--task", "SST", "--from_local", "True", "--report_to", "none"]
    command += ["--train_model_name", model_folder, "--data_path", data_root, "--output_dir", tmp_path / "run"]
    result = subprocess.run([*map(str, command), "--num_shots", "4"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    written = summary(tmp_path / "run")
    assert written["method"] == "few-shot" and written["shots"] == 4
    found = lines(tmp_path / "run")
    starts = {line["prompt"].rsplit("Review:", 1)[0] for line in found}
    assert len(starts) == 1  # the same demonstrations for all rows
    shown = starts.pop()
    # Two of each class, all of the training split (whose texts end in t0, t1, ...), as turns of the chat.
    assert shown.count("<Judgement>negative</Judgement><|im_end|>") == 2
    assert shown.count("<Judgement>positive</Judgement><|im_end|>") == 2
    assert shown.count("film, t") == 4 and "film, d" not in shown


def job(data_root: Path, rows: list[dict] | None = None) -> jobs.Job:
    task = tasks.get("SST")
    rows = rows or loaders.load(task, "validation", data_root=data_root)
    return jobs.Job(task, rows, False, "")


def few(data_root: Path, **changes) -> fewshot.FewshotArguments:
    return fewshot.FewshotArguments(**{"task": "SST", "data_path": str(data_root), **changes})


def test_demonstrations_are_seeded_and_may_differ_by_row(data_root, tokenizer):
    def texts(**changes) -> list[list[str]]:
        shots = fewshot.show(few(data_root, **changes), job(data_root), tokenizer)
        return [[row["sentence"] for row in rows] for rows in shots]

    assert texts(seed=3) == texts(seed=3) != texts(seed=4)
    assert len({tuple(row) for row in texts()}) == 1
    assert len({tuple(row) for row in texts(same_shots=False)}) > 1


@pytest.mark.parametrize("number", [1, 5, 8])
def test_demonstrations_are_balanced(data_root, tokenizer, number):
    shots = fewshot.show(few(data_root, num_shots=number), job(data_root), tokenizer)[0]
    counts = [sum(row["label"] == label for row in shots) for label in (0, 1)]
    assert sum(counts) == number and abs(counts[0] - counts[1]) <= 1
    assert len({row["sentence"] for row in shots}) == number


def test_an_answered_row_is_never_shown(data_root, tokenizer):
    train = loaders.load(tasks.get("SST"), "train", data_root=data_root)
    shots = fewshot.show(few(data_root, num_shots=48), job(data_root, train[:40]), tokenizer)[0]
    assert sorted(row["sentence"] for row in shots) == sorted(row["sentence"] for row in train[40:])


def test_demonstrations_without_room_are_left_out_and_counted(data_root, model_folder, capsys):
    tokenizer = models.load_tokenizer(str(model_folder), True)
    arguments, asked = few(data_root, max_prompt_length=200), job(data_root)
    shots = fewshot.show(arguments, asked, tokenizer)
    kept = len(shots[0])
    assert 0 < kept < 8
    assert f"{8 - kept} of 8 demonstrations do not fit into --max_prompt_length 200" in capsys.readouterr().out
    built, shortened = prompts.build_all(asked.task, asked.rows, tokenizer, False, 200, shots[0])
    assert max(map(len, built)) <= 200 and shortened == 0


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "MRCP"], "Did you mean 'MRPC'?"),
        (["--task", "SST,SST"], "names a task twice"),
        (["--split", "dev"], "--split dev must be one of validation, test"),
        (["--answer_space", "words"], "--answer_space words must be one of labels, free, score"),
        (["--answer_space", "score", "--use_CoT", "True"], "--answer_space score"),
        (["--answer_space", "score", "--do_sample", "True"], "--answer_space score"),
        (["--submission", "True"], "names no suite"),
        (["--task", "GLUE", "--submission", "True", "--eval_size", "5"], "leave out --split and --eval_size"),
        (["--task", "GLUE", "--submission", "True", "--split", "validation"], "leave out --split and --eval_size"),
        (["--eval_size", "-1"], "--eval_size -1 must not be negative"),
        (["--batch_sentence_num", "0"], "--batch_sentence_num 0 must be greater than 0"),
        (["--task", "SST,RTE", "--data_path", __file__], "is one file, but --task names 2 tasks"),
        (["--from_local", "True", "--train_model_name", "nowhere"], "--train_model_name nowhere is no folder"),
        (["--resume", "nowhere"], "--resume nowhere holds no arguments.json"),
    ],
)
def test_bad_arguments_end_with_one_sentence(options, said, capsys):
    assert said in refused(capsys, *options)


def test_missing_data_is_told_for_all_tasks_at_once(tmp_path, capsys):
    said = refused(capsys, "--task", "SST,RTE,AX", "--data_path", str(tmp_path))
    assert "GLUE/SST: no such file or folder" in said and "(missing: SST, RTE)" in said


def test_few_shot_needs_a_shot(capsys):
    assert "--num_shots 0 must be at least 1" in refused(capsys, "--num_shots", "0", script=fewshot)


def test_a_prompt_longer_than_the_model_can_read_is_refused(model_folder, data_root, capsys):
    options = ["--task", "SST", "--data_path", str(data_root), "--max_prompt_length", "5000"]
    said = refused(capsys, *options, "--from_local", "True", "--train_model_name", str(model_folder))
    assert "more than the 2048 tokens" in said
