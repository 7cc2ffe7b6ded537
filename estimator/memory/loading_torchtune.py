"""How torchtune makes a model: on the device, and packed there."""

from __future__ import annotations

from typing import Final

from estimator.memory.loading_parts import Serials, plain, size_of, table
from estimator.model.loading import Loading
from estimator.model.spec import Buffer, LayerKind, Linear, Module, held
from estimator.run import Run
from estimator.techniques.torchao_nf4 import Nf4Tensor

# In the order in which torchtune's builders make them, and in which a layer has them.
_MADE: Final = (
    "q_proj", "k_proj", "v_proj", "output_proj", "pos_embeddings", "w1", "w2", "w3", "sa_norm",
    "mlp_norm",
)  # fmt: skip
_HELD: Final = (
    "sa_norm", "q_proj", "k_proj", "v_proj", "output_proj", "pos_embeddings", "mlp_norm", "w1",
    "w2", "w3",
)  # fmt: skip


class _Torchtune:
    """torchtune's builders and `load_state_dict`, which run on the device.

    Source: torchtune-0-1, recipes/lora_finetune_single_device.py, _setup_model.
    """

    def __init__(self, run: Run, log: Loading) -> None:
        self.spec = run.spec
        self.log = log
        self.packed: list[tuple[Linear, Nf4Tensor, Serials]] = []

    def copied(self) -> None:
        """Make one layer and copy it for every layer of the model; the first is freed then.

        Source: torchtune-0-1, torchtune/modules/transformer.py, _get_clones.
        """
        tables = self._tables(len(self.spec.pattern))
        first = self._layer(self.spec.kinds[self.spec.pattern[0]], tables[0], copies=False)
        self.packed.clear()
        self._around()
        for index, own in zip(self.spec.pattern, tables, strict=True):
            self._layer(self.spec.kinds[index], own, copies=True)
        self.log.drop(first)
        self._load()

    def built(self) -> None:
        """Make every layer on its own; a full model has one table, made first.

        Source: torchtune, models/llama2/_component_builders.py, llama2 and lora_llama2.
        """
        spec, number = self.spec, len(self.spec.pattern)
        shared = len(spec.buffers) < 2 * number
        if shared:
            self._rotary(self._tables(1)[0])
        tables = [()] * number if shared else self._tables(number)
        for index, own in zip(spec.pattern, tables, strict=True):
            self._layer(spec.kinds[index], own, copies=False)
        self._around()
        self._load()

    def _tables(self, layers: int) -> list[tuple[Buffer, ...]]:
        buffers = self.spec.buffers
        share = len(buffers) // layers
        return [buffers[share * each : share * (each + 1)] for each in range(layers)]

    def _layer(self, kind: LayerKind, tables: tuple[Buffer, ...], *, copies: bool) -> Serials:
        modules = {each.name: each for each in kind.modules}
        made: list[Serials] = []
        for name in _HELD if copies else _MADE:
            if name in modules:
                made.append(self._module(modules[name], copies=copies))
            elif copies:
                made += [table(self.log, each) for each in tables]
            else:
                made.append(self._rotary(tables))
        return tuple(serial for serials in made for serial in serials)

    def _module(self, module: Module, *, copies: bool = False) -> Serials:
        packing = getattr(module, "format", None)
        if not isinstance(module, Linear) or not isinstance(packing, Nf4Tensor):
            return plain(self.log, module)
        if copies:
            parts = packing.copied(self.log, module)
        else:
            whole = self.log.scratch("weight to be packed", module.weight().bytes)
            parts = packing.quantize(self.log, module)
            self.log.drop(whole)
        self.packed.append((module, packing, parts))
        others = held(module)[len(packing.weights(module)) :]
        return (*parts, *(self.log.new(f"{module.name}.{x.name}", x.bytes) for x in others))

    def _rotary(self, tables: tuple[Buffer, ...]) -> Serials:
        """Make the tables of positions: an angle, its cosine and its sine are stacked.

        Source: torchtune, modules/position_embeddings.py, build_rope_cache.
        """
        made: list[Serials] = []
        for each in tables:
            angles = [self.log.scratch("rotary angles", size_of(each) // 2) for _ in range(3)]
            made.append(table(self.log, each))
            self.log.drop(*angles)
        return tuple(serial for serials in made for serial in serials)

    def _around(self) -> None:
        """Make what is not in the layers."""
        for module in self.spec.embeddings:
            self._module(module)
        for module in (*(() if self.spec.tied else (self.spec.head,)), *self.spec.final):
            self._module(module)

    def _load(self) -> None:
        """Copy the checkpoint in from the host; only packed weights need anything for that."""
        for module, packing, parts in self.packed:
            packing.filled(self.log, module, parts)


def layers_copied(run: Run, log: Loading) -> None:
    """Make one layer and copy it for all."""
    _Torchtune(run, log).copied()


def layers_built(run: Run, log: Loading) -> None:
    """Make every layer on its own."""
    _Torchtune(run, log).built()
