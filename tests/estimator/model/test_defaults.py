"""What is filled in for a missing field, against the configuration classes of transformers."""

from __future__ import annotations

import pytest

from estimator.model.defaults import DEFAULTS
from estimator.model.families import FAMILIES


@pytest.mark.parametrize("model_type", sorted(DEFAULTS))
def test_every_default_is_that_of_the_configuration_class(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    declared = CONFIG_MAPPING[model_type]
    theirs = {name: getattr(declared, name) for name in DEFAULTS[model_type]}
    assert theirs == DEFAULTS[model_type]


def test_no_family_is_without_a_row() -> None:
    assert set(DEFAULTS) == set(FAMILIES)
