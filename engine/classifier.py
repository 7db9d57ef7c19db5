"""A model with a classification head in place of its output layer: loaded, trained further, saved and asked.

`transformers.AutoModelForSequenceClassification` decides what a head is: a linear layer on the last token that is not
padding (Llama-like decoders, GPT-2), on the pooled first token (BERT), or two layers (RoBERTa). A new head's weights
are those that transformers initialises: normal with the configuration's initializer_range, biases 0.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from engine import loading, models
from engine.batches import micro_batches
from engine.folders import ADAPTER_CONFIG, EMBEDDED, HEAD
from machine import manifests
from machine.errors import ModelError


@dataclass
class Classifier:
    """A model with a head, and how it is asked: in padded batches of at most so many tokens, in this data type."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    tokens_per_batch: int
    dtype: torch.dtype = torch.float32  # that it computes in

    @torch.no_grad()
    def logits(self, inputs: list[dict[str, list[int]]]) -> torch.Tensor:
        """What the tokenizer makes of the rows -> (rows, labels) float32 on the CPU, in the order of the rows."""
        pad, device = DataCollatorWithPadding(self.tokenizer), next(self.model.parameters()).device
        found: list = [None] * len(inputs)
        for batch in micro_batches([len(row["input_ids"]) for row in inputs], self.tokens_per_batch):
            padded = pad([inputs[i] for i in batch]).to(device)
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits = self.model(**padded).logits
            for i, row in zip(batch, logits.float().cpu()):
                found[i] = row
        return torch.stack(found)


def base_and_adapter(name: str, from_local: bool) -> tuple[str, Path | None]:
    """The name or folder of the model below, and the folder of a trained head's adapter, if `name` is one.

    Raises ModelError for an adapter without a head.
    """
    folder = Path(name)
    if not from_local:
        return models.adapter_chain(name, False)[0], None
    if not (folder / ADAPTER_CONFIG).exists():
        return name, None
    if not (folder / HEAD).exists():
        raise ModelError(
            f"--train_model_name {name} is a language model's adapter, on which no head is trained; give the model "
            f"that it was trained on ({models.base_name(name, True)})"
        )
    base = models.base_name(name, True)
    return str(models.embedded_folder()) if base == EMBEDDED else base, folder


def load_tokenizer(name: str, from_local: bool, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which pads on the right. Raises ModelError if it has nothing to pad with."""
    base, _ = base_and_adapter(name, from_local)
    with models.clear_errors(name), models.quiet():
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {name} has neither a padding nor an end token; choose another model")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def length_limit(name: str, from_local: bool, trust_remote_code: bool, tokenizer: PreTrainedTokenizerBase) -> float:
    """The tokens that a model can read; infinity if neither it nor its tokenizer says. Raises ModelError."""
    base, _ = base_and_adapter(name, from_local)
    with models.clear_errors(name), models.quiet():
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    # Of RoBERTa's 514 positions two are no tokens', as only its tokenizer knows.
    return min(loading.length_limit(config) or math.inf, tokenizer.model_max_length)


def load(
    name: str,
    from_local: bool,
    trust_remote_code: bool,
    labels: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel | PeftModel, list[str]]:
    """The model in eval mode on its device, and the names of its modules that are new (random).

    labels: names of the classes; none: one output, a number. A head whose size is another is replaced by a new one.
    A trained head's adapter stays an adapter. Raises ModelError.
    """
    base, adapter = base_and_adapter(name, from_local)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    with models.clear_errors(name), models.quiet():
        model, report = AutoModelForSequenceClassification.from_pretrained(
            base,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            num_labels=len(labels) or 1,
            **(names if labels else {}),
        )
        if adapter is not None:
            manifests.verify(adapter)
            model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    # Both: Llama-like models look for the last token that is not padding by it.
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if adapter is None:
        # The checkpoints name the base as the user did, not by this machine's cache folder.
        model.name_or_path = model.config._name_or_path = name
    new = {_module_of(key, model.base_model_prefix) for key in report["missing_keys"]}
    new |= {_module_of(key, model.base_model_prefix) for key, *_ in report["mismatched_keys"]}
    return model.to(models.device()).eval(), sorted(new)


def _module_of(weight: str, backbone: str) -> str:
    """The head's part that a weight belongs to (classifier.dense.bias: classifier; in the backbone its layer)."""
    first, *rest = weight.split(".")
    return first if first != backbone else ".".join([first, *rest[:-1]])


def with_new_adapter(model: PreTrainedModel, new: list[str], **settings) -> PeftModel:
    """The model with LoRA on every linear layer of its blocks; its `new` modules and its head are trained whole.

    settings: of LoraConfig. Raises ArgumentError for target modules that the model does not have.
    """
    if settings.get("target_modules", "all-linear") != "all-linear":
        models.check_targets(model, settings["target_modules"], models.linear_layers(model.base_model), [])
        settings["exclude_modules"] = "|".join(rf"{re.escape(name)}\..*" for name in new) or None
    config = models.lora_config(**{**settings, "task_type": "SEQ_CLS", "modules_to_save": list(new)})
    adapted = get_peft_model(model, config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return adapted
