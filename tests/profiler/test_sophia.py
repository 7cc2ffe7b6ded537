"""What kernels take inside themselves while labels are drawn, beside torch's own memory events."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch

from profiler.workspaces import Workspaces

ROWS, CATEGORIES = 64, 5000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multinomial_takes_its_noise(dtype: torch.dtype) -> None:
    given = torch.rand(ROWS, CATEGORIES).softmax(-1).to(dtype)
    out, highest = _measured(lambda: torch.multinomial(given, 1, True))
    assert _written(torch.ops.aten.multinomial.default, (given, 1, True), out) == pytest.approx(
        highest - out.nbytes, abs=8 * ROWS
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logsumexp_takes_its_exponentials(dtype: torch.dtype) -> None:
    given = torch.rand(ROWS, CATEGORIES).to(dtype)
    out, highest = _measured(lambda: given.logsumexp(-1, keepdim=True))
    assert _written(torch.ops.aten.logsumexp.default, (given, [-1], True), out) == pytest.approx(
        highest - out.nbytes, abs=8 * ROWS
    )


def test_the_distribution_keeps_logits_that_backward_has_not_reached() -> None:
    weight = torch.rand(ROWS, CATEGORIES, requires_grad=True)
    weight.grad = torch.zeros_like(weight)

    def keep() -> Any:
        logits = weight * 2
        distribution = torch.distributions.Categorical(logits=logits)
        labels = distribution.sample()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        return distribution

    distribution, changes = _changes(keep)
    assert sum(changes) == pytest.approx(3 * distribution.logits.nbytes, rel=0.001)


def _written(func: Any, args: tuple[Any, ...], out: torch.Tensor) -> int:
    return sum(size for _, size in Workspaces((8, 0), 108, 0).of(func, args, out))


def _measured(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    out, changes = _changes(call)
    return out, max(accumulate(changes))


def _changes(call: Callable[[], Any]) -> tuple[Any, list[int]]:
    """Return a result, and the changes of memory while it was computed, in order [bytes]."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        out = call()
    events = profile.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    return out, [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]
