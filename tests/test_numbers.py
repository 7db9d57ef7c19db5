"""Number tasks: the mean of the numbers under the labels' distribution, in every answer space, script and report."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fewshot
import inference
import ppo
import prompts
import rewards
import sft
import tasks
from engine import models
from engine.engine import Engine
from evaluation import predict, predictions
from evaluation.answer_spaces import AnswerFormat, label_trie, mean_number
from reporting import collect
from tasks import loaders

STSB = tasks.get("STS-B")
THREE = replace(STSB, words=("0.0", "2.5", "5.0"))
FIXTURE = Path(__file__).resolve().parent / "fixtures/GLUE/STS-B"


@pytest.fixture(scope="module")
def engine(model_folder):
    return Engine(models.load_model(str(model_folder), True), models.load_tokenizer(str(model_folder), True))


@pytest.fixture(scope="module")
def rows():
    return loaders.load(STSB, "train", data_path=FIXTURE)


# ------------------------------------------------------------------------------------------------------------ by hand


def test_the_mean_by_hand():
    weights = np.array([0.2, 0.3, 0.1])  # 1.25 of 0.6
    assert mean_number(THREE, weights) == pytest.approx(1.25 / 0.6)
    found = predict.as_prediction(AnswerFormat(THREE, number_answer="mean"), 1, weights)
    assert (found.text, found.label, found.likeliest) == ("2.083", 2.083, 2.5)
    found = predict.as_prediction(AnswerFormat(THREE, number_answer="likeliest"), 1, weights)
    assert (found.text, found.label, found.likeliest) == ("2.5", 2.5, None)


def test_classes_have_no_mean():
    found = predict.as_prediction(AnswerFormat(tasks.get("SST"), number_answer="mean"), 1, np.array([0.4, 0.6]))
    assert (found.text, found.label, found.likeliest) == ("positive", 1, None)


# --------------------------------------------------------------------------------------- against the plain forward


def log_softmax_after(engine: Engine, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """(answer tokens, vocabulary) log-probabilities of the plain model before each token of an answer."""
    with torch.no_grad():
        logits = engine.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits, -1)


def mean_in_labels_mode(engine: Engine, prompt: list[int]) -> float:
    """Over all label strings: its probability, where at each token only those that continue some label are allowed."""
    trie = label_trie(STSB, engine.tokenizer)
    spelled = [[*ids, trie.close_token] for ids in trie.spellings]
    mean = total = 0.0
    for word, ids in zip(STSB.words, spelled):
        log_probs, chance = log_softmax_after(engine, prompt, ids), 1.0
        for t, token in enumerate(ids):
            allowed = sorted({other[t] for other in spelled if other[:t] == ids[:t]})
            chance *= float(log_probs[t, allowed].softmax(-1)[allowed.index(token)])
        mean, total = mean + chance * float(word), total + chance
    assert total == pytest.approx(1)
    return mean


def mean_in_score_mode(engine: Engine, prompt: list[int]) -> float:
    spelled = label_trie(STSB, engine.tokenizer).spellings
    chances = []
    for ids in spelled:
        log_probs = log_softmax_after(engine, prompt, ids)
        chances.append(sum(float(log_probs[t, token]) for t, token in enumerate(ids)))
    weights = np.exp(np.array(chances) - max(chances))
    return float(weights @ np.array([float(word) for word in STSB.words]) / weights.sum())


@pytest.mark.parametrize(("space", "brute_force"), [("labels", mean_in_labels_mode), ("score", mean_in_score_mode)])
def test_the_mean_is_that_over_all_label_strings(space, brute_force, engine, rows):
    built, _ = prompts.build_all(STSB, rows, engine.tokenizer)
    found = predict.predict(engine, AnswerFormat(STSB, number_answer="mean"), built, space, 4)
    likeliest = predict.predict(engine, AnswerFormat(STSB, number_answer="likeliest"), built, space, 4)
    for prompt, one, other in zip(built, found, likeliest, strict=True):
        assert one.label == pytest.approx(brute_force(engine, prompt), abs=6e-4)  # half a thousandth is rounding
        assert one.text == f"{one.label:.3f}" and one.likeliest == other.label != one.label
        assert rewards.parse(STSB, f"{one.text}</Judgement>", True) == one.label


def test_after_an_analysis_the_mean_takes_the_numbers_place(engine, rows):
    built, _ = prompts.build_all(STSB, rows, engine.tokenizer, use_CoT=True)
    mean, likeliest = (
        predict.predict(engine, AnswerFormat(STSB, True, number_answer=how), built, "labels", 4)
        for how in ("mean", "likeliest")
    )
    for one, other in zip(mean, likeliest, strict=True):
        assert other.text.endswith(f"<Judgement>{other.label}") and one.likeliest == other.label
        assert one.text == other.text.removesuffix(str(other.label)) + f"{one.label:.3f}"


# ------------------------------------------------------------------------------------------------------ as scripts run


def run(script, model_folder, output: Path, *options: str) -> tuple[dict, list[dict]]:
    """(summary.json, the lines of predictions.jsonl)."""
    given = ["--task", "STS-B", "--from_local", "True", "--train_model_name", str(model_folder), "--report_to", "none"]
    script.main([*given, "--data_path", str(FIXTURE), "--output_dir", str(output), *options])
    lines = [json.loads(line) for line in (output / predictions.FILE).read_text().splitlines()]
    return json.loads((output / "summary.json").read_text()), lines


TRAINING = ("--max_steps", "1", "--batch_sentence_num", "2")
SCRIPTS = [(inference, ()), (fewshot, ("--num_shots", "1")), (ppo, TRAINING), (sft, TRAINING)]


@pytest.mark.parametrize(("script", "options"), SCRIPTS, ids=lambda x: getattr(x, "__name__", ""))
def test_scripts_answer_the_mean_unless_told(script, options, model_folder, tmp_path, capsys):
    summary, lines = run(script, model_folder, tmp_path / "mean", *options)
    assert summary["arguments"]["number_answer"] == "mean" and "the mean of the numbers" in capsys.readouterr().out
    assert all(line["answer"] == f"{line['label']:.3f}" and f"{line['likeliest']:.1f}" in STSB.words for line in lines)
    summary, lines = run(script, model_folder, tmp_path / "one", *options, "--number_answer", "likeliest")
    assert summary["arguments"]["number_answer"] == "likeliest" and "the likeliest number" in capsys.readouterr().out
    assert all(line["answer"] in STSB.words and "likeliest" not in line for line in lines)
    methods = {result.method.split(" (")[1] for result in collect.collect(tmp_path).results}
    assert {("likeliest number" in method) for method in methods} == {True, False}


def test_generated_and_sampled_numbers_stay_as_they_are(model_folder, tmp_path):
    for name, options in {"free": ("--answer_space", "free"), "sampled": ("--do_sample", "True")}.items():
        summary, lines = run(inference, model_folder, tmp_path / name, *options)
        assert summary["arguments"]["number_answer"] == "" and not any("likeliest" in line for line in lines)
    assert all(line["answer"] in STSB.words for line in lines)
    assert {result.method for result in collect.collect(tmp_path).results} == {
        "zero-shot (free)",
        "zero-shot (labels, sampled answers)",
    }


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        (inference, ("--number_answer", "median"), "--number_answer median must be one of mean, likeliest"),
        (inference, ("--number_answer", "mean", "--answer_space", "free"), "answer what was generated; leave it out"),
        (fewshot, ("--number_answer", "mean", "--do_sample", "True"), "answer what was generated; leave it out"),
        (ppo, ("--number_answer", "likeliest", "--answer_space", "free"), "answer what was generated; leave it out"),
        (sft, ("--number_answer", "mean", "--do_sample", "True"), "answer what was generated; leave it out"),
    ],
)
def test_what_cannot_be_decided_by_labels_is_refused(script, options, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--report_to", "none", *options])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------- in reports


def method(kind: str, task: str, **arguments) -> list[str]:
    given = {"answer_space": "labels", **arguments}
    made = collect.Run("run", Path("run"), {"method": kind, "arguments": given}, [], None, "tiny", "")
    return collect.manner(made, tasks.get(task))


def test_a_report_names_likeliest_numbers_and_runs_from_before_there_was_a_mean():
    for kind in ("zero-shot", "ppo", "trl-grpo"):
        assert method(kind, "STS-B", number_answer="mean") == []
        assert method(kind, "STS-B", number_answer="likeliest") == method(kind, "STS-B") == ["likeliest number"]
        assert method(kind, "SST", number_answer="likeliest") == method(kind, "STS-B", answer_space="free") == []
    assert method("sft", "STS-B", answer_space="score") == ["likeliest number"]
    assert method("head", "STS-B") == []
