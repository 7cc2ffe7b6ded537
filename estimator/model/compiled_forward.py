"""A checkpointed layer of a model that torch.compile has compiled: what its way forward makes.

Kernels write their results one after the other, and a buffer is let go of behind the last kernel
that reads it. The sum at the end of a layer and the next layer's norm are one kernel: what is added
up lives until that norm is there.

Source: torch-inductor, scheduler.py, Scheduler.free_buffers: in the order of the buffers' numbers.
"""

from __future__ import annotations

from estimator.dtypes import DType
from estimator.eager import compiled
from estimator.eager.ops import F32
from estimator.eager.size import BATCH, SEQ, Shape
from estimator.eager.tensor import Tensor
from estimator.model.compiled_buffers import (
    DOWN,
    GATE,
    KERNEL,
    OUT,
    ROWS,
    TAGGED,
    UP,
    Buffers,
    K,
    Layer,
    Q,
    V,
)
from estimator.sources import Cite


class Ahead(Buffers):
    """One pass forward through a layer."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.rows: list[Tensor] = []

    def run(self) -> Tensor:
        """Return what the layer hands on: the sum, or behind the last layer the final norm.

        What that norm keeps beside its input is in `rows` then.

        Shapes:
            handed on  [b, s, h]  width of the residual; behind the final norm, of the products
        """
        self._attention()
        self._mlp()
        out = self._last() if self.layer.last else self._sum()
        self.held.clear()
        return out

    def new(self, name: str, shape: Shape, dtype: DType, source: Cite) -> Tensor:
        """Allocate a buffer of the forward graph."""
        return self.layer.run.tape.new(f"checkpointed layer: {name}", shape, dtype, source)

    def _attention(self) -> None:
        layer = self.layer
        self.make("normalized", layer.hidden)
        layer.run.compiled_terms.clear()
        self._product(Q, "projected queries", layer.queries)
        self._product(K, "projected keys", layer.keys)
        if layer.norms_heads:
            self._normalized_heads()
        self._product(V, "projected values", layer.keys)
        self.free("normalized")
        if not layer.norms_heads:
            self._rotated_heads()
        if layer.heads.groups > 1:
            self.make("values", layer.queries)
            self.free("projected values")
        if layer.first:
            layer.run.forward_mask.append(compiled.mask(layer.run.tape, layer.dtype))
        self.make("attention output", layer.queries, source=KERNEL)
        self.make("log-sum-exp", (BATCH, layer.heads.query, SEQ), F32, KERNEL)
        rotated = ("keys", "queries") if layer.keys_first else ("queries", "keys")
        self.free("projected values", *rotated, "values", "log-sum-exp")
        if layer.last:
            layer.run.forward_mask.clear()
        self._product(OUT, "output", layer.hidden)
        self.free("attention output")

    def _product(self, name: str, result: str, shape: Shape) -> None:
        self.cast(name)
        self.make(result, shape)
        self.layer.run.tape.multiplied(self.held[result])
        self.free(f"{name} cast")

    def _rotated_heads(self) -> None:
        """Rotate queries and keys, the keys written out for every query head."""
        layer = self.layer
        if layer.keys_first:
            self.make("keys", layer.queries)
            self.free("projected keys")
            self.make("queries", layer.queries)
        else:
            self.make("queries", layer.queries)
            self.make("keys", layer.queries)
        self.free("projected queries", "projected keys")

    def _normalized_heads(self) -> None:
        """Normalize and rotate queries and keys, before the values are there."""
        layer = self.layer
        self.make("rotated keys", layer.keys)
        self.make("queries", layer.queries)
        self.make("keys", layer.queries)
        self.free("projected queries", "projected keys", "rotated keys")

    def _mlp(self) -> None:
        layer = self.layer
        self.make("normalized again", layer.hidden)
        self._product(GATE, "gate", layer.inner)
        self._product(UP, "up", layer.inner)
        self.free("normalized again")
        if layer.padded[-1] is layer.inner[-1]:
            self.reuse("gate", "product")
        else:
            self.make("product", layer.padded)
        self.free("gate", "up")
        self.cast(DOWN)
        self.make("output of the MLP", layer.hidden)
        self.free("product", f"{DOWN} cast")

    def _sum(self) -> Tensor:
        """Add both sublayers' outputs to the residual: over the first one, if it has that type."""
        layer = self.layer
        if layer.residual is layer.dtype:
            self.reuse("output", "residual")
        else:
            self.make("residual", layer.hidden, layer.residual)
        terms = (self.held.get(each) for each in ("output", "output of the MLP"))
        layer.run.compiled_terms += [each for each in terms if each is not None]
        return self.held.pop("residual")

    def _last(self) -> Tensor:
        """Run the final norm, whose kernel makes the sum on the way."""
        layer = self.layer
        tape = layer.run.tape
        tape.enter(tape.site + 1)
        self.rows.append(tape.new("1 / rms", ROWS, F32, TAGGED))
        self.reuse("output", "normalized")
        if not layer.keeps_final:
            self.free("output of the MLP")
            return self.held.pop("normalized")
        out = tape.new("output", layer.hidden, layer.dtype, TAGGED)
        self.rows.append(self.held.pop("normalized"))
        self.free("output of the MLP")
        return out
