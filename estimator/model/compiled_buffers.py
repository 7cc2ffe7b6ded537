"""The buffers of one checkpointed layer of a compiled model, by name, in either of its passes."""

from __future__ import annotations

from typing import Final

from estimator.dtypes import DType
from estimator.eager import compiled
from estimator.eager.size import BATCH, SEQ, Dim, Shape, dim
from estimator.eager.tensor import Tensor
from estimator.model.forward import Forward
from estimator.model.spec import LayerKind
from estimator.sources import Cite

ORDER: Final = Cite("torch-inductor", "scheduler.py, Scheduler.topological_sort_schedule")
KERNEL: Final = Cite("torch-derivatives", "_scaled_dot_product_efficient_attention")
TAGGED: Final = Cite("torch-checkpoint-operator", "TagActivationCheckpoint")
ROWS: Final[Shape] = (BATCH, SEQ)
GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
Q, K, V, OUT = (f"self_attn.{each}_proj" for each in "qkvo")


class Layer:
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
        # Autocast's casts keep the kernels of queries and keys apart, keys first.
        self.keys_first = self.casts and not self.norms_heads
        query = dim("H·d", heads.query.value * heads.width.value)
        shared = dim("KV·d", heads.key_value.value * heads.width.value)
        ffn = next(each.fan_out for each in kind.modules if each.name == GATE)  # type: ignore[attr-defined]
        hidden = run.spec.hidden
        self.hidden, self.queries, self.keys = ((*ROWS, each) for each in (hidden, query, shared))
        self.inner = (*ROWS, ffn)
        self.padded = (*ROWS, compiled.padded(ffn, self.dtype))
        sizes: dict[str, tuple[Dim, Dim]] = {
            Q: (query, hidden), K: (shared, hidden), V: (shared, hidden), OUT: (hidden, query),
            GATE: (ffn, hidden), UP: (ffn, hidden), DOWN: (hidden, ffn),
        }  # fmt: skip
        self.matrices: dict[str, Shape] = dict(sizes)


class Buffers:
    """What is alive of one pass through a layer; names stand for its buffers."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.held: dict[str, Tensor] = {}

    def new(self, name: str, shape: Shape, dtype: DType, source: Cite) -> Tensor:
        """Allocate a tensor."""
        raise NotImplementedError

    def make(
        self, name: str, shape: Shape, dtype: DType | None = None, source: Cite = ORDER
    ) -> None:
        """Make a buffer, by default in the type of the products."""
        self.held[name] = self.new(name, shape, dtype or self.layer.dtype, source)

    def free(self, *names: str) -> None:
        """Let go of buffers, those that are there."""
        for name in names:
            self.held.pop(name, None)

    def reuse(self, old: str, new: str) -> None:
        """Write something over a buffer that nobody reads any more."""
        before = self.held.pop(old)
        shape, dtype = before.shape, before.dtype
        del before
        self.make(new, shape, dtype)

    def cast(self, *names: str) -> None:
        """Cast weights, under autocast."""
        if self.layer.casts:
            for name in names:
                self.make(f"{name} cast", self.layer.matrices[name])
