"""Let transformers take fake tensors for what they stand for: an eager step, not a compilation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def eager_transformers() -> Iterator[None]:
    """Switch off the test by which transformers believes that a fake tensor is being compiled.

    Compiling, it may not look at the values of masks, so it builds a dense [b, 1, s, s] mask that
    the eager step does not have (transformers/utils/import_utils.py, `is_tracing`).
    """
    from transformers.utils import import_utils

    original = import_utils.is_fake_tensor
    import_utils.is_fake_tensor = lambda _: False
    try:
        yield
    finally:
        import_utils.is_fake_tensor = original
