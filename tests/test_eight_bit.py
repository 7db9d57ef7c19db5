"""8-bit and 4-bit weights of the base model, on a CPU: what is computed, what is trained, and what is refused."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from conftest import tiny_model, with_lora, word_tokenizer
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from safetensors.torch import load_file
from torch import nn

import inference
import ppo
import sft
from engine import lora, models, quantized
from engine.engine import Engine
from engine.loading import check
from machine.errors import ModelError
from run.arguments import Arguments, parse
from run.history import history

SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1)
ERROR = {8: 0.03, 4: 0.3}  # of the states of two layers, to float32's
LAYERS = {8: (bnb.nn.Linear8bitLt, Linear8bitLt), 4: (bnb.nn.Linear4bit, Linear4bit)}
both = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved random model with the embedded model's tokenizer."""
    path, tokenizer = tmp_path_factory.mktemp("model"), models.load_tokenizer(models.EMBEDDED)
    tokens = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048, **SIZES, **tokens).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def dequantized(model: nn.Module) -> nn.Module:
    """Give a model's quantized layers plain ones' weights, in place: what it should compute, by torch alone."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
            weight, factors = layer.forward.weight(torch.float32)
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight.data = weight if factors is None else weight * factors[:, None]
            if layer.bias is not None:
                plain.bias.data = layer.bias.data
            model.set_submodule(name, plain.requires_grad_(False))
    model.is_loaded_in_8bit = model.is_loaded_in_4bit = False
    return model


def states(model: nn.Module, rows: list[list[int]]) -> torch.Tensor:
    return model.base_model(torch.tensor(rows), use_cache=False).last_hidden_state


# ------------------------------------------------------------------------------------------------- what is computed


@both
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_layers_compute_with_their_stored_weights(kind, bits, tmp_path):
    sizes = dict(n_embd=64) if kind == "gpt2" else SIZES
    plain = tiny_model(kind, **sizes)
    plain.save_pretrained(tmp_path)
    model = models.load_model(str(tmp_path), True, bits=bits)
    assert {type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)} == {LAYERS[bits][0], nn.Linear}
    assert type(model.get_output_embeddings()) is nn.Linear
    rows = [[5, 9, 12, 30, 7, 21], [11, 3, 8, 17, 6, 40]]
    with torch.no_grad():
        found, exact = states(model, rows), states(plain, rows)
        assert 0 < float((found - exact).norm() / exact.norm()) < ERROR[bits]
        # Another batch changes nothing, which is not so where activations are rounded.
        assert torch.allclose(states(model, rows[:1]), found[:1], atol=1e-5)
        assert torch.allclose(states(model.train(), rows), found, atol=1e-5) or kind == "gpt2"
        assert torch.allclose(states(dequantized(model), rows), found, atol=1e-5)


@both
def test_gradients_are_those_of_the_stored_weights(bits, folder):
    gradients, direction = [], torch.randn(64, generator=torch.Generator().manual_seed(0))
    for plain in (False, True):
        model = models.load_model(str(folder), True, bits=bits)
        model = with_lora(dequantized(model) if plain else model)
        states(model.get_base_model(), [[5, 9, 12, 30, 7, 21]]).mul(direction).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 28
    for name, gradient in gradients[0].items():
        assert float((gradient - gradients[1][name]).norm()) < 1e-4 * float(gradients[1][name].norm()), name


@both
def test_the_fast_path_fits(bits, folder):
    model = models.load_model(str(folder), True, bits=bits)
    assert check(Engine(model, word_tokenizer())) is None
    assert check(Engine(with_lora(model), word_tokenizer())) is None


@both
def test_lora_layers_stay_peft_s_own(bits, folder):
    model = with_lora(models.load_model(str(folder), True, bits=bits))
    layers = [layer for layer in model.modules() if isinstance(layer, LAYERS[bits][1])]
    assert len(layers) == 14 and lora.fuse(model) == 0 and not any("forward" in vars(layer) for layer in layers)


# --------------------------------------------------------------------------------------------------- what is trained


def options(folder: Path, data_root: Path, **more) -> list[str]:
    given = {"task": "SST", "data_path": data_root, "train_model_name": folder, "from_local": True, "eval_size": 8}
    given |= {"report_to": "none", "batch_sentence_num": 8, **more}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


STEPS = dict(save_methods="step", save_freq=1)


@pytest.fixture(scope="module")
def trained(folder, data_root, tmp_path_factory) -> Path:
    """The folder of a PPO run of three steps on 8-bit weights."""
    path = tmp_path_factory.mktemp("runs") / "ppo"
    ppo.main(options(folder, data_root, load_in_8bit=True, max_steps=3, output_dir=path, **STEPS))
    return path


def adapter(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


def answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "predictions.jsonl").read_text().splitlines()]


def test_ppo_trains_and_goes_on(trained, folder, data_root, tmp_path):
    begun = tmp_path / "begun"
    ppo.main(options(folder, data_root, load_in_8bit=True, max_steps=3, output_dir=begun, **STEPS))
    for late in ("step-3", "best"):
        shutil.rmtree(begun / late, ignore_errors=True)
    (begun / "summary.json").unlink()
    ppo.main(["--resume", str(begun), "--report_to", "none"])
    for name, weight in adapter(trained / "step-3").items():
        assert torch.equal(adapter(begun / "step-3")[name], weight), name
    first = adapter(trained / "step-1")
    assert any(not torch.equal(first[name], weight) for name, weight in adapter(trained / "step-3").items())
    assert all("objective/accuracy" in line for line in history(begun) if "policy/loss" in line)


@pytest.mark.parametrize("how", [dict(policy_gradient="sampled", repeat_time=2), dict(load_in_4bit=True)])
def test_other_ways_of_ppo(how, folder, data_root, tmp_path):
    given = {"load_in_8bit": "load_in_4bit" not in how, "max_steps": 1, "output_dir": tmp_path / "run", **how}
    ppo.main(options(folder, data_root, **given))
    (step,) = [line for line in history(tmp_path / "run") if "policy/loss" in line]
    assert step.get("policy/ratio", 1.0) == pytest.approx(1.0, abs=1e-5) and step["policy/grad_norm"] > 0


def test_sft_trains(folder, data_root, tmp_path):
    sft.main(options(folder, data_root, load_in_8bit=True, max_steps=1, output_dir=tmp_path / "run"))
    assert (tmp_path / "run" / "best" / "adapter_model.safetensors").exists()


def test_the_adapter_answers_on_8_bit_and_on_plain_weights(trained, folder, data_root, tmp_path):
    assert json.loads((trained / "best" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    for name, bits in (("eight", True), ("plain", False)):
        given = dict(train_model_name=trained / "best", load_in_8bit=bits, output_dir=tmp_path / name)
        inference.main(options(folder, data_root, **given))
        assert json.loads((tmp_path / name / "summary.json").read_text())["method"] == "trained"
        assert len(answers(tmp_path / name)) == 8


def test_zero_shot_answers(trained, folder, data_root, tmp_path):
    """They are those of the run's evaluation before training, free ones too."""
    inference.main(options(folder, data_root, load_in_8bit=True, output_dir=tmp_path / "labels"))
    before = (trained / "predictions-before.jsonl").read_text().splitlines()
    assert [a["answer"] for a in answers(tmp_path / "labels")] == [json.loads(line)["answer"] for line in before]
    free = options(folder, data_root, load_in_8bit=True, answer_space="free", eval_size=2, output_dir=tmp_path / "free")
    inference.main(free)
    assert len(answers(tmp_path / "free")) == 2


@both
def test_an_adapter_is_merged_before_the_weights_are_quantized(bits, trained):
    merged = models.load_model(str(trained / "best"), True)
    with torch.no_grad():  # what an adapter of three steps changes is less than rounding
        for parameter in merged.parameters():
            parameter.mul_(1.5)
    weights = {name: weight.clone() for name, weight in merged.state_dict().items()}
    model = dequantized(prepared(quantized.quantize(merged, bits)))
    for name, weight in model.state_dict().items():
        error = float((weight - weights[name]).norm() / weights[name].norm())
        assert error < (quantized.LARGEST_ERROR[bits] if "_proj" in name else 1e-6), name
    started = dequantized(models.load_model(str(trained / "best"), True, bits=bits))
    exact = models.load_model(str(trained / "best"), True).state_dict()
    for name, weight in started.state_dict().items():
        assert float((weight - exact[name]).norm() / exact[name].norm()) < quantized.LARGEST_ERROR[bits], name


def prepared(model: nn.Module) -> nn.Module:
    quantized.prepare(model, "model")
    return model


def test_training_goes_on_from_an_adapter(trained, folder, data_root, tmp_path):
    given = dict(train_model_name=trained / "best", load_in_8bit=True, max_steps=1, output_dir=tmp_path / "run")
    ppo.main(options(folder, data_root, **given))
    assert (tmp_path / "run" / "best" / "start" / "adapter_model.safetensors").exists()
    models.load_model(str(tmp_path / "run" / "best"), True, bits=8)


# --------------------------------------------------------------------------------------------------- what is refused


def refused(capsys, *given: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        ppo.main(list(given))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1, said
    return said


def test_8_and_4_bits_exclude_each_other(capsys):
    said = refused(capsys, "--report_to", "none", "--load_in_8bit", "True", "--load_in_4bit", "True")
    assert "--load_in_8bit True and --load_in_4bit True exclude each other" in said


@both
def test_without_bitsandbytes_it_is_named(bits, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: find(name, *a) if name != "bitsandbytes" else None
    )
    said = refused(capsys, "--report_to", "none", f"--load_in_{bits}bit", "True")
    assert f"--load_in_{bits}bit True needs the package bitsandbytes: pip install bitsandbytes" in said


@pytest.mark.parametrize(("bits", "broken"), [(8, "int8_vectorwise_quant"), (4, "dequantize_4bit")])
def test_wrong_kernels_are_refused(bits, broken, folder, monkeypatch):
    """As of one that gives zeros."""
    right = getattr(bnb.functional, broken)

    def zeros(*args, **kwargs):
        found = right(*args, **kwargs)
        return (found[0] * 0, *found[1:]) if isinstance(found, tuple) else found * 0

    monkeypatch.setattr(bnb.functional, broken, zeros)
    with pytest.raises(ModelError, match=rf"--load_in_{bits}bit True: bitsandbytes computes wrong .* error of 100%"):
        models.load_model(str(folder), True, bits=bits)


def test_the_published_scripts_word_is_understood(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo.py"])
    for word, bits in (("False", 0), ("True", 8)):
        arguments = parse(Arguments, "", ["--report_to", "none", "--load_in_8bit", word])
        assert arguments.model_options["bits"] == bits
