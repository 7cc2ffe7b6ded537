"""What orders of different lengths need; `python -m benchmarks.orders` writes docs/orders.md.

Whoever asks for an estimate seldom says how long the samples are. Here some recipes are replayed
with batches of many lengths in many random orders, and what the allocator could not give back is
put beside the two replays that an estimate makes where the lengths are not known.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Final

from estimator.calibration import OTHER_LENGTHS, OTHER_ORDER
from estimator.catalog import Access
from estimator.memory.lengths import ALIKE, UNKNOWN, history
from estimator.pipeline import device_of, engine_for
from estimator.request import parse_request
from estimator.service import model_config, requested_gpu
from estimator.units import gib

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "orders.md"
ORDERS: Final = 40
SHORTEST: Final = 30
# The share of the first batch and the margin were chosen by the orders of seed 3.
SEED: Final = 4
STEPS: Final = 200
LORA: Final[dict[str, Any]] = {"name": "lora", "r": 16}
FULL_CHECKPOINTING: Final[dict[str, Any]] = {"activation_checkpointing": "full"}
RECIPES: Final[tuple[dict[str, Any], ...]] = (
    {"model": "meta-llama/Llama-3.1-8B", "method": LORA, "micro_batch_size": 4}
    | FULL_CHECKPOINTING,
    {"model": "meta-llama/Llama-3.1-8B", "method": LORA},
    {"model": "meta-llama/Llama-3.1-8B", "method": "qlora", "micro_batch_size": 2}
    | FULL_CHECKPOINTING,
    {"model": "meta-llama/Llama-3.1-8B", "method": {"name": "lora", "r": 64}}
    | {"micro_batch_size": 8, "seq_len": 1024}
    | FULL_CHECKPOINTING,
    {"model": "meta-llama/Llama-3.2-3B", "method": {"name": "lora", "r": 8}}
    | {"precision": "amp_bf16", "micro_batch_size": 2, "seq_len": 4096}
    | FULL_CHECKPOINTING,
    {"model": "meta-llama/Llama-3.2-1B", "precision": "amp_bf16", "micro_batch_size": 4}
    | FULL_CHECKPOINTING,
    {"model": "Qwen/Qwen2.5-7B", "micro_batch_size": 4} | FULL_CHECKPOINTING,
    {"model": "Qwen/Qwen2.5-7B"},
    {"model": "Qwen/Qwen2.5-1.5B", "precision": "amp_bf16", "micro_batch_size": 4}
    | FULL_CHECKPOINTING,
    {"model": "Qwen/Qwen2.5-1.5B", "micro_batch_size": 4, "gradient_accumulation_steps": 4}
    | FULL_CHECKPOINTING,
    {"model": "Qwen/Qwen2.5-0.5B", "micro_batch_size": 8, "seq_len": 1024},
    {"model": "Qwen/Qwen2.5-0.5B", "precision": "amp_bf16", "micro_batch_size": 8}
    | {"seq_len": 1024},
    {"model": "gpt2", "micro_batch_size": 8, "seq_len": 1024},
    {"model": "google/gemma-2-2b", "micro_batch_size": 2, "seq_len": 1024} | FULL_CHECKPOINTING,
    {"model": "mistralai/Mistral-7B-v0.1", "optimizer": "adamw_8bit", "micro_batch_size": 2}
    | {"seq_len": 1024}
    | FULL_CHECKPOINTING,
)

INTRODUCTION: Final = """\
# Orders of different lengths

Written by `python -m benchmarks.orders` (two minutes); [lengths.md](lengths.md) says what for.

For each recipe {orders} random orders of batches, whose samples have {shortest} tokens to
`seq_len`, as many short as long on a logarithmic scale. *Needed* is what the allocator cannot give
back in its replay, as a multiple of the allocated peak: of batches all of one length, of a run
whose first batch has two thirds of it, and of the orders. *Not covered* counts the orders that
need more than the larger of the two and {margin:.0%}; in brackets those above the first alone and
{order:.0%}, which is what an estimate keeps where all batches have one length. The two thirds and
the {margin:.0%} were chosen by another forty orders of the same recipes.

| recipe | allocated | one length | first ⅔ | orders: middle | 95 % | most | not covered |
|---|---:|---:|---:|---:|---:|---:|---:|
"""


@dataclass(frozen=True, slots=True)
class Survey:
    """What one recipe needs, as multiples of its allocated peak [bytes]."""

    name: str
    allocated: int
    alike: float
    unknown: float
    orders: tuple[float, ...]

    def above(self, share: float) -> int:
        """Count the orders that need more."""
        return sum(each > share for each in self.orders)

    @property
    def uncovered(self) -> int:
        """Count the orders that need more than an estimate promises."""
        return self.above(self.unknown * OTHER_LENGTHS)

    @property
    def alone(self) -> int:
        """Count the orders that need more than is promised of batches of one length."""
        return self.above(self.alike * OTHER_ORDER)


def survey(recipe: dict[str, Any]) -> Survey:
    """Replay one recipe."""
    request = parse_request(recipe)
    model = model_config(request, Access.CATALOGUE)
    engine = engine_for(request, model.config, model.id)
    device = device_of(requested_gpu(request), request)
    b, s = request.micro_batch_size, request.seq_len
    allocated = engine.read(b, s, device.constants).allocated
    samples = [round(SHORTEST * (s / SHORTEST) ** (step / STEPS)) for step in range(STEPS + 1)]
    random = Random(SEED)  # noqa: S311 - an order of samples, no secret
    drawn = [history(samples, b, s, iter(random.random, None)) for _ in range(ORDERS)]
    pinned = [engine.blocks_under(b, s, device, earlier=order).pinned for order in drawn]
    words = [model.id.split("/")[-1], request.method.name, request.precision, f"{b} x {s}"]
    words += [request.quantization.name] if request.quantization else []
    words += ["accumulation"] * (request.gradient_accumulation_steps > 1)
    words += ["checkpointing"] * (request.activation_checkpointing == "full")
    return Survey(
        ", ".join(words),
        allocated,
        engine.share(b, s, device, ALIKE),
        engine.share(b, s, device, UNKNOWN),
        tuple(sorted(each / allocated for each in pinned)),
    )


def page(found: list[Survey]) -> Iterator[str]:
    """Yield the page, line by line."""
    yield INTRODUCTION.format(
        orders=ORDERS, shortest=SHORTEST, margin=OTHER_LENGTHS - 1, order=OTHER_ORDER - 1
    ).rstrip()
    for each in found:
        middle, high, most = (
            median(each.orders), each.orders[round(0.95 * ORDERS) - 1], each.orders[-1]
        )  # fmt: skip
        yield (
            f"| {each.name} | {gib(each.allocated)} | {each.alike:.3f} | {each.unknown:.3f} | "
            f"{middle:.3f} | {high:.3f} | {most:.3f} | "
            f"{each.uncovered} ({each.alone}) |"
        )
    total = sum(len(each.orders) for each in found)
    uncovered = sum(each.uncovered for each in found)
    alone = sum(each.alone for each in found)
    yield f"\nCovered: {total - uncovered} of {total}; from the first alone {total - alone}."


def main() -> int:
    """Replay every recipe and write the page."""
    found = []
    for number, recipe in enumerate(RECIPES, 1):
        print(f"\r{number} of {len(RECIPES)}: {recipe['model']:<40}", end="", file=sys.stderr)
        found.append(survey(recipe))
    print(file=sys.stderr)
    PAGE.write_text("\n".join(page(found)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
