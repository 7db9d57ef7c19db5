"""Texts that nobody has labelled: `Classifier`, `inference.py --text` and tables without labels."""

import csv
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_export import options, refused, save_adapter

import inference
import tasks
from evaluation import predict
from inference import Classifier
from machine.errors import UserError
from tasks import own
from tasks.unlabelled import unlabelled_rows

TEXTS = ["a warm film", "dull, slow", "ein schöner Film 🎬 \u2028 <|im_end|>", "{sentence} {words}"]


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory) -> dict[str, Path]:
    """By task, a folder that says its task and needs nothing else."""
    made = {}
    for name in ("SST", "SuperGLUE/RTE", "STS-B"):
        made[name] = tmp_path_factory.mktemp("models") / name.replace("/", "-")
        shutil.copytree(model_folder, made[name])
        own.write_task(made[name] / own.FILE, tasks.get(name))
    return made


@pytest.fixture(scope="module")
def classifier(folders) -> Classifier:
    return Classifier(str(folders["SST"]))


def give(monkeypatch, data: bytes) -> None:
    """Standard input."""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def ask(folder: Path, *arguments: str) -> None:
    inference.main(["--from_local", "True", "--train_model_name", str(folder), *arguments])


def answered(model: Path, data: Path, folder: Path, **more) -> list[dict]:
    """The lines of predictions.jsonl of these rows."""
    inference.main(options(model, data, folder, **more))
    return [json.loads(line) for line in open(folder / "predictions.jsonl", encoding="utf-8")]


def table(path: Path, texts: list[str], column: str = "text") -> Path:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([[column], *([text] for text in texts)])
    return path


def test_labels_and_probabilities_are_those_of_an_evaluation(classifier, folders, data_root, tmp_path):
    lines = answered(folders["SST"], data_root, tmp_path / "run")
    texts = [line["prompt"].split("Review: ")[1].split("\n")[0] for line in lines]
    labels, probabilities = classifier.predict(texts)
    assert labels == [line["label"] for line in lines]
    assert probabilities.shape == (len(texts), 2) and probabilities.sum(-1) == pytest.approx(1, abs=1e-5)
    assert probabilities[:, 1] == pytest.approx([line["probability_of_last_label"] for line in lines], abs=1e-5)


def test_the_prefix_is_shared_and_batches_are_those_of_an_evaluation(classifier, monkeypatch):
    sizes, shared, original = [], [], predict.predict

    def counted(engine, answer_format, prompts, *more):
        sizes.append(len(prompts))
        shared.append(engine.shared_length)
        return original(engine, answer_format, prompts, *more)

    monkeypatch.setattr(predict, "predict", counted)
    monkeypatch.setattr(classifier.arguments, "batch_sentence_num", 3)
    labels, _ = classifier.predict(TEXTS)
    assert sizes == [3, 1] and shared[0] == shared[1] > 20
    monkeypatch.setattr(classifier.arguments, "batch_sentence_num", 256)
    assert classifier.predict(TEXTS)[0] == labels and classifier.predict([])[1].shape == (0, 2)


def test_several_texts_and_numbers(folders):
    pair = {"premise": "A man sleeps.", "hypothesis": 'Nobody "sleeps".'}
    pairs = Classifier(str(folders["SuperGLUE/RTE"]))
    for texts in ([pair], [json.dumps(pair)]):
        labels, probabilities = pairs.predict(texts)
        assert labels[0] in ("entailment", "not_entailment") and probabilities.shape == (1, 2)
    with pytest.raises(UserError, match=r"text 1 must hold premise, hypothesis of SuperGLUE/RTE; give \{\"premise\""):
        pairs.predict(["A man sleeps."])
    with pytest.raises(UserError, match=r"text 2 is empty \(hypothesis\)"):
        pairs.predict([pair, pair | {"hypothesis": " "}])
    numbers = Classifier(str(folders["STS-B"]))
    labels, probabilities = numbers.predict([{"sentence1": "a", "sentence2": "b"}])
    mean = float(probabilities[0] @ np.array([float(word) for word in numbers.task.words]))
    assert labels[0] == pytest.approx(mean, abs=1e-3) and probabilities.shape == (1, 51)


def test_free_answers_have_no_probabilities_and_a_prior_can_be_taken_off(folders, classifier):
    free = Classifier(str(folders["SST"]), answer_space="free", max_response_length=3)
    labels, probabilities = free.predict(TEXTS)
    assert set(labels) <= {None, "negative", "positive"} and np.isnan(probabilities).all()
    _, plain = classifier.predict(TEXTS)
    _, corrected = Classifier(str(folders["SST"]), calibration="contextual").predict(TEXTS)
    assert corrected.sum(-1) == pytest.approx(1) and np.abs(plain - corrected).max() > 1e-3


def test_texts_from_the_command_line_and_standard_input(folders, classifier, monkeypatch, capsys):
    labels, probabilities = classifier.predict(TEXTS[:2])
    expected = [f"{label}\t{chances.max():.3f}\t{text}" for label, chances, text in zip(labels, probabilities, TEXTS)]
    ask(folders["SST"], "--text", TEXTS[0], "--text", TEXTS[1])
    assert capsys.readouterr().out.splitlines() == expected
    give(monkeypatch, b"\xef\xbb\xbf" + "\r\n".join(TEXTS[:2]).encode())
    ask(folders["SST"], "--text", "-", "--batch_sentence_num", "1")
    assert capsys.readouterr().out.splitlines() == expected
    ask(folders["STS-B"], "--text", '{"sentence1": "a", "sentence2": "b"}')
    assert 0 <= float(capsys.readouterr().out.split("\t")[0]) <= 5


def test_a_base_model_is_asked_with_a_task(model_folder, classifier, capsys):
    ask(model_folder, "--task", "SST", "--text", TEXTS[0])
    assert capsys.readouterr().out.startswith(classifier.predict(TEXTS[:1])[0][0])


@pytest.mark.parametrize(
    ("arguments", "data", "said"),
    [
        (["--text", ""], b"", "text 1 is empty"),
        (["--text", "a", "--text", " \t"], b"", "text 2 is empty"),
        (["--text", "-"], b"a\n\nb\n", "text 2 is empty"),
        (["--text", "-", "--batch_sentence_num", "1"], b"a\n\n", "text 2 is empty"),
        (["--text", "-"], b"a\n\xff\n", "line 2 of standard input is not UTF-8"),
        (["--text", "-"], b"", "there is no text on standard input"),
        (["--text", "a", "--split", "test"], b"", "--split test answers rows of files, and --text a text"),
        (["--text", "a", "--task", "SST,RTE"], b"", "--task SST,RTE names 2 tasks; texts are asked of one"),
        (["--text", "a", "--calibration", "batch"], b"", "--calibration batch"),
    ],
)
def test_bad_texts_are_one_sentence(arguments, data, said, folders, monkeypatch, capsys):
    give(monkeypatch, data)
    assert said in refused(
        capsys, inference.main, "--from_local", "True", "--train_model_name", folders["SST"], *arguments
    )


def test_a_folder_that_says_no_task(model_folder, tmp_path, capsys):
    with pytest.raises(UserError, match="does not say which task it was trained on"):
        Classifier(str(model_folder))
    given = ["--from_local", "True", "--train_model_name", model_folder, "--text", "a"]
    assert "does not say which task it was trained on" in refused(capsys, inference.main, *given)
    with pytest.raises(UserError, match="is no folder"):
        Classifier("/no/such/folder", from_local=True)
    save_adapter(model_folder, tmp_path / "several" / "best")  # of a run on two tasks or more
    (tmp_path / "several" / "SST").mkdir()
    own.write_task(tmp_path / "several" / "SST" / own.FILE, tasks.get("SST"))
    with pytest.raises(UserError, match="name one with --task"):
        Classifier(str(tmp_path / "several" / "best"))


def test_a_table_without_labels_becomes_one_with_predictions(folders, classifier, tmp_path, capsys):
    labels, probabilities = classifier.predict(TEXTS)
    data = table(tmp_path / "new.csv", TEXTS)
    answered(folders["SST"], data, tmp_path / "run", task=folders["SST"] / own.FILE)
    with open(tmp_path / "run" / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["sentence", "label", "probability_negative", "probability_positive"]
    assert [row["sentence"] for row in rows] == TEXTS and [row["label"] for row in rows] == labels
    found = [[float(row[f"probability_{label}"]) for label in ("negative", "positive")] for row in rows]
    assert np.array(found) == pytest.approx(probabilities, abs=1e-5)
    assert "no labels, so no score" in capsys.readouterr().out
    # An interrupted run goes on with the probabilities that it has.
    before = (tmp_path / "run" / "predictions.csv").read_bytes()
    for name in ("predictions.csv", "summary.json"):
        (tmp_path / "run" / name).unlink()
    inference.main(["--resume", str(tmp_path / "run"), "--report_to", "none"])
    assert (tmp_path / "run" / "predictions.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("sentence\na\nb\n", ["a", "b"]),
        ("id;sentence\r\n7;a\r\n8;b\r\n", ["a", "b"]),
        ("Message,date\na,2020\n", ["a"]),
        ("text,label\na,\nb,\n", ["a", "b"]),  # a column for labels that is still empty
        ("text,label\na,positive\n", None),
        ("x,y\na,b\n", None),
    ],
)
def test_what_counts_as_a_table_without_labels(text, rows, tmp_path):
    (tmp_path / "new.csv").write_text(text)
    found = unlabelled_rows(tasks.get("SST"), tmp_path / "new.csv")
    assert (None if found is None else [row["sentence"] for row in found]) == rows
    assert found is None or all(row["label"] is None for row in found)


def test_a_table_with_an_empty_text_is_refused(folders, tmp_path, capsys):
    data = tmp_path / "new.csv"
    data.write_text("number,text\n1,a\n2, \n3,b\n")
    given = options(folders["SST"], data, tmp_path / "run", task=folders["SST"] / own.FILE)
    assert "new.csv, row 3: text is empty; leave the row out" in refused(capsys, inference.main, *given)
    assert not (tmp_path / "run").exists()
