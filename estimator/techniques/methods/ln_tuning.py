"""LN tuning: trained copies of the norms, beside the frozen originals."""

from typing import ClassVar

from msgspec.structs import replace

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.spec import Module, Norm
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.method import Method, Targets
from estimator.techniques.targets import LN_TUNING, targets


class LnTuning(Method, frozen=True, tag="ln_tuning"):
    """Train copies of the norms; the originals stay beside them (PEFT's LNTuningConfig)."""

    peft: ClassVar[str | None] = "LNTuningConfig"
    source: ClassVar[Cite] = Cite("zhao2023", "section 3, tuning LayerNorm")

    target_modules: Names = ()

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and a trained copy of each targeted norm.

        Raises:
            InvalidRequestError: the targets match no norm.
            UnsupportedCombinationError: they match another kind of module.
        """
        spec = run.spec
        named = tuple(targets(self.target_modules, LN_TUNING, spec.model_type))
        chosen = Targets(named)
        found = 0

        def tune(module: Module, path: str) -> Module:
            nonlocal found
            if not chosen.match(path, spec.head.name):
                return replace(module, trainable=False)
            if not isinstance(module, Norm):
                raise UnsupportedCombinationError(
                    f"ln_tuning of {path} has no sourced answer here; name norms only"
                )
            found += 1
            return replace(module, trainable=True, copied=True)

        tuned = spec.map_paths(tune, every_layer=chosen.names_layers)
        if not found:
            raise InvalidRequestError(
                f"target_modules {list(named)} match no norm of this {spec.model_type} model"
            )
        return replace(run, spec=tuned)
