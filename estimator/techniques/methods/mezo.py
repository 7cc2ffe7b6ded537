"""MeZO: two forward passes with the weights shifted by noise, and no backward pass."""

from typing import ClassVar

from msgspec.structs import replace

from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.method import Method

NOTE = (
    "MeZO updates the weights itself, from noise that it draws anew; the optimizer of the request "
    "is built and does nothing"
)


class Mezo(Method, frozen=True, tag="mezo"):
    """Train every parameter from the difference of two losses (princeton-nlp/MeZO)."""

    trains_base: ClassVar[bool] = True
    without_backward: ClassVar[bool] = True
    source: ClassVar[Cite] = Cite("malladi2023", "algorithm 1")

    def apply(self, run: Run) -> Run:
        """Return the run without a backward pass, gradients or states."""
        spec = replace(run.spec, notes=(*run.spec.notes, NOTE))
        return replace(run, spec=spec, forward_only=True)
