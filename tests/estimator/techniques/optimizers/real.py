"""A toy model, stepped by a real optimizer, and the states in our answer about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from estimator.service import estimate

TOY: Final[dict[str, Any]] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}
DTYPES: Final = {"fp32": "float32", "bf16": "bfloat16"}


def toy_model(precision: str) -> Any:
    """Return the toy model with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(TOY)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values),
        dtype=getattr(torch, DTYPES[precision]),
    )


def kept_by(build: Callable[[Any], Any], precision: str) -> int:
    """Run one real step and return the bytes of its states, scalars on the host left out."""
    import torch

    model = toy_model(precision)
    optimizer = build(list(model.parameters()))
    ids = torch.zeros((1, 4), dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name not in ("step", "mu_product")
    )


def kept_in_the_answer(optimizer: dict[str, Any], precision: str) -> int:
    """Return the bytes of optimizer states in our answer, temporaries left out."""
    result = estimate(
        {
            "model": {"config": TOY},
            "seq_len": 1,
            "precision": precision,
            "optimizer": optimizer,
        }
    )
    return sum(
        row.bytes
        for part in result.breakdown
        if part.component == "optimizer_states"
        for row in part.rows
        if "temporaries" not in row.name
    )
