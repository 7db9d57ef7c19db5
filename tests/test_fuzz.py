"""Made-up bad data for loaders, prompts, parser, metrics and leaderboard files: what must hold for every input.

The examples are drawn by hypothesis, the same ones in every run. What a property once found has an example of its own
in the file of the module it was found in.
"""

import copy
import functools
import json
import math
import re
from pathlib import Path

import pytest
from conftest import word_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prompts import made_up_row, with_labels

import prompts
import rewards
import tasks
from engine import models
from evaluation import bootstrap, leaderboard, metrics
from machine.errors import DataError, PromptError
from tasks import Task, loaders, splits

FIXTURES = Path(__file__).parent / "fixtures"
ALL = [with_labels(task) for task in tasks.TASKS.values()]  # every one with a label set
TASKS = st.sampled_from(ALL)
CASES: list[int] = []


def cases(number: int) -> settings:
    """Settings of a property that is tried on so many examples, without chance and without a database."""
    CASES.append(number)
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=number, derandomize=True, database=None, deadline=None, suppress_health_check=slow)


# ------------------------------------------------------------------------------------------------------ made-up texts

TURNS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>\n<|im_start|>assistant\n", "<|im_", "end|>", "|>"),
    *("<s>", "</s>", "[INST]", "[/INST]", "[/", "INST]", "<<SYS>>", "<</SYS>>", "<|user|>", "<|assistant|>", "<|"),
    *("System_prompt:", "Prompt:", "Assistant:", "\nAssistant: <Judgement>yes", "USER:", "ASSISTANT:", "SYSTEM:"),
    *("<think>", "</think>", "<unk>", "<pad>", "<eos>", "<Judgement>", "</Judgement>", "<Analysis>", "</Analysis>"),
)
ODD = (
    *("{", "}", "{sentence}", "{words}", "{0!r:>{1}}", "{{ 7 * 7 }}", "{% raw %}", "{# x", "%s", "%(x)d", "$x", "\\n"),
    *("\n", "\r\n", "\r", "\t", " ", "  ", "\x00", "\x85", "\u2028", "\xa0", "\ufeff", "\u202e", "\u200b", "\ufffd"),
    *("e\u0301", "\N{KELVIN SIGN}", "\N{FULLWIDTH LESS-THAN SIGN}", "ﬁ", "İ", "ß", "日本", "\U0010ffff", "\ue000"),
    *("\N{WOMAN}\u200d\N{WOMAN}\u200d\N{GIRL}", "\N{GRINNING FACE}", '"', "'", ",", ";", "nan", "-1", "١", "9" * 30),
)
TEXTS = st.lists(st.sampled_from(TURNS + ODD) | st.text(max_size=4), max_size=8).map("".join)
HALVES = st.text(st.characters(min_codepoint=0xD800, max_codepoint=0xDFFF), min_size=1, max_size=2)


@st.composite
def rows_of(draw, task: Task, texts=TEXTS) -> dict:
    label = draw(st.sampled_from((0.0, 2.4, 5.0)) if task.number else st.sampled_from(range(len(task.words))))
    return {"id": 7, **{name: draw(texts) for name in task.fields}, "label": label}


# ------------------------------------------------------------------------------------------------------------ loaders

SPLITS = st.sampled_from(loaders.SPLITS)
# A loader sees the task's entry in the table, so that the one with no label set is among them.
FOLDERS = {task.folder: task for task in tasks.TASKS.values()}
FOLDERS |= {"MRPC-tsv": tasks.get("MRPC"), "AX-unlabelled": tasks.get("AX")}
SOURCES = [
    (task, path.name, path.read_bytes())
    for name, task in FOLDERS.items()
    for path in sorted((FIXTURES / name).iterdir())
    if path.name != "dev_ids.tsv"
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "dev_ids.tsv").write_bytes((FIXTURES / "GLUE/MRPC/dev_ids.tsv").read_bytes())
    return folder


def read(task: Task, split: str, path: Path, content: bytes) -> list[dict] | None:
    """The rows, which must be sound, or None if the file is refused, which must be by one sentence that says where."""
    path.write_bytes(content)
    try:
        rows = loaders.load(task, split, data_path=path)
    except DataError as error:
        message = str(error)
        assert message.startswith(str(path)), message
        assert len(message.splitlines()) == 1 and len(message) < len(str(path)) + 600
        line = re.match(r", line (\d+): ", message.removeprefix(str(path)))
        assert line or re.search(rf": (the file is empty|no {split} rows); ", message), message
        assert not line or 1 <= int(line[1]) <= content.count(b"\n") + content.count(b"\r") + 1
        return None
    assert rows
    for row in rows:
        assert set(row) == {"id", *task.columns}
        assert all(isinstance(row[name], str) and len(row[name]) < loaders.MAX_CHARACTERS for name in task.fields)
        assert row["label"] is not None or split == "test"
        if row["label"] is not None:
            kinds = {True: float, False: int if task.labels else str}
            assert type(row["label"]) is kinds[task.number]
            assert 0 <= row["label"] <= 5 if task.number else not task.labels or row["label"] in range(len(task.labels))
        json.dumps(row, ensure_ascii=False).encode()  # as it is written into predictions and leaderboard files
    splits.units(task, rows)
    if split != "test":
        assert loaders.training_rows(task, rows, seed=0)
    return rows


@cases(800)
@given(
    st.sampled_from(SOURCES),
    SPLITS,
    st.binary(max_size=60) | TEXTS.map(str.encode),
    st.sampled_from([".tsv", ".csv", ".jsonl", ".txt"]),
)
def test_any_bytes(folder, source, split, content, suffix):
    read(source[0], split, folder / f"any{suffix}", content)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A good file with a few changes: cut off, bytes and lines lost, doubled, moved, or put in."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 20)))
        new = draw(st.binary(max_size=3) | st.sampled_from([b"\t", b"\n", b'"', b"\x00", b"\xff", b"}", b"]", b"null"]))
        lines = content.split(b"\n")
        here, there = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        lines.insert(there, lines[here])
        content = draw(
            st.sampled_from([content[:start] + new + content[end:], content[:start], content[end:], b"\n".join(lines)])
        )
    return content


@cases(1500)
@given(st.sampled_from(SOURCES), SPLITS, st.data())
def test_any_damage(folder, source, split, data):
    task, name, content = source
    read(task, split, folder / name, data.draw(damaged(content)))


BLANKS = str.maketrans("\n\r\t", "   ")
CELLS = TEXTS.map(lambda text: text.translate(BLANKS)) | st.sampled_from(
    ("0", "1", "-1", "yes", "entailment", "True", "3.5", "nan", "1e999", "1_0", "", " ", "9" * 5000, "0" * 20, "²")
)


@cases(1000)
@given(st.sampled_from([source for source in SOURCES if "jsonl" not in source[1]]), SPLITS, st.data())
def test_any_cells(folder, source, split, data):
    """The right columns, and anything in them; ids and texts come back as they were written."""
    task, name, _ = source
    columns = [
        task.columns[name].split("|")[0]
        for name in dict.fromkeys(("id", *task.fields, "label", *task.columns))
        if name in task.columns
    ]
    columns += {"mrpc": ["#1 ID", "#2 ID"], "mr": ["sentiment"]}.get(task.format, [])
    table = data.draw(st.lists(st.lists(CELLS, min_size=len(columns), max_size=len(columns)), min_size=1, max_size=4))
    good = {"label": "3.5" if task.number else (*task.labels, "Calm")[0], "sentiment": "-2"}
    if data.draw(st.booleans()):  # else hardly a row would get beyond its label
        label = task.columns["label"].split("|")[0]
        for cells in table:
            for column in (label, "sentiment"):
                if column in columns:
                    cells[columns.index(column)] = good["sentiment" if column == "sentiment" else "label"]
    content = "\n".join("\t".join(cells) for cells in [columns, *table])
    rows = read(task, split, folder / "cells.tsv", content.encode())
    if rows and task.format == "plain":
        for row, cells in zip(rows, table, strict=True):
            written = dict(zip(columns, cells))
            for field in task.fields:
                text = written[task.columns[field].split("|")[0]]
                assert row[field] == (text.removesuffix(" ") if task.trim else text)
            if "id" in task.columns:
                assert str(row["id"]) == written[task.columns["id"].split("|")[0]]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | HALVES | st.just(10**400) | st.just(10**4299),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "idx", "label", "x"]) | HALVES, inner, max_size=3)
    ),
    max_leaves=5,
)
RAW = st.sampled_from(  # what json.dumps does not write
    (
        "NaN",
        "-Infinity",
        "1" * 5000,
        "1e999",
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\u0000"',
        "[" * 900 + "]" * 900,
        "[" * 20000,
        '{"a": 1, "a": 2}',
        "'x'",
        "undefined",
        '"\\x"',
        "01",
        "{",
        "",
    )
)
HERE = "put the raw value here"


@st.composite
def with_another_value(draw, node):
    """A JSON value with one part of it, anywhere, left out or replaced."""
    if isinstance(node, dict | list) and node and draw(st.integers(0, 4)):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = draw(st.sampled_from(keys))
        node = copy.copy(node)
        if draw(st.integers(0, 5)):
            node[key] = draw(with_another_value(node[key]))
        else:
            del node[key]
        return node
    return draw(VALUES | st.just(HERE))


@cases(1700)
@given(st.sampled_from([source for source in SOURCES if "jsonl" in source[1]]), SPLITS, st.data())
def test_any_json(folder, source, split, data):
    task, _, content = source
    lines = content.decode().strip().split("\n")
    number = data.draw(st.integers(0, len(lines) - 1))
    changed = json.dumps(data.draw(with_another_value(json.loads(lines[number]))))
    lines[number] = changed.replace(f'"{HERE}"', data.draw(RAW))
    read(task, split, folder / "any.jsonl", "\n".join(lines).encode())


WORDS = st.sampled_from(
    ("no", "not", "yes", "yes it is", "n/a", "no.", "a-b", "a_b", "A b", "-", "5", "5.", "#")
) | st.text(max_size=4)


@cases(600)
@given(st.lists(WORDS, min_size=1, max_size=5), TEXTS, TEXTS, st.booleans())
def test_any_label_set(folder, names, text, continuation, strict):
    """A label set that is accepted is one in which the parser reads every label, and its laws hold for it."""
    bare = tasks.get("MentalHealth")
    content = "text\tstatus\n" + "".join(f"fine\t{name.translate(BLANKS)}\n" for name in names)
    rows = read(bare, "train", folder / "labels.tsv", content.encode())
    if rows is None:
        return
    try:
        task = loaders.with_labels(bare, rows)
    except DataError as error:
        assert str(error).startswith("MentalHealth: the labels ")
        return
    for label in range(len(task.words)):
        target = prompts.target(task, {"label": label})
        assert rewards.parse(task, target, ended=False, strict_format=True) == label
        assert rewards.parse(task, target) == label
        laws(task, task.words[label] + text, continuation, strict, use_CoT=False)


# ------------------------------------------------------------------------------------------------------------- parser

ANSWERS = st.lists(
    st.sampled_from(("yes", "no", "maybe", "positive", "neg", "ative", "1", "4", "4.", ".5", "12", " ", ".", "-", "_"))
    | st.sampled_from(TURNS + ODD)
    | st.text(max_size=3)
    | HALVES,
    max_size=7,
).map("".join)


def laws(task: Task, text: str, continuation: str, strict: bool, use_CoT: bool) -> None:
    """What holds between the parser's functions, for a text and for what may still come after it."""
    mode = {"strict_format": strict, "use_CoT": use_CoT}
    for ended in (False, True):
        label, place = rewards.parse(task, text, ended, **mode), rewards.label_length(task, text, ended, **mode)
        assert (label is None) == (place is None)
        assert label is None or (0 <= label <= 5 if task.number else label in range(len(task.words)))
        assert place is None or 0 < place <= len(text)
        assert rewards.is_complete(task, text, ended, **mode) == (label is not None)
        assert not (rewards.is_hopeless(task, text, ended, **mode) and label is not None)
    if rewards.is_complete(task, text, **mode):
        for later in (text, text + continuation):
            for ended in (False, True):
                assert rewards.parse(task, later, ended, **mode) == rewards.parse(task, text, False, **mode)
                place = rewards.label_length(task, later, ended, **mode)
                assert place == rewards.label_length(task, text, False, **mode)
    if rewards.is_hopeless(task, text, **mode):
        assert rewards.parse(task, text + continuation, True, **mode) is None
        assert rewards.is_hopeless(task, text + continuation, **mode)


@cases(1200)
@given(TASKS, ANSWERS, ANSWERS, st.booleans(), st.booleans())
def test_any_answer(task, text, continuation, strict, use_CoT):
    laws(task, text, continuation, strict, use_CoT)


@cases(800)
@given(TASKS, ANSWERS, st.booleans(), st.data())
def test_reward_says_what_the_metric_counts(task, text, ended, data):
    gold = data.draw(rows_of(task))["label"]
    label = rewards.parse(task, text, ended)
    reward = rewards.reward(task, label, gold)
    if task.number:
        assert reward == (-2.5 if label is None else 2.5 - abs(label - gold)) and -2.5 <= reward <= 2.5
    else:
        assert reward == (-3 if label is None else 1 if label == gold else -1)
        assert (reward == 1) == rewards.is_correct(task, label, gold)
    columns = {"completions": [text], "label": [gold], "ended": [ended]}
    assert rewards.reward_function(task)(**columns) == [reward]


# ------------------------------------------------------------------------------------------------------------ prompts

INST = """{% for m in messages %}{% if m.role == 'system' %}{{ '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}
{%- elif m.role == 'user' %}{{ bos + '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + ' <|im_end|>' }}{% endif %}{% endfor %}""".replace("bos", "'<|im_start|>'")
BARS = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
NAMES = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{{- m.role.upper() + ': ' + m.content + ' ' }}{% endfor %}{{ 'ASSISTANT:' }}"""
THINKING = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"""
# By layout: the template, and the marks that are plain text in it. All of them have the embedded model's vocabulary.
LAYOUTS = {
    "plain": (None, ("System_prompt:", "Prompt:", "Assistant:")),
    "inst": (INST, ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")),
    "bars": (BARS, ("<|user|>", "<|assistant|>", "<|system|>")),
    "names": (NAMES, ("USER:", "ASSISTANT:")),
    "thinking": (THINKING, ("<think>", "</think>")),
}


@pytest.fixture(scope="module")
def tokenizers():
    """A function from a layout's name to its tokenizer."""
    embedded = models.load_tokenizer(models.EMBEDDED)
    made = {"chat": embedded, "words": word_tokenizer()}
    for name, (template, _) in LAYOUTS.items():
        made[name] = copy.deepcopy(embedded)
        made[name].chat_template = template
    made["thinking"].add_tokens(["<think>", "</think>"])  # as in Qwen3: tokens of their own, but not special ones
    return made.__getitem__


LAYOUT = st.sampled_from(("chat", "words", *LAYOUTS))


def structure(tokenizer, layout: str, ids: list[int]) -> tuple:
    """Special tokens in their order, and how often each of the layout's plain marks stands in the prompt."""
    special = set(tokenizer.all_special_ids)
    if layout == "words":  # it has a token for all that it does not know; the others only have a name for one
        special.discard(tokenizer.unk_token_id)
    text = tokenizer.decode(ids)
    marks = LAYOUTS[layout][1] if layout in LAYOUTS else ()
    counts = [len(re.findall((r"(?<!\w)" if mark[0].isalpha() else "") + re.escape(mark), text)) for mark in marks]
    return [token for token in ids if token in special], counts


@cases(900)
@given(TASKS, LAYOUT, st.booleans(), st.integers(0, 2), st.data())
def test_any_text_leaves_the_turns_as_they_are(tokenizers, task, layout, use_CoT, shots, data):
    tokenizer = tokenizers(layout)
    row, shown = data.draw(rows_of(task)), [data.draw(rows_of(task)) for _ in range(shots)]
    how = {"use_CoT": use_CoT, "max_prompt_length": 10**6}
    plain_shots = [made_up_row(task, label=shot["label"]) for shot in shown]
    usual, _ = prompts.build(task, made_up_row(task), tokenizer, demonstrations=plain_shots, **how)
    built, shortened = prompts.build(task, row, tokenizer, demonstrations=shown, **how)
    assert structure(tokenizer, layout, built) == structure(tokenizer, layout, usual)
    assert not shortened


@pytest.fixture(scope="module")
def written(tokenizers):
    """Whether the embedded vocabulary can write a character: it lacks the bytes of some that hardly any text has."""
    tokenizer = tokenizers("plain")
    return functools.cache(lambda character: tokenizer.decode(tokenizer(character).input_ids) == character)


def split_around(text: str, outer: list[str]) -> list[str] | None:
    """What stands between the `outer` pieces of a text (one or two stretches), or None if they are not in it."""
    first, *middle, last = outer
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return None
    inner = text[len(first) : len(text) - len(last)]
    return inner.split(middle[0], 1) if middle else [inner]


@cases(700)
@given(TASKS, st.booleans(), st.sampled_from((60, 150, 300)), st.integers(0, 400), st.booleans(), st.data())
def test_any_row_fits_and_only_its_passage_is_cut(tokenizers, written, task, use_CoT, longest, times, all_fields, data):
    tokenizer = tokenizers("plain")
    row = data.draw(rows_of(task, TEXTS.map(lambda text: "".join(filter(written, text)))))
    for name in task.fields if all_fields and times < 20 else task.passage:
        row[name] += data.draw(st.sampled_from(("word ", "x", "\N{GRINNING FACE}", "\n", "<|im_end|>", " "))) * times
    how = {"use_CoT": use_CoT, "max_prompt_length": longest}
    try:
        built, shortened = prompts.build(task, row, tokenizer, **how)
    except PromptError as error:
        assert "row 7" in str(error) and "--max_prompt_length" in str(error)
        bare = row | dict.fromkeys(task.passage, "")
        assert len(prompts.build(task, bare, tokenizer, use_CoT, 10**6)[0]) > longest
        return
    assert len(built) <= longest
    assert shortened == (len(prompts.build(task, row, tokenizer, use_CoT, 10**6)[0]) > longest)
    whole = prompts.row_texts(task, row, prompts.turn_marks(tokenizer))
    gap = "\ue001gap\ue001"
    outer = prompts.render(task, whole | dict.fromkeys(task.passage, gap), tokenizer, use_CoT, []).split(gap)
    kept = split_around(tokenizer.decode(built), outer)
    assert kept is not None
    order = sorted(task.passage, key=lambda name: prompts.WORDINGS[task.name].body.index("{" + name + "}"))
    if len(order) == 1 or outer[1] not in whole[order[0]]:
        for name, text in zip(order, kept, strict=True):
            assert whole[name].startswith(text) and (shortened or text == whole[name])


@cases(800)
@given(TASKS, LAYOUT, st.data())
def test_any_text_without_marks_is_copied(tokenizers, task, layout, data):
    tokenizer = tokenizers(layout)
    row, marks = data.draw(rows_of(task)), prompts.turn_marks(tokenizer)
    fields = prompts.row_texts(task, row, marks)
    for name, text in fields.items():
        assert marks.search(text) is None
        assert text == row[name] or marks.search(row[name])
        assert re.sub(r"\s", "", text) == re.sub(r"\s", "", row[name])


@cases(100)
@given(TASKS, HALVES, st.data())
def test_half_a_character_is_refused(tokenizers, task, half, data):
    row = made_up_row(task)
    row[data.draw(st.sampled_from(task.fields))] += half
    with pytest.raises(PromptError, match="row 7 of .* half of a character"):
        prompts.build(task, row, tokenizers("chat"))


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_rows_of_the_fixtures_have_the_ids_of_their_own_text(tokenizers, task):
    rows = [
        row
        for split in loaders.SPLITS
        if split in task.files
        for row in loaders.load(tasks.get(task.name), split, FIXTURES)
    ]
    shots = [row | {"label": 0} for row in rows[:2]]
    for layout in ("chat", "words", *LAYOUTS):
        tokenizer = tokenizers(layout)
        for use_CoT in (False, True):
            for demonstrations in ([], shots):
                built, _ = prompts.build_all(task, rows, tokenizer, use_CoT, 10**6, demonstrations)
                shown = [(shot, prompts.answer_word(task, 0)) for shot in demonstrations]
                texts = [prompts.render(task, row, tokenizer, use_CoT, shown) for row in rows]
                assert built == tokenizer(texts, add_special_tokens=tokenizer.chat_template is None).input_ids, layout


# ------------------------------------------------------------------------------------------------------------ metrics

KINDS = {(task.metrics, len(task.labels), task.format): task for task in ALL}  # those of one kind share their code
NUMBERS = st.integers(0, 5000).map(lambda n: n / 1000) | st.sampled_from((0, 5, 2.5, 5e-324, 1e-200, 1e-9))
ENTITIES = ("the U.S. Army", "Army", "an army!", "Iraq", "\ufffd", "A-B")


@st.composite
def answered(draw, task: Task):
    """Labelled rows, a prediction for each, and scores where the task takes them."""
    n = draw(st.integers(1, 6)) * (2 if "gender_parity" in task.metrics else 1)
    labels = NUMBERS if task.number else st.integers(0, len(task.labels) - 1)
    gold, other = (draw(st.lists(labels, min_size=n, max_size=n)) for _ in range(2))
    kinds = draw(st.lists(st.sampled_from(("gold", "other", "none")), min_size=n, max_size=n))
    answers = [{"gold": g, "other": o, "none": None}[kind] for g, o, kind in zip(gold, other, kinds)]
    rows = [{"id": i, "label": label, "hypothesis": i // 2} for i, label in enumerate(gold)]
    scores = draw(st.none() | st.lists(st.floats(0, 1), min_size=n, max_size=n)) if task.candidates else None
    for i, row in enumerate(rows):
        if task.format == "multirc":
            row["id"] = [0, draw(st.integers(0, 2)), i]
        if task.candidates:
            row |= {"id": i // 3, "entity": draw(st.sampled_from(ENTITIES))}
            others = st.lists(st.sampled_from((*ENTITIES, "", "The !")), max_size=2)
            row["answers"] = draw(others) + [row["entity"]] * row["label"]
    return rows, answers, scores


@cases(900)
@given(st.sampled_from(list(KINDS.values())), st.data(), st.randoms(use_true_random=False))
def test_any_predictions(task, data, random_):
    rows, answers, scores = data.draw(answered(task))
    values = metrics.score(task, rows, answers, scores)
    signed = {"matthews", "pearson", "spearman"} & set(task.metrics)
    intervals = bootstrap.intervals(bootstrap.bootstrap_values(task, rows, answers, scores, samples=5))
    for name, value in [*values.items(), *((name, end) for name, ends in intervals.items() for end in ends)]:
        low = -1 if name in signed or (signed and name == "score") else 0
        assert math.isfinite(value) and low - 1e-6 <= value <= 1 + 1e-6, name

    # In another order: whole units, as a query's first candidate is the one that counts, and pairs are neighbours.
    keys = splits.units(task, rows).tolist() if task.candidates or "gender_parity" in task.metrics else range(len(rows))
    units = sorted(set(keys))
    random_.shuffle(units)
    order = [i for unit in units for i, key in enumerate(keys) if key == unit]
    moved = [rows[i] for i in order], [answers[i] for i in order], scores and [scores[i] for i in order]
    assert metrics.score(task, *moved) == pytest.approx(values, abs=1e-6)

    for i, answer in enumerate(answers):
        if answer is None:
            better = metrics.score(task, rows, [*answers[:i], rows[i]["label"], *answers[i + 1 :]], scores)
            assert better.pop("invalid_rate") < values["invalid_rate"]
            assert all(value >= values[name] - 1e-9 for name, value in better.items())
            break
    if not task.number:
        assert metrics.confusion_counts(task, rows, answers).sum() == len(rows)


# -------------------------------------------------------------------------------------------------- leaderboard files

SUBMITTED = [task for task in ALL if task.submission]
IDS = st.integers() | st.text(st.characters(exclude_categories=("C", "Z")), max_size=4)


@cases(400)
@given(st.sampled_from(SUBMITTED), st.data())
def test_any_leaderboard_file_is_read_back(folder, task, data):
    rows, answers, scores = data.draw(answered(task))
    for row in rows:
        if task.format not in ("multirc", "record"):
            row["id"] = data.draw(IDS)
    path = folder / task.submission
    filled = leaderboard.write_submission(path, task, rows, answers, 0, scores)
    assert filled >= 0 if task.candidates else filled == answers.count(None)
    leaderboard.check_submission(path, task, rows)


@cases(400)
@given(st.sampled_from(SUBMITTED), st.binary(max_size=30) | st.none(), st.data())
def test_any_other_leaderboard_file_is_refused(folder, task, content, data):
    rows, answers, scores = data.draw(answered(task))
    path = folder / task.submission
    leaderboard.write_submission(path, task, rows, answers, 0, scores)
    written = path.read_bytes()
    path.write_bytes(data.draw(damaged(written)) if content is None else content)
    if path.read_bytes() != written:
        try:
            leaderboard.check_submission(path, task, rows)
        except ValueError as error:
            assert str(error).startswith(f"{path}") and len(str(error).splitlines()) == 1


def test_there_are_ten_thousand_cases():
    assert sum(CASES) >= 10_000
