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

from typing import Any, Final

from estimator.dtypes import DType
from estimator.eager import attention, compiled
from estimator.eager.ops import F32, Grads, Out
from estimator.eager.size import BATCH, SEQ, Shape
from estimator.eager.tensor import Node, Tensor
from estimator.model.compiled_buffers import (
    DOWN,
    GATE,
    KERNEL,
    ORDER,
    OUT,
    ROWS,
    UP,
    Buffers,
    K,
    Layer,
    Q,
    V,
)
from estimator.model.compiled_forward import Ahead
from estimator.model.forward import Forward
from estimator.model.spec import LayerKind
from estimator.sources import Cite

_CONSTRAINT: Final = Cite("torch-inductor", "lowering.py, sdpa_constraint")
_KEPT: Final = 2


def checkpointed(
    run: Forward,
    kind: LayerKind,
    hidden: Tensor,
    *,
    first: bool,
    final: bool,
) -> Tensor:
    """Run a layer of which only the input is kept.

    Args:
        first: it is the model's first layer, the last one of backward.
        final: it is the last layer, behind which the final norm is run as well.

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
    if final:
        weights += [("", weight, site + 1) for each in run.spec.final for weight in each.weights()]
    params = [run.param(name or "norm", weight, at) for name, weight, at in weights]
    names = [name if weight.name == "weight" else "" for name, weight, _ in weights]
    program = Layer(run, kind, autocast, names, first=first, last=final)
    ahead = Ahead(program)
    out = ahead.run()
    tape.enter(site)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        # The final norm has its gradient first; then nobody reads what it has kept beside 1 / rms.
        del saved[_KEPT:], node.saved[_KEPT:]
        incoming = [grads.pop()]
        return _Pass(program, node).run(incoming)

    tape.record("checkpointed layer", (hidden, *params), (hidden, *ahead.rows), rule, out)
    return out


class _Pass(Buffers):
    """One pass through a layer's part of the backward graph; names stand for its buffers."""

    def __init__(self, layer: Layer, node: Node) -> None:
        super().__init__(layer)
        self.node = node
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

    def new(self, name: str, shape: Shape, dtype: DType, source: Cite) -> Tensor:
        """Allocate a temporary of this part of backward."""
        return self.node.scratch(name, shape, dtype, source)

    def _gradient(self, name: str) -> None:
        """Make the gradient of a module's weight, under autocast in its product's type first."""
        layer = self.layer
        for index, each in enumerate(layer.names):
            number = index + 1
            if each != name or not self.node.wants(number):
                continue
            if layer.casts and name in layer.matrices:
                self.make("gradient before its cast", layer.matrices[name])
            self.gradients[index] = self.node.new_grad(number, source=ORDER)
            self.free("gradient before its cast")

    # -- the layer again ----------------------------------------------------------------------

    def _recompute_attention(self) -> None:
        layer = self.layer
        self.make("1 / rms", ROWS, F32)
        self.make("normalized", layer.hidden)
        self._product(Q, "projected queries", layer.queries)
        self._product(K, "projected keys", layer.keys)
        self._product(V, "projected values", layer.keys)
        self.make("queries", layer.queries)
        self.make("keys", layer.queries)
        if layer.heads.groups == 1:
            self.reuse("projected values", "values")
            self.free(*self._unrotated)
        elif layer.norms_heads:
            self.make("values", layer.queries)
            self.free("projected values")
        else:
            self.reuse("projected queries", "values")
            self.free("projected keys", "projected values")
        if layer.last:
            layer.run.backward_mask.append(compiled.mask(self.node.tape, layer.dtype))
        self.make("attention output", layer.queries, source=KERNEL)
        self.make("log-sum-exp", (BATCH, layer.heads.query, SEQ), F32, KERNEL)
        self._product(OUT, "output", layer.hidden)

    def _product(self, name: str, result: str, shape: Shape) -> None:
        self.cast(name)
        self.make(result, shape)

    @property
    def _unrotated(self) -> tuple[str, ...]:
        """What only the norms of queries and keys read again."""
        return () if self.layer.norms_heads else ("projected queries", "projected keys")

    def _recompute_mlp(self) -> None:
        layer = self.layer
        self.make("1 / rms, again", ROWS, F32)
        self.make("normalized again", layer.hidden)
        self._product(GATE, "gate", layer.inner)
        self._product(UP, "up", layer.inner)
        self.cast(DOWN)

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
        self.make("product", layer.padded)
        self.make("output of the MLP", layer.hidden)
        if layer.casts:
            self.make("gradient of the residual", layer.hidden, layer.residual)
        self.make("gradient of the output", layer.hidden)
        self.make("gradient of the product", layer.inner)
        self.free(f"{DOWN} cast")
        self.make("gradient of up", layer.padded)
        if layer.padded[-1] is layer.inner[-1]:
            # Rows without padding: written over what the same kernel reads.
            self.reuse("up", "gradient of gate")
        else:
            self.make("gradient of gate", layer.padded)
        self.free("gate", "up", "gradient of the product")
        for name in (UP, GATE):
            self.make(f"{name}, gradient of its input", layer.hidden)
            self.free(f"{name} cast")
        if layer.casts:
            self.make("gradient of the sum", layer.hidden)
        else:
            self.make("gradient of the residual", layer.hidden)

    def _mlp_on_the_way(self) -> None:
        """Go back through the MLP of the last layer, where the final norm has its gradient."""
        layer = self.layer
        self.make("product", layer.padded)
        self.make("output of the MLP", layer.hidden)
        self.reuse("incoming gradient", "gradient of the residual")
        self.free("output of the MLP")
        self._gradient(DOWN)
        self.reuse("product", "gradient of the product")
        self.make("gradient of up", layer.padded)
        self.reuse("up", "gradient of gate")
        self.free("gate", "gradient of the product")
        self._back_to_norm()

    def _mlp_of_inner(self) -> None:
        """Go back through another layer's MLP, whose weights get their gradients on the way."""
        layer = self.layer
        self.reuse("incoming gradient", "gradient of the residual")
        if layer.casts:
            self.make("gradient of the output", layer.hidden)
        self.make("gradient of the product", layer.inner)
        for name in ("product", "gradient of up", "gradient of gate"):
            self.make(name, layer.padded)
        self.free("gate", "up", "gradient of the product", f"{DOWN} cast")
        self._gradient(DOWN)
        self.free("product")
        self._back_to_norm()

    def _back_to_norm(self) -> None:
        """Go back from gate and up, whose weights get their gradients before their inputs do."""
        layer = self.layer
        self._gradient(UP)
        self.make(f"{UP}, gradient of its input", layer.hidden)
        self.free("gradient of up", f"{UP} cast")
        self._gradient(GATE)
        self.reuse("normalized again", f"{GATE}, gradient of its input")
        self.free("gradient of gate", f"{GATE} cast")
        if layer.casts:
            self.reuse("gradient of the output", "gradient of the sum")

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
        self.make("gradient of attention", layer.queries)
        self.free(f"{OUT} cast")
        if layer.last:
            mask = (BATCH, layer.heads.query, SEQ, SEQ)
            self.make("mask of all heads", mask, source=_CONSTRAINT)
        for name in ("queries", "keys", "values"):
            self.make(f"gradient of {name}", full, source=KERNEL)
        workspace = attention.efficient_workspace(self.node, layer.heads)
        workspace.clear()
        self.free("queries", "keys", "values", "log-sum-exp", "gradient of attention")
        self.free("mask of all heads")
        if layer.first:
            layer.run.backward_mask.clear()
        for name, of in ((V, "values"), (K, "keys"), (Q, "queries")):
            shape = layer.queries if name == Q else layer.keys
            if layer.heads.groups == 1 and name == V:
                self.reuse(f"gradient of {of}", f"{name}, gradient of its output")
                self.make(f"{name}, gradient of its input", layer.hidden)
            else:
                self.make(f"{name}, gradient of its output", shape)
                self.reuse(f"gradient of {of}", f"{name}, gradient of its input")
            self.free(f"{name} cast")

    def _late_gradients(self) -> None:
        """Make the gradients that wait for the kernel that reads the sums for all norms."""
        layer = self.layer
        self.free("output", "projected queries", "projected keys")
        self.free(f"{UP}, gradient of its input", f"{GATE}, gradient of its input")
        self.free("incoming gradient", "output of the MLP")
        if layer.last and not layer.keeps_final:
            self._gradient(DOWN)
            self.free("product", "gradient of the output")
            self._gradient(UP)
            self._gradient(GATE)
            self.free("gradient of up", "gradient of gate", "normalized again")
        self._gradient(OUT)
        self.free("attention output", "gradient of the sum")
        for name in (V, K, Q):
            self._gradient(name)
            self.free(f"{name}, gradient of its output")
        for name in set(layer.names) - layer.matrices.keys() - {""}:
            self._gradient(name)
        self._gradient("")
        # Written over the gradient that came in, which the same kernel adds.
        for name in (V, K, Q):
            self.free(f"{name}, gradient of its input")
