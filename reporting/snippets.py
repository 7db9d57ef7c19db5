"""A few lines of Python that classify a text with an exported model and transformers alone."""

import json
from dataclasses import dataclass
from string import Formatter

import prompts
from engine import templates
from evaluation.answer_spaces import spell
from rewards import ANALYSIS, JUDGEMENT, JUDGEMENT_END
from tasks import Task
from tasks.wording import escaped

TEXT = "Write your text here."


@dataclass(frozen=True)
class Asked:
    """How an exported model is asked: the options of inference.py of the same names."""

    use_CoT: bool
    answer_space: str
    number_answer: str


def of_language_model(name: str, task: Task, tokenizer, asked: Asked) -> str:
    """The lines for a language model. name: the folder, or the model's name on the hub.

    They print the probabilities of the labels where one forward gives these, and else the answer.
    """
    head = [
        "import torch",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(name)})",
        f"model = AutoModelForCausalLM.from_pretrained({_quoted(name)})",
        *_prompt(task, tokenizer, asked.use_CoT),
    ]
    if asked.use_CoT or asked.answer_space == "free":
        return "\n".join([*head, *_generated(asked.use_CoT)])
    spelling = spell(task.words, tokenizer)
    names = task.words if task.number else task.labels
    tokens = {name: [*ids, spelling.closing[0]] for name, ids in zip(names, spelling.words)}
    if task.number and asked.number_answer == "mean":
        return "\n".join([*head, *_mean(tokens)])
    first = {name: ids[0] for name, ids in tokens.items()}
    if len(set(first.values())) == len(first):
        return "\n".join([*head, *_one_forward(first)])
    return "\n".join([*head, *_among_labels(tokens)])


def of_head(name: str, task: Task, pair: bool) -> str:
    """The lines for a classification head. pair: its tokenizer joins the row's two texts itself."""
    if pair:
        inputs = json.dumps(dict(zip(("text", "text_pair"), (TEXT, TEXT))))
    else:
        texts = [TEXT if len(task.fields) == 1 else f"{name}: {TEXT}" for name in task.fields]
        inputs = _quoted("\n".join(texts))
    function = ', function_to_apply="none"' if task.number else ", top_k=None"
    return "\n".join(
        [
            "from transformers import pipeline",
            "",
            f'classify = pipeline("text-classification", model={_quoted(name)})',
            f"print(classify({inputs}{function}))",
        ]
    )


def _prompt(task: Task, tokenizer, use_CoT: bool) -> list[str]:
    """The lines that make `ids`, which are those of prompts.py."""
    texts = ", ".join(f"{field}={_quoted(TEXT)}" for field in task.fields)
    instruction, turn = escaped(prompts.instruction_of(task, use_CoT)), _turn(task)
    begun = templates.thought_end(tokenizer) + (ANALYSIS if use_CoT else JUDGEMENT)
    if tokenizer.chat_template is None:
        prompt = f"System_prompt: {instruction}\nPrompt: {turn}\nAssistant: {begun}"
        return [
            f"prompt = {_quoted(prompt)}.format({texts})",
            'ids = tokenizer(prompt, return_tensors="pt").input_ids',
        ]
    return [
        f"question = {_quoted(f'{instruction}{chr(10)}{turn}')}.format({texts})",
        'messages = [{"role": "user", "content": question}]',
        "how = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)",
        f"prompt = tokenizer.apply_chat_template(messages, **how) + {_quoted(begun)}",
        'ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids',
    ]


def _turn(task: Task) -> str:
    """The wording's body and question with the label words filled in; the row's fields are left."""
    wording, words = prompts.wording_of(task), escaped(prompts.listed(prompts.shown_words(task)))
    turn = ""
    for text, field, _, _ in Formatter().parse(f"{wording.body}\n{wording.question}"):
        turn += escaped(text) + ("" if field is None else words if field == "words" else f"{{{field}}}")
    return turn


def _one_forward(first: dict[str, int]) -> list[str]:
    return [
        f"labels = {_dictionary(first)}  # the token that each answer begins with",
        "probabilities = torch.softmax(model(ids).logits[0, -1, list(labels.values())].float(), dim=-1)",
        "print(dict(zip(labels, probabilities.tolist())))",
    ]


def _among_labels(tokens: dict[str, list[int]]) -> list[str]:
    most = max(map(len, tokens.values()))
    return [
        f"labels = {_dictionary(tokens)}  # the tokens of each answer",
        "",
        "def continue_a_label(_, sequence):",
        "    done = sequence[ids.shape[1] :].tolist()",
        "    follow = {label[len(done)] for label in labels.values() if label[: len(done)] == done != label}",
        "    return sorted(follow) or [tokenizer.eos_token_id]",
        "",
        f"answer = model.generate(ids, prefix_allowed_tokens_fn=continue_a_label, max_new_tokens={most})",
        "answer = answer[0, ids.shape[1] :].tolist()",
        "print(next(label for label, tokens in labels.items() if answer[: len(tokens)] == tokens))",
    ]


def _mean(tokens: dict[str, list[int]]) -> list[str]:
    return [
        f"numbers = {_dictionary(tokens)}  # the tokens of each answer",
        "mean = 0.0",
        "for number, answer in numbers.items():",
        "    logits = model(torch.cat([ids, torch.tensor([answer])], dim=1)).logits[0, ids.shape[1] - 1 :].float()",
        "    probability = 1.0",
        "    for t, token in enumerate(answer):",
        "        allowed = sorted({other[t] for other in numbers.values() if other[:t] == answer[:t]})",
        "        probability *= torch.softmax(logits[t, allowed], dim=-1)[allowed.index(token)].item()",
        "    mean += probability * float(number)",
        "print(mean)",
    ]


def _generated(use_CoT: bool) -> list[str]:
    behind = f".rpartition({_quoted(JUDGEMENT)})[2]" if use_CoT else ""
    return [
        "answer = tokenizer.decode(model.generate(ids)[0, ids.shape[1] :], skip_special_tokens=True)",
        f"print(answer{behind}.partition({_quoted(JUDGEMENT_END)})[0].strip())",
    ]


def _quoted(text: str) -> str:
    """A text as Python source, readable in any script."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\x7f")


def _dictionary(values: dict) -> str:
    return json.dumps(values, ensure_ascii=False)
