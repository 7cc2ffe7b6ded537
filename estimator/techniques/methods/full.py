"""Full fine-tuning: every weight is trained."""

from typing import ClassVar

from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.method import Method


class Full(Method, frozen=True, tag="full"):
    """Train every parameter."""

    trains_base: ClassVar[bool] = True
    source: ClassVar[Cite] = Cite("hf-trainer", "Trainer.create_optimizer")

    def apply(self, run: Run) -> Run:
        """Return the run as it is: every weight starts out trainable."""
        return run
