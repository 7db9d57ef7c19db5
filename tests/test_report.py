"""report.py: what its tables, tests and pictures say of runs whose figures were computed by hand, and of real ones."""

import csv
import html.parser
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fewshot
import inference
import ppo
import report
import sft
import tasks
from reporting import collect, comparison, figures, page, tables
from reporting.comparison import Cell
from reporting.results import Collection

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
GOLD = ["negative", "positive"] * 5
NASTY = 'a film</script><script>alert(1)</script> & "50%_off" <b>#1</b> | \\end{table} $x^2$'


def flipped(*wrong: int) -> list[str]:
    """The gold labels of ten rows, but for the rows named."""
    return [GOLD[1 - i % 2] if i in wrong else GOLD[i] for i in range(10)]


def make_run(
    root: Path,
    place: str,
    method: str,
    labels: list,
    seed: int = 0,
    gold: list | None = None,
    before=None,
    history: list[dict] | None = None,
    ids: list | None = None,
    prompt: str = "a film",
    p: list | None = None,
    keep_answers: bool = True,
    summary: dict | None = None,
    **arguments,
) -> Path:
    """A finished run on SST in the form that the scripts write."""
    folder, gold = root / place, gold or GOLD
    folder.mkdir(parents=True)

    def figures_of(answers):
        right = sum(a == g for a, g in zip(answers, gold)) / len(gold)
        return {"accuracy": right, "score": right, "invalid_rate": answers.count(None) / len(gold)}

    def write(name, answers):
        lines = [
            {
                "id": ids[i] if ids else i,
                "prompt": f"{prompt} {i}",
                "answer": answer or "?!",
                "label": answer,
                "gold": gold[i],
                "correct": answer == gold[i],
            }
            | ({} if p is None else {"probability_of_last_label": p[i]})
            for i, answer in enumerate(answers)
        ]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    if keep_answers:
        write("predictions.jsonl", labels)
    metrics = {"after": figures_of(labels), "best": figures_of(labels)}
    if before:
        write("predictions-before.jsonl", before)
        metrics["before"] = figures_of(before)
    given = {"task": "SST", "from_local": False, "answer_space": "labels", "eval_size": 10, "seed": seed, **arguments}
    written = {
        "method": method,
        "task": "SST",
        "task_version": 1,
        "model": "tiny",
        "seed": seed,
        "samples": 0,
        "train_seconds": 0.0,
        "peak_memory_bytes": 1_500_000_000,
        "metrics": metrics,
        "arguments": given,
        "majority": {"accuracy": 0.5, "score": 0.5, "invalid_rate": 0.0},
        **(summary or {}),
    }
    (folder / "summary.json").write_text(json.dumps(written))
    (folder / "arguments.json").write_text(json.dumps(given))
    if history:
        (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    return folder


TRAINED = {"samples": 64, "steps": 2, "train_seconds": 90.0}


@pytest.fixture
def made_up(tmp_path) -> Path:
    """Zero-shot 6 of 10, few-shot 5 of 10 with one invalid, SFT 8, PPO 8 and 10."""
    root = tmp_path / "model"
    make_run(root, "zero", "zero-shot", flipped(0, 1, 2, 3), summary={"seconds": 12.3})
    few = flipped(0, 1, 2, 3)
    few[4] = None
    make_run(root, "few", "few-shot", few, num_shots=4)
    make_run(root, "SST/sft", "sft", flipped(8, 9), summary=TRAINED, p=[0.2, 0.9] * 5)
    for seed, wrong in ((0, (0, 9)), (1, ())):
        rewards = [{"step": step, "objective/reward": step / 4 + seed / 2} for step in (1, 2)]
        curve = [{"step": 0, "eval/score": 0.6}, *rewards, {"step": 2, "eval/score": 0.8 + seed / 5}]
        make_run(
            root,
            f"SST/deep/ppo-{seed}",
            "ppo",
            flipped(*wrong),
            seed,
            history=curve,
            summary=TRAINED,
            policy_gradient="expected",
            before=flipped(0, 1, 2, 3),
        )
    return root


def make_report(root: Path, output: Path) -> dict[str, bytes]:
    report.main(["--runs", str(root), "--output_dir", str(output)])
    return {path.name: path.read_bytes() for path in output.iterdir()}


def refused(capsys, *options: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        report.main([str(option) for option in options])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in said and said.startswith("report.py: error: ")
    return said


def results_table(root: Path) -> dict[tuple[str, str], dict[str, str]]:
    """{(task, metric): {column: text}} of the first table."""
    table = tables.score_tables(collect.collect(root).groups)[0]
    return {tuple(row[:2]): dict(zip(table.header[2:], row[2:])) for row in table.rows}


class Reader(html.parser.HTMLParser):
    """The page's tables as text, its tags, and its links to other files."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen, self.links, self.tables, self.text = [], set(), [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


# ---------------------------------------------------------------------------------------------------------- the tables


def test_the_table_has_the_values_computed_by_hand(made_up):
    accuracy, invalid = (results_table(made_up)["SST", metric] for metric in ("accuracy", "invalid rate"))
    assert [*accuracy] == [
        "majority class",
        "zero-shot (labels)",
        "few-shot 4 (labels)",
        "SFT (labels)",
        "PPO (labels, expected)",
    ]
    assert {method: re.sub(r" \[.*?\]", "", text) for method, text in accuracy.items()} == {
        "majority class": "50.0",
        "zero-shot (labels)": "60.0",
        "few-shot 4 (labels)": "50.0",
        "SFT (labels)": "80.0",
        "PPO (labels, expected)": "90.0 (80.0–100.0, n=2)",
    }
    assert invalid["few-shot 4 (labels)"] == "10.0" and invalid["majority class"] == "–"
    assert invalid["PPO (labels, expected)"] == "0.0 (0.0–0.0, n=2)"


def test_a_classification_head_is_a_baseline_of_its_own(made_up):
    start = flipped(*range(5))  # of a random head: no zero-shot result
    given = dict(summary=TRAINED, before=start, full=True, max_response_length=16)
    make_run(made_up, "head", "head", flipped(9), **given)
    best = str(made_up / "head" / "best")
    make_run(made_up, "asked", "trained", flipped(9), summary={"model": best}, from_local=True)
    found = collect.collect(made_up)
    names = [group.method for group in found.groups]
    head, asked = "classification head (all weights)", "classification head best/ (all weights)"
    assert names.index("few-shot 4 (labels)") < names.index(head) < names.index("SFT (labels)") < names.index(asked)
    assert sum(result.kind == "zero-shot" for result in found.results) == 1
    against = {c.baseline: c for c in comparison.compare_all(found.groups)}
    assert against[head].difference == pytest.approx(0.0) and against[head].rows == 10


def test_intervals_are_bootstrap_quantiles_over_rows_of_the_mean_over_seeds(made_up):
    groups = {group.method: group for group in collect.collect(made_up).groups}
    counts = np.random.default_rng(0).integers(0, 10, size=(1000, 10))  # as metrics.bootstrap_values draws
    right = np.array([0.5, *[1.0] * 8, 0.5])  # mean over the two seeds, by row
    low, high = np.quantile(right[counts].mean(1), [0.025, 0.975])
    found = comparison.cells(groups["PPO (labels, expected)"])["accuracy"]
    assert found.interval == pytest.approx((low, high))
    assert (found.mean, found.least, found.most, found.seeds) == (pytest.approx(0.9), 0.8, 1.0, [0, 1])


def test_the_cost_of_a_method(made_up):
    table = tables.cost_table(collect.collect(made_up).groups)
    found = {row[2]: row[3:] for row in table.rows}
    assert found["PPO (labels, expected)"] == ["2", "0, 1", "64", "1 min 30 s", "1.50 GB"]
    assert found["zero-shot (labels)"] == ["1", "0", "0", "12.3 s", "1.50 GB"]


def test_the_tokens_and_the_price_of_a_server_s_answers(tmp_path):
    for seed, cost in ((0, 0.1), (1, 0.3)):
        paid = {"tokens": {"input": 1000 * (seed + 1), "output": 50}, "cost": cost, "peak_memory_bytes": None}
        make_run(tmp_path, f"gpt-{seed}", "zero-shot", flipped(), seed, summary=paid, endpoint="http://x/v1")
    make_run(tmp_path, "here", "zero-shot", flipped(1))
    table = tables.cost_table(collect.collect(tmp_path).groups)
    assert table.header[-3:] == ["tokens in prompts", "tokens in answers", "price"]
    found = {row[2]: row[-4:] for row in table.rows}
    assert found["zero-shot (labels, by a server)"] == [tables.NONE, "1500", "50", "0.2000"]
    assert found["zero-shot (labels)"][1:] == [tables.NONE] * 3


def test_the_start_of_training_is_a_zero_shot_result_unless_there_is_one(made_up):
    (made_up / "zero" / "summary.json").unlink()
    found = {group.method: group for group in collect.collect(made_up).groups}
    assert [r.run for r in found["zero-shot (labels)"].results] == ["SST/deep/ppo-0 (before training)"]
    assert found["zero-shot (labels)"].first.metrics["accuracy"] == 0.6
    assert comparison.compare(found["PPO (labels, expected)"], found["zero-shot (labels)"])[0].rows == 10


def test_settings_that_differ_are_methods_of_their_own(tmp_path):
    for name, rate, space in (("a", 1e-3, "labels"), ("b", 1e-4, "labels"), ("c", 1e-4, "free")):
        make_run(tmp_path, name, "ppo", flipped(), learning_rate=rate, answer_space=space, policy_gradient="sampled")
    assert [group.method for group in collect.collect(tmp_path).groups] == [
        "PPO (free, sampled)",
        "PPO (labels, sampled; learning_rate 0.0001)",
        "PPO (labels, sampled; learning_rate 0.001)",
    ]


def test_objectives_are_methods_of_their_own_and_older_runs_keep_their_names(tmp_path):
    sampled = dict(policy_gradient="sampled", repeat_time=16)
    make_run(tmp_path, "a", "ppo", flipped(), seed=0, **sampled)  # of before there was a choice
    new = dict(clip_range_high=None, entropy_end=None, kl_target=0.0, success_order=1.0)
    make_run(tmp_path, "b", "ppo", flipped(), seed=1, advantage="leave_one_out", **sampled, **new)
    make_run(tmp_path, "c", "ppo", flipped(), seed=0, advantage="group", **sampled, **new)
    make_run(tmp_path, "d", "ppo", flipped(), policy_gradient="expected", advantage="", **new)
    make_run(tmp_path, "e", "ppo", flipped(), policy_gradient="expected", **(new | {"success_order": 8.0}))
    make_run(tmp_path, "f", "sft", flipped(), seed=0, loss_on="answer")
    smoothing = dict(label_smoothing=0.0, number_target="nearest")
    make_run(tmp_path, "g", "sft", flipped(), seed=1, loss_on="answer", **smoothing)
    make_run(tmp_path, "h", "sft", flipped(), loss_on="label", **smoothing)
    best = str(tmp_path / "h" / "best")
    make_run(tmp_path, "i", "trained", flipped(0), from_local=True, summary={"model": best})
    found = {group.method: len(group.results) for group in collect.collect(tmp_path).groups}
    assert found == {
        "SFT (labels)": 2,
        "SFT (labels, loss on label)": 1,
        "PPO (labels, expected)": 1,
        "PPO (labels, expected, MaxRL 8)": 1,
        "PPO (labels, sampled)": 2,
        "PPO (labels, sampled, group)": 1,
        "SFT best/ (labels, loss on label)": 1,
    }


def test_an_adapter_is_named_by_what_trained_it(tmp_path):
    make_run(tmp_path, "sft", "sft", flipped(0), seed=4)
    best = str(tmp_path / "sft" / "best")
    make_run(tmp_path, "asked", "trained", flipped(0), from_local=True, summary={"model": best})
    make_run(tmp_path, "more", "ppo", flipped(), from_local=True, policy_gradient="expected", summary={"model": best})
    make_run(tmp_path, "lost", "trained", flipped(1), from_local=True, summary={"model": "elsewhere/best"})
    found = {group.method: group for group in collect.collect(tmp_path).groups}
    assert {(name, group.key.model) for name, group in found.items()} == {
        ("SFT (labels)", "tiny"),
        ("SFT best/ (labels)", "tiny"),
        ("SFT + PPO (labels, expected)", "tiny"),
        ("trained adapter (labels)", "elsewhere/best"),
    }
    assert found["SFT best/ (labels)"].first.seed == 4
    assert [name for name, group in found.items() if comparison.is_ppo(group)] == ["SFT + PPO (labels, expected)"]


def make_scored(root: Path, task: str, value: float, place: str = "") -> None:
    scores = {name: value for name in (*tasks.get(task).metrics, "score")} | {"invalid_rate": 0.0}
    about = {"task": task, "metrics": {"after": scores, "best": scores}}
    make_run(root, place or task, "zero-shot", flipped(), keep_answers=False, summary=about, number_answer="mean")


def test_the_suite_score_counts_mnli_once_and_says_when_tasks_are_missing(tmp_path):
    values = {
        "CoLA": 0.1,
        "SST": 0.9,
        "MRPC": 0.8,
        "STS-B": 0.7,
        "QQP": 0.6,
        "MNLI-m": 0.5,
        "MNLI-mm": 0.3,
        "QNLI": 0.6,
        "RTE": 0.5,
        "AX": 0.0,
    }
    for task, value in values.items():
        make_scored(tmp_path, task, value)
    # CoLA, SST, MRPC, STS-B, QQP, MNLI .4, QNLI and RTE: 4.6; AX is a diagnostic set and does not count
    said = results_table(tmp_path)["GLUE", "suite score"]["zero-shot (labels)"]
    assert said == f"{100 * 4.6 / 8:.1f} (mean of 9 of 10 tasks)"
    make_scored(tmp_path, "WNLI", 0.8)
    assert results_table(tmp_path)["GLUE", "suite score"]["zero-shot (labels)"] == "60.0"
    make_scored(tmp_path, "SuperGLUE/RTE", 0.25, "super")
    found = results_table(tmp_path)
    assert found["SuperGLUE", "suite score"]["zero-shot (labels)"] == "25.0 (mean of 1 of 8 tasks)"
    assert found["MRPC", "f1"]["zero-shot (labels)"] == found["MRPC", "score"]["zero-shot (labels)"] == "80.0"


# ------------------------------------------------------------------------------------------------------------ the tests


def compared(root: Path, method: str = "PPO", baseline: str = "zero-shot") -> comparison.Comparison:
    groups = collect.collect(root).groups
    (ours,) = (g for g in groups if g.method.startswith(method))
    (theirs,) = (g for g in groups if g.method.startswith(baseline))
    (found,) = comparison.compare(ours, theirs)
    return found


def test_identical_answers_differ_by_nothing(tmp_path):
    make_run(tmp_path, "a", "zero-shot", flipped(0, 3))
    make_run(tmp_path, "b", "ppo", flipped(0, 3), policy_gradient="expected")
    found = compared(tmp_path)
    assert (found.difference, found.interval, found.p, found.rows) == (0.0, (0.0, 0.0), 1.0, 10)


def test_a_difference_that_every_resample_shows_has_the_smallest_p(tmp_path):
    make_run(tmp_path, "a", "zero-shot", flipped(*range(10)))
    make_run(tmp_path, "b", "ppo", flipped(), policy_gradient="expected")
    found = compared(tmp_path)
    assert (found.difference, found.interval) == (1.0, (1.0, 1.0))
    assert found.p == pytest.approx(2 / (comparison.SAMPLES + 1))


def test_p_and_interval_are_near_those_of_the_normal_distribution(tmp_path):
    gold = ["negative", "positive"] * 50
    other = {"negative": "positive", "positive": "negative"}
    # of 100 rows PPO fixes 30 and breaks 18: difference .12, standard error sqrt((.48 - .12 ** 2) / 100) = .0682
    ours = [other[g] if i < 18 else g for i, g in enumerate(gold)]
    theirs = [other[g] if i >= 70 else g for i, g in enumerate(gold)]
    make_run(tmp_path, "a", "zero-shot", theirs, gold=gold)
    make_run(tmp_path, "b", "ppo", ours, gold=gold, policy_gradient="expected")
    found = compared(tmp_path)
    assert found.difference == pytest.approx(0.12)
    assert found.interval == pytest.approx((0.12 - 1.96 * 0.0682, 0.12 + 1.96 * 0.0682), abs=0.011)
    assert 0.06 < found.p < 0.12  # 0.079 by the normal distribution, and ties count for no difference


def test_rows_are_matched_by_id_in_whatever_order(tmp_path):
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    make_run(tmp_path, "a", "zero-shot", flipped(2, 7))
    answers = flipped(2, 7)
    make_run(
        tmp_path,
        "b",
        "ppo",
        [answers[i] for i in order],
        gold=[GOLD[i] for i in order],
        ids=order,
        policy_gradient="expected",
    )
    found = compared(tmp_path)
    assert (found.difference, found.interval, found.p) == (0.0, (0.0, 0.0), 1.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(ids=[*range(9), 77]), "b answers 10 rows, a 10; they share 9"),
        (dict(gold=GOLD[::-1]), "b and a have different gold labels for row 0"),
        (dict(keep_answers=False), "b has no usable predictions.jsonl"),
    ],
)
def test_what_is_not_comparable_is_told_with_the_reason(change, reason, tmp_path):
    make_run(tmp_path, "a", "ppo", flipped(), policy_gradient="expected")
    make_run(tmp_path, "b", "zero-shot", flipped(0), **change)
    assert compared(tmp_path).reason == reason
    table = tables.comparison_table(comparison.compare_all(collect.collect(tmp_path).groups))
    assert table.rows[0][-3:] == [f"not comparable: {reason}", "–", "–"]


# ---------------------------------------------------------------------------------------------------- rows and pictures


def test_fixed_and_broken_rows(made_up):
    groups = {group.method: group for group in collect.collect(made_up).groups}
    found = comparison.changes(groups["PPO (labels, expected)"], groups["zero-shot (labels)"])
    assert found.result.run == "SST/deep/ppo-0"  # of the two, the one with the baseline's seed
    assert [after["id"] for _, after in found.fixed] == [1, 2, 3] and [b["id"] for b, _ in found.broken] == [9]
    assert [(before["label"], after["label"]) for before, after in found.broken] == [("positive", "negative")]


def test_of_many_changed_rows_twenty_are_shown_and_all_are_counted(tmp_path):
    gold = ["negative", "positive"] * 30
    make_run(tmp_path, "a", "zero-shot", gold[::-1], gold=gold)
    make_run(tmp_path, "b", "ppo", gold, gold=gold, policy_gradient="expected")
    shown = "".join(page.changed(collect.collect(tmp_path).groups))
    assert "Of 60 rows 60 fixed, 0 broken" in shown and "fixed (the first 20 of 60)" in shown
    assert shown.count("<tr>") == 21 and shown.count("<details>") == 1


def test_numbers_that_came_closer(tmp_path):
    task = tasks.get("STS-B")
    lines = [{"label": label, "gold": 3.0} for label in (1.0, 3.5, None)]
    assert [comparison.mistake(line, task) for line in lines] == [2.0, 0.5, 1e9]


def test_curves_are_means_and_ranges_over_the_seeds(made_up):
    groups = {group.method: group for group in collect.collect(made_up).groups}
    results = groups["PPO (labels, expected)"].results
    held_out, reward = (figures.mean_and_range(results, name) for name in ("eval/score", "objective/reward"))
    assert held_out == ([0, 64], pytest.approx([0.6, 0.9]), pytest.approx([0.6, 0.8]), pytest.approx([0.6, 1.0]))
    assert reward == ([32, 64], [0.5, 0.75], [0.25, 0.5], [0.75, 1.0])


def test_reliability_is_binned_by_the_probability_of_the_answer(made_up):
    groups = {group.method: group for group in collect.collect(made_up).groups}
    # P(positive) is .2 or .9. Rows 0 to 7 answer it rightly: 4 at .8 (negative) and 4 at .9; row 8 answers positive
    # with .2, and row 9 negative with .1.
    confidence, accuracy, count, error = figures.reliability_points(groups["SFT (labels)"].results)
    assert confidence == pytest.approx([0.1, 0.2, 0.8, 0.9]) and accuracy.tolist() == [0, 0, 1, 1]
    assert count.tolist() == [1, 1, 4, 4] and error == pytest.approx((0.1 + 0.2 + 4 * 0.2 + 4 * 0.1) / 10)
    assert figures.reliability_points(groups["PPO (labels, expected)"].results) is None


@pytest.mark.parametrize(("shares", "fallen"), [((0.5, 0.96, 0.97), True), ((0.96, 0.5, 0.96), False), ((), False)])
def test_a_collapse_is_two_steps_with_one_label(shares, fallen):
    history = [{"step": i, "objective/share/a": s, "objective/share/b": 1 - s} for i, s in enumerate(shares)]
    assert figures.collapsed([{"step": 0, "eval/score": 0.5}, *history]) is fallen


def test_the_pictures_are_inside_the_page_and_beside_it(made_up, tmp_path):
    folder = made_up / "stopped"
    folder.mkdir()
    (folder / "arguments.json").write_text('{"task": "SST"}')
    share = "objective/share/positive"
    (folder / "history.jsonl").write_text("".join(json.dumps({"step": s, share: 0.99}) + "\n" for s in (1, 2, 3)))
    files = make_report(made_up, tmp_path / "report")
    pictures = {name for name in files if name.endswith(".png")}
    assert pictures == {f"figure-01-SST-{kind}.png" for kind in ("curves", "confusion", "reliability")} | {
        "figure-00-tiny-scores.png",
        "figure-collapsed-runs.png",
    }
    assert all(files[name].startswith(b"\x89PNG") for name in pictures)
    found = Reader(files["report.html"].decode())
    assert len(found.links) == 5 and all(link.startswith("data:image/png;base64,") for link in found.links)
    for word in ("stopped: stopped, or still running, after step 3", "1 unfinished run", "5 finished runs"):
        assert word in found.text


# ---------------------------------------------------------------------------------------------------------- the files


def cells_of(text: str) -> list[list[str]]:
    """The cells of every Markdown table line, unescaped."""
    rows = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in text.splitlines() if line.startswith("| ")]
    return [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in rows]


def latex_cells(text: str) -> list[list[str]]:
    back = {latex: character for character, latex in tables.LATEX.items()} | {"{[}": "[", "{]}": "]"}
    pattern = re.compile("|".join(re.escape(latex) for latex in sorted(back, key=len, reverse=True)))
    rows = [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r" \\")]
    return [[pattern.sub(lambda match: back[match[0]], cell) for cell in row] for row in rows]


def test_markdown_latex_html_and_csv_agree(made_up, tmp_path):
    make_scored(made_up, "MRPC", 0.625)
    make_run(made_up, "other", "zero-shot", flipped(0), data_path="C:\\a|b_{c}~50%<d>&e^f#$g[h]")
    files = {
        name: data.decode() for name, data in make_report(made_up, tmp_path / "report").items() if "report" in name
    }
    markdown, latex = cells_of(files["report.md"]), latex_cells(files["report.tex"])
    assert markdown == latex and len(markdown) > 15
    assert any("C:\\a|b_{c}~50%<d>&e^f#$g[h]" in cell for cell in markdown[0])
    shown = [row for table in Reader(files["report.html"]).tables for row in table]
    assert shown[: len(markdown)] == markdown
    header, *lines = csv.reader(io.StringIO(files["report.csv"]))
    first = next(i for i, row in enumerate(markdown) if row[0] == "GLUE")  # the last line of the first table
    columns, rows = markdown[0], {tuple(row[:2]): row for row in markdown[1:first]}
    assert len(lines) > 10
    for values in lines:
        line = dict(zip(header, values))
        row = rows.get((line["task"], line["metric"].replace("_", " ")))
        if row is None:
            # A score that repeats the only metric, or invalid rates that are all 0.
            assert (line["metric"], line["task"]) == ("score", "SST") or float(line["highest"]) == 0
            continue
        number = {name: float(line[name]) / 100 for name in ("mean", "lowest", "highest")}
        interval = (
            tuple(float(line[f"interval_{end}"]) / 100 for end in ("low", "high")) if line["interval_low"] else None
        )
        seeds = [int(seed) for seed in line["seeds"].split()]
        cell = Cell(number["mean"], number["lowest"], number["highest"], seeds, interval)
        assert row[columns.index(line["method"])] == tables.cell_text(cell)


def test_text_from_the_data_is_escaped_everywhere(tmp_path):
    root = tmp_path / "model"
    make_run(root, "a", "zero-shot", flipped(0, 1), prompt=NASTY, summary={"model": NASTY})
    make_run(root, "b", "ppo", flipped(), prompt=NASTY, policy_gradient="expected", summary={"model": NASTY})
    files = make_report(root, tmp_path / "report")
    found = Reader(files["report.html"].decode())
    assert not found.seen & {"script", "b"} and f"{NASTY} 0" in found.text
    assert b"<script" not in files["report.html"] and b"<b>" not in files["report.md"]
    special = tables.latex(NASTY)
    assert special.encode() in files["report.tex"] and not re.search(r"(?<!\\)[%_#&^]", special)


def test_the_page_needs_nothing_else_and_reads_on_small_and_dark_screens(made_up, tmp_path):
    text = make_report(made_up, tmp_path / "report")["report.html"].decode()
    found = Reader(text)
    assert not found.seen & {"script", "link", "iframe", "object"} and "@import" not in text and "http" not in text
    assert '<meta name="viewport" content="width=device-width' in text and "prefers-color-scheme: dark" in text
    assert text.count("<table>") == text.count('<div class="scroll"><table>') > 3


def test_the_same_runs_give_the_same_bytes(made_up, tmp_path):
    first, second = (make_report(made_up, tmp_path / name) for name in ("one", "two"))
    assert first == second and len(first) == 8


def test_an_older_report_is_replaced_whole(made_up, tmp_path, capsys):
    output = tmp_path / "report"
    output.mkdir()
    for name in ("report.html", "figure-99-gone.png"):
        (output / name).write_text("old")
    assert "figure-99-gone.png" not in make_report(made_up, output)
    assert (output / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    (output / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    said = refused(capsys, "--runs", made_up, "--output_dir", output)
    assert said.endswith(f"--output_dir {output} holds notes.txt, which is not part of a report; give another folder")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_a_report_that_cannot_be_written_leaves_the_older_one(made_up, tmp_path, capsys, monkeypatch):
    make_report(made_up, tmp_path / "report")
    before = (tmp_path / "report" / "report.html").read_bytes()

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    capsys.readouterr()
    assert "cannot be written (No space left on device)" in refused(
        capsys, "--runs", made_up, "--output_dir", tmp_path / "report"
    )
    monkeypatch.undo()
    assert (tmp_path / "report" / "report.html").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "report"}


# ------------------------------------------------------------------------------------------------------------ bad input


def test_no_runs_end_with_one_sentence(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    said = refused(capsys, "--runs", tmp_path / "model", "--output_dir", tmp_path / "report")
    assert f"--runs {tmp_path / 'model'} holds no run" in said
    assert "is not a folder" in refused(capsys, "--runs", tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    said = refused(capsys, "--runs", tmp_path / "model", "--output_dir", tmp_path / "file")
    assert "is a file; give a folder" in said
    assert "unrecognized arguments: --run" in refused(capsys, "--run", "x")
    assert not (tmp_path / "report").exists()


START = '{"method": "ppo", "task": "SST", "model": "m", "seed": 0, '
BROKEN = {
    '{"method": "ppo", ': "is not JSON",
    "[1, 2]": "has no 'method'",
    '{"method": "ppo", "task": "SST"}': "has no 'model'",
    START + '"metrics": {}, "arguments": {}}': "'after'",
    START.replace("SST", "SSTT") + '"metrics": {"after": {}}, "arguments": {}}': "There is no task 'SSTT'",
    START + '"metrics": {"after": {}}, "arguments": {}, "samples": "many", "steps": 3}': "is not as a run writes it",
}


def test_broken_summaries_are_named_and_left_out(made_up, tmp_path, capsys):
    for number, text in enumerate(BROKEN):
        (made_up / f"broken-{number}").mkdir()
        (made_up / f"broken-{number}" / "summary.json").write_text(text)
    files = make_report(made_up, tmp_path / "report")
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warned) == len(BROKEN)
    shown = Reader(files["report.html"].decode()).text
    for number, reason in enumerate(BROKEN.values()):
        path = str(made_up / f"broken-{number}" / "summary.json")
        assert [reason in line for line in warned if path in line] == [True] and path in shown
    assert results_table(made_up)["SST", "accuracy"]["SFT (labels)"].startswith("80.0")


def test_answers_that_do_not_belong_to_the_summary_are_left_out(made_up):
    path = made_up / "zero" / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    found = collect.collect(made_up)
    assert found.skipped == [f"{path} is left out: its answers do not give the metrics of summary.json"]
    path.write_text("".join([*lines[:4], "{oops\n"]))
    assert f"{path}, line 5 cannot be read" in collect.collect(made_up).skipped[0]
    path.write_text("".join(lines).replace('"label": "positive"', '"label": "good"'))
    assert collect.collect(made_up).skipped == [f"{path} is left out: 'good' is not a label of SST"]


def test_unfinished_runs_are_listed_with_how_far_they_came(made_up):
    for name, task in (("fresh", "SST"), ("asking", "SST"), ("suite", "SST,RTE,AX"), ("done", "SST,RTE,AX")):
        (made_up / name).mkdir()
        (made_up / name / "arguments.json").write_text(json.dumps({"task": task}))
    (made_up / "asking" / ".predictions.jsonl").write_text("{}\n{}\n{}\n")
    for place in ("suite/SST", "done/SST", "done/RTE"):
        make_scored(made_up, place.split("/")[1], 0.5, place)
    assert collect.collect(made_up).unfinished == [
        ("asking", "3 rows answered"),
        ("fresh", "no step yet"),
        ("suite", "1 tasks answered, without RTE"),
    ]


def test_only_unfinished_runs_make_a_report_that_says_so(tmp_path):
    folder = tmp_path / "model" / "run"
    folder.mkdir(parents=True)
    (folder / "arguments.json").write_text('{"task": "SST"}')
    text = Reader(make_report(tmp_path / "model", tmp_path / "report")["report.html"].decode()).text
    assert "0 finished runs, 1 unfinished run" in text and "run: no step yet" in text
    assert "No finished run has a score yet." in text


# ------------------------------------------------------------------------------------------------------------ real runs


@pytest.fixture(scope="module")
def real(model_folder, data_root, tmp_path_factory) -> Path:
    """Runs of all four scripts with a tiny model."""
    root = tmp_path_factory.mktemp("runs") / "model"
    common = ["--from_local", "True", "--train_model_name", str(model_folder), "--report_to", "none"]
    sst = [*common, "--task", "SST", "--data_path", str(data_root)]
    training = [*sst, "--batch_sentence_num", "8", "--learning_rate", "1e-2", "--max_steps", "2"]
    inference.main([*sst, "--output_dir", str(root / "zero")])
    fewshot.main([*sst, "--output_dir", str(root / "few"), "--num_shots", "2"])
    sft.main([*training, "--output_dir", str(root / "sft")])
    ppo.main([*training, "--output_dir", str(root / "ppo"), "--eval_steps", "1"])
    fixtures = [*common, "--data_path", str(FIXTURES)]
    sft.main(
        [
            *fixtures,
            "--task",
            "SIGA-nli,MentalHealth",
            "--output_dir",
            str(root / "two"),
            "--max_steps",
            "1",
            "--batch_sentence_num",
            "2",
        ]
    )
    inference.main([*fixtures, "--task", "SuperGLUE", "--output_dir", str(root / "super")])
    return root


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_training_leaves_the_answers_of_its_first_and_last_evaluation(real):
    asked = read_lines(real / "zero" / "predictions.jsonl")
    for name in ("sft", "ppo"):
        summary = json.loads((real / name / "summary.json").read_text())
        for file, moment in (("predictions-before.jsonl", "before"), ("predictions.jsonl", "after")):
            lines = read_lines(real / name / file)
            assert sum(line["correct"] for line in lines) / len(lines) == summary["metrics"][moment]["accuracy"]
            assert [{k: line[k] for k in ("id", "prompt", "gold")} for line in lines] == [
                {k: line[k] for k in ("id", "prompt", "gold")} for line in asked
            ]
            assert all(line.keys() == asked[0].keys() for line in lines)
        # Before training it is the model that inference.py asks.
        for line, other in zip(read_lines(real / name / "predictions-before.jsonl"), asked):
            assert line["probability_of_last_label"] == pytest.approx(other["probability_of_last_label"], abs=1e-4)
        zero = json.loads((real / "zero" / "summary.json").read_text())
        assert summary["majority"] == zero["majority"] and summary["labels"] == ["negative", "positive"]
        assert np.sum(summary["confusion"]) == 12 and set(summary["intervals"]) == {"accuracy", "score"}


def test_the_answers_alone_give_every_task_the_intervals_that_its_run_computed(real):
    found: Collection = collect.collect(real)
    assert not found.skipped and not found.unfinished
    seen = set()
    for result in found.results:
        if "intervals" not in result.details:
            continue
        values = comparison.bootstrap([result], samples=1000)
        for name, interval in result.details["intervals"].items():
            assert tuple(np.quantile(values[name], [0.025, 0.975])) == pytest.approx(tuple(interval), abs=1e-9)
        seen.add(result.task.name)
    assert {"SST", "ReCoRD", "MultiRC", "AX-g", "MentalHealth", "CB", "AX-b"} <= seen


def test_the_report_of_real_runs(real, tmp_path):
    command = [sys.executable, ROOT / "report.py", "--runs", real, "--output_dir", tmp_path / "report"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "15 finished runs" in result.stdout  # five, and one for each of SuperGLUE's ten tasks
    found = Reader((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    header, *rows = found.tables[0]
    methods = {
        "zero-shot (labels)",
        "few-shot 2 (labels)",
        "SFT (labels)",
        "PPO (labels, expected)",
        "SFT on SIGA-nli,MentalHealth (labels)",
    }
    assert methods <= set(header)
    accuracy = next(row for row in rows if row[:2] == ["SST", "accuracy"])
    last = json.loads((real / "ppo" / "summary.json").read_text())["metrics"]["after"]["accuracy"]
    assert accuracy[header.index("PPO (labels, expected)")].startswith(f"{100 * last:.1f} [")
    assert any(row[0] == "SuperGLUE" and row[1] == "suite score" and "mean of" not in row[3] for row in rows)
    tests = next(table for table in found.tables if table[0][-2:] == ["p", "rows"])
    assert {row[3] for row in tests[1:]} >= {"zero-shot (labels)", "few-shot 2 (labels)", "SFT (labels)"}
