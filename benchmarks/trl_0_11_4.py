"""One measured run of TRL 0.11.4: AutoModelForCausalLMWithValueHead and PPOTrainer.step, reference = no adapter.

    benchmarks/.envs/trl-0.11.4/bin/python benchmarks/trl_0_11_4.py --inputs FILE --batch 16 --ppo_epochs 4 --steps 3

A step's seconds are those of generation, reward and PPOTrainer.step.
"""

import common  # first: its clock starts here  # isort: skip

import contextlib
import sys
import time
import warnings

import torch
from peft import LoraConfig
from transformers import AutoConfig, set_seed
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

warnings.filterwarnings("ignore")


def load_model(inputs: dict) -> AutoModelForCausalLMWithValueHead:
    config = AutoConfig.from_pretrained(inputs["model_folder"])
    # The folder was written by a later transformers, which keeps this value elsewhere.
    config.rope_theta = getattr(config, "rope_parameters", {}).get("rope_theta", config.rope_theta)
    return AutoModelForCausalLMWithValueHead.from_pretrained(
        inputs["model_folder"],
        config=config,
        torch_dtype=torch.float32,
        peft_config=LoraConfig(**common.LORA, task_type="CAUSAL_LM"),
    )


def make_trainer(arguments, model: AutoModelForCausalLMWithValueHead, tokenizer) -> PPOTrainer:
    config = PPOConfig(
        batch_size=arguments.batch,
        mini_batch_size=arguments.micro_batch,
        gradient_accumulation_steps=arguments.batch // arguments.micro_batch,
        ppo_epochs=arguments.ppo_epochs,
        learning_rate=arguments.learning_rate,
        init_kl_coef=common.KL_COEF,
        adap_kl_ctrl=False,
        lam=1.0,
        seed=arguments.seed,
    )
    return PPOTrainer(config, model, ref_model=None, tokenizer=tokenizer)


def train(trainer: PPOTrainer, arguments, rows: list[dict], clock: common.Clock, evaluate) -> list[int]:
    """Train until the steps, the accuracy or the time is reached. Returns the responses' lengths."""
    tokenizer, reward, lengths = trainer.tokenizer, common.rule_reward(), []
    generation = dict(
        max_new_tokens=arguments.response_length,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    for step in range(arguments.steps):
        began = time.perf_counter()
        chosen = [rows[(step * arguments.batch + i) % len(rows)] for i in range(arguments.batch)]
        queries = [torch.tensor(row["ids"]) for row in chosen]
        responses = trainer.generate(queries, batch_size=arguments.batch, return_prompt=False, **generation)
        ended = [bool(response[-1] == tokenizer.eos_token_id) for response in responses]
        texts = [tokenizer.decode(r[:-1] if done else r) for r, done in zip(responses, ended)]
        scores = reward(completions=texts, label=[row["label"] for row in chosen], ended=ended)
        with contextlib.redirect_stdout(sys.stderr):
            trainer.step(queries, responses, [torch.tensor(score) for score in scores])
        clock.steps.append(time.perf_counter() - began)
        lengths += [len(response) for response in responses]
        print(f"step {step + 1}: reward {sum(scores) / len(scores):.2f}", file=sys.stderr, flush=True)
        due = arguments.eval_steps and (step + 1) % arguments.eval_steps == 0
        if due and evaluate() >= arguments.until:
            break
        if time.perf_counter() - common.STARTED > arguments.time_limit:
            break
    return lengths


def main() -> None:
    arguments = common.trl_arguments(__doc__.splitlines()[0])
    inputs = common.read_inputs(arguments.inputs)
    rows = inputs["train"]
    set_seed(arguments.seed)
    tokenizer = common.load_tokenizer(inputs)
    model = load_model(inputs)
    causal_lm = model.pretrained_model.get_base_model()
    common.check_same_model(causal_lm, inputs)
    trainer, clock = make_trainer(arguments, model, tokenizer), common.Clock()

    def evaluate() -> float:
        return common.timed_accuracy(causal_lm, inputs, clock)

    if arguments.eval_steps:
        evaluate()
    lengths = train(trainer, arguments, rows, clock, evaluate)
    figures = clock.figures(arguments.batch)
    seen = rows[: len(lengths)]
    figures["response_tokens"] = sum(lengths) / len(lengths)
    figures["prompt_tokens"] = sum(len(row["ids"]) for row in seen) / len(seen)
    common.emit(figures, ("torch", "transformers", "trl", "peft"))


if __name__ == "__main__":
    main()
