"""The official metrics: published vectors, properties, and bootstrap resamples against the plain computation."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks
from evaluation import bootstrap, metrics
from evaluation.bootstrap import bootstrap_values, intervals
from evaluation.metrics import chosen_rows, confusion_counts, score, suite_score
from tasks import splits
from tasks.labels import most_frequent_label

MENTAL_HEALTH = dataclasses.replace(
    tasks.get("MentalHealth"), labels=("anxiety", "normal", "stress", "other"), words=("a", "n", "s", "o")
)
# Tasks of the same metrics, number of classes and row format are scored by the same code: one of each.
KINDS = {(t.metrics, len(t.labels), t.format): t for t in (tasks.TASKS | {"MentalHealth": MENTAL_HEALTH}).values()}
SCORED = list(KINDS.values())


def rows_of(labels, **columns):
    return [{"id": i, "label": y} | {k: v[i] for k, v in columns.items()} for i, y in enumerate(labels)]


# ------------------------------------------------------------------------------------------- published vectors


def scored(*values, names):
    """{task name: {metric: value}} from the leaderboard's values in the order of the tasks' metrics."""
    table = {}
    for name, value in zip(names, values, strict=True):
        task = tasks.get(name)
        value = value if isinstance(value, tuple) else (value,)
        table[name] = dict(zip(task.metrics, value, strict=True))
    return table


GLUE = ("CoLA", "SST", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI")
SUPERGLUE = ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "SuperGLUE/RTE", "WiC", "WSC")


@pytest.mark.parametrize(
    ("suite", "names", "values", "expected"),
    [
        (
            "GLUE",
            GLUE,
            (60.5, 94.9, (89.3, 85.4), (87.6, 86.5), (72.1, 89.3), 86.7, 85.9, 92.7, 70.1, 65.1),
            80.522,
        ),
        (
            "GLUE",
            GLUE,
            (63.9, 96.2, (94.1, 92.3), (89.2, 88.3), (66.0, 85.9), 88.1, 87.8, 92.3, 82.7, 71.2),
            83.572,
        ),
        ("SuperGLUE", SUPERGLUE, (77.4, (75.7, 83.6), 70.6, (70.0, 24.1), (72.0, 71.3), 71.7, 69.6, 64.4), 69.006),
        ("SuperGLUE", SUPERGLUE, (83.7, (81.9, 86.5), 89.6, (83.7, 54.1), (49.8, 49.0), 81.2, 70.1, 65.8), 74.112),
    ],
    ids=["GLUE-BERT-large", "GLUE-Bort", "SuperGLUE-BERT-large", "SuperGLUE-Bort"],
)
def test_leaderboard_rows(suite, names, values, expected):
    assert suite_score(suite, scored(*values, names=names)) == pytest.approx(expected, abs=1e-3)


def test_suite_score_takes_the_suites_own_rte_and_no_diagnostic_set():
    values = (77.4, (75.7, 83.6), 70.6, (70.0, 24.1), (72.0, 71.3), 71.7, 69.6, 64.4)
    table = scored(*values, names=SUPERGLUE)
    table["RTE"] = table.pop("SuperGLUE/RTE") | {"score": 0.0, "invalid_rate": 0.5}
    table["AX-b"] = {"matthews": 0.0}
    assert suite_score("SuperGLUE", table) == pytest.approx(69.006, abs=1e-3)


def test_suite_score_names_what_is_missing():
    table = scored(*(50.0,) * 4, names=("CoLA", "SST", "RTE", "WNLI")) | {"MRPC": {"f1": 80.0}}
    with pytest.raises(ValueError, match="MRPC, STS-B, QQP, MNLI-m, MNLI-mm, QNLI"):
        suite_score("GLUE", table)
    with pytest.raises(ValueError, match="no task"):
        suite_score("GLUE", {"SST-3": {"accuracy": 1.0}})


def test_mrpc_and_cola():
    rows = rows_of([1, 1, 0, 0])
    values = score(tasks.get("MRPC"), rows, [1, 0, 0, 0])
    expected = {"f1": 0.66667, "accuracy": 0.75, "score": 0.70833, "invalid_rate": 0}
    assert values == pytest.approx(expected, abs=1e-4)
    assert score(tasks.get("CoLA"), rows, [1, 0, 0, 0])["matthews"] == pytest.approx(0.57735, abs=1e-4)


def test_cb_macro_f1_over_all_three_classes():
    values = score(tasks.get("CB"), rows_of([0, 0, 1, 2]), [0, 1, 1, 1])
    expected = {"macro_f1": 0.38889, "accuracy": 0.5, "score": 0.44444, "invalid_rate": 0}
    assert values == pytest.approx(expected, abs=1e-4)
    # A class that occurs nowhere still counts, as 0.
    assert score(tasks.get("CB"), rows_of([0, 1]), [0, 1])["macro_f1"] == pytest.approx(2 / 3)


def multirc_rows(questions):
    """Rows of paragraph 0 from the gold labels of each question; answer ids run on across questions."""
    rows = []
    for question, labels in enumerate(questions):
        rows += [{"id": [0, question, len(rows) + i], "label": label} for i, label in enumerate(labels)]
    return rows


def test_multirc():
    values = score(tasks.get("MultiRC"), multirc_rows([(1, 0, 0), (0, 1)]), [1, 0, 1, 0, 1])
    assert values == pytest.approx({"f1a": 0.8, "em": 0.5, "score": 0.65, "invalid_rate": 0}, abs=1e-4)


def test_multirc_groups_by_paragraph_and_question():
    rows = multirc_rows([(1, 0)]) + [row | {"id": [1, 0, row["id"][2]]} for row in multirc_rows([(1, 0)])]
    assert score(tasks.get("MultiRC"), rows, [1, 0, 1, 1])["em"] == 0.5


def record_rows():
    candidates = [(0, "the U.S. Army", 1), (0, "Iraq", 0), (1, "Iraq", 0), (1, "Army", 0)]
    return [{"id": q, "entity": e, "answers": ["US Army"], "label": y} for q, e, y in candidates]


def test_record():
    expected = {"token_f1": 0.83333, "exact_match": 0.5, "score": 0.66667, "invalid_rate": 0}
    assert score(tasks.get("ReCoRD"), record_rows(), [1, 0, 0, 1]) == pytest.approx(expected, abs=1e-4)
    # The highest score chooses, whatever was answered.
    values = score(tasks.get("ReCoRD"), record_rows(), [1, 1, 1, 1], scores=[0.6, 0.1, 0.2, 0.3])
    assert values == pytest.approx(expected, abs=1e-4)


def test_record_choice():
    rows = record_rows()
    assert chosen_rows(rows, [1, 1, 0, 0]) == {0: 0, 1: None}
    assert chosen_rows(rows, [None, 1, None, None]) == {0: 1, 1: None}
    assert chosen_rows(rows, [0, 0, 0, 0], [0.1, 0.2, 0.2, 0.2]) == {0: 1, 1: 2}
    assert chosen_rows(rows, [0, None, 0, 0], [0.1, 0.2, 0.2, 0.2]) == {0: None, 1: 2}
    best_gold = [rows[0] | {"answers": ["nothing", "the Army", "us army"]}]
    assert score(tasks.get("ReCoRD"), best_gold, [1])["token_f1"] == 1.0
    assert score(tasks.get("ReCoRD"), [rows[0] | {"answers": []}], [1])["score"] == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  U.S. Army", "us army"),
        ("an apple a day", "apple day"),
        ("Theatre", "theatre"),
        ("(the)", ""),
        ("A-Team", "ateam"),
        ("Élan’s", "élan’s"),  # only ASCII punctuation goes, as in the official evaluation
    ],
)
def test_record_normalisation(text, expected):
    assert metrics.normalized(text) == expected


def axg_rows(pairs):
    return rows_of([0] * 2 * pairs, hypothesis=[f"h{i // 2}" for i in range(2 * pairs)])


def test_gender_parity():
    values = score(tasks.get("AX-g"), axg_rows(3), [1, 1, 0, 1, 0, 0])
    assert values["gender_parity"] == pytest.approx(0.66667, abs=1e-4)
    assert values["accuracy"] == 0.5
    assert score(tasks.get("AX-g"), axg_rows(1), [None, None])["gender_parity"] == 0.0


def test_gender_parity_checks_that_pairs_are_adjacent():
    with pytest.raises(ValueError, match="different hypotheses"):
        score(tasks.get("AX-g"), axg_rows(2)[1:] + axg_rows(1)[:1], [0] * 4)
    with pytest.raises(ValueError, match="3 rows"):
        score(tasks.get("AX-g"), axg_rows(2)[:3], [0] * 3)


def test_three_class_matthews():
    values = score(tasks.get("AX"), rows_of([0, 0, 1, 1, 2, 2]), [0, 0, 1, 0, 2, 1])
    gold, predicted = np.array([2, 2, 2]), np.array([3, 2, 1])
    expected = (4 * 6 - gold @ predicted) / np.sqrt((36 - gold @ gold) * (36 - predicted @ predicted))
    assert values["matthews"] == pytest.approx(expected)


def test_sts_b():
    gold, predicted = [0.0, 1.0, 2.0, 5.0], [1.0, 0.0, 2.0, 3.0]
    values = score(tasks.get("STS-B"), rows_of(gold), predicted)
    assert values["pearson"] == pytest.approx(np.corrcoef(gold, predicted)[0, 1])
    assert values["spearman"] == pytest.approx(0.8)


def test_constant_predictions_have_no_correlation(recwarn):
    for label in (0, 1):
        assert score(tasks.get("CoLA"), rows_of([0, 1, 1]), [label] * 3)["matthews"] == 0
        assert score(tasks.get("CoLA"), rows_of([label] * 3), [label] * 3)["matthews"] == 0
    assert score(tasks.get("AX"), rows_of([0, 1, 2]), [2] * 3)["matthews"] == 0
    assert score(tasks.get("STS-B"), rows_of([0.0, 1.0, 2.5]), [3.0] * 3)["score"] == 0
    assert score(tasks.get("STS-B"), rows_of([2.0, 2.0]), [3.0, 1.0])["score"] == 0
    assert score(tasks.get("STS-B"), rows_of([2.0]), [2.0])["score"] == 0
    assert score(tasks.get("MRPC"), rows_of([0, 0]), [0, 0])["f1"] == 0
    assert not recwarn.list


def test_differences_too_small_to_square_still_correlate():
    for gold, predicted in (([0.0, 5e-324], [1.0, 2.0]), ([1.0, 2.0], [0.0, 1e-200])):
        values = score(tasks.get("STS-B"), rows_of(gold), predicted)
        assert -1 <= values["pearson"] <= 1 and values["spearman"] == pytest.approx(1)


# ---------------------------------------------------------------------------------------------- invalid answers


@st.composite
def answered(draw, task):
    """Rows, predictions (correct more often than not) and scores of a task, small enough for odd tables to occur."""
    n = 2 * draw(st.integers(1, 7))
    value = st.integers(0, 10).map(lambda half: half / 2) if task.number else st.integers(0, len(task.labels) - 1)
    gold = draw(st.lists(value, min_size=n, max_size=n))
    kinds = draw(st.lists(st.sampled_from(["correct", "correct", "other", "none"]), min_size=n, max_size=n))
    other = draw(st.lists(value, min_size=n, max_size=n))
    predictions = [{"correct": g, "other": o, "none": None}[k] for g, o, k in zip(gold, other, kinds, strict=True)]
    entities = ["the U.S. Army", "Army", "Iraq", "US"]
    rows = rows_of(gold, hypothesis=[i // 2 for i in range(n)])
    for i, row in enumerate(rows):
        if task.format == "multirc":
            row["id"] = [i // 6, i // 3, i]
        if task.candidates:
            row |= {"id": i // 4, "entity": entities[i % 4]}
    for row in rows if task.candidates else ():
        row["answers"] = [r["entity"] for r in rows if r["id"] == row["id"] and r["label"] == 1]
    scores = draw(st.none() | st.lists(st.floats(0, 1), min_size=n, max_size=n)) if task.candidates else None
    return rows, predictions, scores


@pytest.mark.parametrize("task", SCORED, ids=lambda task: task.name)
def test_no_answer_instead_of_a_correct_one_never_raises_a_metric(task):
    @settings(derandomize=True, max_examples=50, deadline=None)
    @given(answered(task))
    def check(example):
        rows, predictions, scores = example
        before = score(task, rows, predictions, scores)
        for i, (row, prediction) in enumerate(zip(rows, predictions, strict=True)):
            if prediction is None or prediction != row["label"]:
                continue
            after = score(task, rows, predictions[:i] + [None] + predictions[i + 1 :], scores)
            assert after.pop("invalid_rate") > before["invalid_rate"]
            for name, value in after.items():
                assert value <= before[name] + 1e-9, (name, i)

    check()


@pytest.mark.parametrize("name", ["CoLA", "AX", "STS-B", "CB", "MRPC"])
def test_no_answer_never_raises_a_metric_of_larger_sets(name):
    task, rng = tasks.get(name), np.random.default_rng(0)
    for n in (20, 200):
        for skill in (0.0, 0.5, 1.0):
            draw = (lambda size: rng.uniform(0, 5, size)) if task.number else lambda size: rng.choice(3, size)
            draw = draw if task.number or len(task.labels) == 3 else lambda size: rng.choice(2, size, p=[0.3, 0.7])
            gold = draw(n)
            predictions = np.where(rng.random(n) < skill, gold, draw(n)).tolist()
            rows, gold = rows_of(gold.tolist()), gold.tolist()
            before = score(task, rows, predictions)
            for i in rng.permutation(n)[:20]:
                predictions[i] = None if predictions[i] == gold[i] else predictions[i]
                after = score(task, rows, predictions)
                assert all(after[metric] <= before[metric] + 1e-9 for metric in (*task.metrics, "score"))
                before = after


def test_what_invalid_answers_cost():
    assert score(tasks.get("SST"), rows_of([0, 1]), [None, 1]) == {"accuracy": 0.5, "score": 0.5, "invalid_rate": 0.5}
    # Where None is the other class, even a None on a negative row lowers F1 and Matthews.
    rows = rows_of([1, 1, 0, 0])
    for task in (tasks.get("MRPC"), tasks.get("CoLA")):
        for gap, wrong in (([1, 1, 0, None], [1, 1, 0, 1]), ([1, None, 0, 0], [1, 0, 0, 0])):
            values = score(task, rows, gap)
            assert values["score"] == score(task, rows, wrong)["score"] < 1
    gold = [0.0, 1.0, 3.0, 5.0]
    for task, rows, half in (
        (tasks.get("STS-B"), rows_of(gold), [*gold[:2], None, None]),
        (tasks.get("AX"), rows_of([0, 1, 2, 0]), [0, 1, None, None]),
    ):
        assert score(task, rows, half)["score"] == pytest.approx(0.0)
        assert score(task, rows, [None] * 4)["score"] == pytest.approx(-1.0)


# ------------------------------------------------------------------------------------------------------- errors


def test_rows_that_cannot_be_scored():
    task = tasks.get("SST")
    with pytest.raises(ValueError, match="no rows"):
        score(task, [], [])
    with pytest.raises(ValueError, match="1 predictions for 2 rows"):
        score(task, rows_of([0, 1]), [0])
    with pytest.raises(ValueError, match="row 1 has no label"):
        score(task, rows_of([0, None]), [0, 1])
    with pytest.raises(ValueError, match="row 0 has label -1"):
        score(task, rows_of([-1, 1]), [0, 1])
    with pytest.raises(ValueError, match="row 1 has prediction 2"):
        score(task, rows_of([0, 1]), [0, 2])
    with pytest.raises(ValueError, match="no labels yet"):
        score(tasks.get("MentalHealth"), rows_of([0, 1]), [0, 1])


def test_majority_and_confusion():
    task = tasks.get("CB")
    train = rows_of([2, 1, 1, 2, 0])
    assert most_frequent_label(task, train) == 1
    assert most_frequent_label(tasks.get("STS-B"), rows_of([1.0, 4.0])) == 2.5
    with pytest.raises(ValueError, match="no labelled rows"):
        most_frequent_label(task, rows_of([None]))
    counts = confusion_counts(task, rows_of([0, 0, 1, 2]), [0, None, 2, 2])
    assert counts.tolist() == [[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 0]]
    with pytest.raises(ValueError, match="numbers"):
        confusion_counts(tasks.get("STS-B"), rows_of([1.0]), [1.0])


def test_every_metric_of_every_task_is_known():
    for task in tasks.TASKS.values():
        assert set(task.metrics) <= set(metrics.METRICS)
    assert set(metrics.METRICS) == set(bootstrap.STATISTICS) | {"spearman"}


# ---------------------------------------------------------------------------------------------------- bootstrap


@pytest.mark.parametrize("task", SCORED, ids=lambda task: task.name)
def test_resamples_agree_with_the_plain_computation(task):
    """Values from per-unit sums equal scikit-learn's and scipy's on the rows written out as often as drawn."""

    @settings(derandomize=True, max_examples=40, deadline=None)
    @given(answered(task), st.integers(0, 2**32 - 1))
    def check(example, seed):
        rows, predictions, scores = example
        answers = metrics.as_answers(task, rows, predictions, scores)
        unit = splits.units(answers.task, answers.rows)
        units = unit.max() + 1
        counts = np.bincount(np.random.default_rng(seed).integers(0, units, units), minlength=units)
        written = {"rows": [], "predictions": [], "scores": []}
        copy = 0
        for u in range(units):
            for _ in range(counts[u]):
                copy += 1
                for i in np.flatnonzero(unit == u):
                    own = rows[i]["id"]  # every copy is a question or query of its own
                    own = [own[0], (own[1], copy), own[2]] if isinstance(own, list) else (own, copy)
                    written["rows"].append(rows[i] | {"id": own})
                    written["predictions"].append(predictions[i])
                    written["scores"].append(None if scores is None else scores[i])
        written["scores"] = None if scores is None else written["scores"]
        expected = score(task, **written)
        for name in task.metrics:
            for weights, value in ((counts, expected[name]), (np.ones(units), score(task, *example)[name])):
                found = bootstrap.resampler(name, answers, unit)(weights[None].astype(float))
                assert found.shape == (1,)
                assert found[0] == pytest.approx(value, abs=1e-6), name

    check()


def test_interval_of_a_share():
    rows, task = rows_of([1] * 400), tasks.get("SST")
    low, high = intervals(bootstrap_values(task, rows, [1] * 300 + [0] * 100))["accuracy"]
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.008)
    narrow = intervals(bootstrap_values(task, rows, [1] * 300 + [0] * 100), confidence=0.5)["accuracy"]
    assert low < narrow[0] < 0.75 < narrow[1] < high
    again = intervals(bootstrap_values(task, rows, [1] * 300 + [0] * 100))
    assert again["accuracy"] == (low, high) == again["score"]
    assert intervals(bootstrap_values(task, rows, [1] * 300 + [0] * 100, seed=1))["accuracy"] != (low, high)


def test_groups_are_drawn_whole():
    """Ten questions of twenty answers each, all right or all wrong: far wider than two hundred single rows."""
    rows = multirc_rows([(0, 1) * 10] * 10)
    predictions = [row["label"] if row["id"][1] < 5 else 1 - row["label"] for row in rows]
    low, high = intervals(bootstrap_values(tasks.get("MultiRC"), rows, predictions))["f1a"]
    assert high - low > 0.4


@pytest.mark.parametrize("name", ["CoLA", "MRPC", "STS-B", "CB"])
def test_bootstrap_is_quick(name):
    task, rng = tasks.get(name), np.random.default_rng(0)
    gold = rng.uniform(0, 5, 1000) if task.number else rng.integers(0, len(task.labels), 1000)
    rows, predictions = rows_of(gold.tolist()), rng.permutation(gold).tolist()
    begin = time.perf_counter()
    interval = intervals(bootstrap_values(task, rows, predictions))
    assert time.perf_counter() - begin < 5  # usually a tenth of it; machines are busy at times
    assert set(interval) == {*task.metrics, "score"}
    values = score(task, rows, predictions)
    assert all(low <= values[metric] <= high for metric, (low, high) in interval.items())
