"""PPO for answers of a few tokens: PPOConfig and PPOTrainer, on top of transformers.Trainer.

One trainer step is one rollout and all updates on it, so `max_steps`, `eval_steps` and `save_steps` count PPO steps.
Progress, checkpoints, resume, schedules and accelerate come from Trainer; the algorithm is in sampled_step.py and
expected_step.py.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from engine.engine import Engine
from engine.tokens import encode, encode_part
from evaluation.answer_spaces import AnswerFormat
from machine import processes
from training.arguments import GROUP_ADVANTAGES, usual_advantage
from training.expected_step import expected_step
from training.objectives import adapted_kl_coef
from training.ppo_step import Step, clip_gradients
from training.ppo_task import PPOTask, Rewards, ppo_tasks
from training.run_trainer import RunTrainer
from training.sampled_step import sampled_step
from training.sampler import TaskSampler, first_epoch_seed, stratum

VALUE_HEAD_FILE = "value_head.safetensors"
KL_STATE = "adaptive_kl"  # in trainer_state.json, among the states of callbacks


@dataclass
class PPOConfig(TrainingArguments):
    """TrainingArguments and what PPO adds. `per_device_train_batch_size` counts prompts."""

    answer_space: str = field(default="labels", metadata={"help": "labels: other answers are masked; free: any token"})
    save_methods: str = field(default="step", metadata={"help": "how checkpoints are named: step or epoch"})
    epoch_offset: int = field(default=0, metadata={"help": "number of the first epoch, for the checkpoints' names"})
    balance_tasks: bool = field(default=False, metadata={"help": "every task has as many steps as the largest one"})
    policy_gradient: str = field(default="expected", metadata={"help": "sampled, or expected over all labels"})
    success_order: float = field(default=1.0, metadata={"help": "order of MaxRL's objective; expected only"})
    advantage: str = field(default="", metadata={"help": "what sampled answers are held against; see ppo.py"})
    samples_per_prompt: int = field(default=1, metadata={"help": "answers sampled per prompt and step"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling, and of all log-probabilities"})
    max_response_length: int = field(default=16, metadata={"help": "tokens of an answer at most"})
    ppo_epochs: int = field(default=1, metadata={"help": "passes over each rollout"})
    num_minibatches: int = field(default=1, metadata={"help": "updates per pass; must divide the prompts per step"})
    clip_range: float = field(default=0.2, metadata={"help": "of the probability ratio"})
    clip_range_high: float | None = field(default=None, metadata={"help": "of a rising ratio; None: clip_range"})
    value_clip_range: float = field(default=0.2, metadata={"help": "of the value's change"})
    kl_coef: float = field(default=0.0, metadata={"help": "weight of the KL to the reference in the reward"})
    kl_target: float = field(default=0.0, metadata={"help": "KL that kl_coef is adapted to; 0: it stays"})
    entropy_coef: float = field(default=0.0, metadata={"help": "weight of the entropy bonus"})
    entropy_end: float | None = field(default=None, metadata={"help": "its weight at the last step; None: the same"})
    value_coef: float = field(default=0.5, metadata={"help": "weight of the value loss"})
    value_learning_rate: float = field(default=1e-3, metadata={"help": "of the value head"})
    gamma: float = field(default=1.0, metadata={"help": "discount"})
    lam: float = field(default=1.0, metadata={"help": "GAE's lambda"})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "of the reward functions; None: all 1"})
    optim: str = field(default="adamw_torch", metadata={"help": "see TrainingArguments"})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "of Adam"})
    tokens_per_micro_batch: int = field(default=1024, metadata={"help": "tokens that go through the network at once"})

    def __post_init__(self):
        super().__post_init__()
        if self.clip_range_high is None:
            self.clip_range_high = self.clip_range
        if not self.advantage:
            self.advantage = usual_advantage(self.samples_per_prompt) if self.lam == 1.0 else "critic"


class PPOTrainer(RunTrainer, Trainer):
    """PPO on prompts whose answers a reward function can judge.

    Of several tasks `reward_funcs`, `train_dataset` and `answer_format` are dicts by the tasks' names. A step then has
    rows of one task, whose prompts have a long prefix in common, and is judged and logged as that task's.

    Args:
        model: a causal language model; with `peft_config` an adapter is put on it, and the model without the adapter
            is the reference. Without an adapter all weights are trained; the reference is then a frozen copy of the
            model as it is now, or, with a `kl_coef` of 0, there is none.
        reward_funcs: one or several functions, called as TRL calls them (see reward_functions.py); a column `ended`
            says which answers the model ended itself. Their rewards, times `args.reward_weights`, add up.
        args: PPOConfig.
        train_dataset: rows with `prompt_ids` (token ids) or `prompt` (text), and the columns that the rewards need.
            Of rows with a `label` the accuracy is logged, and every batch has the whole data's share of each label.
        processing_class: the tokenizer.
        answer_format: whose words are the labels, when an answer is complete, and which part of it is the label.
        peft_config: of the adapter.
        compute_metrics: `(engine) -> dict` for evaluation on held-out rows; its `score` decides what is best.
        on_save: called with every checkpoint's folder before it counts as written.
        callbacks: as for Trainer.
        engine: that of `model`, as engine.loading gives it; None: a new one.

    Raises ValueError for arguments that do not fit each other, ModelError for labels that the tokenizer spells alike.
    """

    _tag_names = ["ppo"]

    def __init__(
        self,
        model: PreTrainedModel,
        reward_funcs: Rewards | dict[str, Rewards],
        args: PPOConfig,
        train_dataset: Dataset | list[dict] | dict[str, Dataset | list[dict]],
        processing_class: PreTrainedTokenizerBase,
        answer_format: AnswerFormat | dict[str, AnswerFormat],
        peft_config: LoraConfig | None = None,
        compute_metrics: Callable[[Engine], dict[str, float]] | None = None,
        on_save: Callable[[Path], None] = lambda checkpoint: None,
        callbacks: list | None = None,
        engine: Engine | None = None,
    ):
        self.tasks = ppo_tasks(answer_format, reward_funcs, train_dataset)
        check(args, self.tasks)
        self.reward_weights = args.reward_weights or [1.0] * len(self.tasks[0].reward_funcs)
        self.warned_of_abstention = False  # said once in a run
        self.evaluation, self.on_save = compute_metrics, on_save
        self.expected = args.policy_gradient == "expected"
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        add_value_head(model)
        args.remove_unused_columns = False
        args._n_gpu = min(args.n_gpu, 1)  # one process drives one card; several cards take several processes
        checkpointing = args.activation_checkpointing
        args.activation_checkpointing = False  # the engine has its own
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda items: {"rows": [row for _, row in items], "task": items[0][0]},
            train_dataset=[(number, row) for number, task in enumerate(self.tasks) for row in task.rows],
            eval_dataset=[] if compute_metrics else None,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.engine = engine or Engine(model, processing_class)
        self.engine.start_training(model, args.tokens_per_micro_batch, checkpointing)
        reference: Engine | None = self.engine  # which switches its adapter off
        if not isinstance(model, PeftModel):
            reference = self.engine.frozen_copy() if args.kl_coef else None
        for task in self.tasks:
            task.start(self, reference)
        self.step_metrics: dict[str, float] = {}  # of the last step, until they are logged
        self.episodes: list[dict] = []  # of the last step: prompt, answer, reward, row, task

    # ------------------------------------------------------------------------------------------------------ one step

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Roll out, then update; the last update's optimizer step is left to Trainer. Returns the mean loss."""
        model.eval()  # dropout would make the ratio differ from 1 on the first pass
        started, tokens = time.perf_counter(), self.engine.tokens_computed
        task = self.tasks[inputs.get("task", 0)]
        self.engine.lasting_prefix = task.prefix
        step = Step(self, task, inputs["rows"])
        try:
            with self.enough_memory("Lower --max_prompt_length or --repeat_time"):
                loss = expected_step(step) if self.expected else sampled_step(step)
        except FloatingPointError as error:
            raise self.failure(str(error), "Lower --learning_rate") from error
        if not math.isfinite(loss):
            raise self.failure(f"the loss is {loss}", "Lower --learning_rate or raise --kl_coef")
        if self.args.kl_target:
            step.metrics["objective/kl_coef"] = step.kl_coef
            adapted = adapted_kl_coef(step.kl_coef, step.metrics["objective/kl"], self.args.kl_target)
            self.state.stateful_callbacks[KL_STATE] = {"kl_coef": adapted}
        if self.args.entropy_end is not None:
            step.metrics["policy/entropy_coef"] = step.entropy_coef
        seconds = time.perf_counter() - started
        self.episodes = step.episodes
        self.step_task = task.name if len(self.tasks) > 1 else ""
        self.step_metrics = {
            **self.by_task(step.metrics),
            "time/seconds_per_step": seconds,
            "time/samples_per_second": processes.count() * len(step.rows) * self.samples_per_prompt / seconds,
            "time/tokens_per_second": sum(processes.all_gather([self.engine.tokens_computed - tokens])) / seconds,
        }
        return torch.tensor(loss, device=self.args.device)

    def by_task(self, metrics: dict[str, float]) -> dict[str, float]:
        """A step's figures; of several tasks what is of the answers goes by the task: objective/RTE/reward."""
        if not self.step_task:
            return metrics
        start = "objective/"
        return {
            f"{start}{self.step_task}/{name.removeprefix(start)}" if name.startswith(start) else name: value
            for name, value in metrics.items()
        }

    @property
    def kl_coef(self) -> float:
        """The KL coefficient of the step to come. An adapted one lies in Trainer's state, so checkpoints have it."""
        if not self.args.kl_target:
            return self.args.kl_coef
        return self.state.stateful_callbacks.get(KL_STATE, {}).get("kl_coef", self.args.kl_coef)

    @property
    def entropy_coef(self) -> float:
        """The entropy coefficient of the step to come: it changes linearly from the first step to the last."""
        start, end = self.args.entropy_coef, self.args.entropy_end
        if end is None:
            return start
        return start + (end - start) * self.state.global_step / max(self.state.max_steps - 1, 1)

    @property
    def samples_per_step(self) -> int:
        return self.args.per_device_train_batch_size * processes.count() * self.samples_per_prompt

    @property
    def samples_per_prompt(self) -> int:
        return 1 if self.expected else self.args.samples_per_prompt

    def prompt_ids(self, row: dict) -> list[int]:
        """The token ids of a row's prompt."""
        if "prompt_ids" in row:
            return list(row["prompt_ids"])
        return encode(self.processing_class, [row["prompt"]])[0]

    def prompt_text(self, row: dict) -> str:
        """The text of a row's prompt, with its special tokens."""
        if "prompt" in row:
            return row["prompt"]
        return self.processing_class.decode(row["prompt_ids"], clean_up_tokenization_spaces=False)

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        """The tokens of texts that no prompt begins."""
        spelled = {text: encode_part(self.processing_class, text) for text in set(texts)}
        return [spelled[text] for text in texts]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's PPO metrics to Trainer's own, under the names of the dashboards."""
        if "loss" in logs:
            own = {
                "policy/loss": logs.pop("loss"),
                "policy/learning_rate": logs.pop("learning_rate"),
                "policy/grad_norm": logs.pop("grad_norm", 0.0),
            }
            logs = {**own, **logs, **self.step_metrics, **self.so_far()}
            self.step_metrics = {}
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------- optimizer, checkpoints, resume

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Trainer's, with a learning rate of its own for the value head, the last group: no decay shrinks that."""
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decayed = set(self.get_decay_parameter_names(self.model))  # no biases, no norms
            groups: dict[float, list] = {self.args.weight_decay: [], 0.0: []}
            for name, weight in self.model.named_parameters():
                if weight.requires_grad and not name.startswith("value_head."):
                    groups[self.args.weight_decay if name in decayed else 0.0].append(weight)
            policy = [{"params": weights, "weight_decay": decay} for decay, weights in groups.items() if weights]
            head = {"params": [*self.model.value_head.parameters()], "lr": self.args.value_learning_rate}
            self.optimizer = kind([*policy, {**head, "weight_decay": 0.0}], **settings)
        return self.optimizer

    def _clip_grad_norm(self, model) -> torch.Tensor:
        return clip_gradients(self)

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        strata = [[stratum(row.get("label")) for row in task.rows] for task in self.tasks]
        batch = self.args.per_device_train_batch_size * processes.count()
        return TaskSampler(strata, batch, first_epoch_seed(self.args), self.args.balance_tasks)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if not isinstance(self.model, PeftModel):  # a folder that any program can load: no critic among the weights
            weights = state_dict or self.model.state_dict()
            state_dict = {name: weight for name, weight in weights.items() if not name.startswith("value_head.")}
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # Trainer comes here in every process
            return
        weights = {name: value.detach().cpu() for name, value in self.model.value_head.state_dict().items()}
        save_file(weights, Path(output_dir or self.args.output_dir) / VALUE_HEAD_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.model.value_head.load_state_dict(load_file(Path(resume_from_checkpoint) / VALUE_HEAD_FILE))


def check(args: PPOConfig, tasks: list[PPOTask]) -> None:
    """ValueError for a configuration that PPO has no use for, or whose parts do not fit each other."""
    if args.answer_space == "labels" and any(len(task.label_words) < 2 for task in tasks):
        raise ValueError("answer_space='labels' needs a task of at least two words; use answer_space='free'")
    for weights, functions in ((args.reward_weights, task.reward_funcs) for task in tasks):
        if weights and len(weights) != len(functions):
            raise ValueError(f"{len(weights)} reward_weights for {len(functions)} reward functions")
    prompts_per_step = args.per_device_train_batch_size * processes.count()
    if prompts_per_step % args.num_minibatches:
        raise ValueError(
            f"{prompts_per_step} prompts per step cannot be divided into {args.num_minibatches} minibatches"
        )
    if args.gradient_accumulation_steps != 1 or not args.max_grad_norm > 0:
        raise ValueError(
            f"gradient_accumulation_steps {args.gradient_accumulation_steps} must be 1, as a step is one rollout "
            f"(more prompts per step do the same), and max_grad_norm {args.max_grad_norm} greater than 0"
        )
    use_CoT = any(task.answer_format.use_CoT for task in tasks)
    if args.policy_gradient == "expected" and (args.answer_space != "labels" or use_CoT):
        raise ValueError(
            "policy_gradient='expected' sums over all labels, so it needs answer_space='labels' without use_CoT; "
            "use policy_gradient='sampled'"
        )
    if args.success_order < 1 or (args.success_order != 1 and args.policy_gradient != "expected"):
        raise ValueError(
            f"success_order {args.success_order} must be at least 1, and 1 unless policy_gradient='expected'"
        )
    if args.advantage in GROUP_ADVANTAGES and args.samples_per_prompt < 2:
        raise ValueError(f"advantage={args.advantage!r} compares the answers to a prompt: samples_per_prompt >= 2")
    if args.kl_target and not args.kl_coef > 0:
        raise ValueError(f"kl_target {args.kl_target} adapts kl_coef, which must be greater than 0")


def add_value_head(model: PreTrainedModel) -> None:
    """Give the model a critic: one linear layer in float32 that starts at zero.

    It is as wide as the states that the output layer reads, which is not hidden_size in every model: OPT-350m projects
    its last states to another width.
    """
    head = nn.Linear(model.get_output_embeddings().in_features, 1, bias=True, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.add_module("value_head", head)
