"""The parser and the rewards: fixed cases, and properties that hold for every text."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks
from rewards import is_complete, is_correct, is_hopeless, label_length, parse, reward, reward_function

COLA, SST, STSB = tasks.get("CoLA"), tasks.get("SST"), tasks.get("STS-B")
# One word is the beginning of another, and one the end of another.
LONG = dataclasses.replace(
    tasks.get("MNLI-m"),
    labels=("no", "not", "not_entailment", "acceptable", "unacceptable", "n/a"),
    words=("no", "not", "not_entailment", "acceptable", "unacceptable", "n/a"),
)
PARSED = [*tasks.TASKS.values(), LONG]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("positive", 1),
        ("negative", 0),
        (" \n\tPositive.", 1),
        ("POSITIVE</Judgement>", 1),
        ("positive</Judgement> negative", 1),
        ("positive\nnegative", 1),
        ("positive, not negative", 1),
        ("positive sentiment, as it says", 1),
        ("positive: it is", 1),
        ("positive。", 1),
        ("positively", None),
        ("positive-ish", None),
        ("positive_negative", None),
        ("positive's", None),
        ("positive’s", None),
        ("positive2", None),
        ("it is positive", None),
        ("", None),
        (" ", None),
        ("</Judgement>positive", None),
        ("\ufffd", None),
        ("İpositive", None),
    ],
)
def test_word_at_the_start(text, label):
    assert parse(SST, text) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("no", 0),
        ("no.", 0),
        ("not", 1),
        ("not\nentailment", 1),
        ("not entail", 1),
        ("not_entailment", 2),
        ("Not Entailment", 2),
        ("not-entailment.", 2),
        ("not  entailment", 1),
        ("not entailmentish", 1),
        ("acceptable", 3),
        ("unacceptable", 4),
        ("n/a", 5),
        ("none", None),
        ("not_", None),
        ("un acceptable", None),
    ],
)
def test_longest_whole_word_wins(text, label):
    assert parse(LONG, text) == label


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3.8", 3.8),
        ("4", 4.0),
        ("4.", 4.0),
        ("4. Because", 4.0),
        ("4.25</Judgement>", 4.25),
        ("4.5.", 4.5),
        ("4.2567", 4.256),
        ("4.50000000", 4.5),
        ("9.9999", 5.0),
        ("4.250x", 4.25),
        (" 0\n", 0.0),
        ("17", 5.0),
        ("9" * 5000, 5.0),
        ("4/5", 4.0),
        ("4 out of 5", 4.0),
        ("4,5", 4.0),
        ("4-5", None),
        ("4th", None),
        ("4.5x", None),
        ("4e1", None),
        ("-1", None),
        (".5", None),
        ("٣", None),
        ("²", None),
        ("four", None),
        ("nan", None),
    ],
)
def test_numbers(text, number):
    assert parse(STSB, text) == number


@pytest.mark.parametrize(
    ("task", "text", "complete"),
    [
        (SST, "positive", False),
        (SST, "positive ", False),
        (SST, "positive it", False),
        (SST, "positive it is\n", True),
        (SST, "positive it is</Judgement>", True),
        (SST, "positive.", True),
        (SST, "positive<", True),
        (SST, "positive\n", True),
        (SST, "positive-", False),
        (SST, "positive\ufffd", False),
        (SST, "\n\n", False),
        (SST, "good.", False),
        (LONG, "not ", False),
        (LONG, "not entail", False),
        (LONG, "not entailment.", True),
        (LONG, "not so\n", True),
        (STSB, "4", False),
        (STSB, "4.", False),
        (STSB, "4. ", True),
        (STSB, "4.\n", True),
        (STSB, "4.x", True),
        (STSB, "4.5", False),
        (STSB, "4.5.", True),
        (STSB, "4.50", False),
        (STSB, "4.500", True),
        (STSB, "4.5000", True),
        (STSB, "4\n", True),
    ],
)
def test_complete_while_generating(task, text, complete):
    assert is_complete(task, text) is complete


def test_an_answer_that_was_cut_off_does_not_count():
    assert parse(SST, "positive", ended=False) is None
    assert parse(SST, "positive it is", ended=False) is None
    assert parse(SST, "positive.", ended=False) == 1


@pytest.mark.parametrize(
    ("task", "text", "hopeless"),
    [
        (SST, "", False),
        (SST, " \n", False),
        (SST, "pos", False),
        (SST, "Pos", False),
        (SST, "positive", False),
        (SST, "positive it is", False),
        (SST, "It", True),
        (SST, "positivel", True),
        (SST, "positive-", True),
        (SST, "</", True),
        (SST, "pos\ufffd", False),
        (LONG, "not_", False),
        (LONG, "not_x", True),
        (LONG, "n/", False),
        (STSB, "", False),
        (STSB, "4", False),
        (STSB, "4.", False),
        (STSB, "4.50x", True),
        (STSB, "4.500x", False),
        (STSB, "4.5x", True),
        (STSB, "4-", True),
        (STSB, "-", True),
        (STSB, "The", True),
    ],
)
def test_hopeless(task, text, hopeless):
    assert is_hopeless(task, text) is hopeless


def test_strict_format_takes_the_closing_tag_alone():
    for text in ("positive</Judgement>", " Positive \n</Judgement>", "positive</Judgement>."):
        assert parse(SST, text, strict_format=True) == 1
        assert is_complete(SST, text, strict_format=True)
    for text in ("positive", "positive.", "positive\n", "positive.</Judgement>", "positive it is</Judgement>"):
        assert parse(SST, text, strict_format=True) is None
    for text in ("positive", "positive\n", "positive</Judge"):
        assert not is_hopeless(SST, text, strict_format=True)
    for text in ("positive.", "positive it", "positive</p"):
        assert is_hopeless(SST, text, strict_format=True)
    assert parse(STSB, "4.5</Judgement>", strict_format=True) == 4.5
    assert parse(STSB, "4.</Judgement>", strict_format=True) is None
    assert parse(STSB, "4.256</Judgement>", strict_format=True) == 4.256
    assert is_hopeless(STSB, "4.2567", strict_format=True)


def test_chain_of_thought_reads_the_first_judgement_after_the_analysis():
    text = "<Judgement>negative</Judgement> no wait</Analysis>\n<Judgement>positive</Judgement><Judgement>negative"
    assert parse(SST, text, use_CoT=True) == 1
    assert text[: label_length(SST, text, use_CoT=True)].endswith("</Analysis>\n<Judgement>positive")
    assert parse(SST, "positive.", use_CoT=True) is None
    assert parse(SST, "It is good.</Analysis>positive", use_CoT=True) is None
    assert not is_hopeless(SST, "It is good.</Analysis><Judge", use_CoT=True)
    assert is_hopeless(SST, "It is good.</Analysis><Judgement>It", use_CoT=True)


def test_label_length_ends_with_the_word():
    assert label_length(SST, " \nPositive, yes") == len(" \nPositive")
    assert label_length(STSB, "4. x") == 1
    assert label_length(STSB, "4.25\n") == 4
    assert label_length(SST, "It") is None
    assert label_length(SST, "positive", ended=False) is None


@pytest.mark.parametrize("task", PARSED, ids=lambda task: task.name)
def test_every_word_is_understood(task):
    for label, word in enumerate(task.words):
        expected = float(word) if task.number else label
        for text in (word, f" {word.upper()}.\n", f"{word}</Judgement>", word.replace("_", " ") + "\n"):
            assert parse(task, text) == expected
            assert label_length(task, text) == len(text.rstrip(".\n").removesuffix("</Judgement>"))
        for length in range(len(word)):
            assert not is_hopeless(task, word[:length])


# --------------------------------------------------------------------------------------------------- properties

PIECES = (
    *("yes", "no", "not", "_entailment", "maybe", "positive", "neg", "ative", "acceptable", "un", "n/", "a", "YES"),
    *("4", "4.", ".5", "5.0", "125", "<Judgement>", "</Judgement>", "</", "Judgement>", "</Analysis>", "<Analysis>"),
    *(" ", "\n", "\r", "\u2028", "\xa0", ".", ",", "-", "_", "'", "’", "<", "İ", "ς", "Σ", "ſ", "\u0301", "\ufffd"),
)
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=7).map("".join)
TASKS = st.sampled_from(PARSED)
MODES = st.fixed_dictionaries({"strict_format": st.booleans(), "use_CoT": st.booleans()})
many = settings(derandomize=True, max_examples=1000, deadline=None)


@many
@given(TASKS, TEXTS, TEXTS, MODES)
def test_complete_and_hopeless_are_final(task, text, continuation, mode):
    later = text + continuation
    label = parse(task, text, ended=False, **mode)
    assert is_complete(task, text, **mode) == (label is not None)
    if label is not None:
        place = label_length(task, text, ended=False, **mode)
        assert not is_hopeless(task, text, **mode)
        assert is_complete(task, later, **mode)
        for ended in (False, True):
            assert parse(task, later, ended, **mode) == parse(task, text, ended, **mode) == label
            assert label_length(task, later, ended, **mode) == label_length(task, text, ended, **mode) == place
    if is_hopeless(task, text, **mode):
        assert is_hopeless(task, later, **mode)
        assert parse(task, later, True, **mode) is None
        assert parse(task, later, False, **mode) is None


@many
@given(TASKS.filter(lambda task: task.words), TEXTS.filter(lambda text: not text.endswith("\ufffd")), MODES)
def test_without_hope_means_no_continuation_helps(task, text, mode):
    if is_hopeless(task, text, **mode):
        return
    tag = "</Judgement>"
    endings = [tag[i:] for i in range(len(tag) + 1)] + ["0" + tag]
    # Whatever part of a word stands there, some word's rest completes it.
    words = [word[i:] for word in {*task.words[:6], *task.words[-1:]} for i in range(len(word) + 1)]
    opening = "<Judgement>" if "</Analysis>" in text else "</Analysis><Judgement>"
    candidates = endings + [word + tag for word in words]
    if mode["use_CoT"]:
        candidates += [opening + task.words[0] + tag]
    assert any(is_complete(task, text + candidate, **mode) for candidate in candidates)


@many
@given(TASKS, TEXTS, MODES)
def test_parse_gives_a_legal_label_and_strict_is_stricter(task, text, mode):
    for ended in (False, True):
        label = parse(task, text, ended, **mode)
        place = label_length(task, text, ended, **mode)
        assert (label is None) == (place is None)
        assert is_hopeless(task, text, True, **mode) == (parse(task, text, True, **mode) is None)
        if label is not None:
            assert 0.0 <= label <= 5.0 if task.number else label in range(len(task.words))
            assert 0 < place <= len(text)
            assert parse(task, text, True, use_CoT=mode["use_CoT"]) == label


@many
@given(st.text(), MODES, st.booleans())
def test_never_raises(text, mode, ended):
    for task in (COLA, LONG, STSB, tasks.get("MentalHealth")):
        for function in (parse, is_complete, is_hopeless, label_length):
            function(task, text, ended, **mode)


# ------------------------------------------------------------------------------------------------------ rewards


def test_published_rewards():
    assert [reward(SST, label, 1) for label in (1, 0, None)] == [1.0, -1.0, -3.0]
    assert reward(STSB, 3.5, 4.0) == 2.0
    assert reward(STSB, 0.0, 5.0) == -2.5
    assert reward(STSB, None, 4.0) == -2.5
    assert [reward(SST, label, 0, correct=2, wrong=0, invalid=-1) for label in (0, 1, None)] == [2, 0, -1]
    assert reward(STSB, 4.0, 4.0, number_correct=5.0) == 5.0


def test_correct_means_equal():
    assert is_correct(SST, 1, 1) and not is_correct(SST, 0, 1) and not is_correct(SST, None, 0)
    assert is_correct(STSB, 3.8, 3.8) and not is_correct(STSB, 3.7, 3.8)


def test_unlabelled_rows_have_no_reward():
    with pytest.raises(ValueError, match="SST.*gold label"):
        reward(SST, 1, None)


def test_reward_function_has_the_signature_of_trl():
    function = reward_function(SST)
    assert function.__name__ == "label_reward"
    rewards = function(prompts=["", "", ""], completions=["positive", "negative", "?"], label=[1, 1, 1], id=[1, 2, 3])
    assert rewards == [1.0, -1.0, -3.0]
    chat = [[{"role": "assistant", "content": text}] for text in ("positive", "<Judgement>positive</Judgement>")]
    assert function(completions=chat, label=[1, 1]) == [1.0, 1.0]
    assert function(completions=["positive", "positive"], label=[1, 1], ended=[True, False]) == [1.0, -3.0]
    assert reward_function(SST, strict_format=True)(completions=["positive"], label=[1]) == [-3.0]
    with_analysis = reward_function(SST, use_CoT=True)
    assert with_analysis(completions=["Good.</Analysis><Judgement>positive"], label=[1]) == [1.0]
    assert reward_function(STSB)(completions=["4.0", ""], label=[3.0, 3.0]) == [1.5, -2.5]
