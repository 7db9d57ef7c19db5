"""Leaderboard files: every byte of each format, reading them back, and the suites' zips."""

import json
import zipfile

import pytest

import tasks
from evaluation.leaderboard import check_submission, write_submission, write_suite_zip

PLAIN = [task for task in tasks.TASKS.values() if task.submission and task.format not in ("multirc", "record")]


def rows_of(*ids):
    return [{"id": i, "label": None} for i in ids]


def written(path, task, rows, predictions, majority=0, scores=None):
    file = path / task.submission
    filled = write_submission(file, task, rows, predictions, majority, scores)
    check_submission(file, task, rows)
    return file.read_bytes().decode(), filled


@pytest.mark.parametrize(
    ("name", "predictions", "expected"),
    [
        ("CoLA", [1, 0], "index\tprediction\n0\t1\n7\t0\n"),
        ("STS-B", [3.14159, 5.0], "index\tprediction\n0\t3.142\n7\t5.000\n"),
        ("STS-B", [-1.0, 9.0], "index\tprediction\n0\t0.000\n7\t5.000\n"),
        ("MNLI-m", [1, 2], "index\tprediction\n0\tneutral\n7\tcontradiction\n"),
        ("QNLI", [0, 1], "index\tprediction\n0\tentailment\n7\tnot_entailment\n"),
        ("WNLI", [0, 1], "index\tprediction\n0\t0\n7\t1\n"),
        ("AX", [0, 2], "index\tprediction\n0\tentailment\n7\tcontradiction\n"),
        ("BoolQ", [0, 1], '{"idx": 0, "label": "false"}\n{"idx": 7, "label": "true"}\n'),
        ("CB", [1, 2], '{"idx": 0, "label": "contradiction"}\n{"idx": 7, "label": "neutral"}\n'),
        ("COPA", [0, 1], '{"idx": 0, "label": 0}\n{"idx": 7, "label": 1}\n'),
        ("SuperGLUE/RTE", [0, 1], '{"idx": 0, "label": "entailment"}\n{"idx": 7, "label": "not_entailment"}\n'),
        ("WiC", [1, 0], '{"idx": 0, "label": "true"}\n{"idx": 7, "label": "false"}\n'),
        ("WSC", [1, 0], '{"idx": 0, "label": "True"}\n{"idx": 7, "label": "False"}\n'),
    ],
)
def test_formats(tmp_path, name, predictions, expected):
    assert written(tmp_path, tasks.get(name), rows_of(0, 7), predictions) == (expected, 0)


@pytest.mark.parametrize(
    ("name", "file"),
    [("SST", "SST-2.tsv"), ("MNLI-mm", "MNLI-mm.tsv"), ("SuperGLUE/RTE", "RTE.jsonl"), ("AX-g", "AX-g.jsonl")],
)
def test_file_names(name, file):
    assert tasks.get(name).submission == file


def test_ids_are_copied_as_they_are(tmp_path):
    text, _ = written(tmp_path, tasks.get("AX-b"), rows_of("12", "3"), [0, 1])
    assert text == '{"idx": "12", "label": "entailment"}\n{"idx": "3", "label": "not_entailment"}\n'


def test_multirc_is_nested_and_not_renumbered(tmp_path):
    rows = rows_of([5, 9, 20], [5, 9, 21], [5, 10, 22], [6, 11, 23])
    text, _ = written(tmp_path, tasks.get("MultiRC"), rows, [1, 0, 0, 1])
    first, second = (json.loads(line) for line in text.splitlines())
    questions = [
        {"idx": 9, "answers": [{"idx": 20, "label": 1}, {"idx": 21, "label": 0}]},
        {"idx": 10, "answers": [{"idx": 22, "label": 0}]},
    ]
    assert first == {"idx": 5, "passage": {"questions": questions}}
    assert second == {"idx": 6, "passage": {"questions": [{"idx": 11, "answers": [{"idx": 23, "label": 1}]}]}}


def test_record_writes_one_entity_per_query(tmp_path):
    entities = [(4, 'Zoë "Z" O\'Hara'), (4, "Rome"), (2, "Oslo"), (2, "Rome")]
    rows = [{"id": q, "entity": e, "answers": [], "label": None} for q, e in entities]
    task = tasks.get("ReCoRD")
    text, filled = written(tmp_path, task, rows, [0, 1, 0, None])
    assert text == '{"idx": 4, "label": "Rome"}\n{"idx": 2, "label": "Oslo"}\n'
    assert filled == 1  # the first candidate stands in where none was answered yes
    text, filled = written(tmp_path, task, rows, [0, 0, 0, 0], scores=[0.4, 0.3, 0.1, 0.2])
    assert [json.loads(line)["label"] for line in text.splitlines()] == ['Zoë "Z" O\'Hara', "Rome"]
    assert filled == 0


@pytest.mark.parametrize("task", PLAIN, ids=lambda task: task.name)
def test_no_answer_is_written_as_the_majority_label_and_counted(tmp_path, task):
    majority = 2.5 if task.number else 1
    text, filled = written(tmp_path, task, rows_of(0, 1, 2), [None, 0, None], majority)
    assert filled == 2
    assert text == written(tmp_path, task, rows_of(0, 1, 2), [majority, 0, majority])[0]


def test_errors_of_writing_leave_the_old_file(tmp_path):
    task = tasks.get("CoLA")
    file = tmp_path / task.submission
    write_submission(file, task, rows_of(0), [1], 0)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="1 predictions for 2 rows"):
        write_submission(file, task, rows_of(0, 1), [1], 0)
    with pytest.raises(ValueError, match="prediction 2"):
        write_submission(file, task, rows_of(0), [2], 0)
    with pytest.raises(ValueError, match="MR has no leaderboard file"):
        write_submission(file, tasks.get("MR"), rows_of(0), [1], 0)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [task.submission]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("machine.files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_submission(tmp_path / "CoLA.tsv", tasks.get("CoLA"), rows_of(0), [1], 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("CoLA", "", "line 1: the header"),
        ("CoLA", "0\t1\n1\t0\n", "line 1: the header"),
        ("CoLA", "index\tprediction\n0\t1\n1\t0", "cut off"),
        ("CoLA", "index\tprediction\n0\t1\n", "1 answers, but 2"),
        ("CoLA", "index\tprediction\n0\t1\n1\t0\n2\t0\n", "3 answers, but 2"),
        ("CoLA", "index\tprediction\n0\t1\n2\t0\n", "line 3: the id is '2', but 1"),
        ("CoLA", "index\tprediction\n0\t1\n1\tacceptable\n", "line 3: 'acceptable' is not"),
        ("CoLA", "index\tprediction\n0\t1\n1 0\n", "line 3: '1 0'"),
        ("STS-B", "index\tprediction\n0\t5.000\n1\t5.001\n", "line 3: '5.001'"),
        ("STS-B", "index\tprediction\n0\t4.5\n1\t5.000\n", "line 2: '4.5'"),
        ("STS-B", "index\tprediction\n0\tnan\n1\t5.000\n", "line 2: 'nan'"),
        ("BoolQ", '{"idx": 0, "label": "true"}\n{"idx": 1, "label": true}\n', "line 2: True"),
        ("COPA", '{"idx": 0, "label": 0}\n{"idx": 1, "label": true}\n', "line 2: True"),
        ("BoolQ", '{"idx": 0, "label": "true"}\n{"idx": "1", "label": "true"}\n', "line 2: the id is '1', but 1"),
        ("BoolQ", '{"idx": 0, "label": "true"}\n[1]\n', "line 2"),
        ("BoolQ", '{"idx": 0, "label": "true"}\n{"idx": 1\n', "line 2"),
        ("BoolQ", '{"idx": 0, "label": "true"}\n' + "[" * 100_000 + "\n", "line 2"),
    ],
)
def test_check_names_the_line(tmp_path, name, text, message):
    task = tasks.get(name)
    file = tmp_path / task.submission
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        check_submission(file, task, rows_of(0, 1))


def test_check_of_nested_and_entity_files(tmp_path):
    multirc, record = tasks.get("MultiRC"), tasks.get("ReCoRD")
    rows = rows_of([0, 0, 0], [0, 0, 1])
    write_submission(tmp_path / multirc.submission, multirc, rows, [0, 1], 0)
    with pytest.raises(ValueError, match=r"line 1: the id is \(0, 0, 1\), but \(0, 0, 2\)"):
        check_submission(tmp_path / multirc.submission, multirc, rows_of([0, 0, 0], [0, 0, 2]))
    rows = [{"id": 0, "entity": "Rome"}]
    (tmp_path / record.submission).write_text('{"idx": 0, "label": "Oslo"}\n')
    with pytest.raises(ValueError, match="line 1: 'Oslo'"):
        check_submission(tmp_path / record.submission, record, rows)
    with pytest.raises(ValueError, match="is named CoLA.tsv"):
        check_submission(tmp_path / record.submission, tasks.get("CoLA"), rows)


@pytest.mark.parametrize(("suite", "count"), [("GLUE", 11), ("SuperGLUE", 10)])
def test_suite_zip_is_flat_and_complete(tmp_path, suite, count):
    files = []
    for task in tasks.suite(suite):
        file = tmp_path / task.name / task.submission
        file.parent.mkdir(parents=True)
        file.write_text(task.name)
        files.append(file)
    target = tmp_path / "out" / f"{suite}.zip"
    write_suite_zip(target, suite, reversed(files))
    with zipfile.ZipFile(target) as archive:
        assert archive.namelist() == [task.submission for task in tasks.suite(suite)]
        assert len(archive.namelist()) == count
        for task in tasks.suite(suite):
            assert archive.read(task.submission).decode() == task.name
    first = target.read_bytes()
    write_suite_zip(target, suite, files)
    assert target.read_bytes() == first

    missing = [files[1].name, files[3].name]
    with pytest.raises(ValueError, match=", ".join(missing)):
        write_suite_zip(target, suite, files[:1] + files[2:3] + files[4:])
    files[2].unlink()
    with pytest.raises(ValueError, match=files[2].name):
        write_suite_zip(target, suite, files)
    files[2].write_text("")
    with pytest.raises(ValueError, match="unknown or given twice: MR.tsv"):
        write_suite_zip(target, suite, [*files, _touched(tmp_path / "MR.tsv")])
    with pytest.raises(ValueError, match="unknown or given twice"):
        write_suite_zip(target, suite, [*files, _touched(tmp_path / files[0].name)])
    assert target.read_bytes() == first
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def _touched(path):
    path.touch()
    return path
