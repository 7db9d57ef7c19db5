"""SFTTrainer with the evaluation, the checkpoints and the names of figures that ppo.py's trainer has.

Where the loss is on the answers alone, the engine computes the forward: the prompts' common prefix goes through the
network once per step, and the rows in micro-batches cut by tokens. Loss and gradient equal SFTTrainer's (tested). With
`label_tries` the loss is the cross-entropy over a task's labels; forward and order of the rows are then ppo.py's.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from engine.engine import Engine
from engine.network import Network
from engine.output import CAP, Transform
from engine.trees import LabelTrie, Tree
from machine import processes
from machine.errors import ArgumentError
from machine.memory import OF_ALL_WEIGHTS, training_token_budget
from training.policy import label_batches
from training.run_trainer import RunTrainer
from training.sampler import StratifiedSampler, first_epoch_seed, stratum

IGNORED = -100  # label of a token without loss
TRL_FACTORS = ("logit_scale", "output_multiplier")  # of logits, in configurations


@dataclass
class RunConfig(SFTConfig):
    """SFTConfig, how checkpoints are named, and whether the engine's forward is used."""

    save_methods: str = field(default="step", metadata={"help": "step or epoch"})
    epoch_offset: int = field(default=0, metadata={"help": "number of the first epoch"})
    shared_prefix: bool = field(default=False, metadata={"help": "rows are a prompt without loss, then an answer"})
    tokens_per_micro_batch: int | None = field(default=None, metadata={"help": "of the engine; None: by free memory"})
    rows_per_sequence: float = field(default=1, metadata={"help": "of packed sequences, on average"})


class Finetuner(RunTrainer, SFTTrainer):
    """SFTTrainer with the evaluation, the checkpoints and the names of figures that ppo.py has.

    Args (all others are SFTTrainer's):
        evaluate_with: `(engine) -> dict` of held-out figures, whose `score` decides what is best.
        on_save: called with every checkpoint's folder before it counts as written.
        engine: that of the model, as engine.loading gives it; None: a new one.
        label_tries: of every task, to learn the choice among its labels. A row of the data set then has `prompt_ids`,
            `task` (its number among the tries), `target` (a weight for each label) and `label`.
    """

    def __init__(
        self,
        *args,
        evaluate_with,
        on_save,
        engine: Engine | None = None,
        label_tries: list[LabelTrie] | None = None,
        **kwargs,
    ):
        if label_tries:
            kwargs["data_collator"] = lambda rows: {"rows": rows}
        super().__init__(*args, **kwargs)
        self.label_tries = label_tries
        peft_config = kwargs.get("peft_config")
        self.dropout = peft_config is not None and peft_config.lora_dropout > 0
        self.evaluation, self.on_save = evaluate_with, on_save
        copies = 0 if peft_config else OF_ALL_WEIGHTS
        tokens = self.args.tokens_per_micro_batch or training_token_budget(self.model, copies=copies)
        self.engine = engine or Engine(self.model, self.processing_class)
        by_engine = bool(label_tries) or self.args.shared_prefix
        self.engine.start_training(self.model, tokens, by_engine and self.args.activation_checkpointing)
        self.args.activation_checkpointing &= not by_engine
        self.episodes: list[dict] = []  # of the last evaluation
        self.started: float | None = None  # when the step's first micro-batch began

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.started = self.started or time.perf_counter()
        if self.label_tries or self.args.shared_prefix:
            with self.enough_memory("Lower --max_prompt_length"):
                loss = self._label_step(inputs["rows"]) if self.label_tries else self._answer_step(inputs)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self.failure(f"the loss is {float(loss)}", "Lower --learning_rate")
        return loss

    def _answer_step(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of the answers' tokens, its gradient added to the weights'. Inputs (batch, tokens)."""
        self.model.train()
        prompts, answers = prompts_and_answers(inputs)
        count = sum(map(len, answers))
        return self._mean_loss("token_accuracy", count, lambda total: self._add_gradient(prompts, answers, total))

    def _label_step(self, rows: list[dict]) -> torch.Tensor:
        """Mean cross-entropy over the rows' label sets, its gradient added to the weights'."""
        self.model.train(self.dropout)  # none as in PPO, unless the adapter has some
        return self._mean_loss("accuracy", len(rows), lambda total: self._add_label_gradient(rows, total))

    def _mean_loss(self, accuracy: str, count: int, add_gradient: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The loss of all processes, its gradient in the weights'.

        accuracy: what the share of correct predictions is called. count: of the predictions of this process.
        add_gradient: is given the number of all processes' predictions; see `_add_gradient`.
        """
        total = sum(processes.all_gather([count]))

        def from_zero() -> torch.Tensor:
            # No collective in here: a process that runs out of memory begins again alone.
            self.model.zero_grad()
            return add_gradient(total)

        sums = self.engine.retry_with_smaller_batches(from_zero)
        processes.add_gradients(self.model.parameters())
        loss, correct, entropy = (sum(part) for part in zip(*processes.all_gather([tuple(sums.tolist())])))
        self._metrics["train"][accuracy].append(correct / total)
        self._metrics["train"]["entropy"].append(entropy / total)
        return torch.tensor(loss, device=self.args.device)

    def _add_label_gradient(self, rows: list[dict], total: int) -> torch.Tensor:
        """The gradient of these rows' share of a mean over `total` rows. Returns (3,): loss, correct labels and
        entropy, summed. A task's prompts go through the network together: they have a long prefix in common."""
        sums = torch.zeros(3, device=self.args.device)
        for number, trie in enumerate(self.label_tries):  # also without rows: sharded weights are used in lockstep
            mine = [row for row in rows if row["task"] == number]
            for places, log_probs in label_batches(self.engine, trie, [row["prompt_ids"] for row in mine]):
                target = self.engine.to_device(torch.tensor([mine[p]["target"] for p in places]))  # (rows, labels)
                loss = -(target * log_probs).sum() / total
                self.accelerator.backward(loss)
                with torch.no_grad():
                    correct = (log_probs.argmax(-1) == target.argmax(-1)).sum()
                    sums += torch.stack([loss, correct, -(log_probs.exp() * log_probs).sum()])
        return sums

    def _add_gradient(self, prompts: list[list[int]], answers: list[list[int]], total: int) -> torch.Tensor:
        """The gradient of these rows' share of a mean over `total` tokens. Returns (3,): loss, correct tokens and
        entropy, summed."""
        # Node t of a row's tree is the state after t tokens of its answer, and predicts the next one.
        trees = [Tree([-1, *a[:-1]], [*range(-1, len(a) - 1)], [*range(len(a))]) for a in answers]
        sums = torch.zeros(3, device=self.args.device)
        for rows, states in self.engine.training_batches(prompts, trees):
            positions = [(line, t) for line, row in enumerate(rows) for t in range(len(answers[row]))]
            line, node = (torch.tensor(numbers, device=states.device) for numbers in zip(*positions))
            gold = torch.tensor([token for row in rows for token in answers[row]], device=states.device)
            log_probs = torch.log_softmax(self.engine.logits(states[line, node]), dim=-1)  # (tokens, vocabulary)
            loss = torch.nn.functional.nll_loss(log_probs, gold, reduction="sum") / total
            self.accelerator.backward(loss)
            with torch.no_grad():
                correct = (log_probs.argmax(-1) == gold).sum()
                sums += torch.stack([loss, correct, -(log_probs.exp() * log_probs).sum()])
        return sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's and SFTTrainer's figures under the names of the dashboards."""
        if "loss" in logs:
            found = {name.removeprefix("mean_"): values for name, values in self._metrics["train"].items() if values}
            inner = {name: sum(values) / len(values) for name, values in found.items()}
            logs = {
                "train/loss": logs["loss"],
                "train/learning_rate": logs["learning_rate"],
                "train/grad_norm": logs.get("grad_norm", 0.0),
                **{f"train/{name}": inner[name] for name in ("token_accuracy", "accuracy", "entropy") if name in inner},
                "time/seconds_per_step": time.perf_counter() - self.started,
                **self.so_far(),
            }
            self._metrics["train"].clear()
            self.started = None
        Trainer.log(self, logs, start_time)

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        if not self.label_tries:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        strata = [(task, stratum(label)) for task, label in zip(rows["task"], rows["label"])]
        return StratifiedSampler(strata, first_epoch_seed(self.args))

    @property
    def samples_per_step(self) -> int:
        args = self.args
        sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes.count()
        return round(sequences * args.rows_per_sequence)


def loss_type(network: Network) -> str:
    """SFTConfig's: logits only where there is a loss. TRL computes them itself then, and knows some of the factors and
    caps that models have after the output layer; with others the model computes all logits."""
    config = network.causal_lm.config.get_text_config()
    factor = next((x for name in TRL_FACTORS if (x := getattr(config, name, None)) is not None), 1.0)
    known = network.transform == Transform(factor, getattr(config, CAP, None))
    return "chunked_nll" if known else "nll"


# TRL names the attention kernels that it knows to keep packed rows apart; check_packing looks at what this model does.
logging.getLogger("trl.trainer.sft_trainer").addFilter(lambda line: "Flash Attention" not in line.getMessage())


@torch.no_grad()
def check_packing(network: Network) -> None:
    """ArgumentError unless packed rows compute as if each were alone: by their positions the model's code must tell
    that a row begins."""
    rows = [[3, 5, 7, 9, 11], [13, 6, 2], [4, 8, 12, 16]]
    packed = {"input_ids": [sum(rows, [])], "position_ids": [[i for row in rows for i in range(len(row))]]}
    packed = {name: network.to_device(torch.tensor(ids)) for name, ids in packed.items()}
    try:
        found = network.backbone(**packed, use_cache=False).last_hidden_state[0].float()
    except TypeError:  # no position_ids
        found = None
    alone = [network.backbone(network.to_device(torch.tensor([row])), use_cache=False) for row in rows]
    alone = torch.cat([output.last_hidden_state[0] for output in alone])
    allowed = 1e-3 if alone.dtype == torch.float32 else 5e-2
    if found is None or float((found - alone.float()).norm() / alone.float().norm()) > allowed:
        raise ArgumentError(
            f"--packing True: the code of {network.causal_lm.name_or_path} lets packed rows see each other; "
            "leave it at False"
        )


def prompts_and_answers(inputs: dict[str, torch.Tensor]) -> tuple[list[list[int]], list[list[int]]]:
    """(batch, tokens) input_ids, labels and attention_mask -> token ids of each row's prompt and answer. The labels are
    the answer's, which is what the row ends with."""
    prompts, answers = [], []
    for ids, labels, mask in zip(*(inputs[name].cpu() for name in ("input_ids", "labels", "attention_mask"))):
        ids, size = ids[mask.bool()].tolist(), int((labels != IGNORED).sum())
        prompts.append(ids[:-size])
        answers.append(ids[-size:])
    return prompts, answers
