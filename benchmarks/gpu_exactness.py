"""States, log-probabilities, loss and gradients of the engine against the plain forward, in float32 and bfloat16.

    .venv/bin/python -m benchmarks.gpu_exactness --shape 135M

How far may two correct programs differ? Both are compared with the same weights in a wider number format (float64 for
float32, float32 for bfloat16), which rounds so much more finely that it counts as exact. The plain forward's distance
from it is what rounding alone does at this depth. The engine does the same operations in another order, so the errors
of its thousands of numbers are other draws from the same distribution, and the norm of so many draws hardly varies:
the engine may be FACTOR times as far. The loss is one number, whose distance may be small by chance; |w . e| <= |w| |e|
bounds it by the log-probabilities' distance.

The plain forward's own distance must be what rounding explains, too. A block rounds about ROUNDINGS times, each by at
most half the format's epsilon e, in independent directions: after L blocks e / 2 sqrt(ROUNDINGS L). Products of random
weights amplify none of it much; more than AMPLIFIED times that would mean a coarser format than the one that was asked
for (TF32 in place of float32, say).
"""

import argparse
import copy
import math
import random

import torch
from peft import get_peft_model

from benchmarks import gpu_models
from engine import models
from engine.engine import Engine
from engine.trees import Tree

FACTOR, ROUNDINGS, AMPLIFIED = 2.0, 16, 8.0
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
LAYOUTS = {"packed": (True, None), "padded": (False, None), "separate prefix": (False, 1)}
Found = dict[str, torch.Tensor]


def examples(seed: int = 0, size: int = 1000) -> tuple[list[list[int]], list[Tree]]:
    """Prompts with a shared prefix, of unequal lengths, and branched, chained and empty trees after them."""
    draw = random.Random(seed)
    prefix = [draw.randrange(size) for _ in range(40)]
    prompts = [prefix + [draw.randrange(size) for _ in range(draw.randint(1, 60))] for _ in range(12)]
    trees = []
    for i in range(len(prompts)):
        tree = Tree()
        for _ in range((0, 3, 9)[i % 3]):
            tree.child(len(tree) - 1 if i % 3 == 1 else draw.randrange(len(tree)), draw.randrange(size))
        trees.append(tree)
    return prompts, trees


def evaluated(model, states: torch.Tensor) -> Found:
    """What is compared, of the states (nodes, hidden) of all trees. The loss weighs 64 tokens of every node at random.
    Without a gradient in the states there is none to compare."""
    columns = list(range(0, 640, 10))
    logits = model.get_output_embeddings()(states)
    log_probs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)[:, columns]
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(log_probs.shape, generator=draw, dtype=torch.float64).to(log_probs)
    loss = (weights * log_probs).sum()
    values = {"weights": weights, "states": states, "log-probabilities": log_probs, "loss": loss[None]}
    if states.requires_grad:
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        values["gradients"] = torch.cat([x.flatten() for x in gradients])
    return {name: value.detach().double().cpu().flatten() for name, value in values.items()}


def plain(model) -> Found:
    """By one padded batch with a sequence of its own for every node, through the model as peft made it."""
    prompts, trees = examples()
    rows = [prompt + tree.path(node) for prompt, tree in zip(prompts, trees) for node in range(len(tree))]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    hidden = model.get_base_model().base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    return evaluated(model, hidden[torch.arange(len(rows), device=model.device), mask.sum(1) - 1])


def by_engine(model, tokenizer, layout: tuple[bool, int | None]) -> Found:
    """With gradient, but for a separate prefix: only decoding has that."""
    engine, (prompts, trees) = Engine(model, tokenizer, 10**6), examples()
    with engine.network.layout(*layout):
        return evaluated(model, torch.cat(engine.states(prompts, trees, keep=layout[1] is None)))


def distance(found: Found, exact: Found, quantity: str) -> float:
    """Relative; that of the loss relative to the most that log-probabilities of this size could make of it."""
    scale = exact[quantity].norm()
    if quantity == "loss":
        scale = exact["weights"].norm() * exact["log-probabilities"].norm()
    return float((found[quantity] - exact[quantity]).norm() / scale)


def tolerance(usual: Found, exact: Found, quantity: str) -> float:
    """How far the engine may be from the exact numbers (see above)."""
    return FACTOR * distance(usual, exact, "log-probabilities" if quantity == "loss" else quantity)


def adapted(shape: str, dtype: torch.dtype):
    """A model with an adapter that does something, all in one number format."""
    model = get_peft_model(gpu_models.random_model(shape, dtype), models.lora_config())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model.to(dtype).eval()


def measure(shape: str, dtype: torch.dtype, tokenizer) -> None:
    model = adapted(shape, dtype)
    exact = plain(copy.deepcopy(model).to(WIDER[dtype]))
    usual = plain(model)
    layers = model.config.num_hidden_layers
    rounding = torch.finfo(dtype).eps / 2 * math.sqrt(ROUNDINGS * layers)
    name = str(dtype).removeprefix("torch.")
    apart = distance(usual, exact, "states")
    row = dict(part="b", shape=shape, format=name, quantity="states", rounding=rounding)
    gpu_models.say(**row, layout="plain", error=apart, tolerance=AMPLIFIED * rounding, ok=apart < AMPLIFIED * rounding)
    for layout, how in LAYOUTS.items():
        row = dict(part="b", shape=shape, format=name, layout=layout)
        try:
            found = by_engine(model, tokenizer, how)
        except Exception as error:  # a layout that does not run is a line, and the others go on
            gpu_models.say(**row, failed=gpu_models.reason(error))
            continue
        for quantity in [name for name in found if name != "weights"]:
            apart, most = distance(found, exact, quantity), tolerance(usual, exact, quantity)
            gpu_models.say(**row, quantity=quantity, error=apart, tolerance=most, ok=apart <= most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="135M", choices=gpu_models.SHAPES)
    arguments = parser.parse_args()
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    for dtype in WIDER:
        measure(arguments.shape, dtype, tokenizer)


if __name__ == "__main__":
    main()
