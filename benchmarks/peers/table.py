"""The peers: what is installed, under which licence, and which of its figures is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Peer:
    """One other calculator.

    Args:
        name: as it is called here, and the name of its adapter and environment.
        distribution: its package; a rule of thumb has none.
        version: of the package, pinned.
        licence: as the package states it.
        figure: the figure that is taken, and by which interface.
        claims: which quantity its own documentation says that the figure is.
        requirements: what pip installs.
        shares: whether torch and transformers are those of the environment that runs the command;
            pip then installs without dependencies.
        rule: whether it is a rule of thumb, which runs in this project's own environment.
        builders: what a source package needs to be built, if it is built in the environment.
    """

    name: str
    distribution: str
    version: str
    licence: str
    figure: str
    claims: str
    requirements: tuple[str, ...] = ()
    shares: bool = False
    rule: bool = False
    builders: tuple[str, ...] = ()
    build_environment: Mapping[str, str] = field(default_factory=lambda: _NOTHING)

    @property
    def adapter(self) -> str:
        """The module of its adapter."""
        return "benchmarks.peers.adapters." + self.name.replace("-", "_")


def _pinned(name: str, version: str, *more: str) -> tuple[str, ...]:
    return (f"{name}=={version}", *more)


PEERS: Final = (
    Peer(
        name="accelerate",
        distribution="accelerate",
        version="1.15.0",
        licence="Apache-2.0",
        figure="`estimate-memory`, column Training using Adam",
        claims="training with Adam at batch 1, without a meter",
        shares=True,
    ),
    Peer(
        name="fitcheck-llm",
        distribution="fitcheck-llm",
        version="0.3.1",
        licence="MIT",
        figure="`fitcheck.estimate(...).total_mib`",
        claims="device memory, with context and fragmentation",
        requirements=_pinned("fitcheck-llm", "0.3.1"),
    ),
    Peer(
        name="vramcalc",
        distribution="vramcalc",
        version="0.1.2",
        licence="MIT",
        figure="`vramcalc.estimate(..., mode='train').total`; with its overhead on the device",
        claims="allocated; with its overhead what must fit on the device",
        requirements=_pinned("vramcalc", "0.1.2"),
    ),
    Peer(
        name="torch-preflight",
        distribution="torch-preflight",
        version="0.5.0",
        licence="MIT",
        figure="`torch_preflight.vram.estimate_config(...).total`",
        claims="device memory, with context and fragmentation",
        requirements=_pinned("torch-preflight[hub]", "0.5.0"),
    ),
    Peer(
        name="ftuneai",
        distribution="ftuneai",
        version="0.4.1",
        licence="MIT",
        figure="`ftuneai.Estimator(...).estimate_memory().total_gb`",
        claims="VRAM, with an overhead of 20 %",
        requirements=_pinned("ftuneai", "0.4.1"),
    ),
    Peer(
        name="hf-vram-calc",
        distribution="hf-vram-calc",
        version="1.0.9",
        licence="MIT",
        figure="`hf-vram-calc --output_json`, `training_gib` or `lora_size_gib`",
        claims="VRAM, without a meter",
        requirements=_pinned("hf-vram-calc", "1.0.9"),
        shares=True,
    ),
    Peer(
        name="llm-analysis",
        distribution="llm-analysis",
        version="0.2.2",
        licence="Apache-2.0",
        figure="`llm_analysis.analysis.train(...)`, (weight+op_state+grad+act)_memory_per_gpu",
        claims="the sum of its parts, without a meter",
        requirements=_pinned(
            "llm-analysis", "0.2.2", "fire==0.5.0", "six==1.17.0", "termcolor==3.3.0"
        ),
        shares=True,
    ),
    Peer(
        name="training-hub",
        distribution="training_hub",
        version="0.11.2",
        licence="Apache-2.0",
        figure="`training_hub` memory estimator, `estimate(...)`, the expected value",
        claims="VRAM for each GPU, with an overhead of 10 %",
        requirements=_pinned(
            "training_hub",
            "0.11.2",
            "rhai-innovation-mini-trainer==0.9.0",
            "numba==0.68.1",
            "llvmlite==0.50.0",
            "Deprecated==1.3.1",
            "wrapt==2.5.2",
            "aiofiles==25.1.0",
        ),
        shares=True,
    ),
    Peer(
        name="deepspeed",
        distribution="deepspeed",
        version="0.19.8",
        licence="Apache-2.0",
        figure="`estimate_zero2_` or `estimate_zero3_model_states_mem_needs`, GPU, no offload",
        claims="parameters, optimizer states and gradients alone",
        requirements=_pinned(
            "deepspeed",
            "0.19.8",
            "hjson==3.1.0",
            "msgpack==1.2.4",
            "einops==0.8.2",
            "py-cpuinfo==9.0.0",
        ),
        shares=True,
        # Its source package looks at torch while it is built.
        builders=("wheel==0.48.0",),
        build_environment={"DS_BUILD_OPS": "0"},
    ),
    Peer(
        name="memtracker",
        distribution="torch",
        version="2.13.0",
        licence="BSD-3-Clause",
        figure="`torch.distributed._tools.mem_tracker.MemTracker`, Total of the peak snapshot",
        claims="tensors that the step holds",
        shares=True,
    ),
    Peer(
        name="sixteen-bytes",
        distribution="",
        version="ZeRO, 2020",
        licence="a rule of thumb",
        figure="16 bytes a parameter, over the GPUs that share them",
        claims="model states under mixed precision with Adam (ZeRO, section 3.1)",
        rule=True,
    ),
    Peer(
        name="twenty-bytes",
        distribution="",
        version="DeepSpeed 0.19.8",
        licence="a rule of thumb",
        figure="20 bytes a parameter, over the GPUs that share them",
        claims="the same with gradients in 16 and in 32 bits (DeepSpeed, stage_1_and_2.py)",
        rule=True,
    ),
)
BY_NAME: Final = {peer.name: peer for peer in PEERS}
