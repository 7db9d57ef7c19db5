"""Corrected label probabilities: by hand, against one prompt after another, and as the scripts run."""

import json
from pathlib import Path

import numpy as np
import pytest

import fewshot
import inference
import prompts
import tasks
from engine import models
from engine.engine import Engine
from evaluation import calibration, jobs, predict, predictions
from evaluation.answer_spaces import AnswerFormat, mean_number
from evaluation.predictions import Prediction
from reporting import collect
from tasks import Task, loaders

FIXTURES = Path(__file__).resolve().parent / "fixtures"
SST = tasks.get("SST")


# ------------------------------------------------------------------------------------------------------------ by hand


def test_a_correction_divides_by_the_prior():
    """0.6 / 0.8 : 0.4 / 0.2 = 0.75 : 2."""
    found = calibration.corrected(np.array([[0.6, 0.4], [0.8, 0.2]]), np.array([0.8, 0.2]))
    assert found == pytest.approx(np.array([[0.75 / 2.75, 2 / 2.75], [0.5, 0.5]]))
    priors = np.array([[0.8, 0.2], [0.6, 0.4]])  # each row its own
    found = calibration.corrected(np.array([[0.6, 0.4], [0.6, 0.4]]), priors)
    assert found == pytest.approx(np.array([[0.75 / 2.75, 2 / 2.75], [0.5, 0.5]]))


def test_a_batch_is_corrected_by_its_own_mean():
    """The mean is (0.7, 0.3): of three rows that all favour one label, the one that does so least changes sides."""
    rows = [(0.85, 0.15), (0.75, 0.25), (0.5, 0.5)]
    found = [Prediction("", None, None, np.array(row, dtype=np.float32)) for row in rows]
    prior = calibration.prior_of("batch", None, AnswerFormat(SST), [[]] * 3, "labels", 0)
    corrected = calibration.corrected_predictions(AnswerFormat(SST), found, prior)
    assert [(p.text, p.label) for p in corrected] == [("negative", 0), ("negative", 0), ("positive", 1)]
    expected = [b / 0.3 / (a / 0.7 + b / 0.3) for a, b in rows]
    assert [p.last_label_probability for p in corrected] == pytest.approx(expected, abs=1e-6)


def test_a_label_that_no_row_gives_any_probability():
    found = [Prediction("", None, None, np.array(row)) for row in ((1.0, 0.0), (0.5, 0.0))]
    prior = calibration.prior_of("batch", None, AnswerFormat(SST), [[]] * 2, "labels", 0)
    for corrected in calibration.corrected_predictions(AnswerFormat(SST), found, prior):
        assert np.isfinite(corrected.probabilities).all() and corrected.probabilities.sum() == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------ as scripts run


@pytest.fixture(scope="module")
def engine(model_folder):
    return Engine(models.load_model(str(model_folder), True), models.load_tokenizer(str(model_folder), True))


def run(script, model_folder, task: Task, data: Path, output: Path, *options: str) -> list[dict]:
    """The lines of predictions.jsonl."""
    given = ["--task", task.name, "--from_local", "True", "--train_model_name", str(model_folder)]
    script.main([*given, "--report_to", "none", "--data_path", str(data), "--output_dir", str(output), *options])
    return [json.loads(line) for line in (output / predictions.FILE).read_text().splitlines()]


def probabilities(engine, task: Task, rows: list[dict], space: str, shots: list | None = None) -> np.ndarray:
    """(rows, labels) as one prompt after another gives them."""
    found = []
    for row, shown in zip(rows, shots or [[]] * len(rows), strict=True):
        ids, _ = prompts.build(task, row, engine.tokenizer, demonstrations=shown)
        found += predict.predict(engine, AnswerFormat(task), [ids], space, 1)
    return np.array([prediction.probabilities for prediction in found], dtype=float)


DATA = {"CB": FIXTURES / "SuperGLUE/CB/train.jsonl", "STS-B": FIXTURES / "GLUE/STS-B/train.tsv"}
CASES = [
    ("SST", "contextual", "labels"),
    ("SST", "batch", "labels"),
    ("SST", "pmi", "score"),
    ("CB", "contextual", "score"),
    ("CB", "batch", "labels"),
    ("STS-B", "contextual", "labels"),
    ("STS-B", "batch", "score"),
]


@pytest.mark.parametrize(("name", "kind", "space"), CASES)
def test_answers_are_those_of_the_corrected_probabilities(
    name, kind, space, engine, model_folder, data_root, tmp_path, capsys
):
    task, data = tasks.get(name), DATA.get(name, data_root / SST.folder)
    options = ("--answer_space", space, "--batch_sentence_num", "5")
    lines = run(inference, model_folder, task, data, tmp_path / "run", *options, "--calibration", kind)
    assert f"{kind} calibration" in capsys.readouterr().out
    rows = loaders.load(task, "validation", data_path=data)
    before = probabilities(engine, task, rows, space)
    texts = {"contextual": ("N/A", "", "[MASK]"), "pmi": ("",)}.get(kind, ())
    content_free = [dict.fromkeys(task.fields, text) for text in texts]
    prior = (probabilities(engine, task, content_free, space) if content_free else before).mean(axis=0)
    expected = before / prior
    expected /= expected.sum(axis=-1, keepdims=True)
    assert [line["probability_of_last_label"] for line in lines] == pytest.approx(expected[:, -1].tolist(), abs=1e-5)
    if task.number:
        means = [mean_number(task, row) for row in expected]
        assert [line["label"] for line in lines] == pytest.approx(means, abs=1e-3)
    else:
        assert [line["label"] for line in lines] == [task.labels[label] for label in expected.argmax(-1)]
        assert [line["answer"] for line in lines] == [task.words[label] for label in expected.argmax(-1)]
    plain = run(inference, model_folder, task, data, tmp_path / "plain", *options)
    assert [list(line) for line in lines] == [list(line) for line in plain]  # the file's format is the same
    assert [line["prompt"] for line in lines] == [line["prompt"] for line in plain]
    assert not (tmp_path / "run" / predictions.UNFINISHED).exists()
    methods = {result.method for result in collect.collect(tmp_path).results}
    assert methods == {f"zero-shot ({space})", f"zero-shot ({space}, {kind} calibration)"}


def test_demonstrations_that_differ_by_row_have_content_free_prompts_of_their_own(
    engine, model_folder, data_root, tmp_path
):
    options = ("--num_shots", "2", "--same_shots", "False", "--calibration", "contextual")
    lines = run(fewshot, model_folder, SST, data_root, tmp_path / "run", *options)
    rows = loaders.load(SST, "validation", data_root=data_root)
    arguments = fewshot.FewshotArguments(task="SST", data_path=str(data_root), num_shots=2, same_shots=False)
    shots = fewshot.show(arguments, jobs.Job(SST, rows, False, ""), engine.tokenizer)
    texts = [{"sentence": text} for text in ("N/A", "", "[MASK]")]
    prior = np.array([probabilities(engine, SST, texts, "labels", [shown] * 3).mean(axis=0) for shown in shots])
    assert len({tuple(row) for row in prior.round(6)}) > 1
    weights = probabilities(engine, SST, rows, "labels", shots) / prior
    expected = weights[:, 1] / weights.sum(-1)
    assert [line["probability_of_last_label"] for line in lines] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["batch", "contextual"])
def test_an_interrupted_run_is_corrected_by_all_its_rows(kind, model_folder, data_root, tmp_path, monkeypatch):
    options = ("--batch_sentence_num", "5", "--calibration", kind)
    run(inference, model_folder, SST, data_root, tmp_path / "whole", *options)
    answered, original = [], predict.predict

    def interrupted(engine, answer_format, ids, *more, **how):
        answered.append(len(ids))
        if answered.count(5) == 2:
            raise KeyboardInterrupt
        return original(engine, answer_format, ids, *more, **how)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(predict, "predict", interrupted)
        run(inference, model_folder, SST, data_root, tmp_path / "run", *options)
    kept = (tmp_path / "run" / predictions.UNFINISHED).read_text().splitlines()
    assert len(kept) == 5 and all(len(json.loads(line)["probabilities"]) == 2 for line in kept)
    inference.main(["--resume", str(tmp_path / "run"), "--report_to", "none"])
    whole = (tmp_path / "whole" / predictions.FILE).read_bytes()
    assert (tmp_path / "run" / predictions.FILE).read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--calibration", "bayes"], "--calibration bayes must be one of none, contextual, batch, pmi"),
        (["--calibration", "batch", "--answer_space", "free"], "use --answer_space labels or score"),
        (["--calibration", "contextual", "--use_CoT", "True"], "leave --use_CoT and --do_sample at False"),
        (["--calibration", "contextual", "--do_sample", "True"], "leave --use_CoT and --do_sample at False"),
        (["--calibration", "pmi"], "use --answer_space score, or --calibration contextual"),
        (["--calibration", "batch", "--eval_size", "1"], "and of SST there is one; use --calibration contextual"),
    ],
)
@pytest.mark.parametrize("script", [inference, fewshot])
def test_what_cannot_be_corrected_is_refused(script, options, said, data_root, tmp_path, capsys):
    given = ["--task", "SST", "--data_path", str(data_root), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        script.main([*given, "--report_to", "none", *options])
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
