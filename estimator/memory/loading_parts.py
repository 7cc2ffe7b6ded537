"""What every way of loading does with a module and a buffer."""

from __future__ import annotations

from collections.abc import Iterator

from estimator.eager.size import elements
from estimator.model.loading import Loading
from estimator.model.spec import Buffer, Module, held
from estimator.run import Run

Serials = tuple[int, ...]


def modules(run: Run) -> Iterator[Module]:
    """Yield every module as often as it is there, in the model's order."""
    spec = run.spec
    yield from spec.embeddings
    for index in spec.pattern:
        yield from spec.kinds[index].modules
    yield from spec.final
    if not spec.tied:
        yield spec.head


def plain(log: Loading, module: Module) -> Serials:
    """Allocate the tensors of a module."""
    return tuple(log.new(name, size) for name, size in named(module))


def named(module: Module) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of the tensors of a module."""
    yield from ((f"{module.name}.{each.name}", each.bytes) for each in held(module))


def size_of(buffer: Buffer) -> int:
    """Bytes of a buffer."""
    return elements(buffer.shape)[0] * buffer.dtype.width


def table(log: Loading, buffer: Buffer) -> Serials:
    """Allocate a buffer."""
    return (log.new(buffer.name, size_of(buffer), "buffers"),)
