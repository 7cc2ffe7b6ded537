"""AdaLoRA: an update in the form of a singular value decomposition, whose rank can be cut."""

from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from estimator.dtypes import DType, promote
from estimator.eager import ops
from estimator.eager.size import dim
from estimator.eager.tensor import ENGINE, Node, Param, Tape, Tensor
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import LayerKind, Linear, Module, Weight
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.method import FOUR_BIT, Method, Targets, adapted, saved
from estimator.techniques.targets import ADALORA, targets

F32: Final = DType.FLOAT32
ONE: Final = dim("one", 1)
_LAYER: Final = Cite("peft", "tuners/adalora/layer.py, SVDLinear.forward")
_MADE: Final = Cite("peft", "tuners/adalora/layer.py, AdaLoraLayer.update_layer")
_TERM: Final = Cite("peft", "tuners/adalora/model.py, AdaLoraModel.forward")
_ON_CPU: Final = (
    "adalora: PEFT makes the rank of each layer a trained parameter where it moves or casts it; an "
    "fp32 model that is wrapped while it is on the CPU has it frozen, and each adapted layer keeps "
    "4 bytes for each token and output less than is counted here"
)
_CALLER: Final = (
    "adalora: the Trainer never calls update_and_allocate, so ranks stay at init_r and no "
    "importance is kept; where a callback calls it after each optimizer step (on_optimizer_step, "
    "before the gradients go), set update_and_allocate"
)


class AdaLoraAdapter(Struct, frozen=True):
    """The singular vectors and values of one linear layer's update."""

    r: int
    dropout: float

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the vectors and values, fp32, and the rank as a tensor.

        What PEFT moves to the model's device, or casts, it wraps anew as a parameter, and a new
        parameter wants a gradient: the rank too.

        Shapes:
            lora_A   [r, in]   4 bytes
            lora_E   [r, 1]    4 bytes
            lora_B   [out, r]  4 bytes
            ranknum  [1]       4 bytes

        Source: zhang2023, SVD-based adaptation; peft, tuners/adalora/layer.py,
        AdaLoraLayer.update_layer; tuners/tuners_utils.py, _move_adapter_to_device_of_base_layer
        and cast_adapter_dtype.
        """
        rank = dim("r", self.r)
        return (
            Weight("lora_A", (rank, linear.fan_in), F32, True, source=_MADE),
            Weight("lora_E", (rank, ONE), F32, True, source=_MADE),
            Weight("lora_B", (linear.fan_out, rank), F32, True, source=_MADE),
            Weight("ranknum", (ONE,), F32, True, source=_MADE),
        )

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Return `base(x) + x (A * E)^T B^T * scaling / rank`, summed into the base's output.

        Shapes:
            A * E                   [r, in]      4 bytes, kept unless autocast has cast it
            update, update scaled   [b, s, out]  4 bytes; 2 under autocast until it is divided
            scaled update, saved    [b, s, out]  for the gradient of the rank

        Source: peft, tuners/adalora/layer.py, SVDLinear.forward; tuners/adalora/bnb.py,
        SVDLinear4bit.forward and SVDLinear8bitLt.forward.
        """
        result = run.base_linear(x, linear)
        clones = linear.format is not None and linear.format.wrapper.clones
        if clones:
            result = ops.copy(result, name="clone of the base output")
        first, values, last, number = (
            run.param(linear.name, each) for each in self.weights(linear)
        )
        ranknum = _rank(run.tape, number)
        autocasting = run.tape.autocast is not None and run.tape.autocast_enabled
        if linear.format is None:
            x = ops.cast(x, F32, "input cast for the adapter")
            return _summed(
                linear, result, self._scaled(self._product(run, x, first, values, last), ranknum)
            )
        if not autocasting:
            x = ops.cast(x, F32, "input cast for the adapter")
        output = self._product(run, x, first, values, last)
        if not autocasting:
            output = ops.cast(output, result.dtype, "update cast back")
        output = self._scaled(output, ranknum)
        if clones:
            return ops.add_in_place(result, output)
        if result.dtype.is_half and not autocasting:
            raise UnsupportedCombinationError(
                "adalora over int8 weights adds an fp32 update and leaves the sum in fp32, which "
                "attention does not take beside half precision; use prepare_kbit or autocast"
            )
        return ops.add(result, output, "sum with the update")

    def _product(self, run: Forward, x: Tensor, first: Param, values: Param, last: Param) -> Tensor:
        """Return `dropout(x) (A * E)^T B^T`; autocast caches no transposed weight."""
        return ops.linear(
            ops.linear(
                ops.dropout(x, self.dropout), ops.mul(first, values, "A times E", tape=run.tape),
                None, dim("r", self.r),
            ),
            last, None, last.shape[0], caches=False,
        )  # fmt: skip

    def _scaled(self, update: Tensor, ranknum: Tensor) -> Tensor:
        return _divided(ops.scale(update, "scaled update"), ranknum)


def _rank(tape: Tape, number: Param) -> Tensor:
    """Return `ranknum + 1e-5`."""
    out = tape.new("rank", number.shape, F32, _LAYER)
    tape.record("rank", (number,), (), lambda node, grads, saved: (grads[0],), out)
    return out


def _divided(update: Tensor, ranknum: Tensor) -> Tensor:
    """Return `update / ranknum` in fp32; saves the update for the gradient of the rank.

    The gradient of the rank has the size of the update until it is summed; beside it are the
    negated gradient and the update divided once and twice.

    Source: torch-derivatives, div.Tensor; torch-autograd, FunctionsManual.cpp,
    div_tensor_other_grad.
    """
    out = Tensor(update.tape, update.shape, promote(update.dtype, ranknum.dtype), None)

    def rule(node: Node, grads: list[Tensor], saved: list[Any]) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        shape, dtype = grad.shape, F32
        held = [node.scratch(name, shape, dtype) for name in ("negated", "once", "twice")]
        into_rank = node.new_grad(1, shape, dtype)
        held.clear()
        return node.new_grad(0, shape, dtype), into_rank

    update.tape.record("div", (update, ranknum), (update, ranknum), rule, out)
    update.tape.allocate(out, "update over the rank", Cite("torch-derivatives", "div.Tensor"))
    return out


def _summed(linear: Linear, result: Tensor, update: Tensor) -> Tensor:
    """Return `result += update`.

    A layer with a bias, and a Conv1D, hand out a view: its backward copies the gradient into one
    of the base's shape, and that once more.

    Source: torch-autograd, functions/tensor.cpp, CopySlices::apply_impl; torch-linear,
    Linear.cpp, _flatten_nd_linear.
    """
    if not (linear.bias or linear.transposed):
        return ops.add_in_place(result, update)
    out = Tensor(
        result.tape, result.shape, result.dtype, result.storage, base=result.base or result
    )

    def rule(node: Node, grads: list[Tensor], saved: list[Any]) -> tuple[Tensor, ...]:
        (grad,) = grads
        whole = node.scratch("gradient of the base", grad.shape, grad.dtype)
        return whole, node.scratch("its copy", grad.shape, grad.dtype)

    result.tape.record("add in place to a view", (result, update), (), rule, out)
    return out


class Orthogonality(Struct, frozen=True):
    """What AdaLoRA adds to the loss: how far A and B are from orthogonal, by the Frobenius norm.

    Every A and B is multiplied with its transpose, outside the layers and their checkpoints. Its
    backward comes before that of the loss, so from there on all their gradients are alive.

    Shapes:
        A, B and their transposes, cast  [r, in], [out, r]  2 bytes each, under autocast
        distance from the identity       [r, r]             saved for the norm

    Source: zhang2023, SVD-based adaptation; peft, tuners/adalora/model.py, AdaLoraModel.forward.
    """

    def added(self, run: Forward, kinds: tuple[LayerKind, ...], loss: Tensor) -> Tensor:
        """Return the loss with the term added to it, in place."""
        tape = run.tape
        half = tape.autocast if tape.autocast_enabled else None
        factors = list(_factors(run, kinds))
        term = Tensor(tape, (), F32, None)
        kept: list[Tensor] = []
        for param, site, rank in factors:
            if half is not None:
                kept += [
                    tape.new(f"{param.name}, autocast", param.shape, half, _TERM, site=site)
                    for _ in "pT"
                ]
            square = (rank, rank)
            product = tape.new("product with its transpose", square, half or F32, _TERM, site=site)
            identity = tape.new("identity", square, half or F32, _TERM, site=site)
            kept.append(tape.new("distance from the identity", square, F32, _TERM, site=site))
            del product, identity

        def rule(node: Node, grads: list[Tensor], saved: list[Any]) -> tuple[Tensor, ...]:
            node.saved.clear()
            out = []
            for param, site, _ in reversed(factors):
                saved.pop()
                out.append(_gradient(node.tape, param, site, half, saved))
            node.tape.reached = dict(node.tape.live)
            return tuple(reversed(out))

        tape.record(
            "orthogonality", tuple(param for param, _, _ in factors), tuple(kept), rule, term
        )
        tape.allocate(term, "orthogonality", _TERM)
        kept.clear()
        return ops.add_in_place(loss, term)


def _gradient(tape: Tape, param: Param, site: int, half: DType | None, saved: list[Any]) -> Tensor:
    """Return the gradient of one factor: the sum of those of itself and of its transpose."""
    parts = []
    if half is not None:
        parts = [tape.new("half gradient", param.shape, half, ENGINE, site=site) for _ in "pT"]
        del saved[-2:]
    grad = tape.new(f"{param.name}.grad", param.shape, F32, ENGINE, "gradients", site=site)
    tape.new("gradient of the transpose", param.shape, F32, ENGINE, site=site)
    parts.clear()
    return grad


def _factors(run: Forward, kinds: tuple[LayerKind, ...]) -> Any:
    """Yield A and B of every adapted layer with its site and the rank."""
    last = len(kinds) + 2
    sites: list[tuple[int, tuple[Module, ...]]] = [
        *((site, kind.modules) for site, kind in enumerate(kinds, start=1)),
        (last, (run.spec.head,)),
    ]
    for site, modules in sites:
        for module in modules:
            if isinstance(module, Linear) and isinstance(module.adapter, AdaLoraAdapter):
                right, _, left, _ = module.adapter.weights(module)
                for weight in (right, left):
                    param = run.param(module.name, weight, site)
                    yield param, site, dim("r", module.adapter.r)


class AdaLora(Method, frozen=True, tag="adalora"):
    """Train singular vectors and values beside frozen linear layers (PEFT's AdaLoraConfig)."""

    peft: ClassVar[str | None] = "AdaLoraConfig"
    source: ClassVar[Cite] = Cite("zhang2023", "SVD-based adaptation")
    quantizations: ClassVar[frozenset[str] | None] = FOUR_BIT | {"int8"}

    init_r: Annotated[int, Meta(ge=1, le=65_536, description="Rank at the start.")] = 12
    target_r: Annotated[
        int, Meta(ge=1, le=65_536, description="Mean rank at the end; frees no memory.")
    ] = 8
    total_step: Annotated[
        int, Meta(ge=1, le=10**9, description="Steps of the schedule; cost no memory.")
    ] = 1000
    tinit: Annotated[int, Meta(ge=0, le=10**9, description="Steps before ranks are cut.")] = 0
    tfinal: Annotated[int, Meta(ge=0, le=10**9, description="Steps after ranks are cut.")] = 0
    lora_alpha: Annotated[float, Meta(gt=0, le=1e9)] = 8.0
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Names = ()
    modules_to_save: Names = ()
    update_and_allocate: Annotated[
        bool, Meta(description="The loop calls update_and_allocate after each optimizer step.")
    ] = False

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen, an adapter on each target, and a longer loss.

        What is cut is set to zero: no tensor becomes smaller.

        Raises:
            InvalidRequestError: a schedule without room for cutting, as PEFT refuses it.

        Source: peft, tuners/adalora/config.py, AdaLoraConfig.__post_init__;
        tuners/adalora/layer.py, RankAllocator.mask_to_budget.
        """
        if self.tinit >= self.total_step - self.tfinal:
            raise InvalidRequestError(
                "tinit and tfinal leave no steps of total_step in which ranks are cut; make "
                "total_step larger"
            )
        named = targets(self.target_modules, ADALORA, run.spec.model_type)
        chosen = Targets(
            "all-linear" if isinstance(named, str) else named, modules_to_save=self.modules_to_save
        )
        adapter = AdaLoraAdapter(self.init_r, self.lora_dropout)
        spec = saved(adapted(run.spec, chosen, lambda _: adapter), self.modules_to_save)
        notes = (_ON_CPU,) if self.update_and_allocate else (_ON_CPU, _CALLER)
        spec = replace(spec, loss_term=Orthogonality(), notes=(*spec.notes, *notes))
        return replace(run, spec=spec, keeps_importance=self.update_and_allocate)
