"""A trained model as one plain Hugging Face folder: adapters merged, safetensors, configuration and tokenizer.

What is written is loaded again with transformers alone and compared with the model in memory before it counts.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from engine import classifier, models
from engine.folders import head_labels, write_head
from machine.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = 1e-4  # relative, of logits in float32 before and after the round trip through the files


@dataclass(frozen=True)
class Exported:
    """What was written."""

    tokenizer: PreTrainedTokenizerBase
    base: str  # name or folder, as the adapter records it
    dtype: str
    parameters: int


def write_language_model(
    name: str, folder: Path, dtype: str = "", max_new_tokens: int = 16, trust_remote_code: bool = False
) -> Exported:
    """Write a whole model, or an adapter (with those below it) merged into its base, into a folder that exists.

    dtype: of the weights; "": that of the base's own files. The merge itself is in float32. max_new_tokens: of greedy
    answers, as the generation configuration says. A value head is not written. Raises ModelError; CheckpointError.
    """
    tokenizer = models.load_tokenizer(name, True, trust_remote_code)
    stored = _stored_dtype(name, trust_remote_code)
    model = models.load_model(name, True, dtype=torch.float32, trust_remote_code=trust_remote_code)
    models.add_tokens(model, tokenizer, name, True, trust_remote_code)
    untie(model)
    model.generation_config = _greedy(model, tokenizer, max_new_tokens)
    _write(model, tokenizer, folder, DTYPES[dtype] if dtype else stored)
    about = Exported(tokenizer, models.base_name(name, True), dtype or str(stored).split(".")[-1], _size(model))
    _compare(model, folder, AutoModelForCausalLM, trust_remote_code)
    return about


def write_classifier(name: str, folder: Path, task: str, trust_remote_code: bool = False) -> Exported:
    """Write a head that classify.py trained, and its model, as an AutoModelForSequenceClassification in float32.

    Labels are named in its configuration (id2label). Raises ModelError; CheckpointError.
    """
    labels, tokenizer = head_labels(Path(name)), classifier.load_tokenizer(name, True, trust_remote_code)
    model, _ = classifier.load(name, True, trust_remote_code, labels, tokenizer)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.config.problem_type = "single_label_classification" if labels else "regression"
    _write(model, tokenizer, folder, torch.float32)
    write_head(folder, task, labels)  # by which classify.py knows it
    about = Exported(tokenizer, models.base_name(name, True), "float32", _size(model))
    _compare(model, folder, AutoModelForSequenceClassification, trust_remote_code)
    return about


def untie(model: PreTrainedModel) -> None:
    """Say so in the configuration if embeddings and output layer, one tensor in the base, are two by now: an adapter
    that trained one of them made it a copy, and files written as tied would keep one for both."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embeddings.weight or torch.equal(head.weight, embeddings.weight):
        return
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def _stored_dtype(name: str, trust_remote_code: bool) -> torch.dtype:
    """The number format of the base's files. ModelError if they are quantized: nothing can be merged into those."""
    base, _ = models.adapter_chain(name, True)
    with models.clear_errors(name), models.quiet():
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"the files of {base} are quantized, and an adapter cannot be merged into them without loss; train on the "
            "model they were made from"
        )
    found = config.dtype or getattr(config.get_text_config(), "dtype", None)
    return found if found in DTYPES.values() else torch.float32


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Generation as evaluation does it: greedy, with the base's ends of a text."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends]) | {tokenizer.eos_token_id}
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    for weight in model.parameters():  # and no buffers: rotary frequencies, which no file holds, stay exact
        weight.data = weight.data.to(dtype)
    with models.quiet():
        model.config.dtype = model.config.get_text_config().dtype = dtype
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _size(model: PreTrainedModel) -> int:
    return sum(weight.numel() for weight in model.parameters())


@torch.no_grad()
def _compare(model: PreTrainedModel, folder: Path, kind: type, trust_remote_code: bool) -> None:
    """ModelError unless transformers loads the folder with the model's own logits."""
    size = min(model.get_input_embeddings().num_embeddings, 1000)
    ids = torch.tensor([[(7 * i + 3) % size for i in range(12)]])
    expected = model.float()(ids.to(model.device)).logits.cpu()
    model.to("cpu")
    with models.quiet():
        written = kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
    found = written(ids).logits
    error = float((found - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise ModelError(
            f"transformers loads what was written with other logits (off by {error:.0e} of their size); this model "
            "cannot be exported"
        )
