"""What an adapter, an optimizer, a data type and the like are set to is what is trained, in ppo.py, sft.py and
classify.py alike; and what cannot be is refused in one sentence."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SIZE, tiny_model, with_lora, word_tokenizer
from peft import get_peft_model
from safetensors.torch import load_file
from test_sft import random_finetuner
from transformers import AutoModelForCausalLM, get_scheduler
from transformers.training_args import OptimizerNames

import classify
import inference
import ppo
import sft
import tasks
from engine import models
from engine.engine import Engine
from engine.loading import check, load_engine
from engine.trees import Tree
from evaluation.answer_spaces import AnswerFormat, label_trie
from machine.errors import ArgumentError, CheckpointError
from run.arguments import DTYPES
from training import training_run
from training.arguments import OF_BITSANDBYTES, OF_TORCH, SCHEDULERS, TrainArguments
from training.data import find_tasks
from training.policy import label_log_probs
from training.ppo_trainer import PPOConfig, PPOTrainer
from training.sft_trainer import IGNORED, check_packing

SCRIPTS = {"ppo": ppo, "sft": sft}


def options(model: Path, data: Path, output: Path, **more) -> list[str]:
    given = dict(task="SST", from_local=True, train_model_name=model, data_path=data, output_dir=output, **more)
    given = {"batch_sentence_num": 8, "max_steps": 3, "end_epoch": 9, "eval_size": 4, "report_to": "none", **given}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def run(model_folder, data_root, tmp_path):
    """Run a script with the tiny model, and return its folder; keyword arguments are options."""

    def start(script: str, name: str = "run", **given) -> Path:
        SCRIPTS[script].main(options(given.pop("model", model_folder), data_root, tmp_path / name, **given))
        return tmp_path / name

    return start


def figures(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def without_times(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if not n.startswith("time/") and n != "eval/seconds"} for line in lines]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------- the adapter


def adapted(**given):
    arguments = TrainArguments(**given)
    model = tiny_model()
    return get_peft_model(model, training_run.new_adapter(arguments, model))


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def test_the_default_adapter_is_the_one_of_every_result():
    assert TrainArguments().lora.items() <= models.lora_config().to_dict().items()


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj", "q_proj, down_proj"])
def test_rank_and_targets_decide_which_weights_are_trained(rank, targets):
    weights = trainable(adapted(lora_r=rank, lora_targets=targets))
    sizes = {"q_proj": 32 + 32, "k_proj": 32 + 16, "v_proj": 32 + 16, "o_proj": 32 + 32}
    sizes |= {"gate_proj": 32 + 64, "up_proj": 32 + 64, "down_proj": 64 + 32}
    chosen = sizes if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    assert {name.split(".")[-4] for name in weights} == {*chosen}
    assert sum(w.numel() for w in weights.values()) == 2 * rank * sum(sizes[name] for name in chosen)  # two blocks


@pytest.mark.parametrize(
    "given, scaling",
    [({}, 2), ({"lora_r": 4, "lora_alpha": 6}, 1.5), ({"lora_r": 4, "lora_alpha": 6, "use_rslora": True}, 3)],
)
def test_the_scaling_is_that_of_alpha_and_rank(given, scaling):
    """Of the layer as it computes: the fused forward is in use."""
    model = adapted(**given)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    Engine(model, word_tokenizer())
    assert "forward" in vars(layer)
    x = torch.randn(3, 32)
    low_rank = layer.lora_B["default"](layer.lora_A["default"](x))
    assert torch.allclose(layer(x), layer.base_layer(x) + scaling * low_rank, atol=1e-5)


@pytest.mark.parametrize("loss_on", ["label", "answer", "full"])
def test_dropout_changes_what_sft_computes_from_step_to_step(loss_on, run):
    """The first step's loss is that of a B of zero, whatever the adapter sees; the second's is not."""
    plain = run("sft", "plain", loss_on=loss_on, learning_rate=1e-2, max_steps=2)
    dropped = run("sft", "dropped", loss_on=loss_on, learning_rate=1e-2, max_steps=2, lora_dropout=0.5)
    again = run("sft", "again", loss_on=loss_on, learning_rate=1e-2, max_steps=2, lora_dropout=0.5)
    losses = [figures(folder, "train/loss") for folder in (plain, dropped, again)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)  # an adapter's B begins at zero
    assert losses[0][1] != losses[1][1] and losses[1] == losses[2]


def test_a_model_s_own_layers_are_listed_where_a_target_is_none_of_them():
    model = tiny_model()
    listed = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    for wrong in ("query", "lm_head", "embed_tokens", "0"):
        with pytest.raises(ArgumentError, match=f"--lora_targets {wrong}: .* has {listed}, but no linear layer"):
            training_run.new_adapter(TrainArguments(lora_targets=f"q_proj,{wrong}"), model)


# ----------------------------------------------------------------------------------------- optimizer and schedule


def test_names_of_optimizers_and_schedules_are_those_of_transformers():
    assert {*OF_TORCH, *OF_BITSANDBYTES} <= {name.value for name in OptimizerNames}
    weight = torch.nn.Parameter(torch.zeros(1))
    for name in SCHEDULERS:
        get_scheduler(name, torch.optim.SGD([weight], lr=1.0), num_warmup_steps=1, num_training_steps=4)


def ppo_trainer(folder: Path, model=None, **given) -> PPOTrainer:
    """Of a tiny model on made-up rows of SST's labels."""
    settings = dict(output_dir=str(folder), report_to=[], use_cpu=True, per_device_train_batch_size=4, max_steps=2)
    settings |= dict(logging_steps=1, disable_tqdm=True)
    task = tasks.get("SST")
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    model = with_lora(tiny_model(vocab_size=len(tokenizer))) if model is None else model
    rows = [{"prompt_ids": [5, 6, 7, 8 + i, 9], "label": i % 2} for i in range(8)]
    config = PPOConfig(**{**settings, "save_strategy": "no", "learning_rate": 1e-2, **given})

    def reward(completions, label, **columns) -> list[float]:
        words = [f"{word}</Judgement>" for word in task.words]
        return [1.0 if text == words[gold] else -1.0 for text, gold in zip(completions, label)]

    return PPOTrainer(model, reward, config, rows, tokenizer, AnswerFormat(task))


@pytest.mark.parametrize("optimizer", [*OF_TORCH, "adamw_8bit", "lion_32bit"])
def test_the_optimizer_is_the_one_that_was_named(optimizer, tmp_path):
    config = sft.trainer_config(_checked(sft.SFTArguments(optimizer=optimizer, report_to="none")), tmp_path, 64)
    expected = sft_class(config)
    trainer = ppo_trainer(tmp_path, optim=optimizer)
    assert type(trainer.create_optimizer()) is expected
    assert optimizer.split("_")[0].removeprefix("paged") in expected.__name__.lower()
    before = [weight.detach().clone() for weight in trainable(trainer.model).values()]
    trainer.train()
    assert any(not torch.equal(x, y) for x, y in zip(before, trainable(trainer.model).values()))


def _checked(arguments):
    sft.check(arguments)
    arguments.max_steps = arguments.max_steps or 2
    return arguments


def sft_class(config) -> type:
    from transformers import Trainer

    return Trainer.get_optimizer_cls_and_kwargs(config, torch.nn.Linear(2, 2))[0]


def test_weight_decay_spares_biases_norms_and_the_critic(tmp_path):
    model = tiny_model("qwen2", vocab_size=len(models.load_tokenizer(models.EMBEDDED)))
    trainer = ppo_trainer(tmp_path, model=model, weight_decay=0.1, value_learning_rate=1e-3)
    decayed, others, critic = trainer.create_optimizer().param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"], critic["weight_decay"]) == (0.1, 0.0, 0.0)
    assert all("bias" in n or "norm" in n for n in (names[id(w)] for w in others["params"]))
    assert not any("bias" in n or "norm" in n or "value" in n for n in (names[id(w)] for w in decayed["params"]))
    assert critic["params"] == [*model.value_head.parameters()] and critic["lr"] == 1e-3
    assert len(decayed["params"]) + len(others["params"]) + 2 == len(names)


@pytest.mark.parametrize("script", SCRIPTS)
def test_weight_decay_makes_weights_smaller(script, run):
    """A step takes learning rate times decay of them, here a tenth; a warm-up's first step takes nothing."""
    given = dict(full_finetuning=True, learning_rate=1e-6, max_steps=2, lr_scheduler="constant", optimizer="sgd")
    given |= dict(save_methods="step", save_freq=2)
    kept, decayed = run(script, "kept", **given), run(script, "decayed", **given, weight_decay=1e5)
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(folder / "step-2" / "model.safetensors")[name] for folder in (kept, decayed))
    assert float(after.norm() / before.norm()) == pytest.approx(0.9**2, rel=1e-3)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"])
def test_the_learning_rate_follows_the_schedule(script, schedule, run):
    more = {"warmup_steps": 0} if script == "ppo" else {}
    folder = run(script, max_steps=5, learning_rate=1e-3, lr_scheduler=schedule, eval_size=2, **more)
    found = figures(folder, f"{'policy' if script == 'ppo' else 'train'}/learning_rate")
    expected = {
        "linear": [1 - step / 5 for step in range(5)],
        "cosine": [(1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)],
        "constant": [1.0] * 5,
        "constant_with_warmup": [1.0] * 5,
        "inverse_sqrt": [1 / math.sqrt((step + 10_000) / 10_000) for step in range(5)],
    }[schedule]
    assert found == pytest.approx([1e-3 * part for part in expected], rel=1e-3)


@pytest.mark.parametrize("norm", [0.5, 1e-3])
def test_gradients_are_clipped_to_the_norm_that_was_given(norm, tmp_path):
    trainer = ppo_trainer(tmp_path, max_grad_norm=norm, entropy_coef=5.0)
    trainer.create_optimizer()
    for weight in trainable(trainer.model).values():
        weight.grad = torch.ones_like(weight)
    trainer._clip_grad_norm(trainer.model)
    policy = torch.cat([w.grad.flatten() for n, w in trainable(trainer.model).items() if "value_head" not in n])
    assert float(policy.norm()) == pytest.approx(norm, rel=1e-3)
    config = sft.trainer_config(_checked(sft.SFTArguments(max_grad_norm=norm, report_to="none")), tmp_path, 64)
    assert config.max_grad_norm == norm


def test_scaled_gradients_make_the_same_update(tmp_path, monkeypatch):
    """As in float16 on a card; here with the scaler of a CPU. Too large a first scale costs updates, no more."""

    def trained(scale: float) -> torch.Tensor:
        trainer = ppo_trainer(tmp_path, entropy_coef=0.5, ppo_epochs=2, optim="sgd", lr_scheduler_type="constant")
        if scale:
            accelerator = trainer.accelerator
            accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=scale), True
            monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
            monkeypatch.setattr(accelerator, "prepare_model", lambda model, **_: model)
        trainer.train()
        monkeypatch.undo()
        return torch.cat([w.detach().flatten() for n, w in trainable(trainer.model).items() if "lora" in n])

    plain, scaled = trained(0), trained(1024.0)
    assert torch.allclose(plain, scaled, atol=1e-6) and bool(torch.isfinite(trained(3e38)).all())


# --------------------------------------------------------------------------------------------------------- data types


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_of_the_data_type_and_adapters_of_float32(dtype, model_folder):
    tokenizer = models.load_tokenizer(str(model_folder), True)
    engine = load_engine(str(model_folder), tokenizer, 64, from_local=True, dtype=dtype)
    assert {weight.dtype for weight in engine.model.parameters()} == {getattr(torch, dtype)}
    model = get_peft_model(engine.model, training_run.new_adapter(TrainArguments(), engine.model))
    assert {weight.dtype for weight in trainable(model).values()} == {torch.float32}


@pytest.mark.parametrize("script, given", [("ppo", {}), ("sft", {}), ("sft", {"loss_on": "full"})])
def test_bfloat16_on_a_cpu_is_near_float32(script, given, run):
    name = "objective/reward" if script == "ppo" else "train/loss"
    exact, rough = (figures(run(script, dtype, dtype=dtype, **given), name) for dtype in ("float32", "bfloat16"))
    assert all(math.isfinite(value) for value in rough) and exact != rough
    assert rough == pytest.approx(exact, rel=2e-2, abs=2e-2)


def test_float16_needs_a_card(run, capsys):
    for script in SCRIPTS:
        with pytest.raises(SystemExit) as stopped:
            run(script, dtype="float16")
        assert stopped.value.code == 2 and "--dtype float16 needs a CUDA card" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- all weights


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_weights_are_trained_saved_resumed_and_asked(script, run, model_folder, data_root, tmp_path, capsys):
    given = dict(full_finetuning=True, max_steps=4, save_methods="step", save_freq=2, learning_rate=1e-3)
    folder = run(script, **given, **({"kl_coef": 0.1} if script == "ppo" else {}))
    assert "all weights" in capsys.readouterr().out
    about = summary(folder)
    count = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(model_folder).parameters())
    assert about["trained"] == "all weights" and about["trained_weights"] == count + (33 if script == "ppo" else 0)
    # A folder that transformers loads: every weight has changed, and there is neither an adapter nor a critic.
    for name in ("best", "step-2", "step-4"):
        files = {path.name for path in (folder / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= files and "adapter_config.json" not in files
    before, after = (load_file(f / "model.safetensors") for f in (model_folder, folder / "step-4"))
    assert before.keys() == after.keys() and not any(torch.equal(before[n], after[n]) for n in before)
    # Resumed it ends where it did.
    resumed = tmp_path / "resumed"
    shutil.copytree(folder, resumed, ignore=shutil.ignore_patterns("step-4", "summary.json"))
    SCRIPTS[script].main(["--resume", str(resumed)])
    again = load_file(resumed / "step-4" / "model.safetensors")
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert without_times(resumed) == without_times(folder)
    # inference.py gets the figures that training reported.
    answered = options(folder / "step-4", data_root, tmp_path / "answered", batch_sentence_num=8)
    del answered[answered.index("--max_steps") : answered.index("--max_steps") + 2]
    del answered[answered.index("--end_epoch") : answered.index("--end_epoch") + 2]
    inference.main(answered)
    expected = {name: value for name, value in about["metrics"]["after"].items() if name != "step"}
    assert summary(tmp_path / "answered")["metrics"]["after"] == pytest.approx(expected)


def test_a_damaged_folder_of_all_weights_is_not_loaded(run):
    folder = run("sft", full_finetuning=True, max_steps=1) / "best"
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        models.load_model(str(folder), True)


def test_all_weights_go_on_from_an_adapter_and_an_adapter_from_all_weights(run):
    """A checkpoint of all weights holds the adapter that it began from, and brings no second copy of it."""
    first = run("sft", "first", max_steps=2, learning_rate=1e-2) / "best"
    whole = (
        run("ppo", "whole", model=first, max_steps=1, full_finetuning=True, learning_rate=1e-9, warmup_steps=0) / "best"
    )
    assert not (whole / "start").exists()
    merged, loaded = (models.load_model(str(folder), True).state_dict() for folder in (first, whole))
    assert all(torch.allclose(merged[name], loaded[name], atol=1e-6) for name in merged)
    last = run("ppo", "last", model=whole, max_steps=1) / "best"
    assert json.loads((last / "adapter_config.json").read_text())["base_model_name_or_path"] == str(whole)


@pytest.mark.parametrize("gradient", ["expected", "sampled"])
def test_the_reference_of_all_weights_is_the_model_as_it_was(gradient, tmp_path):
    """Its shared prefix is computed once in a run, the policy's in every step."""
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    start, model = (tiny_model(vocab_size=len(tokenizer)) for _ in range(2))
    more = dict(policy_gradient=gradient, samples_per_prompt=2, kl_coef=0.1, tokens_per_micro_batch=8)
    trainer = ppo_trainer(tmp_path, model=model, **more)
    (task,) = trainer.tasks
    assert task.prefix.length == 3
    trainer.train()
    trie = label_trie(task.answer_format.task, tokenizer)
    prompts = [row["prompt_ids"] for row in task.rows]
    trees = [trie.tree] * len(prompts)
    plain, found = Engine(start, tokenizer), task.reference.engine
    plain.network.plain = True
    with torch.no_grad():
        for engine, expected in ((found, plain), (trainer.engine, _plain(model, tokenizer))):
            states = [torch.stack(e.states(prompts, trees)) for e in (engine, expected)]
            chances = [label_log_probs(e, trie, s) for e, s in zip((engine, expected), states)]
            assert torch.allclose(*chances, atol=1e-4)
    assert not any(weight.requires_grad for weight in found.model.parameters())
    drift = [line["objective/kl"] for line in trainer.state.log_history if "objective/kl" in line]
    assert drift[0] == pytest.approx(0, abs=1e-5) and abs(drift[1]) > 1e-4


def _plain(model, tokenizer) -> Engine:
    engine = Engine(model, tokenizer)
    engine.network.plain = True
    return engine


@pytest.mark.parametrize("gradient", ["expected", "sampled"])
def test_without_a_weight_of_the_kl_all_weights_need_no_second_model(gradient, tmp_path):
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    trainer = ppo_trainer(tmp_path, model=tiny_model(vocab_size=len(tokenizer)), policy_gradient=gradient)
    assert trainer.tasks[0].reference is None
    trainer.train()
    assert not any("objective/kl" in line for line in trainer.state.log_history)
    with pytest.raises(ValueError, match="no reference"):
        trainer.engine.states([[1, 2]], [Tree()], reference=True)


def test_a_classification_head_s_options(model_folder, data_root, tmp_path):
    given = dict(max_steps=2, lora_r=3, lora_targets="q_proj", lora_dropout=0.1, optimizer="sgd", dtype="bfloat16")
    classify.main(options(model_folder, data_root, tmp_path / "head", **given))
    config = json.loads((tmp_path / "head" / "best" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"], config["lora_dropout"]) == (3, ["q_proj"], 0.1)
    assert summary(tmp_path / "head")["trained_weights"] == 2 * 3 * (32 + 32) + 2 * 32
    with pytest.raises(SystemExit):
        classify.main(options(model_folder, data_root, tmp_path / "none", lora_targets="score"))
    assert not (tmp_path / "none").exists()


# ----------------------------------------------------------------------------------------------- gradient checkpointing

PROMPTS = [[5, 6, 7, 8, 9, 10, 11 + i, *range(12, 15 + 2 * i)] for i in range(4)]
TREES = [Tree([-1, 20, 21, 22], [-1, 0, 0, 1], [0, 1, 1, 2]) for _ in PROMPTS]


def gradient_and_kept(kind: str, layout, tokens: int, checkpointing: bool) -> tuple[torch.Tensor, int]:
    """The gradient through the engine's training batches, and how many numbers they keep for it."""
    model = with_lora(tiny_model(kind, **({} if kind == "mpt" else {"num_hidden_layers": 4} if kind != "gpt2" else {})))
    engine = Engine(model, word_tokenizer(), tokens)
    engine.start_training(model, tokens, checkpointing)
    if layout is None:
        engine.network.plain = True
    weights, kept = {weight.data_ptr() for weight in model.parameters()}, {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in weights:
            kept[x.data_ptr()] = x
        return x

    torch.manual_seed(0)
    factors = torch.randn(32)
    with engine.network.layout(*(layout or (False, None))):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            batches = engine.training_batches(PROMPTS, TREES)
            _, states = next(batches)
        numbers = sum(x.numel() for x in kept.values())
        (states * factors).sum().backward()
        for _, states in batches:
            (states * factors).sum().backward()
    return torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad]), numbers


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mpt"])
@pytest.mark.parametrize("layout", [(True, 1), (False, 1), (False, None), None])
@pytest.mark.parametrize("tokens", [16, 1024])
def test_checkpointing_changes_no_gradient_and_keeps_less(kind, layout, tokens):
    plain, kept = gradient_and_kept(kind, layout, tokens, False)
    found, kept_now = gradient_and_kept(kind, layout, tokens, True)
    assert torch.equal(plain, found)
    assert kept_now < kept


@pytest.mark.parametrize(
    "script, given",
    [("ppo", {}), ("ppo", {"policy_gradient": "sampled"}), ("ppo", {"answer_space": "free"})]
    + [("ppo", {"full_finetuning": True}), ("sft", {}), ("sft", {"loss_on": "label"}), ("sft", {"loss_on": "full"})],
)
def test_a_run_with_checkpointing_is_the_same(script, given, run):
    given = {"learning_rate": 1e-3, **given}
    plain, found = (run(script, str(on), gradient_checkpointing=on, **given) for on in (False, True))
    lines = without_times(plain), without_times(found)
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    assert all(a == pytest.approx(b, rel=1e-5, abs=1e-7) for a, b in zip(*lines))


# ------------------------------------------------------------------------------------------------------------- packing


def test_packed_rows_have_the_loss_and_gradient_that_they_have_alone(model_folder, data_root, tmp_path):
    arguments = sft.SFTArguments(task="SST", data_path=str(data_root), batch_sentence_num=3, max_steps=1)
    arguments.packing, arguments.loss_on, arguments.report_to = True, "full", "none"
    arguments.max_prompt_length = 400
    tokenizer = models.load_tokenizer(str(model_folder), True)
    sft.check(arguments)
    parts = sft.load(arguments, find_tasks(arguments))
    table, _ = sft.dataset(arguments, parts, tokenizer)
    arguments.packing = False
    alone, _ = sft.dataset(arguments, parts, tokenizer)
    arguments.packing = True
    # Every row is whole in one sequence, and there are fewer of these.
    pieces = []
    for ids, sizes in zip(table["input_ids"], table["seq_lengths"]):
        assert len(ids) == sum(sizes) <= 400
        pieces += [tuple(part) for part in torch.tensor(ids).split(sizes) for part in [part.tolist()]]
    assert sorted(pieces) == sorted(map(tuple, alone["input_ids"])) and 3 <= len(table) < len(alone) / 2
    # The loss of a step is the mean over all its tokens, each seeing its own row.
    trainer = random_finetuner(arguments, table, tokenizer, model_folder, tmp_path)
    assert trainer.args.packing and trainer.args.per_device_train_batch_size == 1
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    rows = torch.tensor_split(batch["input_ids"][0], (batch["position_ids"][0] == 0).nonzero()[1:, 0])
    assert len(rows) > 1
    count = (batch["labels"] != IGNORED).sum()
    loss = trainer.training_step(trainer.model, dict(batch), count)
    weights = trainable(trainer.model)
    found = torch.cat([weight.grad.flatten() for weight in weights.values()])
    trainer.model.zero_grad()
    total = 0.0
    for row in rows:
        logits = trainer.model(row[None]).logits[0, :-1]
        plain = torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum") / count
        plain.backward()
        total += plain.item()
    expected = torch.cat([weight.grad.flatten() for weight in weights.values()])
    assert int(count) == sum(len(row) - 1 for row in rows)
    assert float(loss) == pytest.approx(total, rel=1e-4)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_a_packed_run_counts_rows(run):
    folder = run("sft", loss_on="full", packing=True, batch_sentence_num=2, max_prompt_length=300, max_steps=2)
    samples = figures(folder, "train/samples")
    assert samples[-1] == summary(folder)["samples"] > 2 * 2 * 1.5 and samples[-1] == 2 * samples[1]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "neox", "gpt2", "mpt"])
def test_packing_is_refused_where_rows_would_see_each_other(kind):
    network = Engine(tiny_model(kind, vocab_size=SIZE), word_tokenizer()).network
    if kind != "mpt":
        check_packing(network)
        return
    with pytest.raises(ArgumentError, match="--packing True: the code of .* lets packed rows see each other"):
        check_packing(network)


# ----------------------------------------------------------------------------------------------------------- bad input

BOTH = [
    (dict(lora_r=0), "--lora_r 0 must be greater than 0"),
    (dict(lora_alpha=-1), "--lora_alpha -1 must be greater than 0"),
    (dict(lora_dropout=1.0), "--lora_dropout 1 must be at least 0 and less than 1"),
    (dict(lora_targets="q_proj,"), "--lora_targets 'q_proj,' names no layer"),
    (dict(lora_targets="query"), "has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, but no linear"),
    (dict(full_finetuning=True, lora_r=8), "so there is no adapter: leave out --lora_r 8"),
    (dict(full_finetuning=True, use_rslora=True), "leave out --use_rslora True"),
    (dict(full_finetuning=True, load_in_8bit=True), "--load_in_8bit True: 8-bit weights cannot be trained"),
    (dict(full_finetuning=True, dtype="float16"), "--full_finetuning True: weights in float16"),
    (dict(optimizer="adamw_8bits"), "did you mean adamw_8bit?"),
    (dict(optimizer="galore_adamw"), "--optimizer galore_adamw must be one of adamw_torch"),
    (dict(lr_scheduler="cosin"), "did you mean cosine?"),
    (dict(lr_scheduler="reduce_lr_on_plateau"), "must be one of linear"),
    (dict(weight_decay=-0.1), "--weight_decay -0.1 must not be negative"),
    (dict(max_grad_norm=0), "--max_grad_norm 0.0 must be greater than 0"),
    (dict(dtype="half"), "--dtype half must be one of float32, bfloat16, float16"),
]
ONE = [
    ("ppo", dict(lora_dropout=0.1), "two masks would change it too; leave it at 0"),
    ("ppo", dict(lr_scheduler="constant", warmup_steps=2), "--lr_scheduler constant has no warm-up"),
    ("sft", dict(packing=True), "--packing True needs --loss_on full"),
    ("sft", dict(packing=True, loss_on="full", batch_sentence_num=48), "fewer than the --batch_sentence_num 48"),
]


@pytest.mark.parametrize(
    "script, given, said", [(script, *case) for script in SCRIPTS for case in BOTH] + ONE, ids=lambda x: str(x)[:40]
)
def test_what_cannot_be_is_refused_in_one_sentence(script, given, said, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(script, **given)
    left = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and said in left and "Traceback" not in left
    assert not (tmp_path / "run").exists()


def test_what_a_checkpoint_was_made_with_cannot_change(run, capsys):
    folder = run("sft", max_steps=1)
    (folder / "summary.json").unlink()
    changes = ("lora_r", 8, 16), ("optimizer", "sgd", "adamw_torch_fused"), ("weight_decay", 0.1, 0.0)
    for name, value, before in changes:
        with pytest.raises(SystemExit) as stopped:
            sft.main(["--resume", str(folder), f"--{name}", str(value), "--max_steps", "2"])
        assert stopped.value.code == 2 and f"--{name} {value}: {folder} began with {before}" in capsys.readouterr().err


def test_every_data_type_has_a_name_in_torch():
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)
    assert check(Engine(tiny_model().to(torch.bfloat16), word_tokenizer())) is None
