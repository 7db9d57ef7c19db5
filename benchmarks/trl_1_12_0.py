"""One measured run of TRL 1.12.0: trl.experimental.ppo.PPOTrainer, reference = no adapter, reward = the rule.

    benchmarks/.envs/trl-1.12.0/bin/python benchmarks/trl_1_12_0.py --inputs FILE --batch 16 --ppo_epochs 4 --steps 3

This trainer takes no reward functions: it needs a reward model with a `score` layer on a backbone, and a value model
that is a network of its own (here the same model with the same kind of adapter). A step's seconds run from the end of
one step to the end of the next, without evaluations.
"""

import common  # first: its clock starts here  # isort: skip

import contextlib
import shutil
import sys
import tempfile
import time
from types import SimpleNamespace

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback, set_seed
from trl.experimental.ppo import PPOConfig, PPOTrainer


class RuleReward(nn.Module):
    """The rule in the form of a reward model: the backbone's last hidden state is the reward, at every position."""

    base_model_prefix = "backbone"

    def __init__(self, rows: list[dict], tokenizer, response_length: int):
        super().__init__()
        self.backbone, self.score = self.judge, nn.Identity()
        self.labels = {tuple(row["ids"]): row["label"] for row in rows}
        self.tokenizer, self.response_length, self.rule = tokenizer, response_length, common.rule_reward()
        self.lengths: list[int] = []
        self.rewards: list[float] = []

    def judge(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **unused) -> SimpleNamespace:
        """(batch, tokens) prompts with responses -> hidden_states whose last one is (batch, tokens, 1)."""
        values = []
        for ids, mask in zip(input_ids, attention_mask):
            tokens = ids[mask.bool()].tolist()
            ends = range(len(tokens) - self.response_length, len(tokens) + 1)
            end = next(n for n in ends if tuple(tokens[:n]) in self.labels)
            response, label = tokens[end:], self.labels[tuple(tokens[:end])]
            ended = bool(response) and response[-1] == self.tokenizer.eos_token_id
            text = self.tokenizer.decode(response[:-1] if ended else response)
            values += self.rule(completions=[text], label=[label], ended=[ended])
            self.lengths.append(len(response))
        self.rewards += values
        column = torch.tensor(values).view(-1, 1, 1)
        return SimpleNamespace(hidden_states=[column.expand(-1, input_ids.shape[1], 1)])


class Enough(Exception):
    """Ends the training: this trainer ignores `should_training_stop`."""


class ClockCallback(TrainerCallback):
    """Times the steps and evaluates between them."""

    def __init__(self, arguments, inputs: dict, causal_lm, reward: RuleReward):
        self.arguments, self.inputs, self.causal_lm, self.reward = arguments, inputs, causal_lm, reward
        self.clock = common.Clock()

    def on_train_begin(self, args, state, control, **kwargs):
        if self.arguments.eval_steps:
            self.evaluate()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.steps.append(time.perf_counter() - self.began)
        step, recent = len(self.clock.steps), self.reward.rewards[-self.arguments.batch :]
        print(f"step {step}: reward {sum(recent) / len(recent):.2f}", file=sys.stderr, flush=True)
        due = self.arguments.eval_steps and step % self.arguments.eval_steps == 0
        if due and self.evaluate() >= self.arguments.until:
            raise Enough
        if time.perf_counter() - common.STARTED > self.arguments.time_limit:
            raise Enough
        self.began = time.perf_counter()

    def evaluate(self) -> float:
        return common.timed_accuracy(self.causal_lm, self.inputs, self.clock)


def trainer_config(arguments, output: str) -> PPOConfig:
    return PPOConfig(
        output_dir=output,
        per_device_train_batch_size=arguments.micro_batch,
        gradient_accumulation_steps=arguments.batch // arguments.micro_batch,
        num_ppo_epochs=arguments.ppo_epochs,
        total_episodes=arguments.batch * arguments.steps,
        local_rollout_forward_batch_size=arguments.batch,
        response_length=arguments.response_length,
        stop_token="eos",
        temperature=1.0,
        learning_rate=arguments.learning_rate,
        kl_coef=common.KL_COEF,
        lam=1.0,
        num_sample_generations=0,
        seed=arguments.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def load_value_model(folder: str) -> nn.Module:
    value_model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1)
    value_model = inject_adapter_in_model(LoraConfig(**common.LORA), value_model)
    value_model.score.weight.requires_grad_(True)
    return value_model


def main() -> None:
    arguments = common.trl_arguments(__doc__.splitlines()[0])
    inputs = common.read_inputs(arguments.inputs)
    folder, rows = inputs["model_folder"], inputs["train"]
    set_seed(arguments.seed)
    tokenizer = common.load_tokenizer(inputs, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    common.check_same_model(policy, inputs)
    value_model = load_value_model(folder)
    ids = [{"input_ids": rows[i % len(rows)]["ids"]} for i in range(arguments.batch * arguments.steps)]
    reward = RuleReward(rows, tokenizer, arguments.response_length)
    output = tempfile.mkdtemp(prefix="benchmark-")
    callback = ClockCallback(arguments, inputs, policy, reward)
    trainer = PPOTrainer(
        trainer_config(arguments, output),
        tokenizer,
        policy,
        None,
        reward,
        Dataset.from_list(ids),
        value_model,
        eval_dataset=Dataset.from_list(ids[:1]),
        callbacks=[callback],
        peft_config=LoraConfig(**common.LORA, task_type="CAUSAL_LM"),
    )
    # Its own loader shuffles; the rows must come in the order of the inputs.
    trainer.dataloader = DataLoader(trainer.train_dataset, arguments.batch, collate_fn=trainer.data_collator)
    try:
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Enough):
            trainer.train()
    finally:
        shutil.rmtree(output, ignore_errors=True)
    figures = callback.clock.figures(arguments.batch)
    seen = ids[: figures["samples"]]
    figures["response_tokens"] = sum(reward.lengths) / len(reward.lengths)
    figures["prompt_tokens"] = sum(len(row["input_ids"]) for row in seen) / len(seen)
    common.emit(figures, ("torch", "transformers", "trl", "peft"))


if __name__ == "__main__":
    main()
