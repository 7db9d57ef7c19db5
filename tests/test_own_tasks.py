"""A task of one's own: a table or a YAML file."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import classify
import fewshot
import inference
import ppo
import prompts
import report
import rewards
import sft
import tasks
from machine.errors import DataError
from tasks import guessing, loaders, own, splits


def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return str(path)


def tickets(rows=30, header="id;message;queue", labels=("bug", "bug report", "billing")):
    lines = [f'{i};"It broke; again {i},\nand again";{labels[i % len(labels)]}' for i in range(rows)]
    return "\n".join([header, *lines, ""])


# ----------------------------------------------------------------------------------------------- a task as a YAML file


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_of_the_table_comes_back_from_its_file(tmp_path, name):
    own.write_task(tmp_path / "task.yaml", tasks.get(name))
    assert own.read_task(tmp_path / "task.yaml") == tasks.get(name)


def test_the_labels_that_a_task_took_from_its_data_come_back(tmp_path):
    task = replace(tasks.get("MentalHealth"), labels=("Calm", "Worry"), words=("calm", "worry"))
    own.write_task(tmp_path / "task.yaml", task)
    assert own.read_task(tmp_path / "task.yaml") == task


@pytest.mark.parametrize(
    "labels", [("bug", "bug report", "Billing {x}: ä"), ("0", "1"), ("yes", "no"), ("1.5", "2", "7.25")]
)
def test_a_table_s_task_comes_back_from_its_file(tmp_path, labels):
    task = guessing.task_of(write(tmp_path, "tickets.csv", tickets(labels=labels)))
    (tmp_path / "run").mkdir()
    own.write_task(tmp_path / "run" / "task.yaml", task)
    assert own.read_task(tmp_path / "run" / "task.yaml") == task
    assert task.number == ("1.5" in labels) and prompts.wording_of(task).body == "Message: {message}"


# --------------------------------------------------------------------------------------------------- tables of any kind


ROWS = [
    (f"the {['invoice', 'crash', 'quote'][i % 3]} number {i}", ["billing", "bug", "bug report"][i % 3])
    for i in range(30)
]


def frame(**columns):
    import pandas

    return pandas.DataFrame(columns or {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]})


def as_csv(separator=",", header=True, quote='"', end="\n", extra="") -> str:
    lines = [f"{quote}{text}{quote}{separator}{label}" for text, label in ROWS]
    return end.join([f"text{separator}label", *lines, extra])


FILES = {
    "rows.csv": lambda path: path.write_text(as_csv()),
    "bom and crlf.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + as_csv(end="\r\n").encode()),
    "semicolons.csv": lambda path: path.write_text(as_csv(";")),
    "blank lines.csv": lambda path: path.write_text(as_csv(extra="\n\n")),
    "rows.tsv": lambda path: path.write_text(as_csv("\t", quote="")),
    "rows.jsonl": lambda path: frame().to_json(path, orient="records", lines=True),
    "rows.json": lambda path: frame().to_json(path, orient="records"),
    "rows.parquet": lambda path: frame().to_parquet(path),
    "rows.xlsx": lambda path: frame().to_excel(path, index=False),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_table_is_the_same_task(tmp_path, name):
    path = tmp_path / name
    FILES[name](path)
    task = guessing.task_of(str(path))
    assert task.labels == ("billing", "bug", "bug report") and task.columns == {"text": "text", "label": "label"}
    rows = loaders.load(task, "train")
    assert [(row["text"], task.labels[row["label"]]) for row in rows] == ROWS


def test_texts_over_several_lines_quotes_in_tsv_and_numbers_as_labels(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"one,\n""two""",0\nthree,1\nfour,0\nfive,1\n')
    rows = loaders.load(guessing.task_of(path), "train")
    assert [(row["text"], row["label"]) for row in rows][:2] == [('one,\n"two"', 0), ("three", 1)]
    path = write(tmp_path, "a.tsv", 'text\tlabel\n"so it began\tx\nno end" here\ty\n"so\tx\n"on"\ty\n')
    assert [row["text"] for row in loaders.load(guessing.task_of(path), "train")] == [
        '"so it began',
        'no end" here',
        '"so',
        '"on"',
    ]
    frame(text=["a b", "c d", "e f", "g h"], label=[1.0, 2.0, 1.0, 2.0]).to_excel(tmp_path / "n.xlsx", index=False)
    assert guessing.task_of(str(tmp_path / "n.xlsx")).labels == ("1", "2")
    frame(text=["a b", "c d", "e f", "g h"], label=[True, False] * 2).to_parquet(tmp_path / "n.parquet")
    assert guessing.task_of(str(tmp_path / "n.parquet")).words == ("false", "true")


@pytest.mark.parametrize(
    ("header", "options", "texts", "label"),
    [
        ("text,label", {}, ["text"], "label"),
        ("id,Text,LABEL,score", {}, ["Text"], "LABEL"),
        ("review,stars", {}, ["review"], "stars"),
        ("what was said,kind of it", {}, ["what was said"], "kind of it"),
        ("kind of it,what was said", {}, ["what was said"], "kind of it"),
        ("subject,body,queue", {"text_columns": "subject, Body"}, ["subject", "body"], "queue"),
        ("a,b,c", {"text_columns": "b", "label_column": "c"}, ["b"], "c"),
        ("words,id,label", {"text_columns": "words,id"}, ["words", "id"], "label"),
    ],
)
def test_columns_are_guessed_or_named(tmp_path, header, options, texts, label):
    names = header.split(",")
    kinds = {name: [f"{name} says number {i}" for i in range(12)] for name in names} | {label: ["x", "y", "z"] * 4}
    path = tmp_path / "rows.csv"
    frame(**{name: kinds[name] for name in names}).to_csv(path, index=False)
    task = guessing.task_of(str(path), **options)
    assert [task.columns[field] for field in task.fields] == texts and task.columns["label"] == label
    assert set(task.fields).isdisjoint(guessing.RESERVED) and all(field.isidentifier() for field in task.fields)
    row = loaders.load(task, "train")[0]
    assert prompts.row_text(task, row).count("says number 0") == len(texts)


def test_a_label_with_decimals_makes_a_task_of_numbers_with_its_own_range(tmp_path):
    values = [-1.5 + i * 0.25 for i in range(40)]
    frame(text=[f"text {i}" for i in range(40)], label=values).to_csv(tmp_path / "n.csv", index=False)
    task = guessing.task_of(str(tmp_path / "n.csv"))
    assert task.number and task.metrics == ("pearson", "spearman") and task.labels == ()
    assert (task.words[0], task.words[1], task.words[-1]) == ("-1.6", "-1.4", "8.4") and len(task.words) == 51
    rows = loaders.load(task, "train")
    assert [row["label"] for row in rows] == values
    assert rewards.parse(task, "-1.25</Judgement>") == -1.25 and rewards.parse(task, "99") == 8.4
    assert rewards.parse(task, "-") is None and not rewards.is_hopeless(task, "-")
    assert rewards.reward(task, 8.4, -1.6) == -2.5 and rewards.reward(task, 3.0, 3.0) == 2.5
    train, held_out = splits.hold_out(task, rows)
    assert len(held_out) == 10 and max(r["label"] for r in held_out) > 7 and min(r["label"] for r in held_out) < 0


def test_decimal_commas_are_read_where_they_cannot_be_thousands(tmp_path):
    path = write(tmp_path, "n.csv", "text;label\n" + "".join(f"t{i};{i % 7},5\n" for i in range(20)))
    task = guessing.task_of(path)
    assert task.number and {row["label"] for row in loaders.load(task, "train")} == {i + 0.5 for i in range(7)}
    path = write(tmp_path, "m.csv", "text;label\n" + "".join(f"t{i};{i % 2 + 1},500\n" for i in range(20)))
    assert guessing.task_of(path).labels == ("1,500", "2,500")


# ------------------------------------------------------------------------------------------------- what is held out


def test_duplicates_of_a_text_lie_on_one_side_and_every_label_on_both(tmp_path):
    rows = [f'"{"  " * (i % 2)}Text {"ABC"[i % 3]}{i // 6}",{"xyz"[i % 3]}' for i in range(120)]
    path = write(tmp_path, "rows.csv", "text,label\n" + "\n".join(rows) + "\n")
    task = guessing.task_of(path)
    train, held_out = splits.train_and_held_out(task, None, 0, seed=0)
    texts = [{" ".join(row["text"].split()).casefold() for row in part} for part in (train, held_out)]
    assert not texts[0] & texts[1] and len(train) + len(held_out) == 120 and len(held_out) == 12
    assert {row["label"] for row in train} == {row["label"] for row in held_out} == {0, 1, 2}
    assert splits.train_and_held_out(task, None, 0, seed=5) == (train, held_out)
    write(tmp_path, "rows.csv", "text,label\n" + "\n".join(sorted(rows, key=lambda row: row[-1])) + "\n")
    _, again = splits.train_and_held_out(task, None, 0, seed=0)
    assert sorted(row["text"].strip() for row in again) == sorted(row["text"].strip() for row in held_out)


def test_a_file_that_is_named_gives_its_own_labels_and_rows_alone(tmp_path, monkeypatch):
    """Labels 0 and 1 stay 0 and 1 whatever the task's folder holds, and what is held out is of the file."""
    root, folder = tmp_path / "data", tmp_path / "data" / "MentalHealth"
    folder.mkdir(parents=True)
    for name in ("train.csv", "validation.csv"):
        write(folder, name, "statement,status\n" + "".join(f"old {i},{['Calm', 'Worry'][i % 2]}\n" for i in range(20)))
    path = write(tmp_path, "mine.csv", "statement,status\n" + "".join(f"mine {i},{i % 2}\n" for i in range(40)))
    monkeypatch.setattr(loaders.load, "__defaults__", (root, None, True))
    task = splits.labelled(tasks.get("MentalHealth"), path)
    assert task.labels == ("0", "1")
    train, held_out = splits.train_and_held_out(task, path, 0, seed=0)
    assert len(train) == 36 and len(held_out) == 4 and all(row["text"].startswith("mine") for row in held_out)
    assert splits.usual_split(task, path) == "all" and splits.usual_split(task, "") == "validation"
    assert splits.training(task, path, "validation") == train
    assert splits.majority_label(task, held_out, path)[1] == "these rows"


def test_no_hub_is_waited_for_to_count_the_most_frequent_label(tmp_path, monkeypatch):
    def ask(*given, **how):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("datasets.load_dataset", ask)
    (tmp_path / "SST").mkdir()
    write(tmp_path / "SST", "dev.tsv", "sentence\tlabel\nbad\t0\ngood\t1\nfine\t1\n")
    monkeypatch.setattr(loaders.load, "__defaults__", (tmp_path / "none", None, True))
    rows = loaders.load(tasks.get("SST"), "validation", data_path=tmp_path / "SST")
    assert splits.majority_label(tasks.get("SST"), rows, "") == (1, "these rows")


def test_a_hub_that_does_not_answer_is_tried_once_and_quickly(monkeypatch):
    import datasets
    import huggingface_hub

    tries = []

    def info(self, name, timeout):
        tries.append(timeout)
        raise ConnectionError("no route to the host")

    def load(*given, **how):
        raise ConnectionError("offline" if huggingface_hub.constants.HF_HUB_OFFLINE else "five retries")

    loaders._reach_hub.cache_clear()  # of other tests
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    # The first message says why, and no other try is made: what was downloaded before is looked for alone.
    for name, said in (("QNLI", "no route to the host"), ("QQP", "no route to the host"), ("RTE", "no route")):
        with pytest.raises(DataError, match=said):
            loaders.load(tasks.get(name), "validation", data_root="/no/such/folder")
    assert tries == [loaders.HUB_SECONDS]


# ------------------------------------------------------------------------------------------------------- bad input


def many(label):
    return "text,label\n" + "".join(f"text {i},{label(i)}\n" for i in range(10_000))


BAD = {
    "no label column": ("a.csv", "text,when,who\na,b,c\n", "no column is known to hold the labels; name it"),
    "two text columns": ("a.csv", "subject,body,label\na,b,c\n", "may hold the texts; name one or more"),
    "one label": ("a.csv", "text,label\na,x\nb,x\n", "the label (label) has only 'x'; a task needs two labels or more"),
    "a label with one row": ("a.csv", "text,label\na,x\nb,x\nc,y\n", "has only one row of 'y'"),
    "10,000 labels": ("a.csv", many(lambda i: f"l{i}"), "the label (label) has 10000 distinct values, at most 500"),
    "an empty text": ("a.csv", "text,label\na,x\n ,y\nb,x\nc,y\n", "a.csv, row 3: text is empty; fill in or take out"),
    "all texts empty": ("a.csv", "text,label\n,x\n,y\n,x\n,y\n", "the column 'text' is empty"),
    "an empty label": ("a.csv", "text,label\na,x\nb,\nc,x\n", "row 3: the label (label) is empty, as in 1 of 3 rows"),
    "dates as texts": ("a.csv", "created,label\n2024-01-02,x\n3.2.2024 10:11,y\n", "'created' holds dates ('2024"),
    "numbers as texts": ("a.csv", "amount,label\n1.5,x\n2,y\n", "the column 'amount' holds numbers"),
    "labels that differ in case": ("a.csv", "text,label\na,Bug\nb,bug\nc,Bug\n", "'Bug' and 'bug', which no answer"),
    "no rows": ("a.csv", "text,label\n", "has a header but no rows"),
    "an empty file": ("a.csv", "\n", "the file is empty"),
    "too many cells": ("a.csv", "text,label\na,x,y,z\n", "a separator, a line break or a quotation"),
    "an open quote": ("a.csv", 'text,label\n"a,x\nb,y\n', "a quotation mark is missing or too many"),
    "two columns of one name": ("a.csv", "text,label,text\na,x,b\n", "has two columns 'text'"),
    "no table": ("a.pdf", "%PDF-1.7", "is no table; a task's file ends in .csv, .tsv"),
    "no spreadsheet": ("a.xlsx", "PK nothing", "cannot be read as XLSX"),
    "no Parquet": ("a.parquet", "PAR1 nothing", "cannot be read as PARQUET"),
    "no JSON": ("a.jsonl", "{'text': 1}", "a.jsonl, line 1: not JSON"),
    "JSON in JSON": ("a.jsonl", '{"text": ["a"], "label": "x"}', "line 1: text ['a'] is not a text"),
    "always one number": ("a.csv", "text,label\na,1.5\nb,1.5\n", "is always 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_table_that_is_no_task_is_refused_in_one_sentence(tmp_path, what, capsys):
    name, content, said = BAD[what]
    path = write(tmp_path, name, content)
    with pytest.raises(SystemExit) as end:
        ppo.main(["--data_path", path, "--report_to", "none", "--output_dir", str(tmp_path / "run")])
    heard = capsys.readouterr().err
    assert end.value.code == 2 and heard.count("\n") == 1 and said in heard and name in heard, heard
    assert not (tmp_path / "run").exists()


def test_options_about_columns_need_a_table(tmp_path, capsys):
    path = write(tmp_path, "a.csv", tickets())
    for given, said in [
        (["--task", "SST", "--text_columns", "a"], "--text_columns a is about a table, and --task SST is none"),
        (["--data_path", path, "--label_column", "x"], "--label_column x is no column; there are 'id', 'mess"),
        (["--data_path", path, "--text_columns", "queue", "--label_column", "queue"], "is one of --text_columns"),
        (["--data_path", f"{path}x"], f"--data_path {path}x: no such file or folder; check the path"),
    ]:  # fmt: skip
        with pytest.raises(SystemExit) as end:
            ppo.main([*given, "--report_to", "none"])
        assert end.value.code == 2 and said in capsys.readouterr().err


YAML = """
files: tickets.csv
columns: {message: message, label: queue}
labels: [bug, bug report, billing]
"""
BAD_YAML = {
    "an unknown field": ("lables: [a]", "`lables` is no field of a task; did you mean `labels`?"),
    "a label of no row": ("descriptions: {Bug: x}", "`descriptions` has 'Bug', which is no label; did you mean 'bug'?"),
    "too few words": ("words: [a, b]", "`words` has 2 words for 3 labels (bug, bug report, billing)"),
    "words alike": ("words: [a, A, b]", "`words` has 'a' and 'A', which no answer tells apart"),
    "an unknown metric": ("metrics: [accuracy, bleu]", "`metrics` must be some of accuracy, macro_f1, weighted_f1"),
    "F1 of three labels": ("metrics: f1", "`metrics` must be some of accuracy"),
    "an unknown place": ("body: '{text}'", "`body` has {text}; what can stand in braces here is {message}, {words}"),
    "an open brace": ("body: '{message'", "`body` has a brace that is not closed"),
    "a row's text in the instruction": ("instruction: '{message}'", "`instruction` has {message}; what can stand"),
    "a body without the text": ("body: text", "`body` has no {message}, so the model would not see that column"),
    "range and labels": ("range: [0, 1]", "`labels` has no place beside `range`"),
    "a version": ("version: new", "`version` must be a whole number from 1 on, not 'new'"),
    "a name of the table": ("name: SST", "`name` SST is a task of the table"),
    "an unknown task": ("task: SSTT", "`task` SSTT: There is no task 'SSTT'. Did you mean 'SST'?"),
    "a nested question": ("question: [a]", "`question` must be a text, not ['a']"),
    "no YAML": ("body: [", "cannot be read as YAML"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_YAML)
def test_a_field_that_is_wrong_is_named(tmp_path, what, capsys):
    line, said = BAD_YAML[what]
    write(tmp_path, "tickets.csv", tickets())
    path = write(tmp_path, "mine.yaml", YAML + line + "\n")
    with pytest.raises(SystemExit) as end:
        ppo.main(["--task", path, "--report_to", "none", "--output_dir", str(tmp_path / "run")])
    heard = capsys.readouterr().err
    assert end.value.code == 2 and heard.count("\n") == 1 and said in heard and "mine.yaml" in heard, heard
    assert not (tmp_path / "run").exists()


def test_a_yaml_task_has_what_it_says_and_the_rest_from_its_file(tmp_path):
    write(tmp_path, "tickets.csv", tickets())
    more = "words: {bug: defect}\ndescriptions: {billing: 'invoices, {all} of them'}\n"
    more += 'instruction: "Sort. {descriptions} Possible answers: {answers}."\n'
    path = write(tmp_path, "mine.yaml", YAML + more)
    task = own.read_task(path)
    assert (task.name, task.labels) == ("mine", ("bug", "bug report", "billing"))
    assert task.words == ("defect", "bug report", "billing") and task.metrics == (
        "accuracy",
        "macro_f1",
        "weighted_f1",
        "matthews",
    )
    assert (
        task.wording.instruction.format(answers="A") == "Sort. billing: invoices, {all} of them. Possible answers: A."
    )
    assert task.wording.body == "Message: {message}" and task.wording.question == "Queue ({words}):"
    assert len(loaders.load(task, "train")) == 30
    guessed = own.read_task(write(tmp_path, "short.yaml", "files: tickets.csv\n"))
    assert guessed.labels == ("billing", "bug", "bug report") and guessed.columns["label"] == "queue"
    numbers = "files: t.csv\ncolumns: {t: a, label: b}\nrange: [0, 1]\nstep: 0.25\n"
    assert own.read_task(write(tmp_path, "n.yaml", numbers)).words == ("0.00", "0.25", "0.50", "0.75", "1.00")


def test_yes_and_no_stay_words_in_yaml(tmp_path):
    write(tmp_path, "a.csv", "text,label\na,yes\nb,no\n")
    task = own.read_task(
        write(tmp_path, "a.yaml", "files: a.csv\ncolumns: {text: text, label: label}\nlabels: [yes, no]\n")
    )
    assert task.labels == task.words == ("yes", "no")


def test_the_examples_are_tasks():
    folder = Path(own.__file__).parent / "examples"
    found = {path.stem: own.read_task(path) for path in folder.glob("*.yaml")}
    assert {name: len(task.labels) for name, task in found.items()} == {"spam": 2, "tickets": 7, "readability": 0}
    assert "returns: sending goods back." in found["tickets"].wording.instruction
    assert found["readability"].words[:2] == ("1.0", "1.5") and len(found["readability"].words) == 19
    for task in found.values():
        row = {**dict.fromkeys(task.fields, "some text"), "label": task.labels and 1 or 2.5}
        assert prompts.row_text(task, row).count("some text") == len(task.fields)


# ------------------------------------------------------------------------------------------------- from file to report


def test_from_a_table_to_a_report(model_folder, tmp_path, capsys):
    """Trained, evaluated by the printed command on the same rows, shown few-shot, compared: nothing but the file."""
    path, runs = write(tmp_path, "tickets.csv", as_csv(";")), tmp_path / "runs"
    given = ["--from_local", "True", "--train_model_name", str(model_folder), "--report_to", "none", "--eval_size", "0"]
    options = [*given, "--data_path", path]
    ppo.main([*options, "--max_steps", "1", "--batch_sentence_num", "3", "--output_dir", str(runs / "ppo")])
    said = capsys.readouterr().out
    assert "tickets.csv is the task tickets: 27 rows to train on, 3 to evaluate on" in said
    assert "Text: text. Label: label; 3 labels (with their rows): billing (10), bug (10), bug report (10)." in said
    command = re.search(r"scripts/inference.sh (.*)\n", said)[1]
    inference.main([*shlex.split(command), "--report_to", "none", "--output_dir", str(runs / "again")])
    trained, again = (json.loads((runs / name / "summary.json").read_text()) for name in ("ppo", "again"))
    assert again["metrics"]["after"].keys() >= {"accuracy", "macro_f1", "weighted_f1", "matthews", "score"}
    assert again["data_hash"] == json.loads((runs / "ppo" / "run.json").read_text())["held_out_hash"]
    best = trained["metrics"]["best"]
    assert all(abs(best[name] - value) < 1e-9 for name, value in again["metrics"]["after"].items() if name in best)
    fewshot.main([*options, "--num_shots", "3", "--output_dir", str(runs / "fewshot")])
    sft.main([*options, "--max_steps", "1", "--batch_sentence_num", "3", "--output_dir", str(runs / "sft")])
    head = ["--max_steps", "1", "--batch_sentence_num", "3", "--output_dir", str(runs / "head")]
    classify.main([*options, *head])
    capsys.readouterr()
    report.main(["--runs", str(runs), "--output_dir", str(tmp_path / "report")])
    assert "tickets" in (tmp_path / "report" / "report.md").read_text() and "is not as" not in capsys.readouterr().out
