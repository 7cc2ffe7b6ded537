"""The peak of each half of a step, as the engine sees it before any block is rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from estimator.eager.size import powers
from estimator.pipeline import Engine
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.traits import traits

Peaks = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[int, int]]


@pytest.fixture
def peaks() -> Peaks:
    """Return the highest bytes of loss forward and of backward, without library workspaces.

    Two rows of 512 tokens, unless the recipe says otherwise.
    """

    def read(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[int, int]:
        request = parse_request(
            {"model": {"config": dict(config)}, "micro_batch_size": 2, "seq_len": 512, **recipe}
        )
        run = resolve(request, config, "model")
        engine = Engine(run, {}, traits(request, run.spec.total_parameters()))
        step = engine.step(request.micro_batch_size, request.seq_len)
        at = powers(request.micro_batch_size, request.seq_len)
        highest = {"loss forward": 0, "backward": 0}
        for moment in step.moments:
            name = moment.name.split(":")[0]
            if name in highest:
                highest[name] = max(highest[name], moment.bytes_at(at))
        return highest["loss forward"], highest["backward"]

    return read
