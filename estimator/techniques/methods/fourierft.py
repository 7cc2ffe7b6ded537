"""FourierFT: the update of a weight as the inverse Fourier transform of a few coefficients."""

from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import Shape, dim
from estimator.eager.tensor import Node, Tensor
from estimator.model.forward import Forward
from estimator.model.spec import Linear, ModelSpec, Weight
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.method import Method, adapted
from estimator.techniques.methods.loha import FullUpdate
from estimator.techniques.targets import FOURIERFT, targets

_LAYER: Final = Cite("peft", "tuners/fourierft/layer.py, FourierFTLayer.get_delta_weight")
F32: Final = DType.FLOAT32
_TWO: Final = dim("2", 2)


class FourierAdapter(FullUpdate, frozen=True):
    """A sparse spectrum, and the update that it is transformed to."""

    n_frequency: int

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the coefficients.

        Shapes:
            fourierft_spectrum  [n]  4 bytes

        Source: gao2024, section 3.2; peft, tuners/fourierft/layer.py,
        FourierFTLayer.get_delta_weight.
        """
        shape = (dim("n", self.n_frequency),)
        return (Weight("fourierft_spectrum", shape, F32, True, source=_LAYER),)

    def delta(self, run: Forward, linear: Linear) -> Tensor:
        """Return the real part of the transform; a complex number is two fp32 here.

        Shapes:
            indices                      [2, n]        8 bytes, saved
            spectrum, alive to the end   [out, in]     4 bytes
            complex copy, transform      [out, in, 2]  4 bytes each
            update                       [out, in]     4 bytes

        Valid for: what PyTorch allocates; cuFFT's own workspace is not counted.
        Source: peft, tuners/fourierft/layer.py, FourierFTLayer.get_delta_weight.
        """
        tape, shape = run.tape, (linear.fan_out, linear.fan_in)
        spectrum = run.param(linear.name, self.weights(linear)[0])
        indices = tape.new("indices", (_TWO, *spectrum.shape), DType.INT64, _LAYER)
        dense = tape.new("dense spectrum", shape, F32, _LAYER)

        def picked(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor]:
            return (node.new_grad(0),)

        tape.record("index_put", (spectrum,), (indices,), picked, dense)
        return ops.scale(_real_transform(dense), "update")


def _real_transform(dense: Tensor) -> Tensor:
    """Return the real part of `ifft2`, which is a view of the complex result."""
    tape, twice = dense.tape, (*dense.shape, _TWO)
    given = tape.new("complex spectrum", twice, F32, _LAYER)
    real = dense.shape

    def to_real(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor]:
        return (node.new_grad(0),)

    tape.record("to complex", (dense,), (), to_real, given)
    out = tape.new("ifft2", twice, F32, _LAYER)

    def transformed(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor]:
        return (node.new_grad(0),)

    tape.record("fft_c2c", (given,), (), transformed, out)
    return _real_part(out, real)


def _real_part(x: Tensor, shape: Shape) -> Tensor:
    out = Tensor(x.tape, shape, x.dtype, x.storage, base=x.base or x)

    def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor]:
        return (node.new_grad(0),)

    x.tape.record("real", (x,), (), rule, out)
    return out


class FourierFt(Method, frozen=True, tag="fourierft"):
    """Train Fourier coefficients of the updates of weights (PEFT's FourierFTConfig)."""

    peft: ClassVar[str | None] = "FourierFTConfig"
    source: ClassVar[Cite] = Cite("gao2024", "section 3.2, FourierFT")

    n_frequency: Annotated[int, Meta(ge=1, le=100_000_000, description="coefficients")] = 1000
    scaling: Annotated[float, Meta(gt=0, le=1e9, description="scale; costs no memory")] = 150.0
    target_modules: Literal["all-linear"] | Names = ()

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and an update on each target."""
        named = targets(self.target_modules, FOURIERFT, run.spec.model_type)
        adapter = FourierAdapter(n_frequency=self.n_frequency)
        spec = adapted(run.spec, named, lambda _: adapter)
        return replace(run, spec=_noted(spec))


def _noted(spec: ModelSpec) -> ModelSpec:
    note = "fourierft: the workspace that cuFFT takes inside its transforms is not counted"
    return replace(spec, notes=(*spec.notes, note))
