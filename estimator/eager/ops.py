"""Operators: what each allocates, what it saves for backward, and what its backward allocates.

Each function is one operator of torch as CUDA runs it, autocast included. What is saved is what
`derivatives.yaml` names in the operator's backward formula. Backward makes the gradients of an
operator's inputs in the alphabetical order of their names there, in which torch's generator of code
(torchgen, load_derivatives.py) reads them: `mat2` or `other` before `self`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Union

from estimator.dtypes import DType, promote
from estimator.eager.size import ONE, SEQ, Dim, Shape, elements
from estimator.eager.tensor import Node, Param, Tape, Tensor, reshaped
from estimator.errors import UnsupportedCombinationError
from estimator.sources import Cite

Operand = Union[Tensor, Param]
Grads = list["Tensor | None"]
Out = tuple["Tensor | None", ...]

F32: Final = DType.FLOAT32


def _derivative(operator: str) -> Cite:
    return Cite("torch-derivatives", operator)


# -- casts and autocast ------------------------------------------------------------------------


def cast(x: Tensor, dtype: DType, name: str = "") -> Tensor:
    """`x.to(dtype)`: a copy, or `x` itself where the type is right already. Saves nothing."""
    if x.dtype is dtype:
        return x
    out = x.tape.new(name or f"cast to {dtype.label}", x.shape, dtype, _derivative("_to_copy"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return (node.new_grad(0),)

    x.tape.record("cast", (x,), (), rule, out)
    return out


def autocast_to_half(x: Tensor) -> Tensor:
    """Cast an activation as autocast does before an operator of its lower-precision list."""
    tape = x.tape
    if tape.autocast is None or not tape.autocast_enabled:
        return x
    return cast(x, tape.autocast, f"autocast to {tape.autocast.label}")


def autocast_to_float(x: Tensor) -> Tensor:
    """Cast an activation as autocast does before an operator of its fp32 list."""
    if x.tape.autocast is None or not x.tape.autocast_enabled:
        return x
    return cast(x, F32, "autocast to float32")


def autocast_weight(tape: Tape, weight: Param, *, caches: bool = True) -> Operand:
    """Cast a weight as autocast does: fp32 leaves that want a gradient are cast once and cached.

    Args:
        caches: False where the model hands a view of the weight to the operator, such as `W.T`.

    Source: torch-autocast, cached_cast.
    """
    if tape.autocast is None or not tape.autocast_enabled or weight.dtype is tape.autocast:
        return weight
    cached = tape.cast_cache.get(weight)
    if cached is not None:
        return cached
    name = f"weight, autocast to {tape.autocast.label}"
    out = tape.new(name, weight.shape, tape.autocast, Cite("torch-autocast", "cached_cast"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return (node.new_grad(0),)

    tape.record("weight cast", (weight,), (), rule, out)
    if caches and tape.caches_casts and weight.requires_grad and weight.dtype is F32:
        tape.cast_cache[weight] = out
    return out


# -- elementwise -------------------------------------------------------------------------------


def unary(x: Tensor, name: str, *, keeps: str, scratch: int = 0, operator: str = "") -> Tensor:
    """An elementwise function of one tensor.

    Args:
        keeps: what backward reads: `input`, `output` or `nothing`.
        scratch: temporaries of the input's size that its backward holds beside the result.
        operator: what derivatives.yaml calls it, where that is not `name`.
    """
    out = x.tape.new(name, x.shape, x.dtype, _derivative(operator or name))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        held = [node.scratch("temporary", *node.meta_of(0)) for _ in range(scratch)]
        grad = node.new_grad(0)
        held.clear()
        return (grad,)

    kept = {"input": (x,), "output": (out,), "nothing": ()}[keeps]
    x.tape.record(name, (x,), kept, rule, out)
    return out


def silu(x: Tensor) -> Tensor:
    """SiLU; saves its input."""
    return unary(x, "silu", keeps="input")


def gelu(x: Tensor) -> Tensor:
    """GELU, exact or with torch's own tanh approximation; saves its input."""
    return unary(x, "gelu", keeps="input")


def relu(x: Tensor) -> Tensor:
    """ReLU; saves its output."""
    return unary(x, "relu", keeps="output")


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent; saves its output."""
    return unary(x, "tanh", keeps="output")


def neg(x: Tensor) -> Tensor:
    """Negation; saves nothing."""
    return unary(x, "neg", keeps="nothing")


def scale(x: Tensor, name: str = "mul by a number") -> Tensor:
    """Multiply or divide by a number; saves nothing."""
    return unary(x, name, keeps="nothing", operator="mul.Tensor")


def shift(x: Tensor, name: str = "add a number") -> Tensor:
    """Add a number; saves nothing, and its backward passes the gradient on."""
    out = x.tape.new(name, x.shape, x.dtype, _derivative("add.Tensor"))
    x.tape.record(name, (x,), (), lambda node, grads, saved: (grads[0],), out)
    return out


def shift_in_place(x: Tensor, name: str = "add a number in place") -> Tensor:
    """`x += number`: the result is `x`'s own memory, and backward passes the gradient on."""
    out = Tensor(x.tape, x.shape, x.dtype, x.storage, base=x.base or x)
    x.tape.record(name, (x,), (), lambda node, grads, saved: (grads[0],), out)
    return out


def rsqrt(x: Tensor) -> Tensor:
    """Reciprocal root, in fp32 under autocast; saves its output.

    Backward holds the cube of the result and its product with -0.5 beside the gradient.
    """
    return unary(autocast_to_float(x), "rsqrt", keeps="output", scratch=2)


def power(x: Tensor, name: str = "pow") -> Tensor:
    """Raise to a number, in fp32 under autocast; saves its input.

    Backward holds the lower power and its multiple beside the gradient
    (torch-autograd, FunctionsManual.cpp, pow_backward).
    """
    given = autocast_to_float(x)
    return unary(given, name, keeps="input", scratch=2, operator="pow.Tensor_Scalar")


def mean_last(x: Tensor) -> Tensor:
    """Mean over the last dimension, kept as 1; its backward divides an expanded view."""
    out = x.tape.new("mean", (*x.shape[:-1], ONE), x.dtype, _derivative("mean.dim"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return (node.new_grad(0),)

    x.tape.record("mean", (x,), (), rule, out)
    return out


def mul(x: Operand, y: Operand, name: str = "mul", tape: Tape | None = None) -> Tensor:
    """Multiply two tensors; each is saved if the other wants a gradient.

    The result has the shape of the larger operand. Backward makes every product in full and sums
    it down to a smaller operand's shape afterwards.

    Args:
        tape: where neither is a tensor of a tape, but both are parameters.
    """
    big = _larger(x, y)
    if tape is None:
        tape = x.tape if isinstance(x, Tensor) else y.tape  # type: ignore[union-attr]
    out = Tensor(tape, big.shape, promote(x.dtype, y.dtype), None)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        (grad,) = grads
        assert grad is not None
        second = _product(node, 1, grad, saved[0]) if node.wants(1) else None
        first = _product(node, 0, grad, saved[1]) if node.wants(0) else None
        return first, second

    saved = (x if y.requires_grad else None, y if x.requires_grad else None)
    tape.record(name, (x, y), saved, rule, out)
    # torch saves the inputs first: a recompute that ends with them never makes the output.
    tape.allocate(out, name, _derivative("mul.Tensor"))
    return out


def _product(node: Node, number: int, grad: Tensor, other: Operand) -> Tensor:
    return node.new_grad(number, grad.shape, promote(grad.dtype, other.dtype))


def _larger(x: Operand, y: Operand) -> Operand:
    """Return the operand whose shape the result has; the first where both are alike."""
    (count_x, order_x), (count_y, order_y) = elements(x.shape), elements(y.shape)
    return y if (order_y, count_y) > (order_x, count_x) else x


def add(x: Operand, y: Operand, name: str = "add") -> Tensor:
    """Add two tensors; saves nothing, and backward passes one gradient to both."""
    big = _larger(x, y)
    tape = x.tape if isinstance(x, Tensor) else y.tape  # type: ignore[union-attr]
    out = tape.new(name, big.shape, promote(x.dtype, y.dtype), _derivative("add.Tensor"))
    tape.record(name, (x, y), (), lambda node, grads, saved: (grads[0], grads[0]), out)
    return out


def one_plus(tape: Tape, weight: Param) -> Tensor:
    """`1.0 + weight.float()`: an fp32 tensor of the weight's shape. Saves nothing."""
    out = tape.new("one plus the weight", weight.shape, F32, _derivative("add.Tensor"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return (grads[0] if node.meta_of(0)[1] is F32 else node.new_grad(0),)

    tape.record("one plus the weight", (weight,), (), rule, out)
    return out


def add_in_place(x: Tensor, y: Tensor, name: str = "add in place") -> Tensor:
    """`x += y`: the result is `x`'s own memory, and backward passes one gradient to both."""
    out = Tensor(x.tape, x.shape, x.dtype, x.storage, base=x.base or x)
    x.tape.record(name, (x, y), (), lambda node, grads, saved: (grads[0], grads[0]), out)
    return out


def add_to_view(x: Tensor, y: Operand | None, name: str) -> Tensor:
    """`x += y` where x is a view of what an operator returned.

    Backward copies the gradient of the whole, and once more that of the view, which goes on to y.

    Raises:
        UnsupportedCombinationError: the product is kept for the recomputation.

    Source: torch-autograd, functions/tensor.cpp, CopySlices.
    """
    if x.tape.products is not None:
        raise UnsupportedCombinationError(
            "activation_checkpointing 'selective_op' keeps products, and torch refuses that this "
            "layer adds to its product in place; use 'full'"
        )
    out = Tensor(x.tape, x.shape, x.dtype, x.storage, base=x.base or x)
    source = Cite("torch-autograd", "functions/tensor.cpp, CopySlices")

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        whole = node.new_grad(0, source=source)
        part = node.scratch("gradient of the view", *node.meta_of(0), source)
        return whole, part if node.wants(1) else None

    x.tape.record(name, (x, y), (), rule, out)
    return out


def scale_in_place(x: Tensor, name: str = "mul in place by a number") -> Tensor:
    """`x *= number`: the result is `x`'s own memory, but backward makes a gradient of its own."""
    out = Tensor(x.tape, x.shape, x.dtype, x.storage, base=x.base or x)
    x.tape.record(name, (x,), (), lambda node, grads, saved: (node.new_grad(0),), out)
    return out


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout as CUDA's native_dropout runs it: a mask of one byte for each element is saved."""
    if p == 0.0 or not x.tape.trains:
        return x
    source = _derivative("native_dropout")
    out = x.tape.new("dropout", x.shape, x.dtype, source)
    mask = x.tape.new("dropout mask", x.shape, DType.BOOL, source)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return (node.new_grad(0),)

    x.tape.record("dropout", (x,), (mask,), rule, out)
    return out


# -- layout ------------------------------------------------------------------------------------


def copy(x: Tensor, shape: Shape | None = None, name: str = "contiguous copy") -> Tensor:
    """A contiguous copy, or an expansion that is written out; backward sums an expansion down."""
    out = x.tape.new(name, shape or x.shape, x.dtype, _derivative("clone"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        (grad,) = grads
        return (grad,)

    x.tape.record(name, (x,), (), rule, out)
    return out


def split_heads(x: Tensor, shape: Shape, copies: Callable[[], bool] = lambda: True) -> Tensor:
    """A view between rows and heads whose gradient does not lie as a view of it would need.

    It lies head by head where it is the sum of a rotation's two halves, of which one was filled
    into zeros; behind attention in plain products it lies by token. Backward writes it out anew.

    Args:
        copies: whether it does so, as far as is known when backward comes.

    Source: torch-derivatives, view.
    """
    out = Tensor(x.tape, shape, x.dtype, x.storage, base=x.base or x)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        (grad,) = grads
        assert grad is not None
        if not copies():
            return (reshaped(grad, node.meta_of(0)[0]),)
        return (node.new_grad(0, source=_derivative("view")),)

    x.tape.record("view", (x,), (), rule, out)
    return out


def expand(x: Tensor, shape: Shape) -> Tensor:
    """A broadcast view; backward sums the gradient down to the smaller shape."""
    out = Tensor(x.tape, shape, x.dtype, x.storage, base=x.base or x)
    x.tape.record("expand", (x,), (), lambda node, grads, saved: (grads[0],), out)
    return out


def pick(x: Tensor, shape: Shape) -> Tensor:
    """A copy of some places, as indexing with a list makes it; backward fills zeros around it."""
    out = x.tape.new("index", shape, x.dtype, _derivative("index.Tensor"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return (node.new_grad(0, source=_derivative("index.Tensor")),)

    x.tape.record("index", (x,), (), rule, out)
    return out


def scatter(x: Tensor) -> Tensor:
    """Write rows into a tensor of zeros of the full shape; backward picks them out again."""
    out = x.tape.new("rows among zeros", x.shape, x.dtype, _derivative("index_put"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return (node.new_grad(0, source=_derivative("index_put")),)

    x.tape.record("index_put", (x,), (), rule, out)
    return out


def narrow(x: Tensor, last: Dim) -> Tensor:
    """A slice of the last dimension: a view; backward fills a tensor of zeros around it."""
    return part(x, (*x.shape[:-1], last))


def part(x: Tensor, shape: Shape) -> Tensor:
    """A view of some places of a tensor; backward fills a tensor of zeros around them."""
    out = Tensor(x.tape, shape, x.dtype, x.storage, base=x.base or x)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return (node.new_grad(0, source=_derivative("slice.Tensor")),)

    x.tape.record("slice", (x,), (), rule, out)
    return out


def split_last(x: Tensor, lasts: tuple[Dim, ...]) -> tuple[Tensor, ...]:
    """Split the last dimension into views with one node; backward concatenates the gradients."""
    outs = tuple(
        Tensor(x.tape, (*x.shape[:-1], last), x.dtype, x.storage, base=x.base or x)
        for last in lasts
    )

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return (node.new_grad(0, source=_derivative("split_with_sizes")),)

    x.tape.record("split", (x,), (), rule, *outs)
    return outs


def cat_last(parts: tuple[Tensor, ...], last: Dim) -> Tensor:
    """Concatenate along the last dimension; backward gives each part a view of the gradient."""
    first = parts[0]
    out = first.tape.new("cat", (*first.shape[:-1], last), first.dtype, _derivative("cat"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        (grad,) = grads
        assert grad is not None
        return tuple(reshaped(grad, meta[0]) if meta is not None else None for meta in node.metas)

    first.tape.record("cat", parts, (), rule, out)
    return out


def cat(parts: tuple[Tensor, ...], shape: Shape, name: str = "cat") -> Tensor:
    """Concatenate along an inner dimension; backward gives each part a strided view of its own."""
    first, dtype = parts[0], parts[0].dtype
    for each in parts[1:]:
        dtype = promote(dtype, each.dtype)
    out = first.tape.new(name, shape, dtype, _derivative("cat"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        (grad,) = grads
        assert grad is not None
        return tuple(None if meta is None else reshaped(grad, meta[0]) for meta in node.metas)

    first.tape.record(name, parts, (), rule, out)
    return out


def repeat(x: Tensor, shape: Shape, name: str = "repeat") -> Tensor:
    """Write a tensor of one row out for every row; backward sums over the rows."""
    out = x.tape.new(name, shape, x.dtype, _derivative("repeat"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return (node.new_grad(0, source=_derivative("repeat")),)

    x.tape.record(name, (x,), (), rule, out)
    return out


# -- matrix products ---------------------------------------------------------------------------


def linear(
    x: Tensor, weight: Operand, bias: Param | None, out_dim: Dim, *, caches: bool = True
) -> Tensor:
    """`x W^T + b`; saves x if the weight wants a gradient, and the weight if x wants one.

    Under autocast x is cast once for each call, the weight as `autocast_weight` says.
    """
    tape = x.tape
    # Autocast's wrapper casts its arguments in one call, the last of them first.
    vector = autocast_weight(tape, bias) if bias is not None else None
    if isinstance(weight, Tensor):
        matrix: Operand = autocast_to_half(weight)
    else:
        matrix = autocast_weight(tape, weight, caches=caches)
    half = autocast_to_half(x)
    out = Tensor(tape, (*x.shape[:-1], out_dim), half.dtype, None)

    # mm has self and mat2, addmm mat1, mat2 and self.
    order = (1, 0) if bias is None else (0, 1)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        source = _derivative("mm")
        made = {each: node.new_grad(each, source=source) for each in order if node.wants(each)}
        into_x, into_weight = made.pop(0, None), made.pop(1, None)
        into_bias = node.new_grad(2, source=source) if node.wants(2) else None
        if into_x is not None:
            # 3-D inputs are flattened around the product, so this gradient is a view.
            into_x = reshaped(into_x, into_x.shape)
        if into_weight is not None:
            into_weight = reshaped(into_weight, into_weight.shape)
        return into_x, into_weight, into_bias

    saved = (
        half if matrix.requires_grad else None,
        matrix if half.requires_grad else None,
    )
    tape.record("linear", (half, matrix, vector), saved, rule, out)
    # torch saves the inputs first: a recompute that ends with them never makes the output.
    tape.result("mm" if bias is None else "addmm", out, "output", _derivative("mm"))
    return out


def matmul(x: Tensor, y: Tensor, shape: Shape, name: str) -> Tensor:
    """A batched product of two activations; each is saved if the other wants a gradient."""
    left, right = head_by_head(autocast_to_half(x)), head_by_head(autocast_to_half(y))
    out = x.tape.new(name, shape, left.dtype, _derivative("bmm"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        second = node.new_grad(1) if node.wants(1) else None
        first = node.new_grad(0) if node.wants(0) else None
        return first, second

    saved = (left if right.requires_grad else None, right if left.requires_grad else None)
    x.tape.record(name, (left, right), saved, rule, out)
    return out


def head_by_head(x: Tensor) -> Tensor:
    """Copy a tensor [b, s, H, d] to [b, H, s, d] as a batched product of several rows needs it.

    torch.matmul folds batch and heads into one dimension; for a single row that is a view.
    """
    if len(x.shape) != 4 or x.shape[1] is not SEQ or not x.tape.regime.several_rows:
        return x
    batch, tokens, heads, width = x.shape
    return copy(x, (batch, heads, tokens, width), "copy head by head")


# -- normalisation, softmax and loss -----------------------------------------------------------


def layer_norm(x: Tensor, weight: Param | None, bias: Param | None) -> Tensor:
    """`native_layer_norm`, in fp32 under autocast; saves its input and two fp32 per row."""
    given = autocast_to_float(x)
    source = _derivative("native_layer_norm")
    out = x.tape.new("layer_norm", x.shape, given.dtype, source)
    rows = (*x.shape[:-1], ONE)
    mean = x.tape.new("layer_norm mean", rows, F32, source)
    rstd = x.tape.new("layer_norm rstd", rows, F32, source)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return tuple(node.new_grad(each) if node.wants(each) else None for each in range(3))

    x.tape.record("layer_norm", (given, weight, bias), (given, mean, rstd, weight, bias), rule, out)
    return out


def softmax(x: Tensor, dtype: DType | None = None) -> Tensor:
    """Softmax over the last dimension, in fp32 where asked for or under autocast; saves its output.

    A half precision input is cast to a copy of its own first, which dies when softmax returns.
    """
    given = cast(x, dtype) if dtype is not None else autocast_to_float(x)
    return unary(given, "softmax", keeps="output", operator="_softmax")


def embedding(ids: Tensor, weight: Operand, width: Dim) -> Tensor:
    """Rows of a table; saves the ids. Backward makes a dense gradient of the whole table."""
    shape = ids.shape
    out = ids.tape.new("output", (*shape, width), weight.dtype, _derivative("embedding"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        grad = node.new_grad(0, source=_derivative("embedding_dense_backward"))
        _embedding_workspace(node, shape, width).clear()
        return (grad,)

    ids.tape.record("embedding", (weight,), (ids,), rule, out)
    return out


def _embedding_workspace(node: Node, ids: Shape, width: Dim) -> list[Tensor]:
    """Temporaries of the sorting kernel, which CUDA takes for more than 3072 ids.

    Shapes:
        partial sums        [b, s, h]  4 bytes
        index vectors, six  [b, s]     8 bytes

    Source: torch-embedding, embedding_backward_cuda_kernel; the switch is in Embedding.cu.
    """
    if not node.tape.regime.sorts_embedding_gradient:
        return []
    source = Cite("torch-embedding", "embedding_backward_cuda_kernel")
    partial = node.scratch("partial sums", (*ids, width), F32, source)
    indices = [node.scratch("indices", ids, DType.INT64, source) for _ in range(6)]
    return [partial, *indices]


def log_softmax(x: Tensor) -> Tensor:
    """Log-softmax over the last dimension, in fp32 under autocast; saves its output."""
    return unary(autocast_to_float(x), "log_softmax", keeps="output", operator="_log_softmax")


def nll_loss(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood; saves its input, and backward fills a tensor of its size."""
    given = autocast_to_float(log_probs)
    out = given.tape.new("loss", (), given.dtype, _derivative("nll_loss_forward"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return (node.new_grad(0, source=_derivative("nll_loss_backward")),)

    given.tape.record("nll_loss", (given,), (given, labels), rule, out)
    return out
