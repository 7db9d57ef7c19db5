"""The formats in which a record is not simply a row: MRPC, WSC, MultiRC, ReCoRD, MR and tables of one's own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path

from machine.errors import DataError
from tasks.readers import Record, read_lines, short_repr
from tasks.table import Task
from tasks.tables import is_table

NEAR_NEUTRAL = 0.5  # MR: a mean rating closer to 0 than this is neither positive nor negative
PARAPHRASES = ("msr_paraphrase_train.txt", "train.txt")  # MRPC: hold training and validation rows
HELD_OUT = 1000  # MR: rows in each of validation and test


def _mrpc(task: Task, split: str, records: Iterable[Record], source: str) -> Iterator[Record]:
    """msr_paraphrase_train.txt holds train and validation; the id pairs in dev_ids.tsv beside it are validation."""
    path = Path(source)
    if split == "test" or path.name not in PARAPHRASES:
        yield from records
        return
    ids = path.with_name("dev_ids.tsv")
    if not os.path.isfile(ids):
        raise DataError(f"{ids}: not found; {path.name} is split by it, put it there or use train.tsv and dev.tsv.")
    pairs = {tuple(line.split("\t")) for line in read_lines(ids)}
    for number, record in records:
        if ((record["#1 ID"], record["#2 ID"]) in pairs) == (split == "validation"):
            yield number, record


def _wsc(task: Task, split: str, records: Iterable[Record], source: str) -> Iterator[Record]:
    """The spans lie in `target` in the file; the hub has them flat.

    The text is returned with its spans marked, the candidate as _Bob_ and the pronoun as *he*: in every fifth row the
    pronoun's word occurs more than once, and its place decides the label.
    """
    for number, record in records:
        flat = record | record.get("target", {})
        spans = []
        for name, mark in (("span1", "_"), ("span2", "*")):
            start, end = _find_span(flat["text"], flat[f"{name}_text"], int(flat[f"{name}_index"]))
            spans.append((start, end, mark))
        yield number, flat | {"text": _marked(flat["text"], spans)}


def _find_span(text: str, span: str, index: int) -> tuple[int, int]:
    """Where a span that should begin with the text's word number `index` begins and ends, in characters.

    Some spans of the original files begin a word further on, differ in case, or end in a full stop that the text lacks:
    the nearest occurrence is taken. A span that occurs nowhere ("Ida and Bo" for "Ida, or Bo") is that word alone.
    ValueError if the text has no such word.
    """
    words = list(re.finditer(r"\S+", text))
    if not 0 <= index < len(words):
        raise ValueError(f"the span {short_repr(span)} begins with word {index} of a text of {len(words)} words")
    pattern = r"\s+".join(map(re.escape, span.strip().removesuffix(".").split()))
    found = re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE) if pattern else ()
    begins = words[index].start()
    return min((match.span() for match in found), key=lambda at: abs(at[0] - begins), default=words[index].span())


def _marked(text: str, spans: list[tuple[int, int, str]]) -> str:
    """The text with a mark before and after each span (start, end, mark); one inside another is marked inside."""
    opening: dict[int, str] = {}
    closing: dict[int, str] = {}
    for start, end, mark in sorted(spans, key=lambda span: span[0] - span[1]):  # the longest first
        opening[start] = opening.get(start, "") + mark
        closing[end] = mark + closing.get(end, "")
    return "".join(closing.get(i, "") + opening.get(i, "") + text[i : i + 1] for i in range(len(text) + 1))


def _multirc(task: Task, split: str, records: Iterable[Record], source: str) -> Iterator[Record]:
    """A line per paragraph with its questions and their answers, to a record per answer; the hub has it flat."""
    for number, record in records:
        if "paragraph" in record:
            yield number, record | {"idx": [record["idx"][name] for name in ("paragraph", "question", "answer")]}
            continue
        for question in record["passage"]["questions"]:
            for answer in question["answers"]:
                flat = {"paragraph": record["passage"]["text"], "question": question["question"]}
                flat |= {"idx": [record["idx"], question["idx"], answer["idx"]], "answer": answer["text"]}
                yield number, flat | ({"label": answer["label"]} if "label" in answer else {})


def _record(task: Task, split: str, records: Iterable[Record], source: str) -> Iterator[Record]:
    """A line per passage with its entities and queries, to a record per query and candidate entity.

    Candidates are the distinct entity texts in order of appearance; one that is a gold answer's text is right.
    """
    for number, record in records:
        if "qas" in record:
            passage = record["passage"]["text"]
            spans = sorted((span["start"], span["end"]) for span in record["passage"]["entities"])
            entities = [passage[start : end + 1] for start, end in spans]  # `end` is inclusive
            queries = [
                (qa["query"], qa["idx"], [answer["text"] for answer in qa.get("answers", ())]) for qa in record["qas"]
            ]
        else:
            passage, entities = record["passage"], record["entities"]
            queries = [(record["query"], record["idx"]["query"], record["answers"])]
        for name, texts in (("entities", entities), *(("answers", answers) for _, _, answers in queries)):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"the {name} {short_repr(texts)} are not a list of texts")
        if not all(entity.strip() for entity in entities) or not entities:
            raise ValueError("the passage has no entities, or an empty one, so its queries have no candidates")
        for query, index, answers in queries:
            flat = {"idx": index, "passage": passage, "query": query, "answers": list(dict.fromkeys(answers))}
            for entity in dict.fromkeys(entities):
                yield number, flat | {"entity": entity} | ({"label": entity in answers} if answers else {})


def _mr(task: Task, split: str, records: Iterable[Record], source: str) -> Iterator[Record]:
    """Sentences with a mean sentiment in [-4, 4], to positive and negative ones in a fixed split.

    Near-neutral sentences are left out. The others are put in the order of the SHA-256 of their id; the first go to
    test, the next to validation (1000 each, or a fifth if the file is small), the rest to train. Sentences that are
    equal but for case and spaces stay together, under the id of the first of them.
    """
    groups: dict[str, list[Record]] = {}
    for number, record in records:
        sentiment = float(record["sentiment"])
        if not -4 <= sentiment <= 4:
            raise ValueError(f"sentiment {sentiment} is not in [-4, 4]")
        if abs(sentiment) >= NEAR_NEUTRAL:
            text = " ".join(record["text"].split()).casefold()
            groups.setdefault(text, []).append((number, record | {"id": record["id"], "label": int(sentiment > 0)}))
    size = min(HELD_OUT, sum(map(len, groups.values())) // 5)
    parts: dict[str, list[Record]] = {"test": [], "validation": [], "train": []}
    for group in sorted(groups.values(), key=lambda group: sha256(str(group[0][1]["id"]).encode()).digest()):
        part = next((name for name in ("test", "validation") if len(parts[name]) + len(group) <= size), "train")
        parts[part] += group
    yield from sorted(parts[split], key=lambda record: record[0])


def has_splits(task: Task, path: str | Path) -> bool:
    """Whether one file of the task's format holds both its training and its validation rows."""
    return (task.format == "mr" and not is_table(str(path))) or (
        task.format == "mrpc" and Path(path).name in PARAPHRASES
    )


def _table(task: Task, split: str, records: Iterable[Record], source: str) -> Iterator[Record]:
    """A text may be empty where a row has another one; a label has no space around it, and one that is empty is
    unknown."""
    texts = [task.columns[name] for name in task.fields]
    label = task.columns["label"]
    for number, record in records:
        record = record | {column: record[column] or "" for column in texts if column in record}
        if not any(record.get(column, "x").strip() for column in texts):
            raise ValueError(f"{' and '.join(texts)} {'is' if len(texts) == 1 else 'are'} empty; fill in or take out")
        if label in record:
            record[label] = (record[label] or "").strip() or None
        yield number, record


FORMATS: dict[str, Callable] = {
    "mrpc": _mrpc,
    "wsc": _wsc,
    "multirc": _multirc,
    "record": _record,
    "mr": _mr,
    "table": _table,
}
