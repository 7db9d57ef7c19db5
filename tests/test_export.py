"""export.py: one plain folder with the model's own logits, and a card whose lines answer as inference.py does."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, with_lora
from peft import PeftModel
from scipy.stats import binomtest
from test_foreign_models import byte_tokenizer, chat
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import classify
import export
import inference
import ppo
import tasks
from engine import exporting, models
from inference import Classifier
from prompts import wording_of
from reporting import snippets
from run import model_options
from tasks import own
from tasks.wording import Wording

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def run(model_folder, data_root, tmp_path_factory) -> Path:
    """A tiny PPO run on SST; the last evaluation is the best."""
    folder = tmp_path_factory.mktemp("run") / "run"
    ppo.main(options(model_folder, data_root, folder, max_steps=2, learning_rate=1e-2, batch_sentence_num=8))
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "exported"
    export.main(["--checkpoint", str(run / "best"), "--output_dir", str(folder)])
    return folder


def options(model: Path, data: Path, folder: Path, **more) -> list[str]:
    given = dict(task="SST", data_path=data, train_model_name=model, from_local=True, report_to="none",
                 output_dir=folder)  # fmt: skip
    return [part for name, value in {**given, **more}.items() for part in (f"--{name}", str(value))]


def refused(capsys, main, *arguments: str) -> str:
    """The one line that is left on standard error."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and "error: " in said[-1]
    return said[-1]


def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits.detach()


def save_adapter(base: Path, folder: Path, start: Path | None = None, **changes) -> torch.Tensor:
    """An adapter on a base, or on the base with another adapter merged in; returns the logits of all together."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if start is not None:
        model = PeftModel.from_pretrained(model, start).merge_and_unload()
    model.name_or_path = model.config._name_or_path = str(base)
    adapted = with_lora(model, seed=2, **changes)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    adapted.save_pretrained(folder)
    if start is not None:
        shutil.copytree(start, folder / "start")
    return adapted(IDS).logits.detach()


# --------------------------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("trained", [(), ("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_the_logits_are_those_of_base_and_adapter(trained, model_folder, tmp_path):
    changes = {"modules_to_save": list(trained)} if trained else {}
    expected = save_adapter(model_folder, tmp_path / "adapter", **changes)
    (tmp_path / "adapter" / "value_head.safetensors").write_bytes(b"not a part of the model")
    (tmp_path / "exported").mkdir()
    about = exporting.write_language_model(str(tmp_path / "adapter"), tmp_path / "exported")
    assert torch.allclose(logits(tmp_path / "exported"), expected, atol=1e-4)
    assert about.dtype == "float32" and about.base == str(model_folder)
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    assert str(tmp_path) not in (tmp_path / "exported" / "config.json").read_text()  # whoever gets it learns no paths


def test_a_chain_of_adapters_is_merged_in_order(model_folder, tmp_path):
    save_adapter(model_folder, tmp_path / "first", r=2)
    expected = save_adapter(model_folder, tmp_path / "second", start=tmp_path / "first")
    (tmp_path / "exported").mkdir()
    exporting.write_language_model(str(tmp_path / "second"), tmp_path / "exported")
    assert torch.allclose(logits(tmp_path / "exported"), expected, atol=1e-4)


def test_a_whole_model_and_its_number_format(model_folder, tmp_path):
    for dtype in ("", "bfloat16"):
        folder = tmp_path / (dtype or "same")
        folder.mkdir()
        about = exporting.write_language_model(str(model_folder), folder, dtype, max_new_tokens=7)
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == about.dtype == (dtype or "float32")
        settings = GenerationConfig.from_pretrained(folder)
        assert settings.max_new_tokens == 7 and not settings.do_sample
    assert torch.allclose(logits(tmp_path / "same"), logits(model_folder), atol=1e-5)
    assert torch.allclose(logits(tmp_path / "bfloat16"), logits(model_folder), atol=0.5)
    # What is stored in bfloat16 stays so.
    (tmp_path / "again").mkdir()
    assert exporting.write_language_model(str(tmp_path / "bfloat16"), tmp_path / "again").dtype == "bfloat16"


def test_quantized_files_and_other_logits_are_refused(model_folder, tmp_path, monkeypatch, capsys):
    base = tmp_path / "quantized"
    shutil.copytree(model_folder, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    given = ["--checkpoint", base, "--task", "SST", "--output_dir", tmp_path / "exported"]
    assert "are quantized, and an adapter cannot be merged" in refused(capsys, export.main, *given)
    monkeypatch.setattr(exporting, "TOLERANCE", 0.0)
    given[1] = model_folder
    assert "with other logits" in refused(capsys, export.main, *given)
    assert {path.name for path in tmp_path.iterdir()} == {"quantized"}  # nothing half-written


# ---------------------------------------------------------------------------------------------------------- the folder


def test_the_folder_says_all_that_inference_needs(run, exported, data_root, tmp_path):
    assert {"task.yaml", "inference.yaml", "README.md", "model.safetensors"} <= {p.name for p in exported.iterdir()}
    task = own.read_task(exported / "task.yaml")
    assert task.wording == wording_of(tasks.get("SST")) and task.labels == ("negative", "positive")
    found = []
    for number, model in enumerate((run / "best", exported)):
        folder = tmp_path / str(number)
        inference.main(["--from_local", "True", "--train_model_name", str(model), "--data_path", str(data_root)]
                       + ["--report_to", "none", "--output_dir", str(folder)])  # fmt: skip
        found.append([json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()])
    for before, after in zip(*found, strict=True):
        assert before["prompt"] == after["prompt"] and before["label"] == after["label"]
        last = after["probability_of_last_label"]
        assert before["probability_of_last_label"] == pytest.approx(last, abs=1e-4)


def test_the_card(run, exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text())
    for metric in ("accuracy", "invalid_rate"):
        assert f"| {metric} |" in card
    best, low, high = (summary["metrics"]["best"]["accuracy"], *summary["intervals"]["accuracy"])
    if summary["best_step"] != 2:  # then summary.json's intervals are of other answers
        low, high = binomtest(round(12 * best), 12).proportion_ci(method="wilson")
    assert f"| {best:.3f} | {low:.3f} to {high:.3f} |" in card
    for said in ("trained with PPO", "Sentiment (negative or positive):", summary["data_hash"], "@inproceedings{"):
        assert said in card
    assert str(run.parent) not in card


def test_how_a_run_was_asked_goes_along(model_folder, tmp_path):
    """The options that ask a model: those of the run, as defaults that the command line overrides."""
    best = tmp_path / "run" / "best"
    save_adapter(model_folder, best)
    given = {"use_CoT": True, "answer_space": "free", "max_prompt_length": 300, "max_response_length": 96, "seed": 3}
    (tmp_path / "run" / "arguments.json").write_text(json.dumps(given | {"number_answer": "mean"}))
    kept = {"use_CoT": True, "answer_space": "free", "max_prompt_length": 300}
    assert model_options.of_model(best) == kept
    model_options.write(tmp_path / "run", kept)  # as in an exported folder
    assert model_options.of_model(tmp_path / "run") == kept
    asked = Classifier(str(best), task="SST", answer_space="labels").arguments
    assert (asked.use_CoT, asked.max_prompt_length, asked.max_response_length) == (True, 300, 96)
    assert asked.answer_space == "labels"


def test_a_run_that_trained_all_weights_is_exported_too(model_folder, data_root, tmp_path):
    run, folder = tmp_path / "run", tmp_path / "exported"
    ppo.main(options(model_folder, data_root, run, max_steps=1, batch_sentence_num=8, full_finetuning=True))
    export.main(["--checkpoint", str(run / "best"), "--output_dir", str(folder)])
    assert torch.allclose(logits(folder), logits(run / "best"), atol=1e-5)
    assert f"`{model_folder.name}`, trained with PPO" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--checkpoint is missing"),
        (["--checkpoint", "/no/such/model"], "--checkpoint /no/such/model is no folder"),
        (["--checkpoint", "MODEL"], "does not say which task it was trained on"),
        (["--checkpoint", "MODEL", "--task", "SSTT"], "Did you mean 'SST'?"),
        (["--checkpoint", "MODEL", "--task", "/no/task.yaml"], "/no/task.yaml"),
        (["--checkpoint", "MODEL", "--task", "SST", "--output_dir", "MODEL"], "is not an empty folder"),
        (["--checkpoint", "MODEL", "--task", "SST", "--dtype", "int4"], "--dtype int4 must be one of float32"),
        (["--checkpont", "MODEL"], "did you mean --checkpoint?"),
    ],
)
def test_what_cannot_be_exported_is_refused(arguments, said, model_folder, tmp_path, capsys):
    given = [str(model_folder) if part == "MODEL" else part for part in arguments]
    if "--output_dir" not in given:
        given += ["--output_dir", str(tmp_path / "exported")]
    assert said in refused(capsys, export.main, *given)
    assert not list(tmp_path.iterdir())


class Hub:
    """huggingface_hub.HfApi as far as it is used."""

    def __init__(self, calls: list, error: Exception | None = None):
        self.calls, self.error = calls, error

    def whoami(self):
        if self.error:
            raise self.error
        self.calls.append(("whoami",))

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool):
        self.calls.append(("create_repo", repo_id, private, exist_ok))

        class Address(str):
            repo_id = "me/classifier"

        return Address("https://hub/me/classifier")

    def upload_folder(self, repo_id: str, folder_path: Path):
        self.calls.append(("upload_folder", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


@pytest.mark.parametrize("private", [True, False])
def test_the_hub_gets_the_folder_privately(private, model_folder, tmp_path, monkeypatch, capsys):
    calls: list = []
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(calls))
    export.main(["--checkpoint", str(model_folder), "--task", "SST", "--output_dir", str(tmp_path / "exported")]
                + ["--push_to_hub", "classifier", *([] if private else ["--private", "False"])])  # fmt: skip
    files = sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert calls == [
        ("whoami",),
        ("create_repo", "classifier", private, True),
        ("upload_folder", "me/classifier", files),
    ]
    assert "Uploaded to https://hub/me/classifier" in capsys.readouterr().out
    assert 'from_pretrained("classifier")' in (tmp_path / "exported" / "README.md").read_text()


def test_a_hub_that_refuses_is_one_sentence_before_any_work(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub([], OSError("Token is required\nmore")))
    given = ["--checkpoint", model_folder, "--task", "SST", "--output_dir", tmp_path / "exported"]
    said = refused(capsys, export.main, *given, "--push_to_hub", "classifier")
    assert "--push_to_hub classifier: the hub refused it (Token is required); log in" in said
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- the snippet


def run_snippet(code: str) -> str:
    """What the lines of a card print."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {"__name__": "card"})
    return printed.getvalue().strip()


NESTED = replace(
    tasks.get("MentalHealth"),
    labels=("no", "not", "not at all", "yes, {all}"),
    words=("no", "not", "not at all", "yes, {all}"),
    wording=Wording("Is {{it}} so? Possible answers: {answers}.", "Text: {text}", "So ({words}):"),
)
ASKED = {
    "SST": {},
    "MNLI-m": {},
    "nested": {},
    "STS-B": {},
    "STS-B likeliest": {"number_answer": "likeliest"},
    "SST free": {"answer_space": "free", "max_response_length": 6},
    "SST analysis": {"use_CoT": True, "answer_space": "free", "max_response_length": 12},
}


@pytest.mark.parametrize("kind", ["embedded's", "plain", "begin"])
@pytest.mark.parametrize("case", ASKED)
def test_the_card_answers_as_inference_does(case, kind, model_folder, tmp_path):
    base = model_folder
    if kind != "embedded's":
        base, tokenizer = tmp_path / "base", byte_tokenizer(chat() if kind == "begin" else None, before=True)
        tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(base)
        tokenizer.save_pretrained(base)
    name, kept = case.split(" ")[0], {"max_prompt_length": 1900, **ASKED[case]}  # of bytes a prompt takes many
    task = NESTED if name == "nested" else tasks.get(name)
    task = replace(task, wording=wording_of(task))
    model = tmp_path / "model"
    shutil.copytree(base, model)
    models.load_tokenizer(str(base), True).save_pretrained(model)
    GenerationConfig(do_sample=False, max_new_tokens=kept.get("max_response_length", 16)).save_pretrained(model)
    own.write_task(model / own.FILE, task, files=False)
    model_options.write(model, kept)
    asked = snippets.Asked(
        kept.get("use_CoT", False), kept.get("answer_space", "labels"), kept.get("number_answer", "mean")
    )
    code = snippets.of_language_model(str(model), task, AutoTokenizer.from_pretrained(model), asked)
    printed = run_snippet(code)
    classifier = Classifier(str(model))
    text = dict.fromkeys(task.fields, snippets.TEXT)
    (label,), probabilities = classifier.predict([text])
    if case in ("SST", "MNLI-m"):
        found = eval(printed)
        assert list(found) == list(task.labels) and max(found, key=found.get) == label
        assert list(found.values()) == pytest.approx(probabilities[0].tolist(), abs=1e-4)
        assert len(code.splitlines()) <= 16
    elif case == "STS-B":
        assert float(printed) == pytest.approx(label, abs=1e-3)
    elif name == "STS-B":
        assert float(printed) == label
    elif kept.get("answer_space") == "free":
        (answer,) = classifier.answer([{"id": 0, **text, "label": None}])
        said = re.sub(r"<\|im_\w+\|>", "", answer.text)  # of a model that knows no better
        said = said.rpartition("<Judgement>")[2] if kept.get("use_CoT") else said
        assert printed == said.partition("</Judgement>")[0].strip()
    else:
        assert printed == label


# -------------------------------------------------------------------------------------------------------------- a head


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["SST", "STS-B"])
def test_a_classification_head_is_a_folder_for_transformers(name, full, model_folder, tmp_path, capsys):
    run = tmp_path / "run"
    classify.main(options(model_folder, FIXTURES, run, task=name, batch_sentence_num=2, max_steps=2,
                          full_finetuning=full))  # fmt: skip
    folder = tmp_path / "exported"
    export.main(["--checkpoint", str(run / "best"), "--output_dir", str(folder)])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    task = tasks.get(name)
    assert model.config.num_labels == (len(task.labels) or 1)
    assert task.number or model.config.id2label == dict(enumerate(task.labels))
    found = []
    for number, checkpoint in enumerate((run / "best", folder)):
        answered = tmp_path / str(number)
        classify.main(options(checkpoint, FIXTURES, answered, task=name, split="validation"))
        found.append([json.loads(line) for line in (answered / "predictions.jsonl").read_text().splitlines()])
    for before, after in zip(*found, strict=True):
        assert (before["label"] == after["label"]) or before["label"] == pytest.approx(after["label"], abs=2e-3)
    card = (folder / "README.md").read_text()
    printed = run_snippet(card.split("```python\n")[1].split("```")[0])
    answers = eval(printed)
    assert {a["label"] for a in answers} == ({"LABEL_0"} if task.number else set(task.labels))
    assert "classification head, which answers no prompts" in refused(
        capsys, inference.main, "--from_local", "True", "--train_model_name", folder, "--text", "a"
    )


# ------------------------------------------------------------------------------------------------------- the whole way


def bash(*command: str, cwd: Path) -> str:
    result = subprocess.run(["bash", *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_from_a_table_to_answers_in_four_commands(tmp_path):
    labels = ("billing", "bug report", "praise")
    words = (("invoice", "refund"), ("crash", "error"), ("great", "thanks"))
    rows = [f'{labels[i % 3]},"{words[i % 3][i // 3 % 2]}, ticket {i}: ""häh?"""' for i in range(300)]
    (tmp_path / "tickets.csv").write_bytes(("\ufefflabel,text\r\n" + "\r\n".join(rows) + "\r\n").encode())
    scripts, runs = ROOT / "scripts", tmp_path / "model"
    tiny = ["--max_steps", "1", "--batch_sentence_num", "4", "--eval_size", "8", "--report_to", "none"]
    bash(scripts / "ppo.sh", "--data_path", "tickets.csv", *tiny, "--output_dir", runs / "run", cwd=tmp_path)
    subprocess.run([sys.executable, ROOT / "report.py", "--runs", runs], cwd=tmp_path, check=True, timeout=300)
    bash(scripts / "export.sh", "--checkpoint", runs / "run" / "best", "--output_dir", "exported", cwd=tmp_path)
    said = bash(scripts / "inference.sh", "--from_local", "True", "--train_model_name", "exported",
                "--text", "the app crashes", "--text", "thanks!", cwd=tmp_path)  # fmt: skip
    lines = [line.split("\t") for line in said.splitlines()[-2:]]
    assert [line[2] for line in lines] == ["the app crashes", "thanks!"]
    assert all(line[0] in labels and 1 / 3 <= float(line[1]) <= 1 for line in lines)
    assert (tmp_path / "report" / "report.html").is_file()
    for name in ("task.yaml", "README.md", "config.json"):
        assert str(tmp_path) not in (tmp_path / "exported" / name).read_text()
