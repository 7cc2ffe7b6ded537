"""Reading a `config.json`: every field typed and bounded, every guess remembered as a note."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from estimator.eager import attention
from estimator.eager.attention import Heads
from estimator.errors import InvalidConfigError
from estimator.model.defaults import DEFAULTS

# No published model comes near these; beyond them a field is a mistake, not a model.
LARGEST: Final = 2**24
MOST_LAYERS: Final = 2048


class Config:
    """A model's configuration, read by name; what was assumed is kept in `notes`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.model_type = str(values.get("model_type", ""))
        self._given = values
        self._defaults = DEFAULTS.get(self.model_type, {})
        self._filled: dict[str, Any] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """One note for every field that was taken from transformers' defaults."""
        return tuple(
            f"{name} is not in the model configuration; transformers' default {value!r} is used"
            for name, value in self._filled.items()
        )

    def _value(self, name: str) -> Any:
        if name not in self._given and name in self._defaults:
            self._filled[name] = self._defaults[name]
            return self._defaults[name]
        return self._given.get(name)

    def has(self, name: str) -> bool:
        """Whether a field is given, or filled in, and not null."""
        return self._value(name) is not None

    def count(self, name: str, default: int | None = None) -> int:
        """Return a positive whole number.

        Raises:
            InvalidConfigError: the field is missing without a default, or is no such number.
        """
        value = self._value(name)
        if value is None:
            if default is None:
                raise InvalidConfigError(
                    f"the model configuration has no {name!r}, which a {self.model_type} model "
                    "needs; pass the complete config.json"
                )
            return default
        most = MOST_LAYERS if name in ("num_hidden_layers", "n_layer", "num_layers") else LARGEST
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise InvalidConfigError(
                f"{name} of the model configuration must be a whole number from 1 to {most}, "
                f"not {_shown(value)}"
            )
        return value

    def optional_count(self, name: str) -> int | None:
        """Return a positive whole number, or None where the field is missing or null."""
        return self.count(name) if self.has(name) else None

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean field; missing or null means the default."""
        value = self._value(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InvalidConfigError(f"{name} must be true or false, not {_shown(value)}")
        return value

    def text(self, name: str, default: str) -> str:
        """Return a text field; missing or null means the default."""
        value = self._value(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise InvalidConfigError(f"{name} must be text, not {_shown(value)}")
        return value

    def fraction(self, name: str, default: float) -> float:
        """Return a number from 0 up to, not including, 1."""
        value = self._value(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise InvalidConfigError(f"{name} must be at least 0 and below 1, not {_shown(value)}")
        return float(value)

    def number(self, name: str, default: float | None) -> float | None:
        """Return a number; missing or null means the default."""
        value = self._value(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidConfigError(f"{name} must be a number, not {_shown(value)}")
        return float(value)

    def rotary_fraction(self, name: str, default: float) -> float:
        """Return the share of each head that rotary positions turn, above 0 and at most 1.

        Args:
            name: the field of configurations that have it outside of `rope_parameters`.
        """
        nested = self._given.get("rope_parameters") or self._given.get("rope_scaling")
        value = nested.get("partial_rotary_factor") if isinstance(nested, Mapping) else None
        if value is None:
            if not self.has(name):
                self._filled[name] = default
            value = self.number(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise InvalidConfigError(f"{name} must be above 0 and at most 1, not {_shown(value)}")
        return float(value)

    def layer_types(self, layers: int) -> tuple[str, ...] | None:
        """Return `layer_types`, one name for each layer, or None where it is not given."""
        value = self._value("layer_types")
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or len(value) != layers
            or not all(isinstance(each, str) for each in value)
        ):
            raise InvalidConfigError(f"layer_types must be a list of {layers} names")
        return tuple(value)

    def heads(self) -> Heads:
        """Return the attention heads: query heads, key and value heads, and their width.

        Raises:
            InvalidConfigError: the heads do not divide as attention needs.
        """
        query = self.count("num_attention_heads")
        key_value = self.optional_count("num_key_value_heads") or query
        hidden = self.count("hidden_size")
        width = self.optional_count("head_dim")
        if width is None:
            if hidden % query:
                raise InvalidConfigError(
                    f"hidden_size {hidden} is no multiple of num_attention_heads {query}"
                )
            width = hidden // query
        if query % key_value:
            raise InvalidConfigError(
                f"num_attention_heads {query} is no multiple of num_key_value_heads {key_value}"
            )
        return attention.heads(query, key_value, width)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
