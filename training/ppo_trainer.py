"""PPO for answers of a few tokens: PPOConfig and PPOTrainer, on top of transformers.Trainer.

One trainer step is one rollout and all updates on it, so `max_steps`, `eval_steps` and `save_steps` count PPO steps.
Progress, checkpoints, resume, schedules and accelerate come from Trainer. Formulas: PPO, Schulman et al. 2017
(https://arxiv.org/abs/1707.06347); GAE, Schulman et al. 2016 (https://arxiv.org/abs/1506.02438); the sum over all
actions in place of a sample, Asadi et al. 2017 (https://arxiv.org/abs/1709.00503) and Ciosek and Whiteson 2018
(https://arxiv.org/abs/1801.05134); the implementation details follow https://arxiv.org/abs/2403.17031.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from engine.batches import common_prefix, grouped
from engine.decoding import Sampling
from engine.engine import Engine
from engine.judging import classify, generate_then_classify
from engine.trees import MASKED, Answer, LabelTrie, Tree
from machine import processes
from machine.errors import TrainingError
from training.objectives import against_siblings, clipped_surrogate, clipped_value_loss, explained_variance, gae, whiten
from training.run_trainer import RunTrainer
from training.sampler import StratifiedSampler

VALUE_HEAD_FILE = "value_head.safetensors"
KL_SHARE = 8  # one prompt in so many (at least one) has its KL measured when it is not part of the reward


@dataclass
class PPOConfig(TrainingArguments):
    """TrainingArguments and what PPO adds. `per_device_train_batch_size` counts prompts."""

    answer_space: str = field(default="labels", metadata={"help": "labels: other answers are masked; free: any token"})
    save_methods: str = field(default="step", metadata={"help": "how checkpoints are named: step or epoch"})
    epoch_offset: int = field(default=0, metadata={"help": "number of the first epoch, for the checkpoints' names"})
    use_CoT: bool = field(default=False, metadata={"help": "a free analysis comes before the answer"})
    policy_gradient: str = field(default="expected", metadata={"help": "sampled, or expected over all labels"})
    samples_per_prompt: int = field(default=1, metadata={"help": "answers sampled per prompt and step"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling, and of all log-probabilities"})
    max_response_length: int = field(default=16, metadata={"help": "tokens of an answer at most"})
    ppo_epochs: int = field(default=1, metadata={"help": "passes over each rollout"})
    num_minibatches: int = field(default=1, metadata={"help": "updates per pass; must divide the prompts per step"})
    clip_range: float = field(default=0.2, metadata={"help": "of the probability ratio"})
    value_clip_range: float = field(default=0.2, metadata={"help": "of the value's change"})
    kl_coef: float = field(default=0.0, metadata={"help": "weight of the KL to the reference in the reward"})
    entropy_coef: float = field(default=0.0, metadata={"help": "weight of the entropy bonus"})
    value_coef: float = field(default=0.5, metadata={"help": "weight of the value loss"})
    value_learning_rate: float = field(default=1e-3, metadata={"help": "of the value head"})
    gamma: float = field(default=1.0, metadata={"help": "discount"})
    lam: float = field(default=1.0, metadata={"help": "GAE's lambda"})
    tokens_per_micro_batch: int = field(default=1024, metadata={"help": "tokens that go through the network at once"})


def add(sums: dict, figures: dict) -> None:
    """Add figures to the sums under their names; tensors stay on their device, which need not be waited for."""
    for name, value in figures.items():
        sums[name] = sums.get(name, 0.0) + value


@dataclass
class Rollout:
    """One step's answers. Actions of all answers lie behind one another; an action's state is a node of a tree."""

    prompts: list[list[int]]
    trees: list[Tree]
    prompt: torch.Tensor  # (actions,) the prompt's number; this and the next always on the CPU
    node: torch.Tensor  # (actions,) the node at which the action was chosen
    column: torch.Tensor  # (actions,) the token, as a column of the answer space
    log_probs: torch.Tensor  # (actions,) under the policy that chose it
    values: torch.Tensor  # (actions,)
    advantages: torch.Tensor  # (actions,)
    returns: torch.Tensor  # (actions,)
    kept: list[torch.Tensor] | None  # per prompt (nodes, hidden) with gradient, until the first update uses them up


class PPOTrainer(RunTrainer, Trainer):
    """PPO on prompts whose answers a reward function can judge.

    Args:
        model: a causal language model; with `peft_config` an adapter is put on it, and the model without the adapter
            is the reference.
        reward_funcs: one or several functions `(completions: list[str], **columns) -> list[float]` (TRL's signature);
            their rewards add up.
        args: PPOConfig.
        train_dataset: rows with `prompt_ids` (token ids) or `prompt` (text), and the columns the rewards need.
        processing_class: the tokenizer.
        label_words: the words of the label set; needed for `answer_space="labels"`.
        completion: in labels mode, how a word is completed to the text that the reward functions judge.
        stop: whether generation may end at a text: in free mode an answer that is complete or can never become valid,
            with labels and chain of thought an analysis that is closed.
        credit: `(text, ended) -> int | None`, how many characters of an answer's text earn its reward (where its
            label ends); None if it has no label.
        is_correct: `(text, ended, row) -> bool`, for the accuracy that is logged.
        link: with labels and chain of thought, what leads from an analysis to its label (see
            generate_then_classify).
        compute_metrics: `(engine) -> dict` for evaluation on held-out rows; its `score` decides what is best.
        on_save: called with every checkpoint's folder before it counts as written.
    """

    _tag_names = ["ppo"]

    def __init__(
        self,
        model: PreTrainedModel,
        reward_funcs: Callable | Sequence[Callable],
        args: PPOConfig,
        train_dataset: Dataset | list[dict],
        processing_class: PreTrainedTokenizerBase,
        peft_config: LoraConfig | None = None,
        label_words: Sequence[str] = (),
        completion: Callable[[str], str] = str,
        stop: Callable[[str], bool] = lambda text: False,
        credit: Callable[[str, bool], int | None] = lambda text, ended: None,
        is_correct: Callable[[str, bool, dict], bool] | None = None,
        link: Callable[[Answer], tuple[list[int], str]] | None = None,
        compute_metrics: Callable[[Engine], dict[str, float]] | None = None,
        on_save: Callable[[Path], None] = lambda checkpoint: None,
        callbacks: list | None = None,
    ):
        if args.answer_space == "labels" and len(label_words) < 2:
            raise ValueError("answer_space='labels' needs at least two label_words; use answer_space='free'")
        prompts_per_step = args.per_device_train_batch_size * processes.count()
        if prompts_per_step % args.num_minibatches:
            raise ValueError(
                f"{prompts_per_step} prompts per step cannot be divided into {args.num_minibatches} minibatches"
            )
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        self.label_words, self.completion, self.stop, self.credit = tuple(label_words), completion, stop, credit
        self.is_correct, self.on_save = is_correct, on_save
        self.link = link
        self.expected = args.policy_gradient == "expected"
        if args.gradient_accumulation_steps != 1 or not args.max_grad_norm > 0:
            raise ValueError(
                f"gradient_accumulation_steps {args.gradient_accumulation_steps} must be 1, as a step is one rollout "
                f"(more prompts per step do the same), and max_grad_norm {args.max_grad_norm} greater than 0"
            )
        if self.expected and (args.answer_space != "labels" or args.use_CoT):
            raise ValueError(
                "policy_gradient='expected' sums over all labels, so it needs answer_space='labels' without use_CoT; "
                "use policy_gradient='sampled'"
            )
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        head = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=True, dtype=torch.float32)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        model.add_module("value_head", head)
        args.remove_unused_columns = False
        args._n_gpu = min(args.n_gpu, 1)  # one process drives one card; several cards take several processes
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda rows: {"rows": rows},
            train_dataset=train_dataset,
            eval_dataset=[] if compute_metrics else None,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.evaluation = compute_metrics
        self.engine = Engine(model, processing_class, args.tokens_per_micro_batch)
        self.engine.shared_length = common_prefix([self._prompt_ids(row) for row in train_dataset])
        words = [processing_class(word, add_special_tokens=False).input_ids for word in self.label_words]
        self.first_tokens = sorted({ids[0] for ids in words})
        self.trie = None
        if args.answer_space == "labels":
            self.trie = LabelTrie(words, processing_class.eos_token_id)
        self._step_metrics: dict[str, float] = {}
        self.episodes: list[dict] = []  # of the last step: prompt, answer, reward, row

    # ---------------------------------------------------------------------------------------------------- the policy

    def log_distributions(self, states: list[torch.Tensor], trees: list[Tree]) -> Iterator[torch.Tensor]:
        """Per prompt its states (nodes, hidden) -> (nodes, columns) log-probabilities of the answer space."""
        for group in grouped(states):
            nodes = [(i, node) for i in group for node in range(len(states[i]))]
            allowed = [trees[i].allowed.get(node) for i, node in nodes]
            flat = torch.cat([states[i] for i in group])
            log_probs = self._log_softmax(flat, allowed, [node for _, node in nodes])
            yield from log_probs.split([len(states[i]) for i in group])

    def _log_softmax(self, states: torch.Tensor, allowed: list[list[int] | None], nodes) -> torch.Tensor:
        """(n, hidden) states of n nodes, and what each allows -> (n, columns) log-probabilities of the answer space.

        One distribution for sampling, old, new and reference log-probabilities: same temperature, same mask.
        """
        if self.trie is not None and not self.args.use_CoT:
            logits = self.engine.logits(states, self.trie.vocabulary)
            return self.trie.log_probs(logits, self.args.temperature, nodes)
        logits = self.engine.logits(states) / self.args.temperature
        limited = [line for line, tokens in enumerate(allowed) if tokens is not None]
        if limited:
            mask = torch.zeros_like(logits)
            mask[self.engine.to_device(torch.tensor(limited))] = MASKED
            places = torch.tensor([(line, token) for line in limited for token in allowed[line]])
            mask[tuple(self.engine.to_device(places.T))] = 0.0
            logits = logits + mask
        return torch.log_softmax(logits, dim=-1)

    def values(self, states: torch.Tensor) -> torch.Tensor:
        """(..., hidden) states -> (...) values. The states are detached: the critic does not shape the policy."""
        return self.model.value_head(states.detach().float())[..., 0]

    # ------------------------------------------------------------------------------------------------------ one step

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Roll out, then update; the last update's optimizer step is left to Trainer. Returns the mean loss."""
        model.eval()  # dropout would make the ratio differ from 1 on the first pass
        started, tokens = time.perf_counter(), self.engine.tokens_computed
        # Of all processes' rows this one has those from `first` on; the draws are the same for any number of processes.
        self.first = processes.number() * len(inputs["rows"])
        self.generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        rows = inputs["rows"]
        prompts = [self._prompt_ids(row) for row in rows]
        try:
            with self.enough_memory("Lower --max_prompt_length or --repeat_time"):
                step = self._expected_step(rows, prompts) if self.expected else self._sampled_step(rows, prompts)
        except FloatingPointError as error:
            raise TrainingError(
                f"{error} at step {self.state.global_step + 1}; {self._last_checkpoint_text()}. Lower --learning_rate"
            ) from error
        if not math.isfinite(step):
            raise TrainingError(
                f"the loss is {step} at step {self.state.global_step + 1}; {self._last_checkpoint_text()}. "
                "Lower --learning_rate or raise --kl_coef"
            )
        seconds = time.perf_counter() - started
        self._step_metrics |= {
            "time/seconds_per_step": seconds,
            "time/samples_per_second": processes.count() * len(rows) * self.samples_per_prompt / seconds,
            "time/tokens_per_second": sum(processes.all_gather([self.engine.tokens_computed - tokens])) / seconds,
        }
        return torch.tensor(step, device=self.args.device)

    @property
    def samples_per_step(self) -> int:
        return self.args.per_device_train_batch_size * processes.count() * self.samples_per_prompt

    @property
    def samples_per_prompt(self) -> int:
        return 1 if self.expected else self.args.samples_per_prompt

    def _prompt_ids(self, row: dict) -> list[int]:
        if "prompt_ids" in row:
            return list(row["prompt_ids"])
        return self.processing_class(row["prompt"], add_special_tokens=False).input_ids

    def _updates(self, count: int, update: Callable[[list[int], list[int]], dict]) -> dict[str, float]:
        """Every update of every pass over the rollout: its gradient, the sum over all processes, an optimizer step.

        `update(mine, all)` adds up the gradient of a minibatch and returns sums of figures. `all` are the minibatch's
        prompts, numbered over all processes, `mine` those that are here, numbered from 0 to `count`. The last optimizer
        step is left to Trainer. An update that runs out of memory is begun again with smaller micro-batches. Returns
        the figures, summed over all updates and processes.
        """
        everything = count * processes.count()
        size, total = everything // self.args.num_minibatches, self.args.ppo_epochs * self.args.num_minibatches
        shuffle = torch.Generator().manual_seed(self.generator.initial_seed())
        order: list[int] = []
        sums: dict = {}
        for number in range(total):
            if not order:
                order = list(range(everything))
                order = torch.randperm(everything, generator=shuffle).tolist() if total > 1 else order
            if number:
                self._clip_grad_norm(self.model)
                self.optimizer.step()
            minibatch, order = order[:size], order[size:]
            mine = [i - self.first for i in minibatch if 0 <= i - self.first < count]

            def from_zero(mine=mine, minibatch=minibatch) -> dict:
                self.model.zero_grad()
                return update(mine, minibatch)

            add(sums, self.engine.retry_with_smaller_batches(from_zero))
            processes.add_gradients(self.model.parameters())
        totals: dict = {}
        for part in processes.all_gather([{name: float(value) for name, value in sums.items()}]):
            add(totals, part)
        return totals

    def _measured(self, count: int) -> int:
        """On how many of the `count` prompts here the reference is asked: all, or the first few of all processes."""
        sample = max(1, count * processes.count() // KL_SHARE)
        return count if self.args.kl_coef else min(max(sample - self.first, 0), count)

    # ------------------------------------------------------------------------------- expected: all labels, no samples

    def _expected_step(self, rows: list[dict], prompts: list[list[int]]) -> float:
        """The clipped surrogate summed over all labels, weighted by the old policy.

        The first update's own forward serves as the rollout's: old and new policy are the same there, and the ratio is
        exactly 1. An advantage is a label's reward less the mean reward under the old policy, so no critic is needed.
        """
        args, trie = self.args, self.trie
        trees = [trie.tree] * len(prompts)
        label_rewards = self._label_rewards(rows)  # (prompts, labels)
        rewards = self.engine.to_device(label_rewards)
        measured = self._measured(len(prompts))
        reference = torch.zeros_like(rewards)
        with torch.no_grad():
            for i, states in enumerate(self.engine.states(prompts[:measured], trees[:measured], reference=True)):
                reference[i] = self._label_log_probs(states[None])[0]
        old = torch.zeros_like(rewards)
        known: set[int] = set()

        def update(mine: list[int], minibatch: list[int]) -> dict:
            sums: dict = {}
            for places, states in self.engine.training_batches([prompts[i] for i in mine], [trees[i] for i in mine]):
                numbers = [mine[p] for p in places]
                index = self.engine.to_device(torch.tensor(numbers))
                new = self._label_log_probs(states)  # (rows, labels)
                if not known.issuperset(numbers):  # only in a row's first update, whose policy is the old one
                    old[index] = new.detach()
                    known.update(numbers)
                before = old[index]
                q = rewards[index] - args.kl_coef * (before - reference[index])
                advantage = q - (before.exp() * q).sum(-1, keepdim=True)
                ratio = torch.exp(new - before)
                surrogate = (before.exp() * clipped_surrogate(ratio, advantage, args.clip_range)).sum(-1)
                entropy = -(new.exp() * new).sum(-1)
                loss = -(surrogate + args.entropy_coef * entropy).sum() / len(minibatch)
                self.accelerator.backward(loss)
                with torch.no_grad():
                    clipped = (before.exp() * ((ratio - 1).abs() > args.clip_range)).sum()
                    divergence = (before.exp() * (before - new)).sum()
                    add(sums, {"loss": loss * len(minibatch), "entropy": entropy.sum(), "clip": clipped,
                               "approx_kl": divergence})  # fmt: skip
            return sums

        sums = self._updates(len(prompts), update)
        passes = args.ppo_epochs * len(prompts) * processes.count()
        chance = old.exp()
        correct = self._expected_correct(rows, chance)
        drift = (chance * (old - reference)).sum(-1)[:measured]
        here = chance, rewards, drift, correct
        chance, all_rewards, drift, correct = (torch.cat(processes.all_gather([x.cpu()])) for x in here)
        reward = (chance * all_rewards).sum(-1)
        self._log_step(
            reward=reward,
            kl=float(drift.mean()),
            entropy=sums["entropy"] / passes,
            shares={word: float(share) for word, share in zip(self.label_words, chance.mean(0))},
            accuracy=float(correct.mean()) if len(correct) else None,
            spread=float((chance * (all_rewards - reward[:, None]) ** 2).sum(-1).mean().sqrt()),
        )
        self._step_metrics |= {
            "policy/clip_fraction": sums["clip"] / passes,
            "policy/approx_kl": sums["approx_kl"] / passes,
        }
        best = old.argmax(-1).tolist()
        self.episodes = [
            {"prompt": p, "answer": self.label_words[a], "reward": float(r[a]), "row": row}
            for p, a, r, row in zip(prompts, best, label_rewards, rows)
        ]
        return sums["loss"] / passes

    def _expected_correct(self, rows: list[dict], chance: torch.Tensor) -> torch.Tensor:
        """(prompts,) probability of a correct label; empty if `is_correct` was not given."""
        if self.is_correct is None:
            return torch.zeros(0)
        texts = [self.completion(word) for word in self.label_words]
        correct = [[float(self.is_correct(text, True, row)) for text in texts] for row in rows]
        return (chance.cpu() * torch.tensor(correct)).sum(-1)

    def _label_log_probs(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, nodes, hidden) states of the trie's nodes -> (rows, labels) log-probabilities of whole labels."""
        logits = self.engine.logits(states, self.trie.vocabulary)
        return self.trie.label_log_probs(self.trie.log_probs(logits, self.args.temperature))

    def _label_rewards(self, rows: list[dict]) -> torch.Tensor:
        """(prompts, labels) reward of every label for every row."""
        texts = [self.completion(word) for word in self.label_words]
        flat = self._rewards(texts * len(rows), [row for row in rows for _ in texts])
        return torch.tensor(flat).view(len(rows), len(texts))

    def _rewards(self, completions: list[str], rows: list[dict]) -> list[float]:
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "completions"}
        totals = [0.0] * len(completions)
        for function in self.reward_funcs:
            with self.named_failure(f"the reward function {getattr(function, '__name__', function)}"):
                values = function(completions=completions, **columns)
            if len(values) != len(completions) or not all(math.isfinite(v) for v in values):
                raise TrainingError(
                    f"the reward function {getattr(function, '__name__', function)} must return one finite number per "
                    f"completion; it returned {len(values)} for {len(completions)}: {values[:5]}"
                )
            totals = [a + b for a, b in zip(totals, values)]
        return totals

    # --------------------------------------------------------------------------------------------------- sampled PPO

    def _sampled_step(self, rows: list[dict], prompts: list[list[int]]) -> float:
        """PPO as published: sample answers, estimate advantages with the critic, update on the clipped surrogate."""
        args = self.args
        rollout = self._rollout(rows, prompts)
        by_prompt: list[list[int]] = [[] for _ in prompts]
        for action, prompt in enumerate(rollout.prompt.tolist()):
            by_prompt[prompt].append(action)

        actions_of = processes.all_gather([len(actions) for actions in by_prompt])  # per prompt, of all processes

        def update(mine: list[int], minibatch: list[int]) -> dict:
            total = sum(actions_of[i] for i in minibatch)
            sums = {"actions": sum(len(by_prompt[i]) for i in mine)}
            if rollout.kept is not None:
                # The network has not changed since the rollout: its forward is this update's too.
                batches = [(range(len(mine)), pad_sequence([rollout.kept[i] for i in mine], batch_first=True))]
                rollout.kept = None
            else:
                batches = self.engine.training_batches([prompts[i] for i in mine], [rollout.trees[i] for i in mine])
            for places, states in batches:
                actions = [(place, a) for place, p in enumerate(places) for a in by_prompt[mine[p]]]
                index, place = (torch.tensor(numbers) for numbers in zip(*((a, p) for p, a in actions)))
                # Samples that agree so far share a state: its distribution is computed once.
                pairs, line = torch.unique(torch.stack([place, rollout.node[index]]), dim=1, return_inverse=True)
                allowed = [rollout.trees[mine[places[p]]].allowed.get(n) for p, n in pairs.T.tolist()]
                # All of that is worked out on the CPU, so that it need not wait for a card.
                index, line, pairs = (self.engine.to_device(x) for x in (index, line, pairs))
                at_node = states[pairs[0], pairs[1]]  # (states, hidden)
                log_probs = self._log_softmax(at_node, allowed, pairs[1])  # (states, columns)
                new = log_probs[line, rollout.column[index]]  # (actions,)
                values = self.values(at_node)[line]
                old, advantage = rollout.log_probs[index], rollout.advantages[index]
                ratio = torch.exp(new - old)
                surrogate = clipped_surrogate(ratio, advantage, args.clip_range)
                entropy, paid = (x[line] for x in self._entropy(log_probs, pairs[1], allowed))
                value_loss = clipped_value_loss(
                    values, rollout.values[index], rollout.returns[index], args.value_clip_range
                )
                per_action = -surrogate - args.entropy_coef * entropy + args.value_coef * value_loss
                self.accelerator.backward(per_action.sum() / total)
                with torch.no_grad():
                    add(sums, {"loss": per_action.sum(), "entropy": entropy.sum(), "paid": paid.sum(),
                               "value_loss": value_loss.sum(),
                               "clip": ((ratio - 1).abs() > args.clip_range).sum(),
                               "approx_kl": ((ratio - 1) - (new - old)).sum(), "ratio": ratio.sum()})  # fmt: skip
            return sums

        sums = self._updates(len(prompts), update)
        mean = {name: value / sums["actions"] for name, value in sums.items()}
        mean["entropy"] = sums["entropy"] / max(sums["paid"], 1)
        self._step_metrics |= {
            "objective/entropy": mean["entropy"],
            "policy/clip_fraction": mean["clip"],
            "policy/approx_kl": mean["approx_kl"],
            "policy/ratio": mean["ratio"],
            "value/loss": mean["value_loss"],
            "value/explained_variance": explained_variance(
                *(torch.cat(processes.all_gather([x.cpu()])) for x in (rollout.values, rollout.returns))
            ),
        }
        return mean["loss"]

    def _entropy(
        self, log_probs: torch.Tensor, nodes: torch.Tensor, allowed: list[list[int] | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(states,) the entropy that earns the bonus, and whether a state has any: where a choice among labels is made.

        Over the whole vocabulary a bonus would pay for junk: entropy is cheapest where no label stands. So an analysis
        earns none, and in free mode the choice is that among the labels' first tokens, if the answer begins with it.
        """
        if self.trie is None:
            paid = (nodes == 0) & (not self.args.use_CoT and len(self.first_tokens) > 1)
            first = self.engine.to_device(torch.tensor(self.first_tokens))
            log_probs = torch.log_softmax(log_probs[:, first], dim=-1)
        elif self.args.use_CoT:
            paid = self.engine.to_device(torch.tensor([tokens is not None for tokens in allowed]))
        else:
            paid = torch.ones_like(nodes, dtype=torch.bool)
        return -(log_probs.exp() * log_probs).sum(-1) * paid, paid

    @torch.no_grad()
    def _rollout(self, rows: list[dict], prompts: list[list[int]]) -> Rollout:
        args = self.args
        trees, answers, states = self._answer(prompts)
        flat = [(p, answer) for p, group in enumerate(answers) for answer in group]
        scores = self._rewards(
            [answer.text for _, answer in flat], [{**rows[p], "ended": answer.ended} for p, answer in flat]
        )
        compact = self.trie is not None and not args.use_CoT
        column_of = {t: i for i, t in enumerate(self.trie.vocabulary)} if compact else None
        prompt = torch.tensor([p for p, answer in flat for _ in answer.nodes])
        node = torch.tensor([n for _, answer in flat for n in answer.nodes])
        column = torch.tensor([column_of[t] if column_of else t for _, answer in flat for t in answer.tokens])
        actions = [sum(len(answer.nodes) for answer in group) for group in answers]  # per prompt
        chosen = list(zip(*(x.to(args.device).split(actions) for x in (node, column))))
        distributions = self.log_distributions(states, trees)
        old = [log_probs[nodes, columns] for log_probs, (nodes, columns) in zip(distributions, chosen)]
        values = torch.cat([self.values(state)[nodes] for state, (nodes, _) in zip(states, chosen)])
        kl = self._kl(prompts, trees, chosen, old).cpu()
        old = torch.cat(old)
        rewards, start = (-args.kl_coef * kl).tolist(), 0
        all_scores = processes.all_gather(scores)
        equal = max(all_scores) - min(all_scores) < 1e-6
        starts = []
        for (_, answer), score in zip(flat, scores):
            rewards[start + self._credited(answer)] += score
            starts.append(start)
            start += len(answer.tokens)
        advantages, returns, valued = [], [], values.tolist()
        for begin, (_, answer) in zip(starts, flat):
            part = slice(begin, begin + len(answer.tokens))
            a, r = gae(rewards[part], valued[part], args.gamma, args.lam)
            advantages, returns = advantages + a, returns + r
        advantages, returns = torch.tensor(advantages), torch.tensor(returns)
        if equal:
            # Nothing tells one answer from another: what is left of the advantages would be the critic's noise.
            costs = (-args.kl_coef * kl).tolist()
            advantages = torch.tensor(
                [x for begin, (_, answer) in zip(starts, flat) for x in gae(
                    costs[begin : begin + len(answer.tokens)], [0.0] * len(answer.tokens), args.gamma, args.lam)[0]]
            )  # fmt: skip
        elif args.lam == 1.0 and args.samples_per_prompt > 1:
            advantages = self._whiten(against_siblings(advantages, returns, prompt, node))
        else:
            advantages = self._whiten(advantages)
        self._log_rollout(rows, prompts, flat, scores, equal)
        device = args.device
        return Rollout(
            prompts, trees, prompt, node, column.to(device), old.to(device), values.to(device), advantages.to(device),
            returns.to(device), states if all(s.requires_grad for s in states) else None,
        )  # fmt: skip

    def _whiten(self, advantages: torch.Tensor) -> torch.Tensor:
        """Whitened over the rollouts of all processes."""
        return whiten(advantages, torch.cat(processes.all_gather([advantages])))

    def _answer(self, prompts: list[list[int]]) -> tuple[list[Tree], list[list[Answer]], list[torch.Tensor]]:
        """Trees, sampled answers and states per prompt, in free mode by generation, in labels mode by the trie."""
        args = self.args
        keep = args.num_minibatches == 1  # one update takes all of the rollout
        sampling = Sampling(
            self.stop, args.max_response_length, args.samples_per_prompt, args.temperature, self.generator, self.first
        )
        if self.trie is None:
            return self.engine.generate(prompts, sampling, keep=keep)
        words = tuple(self.completion(word) for word in self.label_words)
        if args.use_CoT:
            return generate_then_classify(self.engine, prompts, sampling, self.trie, words, self.link, keep=keep)
        return classify(self.engine, prompts, sampling, self.trie, words, keep=keep)

    def _credited(self, answer: Answer) -> int:
        """Which of the answer's tokens earns the reward: the one that completes the label, else the last."""
        end = self.credit(answer.text, answer.ended)
        if answer.label is None and end is not None:
            for t in range(len(answer.tokens)):
                if len(self.processing_class.decode(answer.tokens[: t + 1])) >= end:
                    return t
        return len(answer.tokens) - 1

    def _kl(self, prompts, trees, chosen: list[tuple], old: list[torch.Tensor]) -> torch.Tensor:
        """(actions,) log-probability less the reference's (k1); on a few prompts if it is no part of the reward.

        Per prompt the (nodes, columns) of its actions, and their log-probabilities.
        """
        measured = self._measured(len(prompts))
        states = self.engine.states(prompts[:measured], trees[:measured], reference=True)
        kl = [torch.zeros_like(x) for x in old]
        for p, log_probs in enumerate(self.log_distributions(states, trees)):
            kl[p] = old[p] - log_probs[chosen[p]]
        kl = torch.cat(kl)
        measures = processes.all_gather([(float(kl.sum()), sum(map(len, old[:measured])))])
        total, actions = (sum(numbers) for numbers in zip(*measures))
        self._step_metrics["objective/kl"] = total / max(actions, 1)
        return kl

    # ------------------------------------------------------------------------------------------------------- logging

    def _log_rollout(self, rows, prompts, flat, scores, equal: bool) -> None:
        self.episodes = [
            {"prompt": prompts[p], "answer": answer.text, "reward": score, "row": rows[p]}
            for (p, answer), score in zip(flat, scores)
        ]
        about = [
            (score, self._answered(answer), len(answer.tokens),
             self.is_correct and self.is_correct(answer.text, answer.ended, rows[p]))
            for (p, answer), score in zip(flat, scores)
        ]  # fmt: skip
        scores, words, lengths, correct = zip(*processes.all_gather(about))
        self._log_step(
            reward=torch.tensor(scores),
            kl=self._step_metrics["objective/kl"],
            entropy=0.0,
            shares={word: words.count(word) / len(words) for word in dict.fromkeys(words)},
            accuracy=sum(correct) / len(correct) if self.is_correct else None,
            spread=float(torch.tensor(scores).std()) if len(scores) > 1 else 0.0,
        )
        self._step_metrics["policy/equal_rewards"] = float(equal)
        self._step_metrics["objective/response_length"] = sum(lengths) / len(lengths)

    def _answered(self, answer: Answer) -> str:
        """Which of the label words an answer gives: `invalid` if none, `other` for a number that is not listed."""
        if answer.label is not None:
            return self.label_words[answer.label]
        end = self.credit(answer.text, answer.ended)
        if end is None:
            return "invalid"
        text = answer.text[:end].lower().replace("_", " ").replace("-", " ")
        # What comes before the word is an analysis.
        fitting = [w for w in self.label_words if text.endswith(w.lower().replace("_", " ").replace("-", " "))]
        return max(fitting, key=len, default="other")

    def _log_step(self, reward: torch.Tensor, kl: float, entropy: float, shares: dict, accuracy, spread: float) -> None:
        if accuracy is not None:
            self._step_metrics["objective/accuracy"] = accuracy
        self._step_metrics |= {
            "objective/invalid_rate": shares.get("invalid", 0.0),
            "objective/reward": float(reward.mean()),
            "objective/reward_std": spread,
            "objective/kl": kl,
            "objective/entropy": entropy,
            **{f"objective/share/{word}": share for word, share in shares.items()},
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's PPO metrics to Trainer's own, under the names of the dashboards."""
        if "loss" in logs:
            logs = {"policy/loss": logs.pop("loss"), "policy/learning_rate": logs.pop("learning_rate"),
                    "policy/grad_norm": logs.pop("grad_norm", 0.0), **logs, **self._step_metrics,
                    **self.so_far()}  # fmt: skip
            self._step_metrics = {}
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------- optimizer, checkpoints, resume

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Adam (epsilon 1e-5, no weight decay) with a learning rate of its own for the value head."""
        if self.optimizer is None:
            head = list(self.model.value_head.parameters())
            policy = [
                p for n, p in self.model.named_parameters() if p.requires_grad and not n.startswith("value_head.")
            ]
            self.optimizer = torch.optim.Adam(
                [
                    {"params": policy, "lr": self.args.learning_rate},
                    {"params": head, "lr": self.args.value_learning_rate},
                ],
                eps=1e-5,
            )
        return self.optimizer

    def _clip_grad_norm(self, model):
        """Clip policy and critic apart, so that a surprised critic does not shrink the policy's step. A gradient that
        is not finite must stop the run before the weights change, so here a card is waited for, once per update."""
        norms = [
            nn.utils.clip_grad_norm_(group["params"], self.args.max_grad_norm) for group in self.optimizer.param_groups
        ]
        for norm in torch.stack(norms).tolist():
            if not math.isfinite(norm):
                raise TrainingError(
                    f"the gradient is {norm} at step {self.state.global_step + 1}; "
                    f"{self._last_checkpoint_text()}. Lower --learning_rate"
                )
        return norms[0]

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        labels = [row.get("label") for row in rows]
        first = self.args.seed + self.args.epoch_offset  # epoch n has one order, whichever run it is in
        return StratifiedSampler([round(x) if isinstance(x, float) else x for x in labels], first)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # Trainer comes here in every process
            return
        weights = {name: value.detach().cpu() for name, value in self.model.value_head.state_dict().items()}
        save_file(weights, Path(output_dir or self.args.output_dir) / VALUE_HEAD_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.model.value_head.load_state_dict(load_file(Path(resume_from_checkpoint) / VALUE_HEAD_FILE))
