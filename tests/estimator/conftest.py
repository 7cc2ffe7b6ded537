"""A hand-made answer, so that the doors and the rendering are tested without any engine."""

from __future__ import annotations

import pytest

from estimator.request import parse_request
from estimator.result import (
    Capacity,
    ComponentRows,
    Limits,
    MomentBytes,
    Parameters,
    Peak,
    Promise,
    Promises,
    Range,
    Result,
    ResultRow,
    RunnerUp,
    Suggestion,
)


def _row(name: str, site: str, count: int, size: int) -> ResultRow:
    return ResultRow(
        name=name,
        site=site,
        count=count,
        bytes=size,
        formula=f"{count} x {size // count} bytes",
        source="llama3: table 3",
        basis="formula",
    )


def _component(name: str, *rows: ResultRow) -> ComponentRows:
    return ComponentRows(component=name, bytes=sum(row.bytes for row in rows), rows=rows)


@pytest.fixture
def result() -> Result:
    """Return an answer for Llama-3.1-8B whose rows add up to the device-used peak."""
    breakdown = (
        _component(
            "weights",
            _row("down_proj", "layer", 32, 3_758_096_384),
            _row("up_proj", "layer", 32, 3_758_096_384),
            _row("gate_proj", "layer", 32, 3_758_096_384),
            _row("embed_tokens", "embeddings", 1, 1_050_673_152),
            _row("lm_head", "head", 1, 1_050_673_152),
            _row("q_proj", "layer", 32, 1_073_741_824),
            _row("norms", "layer", 65, 532_480),
        ),
        _component("gradients", _row("all", "optimizer", 1, 16_060_522_496)),
        _component(
            "optimizer_states",
            _row("exp_avg", "optimizer", 1, 16_060_522_496),
            _row("exp_avg_sq", "optimizer", 1, 16_060_522_496),
        ),
        _component("runtime", _row("CUDA context", "process", 1, 536_870_912)),
    )
    whole = sum(component.bytes for component in breakdown)
    context = 536_870_912
    return Result(
        schema="estimate/v1",
        engine="analytic",
        model="meta-llama/Llama-3.1-8B",
        verdict="does_not_fit",
        message="Does not fit: needs 59.80 GiB, the GPU offers 23.52 GiB; peak: optimizer step.",
        peak=Peak(
            moment="optimizer step",
            runner_up=RunnerUp(moment="loss backward", gap_bytes=2**30),
            allocated_bytes=Range(whole - 2 * context, whole - context, whole),
            reserved_bytes=Range(whole - context, whole - context + 2**21, whole + context),
            device_used_bytes=Range(whole - context, whole, whole + 2 * context),
            needed_bytes=Range(whole - context, whole - context // 2, whole + context),
            host_bytes=Range(2**30, 2 * 2**30, 3 * 2**30),
        ),
        capacity=Capacity(gpu="rtx-4090", usable_bytes=25_254_166_528, source="torch"),
        breakdown=breakdown,
        timeline=(
            MomentBytes("forward", 40 * 2**30, {"weights": 40 * 2**30}),
            MomentBytes("loss backward", whole - context - 2**30, {"weights": whole}),
            MomentBytes("optimizer step", whole - context, {"weights": whole}),
        ),
        parameters=Parameters(total=8_030_261_248, trainable=8_030_261_248, active=8_030_261_248),
        limits=Limits(
            max_micro_batch_size=0, max_seq_len=0, smallest_gpu="a100-80gb-sxm", min_gpus=None
        ),
        suggestions=(
            Suggestion(
                change={"method": "qlora"},
                summary="train QLoRA adapters",
                saves_bytes=50 * 2**30,
                cost="changes training",
                verdict_after="fits",
            ),
            Suggestion({"optimizer": "sgd"}, "use SGD", 30 * 2**30, "none", "does_not_fit"),
            Suggestion({"seq_len": 1024}, "halve the length", 2**30, "slower", "tight"),
            Suggestion({"seq_len": 512}, "the fourth idea", 2**20, "slower", "tight"),
        ),
        request=parse_request({"model": "meta-llama/Llama-3.1-8B"}).to_dict(),
        promises=Promises(
            "any--published",
            0.95,
            (Promise("allocated", 0.05, 53, 4, (), 1.0, "allocated: within 5.0%"),),
        ),
        assumptions=("optimizer: adamw, the default",),
        notes=("attention sdpa picks flash attention here",),
        not_modelled=("evaluation",),
    )
