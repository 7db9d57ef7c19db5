"""classify.py with tiny random models: what a head reads, learns and answers, and that its runs are like all others."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

import classify
import inference
import tasks
from engine import classifier
from engine.classifier import Classifier
from evaluation import classifying
from machine.errors import ModelError, PromptError
from run.folder import LOCATION
from run.parser import options_of
from training.head_trainer import micro_batch

FIXTURES = Path(__file__).parent / "fixtures"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (
    "a", "b", "c", "d", "e", "f", "g", "h", ",", ":", "film", "sentence1",
    "dull", "slow", "cold", "weak", "grim", "warm", "bright", "funny", "lovely", "fine",
)  # fmt: skip
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=0.1)


def small_tokenizer(encoder: bool) -> PreTrainedTokenizerFast:
    """A token per word. An encoder's has [CLS] and [SEP], and joins pairs; a decoder's adds nothing."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(unk_token="[UNK]", pad_token="[PAD]")
    if encoder:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, VOCABULARY[token]) for token in ("[CLS]", "[SEP]")],
        )
        names |= dict(cls_token="[CLS]", sep_token="[SEP]")
        names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        names |= dict(eos_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def save_model(folder: Path, kind: str) -> Path:
    """A random language model of this kind, as it lies on the hub: without a head."""
    torch.manual_seed(0)
    size = dict(vocab_size=len(VOCABULARY), pad_token_id=0)
    if kind in ("llama", "gpt2"):
        model = tiny_model(kind, **size, eos_token_id=VOCABULARY["[SEP]"])
    elif kind == "bert":
        model = BertForMaskedLM(BertConfig(**size, **SIZES, max_position_embeddings=512))
    elif kind == "roberta":
        model = RobertaForMaskedLM(RobertaConfig(**size, **SIZES, max_position_embeddings=514))
    else:
        distil = dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64, initializer_range=0.1)
        model = DistilBertForMaskedLM(DistilBertConfig(**size, **distil))
    model.save_pretrained(folder)
    small_tokenizer(kind not in ("llama", "gpt2")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(root / kind, kind) for kind in ("llama", "gpt2", "bert", "roberta", "distilbert")}


def argv(model: Path, data: Path, output: Path, **more) -> list[str]:
    given = {"task": "SST", "train_model_name": model, "from_local": True, "data_path": data, "output_dir": output}
    given |= {"report_to": "none", **more}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def read(folder: Path) -> tuple[dict, list[dict], list[dict]]:
    """The summary, and the lines of history and predictions, without times."""
    lines = [
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("history.jsonl", "predictions.jsonl")
        if (folder / name).exists()
    ]
    for line in lines[0]:
        for name in [name for name in line if name.startswith("time/") or name == "eval/seconds"]:
            del line[name]
    return json.loads((folder / "summary.json").read_text()), lines[0], lines[-1]


def metrics_of(summary: dict, moment: str) -> dict[str, float]:
    return {name: value for name, value in summary["metrics"][moment].items() if name != "step"}


# ---------------------------------------------------------------------------------------------------- what a head reads


ROW = {"id": 0, "label": 0, "sentence": "a b", "sentence1": "a b", "sentence2": "c d", "word": "e"}


@pytest.mark.parametrize(
    ("name", "encoder", "text", "types"),
    [
        ("SST", True, "[CLS] a b [SEP]", None),
        ("SST", False, "a b", None),
        ("MRPC", True, "[CLS] a b [SEP] c d [SEP]", [0, 0, 0, 0, 1, 1, 1]),
        ("MRPC", False, "sentence1 : a b [UNK] : c d", None),
        ("WiC", True, "[CLS] [UNK] : e sentence1 : a b [UNK] : c d [SEP]", None),
        ("WiC", False, "[UNK] : e sentence1 : a b [UNK] : c d", None),
    ],
)
def test_one_text_a_pair_or_lines(name, encoder, text, types):
    tokenizer = small_tokenizer(encoder)
    (row,), shortened = classifying.build_inputs(tasks.get(name), [ROW], tokenizer, 20)
    assert tokenizer.decode(row["input_ids"]) == text and shortened == 0
    assert row.get("token_type_ids") == types and set(row["attention_mask"]) == {1}


@pytest.mark.parametrize("encoder", [True, False])
def test_only_the_passage_loses_text(encoder):
    tokenizer = small_tokenizer(encoder)
    row = {"id": 0, "label": 0, "passage": "a b c d e f g h", "question": "h g f"}
    (encoded,), shortened = classifying.build_inputs(tasks.get("BoolQ"), [row], tokenizer, 11)
    text = tokenizer.decode(encoded["input_ids"])
    expected = "[CLS] a b c d e [SEP] h g f [SEP]" if encoder else "[UNK] : a b c d [UNK] : h g f"
    assert (text, shortened) == (expected, 1)
    with pytest.raises(PromptError, match="row 0 of BoolQ takes . tokens even without its passage"):
        classifying.build_inputs(tasks.get("BoolQ"), [row], tokenizer, 5)


def test_a_text_is_data_whatever_it_says():
    rows = [{**ROW, "sentence": "a [SEP] b [PAD]"}, {**ROW, "sentence": ""}]
    for encoder in (True, False):
        tokenizer = small_tokenizer(encoder)
        inputs, _ = classifying.build_inputs(tasks.get("SST"), rows, tokenizer, 20)
        special = [VOCABULARY[token] for token in ("[CLS]", "[SEP]", "[PAD]")]
        kept = [token for token in inputs[0]["input_ids"] if token in special]
        assert kept == ([VOCABULARY["[CLS]"], VOCABULARY["[SEP]"]] if encoder else [])
        assert len(inputs[1]["input_ids"]) == len(inputs[1]["attention_mask"]) == (2 if encoder else 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta", "distilbert"])
def test_a_row_s_logits_do_not_depend_on_its_batch(kind, folders):
    """Padding is not read; and what is new in the model is trained whole, saved, and loaded again."""
    name = str(folders[kind])
    tokenizer = classifier.load_tokenizer(name, True, False)
    torch.manual_seed(1)
    model, new = classifier.load(name, True, False, ("no", "maybe", "yes"), tokenizer)
    heads = {"distilbert": ["classifier", "pre_classifier"], "llama": ["score"], "gpt2": ["score"]}
    assert new == heads.get(kind, ["bert.pooler.dense", "classifier"] if kind == "bert" else ["classifier"])
    model = classifier.with_new_adapter(model, new).eval()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(any(part in name for part in ("lora_", *new)) for name in trained)
    assert not any("lora_" in name and part in name for name in trained for part in new)
    texts = ["a", "a b c d e f g", "c d", "h g f e d"]
    task = tasks.get("SST")
    inputs, _ = classifying.build_inputs(task, [{**ROW, "sentence": text} for text in texts], tokenizer, 20)
    together = Classifier(model, tokenizer, 1000).logits(inputs)
    alone = Classifier(model, tokenizer, 1).logits(inputs)
    assert together.shape == (4, 3) and torch.allclose(together, alone, atol=1e-4)
    assert len({round(row[0].item(), 4) for row in together}) == 4


def test_logits_as_answers():
    found = classifying.as_predictions(tasks.get("CB"), torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 3.0]]))
    chances = torch.softmax(torch.tensor([2.0, 0.0, 1.0]), -1)
    words = tasks.get("CB").words
    assert [(p.text, p.label) for p in found] == [(words[0], 0), (words[2], 2)]
    assert found[0].last_label_probability == pytest.approx(chances[2].item())
    assert found[0].probabilities.tolist() == pytest.approx(chances.tolist())
    numbers = classifying.as_predictions(tasks.get("STS-B"), torch.tensor([[-1.0], [2.34567], [7.0]]))
    assert [(p.text, p.label) for p in numbers] == [("0.000", 0.0), ("2.346", 2.346), ("5.000", 5.0)]
    assert {p.last_label_probability for p in numbers} == {None}


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("name", ["SST", "CB", "STS-B", "COPA", "MultiRC", "ReCoRD"])
def test_a_run_on_a_task_s_files(name, kind, folders, tmp_path):
    """Two classes, three, a number; four texts; a row for each answer, and for each candidate."""
    run = tmp_path / "run"
    classify.main(argv(folders[kind], FIXTURES, run, task=name, batch_sentence_num=2, max_steps=2, end_epoch=2))
    summary, history, predictions = read(run)
    task = tasks.get(name)
    assert summary["method"] == "head" and summary["samples"] == 2 * summary["steps"] > 0
    assert {*task.metrics, "score", "invalid_rate"} <= set(summary["metrics"]["after"])
    assert summary["metrics"]["after"]["invalid_rate"] == 0
    assert [line["step"] for line in history if "eval/score" in line] == [0, summary["steps"]]
    losses = [line for line in history if "train/loss" in line]
    assert len(losses) == summary["steps"] and all(("train/accuracy" in line) != task.number for line in losses)
    for line in predictions:
        assert (
            0 <= line["label"] <= 5 if task.number else line["answer"] == task.words[task.labels.index(line["label"])]
        )
        assert ("probability_of_last_label" in line) != task.number and ("answers" in line) == task.candidates


@pytest.fixture(scope="module")
def trained(folders, data_root, tmp_path_factory) -> Path:
    """Four steps on made-up reviews, a checkpoint after every second one."""
    run = tmp_path_factory.mktemp("head") / "run"
    classify.main(argv(folders["llama"], data_root, run, max_steps=4, save_methods="step", save_freq=2, eval_steps=2))
    return run


def test_a_resumed_run_ends_where_the_whole_one_does(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("step-4", "summary.json", ".lock"))
    classify.main(["--resume", str(run)])
    for name in ("step-2", "step-4"):
        kept, again = (load_file(folder / name / "adapter_model.safetensors") for folder in (trained, run))
        assert kept.keys() == again.keys() and all(torch.equal(kept[key], again[key]) for key in kept)
        assert any("score" in key for key in kept)
    assert read(run)[1:] == read(trained)[1:]
    assert read(run)[0]["metrics"] == read(trained)[0]["metrics"]


@pytest.mark.parametrize(("kind", "full", "steps"), [("llama", False, 24), ("llama", True, 24), ("bert", False, 90)])
def test_a_head_learns_and_answers_again(kind, full, steps, folders, data_root, tmp_path, capsys):
    """Words tell the classes apart, which takes few steps. best/ gives the same answers with --split."""
    run, again = tmp_path / "run", tmp_path / "again"
    given = argv(folders[kind], data_root, run, max_steps=steps, end_epoch=15, full_finetuning=full, learning_rate=3e-3)
    classify.main(given)
    summary, _, predictions = read(run)
    assert summary["metrics"]["after"]["accuracy"] == 1.0
    weights = "model" if full else "adapter_model"
    assert {f"{weights}.safetensors", "head.json", "tokenizer.json"} <= {path.name for path in (run / "best").iterdir()}
    said = capsys.readouterr().out
    where = f"--task SST --data_path {data_root} --split validation --from_local True"
    assert f"bash scripts/classify.sh {where} --train_model_name {run}" in said
    classify.main(argv(run / "best", data_root, again, split="validation"))
    answered, _, lines = read(again)
    assert answered["method"] == "trained" and answered["split"] == "validation"
    assert metrics_of(answered, "after") == metrics_of(summary, "best")
    assert [line["label"] for line in lines] == [line["label"] for line in predictions]


def test_micro_batches_change_no_step(folders, data_root, tmp_path):
    found = []
    for tokens in (1, 16, 1000):
        run = tmp_path / str(tokens)
        classify.main(argv(folders["llama"], data_root, run, max_steps=3, tokens_per_micro_batch=tokens))
        found.append([line["train/loss"] for line in read(run)[1] if "train/loss" in line])
    assert found[0] == pytest.approx(found[2], rel=1e-4) and found[1] == pytest.approx(found[2], rel=1e-4)
    assert [micro_batch(8, 5, tokens) for tokens in (1, 10, 15, 20, 1000)] == [1, 2, 2, 4, 8]


# -------------------------------------------------------------------------------------------------------------- refused


def refused(capsys, *arguments, script=classify) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main(["--report_to", "none", *map(str, arguments)])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and said.count("\n") == 0 and "Traceback" not in said, said
    return said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--answer_space", "free"], "unrecognized arguments: --answer_space free"),
        (["--use_CoT", "True"], "unrecognized arguments: --use_CoT True"),
        (["--task", "GLUE"], "--task GLUE names 11 tasks"),
        (["--task", "AX"], "--task AX has no training data; train on MNLI-m"),
        (["--split", "train"], "--split train must be one of validation, test"),
        (["--split", "test"], "asks a trained head, and --train_model_name SmolLM2-135M-Instruct is none"),
        (["--learning_rate", "0"], "--learning_rate 0.0 must be greater than 0"),
        (["--task", "SST", "--data_path", FIXTURES], "--batch_sentence_num 8 is more than the 3 training rows of SST"),
    ],
)
def test_bad_arguments_end_with_one_sentence(given, said, capsys):
    assert said in refused(capsys, *given)


def test_a_folder_is_asked_and_trained_by_what_fits_it(trained, folders, data_root, tmp_path, capsys):
    head = argv(trained / "best", data_root, tmp_path / "run")
    assert "is a trained head; add --split validation to evaluate it" in refused(capsys, *head)
    assert "`bash scripts/classify.sh --split validation --from_local" in refused(capsys, *head, script=inference)
    three = argv(trained / "best", FIXTURES, tmp_path / "run", task="CB", split="validation")
    assert "answers negative, positive, but --task CB needs entailment, " in refused(capsys, *three)
    adapter = tmp_path / "adapter"
    shutil.copytree(trained / "best", adapter, ignore=shutil.ignore_patterns("head.json"))
    with pytest.raises(ModelError, match="is a language model's adapter, on which no head is trained; give the model"):
        classifier.load_tokenizer(str(adapter), True, False)
    long = argv(folders["bert"], data_root, tmp_path / "run", max_prompt_length=600)
    assert "--max_prompt_length 600 is more than the 512 tokens" in refused(capsys, *long)
    assert not (tmp_path / "run").exists()


def test_what_a_head_does_not_have_is_no_option():
    options = {field.name for field in options_of(classify.HeadArguments)}
    fixed = {field.name for field in fields(classify.HeadArguments)} - options
    assert {"answer_space", "use_CoT", "max_response_length", "load_in_8bit"} <= fixed
    assert {"full_finetuning", "split", *LOCATION} <= options
