"""How long prompts may be where --max_prompt_length does not say it."""

import json
import math
from pathlib import Path

import pytest
from conftest import tiny_model

import classify
import fewshot
import inference
import ppo
import sft
import tasks
from engine import models
from evaluation import prompt_length

TASK = tasks.get("BoolQ")
TRAINING = ("--max_steps", "1", "--batch_sentence_num", "4")


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ([100, 200], 2048, 512),
        ([100, 512], math.inf, 512),
        ([100, 513], 2048, 768),
        ([768], 2048, 768),
        ([769], 2048, 1024),
        ([100] * 98 + [700] * 2, 2048, 512),
        ([100] * 97 + [700] * 3, 2048, 768),
        ([100, 700], 600, 600),
        ([100], 240, 240),  # the model cannot read 512 tokens
        ([100] * 9000 + [3000] * 1000, math.inf, 3072),  # of so many rows 2,000 are measured
    ],
)
def test_the_default_length_by_hand(lengths, limit, expected, capsys):
    measured = []

    def measure(rows: list[dict]) -> list[int]:
        measured.append(len(rows))
        return [row["length"] for row in rows]

    rows = [{"length": length} for length in lengths]
    assert prompt_length.of_task(TASK, rows, measure, limit) == expected and measured == [min(len(rows), 2000)]
    said = capsys.readouterr().out
    assert said.count("\n") == (expected != 512)
    if expected != 512:
        assert f"BoolQ: --max_prompt_length is {expected}" in said and f"(the longest {max(lengths)})" in said
        assert ("the model reads no more" in said) == (expected == limit)


# ------------------------------------------------------------------------------------------------------ as scripts run


@pytest.fixture
def long_passages(tmp_path) -> Path:
    """BoolQ's files: 24 training rows and 8 to evaluate on, every fourth with a passage of 600 words."""
    for name, size in (("train", 24), ("val", 8)):
        rows = [
            {"idx": i, "passage": "river " * (20 if i % 4 else 600), "question": "is it long", "label": bool(i % 2)}
            for i in range(size)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def run(script, model: Path, data: Path, output: Path, *more: str) -> tuple[dict, list[int]]:
    """summary.json, and how often the passage's word stands in each row's prompt."""
    given = ["--task", "BoolQ", "--data_path", str(data), "--from_local", "True", "--report_to", "none"]
    script.main([*given, "--train_model_name", str(model), "--output_dir", str(output), *more])
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    return json.loads((output / "summary.json").read_text()), [line["prompt"].count("river") for line in lines]


WHOLE = [600, 20, 20, 20] * 2


@pytest.mark.parametrize(
    ("script", "options"),
    [(inference, ()), (ppo, TRAINING), (sft, TRAINING), (classify, TRAINING)],
    ids=["inference", "ppo", "sft", "classify"],
)
def test_scripts_read_long_passages_to_their_end(script, options, model_folder, long_passages, tmp_path, capsys):
    summary, words = run(script, model_folder, long_passages, tmp_path / "run", *options)
    assert summary["arguments"]["max_prompt_length"] == 768 and words == WHOLE
    assert "--max_prompt_length is 768" in capsys.readouterr().out


def test_each_of_several_tasks_has_its_own_length(model_folder, long_passages, tmp_path):
    data = tmp_path / "data"
    for name in ("BoolQ", "SuperGLUE/RTE"):
        (data / tasks.get(name).folder).mkdir(parents=True)
    (long_passages / "val.jsonl").rename(data / "SuperGLUE/BoolQ/val.jsonl")
    rows = [{"idx": i, "premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"} for i in range(2)]
    (data / "SuperGLUE/RTE/val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--task", "SuperGLUE/RTE,BoolQ", "--data_path", str(data), "--from_local", "True", "--report_to", "none"]
    inference.main([*given, "--train_model_name", str(model_folder), "--output_dir", str(tmp_path / "run")])
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "run").rglob("summary.json")]
    lengths = {summary["task"]: summary["arguments"]["max_prompt_length"] for summary in summaries}
    assert lengths == {"SuperGLUE/RTE": 512, "BoolQ": 768}


def test_an_interrupted_run_goes_on_with_the_length_that_it_had(model_folder, long_passages, tmp_path):
    folder = tmp_path / "run"
    run(inference, model_folder, long_passages, folder)
    whole = (folder / "predictions.jsonl").read_bytes()
    (folder / "summary.json").unlink()
    (folder / "predictions.jsonl").unlink()
    inference.main(["--resume", str(folder), "--report_to", "none"])
    assert (folder / "predictions.jsonl").read_bytes() == whole


@pytest.mark.parametrize("script", [inference, classify], ids=["inference", "classify"])
def test_an_explicit_length_stays_as_it_is(script, model_folder, long_passages, tmp_path, capsys):
    options = () if script is inference else TRAINING
    summary, words = run(script, model_folder, long_passages, tmp_path / "run", *options, "--max_prompt_length", "300")
    assert summary["arguments"]["max_prompt_length"] == 300 and max(words) < 300
    said = capsys.readouterr().out
    assert "--max_prompt_length is" not in said and "prompts were shortened to 300 tokens" in said


def test_demonstrations_keep_their_fixed_length(model_folder, long_passages, tmp_path):
    summary, _ = run(fewshot, model_folder, long_passages, tmp_path / "run", "--num_shots", "1")
    assert summary["arguments"]["max_prompt_length"] == 1536


@pytest.mark.parametrize(
    ("script", "expected"), [(inference, 240), (ppo, 240), (classify, 256)], ids=["inference", "ppo", "classify"]
)
def test_a_model_that_reads_little_gets_what_it_can_read(
    script, expected, model_folder, long_passages, tmp_path, capsys
):
    tokenizer, small = models.load_tokenizer(str(model_folder), True), tmp_path / "small"
    special = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=256, **special).save_pretrained(small)
    tokenizer.save_pretrained(small)
    options = () if script is inference else TRAINING
    summary, words = run(script, small, long_passages, tmp_path / "run", *options)
    assert summary["arguments"]["max_prompt_length"] == expected and max(words) < expected
    assert "and the model reads no more" in capsys.readouterr().out
