"""Tiny random models and a tokenizer of a few words, for every test that needs a network but not its knowledge."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.attention import flex_attention
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from engine import flex
from engine.models import lora_config

# The real files of the tasks; they are other people's text, and a test that reads them skips where they are absent.
ORIGINALS = Path(os.environ.get("NLU_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

torch.set_num_threads(1)  # more only cost time on models of this size

SPECIAL = ("<pad>", "<eos>", "<unk>")
WORDS = (
    "no",
    "yes",
    "maybe",
    "not",
    "at",
    "all",
    "very",
    "good",
    "bad",
    "red",
    "blue",
    "Text:",
    "Answer:",
    *(f"w{i}" for i in range(32)),
)
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
PAD, EOS = VOCABULARY["<pad>"], VOCABULARY["<eos>"]
SIZE = len(VOCABULARY)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, words between spaces."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=512
    )


# Large weights: every token of a prompt must matter to its answer, or a wrong mask would not show.
BASE = dict(vocab_size=SIZE, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None, tie_word_embeddings=False)
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=0.3)
GPT2_SIZES = dict(
    n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)


def tiny_model(kind: str = "llama", seed: int = 0, **changes) -> torch.nn.Module:
    """A random causal language model with two layers, in float32 and eval mode, the same for the same seed."""
    torch.manual_seed(seed)
    if kind == "llama":  # with grouped keys and values
        model = LlamaForCausalLM(LlamaConfig(**{**BASE, **SIZES, "num_key_value_heads": 2, **changes}))
    elif kind == "qwen2":  # biases on queries, keys and values
        model = Qwen2ForCausalLM(Qwen2Config(**{**BASE, **SIZES, "num_key_value_heads": 2, **changes}))
    elif kind == "neox":  # attention beside the feed-forward layer, rotation of a quarter
        dropout = dict(attention_dropout=0.0, hidden_dropout=0.0)
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**BASE, **SIZES, **dropout, "rotary_pct": 0.5, **changes}))
    elif kind == "gpt2":  # learned positions
        model = GPT2LMHeadModel(GPT2Config(**{**BASE, **GPT2_SIZES, **changes}))
    else:  # "mpt": positions by ALiBi, which has no position ids
        sizes = dict(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=128)
        model = MptForCausalLM(MptConfig(**{**BASE, **sizes, "initializer_range": 0.3, **changes}))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model.eval()


def with_lora(model: torch.nn.Module, seed: int = 1, zero: bool = False, **changes) -> torch.nn.Module:
    """`model` with an adapter on every linear layer; not at its start (where it does nothing) unless `zero`."""
    torch.manual_seed(seed)
    model = get_peft_model(model, lora_config(**{"r": 4, "lora_alpha": 8, **changes}))
    if not zero:
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


def plain_label_log_probs(model, prompt: list[int], spellings: list[list[int]], temperature: float = 1.0):
    """(labels,) log-probabilities with gradient, by enumeration: each label's whole sequence in a forward of its own.

    spellings: of all labels, with the token that closes them.
    """
    causal_lm, totals = model.get_base_model(), []
    for spelling in spellings:
        hidden = causal_lm.base_model(torch.tensor([prompt + spelling])).last_hidden_state[0, len(prompt) - 1 : -1]
        total = 0.0
        for t, token in enumerate(spelling):
            allowed = sorted({other[t] for other in spellings if other[:t] == spelling[:t] and len(other) > t})
            logits = causal_lm.get_output_embeddings()(hidden[t])[allowed] / temperature
            total = total + torch.log_softmax(logits, -1)[allowed.index(token)]
        totals.append(total)
    return torch.stack(totals)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def as_on_a_card(monkeypatch):
    """Packed rows attend by flex_attention, as torch defines it, without compiling. It refuses gradients on a CPU,
    though its definition has them, and the meta device."""
    monkeypatch.setattr(flex, "serves", lambda device: True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder with a random model of two layers that reads and writes with the embedded model's tokenizer."""
    from engine.models import EMBEDDED, load_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("model"), load_tokenizer(EMBEDDED)
    model = tiny_model(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A data root with one task, SST: 48 made-up training rows and 12 to evaluate on."""
    folder = tmp_path_factory.mktemp("data") / "GLUE" / "SST"
    folder.mkdir(parents=True)
    words = (("dull", "slow", "cold", "weak", "grim"), ("warm", "bright", "funny", "lovely", "fine"))
    for name, size in (("train.tsv", 48), ("dev.tsv", 12)):
        rows = [f"a {words[i % 2][i % 5]} film, {name[0]}{i} \t{i % 2}" for i in range(size)]
        (folder / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder.parents[1]
