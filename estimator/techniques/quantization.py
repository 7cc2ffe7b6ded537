"""What every quantization has in common: a section of the request that packs linear layers."""

from typing import Annotated, ClassVar, Final

from msgspec import Meta
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.spec import Linear, ModelSpec, Module, WeightFormat
from estimator.run import Run
from estimator.section import Kind, Names
from estimator.sources import Cite
from estimator.techniques.method import Method
from estimator.techniques.stage import Stage

OWN_CLASS: Final = (
    "transformers packs plain nn.Linear only; the layers of {model_type} are of a class of their "
    "own and keep their full width"
)
UNSEEN: Final = (
    "{name}: PEFT's target_modules 'all-linear' finds no packed layer of this format, the training "
    "script has to name them; here it means all of them"
)


class Quantization(Kind, frozen=True):
    """How the frozen base weights are stored; applies after they have got their types.

    Args:
        upcasts: `prepare_model_for_kbit_training` raises what is not packed to fp32. It leaves
            GPTQ, AQLM, EETQ, HQQ and torchao models as they are.
        bias_dtype: the type of a packed layer's bias, where it does not follow the other weights.
        plain_lora: it goes with LoRA without DoRA, and biases are no parameters.
        source: the paper or the upstream line.
    """

    stage: ClassVar[Stage] = Stage.STORE
    upcasts: ClassVar[bool] = False
    bias_dtype: ClassVar[DType | None] = None
    plain_lora: ClassVar[bool] = False
    source: ClassVar[Cite]

    prepare_kbit: bool = True

    def loaded(self, stored: DType) -> DType:
        """Return the type that transformers loads the weights in, given the one asked for."""
        return stored

    def format(self, stored: DType) -> WeightFormat:
        """Return how a linear layer stores its weight, given the type that it had."""
        raise NotImplementedError

    def packs(self, linear: Linear, spec: ModelSpec) -> bool:
        """Whether a linear layer's weight is packed.

        transformers replaces plain `nn.Linear` only, so a class of the model's own (Falcon's) stays
        as it is (hf-library, integrations/bitsandbytes.py, replace_with_bnb_linear).
        """
        return not linear.spelled_out and not self.skips(linear, spec)

    def skips(self, linear: Linear, spec: ModelSpec) -> bool:
        """Whether a linear layer is left out by its name."""
        return linear.name == spec.head.name

    def notes(self) -> tuple[str, ...]:
        """Return what the user should know about this format."""
        return ()

    def refuse(self, method: Method, framework: str, version: str) -> None:
        """Refuse a method or software that the format does not go with.

        Raises:
            UnsupportedCombinationError: by name, with what to use instead.
        """
        dora = getattr(method, "use_dora", False)
        biases = getattr(method, "bias", "none") != "none"
        if self.plain_lora and (dora or biases):
            raise UnsupportedCombinationError(
                f"use_dora and trained biases over {self.name} weights have no sourced answer "
                "here; leave them out, or use nf4"
            )

    def apply(self, run: Run) -> Run:
        """Return the run with packed linear layers.

        `prepare_model_for_kbit_training` casts norms, embeddings and head to fp32.

        Source: peft, utils/other.py, prepare_model_for_kbit_training.
        """
        stored = self.loaded(run.spec.embeddings[0].dtype)
        packed = self.format(stored)
        rest = DType.FLOAT32 if self.prepare_kbit and self.upcasts else stored

        def quantize(module: Module) -> Module:
            if isinstance(module, Linear) and self.packs(module, run.spec):
                return replace(module, format=packed, dtype=self.bias_dtype or rest)
            return replace(module, dtype=rest)

        spec = run.spec.map_modules(quantize)
        notes = self.notes()
        if not any(isinstance(each, Linear) and each.format for each, _ in spec.module_counts()):
            notes = (OWN_CLASS.format(model_type=spec.model_type),)
        return replace(run, spec=replace(spec, notes=(*spec.notes, *notes)))


class Skipping(Quantization, frozen=True):
    """A quantization that transformers applies itself, to every linear layer that is not left out.

    Args:
        skip_modules: ends of the names of linear layers that keep their weight; where it is given,
            transformers packs the head too, unless it is named.
        keeps_head: the head is left out whether or not it is named.
    """

    keeps_head: ClassVar[bool] = False

    skip_modules: Annotated[
        Names, Meta(description="Ends of the names of linear layers that keep their weight.")
    ] = ()

    def skips(self, linear: Linear, spec: ModelSpec) -> bool:
        """Whether a layer is left as it is, by the end of its name.

        Raises:
            UnsupportedCombinationError: the head would be packed.
            InvalidRequestError: a name that is the end of no layer's.

        Source: hf-library, quantizers/base.py, get_modules_to_not_convert, and
        quantizers/quantizers_utils.py, should_convert_module.
        """
        head = spec.head.name
        if not self.skip_modules:
            return linear.name == head
        named = any(head.endswith(each) for each in self.skip_modules)
        if not named and not self.keeps_head:
            raise UnsupportedCombinationError(
                f"skip_modules {list(self.skip_modules)} lets transformers pack the head, which "
                f"has no source here yet; add {head!r}"
            )
        names = {each.name for each, _ in spec.module_counts() if isinstance(each, Linear)}
        names.add(head)
        for each in self.skip_modules:
            if not any(name.endswith(each) for name in names):
                known = sorted({name.rsplit(".", 1)[-1] for name in names})
                raise InvalidRequestError(
                    f"skip_modules: no linear layer's name ends in {each!r}; layers are named by "
                    f"the end, such as {', '.join(known)}"
                )
        left_out = any(linear.name.endswith(each) for each in self.skip_modules)
        return left_out or (self.keeps_head and linear.name == head)


class BitsAndBytes(Skipping, frozen=True):
    """What transformers' BitsAndBytesConfig says about either width."""

    upcasts: ClassVar[bool] = True
