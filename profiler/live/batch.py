"""The batches of a live run: how long they get, and whether they are padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from estimator.units import round_up
from profiler.live.findings import Findings
from profiler.live.method import base_model

# A list of samples is looked through up to here; a column of Arrow has no bound.
MOST_SAMPLES: Final = 100_000
# Tokenizers without a limit say a number far above any length.
_NO_LIMIT: Final = 10**6


class Batch(NamedTuple):
    """The largest batch that is to be expected."""

    seq_len: int
    padding: bool
    packing: bool


class _Lengths(NamedTuple):
    """The lengths of all samples: the shortest and the longest."""

    shortest: int
    longest: int


def batch(
    args: Any, model: Any, tokenizer: Any, dataloader: Any, given: int | None, findings: Findings
) -> Batch:
    """Return the largest batch that is to be expected.

    Args:
        args: the Trainer's arguments.
        tokenizer: the Trainer's processing class, if there is one.
        dataloader: of the training set, as the Trainer holds it.
        given: the length that the user names.
    """
    collator = _collator(dataloader)
    dataset = getattr(dataloader, "dataset", None)
    flattens = _flattens(args, collator)
    lengths = _lengths(dataset)
    longest = _longest(args, model, tokenizer, lengths, given, findings)
    multiple = getattr(collator, "pad_to_multiple_of", None)
    if not isinstance(multiple, int) or multiple < 1 or flattens or given is not None:
        multiple = 1
    rounded = round_up(longest, multiple)
    several = args.per_device_train_batch_size > 1
    uneven = lengths is None or lengths.shortest != lengths.longest
    if several and not flattens and lengths is None:
        findings.assumed.append(
            "samples of one batch are taken to differ in length, so that it is padded: their "
            "lengths are not known without reading them"
        )
    padding = not flattens and ((several and uneven) or rounded != longest)
    return Batch(rounded, padding, flattens)


def _longest(
    args: Any,
    model: Any,
    tokenizer: Any,
    lengths: _Lengths | None,
    given: int | None,
    findings: Findings,
) -> int:
    """Return the length of the longest sequence, from the best source that there is."""
    if given is not None:
        return given
    if lengths is not None:
        return lengths.longest
    limit = getattr(args, "max_length", None)
    if isinstance(limit, int) and limit > 0:
        findings.assumed.append(f"the longest sample is taken to fill max_length {limit}")
        return limit
    config = base_model(model).config
    limit = getattr(tokenizer, "model_max_length", None)
    source = "the tokenizer's model_max_length"
    if not isinstance(limit, int) or not 0 < limit < _NO_LIMIT:
        limit = getattr(config, "max_position_embeddings", None) or getattr(
            config, "n_positions", None
        )
        source = "the model's longest context"
    if not isinstance(limit, int):
        findings.unknown.append("a length that neither the data nor the model tells; give seq_len")
        return 1
    findings.assumed.append(
        f"seq_len {limit} is {source}, because the lengths of the samples are not known without "
        "reading them; give MemoryPreflight(seq_len=...) for a truer answer"
    )
    return limit


def _lengths(dataset: Any) -> _Lengths | None:
    """Return the shortest and the longest sample, where no sample has to be made for it."""
    if isinstance(dataset, (list, tuple)):
        return _of_samples(dataset)
    if type(dataset).__module__.startswith("datasets."):
        return _of_arrow(dataset)
    return None


def _of_samples(samples: Sequence[Any]) -> _Lengths | None:
    if not samples or len(samples) > MOST_SAMPLES:
        return None
    try:
        lengths = [len(each["input_ids"]) for each in samples]
    except (KeyError, TypeError, IndexError):
        return None
    return _Lengths(min(lengths), max(lengths))


def _of_arrow(dataset: Any) -> _Lengths | None:
    """Read the lengths of a column of lists, without reading the lists."""
    table = getattr(dataset, "data", None)
    custom = getattr(dataset, "format", {}).get("type") == "custom"
    if table is None or custom or "input_ids" not in table.column_names or not len(dataset):
        return None
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.column("input_ids")
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return None
    lengths = pc.list_value_length(column)
    indices = getattr(dataset, "_indices", None)
    if indices is not None:
        lengths = lengths.take(indices.column(0))
    found = pc.min_max(lengths).as_py()
    return _Lengths(int(found["min"]), int(found["max"]))


def _collator(dataloader: Any) -> Any:
    """Return the collator inside the Trainer's wrapper that removes columns."""
    collator = getattr(dataloader, "collate_fn", None)
    return getattr(collator, "data_collator", collator)


def _flattens(args: Any, collator: Any) -> bool:
    """Whether the batch is one row of sequences without padding."""
    name = type(collator).__name__
    return name == "DataCollatorWithFlattening" or bool(getattr(collator, "padding_free", False))
