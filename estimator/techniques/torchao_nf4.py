"""torchao's NF4Tensor: what it holds, how products are made with it, and how one is made."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from msgspec import Struct

from estimator.dtypes import DType
from estimator.eager.size import Dim, dim
from estimator.eager.tensor import Node, Tape, Tensor
from estimator.model.forward import Forward
from estimator.model.loading import Loading
from estimator.model.spec import Linear, Weight, Wrapper
from estimator.sources import Cite

BLOCK: Final = 64
SCALER_BLOCK: Final = 256
CODES: Final = 16
CHUNK: Final = 1024**2
_STATE: Final = Cite("torchao-nf4", "NF4Tensor.from_tensor")
_WEIGHT: Final = Cite("torchao-nf4", "NF4Tensor.get_original_weight")

Serials = tuple[int, ...]


class Nf4Tensor(Struct, frozen=True):
    """A weight as torchao's NF4Tensor holds it; products are made with the whole weight.

    Args:
        stored: the type that the weight had, and has again when dequantized.
    """

    wrapper: ClassVar[Wrapper] = Wrapper()

    stored: DType

    @property
    def adapter_dtype(self) -> DType | None:
        """The type that the tensor claims to have."""
        return self.stored

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the packed weight and what scales it.

        Shapes:
            quantized_data       [in·out / 2]         1 byte
            quantized_scalers    [in·out / 64]        1 byte
            quantization_factor  [in·out / 64 / 256]  width of the weight
            scaler_mean, nf4     [1], [16]            width of the weight

        Source: torchao-nf4, NF4Tensor.from_tensor.
        """
        count = linear.weight().parameters
        blocks = count // BLOCK
        return (
            Weight("quantized_data", _flat(count // 2), DType.UINT8, False, count, _STATE),
            _part("quantized_scalers", blocks, DType.INT8),
            _part("quantization_factor", self.factors(blocks), self.stored),
            _part("scaler_mean", 1, self.stored),
            _part("nf4", CODES, self.stored),
        )

    def factors(self, blocks: int) -> int:
        """Return the elements that the storage of the scales' own scales has."""
        return blocks // SCALER_BLOCK

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Multiply by the dequantized weight, in backward too.

        The packed weight is saved, so that a recomputation runs up to here.

        Source: torchao-nf4, LinearNF4.
        """
        tape, count = run.tape, linear.weight().parameters
        whole = _dequantized(tape, count, self.stored, None)
        out = tape.new("output", (*x.shape[:-1], linear.fan_out), x.dtype, _WEIGHT)
        whole.clear()

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor | None]:
            whole = _dequantized(node.tape, count, self.stored, node)
            grad = node.new_grad(0, source=_WEIGHT)
            whole.clear()
            return (grad,)

        packed = Tensor(tape, (), self.stored, None)
        tape.record("linear_nf4", (x,), (packed,), rule, out)
        return out

    # -- how one is made ----------------------------------------------------------------------

    def quantize(self, log: Loading, linear: Linear) -> Serials:
        """Return the parts of a packed weight, made beside the whole one.

        Shapes:
            absolute values    [in·out]       width of the weight; for each round of scales
            their places       [in·out / 64]  8 bytes
            scales, by step    [in·out / 64]  width of the weight, up to four at once
            scaled weight      [in·out]       width of the weight

        Source: torchao-nf4, NF4Tensor.from_tensor and double_quantize_scalers.
        """
        count, width = linear.weight().parameters, self.stored.width
        scales = count // BLOCK * width
        data, scalers, factor, mean, codes = self.weights(linear)
        held_codes = _kept(log, linear, codes)
        largest = _largest(log, count, width)
        held_mean = _kept(log, linear, mean)
        centred = log.scratch("scales less their mean", scales)
        log.drop(largest)
        doubled = log.scratch("scales of scales, twice", scales)
        held_factor = self._factor(log, linear, factor, scales)
        log.drop(doubled)
        steps = log.scratch("scales in steps", scales)
        rounded = log.scratch("scales in whole steps", scales)
        log.drop(steps)
        bounded = log.scratch("scales in 8 bits", scales)
        log.drop(rounded)
        held_scalers = _kept(log, linear, scalers)
        held_factor = self._shrunk(log, linear, factor, held_factor)
        log.drop(centred, bounded)
        largest = _largest(log, count, width)
        scaled = log.scratch("scaled weight", count * width)
        held_data = self._closest(log, linear, data)
        log.drop(largest, scaled)
        return (*held_scalers, *held_factor, *held_mean, *held_data, *held_codes)

    def dequantize(self, log: Loading, linear: Linear) -> Serials:
        """Return the whole weight, made from a packed one.

        Source: torchao-nf4, NF4Tensor.get_original_weight.
        """
        count, width = linear.weight().parameters, self.stored.width
        half, scales = count // 2, count // BLOCK * width
        held = []
        for _ in range(2):
            bits = log.scratch("4 bits", half)
            held.append(log.scratch("indices", half * DType.INT64.width))
            log.drop(bits)
        held += [log.scratch("values", half * width) for _ in range(2)]
        quotients = log.scratch("scales less their mean", scales)
        held.append(log.scratch("scales", scales))
        log.drop(quotients)
        for _ in range(2):
            repeated = log.scratch("repeated scales", half * width)
            held.append(log.scratch("scaled values", half * width))
            log.drop(repeated)
        whole = log.scratch("dequantized weight", count * width)
        log.drop(*held)
        return whole

    def copied(self, log: Loading, linear: Linear) -> Serials:
        """Return a deep copy: the weight is packed anew, and replaced by copies of the parts.

        Source: torchao-nf4, clone; torch-tensor, Tensor.__deepcopy__.
        """
        whole = self.dequantize(log, linear)
        packed = self.quantize(log, linear)
        log.drop(whole)
        data, scalers, factor, mean, codes = self.weights(linear)
        parts = (_kept(log, linear, each) for each in (scalers, factor, mean, data, codes))
        made = tuple(serial for part in parts for serial in part)
        log.drop(packed)
        return made

    def filled(self, log: Loading, linear: Linear, held: Serials) -> Serials:
        """Return the parts once a whole weight from the host has been copied into them.

        Source: torchao-nf4, copy_.
        """
        whole = log.scratch(
            "weight of the checkpoint", linear.weight().parameters * self.stored.width
        )
        log.drop(self.quantize(log, linear), whole)
        return held

    def _factor(self, log: Loading, linear: Linear, factor: Weight, size: int) -> Serials:
        """Return the scales' own scales, of which there is one for each scale at first."""
        return log.scratch("scales of scales, repeated", size)

    def _shrunk(self, log: Loading, linear: Linear, factor: Weight, held: Serials) -> Serials:
        made = _kept(log, linear, factor)
        log.drop(held)
        return made

    def _closest(self, log: Loading, linear: Linear, data: Weight) -> Serials:
        """Return the packed values; all chunks of 2^20 values use the same blocks.

        Shapes:
            codes                      [in·out]      1 byte
            differences, absolute too  [2^20, 16]    width of the weight, both at once
            smallest, its place        [2^20]        width of the weight, 8 bytes
            upper 4 bits               [in·out / 2]  1 byte

        Source: torchao-nf4, NF4Tensor.convert_to_norm_float_weight.
        """
        count = linear.weight().parameters
        codes = log.scratch("codes", count)
        places = _nearest(log, min(count, CHUNK), self.stored.width)
        narrow = log.scratch("codes of a chunk", min(count, CHUNK))
        log.drop(places, narrow)
        shifted = log.scratch("upper 4 bits", count // 2)
        made = _kept(log, linear, data)
        log.drop(shifted, codes)
        return made


class WholeNf4Tensor(Nf4Tensor, frozen=True):
    """The same in torchao before 0.2: packed in one piece, and with a view of repeated scales."""

    def factors(self, blocks: int) -> int:
        """Return the elements of the storage: one for each scale, of which one in 256 is used.

        Source: torchao-nf4-0-1, NF4Tensor.double_quantize_scalers.
        """
        return blocks

    def filled(self, log: Loading, linear: Linear, held: Serials) -> Serials:
        """Return new parts, which take the place of the old ones.

        Source: torchtune-0-1, torchtune/utils/_register_nf4_dispatch_ops.py, inplace_copy.
        """
        whole = log.scratch(
            "weight of the checkpoint", linear.weight().parameters * self.stored.width
        )
        made = self.quantize(log, linear)
        log.drop(whole, held)
        return made

    def _factor(self, log: Loading, linear: Linear, factor: Weight, size: int) -> Serials:
        return _kept(log, linear, factor)

    def _shrunk(self, log: Loading, linear: Linear, factor: Weight, held: Serials) -> Serials:
        return held

    def _closest(self, log: Loading, linear: Linear, data: Weight) -> Serials:
        """Return the packed values.

        Shapes:
            differences, absolute too  [in·out, 16]  width of the weight, both at once
            smallest, its place        [in·out]      width of the weight, 8 bytes
            upper 4 bits, both         [in·out / 2]  8 bytes each

        Source: torchao-nf4-0-1, NF4Tensor.convert_to_norm_float_weight.
        """
        count = linear.weight().parameters
        places = _nearest(log, count, self.stored.width)
        shifted = log.scratch("upper 4 bits", count // 2 * DType.INT64.width)
        joined = log.scratch("both 4 bits", count // 2 * DType.INT64.width)
        log.drop(shifted)
        made = _kept(log, linear, data)
        log.drop(places, joined)
        return made


def _kept(log: Loading, linear: Linear, part: Weight) -> Serials:
    return (log.new(f"{linear.name}.{part.name}", part.bytes),)


def _largest(log: Loading, count: int, width: int) -> Serials:
    """Return the scale of each block of 64 values."""
    sizes = log.scratch("absolute values", count * width)
    largest = log.scratch("scales", count // BLOCK * width)
    places = log.scratch("places of the scales", count // BLOCK * DType.INT64.width)
    log.drop(sizes, places)
    return largest


def _nearest(log: Loading, count: int, width: int) -> Serials:
    """Return the number of the closest of 16 values for each value."""
    differences = log.scratch("differences from 16 values", CODES * count * width)
    sizes = log.scratch("their absolute values", CODES * count * width)
    log.drop(differences)
    smallest = log.scratch("smallest differences", count * width)
    places = log.scratch("closest values", count * DType.INT64.width)
    log.drop(smallest, sizes)
    return places


def _dequantized(tape: Tape, count: int, dtype: DType, node: Node | None) -> list[Tensor]:
    """Return the whole weight; every name inside lives until it is there.

    Shapes:
        indices, of the upper and the lower 4 bits  [in·out / 2]  8 bytes each
        values, of each                             [in·out / 2]  width of the weight each
        scaled values, of each                      [in·out / 2]  width of the weight each
        weight                                      [out, in]     width of the weight

    Source: torchao-nf4, NF4Tensor.get_original_weight.
    """

    def new(name: str, elements: int, kind: DType) -> Tensor:
        if node is not None:
            return node.scratch(name, _flat(elements), kind, _WEIGHT)
        return tape.new(name, _flat(elements), kind, _WEIGHT)

    half = count // 2
    held = [new("indices", half, DType.INT64) for _ in range(2)]
    held += [new("values", half, dtype) for _ in range(2)]
    held.append(new("scalers", count // BLOCK, dtype))
    held += [new("scaled values", half, dtype) for _ in range(2)]
    whole = [new("dequantized weight", count, dtype)]
    held.clear()
    return whole


def _flat(count: int) -> tuple[Dim]:
    return (dim("n", count),)


def _part(name: str, count: int, dtype: DType) -> Weight:
    return Weight(name, _flat(count), dtype, False, 0, _STATE)
