"""Rows of the embedding that are trained while the rest of the table stays frozen."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import dim
from estimator.eager.tensor import Node, Tensor
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Buffer, Embedding, Linear, ModelSpec, Weight
from estimator.sources import Cite

_LAYER: Final = Cite("peft", "tuners/trainable_tokens/layer.py, TrainableTokensLayer.update_layer")
_MERGED: Final = Cite(
    "peft", "tuners/trainable_tokens/layer.py, TrainableTokensLayer.get_merged_weights"
)


class TokenRows(Struct, frozen=True):
    """The trained rows of one table.

    Args:
        rows: how many.
    """

    rows: int

    def weights(self, table: Embedding) -> tuple[Weight, ...]:
        """Return the trained rows, which PEFT keeps in fp32.

        Shapes:
            trainable_tokens_delta  [n, h]  4 bytes
        """
        shape = (dim("n", self.rows), table.width)
        return (Weight("trainable_tokens_delta", shape, DType.FLOAT32, True, source=_LAYER),)

    def merged(self, run: Forward, table: Embedding) -> Tensor:
        """Return a copy of the whole table with the trained rows in it.

        Shapes:
            numbers of the rows  [n]     8 bytes, saved
            rows, cast           [n, h]  width of the table, saved
            copy of the table    [V, h]  width of the table
            in backward:
            gradient of the copy [V, h]  width of the table
            gradient of the rows [n, h]  width of the table, then 4 bytes

        Source: peft, tuners/trainable_tokens/layer.py, TrainableTokensLayer.get_merged_weights.
        """
        tape, weight = run.tape, table.weights()[0]
        index = tape.new(
            "numbers of the trained rows", (dim("n", self.rows),), DType.INT64, _MERGED
        )
        param = run.param(table.name, self.weights(table)[0], 0)
        rows = _cast(run, param, weight.dtype)
        out = tape.new("table with the trained rows", weight.shape, weight.dtype, _MERGED)

        def rule(node: Node, grads: list[Tensor], saved: list[Any]) -> tuple[Tensor, ...]:
            return (node.new_grad(0),)

        tape.record("index_copy", (rows,), (index, rows), rule, out)
        return out


def _cast(run: Forward, param: Any, dtype: DType) -> Any:
    """Return the trained rows in the type of the table."""
    if param.dtype is dtype:
        return param
    out = run.tape.new("trained rows, cast", param.shape, dtype, _MERGED)

    def rule(node: Node, grads: list[Tensor], saved: list[Any]) -> tuple[Tensor, ...]:
        return (node.new_grad(0),)

    run.tape.record("cast of the rows", (param,), (), rule, out)
    return out


class TiedRows(Struct, frozen=True):
    """A head that shares its table with the embedding: it merges the same rows once more."""

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return nothing: the rows are the embedding's."""
        return ()

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Return the product with the merged table, which is kept for backward.

        Source: peft, tuners/trainable_tokens/layer.py, TrainableTokensLayer.forward_adapters.
        """
        table = run.spec.embeddings[0]
        assert isinstance(table, Embedding)
        assert table.rows_trained is not None
        return ops.linear(x, table.rows_trained.merged(run, table), None, linear.fan_out)


def with_token_rows(spec: ModelSpec, rows: int) -> ModelSpec:
    """Return the model with some rows of its embedding trained, those of a tied head with them.

    Raises:
        InvalidRequestError: more rows than the table has, or the table is trained in full.
        UnsupportedCombinationError: a tied head with an adapter of its own.

    Source: peft, utils/other.py, set_additional_trainable_modules;
    tuners/trainable_tokens/model.py, TrainableTokensModel.inject_adapter.
    """
    table = spec.embeddings[0]
    assert isinstance(table, Embedding)
    if rows > table.rows.value:
        raise InvalidRequestError(
            f"{rows} trained tokens are more than the {table.rows.value} of the vocabulary"
        )
    if table.trainable:
        raise InvalidRequestError(
            f"{table.name!r} is trained in full already; leave it out of modules_to_save, or leave "
            "out the trained tokens"
        )
    table = replace(table, rows_trained=TokenRows(rows))
    head = spec.head
    if spec.tied:
        if head.adapter is not None:
            raise UnsupportedCombinationError(
                "trained tokens beside an adapter on a tied head have no sourced answer here yet; "
                f"take {head.name!r} out of target_modules"
            )
        head = replace(head, adapter=TiedRows())
    original = Buffer("trainable_tokens_original", (dim("n", rows), table.width), DType.FLOAT32)
    return replace(
        spec,
        embeddings=(table, *spec.embeddings[1:]),
        head=head,
        buffers=(*spec.buffers, original),
    )
