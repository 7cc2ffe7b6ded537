"""Values of the few fake tensors whose contents decide what a model does.

Fake tensors have no values, yet model code asks for some: is every token attended to, how long is
the longest row. The batch is known, so every small integer tensor that is computed from it is
known too: its real twin is computed beside the fake one.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils.weak import WeakIdKeyDictionary

# A batch of token ids is below this; a large s x s mask is above it, and is never asked for.
_MAX_ELEMENTS: Final = 2**23
_READ: Final = torch.ops.aten._local_scalar_dense.default
# The shape of their result is the number of values that pass a test.
_COUNTING: Final = (torch.ops.aten.nonzero.default,)
# fp32 because PEFT puts ones of that type before the padding mask.
# The same, picked by a mask: `tensor[mask]`.
_INDEX: Final = torch.ops.aten.index.Tensor
_MASKED_SELECT: Final = torch.ops.aten.masked_select.default
# PEFT asks whether VB-LoRA's logits are infinite: those of a new adapter are not.
_IS_INFINITE: Final = torch.ops.aten.isinf.default
# torch.distributions asks whether all logits are numbers: they are.
_IS_ALL_TRUE: Final = torch.ops.aten._is_all_true.default
_EXACT: Final = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32)


class KnownValues:
    """Real twins of small integer tensors."""

    def __init__(self) -> None:
        self._twins: Any = WeakIdKeyDictionary()

    def scalar(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Return the value that `.item()` asks for, or None if this is no such question."""
        if func is not _READ:
            return None
        twin = self._twins.get(args[0])
        if twin is None:
            return None
        with unset_fake_temporarily():
            return twin.item()

    @staticmethod
    def constant(tensor: Any) -> Any:
        """Return the value of a fake tensor that was made from a number, or None."""
        value = getattr(tensor, "constant", None)
        if value is None:
            return None
        with unset_fake_temporarily():
            return value.item()

    def counted(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Return the fake result of an operator whose result has as many rows as values pass.

        None if it is no such operator, or if the values are not known.
        """
        if func in (_INDEX, _MASKED_SELECT):
            return self._picked(func, args)
        if func not in _COUNTING or not all(map(self._is_known, args)):
            return None
        with unset_fake_temporarily():
            twin = func(*map(self._twin, args))
        out = torch.empty(twin.shape, dtype=twin.dtype)
        self._twins[out] = twin
        return out

    def _picked(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Return the fake result of picking what a known mask passes."""
        tensor, chosen = args[0], args[1]
        masks = [chosen] if func is _MASKED_SELECT else chosen
        if len(masks) != 1 or masks[0] is None or masks[0].dtype != torch.bool:
            return None
        twin = self._twin(masks[0])
        if twin is masks[0]:
            return None
        with unset_fake_temporarily():
            passed = int(twin.sum())
        return tensor.new_empty((passed, *tensor.shape[twin.dim() :]))

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Compute the real twin of an operator's result where all of its inputs have one."""
        if not isinstance(out, FakeTensor) or out.dtype not in _EXACT:
            return
        if func is _IS_INFINITE:
            with unset_fake_temporarily():
                self._twins[out] = torch.zeros(out.shape, dtype=torch.bool)
            return
        if func is _IS_ALL_TRUE:
            with unset_fake_temporarily():
                self._twins[out] = torch.ones((), dtype=torch.bool)
            return
        values = [*args, *kwargs.values()]
        known = out.numel() <= _MAX_ELEMENTS and all(map(self._is_known, values))
        if not known:
            # An operator in place overwrites what was known.
            self._twins.pop(out, None)
            return
        with unset_fake_temporarily():
            self._twins[out] = func(
                *map(self._twin, args), **{key: self._twin(value) for key, value in kwargs.items()}
            )

    def _is_known(self, value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(self._is_known, value))
        return not isinstance(value, torch.Tensor) or self._twin(value) is not value

    def _twin(self, value: Any) -> Any:
        """Return the real twin of a fake tensor, and anything else as it is."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._twin, value))
        if not isinstance(value, FakeTensor):
            return value
        twin = self._twins.get(value)
        if twin is None:
            # A constant in the model's code, such as a padding value, carries its own.
            twin = value.constant
        return value if twin is None else twin
