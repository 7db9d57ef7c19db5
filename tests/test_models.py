"""Loading models: code that comes with one is run only when that was asked for."""

import json

import pytest
from conftest import tiny_model, word_tokenizer

from engine import models
from machine.errors import ModelError

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_is_run_only_if_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tmp_path / "model", tmp_path / "was-run"
    tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="--trust_remote_code True if you trust it"):
        models.load_model(str(folder), from_local=True)
    assert not marker.exists()
    model = models.load_model(str(folder), from_local=True, trust_remote_code=True)
    assert marker.exists() and type(model).__name__ == "OwnModel"
