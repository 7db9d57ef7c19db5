"""How labels are spelled: as they continue the opening tag, closed as the model is taught to close them, everywhere."""

from dataclasses import replace

import pytest
import torch
from conftest import BASE, SIZES, tiny_model, word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import fewshot
import inference
import prompts
import sft
import tasks
from engine.engine import Engine
from engine.trees import LabelTrie
from evaluation.answer_spaces import AnswerFormat, label_trie, spell, spelling_notice, target_ids
from evaluation.predict import predict
from training.policy import Policy

TAGS = ["<", "</", "Judgement", ">"]


class Greedy:
    """A tokenizer that takes the longest piece each time; with `start` in front of every text, as sentencepiece."""

    def __init__(self, pieces: list[str], start: str = "", append_eos: bool = False):
        self.pieces = ["<eos>", *TAGS, *pieces, *(chr(c) for c in range(32, 127)), "\n", start or "\0"]
        self.start, self.append_eos = start, append_eos
        self.eos_token_id = self.pad_token_id = 0
        self.sep_token_id = self.bos_token_id = self.cls_token_id = None
        self.chat_template, self.added_tokens_decoder, self.unk_token_id = None, {}, None

    def __len__(self) -> int:
        return len(self.pieces)

    def one(self, text: str) -> list[int]:
        text, ids = self.start + text, []
        while text:
            piece = max((p for p in self.pieces[1:] if text.startswith(p)), key=len)
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return ids + [0] * self.append_eos

    def __call__(self, text, add_special_tokens=True):
        ids = self.one(text) if isinstance(text, str) else [self.one(t) for t in text]
        return type("Encoding", (), {"input_ids": ids})

    def decode(self, ids, **unused) -> str:
        return "".join(self.pieces[i] for i in ids if i).removeprefix(self.start)

    def read(self, ids) -> list[str]:
        return [self.pieces[i] for i in ids]


def worded(*words: str):
    return replace(tasks.get("MentalHealth"), labels=words, words=words)


def test_a_word_is_spelled_as_it_continues_the_tag():
    tokenizer = Greedy(["_negative", "negative", "_positive", "positive"], start="_")
    assert tokenizer.read(tokenizer("negative").input_ids) == ["_negative"]
    task = tasks.get("SST")
    spelling = spell(task.words, tokenizer)
    assert [tokenizer.read(word) for word in spelling.words] == [["negative"], ["positive"]]
    assert tokenizer.read(spelling.closing) == ["</", "Judgement", ">"] and not spelling.apart
    assert spelling_notice(task, tokenizer) == ""
    assert tokenizer.read(label_trie(task, tokenizer).vocabulary) == ["negative", "positive"]
    target = target_ids(task, {"label": 1}, tokenizer)
    assert tokenizer.read(target) == ["positive", "</", "Judgement", ">", "<eos>"]
    # A demonstration is written with the same tokens.
    row = {"sentence": "fine", "label": 1, "id": 0}
    (shown,), _ = prompts.build_all(task, [row], tokenizer, demonstrations=[row])
    assert any(shown[i : i + 4] == target[:4] for i in range(len(shown)))


@pytest.mark.parametrize(
    ("pieces", "target"),
    [
        (["yes", "s<"], ["yes", "</", "Judgement", ">"]),  # no token spans the whole word and the tag: in context
        (["ye", "s<", "s"], ["ye", "s", "</", "Judgement", ">"]),
        ([">y", "yes", "es"], ["yes", "</", "Judgement", ">"]),
    ],
)
def test_where_tokens_span_word_and_tag_both_are_spelled_apart(pieces, target):
    tokenizer = Greedy(pieces)
    task = worded("no", "yes")
    assert tokenizer.read(target_ids(task, {"label": 1}, tokenizer)) == [*target, "<eos>"]
    apart = pieces != ["yes", "s<"]
    assert spell(task.words, tokenizer).apart is apart
    assert ("spelled apart" in spelling_notice(task, tokenizer)) is apart
    trie = label_trie(task, tokenizer)
    assert tokenizer.read(trie.spellings[1]) == target[:-3]


@pytest.mark.parametrize("program", [inference, fewshot, sft])
def test_every_script_says_once_that_labels_are_spelled_apart(program, tmp_path, capsys):
    tiny_model(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")  # a tag and the word behind it are one unknown token
    for split in ("train", "validation"):
        rows = [f"w{i},{('no', 'yes')[i % 2]}" for i in range(8)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,status", *rows]) + "\n")
    argv = ["--task", "MentalHealth", "--data_path", str(tmp_path), "--from_local", "True", "--report_to", "none"]
    argv += ["--train_model_name", str(tmp_path / "model"), "--output_dir", str(tmp_path / "run")]
    more = {sft: ["--batch_sentence_num", "8", "--max_steps", "1"], fewshot: ["--num_shots", "2"], inference: []}
    program.main([*argv, *more[program]])
    assert capsys.readouterr().out.count("labels and tags are spelled apart") == 1


def test_a_tokenizer_that_appends_end_of_sequence():
    plain, appending = (Greedy(["yes", "no"], append_eos=append) for append in (False, True))
    assert spell(("no", "yes"), appending) == spell(("no", "yes"), plain)
    assert target_ids(worded("no", "yes"), {"label": 0}, appending).count(0) == 1


LABELS = ("bug", "bug report", "question")
TEXTS = ("it crashes", "here is what I saw", "how do I start")


@pytest.fixture(scope="module")
def taught():
    """A tiny model that was taught to write each text's label to the end, and the prompts."""
    tokenizer, task = Greedy(["bug", " report", "question"]), worded(*LABELS)
    torch.manual_seed(0)
    config = LlamaConfig(**{**BASE, **SIZES, "vocab_size": len(tokenizer), "initializer_range": 0.02})
    model = LlamaForCausalLM(config)
    asked = [tokenizer(f"{text}: <Judgement>").input_ids for text in TEXTS]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = 0.0
        for label, prompt in enumerate(asked):
            target = target_ids(task, {"label": label}, tokenizer)
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    return Engine(model.eval(), tokenizer), task, asked


@pytest.mark.parametrize("answer_space", ["free", "labels", "score"])
def test_a_label_that_begins_another_is_told_apart_in_every_answer_space(answer_space, taught):
    engine, task, asked = taught
    found = predict(engine, AnswerFormat(task), asked, answer_space, 24)
    assert [prediction.label for prediction in found] == [0, 1, 2]


def test_scores_close_all_labels_or_none():
    begins = LabelTrie([[1], [1, 2], [3]], 9).full_tree()[1]
    assert [[token for _, token in path] for path in begins] == [[1, 9], [1, 2, 9], [3, 9]]
    apart = LabelTrie([[1, 4], [1, 2], [3]], 9).full_tree()[1]
    assert [[token for _, token in path] for path in apart] == [[1, 4], [1, 2], [3]]


def test_free_mode_pays_entropy_where_the_spellings_part(taught):
    engine, tokenizer = taught[0], Greedy(["not"])
    trie = label_trie(worded("not good", "not bad", "not"), tokenizer)
    policy = Policy(engine, None, 1.0, labels=trie, masked=False)
    assert policy.label_choice(trie.tree, 0) is None  # all labels begin with "not"
    nodes = [node for node in range(len(trie.tree)) if policy.label_choice(trie.tree, node)]
    assert [tokenizer.read(trie.tree.path(node)) for node in nodes] == [["not"], ["not", " "]]
    choices = [None, *(policy.label_choice(trie.tree, node) for node in nodes)]
    assert [tokenizer.read(choice) for choice in choices[1:]] == [["</", " "], ["b", "g"]]
    log_probs = torch.log_softmax(torch.randn(3, len(tokenizer)), -1)
    entropy, paid = policy.entropy(log_probs, choices)
    assert paid.tolist() == [False, True, True] and entropy[0] == 0
    for row in (1, 2):
        chosen = torch.log_softmax(log_probs[row, choices[row]], -1)
        assert entropy[row].item() == pytest.approx(-(chosen.exp() * chosen).sum().item(), abs=1e-6)
