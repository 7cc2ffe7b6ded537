"""A checkpointed layer of a model that torch.compile has compiled: what its part of backward makes.

Dynamo sees `torch.utils.checkpoint` as an operator, reentrant or not, and marks everything inside
for recomputation. Of a layer only its input crosses from the forward graph to the backward graph,
which computes the layer again just before it goes back through it. The last layer is computed to
its very end, for nobody has kept the input of the final norm.

The scheduler puts a kernel where the first of what it makes stands in the graph, behind all that
it reads. The sums over tokens that are the gradients of norms are read from one kernel for all
norms of a layer, in the last one with the final norm: so what they read lives until attention's
backward is over, and products that make gradients of weights wait likewise, in the last layer all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from estimator.dtypes import DType
from estimator.eager import attention, compiled
from estimator.eager.ops import F32, Grads, Out
from estimator.eager.size import BATCH, SEQ, Dim, Shape, dim
from estimator.eager.tensor import Node, Tensor
from estimator.model.forward import Forward
from estimator.model.spec import LayerKind
from estimator.sources import Cite

_ORDER: Final = Cite("torch-inductor", "scheduler.py, Scheduler.topological_sort_schedule")
_CONSTRAINT: Final = Cite("torch-inductor", "lowering.py, sdpa_constraint")
_TAGGED: Final = Cite("torch-checkpoint-operator", "TagActivationCheckpoint")
_ROWS: Final[Shape] = (BATCH, SEQ)
_KEPT: Final = 2
_GATE, _UP, _DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
_Q, _K, _V, _O = (f"self_attn.{each}_proj" for each in "qkvo")


def checkpointed(
    run: Forward,
    kind: LayerKind,
    layer: Callable[[Tensor], Tensor],
    hidden: Tensor,
    *,
    first: bool,
    final: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Run a layer of which only the input is kept.

    Args:
        layer: the layer, as a function of its input.
        first: it is the model's first layer, the last one of backward.
        final: the final norm, behind the last layer.

    Shapes:
        saved: input                                  [b, s, h]
        saved, last layer: 1 / rms of the final norm  [b, s]     4 bytes
        saved, last layer with norms of queries and keys, without autocast: what the
            final norm's weight multiplies            [b, s, h]

    Source: torch-checkpoint-operator, TagActivationCheckpoint; torch-partitioner,
    min_cut_rematerialization_partition.
    """
    tape = run.tape
    site, autocast = tape.site, tape.autocast if tape.autocast_enabled else None
    weights = [(each.name, weight, site) for each in kind.modules for weight in each.weights()]
    if final is not None:
        weights += [("", weight, site + 1) for each in run.spec.final for weight in each.weights()]
    params = [run.param(name or "norm", weight, at) for name, weight, at in weights]
    names = [name if weight.name == "weight" else "" for name, weight, _ in weights]
    program = _Layer(run, kind, autocast, names, first=first, last=final is not None)
    recording, tape.recording = tape.recording, False
    try:
        out = layer(hidden)
        rows: list[Tensor] = []
        if final is not None:
            out = final(out)
            rows.append(tape.new("1 / rms", _ROWS, F32, _TAGGED))
            if program.keeps_final:
                rows.append(tape.new("normalized", out.shape, out.dtype, _TAGGED))
    finally:
        tape.recording = recording
    tape.enter(site)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        # The final norm has its gradient first; then nobody reads what it has kept beside 1 / rms.
        del saved[_KEPT:], node.saved[_KEPT:]
        incoming = [grads.pop()]
        return _Pass(program, node).run(incoming)

    tape.record("checkpointed layer", (hidden, *params), (hidden, *rows), rule, out)
    return out


class _Layer:
    """Types and shapes of one layer, and where in the model it stands."""

    def __init__(
        self,
        run: Forward,
        kind: LayerKind,
        autocast: DType | None,
        names: list[str],
        *,
        first: bool,
        last: bool,
    ) -> None:
        heads = kind.heads
        self.run, self.heads, self.names = run, heads, names
        self.first, self.last = first, last
        self.casts = autocast is not None
        self.residual = run.dtype
        self.dtype = autocast or run.dtype
        self.norms_heads = any(each.name == "self_attn.q_norm" for each in kind.modules)
        # The partitioner then keeps what the final norm's weight multiplies, so that this norm has
        # its gradient before the layer is computed again. Not so where autocast casts behind it.
        self.keeps_final = self.norms_heads and autocast is None
        query = dim("H·d", heads.query.value * heads.width.value)
        shared = dim("KV·d", heads.key_value.value * heads.width.value)
        ffn = next(each.fan_out for each in kind.modules if each.name == _GATE)  # type: ignore[attr-defined]
        hidden = run.spec.hidden
        self.hidden, self.queries, self.keys = ((*_ROWS, each) for each in (hidden, query, shared))
        self.inner = (*_ROWS, ffn)
        self.padded = (*_ROWS, compiled.padded(ffn, self.dtype))
        sizes: dict[str, tuple[Dim, Dim]] = {
            _Q: (query, hidden), _K: (shared, hidden), _V: (shared, hidden), _O: (hidden, query),
            _GATE: (ffn, hidden), _UP: (ffn, hidden), _DOWN: (hidden, ffn),
        }  # fmt: skip
        self.matrices: dict[str, Shape] = dict(sizes)


class _Pass:
    """One pass through a layer's part of the backward graph; names stand for its buffers."""

    def __init__(self, layer: _Layer, node: Node) -> None:
        self.layer = layer
        self.node = node
        self.held: dict[str, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}

    def run(self, incoming: list[Tensor | None]) -> Out:
        """Compute the layer again and go back through it."""
        gradient = incoming.pop()
        assert gradient is not None
        self.held["incoming gradient"] = gradient
        del gradient
        self._recompute_attention()
        self._recompute_mlp()
        self._mlp()
        self._attention()
        self._late_gradients()
        out = self.held.pop("gradient of the residual")
        self.held.clear()
        grads = tuple(self.gradients.get(each) for each in range(len(self.layer.names)))
        return (Tensor(out.tape, self.node.meta_of(0)[0], out.dtype, out.storage), *grads)

    # -- buffers ------------------------------------------------------------------------------

    def _make(
        self, name: str, shape: Shape, dtype: DType | None = None, source: Cite = _ORDER
    ) -> None:
        self.held[name] = self.node.scratch(name, shape, dtype or self.layer.dtype, source)

    def _free(self, *names: str) -> None:
        for name in names:
            self.held.pop(name, None)

    def _reuse(self, old: str, new: str) -> None:
        """Write something over a buffer that nobody reads any more."""
        before = self.held.pop(old)
        shape, dtype = before.shape, before.dtype
        del before
        self._make(new, shape, dtype)

    def _cast(self, *names: str) -> None:
        """Cast weights; the casts live until the gradients of the products' inputs are there."""
        if self.layer.casts:
            for name in names:
                self._make(f"{name} cast", self.layer.matrices[name])

    def _gradient(self, name: str) -> None:
        """Make the gradient of a module's weight, under autocast in its product's type first."""
        layer = self.layer
        for index, each in enumerate(layer.names):
            number = index + 1
            if each != name or not self.node.wants(number):
                continue
            if layer.casts and name in layer.matrices:
                self._make("gradient before its cast", layer.matrices[name])
            self.gradients[index] = self.node.new_grad(number, source=_ORDER)
            self._free("gradient before its cast")

    # -- the layer again ----------------------------------------------------------------------

    def _recompute_attention(self) -> None:
        layer = self.layer
        self._make("1 / rms", _ROWS, F32)
        self._make("normalized", layer.hidden)
        self._cast(_Q, _K, _V)
        self._make("projected queries", layer.queries)
        self._make("projected keys", layer.keys)
        self._make("projected values", layer.keys)
        self._make("queries", layer.queries)
        self._make("keys", layer.queries)
        if layer.heads.groups == 1:
            self._reuse("projected values", "values")
            self._free(*self._unrotated)
        elif layer.norms_heads:
            self._make("values", layer.queries)
            self._free("projected values")
        else:
            self._reuse("projected queries", "values")
            self._free("projected keys", "projected values")
        if layer.last:
            layer.run.backward_mask.append(compiled.mask(self.node.tape, layer.dtype))
        self._make("attention output", layer.queries)
        self._make("log-sum-exp", (BATCH, layer.heads.query, SEQ), F32)
        self._cast(_O)
        self._make("output", layer.hidden)

    @property
    def _unrotated(self) -> tuple[str, ...]:
        """What only the norms of queries and keys read again."""
        return () if self.layer.norms_heads else ("projected queries", "projected keys")

    def _recompute_mlp(self) -> None:
        layer = self.layer
        self._make("1 / rms, again", _ROWS, F32)
        self._make("normalized again", layer.hidden)
        self._cast(_GATE)
        self._make("gate", layer.inner)
        self._cast(_UP)
        self._make("up", layer.inner)
        self._cast(_DOWN)

    # -- back through it ----------------------------------------------------------------------

    def _mlp(self) -> None:
        if not self.layer.last:
            self._mlp_of_inner()
        elif self.layer.keeps_final:
            self._mlp_on_the_way()
        else:
            self._mlp_of_last()

    def _mlp_of_last(self) -> None:
        """Go back through the MLP of the last layer, whose output is made again.

        Shapes:
            product, both gradients  [b, s, f]  rows padded
        """
        layer = self.layer
        self._make("product", layer.padded)
        self._make("output of the MLP", layer.hidden)
        if layer.casts:
            self._make("gradient of the residual", layer.hidden, layer.residual)
        self._make("gradient of the output", layer.hidden)
        self._make("gradient of the product", layer.inner)
        self._free(f"{_DOWN} cast")
        self._make("gradient of up", layer.padded)
        if layer.padded[-1] is layer.inner[-1]:
            # Rows without padding: written over what the same kernel reads.
            self._reuse("up", "gradient of gate")
        else:
            self._make("gradient of gate", layer.padded)
        self._free("gate", "up", "gradient of the product")
        for name in (_UP, _GATE):
            self._make(f"{name}, gradient of its input", layer.hidden)
            self._free(f"{name} cast")
        if layer.casts:
            self._make("gradient of the sum", layer.hidden)
        else:
            self._make("gradient of the residual", layer.hidden)

    def _mlp_on_the_way(self) -> None:
        """Go back through the MLP of the last layer, where the final norm has its gradient."""
        layer = self.layer
        self._make("product", layer.padded)
        self._make("output of the MLP", layer.hidden)
        self._reuse("incoming gradient", "gradient of the residual")
        self._free("output of the MLP")
        self._gradient(_DOWN)
        self._reuse("product", "gradient of the product")
        self._make("gradient of up", layer.padded)
        self._reuse("up", "gradient of gate")
        self._free("gate", "gradient of the product")
        self._back_to_norm()

    def _mlp_of_inner(self) -> None:
        """Go back through another layer's MLP, whose weights get their gradients on the way."""
        layer = self.layer
        self._reuse("incoming gradient", "gradient of the residual")
        if layer.casts:
            self._make("gradient of the output", layer.hidden)
        self._make("gradient of the product", layer.inner)
        for name in ("product", "gradient of up", "gradient of gate"):
            self._make(name, layer.padded)
        self._free("gate", "up", "gradient of the product", f"{_DOWN} cast")
        self._gradient(_DOWN)
        self._free("product")
        self._back_to_norm()

    def _back_to_norm(self) -> None:
        """Go back from gate and up, whose weights get their gradients before their inputs do."""
        layer = self.layer
        self._gradient(_UP)
        self._make(f"{_UP}, gradient of its input", layer.hidden)
        self._free("gradient of up", f"{_UP} cast")
        self._gradient(_GATE)
        self._reuse("normalized again", f"{_GATE}, gradient of its input")
        self._free("gradient of gate", f"{_GATE} cast")
        if layer.casts:
            self._reuse("gradient of the output", "gradient of the sum")

    def _attention(self) -> None:
        """Go back through attention.

        The last layer's mask has just been made, and no layout is fixed for it: the constraint on
        this operator's inputs writes it out for all heads.

        Shapes:
            mask of all heads, in the last layer  [b, H, s, s]  width of the queries
            gradients of queries, keys, values    [b, s, H, d]
        """
        layer = self.layer
        full = (BATCH, SEQ, layer.heads.query, layer.heads.width)
        self._make("gradient of attention", layer.queries)
        self._free(f"{_O} cast")
        if layer.last:
            mask = (BATCH, layer.heads.query, SEQ, SEQ)
            self._make("mask of all heads", mask, source=_CONSTRAINT)
        for name in ("queries", "keys", "values"):
            self._make(f"gradient of {name}", full)
        workspace = attention.efficient_workspace(self.node, layer.heads)
        workspace.clear()
        self._free("queries", "keys", "values", "log-sum-exp", "gradient of attention")
        self._free("mask of all heads")
        if layer.first:
            layer.run.backward_mask.clear()
        for name, of in ((_V, "values"), (_K, "keys"), (_Q, "queries")):
            shape = layer.queries if name == _Q else layer.keys
            if layer.heads.groups == 1 and name == _V:
                self._reuse(f"gradient of {of}", f"{name}, gradient of its output")
                self._make(f"{name}, gradient of its input", layer.hidden)
            else:
                self._make(f"{name}, gradient of its output", shape)
                self._reuse(f"gradient of {of}", f"{name}, gradient of its input")
            self._free(f"{name} cast")

    def _late_gradients(self) -> None:
        """Make the gradients that wait for the kernel that reads the sums for all norms."""
        layer = self.layer
        self._free("output", "projected queries", "projected keys")
        self._free(f"{_UP}, gradient of its input", f"{_GATE}, gradient of its input")
        self._free("incoming gradient", "output of the MLP")
        if layer.last and not layer.keeps_final:
            self._gradient(_DOWN)
            self._free("product", "gradient of the output")
            self._gradient(_UP)
            self._gradient(_GATE)
            self._free("gradient of up", "gradient of gate", "normalized again")
        self._gradient(_O)
        self._free("attention output", "gradient of the sum")
        for name in (_V, _K, _Q):
            self._gradient(name)
            self._free(f"{name}, gradient of its output")
        for name in set(layer.names) - layer.matrices.keys() - {""}:
            self._gradient(name)
        self._gradient("")
        # Written over the gradient that came in, which the same kernel adds.
        for name in (_V, _K, _Q):
            self._free(f"{name}, gradient of its input")
