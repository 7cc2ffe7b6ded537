"""Let transformers take fake tensors for what they stand for: an eager step on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from profiler import flash_attention, flex_attention


@contextlib.contextmanager
def eager_transformers() -> Iterator[None]:
    """Answer transformers' questions about its surroundings as a training process on a GPU would.

    - It believes that a fake tensor is being compiled. Compiling, it may not look at the values of
      masks, so it builds a dense [b, 1, s, s] mask that the eager step does not have
      (transformers/utils/import_utils.py, `is_tracing`).
    - It refuses flash attention without the `flash-attn` package, which needs a GPU to build.
    - It compiles flex attention, whose kernels are Triton's.
    - Its advice about tokens and deprecated names is meant for whoever writes the training script.
    """
    from transformers import PreTrainedModel, masking_utils, modeling_flash_attention_utils
    from transformers.integrations import flex_attention as upstream
    from transformers.utils import import_utils, logging

    def accept(*_: Any, **__: Any) -> None:
        """Find nothing missing."""

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with (
            mock.patch.object(import_utils, "is_fake_tensor", _is_never),
            mock.patch.object(PreTrainedModel, "_flash_attn_import_error", staticmethod(accept)),
            mock.patch.object(masking_utils, "create_block_mask", flex_attention.block_mask),
            mock.patch.object(upstream, "compile_friendly_flex_attention", flex_attention.compiled),
            mock.patch.multiple(
                modeling_flash_attention_utils,
                _lazy_imports=flash_attention.functions,
                _loaded_implementation=None,
                _flash_fn=None,
                _flash_varlen_fn=None,
                _flash_with_kvcache_fn=None,
                _pad_fn=None,
                _unpad_fn=None,
                _process_flash_kwargs_fn=None,
                _process_with_kvcache_kwargs_fn=None,
            ),
        ):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _is_never(_: Any) -> bool:
    """Answer as for a tensor on a GPU; a plain function, which torch.compile can look into."""
    return False
