"""Tensors in pinned host memory: what they cost there, and on the device when they come back."""

from __future__ import annotations

from estimator.eager.engine import Packed
from estimator.eager.size import BATCH, SEQ, Shape
from estimator.eager.tensor import Param, Tape, Tensor
from estimator.sources import Cite

_COPY_KERNEL = Cite("torch-copy", "copy_kernel_cuda, src_contig")
_COPY = Cite("torch-autograd-graph", "save_on_cpu, unpack_from_cpu")


class OnHost(Packed):
    """A saved tensor that was copied to the host; every time it is wanted it is copied back.

    Source: torch-autograd-graph, save_on_cpu.
    """

    def __init__(self, tape: Tape, tensor: Tensor | Param) -> None:
        self.tape = tape
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        if _is_strided(tensor.shape):
            # Freed at once: a copy between devices goes through a contiguous one.
            tape.new("contiguous copy for the host", self.shape, self.dtype, _COPY_KERNEL)
        tape.on_host(tensor.shape, tensor.dtype)

    def unpack(self) -> Tensor:
        return self.tape.new("copy from the host", self.shape, self.dtype, _COPY)


class SaveOnHost:
    """Takes the place of a checkpoint's frame: all that is saved goes to the host, weights too."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def pack(self, tensor: Tensor | Param) -> OnHost:
        """Return what a node keeps in place of a tensor."""
        return OnHost(self.tape, tensor)


def _is_strided(shape: Shape) -> bool:
    """Whether what torch saves is no contiguous tensor: heads behind tokens, a weight transposed.

    Here a query is written [b, s, H, d] as it lies in memory, where torch has a view [b, H, s, d];
    and the weight of a linear layer is saved as `W.T`.
    """
    if len(shape) == 4:
        return shape[1] is SEQ
    return len(shape) == 2 and BATCH not in shape and SEQ not in shape
