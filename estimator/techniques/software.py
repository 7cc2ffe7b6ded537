"""Software: what the version of the training stack changes, as a table of switches."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.errors import InvalidRequestError
from estimator.run import Run
from estimator.techniques.litgpt import litgpt_formats
from estimator.techniques.stage import Stage


class SoftwareProfile(Struct, frozen=True):
    """What is known to differ from the newest stack.

    Args:
        loss: the loss of `estimator/memory/loss.py` that runs.
        not_modelled: what differs too and is not accounted for.
        model_code: the module that reads a configuration, where the framework has a model of its
            own instead of transformers'.
        formats: what the profile makes of a run whose weights have got their formats.
        reentrant: activation checkpointing is reentrant where nothing else is said.
        clips: the loop clips gradients where `max_grad_norm` says so.
    """

    loss: str
    not_modelled: tuple[str, ...] = ()
    model_code: str | None = None
    formats: Callable[[Run], Run] | None = None
    reentrant: bool = False
    clips: bool = True


_OLD_ATTENTION: Final = (
    "attention code of transformers before 4.46: rotary tables made in every layer, dense masks of "
    "the eager and sdpa implementations"
)

# transformers 4.45.2 and 4.48.1: modeling_utils.py, gradient_checkpointing_enable begins with
# `gradient_checkpointing_kwargs = {"use_reentrant": True}`.
# transformers: "5" holds from 4.49 on, "4" for 4.46 to 4.48, "4.45" for it and what came before.
# The first version of a framework is the one that is meant when none is named.
PROFILES: Final[dict[str, dict[str, SoftwareProfile]]] = {
    "transformers": {
        "5": SoftwareProfile("transformers-5"),
        "4": SoftwareProfile("transformers-4", reentrant=True),
        "4.45": SoftwareProfile("transformers-4.45", (_OLD_ATTENTION,), reentrant=True),
    },
    # SFTTrainer trains transformers' models; its loss and other defaults are in `request.py`.
    "trl": {
        "1.16": SoftwareProfile(
            "transformers-5",
            (
                "the metrics that SFTTrainer computes from log-probabilities and entropies between "
                "forward and backward: a few numbers for each token",
            ),
        ),
    },
    "litgpt": {
        "2023.10": SoftwareProfile(
            "litgpt",
            (
                "the adapters' targets of litgpt: LoRA on `attn` means queries and values, its "
                "default, and other choices among the three are not told apart",
            ),
            model_code="estimator.model.litgpt",
            formats=litgpt_formats,
            # finetune/lora.py and its neighbours: `train` has no clipping.
            clips=False,
        ),
    },
}


def profile(framework: str, version: str) -> SoftwareProfile:
    """Return what a framework's version is known to do.

    Raises:
        InvalidRequestError: the framework has no such version here.
    """
    versions = PROFILES[framework]
    if version not in versions:
        raise InvalidRequestError(
            f"software: {framework} has no version {version!r} here; it has {', '.join(versions)}"
        )
    return versions[version]


class Software(Struct, frozen=True):
    """The versions that train."""

    stage: ClassVar[Stage] = Stage.KERNEL
    profile: SoftwareProfile

    def apply(self, run: Run) -> Run:
        """Set the loss, the formats of the framework's own layers, what checkpointing is."""
        run = replace(run, loss=self.profile.loss, reentrant=self.profile.reentrant)
        return self.profile.formats(run) if self.profile.formats is not None else run
