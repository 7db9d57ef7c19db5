"""What is refused before anything is trained or asked: too long a prompt for the model, and labels spelled alike."""

from dataclasses import replace

import pytest
from conftest import tiny_model, word_tokenizer

import ppo
import sft
import tasks
from engine.loading import check_length
from evaluation import answer_spaces
from machine.errors import ModelError


def test_labels_that_the_tokenizer_spells_alike_are_named(tokenizer):
    task = replace(tasks.get("MentalHealth"), labels=("Yes", "Calm", "Low"), words=("yes", "calm", "low"))
    with pytest.raises(ModelError, match="spells the label 'low' of MentalHealth like 'calm'"):
        answer_spaces.label_trie(task, tokenizer)
    with pytest.raises(ModelError, match="'  ' of MentalHealth as no token at all"):
        answer_spaces.label_trie(replace(task, words=("yes", "no", "  ")), tokenizer)
    assert len(answer_spaces.label_trie(replace(task, words=("yes", "no", "maybe")), tokenizer).spellings) == 3


def test_more_tokens_than_the_model_can_read():
    model = tiny_model(max_position_embeddings=128)
    check_length(model, "tiny", 128)
    with pytest.raises(ModelError, match="--max_prompt_length and --max_response_length make 129 tokens, more than"):
        check_length(model, "tiny", 129)
    check_length(tiny_model("mpt"), "tiny", 128)
    with pytest.raises(ModelError, match="more than the 128 tokens"):
        check_length(tiny_model("mpt"), "tiny", 129)  # it has as many distances, and fails beyond them


@pytest.mark.parametrize("program", [ppo, sft])
def test_training_refuses_too_long_a_prompt_before_it_writes_anything(
    program, model_folder, data_root, tmp_path, capsys
):
    argv = ["--task", "SST", "--data_path", str(data_root), "--from_local", "True", "--report_to", "none"]
    argv += ["--train_model_name", str(model_folder), "--output_dir", str(tmp_path / "run"), "--max_prompt_length"]
    with pytest.raises(SystemExit) as end:
        program.main([*argv, "2040"])
    assert end.value.code == 2
    assert "make 2056 tokens, more than the 2048 tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", [ppo, sft])
def test_training_refuses_labels_that_the_tokenizer_spells_alike(program, data_root, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)  # it knows neither "negative" nor "positive"
    argv = ["--task", "SST", "--data_path", str(data_root), "--from_local", "True", "--report_to", "none"]
    argv += ["--train_model_name", str(folder), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        program.main(argv)
    assert end.value.code == 2
    assert "spells the label 'positive' of SST like 'negative'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
