"""Weights as GPTQ checkpoints hold them, and the layers of two libraries that train on them."""

from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta, Struct

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import dim
from estimator.eager.tensor import Node, Tensor, view
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Linear, ModelSpec, Weight, Wrapper
from estimator.sources import Cite
from estimator.techniques.method import Method
from estimator.techniques.quantization import UNSEEN, Quantization

_HALF: Final = DType.FLOAT16
_WORD: Final = 32
_BUFFERS: Final = Cite("gptqmodel", "nn_modules/qlinear/__init__.py, _register_gptq_buffers")
_SHIFTS: Final = Cite("gptqmodel", "nn_modules/qlinear/__init__.py, _init_wf_unsqueeze_buffers")
_LAYER: Final = Cite("gptqmodel", "nn_modules/qlinear/torch.py, TorchLinear._forward_eager")
_TRITON: Final = Cite("fms-peft", "gptqmodel/nn_modules/triton_utils/dequant.py")
# SUPPORTS_BITS and SUPPORTS_GROUP_SIZE of gptqmodel's TritonV2Linear.
BITS: Final = (2, 4, 8)
GROUPS: Final = (-1, 16, 32, 64, 128, 256, 512, 1024)
VERSIONS: Final = ("4", "4.45")


class Gptq(Struct, frozen=True):
    """A weight in groups along its inputs, packed into 32-bit words.

    Args:
        group: inputs that share a scale and a zero point; -1: all of them.
    """

    wrapper: ClassVar[Wrapper] = Wrapper()
    adapter_dtype: ClassVar[DType | None] = _HALF

    bits: int
    group: int

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the tensors of a checkpoint, and the shifts that the layer makes of its bits.

        Shapes:
            qweight  [in · bits / 32, out]           4 bytes
            qzeros   [in / group, out · bits / 32]   4 bytes
            scales   [in / group, out]               2 bytes
            g_idx    [in]                            4 bytes
            wf       [32 / bits]                     4 bytes

        Source: gptqmodel, nn_modules/qlinear/__init__.py, _register_gptq_buffers and
        _init_wf_unsqueeze_buffers.
        """
        shifts = (dim("shifts", _WORD // self.bits),)
        return (*self.checkpoint(linear), _part("wf", shifts, DType.INT32, _SHIFTS))

    def checkpoint(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the tensors of a checkpoint."""
        inputs, outputs = linear.fan_in.value, linear.fan_out.value
        groups = dim("groups", 1 if self.group < 0 else -(-inputs // self.group))
        words = dim("words", -(-inputs * self.bits // _WORD))
        zeros = dim("zeros", -(-outputs * self.bits // _WORD))
        count = linear.weight().parameters
        return (
            Weight("qweight", (words, linear.fan_out), DType.INT32, False, count, _BUFFERS),
            _part("qzeros", (groups, zeros), DType.INT32),
            _part("scales", (groups, linear.fan_out), _HALF),
            _part("g_idx", (linear.fan_in,), DType.INT32),
        )

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Dequantize by one compiled kernel, give the weight the input's type, multiply.

        Autograd saves the dequantized weight for the gradient of the input, for every layer. A
        bias is added in place to a view of the product.

        Shapes:
            dequantized weight  [in, out]    fp16, and in the input's type; the last is saved
            output              [b, s, out]

        Source: gptqmodel, nn_modules/qlinear/torch.py, TorchLinear._forward_eager, which the layer
        for Triton runs while it trains (tritonv2.py, TritonV2Linear.forward).
        """
        shape = (linear.fan_in, linear.fan_out)
        matrix = ops.cast(run.tape.new("dequantized weight", shape, _HALF, _LAYER), x.dtype)
        out = ops.linear(x, matrix, None, linear.fan_out)
        del matrix
        out = view(out, out.shape)
        if not linear.bias:
            return out
        vector = None
        if out.dtype is not _HALF:
            vector = run.tape.new("bias in the output's type", shape[1:], out.dtype, _LAYER)
        out = ops.add_to_view(out, vector, "sum with the bias")
        del vector
        return out


class GptqTriton(Gptq, frozen=True):
    """The layer of AutoGPTQ's second Triton kernel: backward dequantizes the weight once more."""

    wrapper: ClassVar[Wrapper] = Wrapper(converts="unscaled update", in_place=True)

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the tensors of a checkpoint; the kernel knows the shifts."""
        return self.checkpoint(linear)

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Dequantize and multiply in fp16; only the packed weight is saved.

        Shapes:
            dequantized weight  [in, out]    2 bytes, in forward and in backward
            output              [b, s, out]  2 bytes

        Raises:
            UnsupportedCombinationError: another type than fp16.

        Source: fms-peft, gptqmodel/nn_modules/triton_utils/dequant.py, QuantLinearFunction.
        """
        half = ops.autocast_to_half(x)
        if half.dtype is not _HALF:
            raise UnsupportedCombinationError(
                f"kernel 'autogptq_triton' returns fp16, and the inputs are {half.dtype.label}; "
                "use precision fp16 with autocast fp16 or none, or kernel 'gptqmodel'"
            )
        tape, shape = run.tape, (linear.fan_in, linear.fan_out)
        whole = [tape.new("dequantized weight", shape, _HALF, _TRITON)]
        out = Tensor(tape, (*x.shape[:-1], linear.fan_out), _HALF, None)
        tape.result("mm", out, "output", _TRITON)
        whole.clear()
        del half

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor | None]:
            whole = [node.scratch("dequantized weight", shape, _HALF, _TRITON)]
            grad = node.new_grad(0, source=_TRITON)
            whole.clear()
            return (grad,)

        tape.record("gptq product", (x,), (), rule, out)
        out = view(out, out.shape)
        return ops.add(out, run.param(linear.name, bias)) if (bias := linear.bias_weight()) else out


def _part(name: str, shape: Any, dtype: DType, source: Cite = _BUFFERS) -> Weight:
    return Weight(name, shape, dtype, False, 0, source)


class GptqQuantization(Quantization, frozen=True, tag="gptq"):
    """Integers in groups, as GPTQ checkpoints store them (gptqmodel, AutoGPTQ)."""

    source: ClassVar[Cite] = Cite("gptqmodel", "nn_modules/qlinear/tritonv2.py, TritonV2Linear")
    bias_dtype: ClassVar[DType | None] = _HALF
    plain_lora: ClassVar[bool] = True

    bits: Annotated[int, Meta(ge=1, le=8, description="Bits of a packed weight.")] = 4
    group_size: Annotated[
        int, Meta(ge=-1, le=1024, description="Inputs that share a scale; -1: all.")
    ] = 128
    desc_act: Annotated[
        bool, Meta(description="Columns were quantized by activation size; costs no memory.")
    ] = False
    kernel: Annotated[
        Literal["gptqmodel", "autogptq_triton"],
        Meta(description="The library whose layer trains; AutoGPTQ's goes with transformers 4."),
    ] = "gptqmodel"

    def format(self, stored: DType) -> Gptq:
        """Return the packing of one linear layer.

        Raises:
            UnsupportedCombinationError: bits or a group that gptqmodel's Triton layer lacks.
        """
        if self.bits not in BITS:
            raise UnsupportedCombinationError(
                f"gptq with bits {self.bits} has no sourced answer here yet; use bits 2, 4 or 8"
            )
        if self.group_size not in GROUPS:
            raise UnsupportedCombinationError(
                f"gptqmodel has no kernel for group_size {self.group_size}; use one of "
                f"{', '.join(str(each) for each in GROUPS)}"
            )
        kind = Gptq if self.kernel == "gptqmodel" else GptqTriton
        return kind(self.bits, self.group_size)

    def packs(self, linear: Linear, spec: ModelSpec) -> bool:
        """Whether a layer is packed: the plain ones and GPT-2's Conv1D inside decoder layers.

        Raises:
            UnsupportedCombinationError: a width that the kernel does not take.

        Source: optimum, gptq/utils.py, get_layers; gptqmodel, nn_modules/qlinear/tritonv2.py.
        """
        packs = super().packs(linear, spec)
        for width in (linear.fan_in.value, linear.fan_out.value):
            if packs and width % _WORD:
                raise UnsupportedCombinationError(
                    f"a width of {width} is no multiple of {_WORD}, which gptqmodel's Triton layer "
                    "needs; use nf4"
                )
        return packs

    def refuse(self, method: Method, framework: str, version: str) -> None:
        """Refuse a kernel with libraries that it does not go with.

        Raises:
            UnsupportedCombinationError: by name, with what to use instead.
        """
        super().refuse(method, framework, version)
        old = framework == "transformers" and version in VERSIONS
        if old != (self.kernel == "autogptq_triton"):
            wanted = "transformers 5 or trl" if old else f"transformers {' or '.join(VERSIONS)}"
            raise UnsupportedCombinationError(
                f"gptq with kernel {self.kernel!r} has a sourced answer for software {wanted} only"
            )

    def notes(self) -> tuple[str, ...]:
        """Say which kernel is meant, and what surprises."""
        if self.kernel == "autogptq_triton":
            return ()
        return (
            UNSEEN.format(name=self.name),
            "gptq: the layer is the one that gptqmodel takes for backend 'auto_trainable'; the "
            "default, 'auto', prefers kernels that have no backward pass",
            "gptq: autograd saves every layer's dequantized weight, so without activation "
            "checkpointing the packed weights save nothing during backward",
        )
