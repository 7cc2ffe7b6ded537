"""4-bit weights of AWQ checkpoints, as gptqmodel multiplies them on CUDA while training."""

from typing import Annotated, Any, ClassVar, Final

from msgspec import Meta, Struct

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.ops import F32
from estimator.eager.size import Dim, dim
from estimator.eager.tensor import Node, Tensor
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Linear, ModelSpec, Weight, Wrapper
from estimator.sources import Cite
from estimator.techniques.quantization import UNSEEN, Skipping

_HALF: Final = DType.FLOAT16
_PACKED: Final = 8
_SPLITS: Final = dim("splits", 8)
_BUFFERS: Final = Cite("gptqmodel", "nn_modules/qlinear/__init__.py, AWQuantLinear")
_PRODUCT: Final = Cite("gptqmodel", "nn_modules/qlinear/gemm_awq.py, AwqGemmFn")
# SUPPORTS_GROUP_SIZE of gptqmodel's AwqGEMMLinear.
GROUPS: Final = (-1, 16, 32, 64, 128)
# Widths that its kernel for few tokens takes.
_COLUMNS: Final = 64
# transformers, integrations/awq.py, AWQ_SCALES_MAPPINGS.
SCALED: Final = ("starcoder2", "falcon", "gpt_neox", "bloom")


class Awq(Struct, frozen=True):
    """A weight in groups along its inputs, eight of its outputs in a word of 32 bits.

    Args:
        group: inputs that share a scale and a zero point; -1: all of them.
    """

    wrapper: ClassVar[Wrapper] = Wrapper(converts="unscaled update")
    adapter_dtype: ClassVar[DType | None] = None
    dense_tokens: ClassVar[int] = 1024

    group: int

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the tensors of a checkpoint.

        Shapes:
            qweight  [in, out / 8]          4 bytes
            qzeros   [in / group, out / 8]  4 bytes
            scales   [in / group, out]      2 bytes

        Source: gptqmodel, nn_modules/qlinear/__init__.py, AWQuantLinear.
        """
        inputs, count = linear.fan_in.value, linear.weight().parameters
        groups = dim("groups", 1 if self.group < 0 else inputs // self.group)
        words = dim("words", -(-linear.fan_out.value // _PACKED))
        return (
            Weight("qweight", (linear.fan_in, words), DType.INT32, False, count, _BUFFERS),
            Weight("qzeros", (groups, words), DType.INT32, False, 0, _BUFFERS),
            Weight("scales", (groups, linear.fan_out), _HALF, False, 0, _BUFFERS),
        )

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Multiply in the input's half precision; save only the packed weight.

        More than 1024 tokens meet a dequantized weight, fewer a kernel that sums eight parts of
        the product afterwards. Backward dequantizes. The half input lives as long as the layer.

        Shapes:
            input in half precision  [b, s, in]      2 bytes, if it was fp32
            dequantized weight       [in, out]       2 bytes, while it is multiplied
            parts of the product     [8, b, s, out]  4 bytes, up to 1024 tokens
            output                   [b, s, out]     2 bytes; once more with a bias, or for fp32

        Source: gptqmodel, nn_modules/qlinear/gemm_awq.py, AwqGEMMLinear.forward and AwqGemmFn;
        gptqmodel_ext/awq/quantization/gemm_cuda_gen.cu.
        """
        tape = run.tape
        given = ops.cast(x, x.dtype if x.dtype.is_half else _HALF, "input in half precision")
        compute, shape = given.dtype, (*x.shape[:-1], linear.fan_out)
        if tape.regime.dequantizes:
            dtype = (tape.autocast or compute) if tape.autocast_enabled else compute
            held = [tape.new("dequantized weight", _matrix(linear), compute, _PRODUCT)]
            if dtype is not compute:
                held.append(tape.new("its cast by autocast", _matrix(linear), dtype, _PRODUCT))
                held.append(tape.new("input, cast by autocast", x.shape, dtype, _PRODUCT))
        else:
            dtype = compute
            held = [tape.new("parts of the product", (_SPLITS, *shape), F32, _PRODUCT)]
        out = Tensor(tape, shape, dtype, None)
        # The kernel for few tokens is an operator of gptqmodel's own.
        operator = "mm" if tape.regime.dequantizes else "gemm_forward"
        tape.result(operator, out, "output", _PRODUCT)
        held.clear()
        if linear.bias:
            out = tape.new("output with bias", shape, dtype, _PRODUCT)
        matrix = _matrix(linear)

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor | None]:
            whole = [node.scratch("dequantized weight", matrix, compute, _PRODUCT)]
            if dtype is compute:
                grad = node.new_grad(0, source=_PRODUCT)
                whole.clear()
                return (grad,)
            whole.append(node.scratch("its cast", matrix, dtype, _PRODUCT))
            del whole[0]
            wide = [node.scratch("gradient before its cast", node.meta_of(0)[0], dtype, _PRODUCT)]
            whole.clear()
            grad = node.new_grad(0, source=_PRODUCT)
            wide.clear()
            return (grad,)

        tape.record("awq product", (given,), (), rule, out)
        return ops.cast(out, x.dtype, "output in the input's type")


def _matrix(linear: Linear) -> tuple[Dim, Dim]:
    return linear.fan_in, linear.fan_out


class AwqQuantization(Skipping, frozen=True, tag="awq"):
    """4-bit integers in groups, as AWQ checkpoints store them for GEMM (gptqmodel)."""

    source: ClassVar[Cite] = Cite("gptqmodel", "nn_modules/qlinear/gemm_awq.py, AwqGEMMLinear")
    # What `prepare_model_for_kbit_training` spares is listed by name, and AWQ is not on the list.
    upcasts: ClassVar[bool] = True
    bias_dtype: ClassVar[DType | None] = _HALF
    plain_lora: ClassVar[bool] = True
    keeps_head: ClassVar[bool] = True

    group_size: Annotated[
        int, Meta(ge=-1, le=1024, description="Inputs that share a scale; -1: all.")
    ] = 128

    def loaded(self, stored: DType) -> DType:
        """Return the type that the model is loaded in: bf16 becomes fp16.

        Source: hf-library, quantizers/quantizer_awq.py, update_dtype.
        """
        return _HALF if stored is DType.BFLOAT16 else stored

    def format(self, stored: DType) -> Awq:
        """Return the packing of one linear layer.

        Raises:
            UnsupportedCombinationError: a group that gptqmodel's layer lacks.
        """
        if self.group_size not in GROUPS:
            raise UnsupportedCombinationError(
                f"gptqmodel has no AWQ kernel for group_size {self.group_size}; use one of "
                f"{', '.join(str(each) for each in GROUPS)}"
            )
        return Awq(self.group_size)

    def packs(self, linear: Linear, spec: ModelSpec) -> bool:
        """Whether a layer is packed: every `nn.Linear` that is not left out, GPT-2's Conv1D not.

        Raises:
            UnsupportedCombinationError: a model whose activations AWQ scales, or a width that the
                kernels do not take.

        Source: hf-library, integrations/awq.py, replace_with_awq_linear.
        """
        if spec.model_type in SCALED:
            raise UnsupportedCombinationError(
                f"awq puts scaled activations into {spec.model_type} models, which have no sourced "
                "answer here yet; use nf4"
            )
        packs = not linear.transposed and not self.skips(linear, spec)
        group = linear.fan_in.value if self.group_size < 0 else self.group_size
        if packs and (linear.fan_in.value % group or linear.fan_out.value % _COLUMNS):
            raise UnsupportedCombinationError(
                f"AWQ's kernel takes inputs in whole groups of {group} and outputs in multiples of "
                f"{_COLUMNS}, and a layer has {linear.fan_in.value} and {linear.fan_out.value}; "
                "use nf4"
            )
        return packs

    def notes(self) -> tuple[str, ...]:
        """Say which kernel is meant, and what surprises."""
        return (
            UNSEEN.format(name=self.name),
            "awq: the layer is the one that gptqmodel takes for backend 'auto_trainable'; the "
            "default, 'auto', prefers kernels that have no backward pass",
            "awq: transformers loads the model in fp16 where bf16 is asked for, and PEFT's k-bit "
            "preparation raises norms, embeddings and head to fp32",
        )
