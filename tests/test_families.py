"""A tiny random model of every family: the engine's answers, gradients and training steps against the plain forward.

docs/models.md has a row for each of them, which is held to what is found here.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import BASE, SIZE, tiny_model, with_lora, word_tokenizer
from datasets import Dataset
from test_engine import ENDS, PREFIX, error, plain_logits, tokens, trees_for
from test_ppo_trainer import make_trainer, noisy_reward
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from engine import models
from engine.engine import Engine
from engine.loading import check
from engine.output import Transform
from engine.trees import LabelTrie
from machine.errors import ModelError
from training import sampled_step
from training.sft_trainer import IGNORED, Finetuner, RunConfig, loss_type

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
LONG = 64  # tokens: more than any prompt here
SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,  # every token of a prompt must matter, or a wrong mask would not show
    max_position_embeddings=128,
)
HEADS = dict(SIZES, head_dim=8)
HALF = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=LONG)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
GPT = dict(n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **NO_DROPOUT)
FALCON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
EXPERTS = dict(HEADS, num_local_experts=4, num_experts_per_tok=2)

QKV, GATED = "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"
MOE = f"{QKV} gate experts"


@dataclass(frozen=True)
class Family:
    """kind: the configuration's `model_type`, and settings of it. path: that the check chooses on a CPU.
    beyond: the path where prompts are longer than the attention window, if there is one. lora: the adapted layers."""

    kind: str
    settings: dict = field(default_factory=lambda: SIZES)
    path: str = "packed"
    lora: str = f"{QKV} {GATED}"
    beyond: str | None = None

    def model(self, **changes) -> torch.nn.Module:
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.kind, **{**BASE, **self.settings, **changes})
        return AutoModelForCausalLM.from_config(config).float().eval()


FAMILIES = {
    "Llama": Family("llama"),
    "Qwen2": Family("qwen2", dict(SIZES, use_sliding_window=True, **HALF), beyond="padded"),
    "Qwen3": Family("qwen3", HEADS),
    "Qwen3-MoE": Family(
        "qwen3_moe", dict(HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32), lora=MOE
    ),
    "Mistral": Family("mistral", dict(HEADS, sliding_window=LONG), beyond="padded"),
    "Mixtral": Family("mixtral", EXPERTS, lora=MOE),
    "Gemma": Family("gemma", HEADS),
    "Gemma 2": Family(
        "gemma2",
        dict(HEADS, query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=2.0, **HALF),
        path="padded",
        beyond="padded",
    ),
    "Gemma 3": Family("gemma3_text", dict(HEADS, query_pre_attn_scalar=8, **HALF), beyond="padded"),
    "Phi": Family("phi", SIZES, lora="q_proj k_proj v_proj dense fc1 fc2"),
    "Phi3": Family(
        "phi3", dict(SIZES, sliding_window=LONG), lora="qkv_proj o_proj gate_up_proj down_proj", beyond="padded"
    ),
    "GPT-NeoX": Family("gpt_neox", SIZES, lora="query_key_value dense dense_h_to_4h dense_4h_to_h"),
    "GPT-2": Family("gpt2", GPT, lora="c_attn c_proj c_fc"),
    "GPT-J": Family("gptj", dict(GPT, rotary_dim=4), path="padded", lora="q_proj k_proj v_proj out_proj fc_in fc_out"),
    "OPT": Family(
        "opt",
        dict(SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, init_std=0.3),
        lora="q_proj k_proj v_proj out_proj fc1 fc2",
    ),
    "MPT": Family(
        "mpt",
        dict(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=128, initializer_range=0.3),
        lora="Wqkv out_proj up_proj down_proj",
    ),
    "BLOOM": Family(
        "bloom",
        dict(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
        lora="query_key_value dense dense_h_to_4h dense_4h_to_h",
    ),
    "Falcon": Family("falcon", FALCON, path="padded", lora="query_key_value dense dense_h_to_4h dense_4h_to_h"),
    "Falcon with ALiBi": Family(
        "falcon",
        dict(FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True),
        lora="query_key_value dense dense_h_to_4h dense_4h_to_h",
    ),
    "OLMo 2": Family("olmo2"),
    "OLMo 3": Family("olmo3", dict(SIZES, **HALF), beyond="padded"),
    "SmolLM3": Family("smollm3", dict(SIZES, no_rope_layers=[1, 0])),
    "StableLM": Family("stablelm", SIZES, path="padded"),
    "GLM4": Family("glm4", dict(HEADS, attention_bias=True), lora=f"{QKV} gate_up_proj down_proj"),
    "GPT-OSS": Family("gpt_oss", dict(EXPERTS, **HALF), path="padded", lora=QKV, beyond="padded"),
    "Cohere": Family("cohere", dict(SIZES, logit_scale=0.25)),
    "Granite": Family("granite", dict(SIZES, logits_scaling=4.0, attention_multiplier=0.35)),
    "Exaone4": Family("exaone4", dict(HEADS, **HALF), beyond="padded"),
}
CASES = [(name, False) for name in FAMILIES] + [(name, True) for name, family in FAMILIES.items() if family.beyond]
each_case = pytest.mark.parametrize(
    ("name", "beyond"), CASES, ids=[f"{name}, beyond its window" if beyond else name for name, beyond in CASES]
)
PROMPTS = [PREFIX + tokens(end) for end in ENDS[:4]]


def made(name: str, beyond: bool) -> tuple[torch.nn.Module, Engine]:
    """A model of the family with an adapter, and its engine, checked."""
    family = FAMILIES[name]
    model = with_lora(family.model(**(dict(sliding_window=5) if beyond else {})))
    engine = Engine(model, word_tokenizer())
    assert check(engine, LONG) is None
    return model, engine


def path(engine: Engine) -> str:
    return "plain" if engine.network.plain else "packed" if engine.network.packed else "padded"


@each_case
def test_path_probabilities_and_gradients_are_those_of_the_model_itself(name, beyond):
    model, engine = made(name, beyond)
    assert path(engine) == (FAMILIES[name].beyond if beyond else FAMILIES[name].path)
    trees = trees_for(PROMPTS)
    expected = plain_logits(model, PROMPTS, trees)
    # 1. All tokens at every node of the trees, and the labels right after the prompts.
    trie = LabelTrie([tokens("no"), tokens("not at all"), tokens("yes")], 1)
    for state, logits in zip(engine.states(PROMPTS, trees), expected):
        found = engine.logits(state)
        assert error(torch.log_softmax(found, -1), torch.log_softmax(logits, -1)) < 1e-4
        assert error(engine.logits(state, trie.vocabulary), logits[:, trie.vocabulary]) < 1e-4
    assert float(torch.cat(expected).std()) > 0.05  # the prompts matter
    # 2. The gradient, in one micro-batch and in several.
    torch.manual_seed(3)
    weights = [torch.randn(len(tree), SIZE) for tree in trees]

    def gradient(parts) -> torch.Tensor:
        for weight, logits in parts:
            (weight * torch.log_softmax(logits, -1)).sum().backward(retain_graph=True)
        found = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    wanted = gradient(zip(weights, expected))
    for budget in (10_000, 30):
        engine.tokens_per_micro_batch = budget
        for rows, states in engine.training_batches(PROMPTS, trees):
            logits = [engine.logits(state[: len(trees[i])]) for i, state in zip(rows, states)]
            sum((weights[i] * torch.log_softmax(x, -1)).sum() for i, x in zip(rows, logits)).backward()
        assert error(gradient([]), wanted) < 1e-4


@each_case
def test_two_ppo_steps_and_an_sft_step_run(name, beyond, tmp_path, monkeypatch):
    model, engine = made(name, beyond)
    # 1. PPO on free answers, whose old probabilities come from the token by token forward.
    ratios, surrogate = [], sampled_step.clipped_surrogate
    monkeypatch.setattr(sampled_step, "clipped_surrogate", lambda r, *rest: ratios.append(r) or surrogate(r, *rest))
    before = trained(model)
    config = dict(answer_space="free", policy_gradient="sampled", max_steps=2, samples_per_prompt=2)
    make_trainer(tmp_path, model, noisy_reward, config=config, engine=engine).train()
    assert float((ratios[0].detach() - 1).abs().max()) < 1e-4 and len(ratios) == 2
    after = trained(model)
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    # 2. SFT.
    finetuner(model, tmp_path, engine, shared_prefix=True).train()
    assert torch.isfinite(trained(model)).all() and not torch.equal(trained(model), after)


def trained(model) -> torch.Tensor:
    return torch.cat(
        [p.detach().flatten() for n, p in model.named_parameters() if p.requires_grad and "value_head" not in n]
    )


def finetuner(model, folder: Path, engine: Engine, **settings) -> Finetuner:
    answer = tokens("yes not")
    rows = [{"input_ids": ids + answer, "labels": [IGNORED] * len(ids) + answer} for ids in PROMPTS]
    arguments = RunConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        **settings,
    )
    return Finetuner(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        evaluate_with=lambda engine: {},
        on_save=lambda folder: None,
        engine=engine,
    )


# --------------------------------------------------------------------------------------------- logits, masks, windows


@pytest.mark.parametrize("name", ["Granite", "Cohere", "Gemma 2", "Llama"])
def test_sft_on_all_tokens_has_the_loss_of_the_models_own_logits(name, tmp_path):
    model, engine = made(name, False)
    kind = loss_type(engine.network)
    assert kind == ("nll" if name == "Granite" else "chunked_nll")
    trainer = finetuner(model, tmp_path, engine, loss_type=kind)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        logits = FAMILIES[name].model()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        with model.disable_adapter():
            loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=(labels != IGNORED).sum())
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("name", ["Gemma 2", "GPT-J", "GPT-OSS", "Llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_attention_is_given_a_mask_of_numbers(name, dtype):
    changes = dict(attn_logit_softcapping=None) if name == "Gemma 2" else {}
    model = FAMILIES[name].model(**changes).to(dtype)
    model.set_attn_implementation("eager")
    engine = Engine(model, word_tokenizer())
    assert check(engine, LONG) is None and path(engine) == "padded"


@pytest.mark.parametrize(
    ("name", "changes", "transform"),
    [
        ("Gemma 2", {}, Transform(cap=2.0)),
        ("Cohere", {}, Transform(0.25)),
        ("Granite", {}, Transform(0.25)),
        ("Granite", dict(logits_scaling=1.0), Transform()),
        ("Llama", dict(final_logit_softcapping=30.0), Transform()),  # named, and not done
    ],
)
def test_what_is_done_to_the_logits_is_found(name, changes, transform):
    engine = Engine(FAMILIES[name].model(**changes), word_tokenizer())
    check(engine)
    assert engine.network.transform == transform


def test_a_model_that_does_more_to_its_logits_is_refused():
    model = tiny_model()
    model.register_forward_hook(lambda module, inputs, result: setattr(result, "logits", result.logits.sin()))
    with pytest.raises(ModelError, match="not its output layer applied to its last hidden state.*choose another"):
        check(Engine(model, word_tokenizer()))


def test_two_forwards_that_differ_do_not_refuse_a_model():
    """As with 8-bit weights: every forward has an error of its own."""
    model, draw = tiny_model(), torch.Generator().manual_seed(0)
    noise = lambda module, inputs, result: result + 0.01 * torch.randn(result.shape, generator=draw)  # noqa: E731
    model.model.embed_tokens.register_forward_hook(noise)
    engine = Engine(model, word_tokenizer())
    assert "its numbers would differ by" in check(engine) and path(engine) == "plain"


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.beyond])
def test_a_window_that_may_be_too_short_is_known_to_the_masks(name):
    """Where nothing is said about the length of the prompts, too."""
    for longest, packed in ((0, False), (LONG, FAMILIES[name].path == "packed"), (LONG + 1, False)):
        engine = Engine(FAMILIES[name].model(), word_tokenizer())
        assert check(engine, longest) is None
        assert engine.network.packed == packed and (engine.network.window is None) == (longest == LONG)
        assert engine.model.config.sliding_window == LONG  # the check has left it as it was


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        (
            "gpt_neo",
            dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
            "columns",
        ),
        (
            "phi3",
            dict(
                SIZES,
                original_max_position_embeddings=32,
                rope_parameters=dict(
                    rope_type="longrope",
                    rope_theta=1e4,
                    short_factor=[1.0] * 4,
                    long_factor=[2.0] * 4,
                    original_max_position_embeddings=32,
                ),
            ),
            "beyond 32 tokens.*may have 64; a lower --max_prompt_length",
        ),
    ],
)
def test_a_family_with_other_positions_takes_the_plain_forward(kind, settings, reason):
    engine = Engine(Family(kind, settings).model(), word_tokenizer())
    assert re.search(reason, check(engine, LONG)) and path(engine) == "plain"


def test_code_that_takes_no_masks_is_said_to_in_words():
    model = tiny_model()
    forward = model.model.forward

    def without_positions(input_ids, position_ids=None, **more):
        if position_ids is not None:
            raise IndexError("list index out of range")
        return forward(input_ids, **more)

    model.model.forward = without_positions
    reason = check(Engine(model, word_tokenizer()))
    assert reason == "its code does not accept an attention mask, positions or a KV cache from outside"


# --------------------------------------------------------------------------------------------------------- the adapter


def adapted(model) -> set[str]:
    """Names of the layers with an adapter; two tensors of one module are one in the other."""
    names = {name for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    return {name.removesuffix(".base_layer") for name in names}


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_is_on_the_layers_that_the_document_names(name):
    model = with_lora(FAMILIES[name].model())
    assert {layer.rpartition(".")[2] for layer in adapted(model)} == set(FAMILIES[name].lora.split())


def test_an_adapter_goes_where_text_goes(capsys):
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    text = {**BASE, **FAMILIES["Gemma 3"].settings}
    config = Gemma3Config(text_config=text, vision_config=dict(vision, patch_size=14), mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    found = models.lora_config_for(model)
    engine = Engine(with_lora(model, exclude_modules=found.exclude_modules), word_tokenizer())
    assert all(".language_model." in name for name in adapted(engine.model))
    assert len(adapted(engine.model)) == 2 * len(FAMILIES["Gemma 3"].lora.split())
    assert check(engine, LONG) is None and path(engine) == "packed"
    assert models.lora_config_for(FAMILIES["Llama"].model()).exclude_modules is None
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "GPT-OSS"])
def test_experts_without_an_adapter_are_named(name, capsys):
    models.lora_config_for(FAMILIES[name].model())
    said = capsys.readouterr().out
    experts = r"the routed experts \(down_proj, gate_up_proj; \d+% of all weights\)"
    expected = rf"Without an adapter, as they are not linear layers: {experts}\.\n"
    assert re.fullmatch(expected if name == "GPT-OSS" else "", said)


# -------------------------------------------------------------------------------------------------------- the document


def rows() -> dict[str, list[str]]:
    """The document's table of families: name -> path, path beyond the window, LoRA layers, remarks."""
    lines = [line.strip("| ").split(" | ") for line in DOCUMENT.read_text(encoding="utf-8").splitlines()]
    header = next(i for i, line in enumerate(lines) if line[0] == "family")
    found = {}
    for line in lines[header + 2 :]:
        if len(line) != len(lines[header]):
            break
        found[line[0]] = line[1:]
    return found


def test_the_document_says_what_the_check_chooses():
    found = rows()
    assert list(found) == list(FAMILIES)
    for name, family in FAMILIES.items():
        _, path, beyond, lora, *_ = found[name]
        assert (path, beyond) == (family.path, family.beyond or "-"), name
        assert lora.replace("`", "").split() == family.lora.split(), name
