"""Trainable tokens: some rows of the embedding, and nothing else."""

from typing import Annotated, ClassVar

from msgspec import Meta
from msgspec.structs import replace

from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.method import Method, frozen
from estimator.techniques.token_rows import with_token_rows


class TrainableTokens(Method, frozen=True, tag="trainable_tokens"):
    """Train some rows of the embedding (PEFT's TrainableTokensConfig)."""

    peft: ClassVar[str | None] = "TrainableTokensConfig"
    source: ClassVar[Cite] = Cite(
        "peft", "tuners/trainable_tokens/layer.py, TrainableTokensLayer.forward_adapters"
    )

    num_tokens: Annotated[
        int, Meta(ge=1, le=10_000_000, description="Tokens whose rows are trained.")
    ] = 1

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen but for rows of the embedding."""
        return replace(run, spec=with_token_rows(frozen(run.spec), self.num_tokens))
