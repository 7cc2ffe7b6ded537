"""The stack of decoder layers of a model: where it is, after how many layers it repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Final

from estimator.result import Parameters
from profiler.unroll import Shortening

# Layers after which the stack is looked at again for a repetition; no model mixes more kinds.
_MAX_PERIOD: Final = 16
# A layer that a model counts for itself is not a difference between layers.
_COUNTERS: Final = ("layer_idx", "layer_id", "layer_number", "layer_index", "idx")


def layers_path(model: Any) -> str | None:
    """Return the dotted path of the module list that holds the decoder layers, if there is one."""
    import torch

    count = num_layers(model.config)
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    return min(lists, key=len, default=None) if count else None


def num_layers(config: Any) -> int:
    """Return the number of decoder layers that a transformers configuration asks for."""
    return int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0)


def kinds(model: Any) -> tuple[Hashable, ...]:
    """Return for each decoder layer something that is equal for layers that do the same work.

    Two layers are of one kind when their modules have the same classes, parameters and settings,
    and the configuration says the same of both.
    """
    path = layers_path(model)
    if path is None:
        return ()
    layers = model.get_submodule(path)
    config = model.config.get_text_config()
    listed = [
        value
        for value in vars(config).values()
        if isinstance(value, (list, tuple)) and len(value) == len(layers)
    ]
    return tuple(
        (_kind(layer), tuple(str(values[index]) for values in listed))
        for index, layer in enumerate(layers)
    )


def same_layers(whole: Sequence[Hashable], short: Any, how: Shortening) -> bool:
    """Whether a shortened model has just those layers that it should have kept."""
    return kinds(short) == tuple(how.selected(whole))


def parameters(
    model: Any, how: Shortening | None, updated: Iterable[tuple[str, Any]]
) -> Parameters:
    """Count the parameters of the whole model from a model with a shortened stack.

    Tied tensors count once, and a packed 4-bit weight counts the elements that it stands for.

    Args:
        updated: what the optimizer is given: names and parameters.
    """
    path = layers_path(model)
    given = {name for name, _ in updated}
    total = trainable = 0
    for name, tensor in model.named_parameters():
        count = tensor.numel() * (how.weight(name, path) if how else 1)
        total += count
        trainable += count if name in given else 0
    return Parameters(total=total, trainable=trainable, active=total)


def trained(model: Any, how: Shortening | None) -> Counter[Any]:
    """Count the tensors of the whole model that get gradients, by type."""
    path = layers_path(model)
    found: Counter[Any] = Counter()
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            found[tensor.dtype] += how.weight(name, path) if how else 1
    return found


def _kind(layer: Any) -> Hashable:
    parts = []
    for path, module in layer.named_modules():
        settings = tuple(
            (name, value)
            for name, value in sorted(vars(module).items())
            if isinstance(value, (int, float, str, type(None))) and name not in _COUNTERS
        )
        parameters = tuple(
            (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
            for name, tensor in module.named_parameters(recurse=False)
        )
        parts.append((path, type(module), settings, parameters))
    return tuple(parts)


def shortening(layer_kinds: Sequence[Hashable]) -> Shortening:
    """Return how the stack may be shortened; one without repetition is left whole.

    Example:
        >>> shortening("sssssf" * 10 + "ss")
        Shortening(num_layers=62, period=6, head=7, num_traced=20)
    """
    total = len(layer_kinds)
    best = Shortening(num_layers=total, period=1, head=total, num_traced=total)
    for period in range(1, min(_MAX_PERIOD, total) + 1):
        first = total - period
        while first > 0 and layer_kinds[first - 1] == layer_kinds[first - 1 + period]:
            first -= 1
        # The first layer of each kind is irregular: its backward is the last to use what layers of
        # that kind share, such as rotary tables, and frees it.
        seen = 1 + max(layer_kinds.index(kind) for kind in layer_kinds[first:])
        candidate = Shortening.of(total, period=period, irregular=max(seen, first))
        if candidate.num_traced < best.num_traced:
            best = candidate
    return best


def shortened(config: Any, how: Shortening) -> Any:
    """Return the configuration with fewer layers; lists with one entry a layer are cut alike."""
    cut = type(config).from_dict(config.to_dict())
    text = cut.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, (list, tuple)) and len(value) == how.num_layers:
            setattr(text, name, type(value)(how.selected(value)))
    text.num_hidden_layers = how.num_traced
    return cut
