"""A linear layer whose products are made in 8-bit floats, as torchao runs it in eager torch.

Weights, activations, gradients and optimizer states keep their type; what is in 8 bits is made
again for each product and dies with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.ops import F32
from estimator.eager.size import ONE, Dim, Shape
from estimator.eager.tensor import Node, Param, Tensor, reshaped
from estimator.sources import Cite

MULTIPLE: Final = 16
"""What the kernel asks of its dimensions.

Source: torch-meta, _check_scaled_mm_sizes.
"""

_CAST: Final = Cite("torchao", "float8/float8_training_tensor.py, _ToFloat8ConstrFunc.forward")
_AMAX: Final = Cite("torchao", "float8/float8_utils.py, tensor_to_amax")
_PREPARE: Final = Cite("torchao", "float8/float8_ops.py, preprocess_addmm")
_PRODUCT: Final = Cite("torchao", "float8/float8_ops.py, addmm_float8_unwrapped")
_LINEAR: Final = Cite("torchao", "float8/float8_linear.py, Float8Linear.forward")

New = Callable[[str, Shape, DType, Cite], Tensor]
Make = Callable[[DType], Tensor]


class Recipe(Struct, frozen=True):
    """Which numbers share a scale, and which products are made in 8 bits.

    Args:
        rowwise: a scale for each row of both factors; else one for the whole tensor.
        keeps_weight_gradient: the gradient of the weight is no product of 8-bit floats, and the
            weight has one scale in the product for the gradient of the input.
        gradient: the type of gradients in 8 bits.
        pads: the inner dimension of every product is padded to a multiple of 16.

    Source: torchao, float8/config.py, Float8LinearConfig.from_recipe_name.
    """

    rowwise: bool
    keeps_weight_gradient: bool
    gradient: DType
    pads: bool = True


class _Factor(Struct, frozen=True, eq=False):
    """What becomes a factor of a product: its name, shape and type, and how many scales it has."""

    name: str
    shape: Shape
    dtype: DType
    scales: Shape
    target: DType = DType.FLOAT8_E4M3


class _Eight(Struct, eq=False):
    """A tensor in 8-bit floats, and its scales."""

    of: _Factor
    data: Tensor
    scale: Tensor


def linear(x: Tensor, weight: Param, bias: Param | None, out_dim: Dim, recipe: Recipe) -> Tensor:
    """`x W^T + b` with both factors cast to 8 bits; saves x and W as they came.

    Under autocast x is cast, the weight is not: its 8-bit copy is made of what is stored. Both
    gradients are made whether or not they are wanted, so that x is saved beside a frozen weight
    too.

    Source: torchao, float8/float8_linear.py, Float8Linear.forward and
    matmul_with_hp_or_float8_args.
    """
    tape = x.tape
    given = ops.autocast_to_half(x)
    shape = (*x.shape[:-1], out_dim)
    held = [_eight(tape.new, _rows("input", given.shape, given.dtype, recipe))]
    held.append(_eight(tape.new, _columns("weight", weight.shape, weight.dtype, recipe, 0)))
    factors = [_padded(tape.new, each, recipe) for each in held]

    def output(dtype: DType) -> Tensor:
        return tape.new("output", shape, dtype, _PRODUCT)

    out = _product(tape.new, output, held, given.dtype, shape, by_hand=False)
    factors.clear()
    held.clear()

    def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        assert grad is not None
        return _backward(node, grad, saved[0], saved[1], recipe)

    # A function written in Python saves when it has returned, so a recompute makes the output.
    tape.record("linear", (given, weight), (given, weight), rule, out)
    return out if bias is None else _biased(out, bias)


def _backward(
    node: Node, grad: Tensor, x: Tensor, weight: Any, recipe: Recipe
) -> tuple[Tensor | None, ...]:
    """Return both gradients; the 8-bit factors of the first live until the second is made.

    Shapes:
        gradient of the output    [b, s, out]  1 byte, and its copy where the kernel wants one
        weight                    [out, in]    1 byte, and its copy
        the same gradient again   [b, s, out]  1 byte, and its copy, transposed
        input                     [b, s, in]   1 byte, and its copy, transposed

    Source: torchao, float8/float8_linear.py, matmul_with_hp_or_float8_args.backward.
    """
    new = node.scratch

    def into(number: int, shape: Shape) -> Make:
        def make(dtype: DType) -> Tensor:
            if node.wants(number):
                return node.new_grad(number, shape, dtype, _PRODUCT)
            return new("gradient that nobody wants", shape, dtype, _PRODUCT)

        return make

    shape = weight.shape
    gradient = _rows("gradient", grad.shape, grad.dtype, recipe, recipe.gradient)
    held = [_eight(new, gradient), _eight(new, _columns("weight", shape, weight.dtype, recipe, 1))]
    factors = [_padded(new, held[0], recipe), _turned(new, held[1], recipe)]
    into_x = _product(new, into(0, x.shape), held, grad.dtype, x.shape, by_hand=True)
    factors.clear()
    if recipe.keeps_weight_gradient:
        into_weight = into(1, shape)(grad.dtype)
    else:
        held.append(_eight(new, _turn(gradient, recipe)))
        held.append(_eight(new, _turn(_rows("input", x.shape, x.dtype, recipe), recipe)))
        # Where padding adds something, its copy lies as the kernel wants it.
        aligned = node.tape.regime.aligned_tokens or not recipe.pads
        prepare = _turned if aligned else _padded
        factors += [prepare(new, held[2], recipe), _turned(new, held[3], recipe)]
        into_weight = _product(new, into(1, shape), held[2:], grad.dtype, shape, by_hand=True)
        factors.clear()
    held.clear()
    return (
        reshaped(into_x, into_x.shape) if node.wants(0) else None,
        reshaped(into_weight, shape) if node.wants(1) else None,
    )


def _rows(
    name: str, shape: Shape, dtype: DType, recipe: Recipe, target: DType = DType.FLOAT8_E4M3
) -> _Factor:
    """A factor with a scale for each token, if its rows have scales of their own."""
    return _Factor(name, shape, dtype, shape[:-1] if recipe.rowwise else (ONE,), target)


def _columns(name: str, shape: Shape, dtype: DType, recipe: Recipe, axis: int) -> _Factor:
    """The weight with a scale for each output (axis 0) or each input (axis 1) of the layer."""
    one = not recipe.rowwise or (axis == 1 and recipe.keeps_weight_gradient)
    return _Factor(name, shape, dtype, (ONE,) if one else (shape[axis],))


def _turn(factor: _Factor, recipe: Recipe) -> _Factor:
    """The same factor with a scale for each column, as the gradient of the weight has it."""
    scales = factor.shape[-1:] if recipe.rowwise else (ONE,)
    return _Factor(factor.name, factor.shape, factor.dtype, scales, factor.target)


def _eight(new: New, of: _Factor) -> _Eight:
    """Find the scale of a tensor and cast it.

    Shapes:
        absolute values             as the tensor, in its type, while the largest is found
        tensor in fp32              as the tensor, 4 bytes, while it is scaled; not if it is fp32
        scaled, and clamped         as the tensor, 4 bytes each, while they are cast
        8-bit floats                as the tensor, 1 byte

    Source: torchao, float8/float8_utils.py, tensor_to_amax and to_fp8_saturated;
    float8/float8_training_tensor.py, _ToFloat8ConstrFunc.forward.
    """
    passing = [new(f"absolute values of the {of.name}", of.shape, of.dtype, _AMAX)]
    passing.clear()
    scale = new(f"scale of the {of.name}", of.scales, F32, _AMAX)
    if of.dtype is not F32:
        passing = [new(f"{of.name} in fp32", of.shape, F32, _CAST)]
    passing.append(new(f"scaled {of.name}", of.shape, F32, _CAST))
    del passing[:-1]
    passing.append(new(f"clamped {of.name}", of.shape, F32, _CAST))
    data = new(f"{of.name} in 8 bits", of.shape, of.target, _CAST)
    passing.clear()
    return _Eight(of, data, scale)


def _padded(new: New, eight: _Eight, recipe: Recipe) -> Tensor | None:
    """The copy that padding makes, also where it adds nothing; what it adds is left out.

    Source: torchao, float8/float8_utils.py, pad_tensor_for_matmul.
    """
    of = eight.of
    return new(f"padded {of.name}", of.shape, of.target, _PREPARE) if recipe.pads else None


def _turned(new: New, eight: _Eight, recipe: Recipe) -> Tensor:
    """The copy of a factor that lies by row where the kernel wants columns, or the reverse.

    Source: torchao, float8/float8_ops.py, preprocess_addmm.
    """
    padded = [_padded(new, eight, recipe)]
    out = new(f"transposed {eight.of.name}", eight.of.shape, eight.of.target, _PREPARE)
    padded.clear()
    return out


def _product(
    new: New, make: Make, held: list[_Eight], dtype: DType, shape: Shape, *, by_hand: bool
) -> Tensor:
    """Multiply two factors.

    With a scale for each row the kernel returns bf16 only, and is too slow where sums are exact:
    there the scales are multiplied with each other and then with the product.

    Shapes:
        inverse scales            as the scales, 4 bytes
        product of the scales     as the result, 4 bytes, with a scale for each row, in backward
        result in bf16            as the result, 2 bytes, with a scale for each row

    Source: torchao, float8/float8_ops.py, addmm_float8_unwrapped.
    """
    left, right = held[0], held[1]
    rowwise = len(left.of.scales) > 0 and left.of.scales != (ONE,)
    scales = [left.of.scales, right.of.scales]
    passing = []
    if rowwise and scales[1] == (ONE,):
        scales[1] = shape[-1:]
        passing.append(new("repeated scale", scales[1], F32, _PREPARE))
    passing += [new("inverse scale", each, F32, _PRODUCT) for each in scales]
    if rowwise and by_hand:
        passing.append(new("product of the scales", shape, F32, _PRODUCT))
    half = DType.BFLOAT16 if rowwise else dtype
    out = make(half)
    if half is not dtype:
        out = [make(dtype), out][0]
    passing.clear()
    return out


def _biased(product: Tensor, bias: Param) -> Tensor:
    """Add the bias out of place, cast to the product's type where it has another."""
    tape = product.tape
    if bias.dtype is product.dtype:
        return ops.add(product, bias, "sum with the bias")
    cast = tape.new("bias in the output's type", bias.shape, product.dtype, _LINEAR)

    def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor, ...]:
        return (node.new_grad(0),)

    tape.record("bias cast", (bias,), (), rule, cast)
    return ops.add(product, cast, "sum with the bias")
