"""Software: what the version of the training stack changes, as a table of switches."""

from __future__ import annotations

from typing import ClassVar, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.run import Run
from estimator.techniques.stage import Stage


class SoftwareProfile(Struct, frozen=True):
    """What is known to differ from the newest stack.

    Args:
        loss: the loss of `estimator/memory/loss.py` that runs.
        not_modelled: what differs too and is not accounted for.
    """

    loss: str
    not_modelled: tuple[str, ...] = ()


_REENTRANT: Final = (
    "re-entrant activation checkpointing, the default of transformers 4: about 2 bytes per hidden "
    "unit and token more while a layer is recomputed"
)
_OLD_ATTENTION: Final = (
    "attention code of transformers before 4.46: rotary tables made in every layer, dense masks of "
    "the eager and sdpa implementations"
)

# "5" holds from transformers 4.49 on, "4" for 4.46 to 4.48, "4.45" for it and what came before.
PROFILES: Final[dict[str, SoftwareProfile]] = {
    "5": SoftwareProfile("transformers-5"),
    "4": SoftwareProfile("transformers-4", (_REENTRANT,)),
    "4.45": SoftwareProfile("transformers-4.45", (_REENTRANT, _OLD_ATTENTION)),
}


class Software(Struct, frozen=True):
    """The versions that train."""

    stage: ClassVar[Stage] = Stage.KERNEL
    version: str

    def apply(self, run: Run) -> Run:
        """Set the version of the loss."""
        return replace(run, loss=PROFILES[self.version].loss)
