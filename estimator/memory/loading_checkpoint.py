"""How transformers brings a checkpoint to the GPU, and packs it there with bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from estimator.dtypes import DType
from estimator.eager.size import elements
from estimator.memory.loading_parts import Serials, modules, table
from estimator.model.loading import Loading
from estimator.model.spec import Embedding, Linear, Module, Norm, Weight, held
from estimator.run import Run
from estimator.techniques.quantizations.four_bit import FourBit
from estimator.techniques.quantizations.int8 import EightBit


def packs(run: Run) -> bool:
    """Whether a linear layer is packed with bitsandbytes."""
    return any(isinstance(each, FourBit | EightBit) for each in run.spec.formats())


def is_plain(run: Run) -> bool:
    """Whether every layer keeps its weight as it is in the checkpoint."""
    return not run.spec.formats()


def straight(run: Run, log: Loading) -> None:
    """Load plain weights straight to the GPU, where a device map says so.

    Memory for all of them is asked for at once, as for packed ones.

    Source: hf-loading, caching_allocator_warmup; hf-loading-weights,
    convert_and_load_state_dict_in_model.
    """
    loader = _Loader(run, log)
    log.drop(log.scratch("memory asked for at once", loader.asked_at_once()))
    for found in sorted(loader.found, key=_by_name):
        loader.load(found)
    loader.finish()


def newer(run: Run, log: Loading) -> None:
    """Load with transformers 5: weights come to the device whole, and are packed there.

    Before the first of them, memory for all is asked for at once and given back to the allocator,
    which serves the weights from this one block. They come in the order of their names.

    Source: hf-loading, caching_allocator_warmup; hf-loading-weights,
    convert_and_load_state_dict_in_model; hf-library, integrations/bitsandbytes.py.
    """
    loader = _Loader(run, log)
    log.drop(log.scratch("memory asked for at once", loader.asked_at_once()))
    for found in sorted(loader.found, key=_by_name):
        if isinstance(found.packing, EightBit):
            # It comes in the type of the checkpoint, and goes to the host and back.
            whole = log.scratch("weight of the checkpoint", found.bytes)
            found.packing.quantize(log, found.linear)
        elif found.packing is not None:
            whole = log.scratch("weight of the checkpoint", found.bytes)
            turned = found.linear.transposed
            copy = log.scratch("weight, transposed", found.bytes) if turned else ()
            found.packing.quantize(log, found.linear)
            log.drop(copy)
        else:
            loader.load(found)
            continue
        log.drop(whole)
    loader.finish()


def older(run: Run, log: Loading) -> None:
    """Load with transformers 4: weights are packed one by one; after others the cache is emptied.

    Source: hf-4-46, quantizers/quantizer_bnb_4bit.py and quantizer_bnb_8bit.py,
    create_quantized_param; accelerate-1-1, utils/modeling.py, set_module_tensor_to_device.
    """
    loader = _Loader(run, log)
    for found in loader.found:
        if isinstance(found.packing, EightBit):
            found.packing.quantize(log, found.linear)
        elif found.packing is not None:
            whole = log.scratch("weight of the checkpoint", found.bytes)
            found.packing.quantize(log, found.linear)
            log.drop(whole)
        else:
            loader.load(found)
            log.empty_cache()
    loader.finish()


class _Found(NamedTuple):
    """A tensor of the checkpoint.

    Args:
        path: its name there.
        weight: what it is in the model.
        bytes: what it has in the checkpoint.
        packing: set where it is the weight of a packed layer.
    """

    path: str
    module: Module
    weight: Weight
    bytes: int
    packing: FourBit | EightBit | None = None

    @property
    def linear(self) -> Linear:
        """The packed layer."""
        assert isinstance(self.module, Linear)
        return self.module


def _by_name(found: _Found) -> list[tuple[int, int, str]]:
    """Sort numbers in a name as numbers, and before words.

    Source: hf-loading-weights, dot_natural_key.
    """
    parts = found.path.split(".")
    return [(0, int(each), "") if each.isdigit() else (1, 0, each) for each in parts]


class _Loader:
    """What both versions do with the tensors of a checkpoint."""

    def __init__(self, run: Run, log: Loading) -> None:
        self.run = run
        self.log = log
        self.stored = _stored(run)
        self.known: dict[int, tuple[_Found, ...]] = {}
        self.found = list(self._found())
        self.narrow: dict[str, Serials] = {}

    def asked_at_once(self) -> int:
        """Bytes of all tensors: packed ones count 4 or 8 bits a value, and no scales.

        Source: hf-loading, get_total_byte_count; hf-library, quantizers/quantizer_bnb_4bit.py,
        quantized_element_size.
        """
        total = 0
        for each in self.found:
            values = elements(each.weight.shape)[0]
            if each.packing is None:
                total += each.bytes
            elif isinstance(each.packing, FourBit):
                total += each.linear.weight().parameters // 2
            else:
                total += values
        return total

    def load(self, found: _Found) -> None:
        """Bring a tensor that is not packed to the device, as the checkpoint has it."""
        name = f"{found.module.name}.{found.weight.name}"
        serial = (self.log.new(name, found.bytes),)
        if found.bytes != found.weight.bytes:
            self.narrow[found.path] = serial

    def finish(self) -> None:
        """Add buffers, raise to fp32 what is prepared for training, add adapters, empty the cache.

        Source: peft, utils/other.py, prepare_model_for_kbit_training; hf-trainer,
        Trainer._inner_training_loop, which begins with `free_memory`.
        """
        log = self.log
        for buffer in self.run.spec.buffers:
            table(log, buffer)
        for found in self.found:
            if found.path in self.narrow:
                log.new(f"{found.module.name}.{found.weight.name}", found.weight.bytes)
                log.drop(self.narrow[found.path])
        if self.narrow:
            log.empty_cache()
        added: dict[int, tuple[tuple[str, int], ...]] = {}
        for module in modules(self.run):
            if id(module) not in added:
                added[id(module)] = tuple(_added(module))
            for name, size in added[id(module)]:
                log.new(name, size)
        log.empty_cache()

    def _found(self) -> Iterator[_Found]:
        spec = self.run.spec
        stem = spec.layers_path.rpartition(".")[0]
        for module in spec.embeddings:
            yield from self._of(module, f"{stem}.{module.name}")
        for number, index in enumerate(spec.pattern):
            for module in spec.kinds[index].modules:
                yield from self._of(module, f"{spec.layers_path}.{number}.{module.name}")
        for module in spec.final:
            yield from self._of(module, f"{stem}.{module.name}")
        if not spec.tied:
            yield from self._of(spec.head, spec.head.name)

    def _of(self, module: Module, path: str) -> Iterator[_Found]:
        # The layers of one kind are one and the same object here.
        known = self.known.get(id(module))
        if known is None:
            known = self.known[id(module)] = tuple(self._one(module))
        yield from (found._replace(path=f"{path}.{found.path}") for found in known)

    def _one(self, module: Module) -> Iterator[_Found]:
        """Yield the tensors of one module, by their names in it."""
        packing = module.format if isinstance(module, Linear) else None
        for each in held(module):
            if not _is_of_checkpoint(module, each):
                continue
            name = each.name
            if isinstance(packing, FourBit | EightBit) and each.name.startswith("weight"):
                if each.name == "weight":
                    assert isinstance(module, Linear)
                    assert self.stored is not None
                    size = module.weight().parameters * self.stored.width
                    yield _Found(name, module, each, size, packing)
                continue
            width = each.dtype.width
            if self.stored is not None:
                width = min(width, self.stored.width)
            yield _Found(name, module, each, elements(each.shape)[0] * width)


def _stored(run: Run) -> DType | None:
    """Return the type that packed weights had, of which the others were; 8-bit ones had fp16."""
    if is_plain(run):
        return None
    four = (each.stored for each in run.spec.formats() if isinstance(each, FourBit))
    return next(four, DType.FLOAT16)


def _added(module: Module) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of what PEFT has added to a module."""
    for each in held(module):
        if not _is_of_checkpoint(module, each):
            yield f"{module.name}.{each.name}", each.bytes


def _is_of_checkpoint(module: Module, weight: Weight) -> bool:
    """Whether a tensor was in the checkpoint, and not added by PEFT."""
    name = weight.name
    if module.keeps_original:
        return name.startswith("original_module.")
    if isinstance(module, Norm) and module.copied:
        return name.startswith("base_layer.")
    if isinstance(module, Linear) and module.format is not None and name.startswith("weight"):
        return True
    return isinstance(module, Linear | Norm | Embedding) and name in ("weight", "bias")
