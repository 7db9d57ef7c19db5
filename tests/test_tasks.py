"""The table of tasks: complete, consistent, and spelled as the two leaderboards want it."""

import pytest

import tasks
from tasks import formats, loaders

GLUE = ["CoLA", "SST", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI", "AX"]
SUPERGLUE = ["BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "SuperGLUE/RTE", "WiC", "WSC", "AX-b", "AX-g"]
ALL = list(tasks.TASKS.values())
each_task = pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)


def test_suites_hold_their_tasks():
    assert [task.name for task in tasks.suite("GLUE")] == GLUE
    assert [task.name for task in tasks.suite("SuperGLUE")] == SUPERGLUE
    assert list(tasks.TASKS)[:21] == [*GLUE, *SUPERGLUE] and {"MR", "SIGA-nli", "MentalHealth"} <= set(tasks.TASKS)
    with pytest.raises(ValueError, match="no suite 'Glue'.*GLUE, SuperGLUE"):
        tasks.suite("Glue")


def test_get_takes_the_name_with_and_without_its_suite():
    assert tasks.get("RTE").folder == tasks.get("GLUE/RTE").folder == "GLUE/RTE"
    assert tasks.get("SuperGLUE/RTE").folder == "SuperGLUE/RTE"
    assert tasks.get("SuperGLUE/BoolQ") is tasks.get("BoolQ")


@pytest.mark.parametrize(
    ("name", "meant"), [("mrcp", "MRPC"), ("SST-2", "SST"), ("boolq", "BoolQ"), ("mnli", "MNLI-m")]
)
def test_unknown_task_names_the_known_ones_and_the_closest(name, meant):
    with pytest.raises(
        ValueError, match=f"no task '{name}'. Did you mean '{meant}'.*CoLA, SST, .*MentalHealth"
    ) as error:
        tasks.get(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "xyzzy", "GLUE/BoolQ", "/SST", "SuperGLUE/"])
def test_unknown_task_without_a_close_one(name):
    with pytest.raises(ValueError, match="Known tasks"):
        tasks.get(name)


@each_task
def test_entry_is_consistent(task):
    assert set(task.files) <= set(loaders.SPLITS) and all(task.files.values())
    assert set(task.hub_splits) <= set(loaders.SPLITS)
    assert set(task.passage) <= set(task.fields) <= set(task.columns) and task.passage
    assert "label" in task.columns and task.metrics and task.version >= 1
    assert task.format == "plain" or task.format in formats.FORMATS
    assert task.number or len(task.words) == len(task.labels)
    assert len({word.lower() for word in task.words}) == len(task.words)
    assert all(word == word.strip().lower() for word in task.words)
    assert len(task.submission_words) in (0, len(task.labels))
    assert task.suite in ("", *tasks.SUITES) and bool(task.submission) == bool(task.suite)
    with pytest.raises(AttributeError):
        task.name = "other"


@pytest.mark.parametrize("name", ["AX", "AX-b", "AX-g"])
def test_diagnostic_sets_are_answered_by_a_model_of_the_same_labels_and_words(name):
    task = tasks.get(name)
    model = tasks.get(task.answered_by)
    assert (task.labels, task.words, task.fields) == (model.labels, model.words, model.fields)
    assert not task.in_suite_score and "train" not in task.files
    assert [task.name for task in ALL if task.answered_by] == ["AX", "AX-b", "AX-g"]


FACTS = {  # metrics, labels by class id, what the leaderboard file says, its name
    "CoLA": ("matthews", "unacceptable acceptable", (0, 1), "CoLA.tsv"),
    "SST": ("accuracy", "negative positive", (0, 1), "SST-2.tsv"),
    "MRPC": ("f1 accuracy", "not_equivalent equivalent", (0, 1), "MRPC.tsv"),
    "STS-B": ("pearson spearman", "", (), "STS-B.tsv"),
    "QQP": ("f1 accuracy", "not_duplicate duplicate", (0, 1), "QQP.tsv"),
    "MNLI-m": ("accuracy", "entailment neutral contradiction", None, "MNLI-m.tsv"),
    "MNLI-mm": ("accuracy", "entailment neutral contradiction", None, "MNLI-mm.tsv"),
    "QNLI": ("accuracy", "entailment not_entailment", None, "QNLI.tsv"),
    "RTE": ("accuracy", "entailment not_entailment", None, "RTE.tsv"),
    "WNLI": ("accuracy", "not_entailment entailment", (0, 1), "WNLI.tsv"),
    "AX": ("matthews", "entailment neutral contradiction", None, "AX.tsv"),
    "BoolQ": ("accuracy", "False True", ("false", "true"), "BoolQ.jsonl"),
    "CB": ("macro_f1 accuracy", "entailment contradiction neutral", None, "CB.jsonl"),
    "COPA": ("accuracy", "choice1 choice2", (0, 1), "COPA.jsonl"),
    "MultiRC": ("f1a em", "False True", (0, 1), "MultiRC.jsonl"),
    "ReCoRD": ("token_f1 exact_match", "False True", (), "ReCoRD.jsonl"),
    "SuperGLUE/RTE": ("accuracy", "entailment not_entailment", None, "RTE.jsonl"),
    "WiC": ("accuracy", "False True", ("false", "true"), "WiC.jsonl"),
    "WSC": ("accuracy", "False True", ("False", "True"), "WSC.jsonl"),
    "AX-b": ("matthews", "entailment not_entailment", None, "AX-b.jsonl"),
    "AX-g": ("gender_parity accuracy", "entailment not_entailment", None, "AX-g.jsonl"),
}


@pytest.mark.parametrize("name", FACTS)
def test_metrics_class_ids_and_leaderboard_spellings(name):
    task, (metrics, labels, written, file) = tasks.get(name), FACTS[name]
    assert task.metrics == tuple(metrics.split())
    assert task.labels == tuple(labels.split())
    assert task.submission_words == (task.labels if written is None else written)
    assert task.submission == file


def test_sts_b_answers_with_numbers_in_steps_of_a_tenth():
    task = tasks.get("STS-B")
    assert task.number and task.words[:3] == ("0.0", "0.1", "0.2") and task.words[-1] == "5.0" and len(task.words) == 51
    assert [task.name for task in tasks.suite("GLUE") if task.number] == ["STS-B"]
