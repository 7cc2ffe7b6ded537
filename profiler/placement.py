"""Give a model that was built on the meta device its storage on a real or a fake device."""

from __future__ import annotations

from typing import Any

from profiler import quantized


def place(model: Any, device: str, *, fake: bool) -> None:
    """Replace every meta parameter and buffer by one on `device`; tied tensors stay tied.

    PEFT and transformers move modules with `.to()`, which fails on fake parameters, so all
    building is done on meta and this is the one place where storage is born. Values are of no
    interest to memory: matrices are drawn small, vectors are ones, biases and buffers are zeros.

    Args:
        model: built on the meta device.
        device: where the tensors live.
        fake: whether they are born inside a fake tensor mode, and have no values to fill in.
    """
    import torch

    placed: dict[int, Any] = {}

    def parameter(name: str, meta: Any) -> Any:
        data = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=device)
        if not fake:
            _fill(name, data)
        return torch.nn.Parameter(data, requires_grad=meta.requires_grad)

    # PEFT keeps the ids of virtual tokens on the host, outside any module; made anew, so that
    # inside a fake tensor mode they are fake.
    virtual = getattr(model, "prompt_tokens", {})
    virtual.update({name: torch.arange(ids.numel()) for name, ids in virtual.items()})

    def buffer(built: Any) -> Any:
        # Some adapters make their buffers of values on the host; a fake mode needs fake ones.
        if built.is_meta or fake:
            return torch.zeros(built.shape, dtype=built.dtype, device=device)
        return built.to(device)

    for module in model.modules():
        if type(module).__name__ == "FourierFTLinear" and fake:
            # Indices that PEFT keeps on the host and copies in each forward pass.
            module.indices = {key: buffer(built) for key, built in module.indices.items()}
        packing = quantized.packing(module)
        if packing is not None:
            packing.pack(module, device)
            if not fake:
                packing.fill(module)
        for name, meta in module._parameters.items():
            if meta is not None and meta.is_meta:
                if id(meta) not in placed:
                    placed[id(meta)] = parameter(name, meta)
                module._parameters[name] = placed[id(meta)]
        for name, meta in module._buffers.items():
            if meta is not None:
                if id(meta) not in placed:
                    placed[id(meta)] = buffer(meta)
                module._buffers[name] = placed[id(meta)]


def _fill(name: str, data: Any) -> None:
    if not data.is_floating_point() or data.element_size() == 1 or name.endswith("bias"):
        data.zero_()
    elif data.dim() > 1:
        data.normal_(std=0.02)
    else:
        data.fill_(1.0)
