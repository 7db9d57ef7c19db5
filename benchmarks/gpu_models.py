"""What the measurements of run.sh gpu compute on: models of published shapes with random weights, and the card."""

import json
import sys
import time
from contextlib import contextmanager

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import common
from engine import models

# The embedded tokenizer's ids are below all of these vocabularies.
SHAPES = {
    "tiny": dict(
        kind="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=49152, tie_word_embeddings=True,
    ),
    "135M": dict(
        kind="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    ),
    "1.5B": dict(
        kind="qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    ),
    "7B": dict(
        kind="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    ),
}  # fmt: skip
NAMES = {"tiny": "a tiny Llama", "135M": "SmolLM2-135M", "1.5B": "Qwen2.5-1.5B", "7B": "Qwen2.5-7B"}
RATE_SIZES, RATE_TRIES = (4096, 8192), 10


def random_model(shape: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """A model of this shape, in eval mode where models.load_model puts one, and in its number format."""
    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(settings.pop("kind"), **settings, max_position_embeddings=8192)
    torch.manual_seed(0)
    with torch.device(models.device()):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        )
    return model.eval()


@contextmanager
def in_place_of_loading(shape: str):
    """In here every model that is loaded is a random one of this shape."""
    before, models.load_model = models.load_model, lambda *names, **more: random_model(shape)
    try:
        yield
    finally:
        models.load_model = before


def wait() -> None:
    """Until the card has done all it was given; a clock is read after that."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_rate() -> float:
    """Operations per second of torch.mm, bfloat16 on a card and float32 on a CPU: the best of some sizes and tries."""
    card = torch.cuda.is_available()
    best = 0.0
    for size in RATE_SIZES if card else (512,):
        a = torch.rand(size, size, device=models.device()).to(torch.bfloat16 if card else torch.float32)
        for _ in range(RATE_TRIES):
            wait()
            began = time.perf_counter()
            torch.mm(a, a)
            wait()
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def peak_memory() -> int:
    """Bytes at most since `forget_peak`: on a card what torch has allocated, else of the whole process so far."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else common.peak_memory_bytes()


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def say(**figures) -> None:
    """One measurement, as a line of JSON that gpu.py reads; the process may be ended after any of them."""
    print(json.dumps(figures), flush=True)


def reason(error: BaseException) -> str:
    """An error in a line, short enough for a table."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
