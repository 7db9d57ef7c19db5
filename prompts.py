"""A task's row as a prompt: zero-shot, few-shot or chain of thought, with a chat template or plain.

A prompt is an instruction that is the same for every row (so the engine computes it once), the row's texts, and a short
question (computed for every row). The assistant's turn is begun as `<Judgement>` (with chain of thought: `<Analysis>`),
so the next token is the answer. A model whose answers never parse gets no training signal, so every wording here was
tried on real rows (the README has the share of valid answers). On small models it works best to show the possible
answers exactly as they are to be written, tags included, and to end on the name of what is asked for.

A row's text is only ever data. Whatever the chat template (or the plain layout) tells its turns apart by, special
tokens and plain marks such as `[INST]` or `Assistant:` alike, is broken up by a space where it occurs in a text.
Everything else is copied as it is, tags included, because answers are read from the generated tokens alone.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine import templates, tokens
from machine.errors import ModelError, PromptError
from rewards import ANALYSIS, ANALYSIS_END, JUDGEMENT, JUDGEMENT_END
from tasks import Task
from tasks.labels import number_text
from tasks.wording import Wording

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PROMPT_LENGTH = 512
TOKENIZED_AT_ONCE = 1000  # larger batches are faster, but what the tokenizer returns besides the ids takes memory


def between_tags(*words: str) -> str:
    """The words as the model is to write them."""
    return ", ".join(f"{JUDGEMENT}{word}{JUDGEMENT_END}" for word in words)


SENTIMENT = Wording(
    instruction="Classify the sentiment of a movie review. A review that criticizes the movie is negative, "
    "a review that praises it is positive. Possible answers: {answers}.",
    body="Review: {sentence}",
    question="Sentiment ({words}):",
)
# The order in which a prompt names the answers biases a small model. Entailment tasks number their classes differently,
# so their two wordings spell out one order.
ENTAILMENT = Wording(
    instruction="Read a text and decide whether a statement follows from it. If the text says or implies that the "
    "statement is true, the answer is yes, if it does not, the answer is no. "
    f"Possible answers: {between_tags('yes', 'no')}.",
    body="Text: {premise}\nStatement: {hypothesis}",
    question="Does the statement follow (yes or no):",
)
ENTAILMENT_OR_CONTRADICTION = Wording(
    instruction="Read a text and decide whether a statement is true. If the text says or implies that the statement is "
    "true, the answer is yes, if it says or implies that the statement is false, the answer is no, if the text leaves "
    f"it open, the answer is unclear. Possible answers: {between_tags('yes', 'no', 'unclear')}.",
    body="Text: {premise}\nStatement: {hypothesis}",
    question="Is the statement true (yes, no or unclear):",
)
WORDINGS: dict[str, Wording] = {
    "CoLA": Wording(
        instruction="Decide whether a sentence has a grammar mistake. If it has a mistake, the answer is yes, if it is "
        "correct, the answer is no. Possible answers: {answers}.",
        body="Sentence: {sentence}",
        question="Grammar mistake ({words}):",
    ),
    "SST": SENTIMENT,
    "MRPC": Wording(
        instruction="Decide whether two sentences have the same meaning. If they say different things, the answer is "
        "no, if they say the same in other words, the answer is yes. Possible answers: {answers}.",
        body="Sentence 1: {sentence1}\nSentence 2: {sentence2}",
        question="Same meaning ({words}):",
    ),
    "STS-B": Wording(
        instruction="Give two sentences a score for how similar their meanings are. If they mean the same, the score "
        "is 5.0, if only details differ, the score is 4.0, if they are on the same topic, the score is 2.0, if they "
        "have nothing in common, the score is 0.0. "
        f"Possible answers: {between_tags('5.0', '4.0', '3.0', '2.0', '1.0', '0.0')}.",
        body="Sentence 1: {sentence1}\nSentence 2: {sentence2}",
        question="Score (from 5.0 down to 0.0):",
    ),
    "QQP": Wording(
        instruction="Decide whether two questions have the same meaning. If they ask different things, the answer is "
        "no, if they ask the same in other words, the answer is yes. Possible answers: {answers}.",
        body="Question 1: {question1}\nQuestion 2: {question2}",
        question="Same meaning ({words}):",
    ),
    "MNLI-m": ENTAILMENT_OR_CONTRADICTION,
    "MNLI-mm": ENTAILMENT_OR_CONTRADICTION,
    "QNLI": Wording(
        instruction="Read a question and a sentence and decide whether the sentence answers the question. If the "
        "sentence contains the answer, the answer is yes, if it does not, the answer is no. "
        "Possible answers: {answers}.",
        body="Question: {question}\nSentence: {sentence}",
        question="Does the sentence answer the question ({words}):",
    ),
    "RTE": ENTAILMENT,
    "WNLI": ENTAILMENT,
    "AX": ENTAILMENT_OR_CONTRADICTION,
    "BoolQ": Wording(
        instruction="Read a passage and answer a question about it. Possible answers: {answers}.",
        body="Passage: {passage}\nQuestion: {question}?",
        question="Answer ({words}):",
    ),
    "CB": ENTAILMENT_OR_CONTRADICTION,
    "COPA": Wording(
        instruction="Read a sentence and choose the more likely of two options, 1 or 2. Possible answers: {answers}.",
        body="Sentence: {premise}\nOption 1: {choice1}\nOption 2: {choice2}",
        question="The more likely {question} ({words}):",
    ),
    "MultiRC": Wording(
        instruction="Read a passage, a question and a proposed answer, and decide whether the proposed answer is "
        "correct. If the passage does not say so, the answer is no, if it does, the answer is yes. "
        "Possible answers: {answers}.",
        body="Passage: {passage}\nQuestion: {question}\nProposed answer: {answer}",
        question="Is the proposed answer correct ({words}):",
    ),
    "ReCoRD": Wording(
        instruction="Read a passage and a sentence in which a name is replaced by @placeholder. Decide whether the "
        "candidate is that name. Possible answers: {answers}.",
        body="Passage: {passage}\nSentence: {query}\nCandidate: {entity}",
        question="Is @placeholder the candidate ({words}):",
    ),
    "SuperGLUE/RTE": ENTAILMENT,
    "WiC": Wording(
        instruction="Read two sentences that contain the same word. If the word means different things, the answer is "
        "no, if it means the same, the answer is yes. Possible answers: {answers}.",
        body="Word: {word}\nSentence 1: {sentence1}\nSentence 2: {sentence2}",
        question="Same ({words}):",
    ),
    "WSC": Wording(
        instruction="Read a text and decide what a pronoun in it refers to. Possible answers: {answers}.",
        body="Text: {text}\nPronoun: *{span2_text}*\nCandidate: _{span1_text}_",
        question="Does the pronoun refer to the candidate ({words}):",
    ),
    "AX-b": ENTAILMENT,
    "AX-g": ENTAILMENT,
    "MR": SENTIMENT,
    "SIGA-nli": Wording(
        instruction=ENTAILMENT_OR_CONTRADICTION.instruction,
        body="Text: {premise}\nStatement: {statement}",
        question=ENTAILMENT_OR_CONTRADICTION.question,
    ),
    "MentalHealth": Wording(
        instruction="Read what a person wrote and classify the person's mental state. Possible answers: {answers}.",
        body="Text: {text}",
        question="Mental state:",
    ),
}
# Small models write the analysis but no answer unless they are shown both together, once for each answer.
COT = "Always write one sentence of reasoning before the answer, in one of these forms: {forms}."


def build(
    task: Task,
    row: dict,
    tokenizer: PreTrainedTokenizerBase,
    use_CoT: bool = False,
    max_prompt_length: int = MAX_PROMPT_LENGTH,
    demonstrations: list[dict] = (),
) -> tuple[list[int], bool]:
    """The prompt's token ids, and whether text was cut from the row's passage to make it fit.

    max_prompt_length: in tokens, the begun `<Judgement>` or `<Analysis>` included.
    demonstrations: labelled rows of the training split, shown as earlier turns; they are never cut.
    Raises PromptError if the prompt does not fit even without its passage, or if a text would be read as a turn of its
    own; ModelError if the chat template cannot render it.
    """
    prompts, shortened = build_all(task, [row], tokenizer, use_CoT, max_prompt_length, demonstrations)
    return prompts[0], shortened == 1


def build_all(
    task: Task,
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    use_CoT: bool = False,
    max_prompt_length: int = MAX_PROMPT_LENGTH,
    demonstrations: list[dict] = (),
) -> tuple[list[list[int]], int]:
    """The prompts of all rows, and how many lost text of their passage. Arguments and errors are those of `build`."""
    templates.check(tokenizer, len(demonstrations))
    marks, thought_end = turn_marks(tokenizer), templates.thought_end(tokenizer)
    marked = next((word for word in task.words if marks.search(word)), None)
    if marked is not None:
        raise PromptError(f"the label {marked!r} of {task.name} is a mark of this model's own; rename it in the data")
    shots = [(row_texts(task, shot, marks), answer_word(task, shot["label"])) for shot in demonstrations]

    def tokenize(texts_of_rows: list[dict[str, str]], shots=shots) -> list[list[int]]:
        ids = []
        for start in range(0, len(texts_of_rows), TOKENIZED_AT_ONCE):
            batch = texts_of_rows[start : start + TOKENIZED_AT_ONCE]
            prompts = [render(task, texts, tokenizer, use_CoT, shots, thought_end) for texts in batch]
            # A chat template writes its own begin-of-sequence token; a plain prompt needs the tokenizer's.
            ids += tokens.encode(tokenizer, prompts, begin=tokenizer.chat_template is None)
        return ids

    texts_of_rows = [row_texts(task, row, marks) for row in rows]
    way_out = " or lower --num_shots" if demonstrations else ""
    prompts, shortened = fit(task, rows, texts_of_rows, tokenize, tokenizer, max_prompt_length, way_out)
    empty = dict.fromkeys(task.fields, "")
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.discard(tokenizer.unk_token_id)  # any text may hold characters that the tokenizer does not know
    turns = [token for token in tokenize([empty], [(empty, word) for _, word in shots])[0] if token in special]
    for i, row in enumerate(rows):
        if [token for token in prompts[i] if token in special] != turns:
            raise PromptError(
                f"row {row.get('id', i)} of {task.name}, or a demonstration before it, holds a text that this "
                "model's tokenizer reads as a special token; change the text in the data"
            )
    return prompts, shortened


def fit(
    task: Task,
    rows: list[dict],
    texts_of_rows: list[dict[str, str]],
    tokenize: Callable[[list[dict[str, str]]], list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    way_out: str = "",
) -> tuple[list[list[int]], int]:
    """The token ids that `tokenize` makes of every row's texts, and how many rows lost text of their passage.

    In `texts_of_rows` passages are shortened until a row has at most `max_prompt_length` tokens. Raises PromptError,
    with `way_out` after its advice, if a row does not fit even without its passage.
    """
    prompts, shortened = tokenize(texts_of_rows), 0
    for i, (row, texts) in enumerate(zip(rows, texts_of_rows)):
        shortened += len(prompts[i]) > max_prompt_length
        while (excess := len(prompts[i]) - max_prompt_length) > 0:
            longest = max(task.passage, key=lambda name: len(texts[name]), default=None)
            if longest is None or not texts[longest]:
                raise PromptError(
                    f"row {row.get('id', i)} of {task.name} takes {len(prompts[i])} tokens even without its "
                    f"passage; raise --max_prompt_length (now {max_prompt_length}){way_out}"
                )
            # In steps, so that two long passages both keep their beginning.
            texts[longest] = tokens.shorten(tokenizer, texts[longest], -(-excess // len(task.passage)))
            prompts[i] = tokenize([texts])[0]
    return prompts, shortened


def row_text(task: Task, row: dict) -> str:
    """What a row's prompt asks, for people: the row's texts and the question, without instruction and template."""
    wording = wording_of(task)
    fields = {name: str(row[name]) for name in task.fields}
    return f"{wording.body}\n{wording.question}".format(words=listed(shown_words(task)), **fields)


def wording_of(task: Task) -> Wording:
    """The task's own wording, or that of WORDINGS."""
    return task.wording or WORDINGS[task.name]


def shown_words(task: Task) -> tuple[str, ...]:
    """The words that a prompt names: all, of a number task about six."""
    return task.words[:: max(1, (len(task.words) - 1) // 5)] if task.number else task.words


def target(task: Task, row: dict) -> str:
    """What the model should write after `<Judgement>` for a labelled row: the label's word and the closing tag."""
    return answer_word(task, row["label"]) + JUDGEMENT_END


def answer_word(task: Task, label: int | float) -> str:
    """The verbalizer: a class's word, or the number with as many decimals as the task's numbers have."""
    return number_text(task, label) if task.number else task.words[label]


def listed(words: tuple[str, ...]) -> str:
    """("no", "maybe", "yes") -> "no, maybe or yes"."""
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else "".join(words)


def instruction_of(task: Task, use_CoT: bool) -> str:
    """What every prompt of a task begins with."""
    words = shown_words(task)
    instruction = wording_of(task).instruction.format(words=listed(words), answers=between_tags(*words))
    if use_CoT:
        ends = task.words[:: len(task.words) - 1] if task.number else task.words  # not all 51 numbers
        forms = ", ".join(f"{ANALYSIS}reasoning{ANALYSIS_END}{between_tags(word)}" for word in ends)
        instruction += " " + COT.format(forms=forms)
    return instruction


def render(
    task: Task,
    texts: dict[str, str],
    tokenizer,
    use_CoT: bool,
    shots: list[tuple[dict, str]],
    thought_end: str = "",
) -> str:
    """A prompt as text. shots: the texts and the answer word of every demonstration. thought_end: that of the
    tokenizer's template (templates.thought_end)."""
    instruction, users, answers = _turns(task, texts, use_CoT, shots)
    return _layout(tokenizer, instruction, users, answers) + thought_end + (ANALYSIS if use_CoT else JUDGEMENT)


def chat(task: Task, row: dict, use_CoT: bool = False, demonstrations: list[dict] = ()) -> list[dict[str, str]]:
    """A prompt as the turns of a chat, for a server with a chat template of its own.

    It ends with the question: few servers let a chat begin the answer. What tells that template's turns apart is not
    known here, so texts are never broken up, and none is shortened. Raises PromptError for half of a character.
    """
    no_marks = re.compile(r"(?!)")
    shots = [(row_texts(task, shot, no_marks), answer_word(task, shot["label"])) for shot in demonstrations]
    return _conversation(*_turns(task, row_texts(task, row, no_marks), use_CoT, shots))


def _turns(
    task: Task, texts: dict[str, str], use_CoT: bool, shots: list[tuple[dict, str]]
) -> tuple[str, list[str], list[str]]:
    """A prompt's instruction, its questions, and the answers to all of them but the last."""
    wording, instruction = wording_of(task), instruction_of(task, use_CoT)
    # Braces in a row's text stay as they are: a text is filled in once and never read as a template.
    words, template = listed(shown_words(task)), f"{wording.body}\n{wording.question}"
    users = [template.format(words=words, **shown) for shown in [*(shot for shot, _ in shots), texts]]
    answers = [between_tags(word) for _, word in shots]
    return instruction, users, answers


def _layout(tokenizer, instruction: str, users: list[str], answers: list[str]) -> str:
    """The conversation up to the beginning of its last answer."""
    if tokenizer.chat_template is None:
        turns = [f"Prompt: {user}\nAssistant: {answer}" for user, answer in zip(users, [*answers, ""])]
        return "\n".join([f"System_prompt: {instruction}", *turns])
    return templates.render(tokenizer, _conversation(instruction, users, answers))


def _conversation(instruction: str, users: list[str], answers: list[str]) -> list[dict[str, str]]:
    # Not every template has a system role, so the instruction opens the first user's turn.
    first, *others = users
    return templates.conversation([f"{instruction}\n{first}", *others], answers)


def turn_marks(tokenizer) -> re.Pattern:
    """What a row's text must not contain: the special tokens, and whatever else tells the layout's turns apart.

    The latter is found around the texts of a made-up conversation: it is short and has punctuation, as in "[INST]",
    "USER:" or "### Response:". A bare word ("user") is only ever a mark together with a special token.
    """
    text = "text0of0a0turn"
    try:
        layouts = [_layout(tokenizer, text, [text, text], [text])]
    except ModelError:  # the template takes no more than one question
        layouts = [_layout(tokenizer, text, [text], [])]
    if tokenizer.chat_template is not None:
        layouts.append(templates.thought_end(tokenizer))
        messages = [{"role": role, "content": text} for role in ("system", "user")]
        with contextlib.suppress(ModelError):  # it has no system role
            layouts.append(templates.render(tokenizer, messages, begin_answer=False))
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - {""}
    ends = "|".join(re.escape(end) for end in ["\n", text, *sorted(special, key=len, reverse=True)])
    between = {piece.strip() for piece in re.split(ends, "\n".join(layouts))}
    plain = {piece for piece in between if len(piece.split()) <= 2 and re.search(r"[^\W\d_]", piece)}
    plain = {piece for piece in plain if re.search(r"[^\w\s]", piece)}
    marks = {mark: re.escape(mark) for mark in special}
    marks |= {mark: (r"(?<!\w)" if mark[0].isalpha() else "") + re.escape(mark) for mark in plain}
    return re.compile("|".join(marks[mark] for mark in sorted(marks, key=len, reverse=True)) or r"(?!)")


def row_texts(task: Task, row: dict, marks: re.Pattern) -> dict[str, str]:
    """The row's text fields with every turn mark broken up. Raises PromptError for a text that cannot be encoded."""

    def broken(found: re.Match) -> str:
        mark = found[0]
        end = -1 if mark[0].isalpha() else 1  # "Assistant :", "< |im_end|>"
        return f"{mark[:end]} {mark[end:]}"

    texts = {name: marks.sub(broken, str(row[name])) for name in task.fields}
    for name, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"row {row.get('id')} of {task.name} holds half of a character ({text[error.start]!a} in {name}), "
                "which no tokenizer can read; correct the data"
            ) from error
    return texts
