"""Adapter folders, which other programs write too: the base that one names, its own tokenizer, and how it is merged.

Whatever is wrong with one is a ModelError that names the file. Nothing is loaded in part: an adapter of which weights
are missing, or find no place in the base, would answer without a word.
"""

import json
import shutil
from pathlib import Path

import peft
import torch
from peft import PeftModel, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from engine.folders import ADAPTER_CONFIG
from machine import manifests
from machine.errors import ModelError

WEIGHTS = "adapter_model.safetensors"
START = "start"  # sub-folder of a checkpoint: the adapter that the trained one sits on
TEMPLATE = "chat_template.jinja"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
FILES = {ADAPTER_CONFIG, WEIGHTS, "adapter_model.bin", START}
FILES |= {*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"}


def chain(folder: Path) -> list[Path]:
    """The adapters that a folder stands for: those it was trained on top of first, itself last."""
    adapters = [folder]
    while (adapters[0] / START).is_dir():
        adapters.insert(0, adapters[0] / START)
    return adapters


def settings(folder: Path) -> dict:
    """What adapter_config.json says. ModelError if it is broken, or its adapter cannot be merged into a base."""
    path = folder / ADAPTER_CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}); take the folder's files from where they were written"
        ) from error
    kind = found.get("peft_type") if isinstance(found, dict) else None
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    if kind not in PeftType.__members__:
        raise ModelError(f"{path}: peft_type is {kind!r}, which peft {peft.__version__} does not know; correct it")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{path}: base_model_name_or_path is {base!r}; write the base model's name or folder there")
    if issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], PromptLearningConfig):
        raise ModelError(
            f"the adapter {folder} is of the type {kind}, which cannot be merged into its base; give a LoRA adapter or "
            "a whole model"
        )
    return found


def tokenizer_folder(adapters: list[Path]) -> Path | None:
    """The last adapter's folder that has a tokenizer of its own, if there is one."""
    return next((f for f in reversed(adapters) if any((f / name).exists() for name in VOCABULARIES)), None)


def chat_template(adapters: list[Path]) -> str | None:
    """The last adapter's own chat template, if it came without a tokenizer."""
    own = tokenizer_folder(adapters)
    for folder in reversed(adapters):
        if folder == own:
            return None
        if (folder / TEMPLATE).exists():
            return (folder / TEMPLATE).read_text(encoding="utf-8")
    return None


def copy(folder: Path, to: Path) -> None:
    """Copy an adapter, its tokenizer, and the adapters that it sits on."""

    def others(_, names: list[str]) -> set[str]:
        return {
            name for name in names if name not in FILES and name != "chat_templates" and Path(name).suffix != ".jinja"
        }

    shutil.copytree(folder, to, ignore=others, dirs_exist_ok=True)


def merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with an adapter merged into its weights. Raises ModelError; CheckpointError for a checkpoint of this
    program that is not what was written."""
    if (folder / manifests.FILE).exists():
        manifests.verify(folder)
    kind = settings(folder)["peft_type"]
    if (folder / WEIGHTS).exists():
        _fit_vocabulary(model, _shapes(folder / WEIGHTS))
    mapping = getattr(model, "_checkpoint_conversion_mapping", {})
    try:
        adapted = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
        # Once more, as only this says what was left over.
        result = adapted.load_adapter(folder, "default", autocast_adapter_dtype=False, key_mapping=mapping)
    except Exception as error:  # peft raises whatever its many kinds of adapters run into
        reason = str(error).strip().splitlines() or [type(error).__name__]
        more = f" {reason[1].strip()}" if len(reason) > 1 else ""
        raise ModelError(
            f"the adapter {folder} does not fit its base model ({reason[0].strip()}{more}); load it on the model that "
            "it was trained on"
        ) from error
    if result.missing_keys or result.unexpected_keys:
        lost, example = "lacks", (result.missing_keys or result.unexpected_keys)[0]
        if not result.missing_keys:
            lost = "has a weight that its base model has no place for:"
        raise ModelError(
            f"the adapter {folder} {lost} {example} ({len(result.missing_keys)} weights are missing, "
            f"{len(result.unexpected_keys)} are left over); it is not whole, or not of this base model"
        )
    try:
        return adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(
            f"the adapter {folder} is of the type {kind}, which cannot be merged into its base; give a LoRA adapter or "
            "a whole model"
        ) from error


def resize(model: PreTrainedModel, rows: int) -> None:
    """Give the model embeddings for so many tokens. A new token gets the mean of the others, until it is told more."""
    before = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if rows > before and layer is not None:
                layer.weight[before:] = layer.weight[:before].float().mean(0).to(layer.weight.dtype)


def _shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of a file's weights, by name. ModelError if the file was cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}); it was cut short or changed, take it from where it was written"
        ) from error


def _fit_vocabulary(model: PreTrainedModel, shapes: dict[str, list[int]]) -> None:
    """Resize the model if the adapter holds embeddings of another number of tokens: it was trained on such a model."""
    layers: list[nn.Module | None] = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    rows = set()
    for key, shape in shapes.items():
        for name in names:
            prefix, found, part = key.partition(f".{name}.")
            if found and prefix == "base_model.model":
                rows |= {shape[1]} if part == "lora_embedding_A" else {shape[0]} if part == "weight" else set()
                rows |= {shape[0]} if part == "lora_B.weight" and name == names[-1] else set()
    if len(rows) == 1 and rows != {model.get_input_embeddings().num_embeddings}:
        resize(model, rows.pop())
