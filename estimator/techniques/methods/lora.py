"""LoRA: trainable matrices A [r, in] and B [out, r] beside frozen linear layers."""

import re
from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta, field
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.spec import Linear, ModelSpec
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.dora import DoraAdapter
from estimator.techniques.lora_adapter import LoraAdapter
from estimator.techniques.lora_parameter import with_parameters
from estimator.techniques.method import (
    Method,
    Targets,
    adapted_by_path,
    frozen,
    saved,
    with_biases,
)
from estimator.techniques.token_rows import with_token_rows

# How A and B may start, and who says so.
_STARTS: Final[dict[str, Cite]] = {
    "gaussian": Cite("peft", "tuners/lora/layer.py, LoraLayer.reset_lora_parameters"),
    "olora": Cite("peft", "tuners/lora/layer.py, LoraLayer.olora_init"),
    "orthogonal": Cite("peft", "tuners/lora/layer.py, LoraLayer.orthogonal_init"),
    "pissa": Cite("meng2024", "section 3"),
    "loftq": Cite("li2023loftq", "section 3.2"),
}
_RSLORA = Cite("kalajdzievski2023", "equation 7")
_LORAPLUS = Cite("hayou2024", "algorithm 1")


# `bfloat16` is what TRL casts adapters of packed models to (trl, trainer/sft_trainer.py).
_STORED: Final = {"float32": DType.FLOAT32, "bfloat16": DType.BFLOAT16, "base": None}


class Lora(Method, frozen=True, tag="lora"):
    """Train low-rank adapters beside frozen linear layers (PEFT's LoraConfig)."""

    peft: ClassVar[str | None] = "LoraConfig"
    quantizations: ClassVar[frozenset[str] | None] = None
    source: ClassVar[Cite] = Cite("hu2021", "section 4.1, W0 + BA")

    r: Annotated[int, Meta(ge=1, le=65_536)] = 16
    lora_alpha: Annotated[float, Meta(gt=0, le=1e9)] = 16.0
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Names = "all-linear"
    exclude_modules: Annotated[Names, Meta(description="Layers that get no adapter.")] = ()
    modules_to_save: Names = ()
    layers_to_transform: Annotated[
        tuple[int, ...], Meta(description="Numbers of the layers that get adapters; none: all.")
    ] = ()
    layers_pattern: Annotated[
        Names, Meta(description="Name of the list of layers that the numbers count in.")
    ] = ()
    rank_pattern: Annotated[
        dict[str, Annotated[int, Meta(ge=1, le=65_536)]],
        Meta(description='Other ranks, by the end of the path: {"q_proj": 8}.'),
    ] = field(default_factory=dict)
    alpha_pattern: Annotated[
        dict[str, float], Meta(description="Other scales by path; cost no memory.")
    ] = field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: Annotated[bool, Meta(description="B has a bias of its own.")] = False
    use_rslora: Annotated[bool, Meta(description="Scale by 1/sqrt(r); costs no memory.")] = False
    init_lora_weights: Annotated[
        bool | Literal["gaussian", "olora", "orthogonal", "pissa", "loftq"],
        Meta(description="How A and B start; the steady step holds the same bytes."),
    ] = True
    use_dora: Annotated[bool, Meta(description="DoRA: a trained magnitude for each output.")] = (
        False
    )
    trainable_token_indices: Annotated[
        tuple[int, ...], Meta(description="Rows of the embedding that are trained.")
    ] = ()
    target_parameters: Annotated[
        Names, Meta(description="Parameters, not modules, that get adapters.")
    ] = ()
    loraplus_lr_ratio: Annotated[
        Annotated[float, Meta(gt=0, le=1e6)] | None,
        Meta(description="LoRA+: learning rate of B over that of A."),
    ] = None
    adapter_dtype: Literal["float32", "bfloat16", "base"] = "float32"

    @property
    def singles_out_layers(self) -> bool:
        """Whether layers are named by number, or by a pattern that may tell them apart.

        A pattern is a regular expression: unless it is a plain name, it may.
        """
        plain = all(re.fullmatch(r"[A-Za-z_.]*", each) for each in self.rank_pattern)
        by_number = any(
            part.isdigit() for name in self.target_parameters for part in name.split(".")
        )
        return self._targets().names_layers or by_number or not plain

    def _targets(self) -> Targets:
        return Targets(
            self.target_modules,
            self.exclude_modules,
            self.modules_to_save,
            self.layers_to_transform,
            self.layers_pattern,
        )

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and an adapter on each target."""
        self._refuse_contradictions()
        stored = _STORED[self.adapter_dtype]
        targets = self._targets()

        kind = DoraAdapter if self.use_dora else LoraAdapter

        def adapter(_: Linear, path: str) -> LoraAdapter:
            return kind(self._rank(path), self.lora_dropout, stored, self.lora_bias)

        each = self.singles_out_layers
        if self.target_parameters and not self.target_modules:
            spec = frozen(run.spec)
        else:
            spec = adapted_by_path(run.spec, targets, adapter, every_layer=each)
        if self.target_parameters:
            spec = with_parameters(spec, self.target_parameters, self._rank, every_layer=each)
        spec = with_biases(saved(spec, self.modules_to_save), self.bias)
        if self.trainable_token_indices:
            spec = with_token_rows(spec, self._tokens(spec))
        return replace(run, spec=replace(spec, notes=(*spec.notes, *self._notes())))

    def _refuse_contradictions(self) -> None:
        """Refuse what PEFT refuses.

        Source: peft, tuners/lora/config.py, LoraConfig.__post_init__.
        """
        if self.target_parameters and (self.lora_dropout or self.use_dora or self.lora_bias):
            raise InvalidRequestError(
                "target_parameters does not go with lora_dropout, use_dora or lora_bias; leave "
                "them out"
            )
        by_number = bool(self.layers_to_transform)
        if by_number and isinstance(self.target_modules, str):
            raise InvalidRequestError(
                "layers_to_transform needs target_modules by name, such as ['q_proj', 'v_proj']"
            )
        if self.layers_pattern and not by_number:
            raise InvalidRequestError("layers_pattern needs layers_to_transform beside it")
        if self.adapter_dtype == "bfloat16" and (
            self.use_dora or self.modules_to_save or self.bias != "none"
        ):
            raise UnsupportedCombinationError(
                "adapter_dtype 'bfloat16' with use_dora, modules_to_save or bias has no sourced "
                "answer here yet; use float32"
            )
        beside = "trainable_token_indices" if self.trainable_token_indices else "target_parameters"
        if self.adapter_dtype != "float32" and getattr(self, beside):
            raise UnsupportedCombinationError(
                f"adapter_dtype {self.adapter_dtype!r} with {beside} has no sourced answer here "
                "yet; use float32"
            )
        if self.lora_bias and self.use_dora:
            raise InvalidRequestError("lora_bias does not go with use_dora; leave one of them out")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise InvalidRequestError("lora_bias needs init_lora_weights true or false")

    def refuse(self, quantization: str) -> None:
        """Refuse adapters on parameters that are packed.

        Raises:
            UnsupportedCombinationError: always with target_parameters.
        """
        if self.target_parameters:
            raise UnsupportedCombinationError(
                f"target_parameters over {quantization} weights has no sourced answer here; use "
                "target_modules, or no quantization"
            )
        super().refuse(quantization)

    def _tokens(self, spec: ModelSpec) -> int:
        """Return how many rows of the embedding are trained; one named twice is there twice."""
        beyond = [each for each in self.trainable_token_indices if each >= spec.vocab.value]
        if beyond or min(self.trainable_token_indices) < 0:
            raise InvalidRequestError(
                f"trainable_token_indices name rows that the table of {spec.vocab.value} tokens "
                "does not have"
            )
        return len(self.trainable_token_indices)

    def _rank(self, path: str) -> int:
        """Return the rank of the adapter at a path.

        Source: peft, utils/other.py, get_pattern_key.
        """
        for pattern, rank in self.rank_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return rank
        return self.r

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if isinstance(self.init_lora_weights, str):
            notes.append(
                f"init_lora_weights {self.init_lora_weights!r} decides what A and B start from "
                f"({_STARTS[self.init_lora_weights]}); the training step holds the same bytes as "
                "with any other, and what the initialization itself needs before training is not "
                "part of this answer"
            )
        if self.use_rslora:
            notes.append(f"rsLoRA is another scale ({_RSLORA}); the bytes are those of LoRA")
        if self.loraplus_lr_ratio is not None:
            notes.append(
                f"LoRA+ puts A and B into optimizer groups of their own ({_LORAPLUS}); the bytes "
                "are those of LoRA"
            )
        return tuple(notes)
