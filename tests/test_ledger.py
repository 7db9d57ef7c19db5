"""The ledger of runs, and the tables made from it: hand-computed figures, and runs that lost their folders."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tasks
from evaluation import metrics
from evaluation.bootstrap import bootstrap_values
from evaluation.significance import holm, over_seeds, two_sided_p
from machine.errors import ArgumentError
from reporting import claims, ledger
from reporting.results import METHODS, grouped
from tasks.labels import label_name

SST = tasks.get("SST")
GOLD = [0, 1] * 10
PPO, SFT = "PPO (labels, expected)", "SFT (labels)"


# ---------------------------------------------------------------------------------------------------------- statistics


def test_holm_of_a_hand_computed_vector():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2] and holm([]) == []
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06] * 3)


def test_p_counts_the_resamples_of_the_other_sign():
    assert two_sided_p(np.array([1.0, 1.0, 1.0, -1.0])) == pytest.approx(2 * 2 / 5)
    assert two_sided_p(np.full(9999, 0.1)) == pytest.approx(0.0002)
    assert two_sided_p(np.zeros(10)) == 1.0
    assert two_sided_p(np.array([-1.0] * 9)) == two_sided_p(np.array([1.0] * 9)) == pytest.approx(0.2)


def test_the_hierarchical_bootstrap_of_one_seed_is_the_plain_one():
    values = np.random.default_rng(0).random((1, 50))
    assert np.array_equal(over_seeds(values, np.random.default_rng(1)), values[0])


def test_seeds_without_rows_leave_the_variance_of_the_seeds():
    values = np.stack([np.zeros(20_000), np.ones(20_000)])  # no variance within a seed
    drawn = over_seeds(values, np.random.default_rng(0))
    shares = [np.mean(drawn == level) for level in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    assert drawn.var() == pytest.approx(0.25 / 2, abs=0.005)  # sigma^2 / S with the S - 1 of two seeds not corrected


def answered(name: str, wrong: int) -> tuple:
    """A task, 40 rows, and answers of which the first `wrong` are far off."""
    task = tasks.get(name)
    rng = np.random.default_rng(3)
    gold = np.round(rng.random(40) * 5, 1).tolist() if task.number else rng.integers(0, 2, 40).tolist()
    rows = [{"id": i, "label": label} for i, label in enumerate(gold)]
    labels = [(5 - label if task.number else 1 - label) if i < wrong else label for i, label in enumerate(gold)]
    return task, rows, labels


@pytest.mark.parametrize("name", ["CoLA", "STS-B", "MRPC"])
def test_seeds_that_answer_alike_have_the_interval_of_one(name):
    task, rows, labels = answered(name, 6)
    each = bootstrap_values(task, rows, labels, samples=500, seed=7)["score"]
    several = over_seeds(np.stack([each] * 3), np.random.default_rng(0))
    assert several == pytest.approx(each)
    right = bootstrap_values(task, rows, [row["label"] for row in rows], samples=200)["score"]
    assert over_seeds(np.stack([right, right]), np.random.default_rng(0)) == pytest.approx(np.ones(200))


@pytest.mark.parametrize("name", ["CoLA", "STS-B"])
def test_seeds_that_differ_widen_the_interval_around_their_mean(name):
    runs = [bootstrap_values(*answered(name, wrong), samples=4000, seed=7)["score"] for wrong in (2, 12)]
    several = over_seeds(np.stack(runs), np.random.default_rng(0))
    fixed = np.mean(runs, axis=0)
    assert several.mean() == pytest.approx(fixed.mean(), abs=0.01)
    assert several.std() > 1.2 * fixed.std()


# ---------------------------------------------------------------------------------------------------------- the labels


@pytest.mark.parametrize(
    "name, labels, text",
    [
        ("SST", [0, 1, None, 1], "01-1"),
        ("STS-B", [3.8, None, 5.0, 2.0, 0.1254, 0.0], "3.8 - 5 2 0.125 0"),
        ("SST", [11], "b"),
    ],
)
def test_labels_are_a_digit_each_or_numbers_between_spaces(name, labels, text):
    task = tasks.get(name)
    assert ledger.pack(task, labels) == text
    again = ledger.unpack(task, text)
    assert [x is None for x in again] == [x is None for x in labels]
    assert [x or 0 for x in again] == pytest.approx([x or 0 for x in labels], abs=0.0051)


# ------------------------------------------------------------------------------------------------------------ the file


def flipped(*wrong: int) -> list[int | None]:
    return [1 - label if i in wrong else label for i, label in enumerate(GOLD)]


def names(labels: list) -> list:
    return [label_name(SST, label) for label in labels]


def make_run(
    root: Path, name: str, method: str, labels: list, seed: int = 0, before: list | None = None, **more
) -> Path:
    """A finished run on SST in the form that the scripts write. more: arguments that it was given."""
    folder, rows = root / name, [{"id": i, "label": label} for i, label in enumerate(GOLD)]
    folder.mkdir(parents=True)

    def write(file: str, answers: list) -> dict:
        lines = [
            {
                "id": i,
                "prompt": "a secret film",
                "answer": "so so",
                "label": label_name(SST, a),
                "gold": label_name(SST, g),
            }
            for i, (a, g) in enumerate(zip(answers, GOLD))
        ]
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return metrics.score(SST, rows, answers)

    moments = {"after": write("predictions.jsonl", labels)}
    if before:
        moments["before"] = write("predictions-before.jsonl", before)
    given = {"task": "SST", "from_local": False, "answer_space": "labels", "eval_size": 0, "seed": seed}
    given |= {"batch_sentence_num": 8, "data_path": "/somewhere/else/SST", "learning_rate": 0.0005}
    given |= {"policy_gradient": "expected"} if method == "ppo" else {}
    given |= more
    summary = {"method": method, "task": "SST", "task_version": 1, "model": "tiny", "seed": seed, "metrics": moments}
    summary |= {"arguments": given, "steps": 72, "samples": 576, "train_seconds": 12.5, "peak_memory_bytes": 10**9}
    summary |= {"data_hash": "0a", "versions": {"device": "cpu x 1", "commit": "abcdef" * 4}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps({"started": "2001-02-03T04:05:06+0000", "asked": given}))
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    """PPO with 19 and 17 of 20 right, SFT with 15, and the answers before training with 10."""
    root = tmp_path / "model"
    make_run(root, "ppo-0", "ppo", flipped(0), 0, before=[0] * 20)
    make_run(root, "ppo-1", "ppo", flipped(1, 2, 3), 1)
    make_run(root, "sft", "sft", [*flipped(0, 1, 2, 3)[:-1], None])
    return root


@pytest.fixture
def data(tmp_path) -> str:
    folder = tmp_path / "data" / "GLUE" / "SST"
    folder.mkdir(parents=True)
    lines = [f"film {i} \t{label}" for i, label in enumerate(GOLD)]
    (folder / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return str(folder.parents[1])


def test_a_line_says_what_a_run_was_and_what_came_out(runs, tmp_path):
    path = tmp_path / "runs.csv"
    assert len(ledger.append(runs, path, "a processor")) == 4
    found = {(entry.method, entry.seed): entry for entry in ledger.read(path)}
    assert set(found) == {(PPO, 0), (PPO, 1), (SFT, 0), ("zero-shot (labels)", 0)}
    entry = found[SFT, 0]
    assert (entry.task, entry.rows_trained, entry.rows_evaluated, entry.score) == ("SST", 576, 20, 0.75)
    assert entry.metrics == {"accuracy": 0.75, "invalid_rate": 0.05} and entry.labels == "1010" + "01" * 7 + "0-"
    assert (entry.train_seconds, entry.peak_memory_bytes, entry.date) == (12.5, 10**9, "2001-02-03")
    assert (entry.machine, entry.commit) == ("a processor, cpu x 1", "abcdefabcdef")
    given = "--task SST --answer_space labels --eval_size 0 --data_path SST --learning_rate 0.0005"
    assert entry.command == f".venv/bin/python sft.py {given}"
    start = found["zero-shot (labels)", 0]
    assert (start.rows_trained, start.train_seconds, start.labels, start.score) == (0, None, "0" * 20, 0.5)


def test_no_text_no_gold_label_and_no_folder_of_this_machine_is_kept(runs, tmp_path):
    path = tmp_path / "runs.csv"
    ledger.append(runs, path)
    text = path.read_text()
    assert not any(word in text for word in ("secret", "so so", "gold", "positive", "/somewhere", str(tmp_path)))


def test_labels_of_more_classes_than_digits_are_their_ids():
    task = replace(tasks.get("SST"), labels=tuple(map(str, range(37))))
    assert ledger.pack(task, [0, 36, None, 10]) == "0 36 - 10"
    assert ledger.unpack(task, "0 36 - 10") == [0, 36, None, 10]


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"trl-grpo"}))
def test_every_program_has_a_command_for_its_line(name, tmp_path):
    assert ledger.command(name, {"task": "SST", "seed": 3}).endswith(".py --task SST --seed 3")


def test_the_same_measurement_replaces_its_line(runs, tmp_path):
    path = tmp_path / "runs.csv"
    ledger.append(runs, path)
    before = path.read_bytes()
    ledger.append(runs, path)
    assert path.read_bytes() == before
    make_run(tmp_path / "again", "ppo-0", "ppo", GOLD, 0)
    ledger.append(tmp_path / "again" / "ppo-0", path)
    found = ledger.read(path)
    assert len(found) == 4 and {e.score for e in found if e.method == PPO} == {1.0, 0.85}


def test_a_ledger_is_read_as_it_was_written(runs, tmp_path):
    path = tmp_path / "runs.csv"
    new = ledger.append(runs, path)
    assert sorted(ledger.read(path), key=lambda entry: entry.key) == sorted(new, key=lambda entry: entry.key)
    assert ledger.read(tmp_path / "none.csv") == []


def test_a_broken_ledger_is_named_and_left_alone(runs, tmp_path):
    path = tmp_path / "runs.csv"
    ledger.append(runs, path)
    broken = path.read_text().replace(",576,", ",many,", 1)
    path.write_text(broken)
    with pytest.raises(ArgumentError, match="runs.csv, entry 1 is not as"):
        ledger.append(runs, path)
    assert path.read_text() == broken


@pytest.mark.parametrize("place, said", [("nowhere", "is not a folder"), ("", "holds no finished run")])
def test_a_folder_without_runs_is_refused_in_one_sentence(tmp_path, capsys, place, said):
    with pytest.raises(SystemExit) as stopped:
        ledger.main([str(tmp_path / place), "--csv", str(tmp_path / "runs.csv")])
    err = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in err and said in err and not (tmp_path / "runs.csv").exists()


# ---------------------------------------------------------------------------------------------------------- the tables


def test_runs_without_their_folders_are_compared(runs, data, tmp_path):
    path = tmp_path / "runs.csv"
    ledger.append(runs, path)
    found, left_out = claims.results(ledger.read(path), [data])
    assert len(found) == 4 and not left_out
    groups = {group.method: group for group in grouped(found)}
    resamples = claims.Resamples(samples=2000)
    (claim,) = claims.claims([(groups[PPO], groups[SFT])], resamples)
    assert claim.difference == pytest.approx((0.95 + 0.85) / 2 - 0.75)
    assert (claim.task, claim.rows, claim.seeds) == ("SST", 20, (2, 1)) and claim.adjusted == claim.p
    low, high = claim.interval
    assert low < claim.difference < high and 0 < claim.p <= 1
    (none,) = claims.claims([(groups[PPO], groups[PPO])], resamples)
    assert (none.difference, none.interval, none.p) == (0.0, (0.0, 0.0), 1.0)


def test_the_mean_over_tasks_stands_last_and_p_is_adjusted_over_the_tasks(runs, data, tmp_path):
    path = tmp_path / "runs.csv"
    ledger.append(runs, path)
    found, _ = claims.results(ledger.read(path), [data])
    groups = {group.method: group for group in grouped(found)}
    compared = [(groups[PPO], groups[SFT]), (groups[PPO], groups["zero-shot (labels)"])]  # stand for two tasks
    first, second, mean = claims.claims(compared, claims.Resamples(samples=2000))
    assert mean.difference == pytest.approx((first.difference + second.difference) / 2) and mean.adjusted is None
    assert [first.adjusted, second.adjusted] == holm([first.p, second.p])
    assert (mean.task, mean.rows, mean.seeds) == ("mean of 2 tasks", 40, (2, 1))


def test_the_distance_from_sft_is_split_into_its_parts(runs, data, tmp_path):
    make_run(runs, "sft-label", "sft", flipped(0, 1, 2), loss_on="label")
    ledger.append(runs, tmp_path / "runs.csv")
    found, _ = claims.results(ledger.read(tmp_path / "runs.csv"), [data])
    rows = claims.split_table(grouped(found), claims.Resamples(samples=500)).rows
    assert [(row[0].split(":")[0], row[1], row[2].split(" [")[0]) for row in rows] == [
        ("mask", "SST", "+10.0"),  # 85 less 75
        ("objective", "SST", "+5.0"),  # 90, the mean of two seeds, less 85
    ]


def test_the_document_has_every_method_and_names_what_is_left_out(runs, data, tmp_path, capsys):
    path, output = tmp_path / "runs.csv", tmp_path / "claims.md"
    ledger.append(runs, path)
    lines = path.read_text().splitlines(keepends=True)
    lost = next(line for line in lines if SFT in line).replace("SST,1,", "CoLA,1,", 1)
    wrong = next(line for line in lines if SFT in line).replace("101001", "000000", 1).replace("SFT (", "SFT 2 (")
    path.write_text("".join([*lines, lost, wrong]))
    claims.main(["--csv", str(path), "--data_path", f"{tmp_path},{data}", "--output", str(output)])
    text = output.read_text()
    assert "## PPO (labels, expected) minus each baseline" in text and "| zero-shot (labels) | SST | +40.0" in text
    assert "90.0 \\[" in text and ", 2 seeds |" in text
    left_out = text.split("## Left out")[1]
    assert (
        left_out.count("\n- ") == 2
        and "- CoLA, SFT (labels), seed 0: no usable file of the task is at hand" in left_out
    )
    assert "SST, SFT 2 (labels), seed 0: its labels do not give its metrics" in left_out
    assert "4 of 6 runs are in" in capsys.readouterr().out
    before = output.read_bytes()
    claims.main(["--csv", str(path), "--data_path", data, "--output", str(output)])
    assert output.read_bytes() == before  # the draws are seeded


def test_an_empty_ledger_is_refused_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        claims.main(["--csv", str(tmp_path / "runs.csv"), "--output", str(tmp_path / "claims.md")])
    err = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in err and "holds no run" in err
    assert not (tmp_path / "claims.md").exists()
