"""Dry runs of torchtune's own modules: `python -m benchmarks.torchtune FOLDER VERSION [OLD]`.

FOLDER holds the package `torchtune` of one version: an unpacked wheel or a checkout. Nothing of it
is installed, because its dependencies do not go with ours; only its modules and builders are
imported, and torchao's NF4 tensors under their old name. OLD holds `bitsandbytes` 0.43 and
`low_bit_optim` of torchao in September 2024, whose states versions before 0.6 have, and for 0.1
also torchao's `nf4tensor.py` of April 2024; for 0.6 the installed libraries are right. The
requests of `data/measurements/torchtune.json` are run with the recipe's loop under the profiler's
meter, and what they take is written back there. So is what making each model takes, and loading a
checkpoint.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from estimator.pipeline import device_of
from estimator.request import EstimateRequest, parse_request
from profiler import optimizers, quantized, trace
from profiler.cuda_semantics import cuda_semantics
from profiler.instrument import Meter
from profiler.placement import place
from profiler.workspaces import Workspaces

RECORDS: Final = Path(__file__).parents[1] / "data" / "measurements" / "torchtune.json"
CAPABILITY: Final = (8, 0)
MULTIPROCESSORS: Final = 108
CHUNKS: Final = 8
# Packages whose own `__init__` asks for tokenizers and data sets.
_HOLLOW: Final = ("utils", "models", "models.llama2", "models.mistral", "training", "data")
LowBitClasses = dict[str, Callable[[Any], Any]]
_BUILDERS: Final = "torchtune.models.llama2._component_builders"
_NF4: Final = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"


def main(folder: str, release: str, old: str | None = None) -> None:
    """Run every request of one version and write down what it takes."""
    _import_modules(Path(folder) / "torchtune", Path(old) / "nf4tensor.py" if old else None)
    low_bit = _low_bit_classes(Path(old) if old else None)
    document = json.loads(RECORDS.read_text(encoding="utf-8"))
    document["versions"] |= {name: version(name) for name in ("torch", "torchao")}
    for record in document["runs"]:
        request = parse_request(record["request"])
        if request.software.version != release:
            continue
        model, reading = dry_run(request, low_bit)
        parameters = list(model.parameters())
        record["total_parameters"] = sum(each.numel() for each in parameters)
        record["trainable_parameters"] = sum(
            each.numel() for each in parameters if each.requires_grad
        )
        record["peak"] = reading.peak.phase
        record["requested_bytes"] = reading.peak.requested_bytes
        record["phases"] = {each.phase: each.requested_bytes for each in reading.points}
        record["loading"] = load(request)
        print(f"{release} {record['name']}: {reading.peak.phase} {reading.peak.requested_bytes}")
    RECORDS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def dry_run(request: EstimateRequest, low_bit: LowBitClasses) -> tuple[Any, trace.Reading]:
    """Run two steps of a request on fake tensors; return the model and what the second read."""
    early = request.software.version == "0.1"
    model = _built(request)
    if not early:
        model.set_num_output_chunks(CHUNKS)
    if request.activation_checkpointing == "full":
        _checkpoint_layers(model)
    model.train()
    gc.collect()
    gc.disable()
    try:
        with warnings.catch_warnings(), FakeTensorMode(), cuda_semantics(CAPABILITY):
            warnings.simplefilter("ignore")
            return model, _measured(request, model, early, low_bit)
    finally:
        gc.enable()


class Storages(TorchDispatchMode):  # type: ignore[misc]  # torch is not typed here
    """Bytes of all storages on the CPU, which stands for the device here, now and at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.highest = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator; what packed weights do inside is seen operator by operator."""
        if any(kind.__name__ == "NF4Tensor" for kind in kinds):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.device.type == "cpu":
                self._see(each.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        self.total += storage.nbytes()
        self.highest = max(self.highest, self.total)

        def died() -> None:
            self.total -= self._seen.pop(key)

        weakref.finalize(storage, died)


def load(request: EstimateRequest) -> dict[str, int]:
    """Make the model of a request and load a checkpoint, which is on another device.

    Returns what is there at most, and what is there in the end.
    """
    storages = Storages()
    gc.collect()
    gc.disable()
    try:
        with warnings.catch_warnings(), FakeTensorMode(), _whole_copies(), storages:
            warnings.simplefilter("ignore")
            model = _built(request, "cpu")
            checkpoint = {
                name: torch.empty(each.shape, dtype=each.dtype, device="cuda")
                for name, each in model.named_parameters()
                if "lora_" not in name
            }
            model.load_state_dict(checkpoint, strict=False)
            return {"highest_bytes": storages.highest, "left_bytes": storages.total}
    finally:
        gc.enable()


@contextmanager
def _whole_copies() -> Iterator[None]:
    """Let a deep copy of a fake tensor copy its whole storage, as that of a real one does."""

    def copied(self: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        size = self.untyped_storage().nbytes() // self.element_size()
        whole = torch.empty(size, dtype=self.dtype, device=self.device)
        copy = whole.as_strided(self.shape, self.stride(), self.storage_offset())
        memo[id(self)] = copy
        return copy

    FakeTensor.__deepcopy__ = copied
    try:
        yield
    finally:
        del FakeTensor.__deepcopy__


def _import_modules(folder: Path, packing: Path | None) -> None:
    """Make `torchtune.modules` and the builders importable, and nothing else."""
    for name in ("torchtune", *(f"torchtune.{each}" for each in _HOLLOW)):
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    tokenizer = types.ModuleType("sentencepiece")
    tokenizer.__dict__["SentencePieceProcessor"] = object
    sys.modules["sentencepiece"] = tokenizer
    sys.modules["torchao.dtypes.nf4tensor"] = _nf4(packing)
    importlib.import_module(_BUILDERS)
    del sys.modules["sentencepiece"]


def _nf4(packing: Path | None) -> types.ModuleType:
    """Return the module with NF4 tensors: torchao's installed one, or a file of another version."""
    if packing is None or not packing.is_file():
        return importlib.import_module(_NF4)
    spec = importlib.util.spec_from_file_location("torchao.dtypes.nf4tensor", packing)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["torchao.dtypes.nf4tensor"] = module
    spec.loader.exec_module(module)
    return module


def _built(request: EstimateRequest, device: str = "meta") -> Any:
    """Return the model as the recipe's configuration builds it."""
    builders = importlib.import_module(_BUILDERS)
    config = request.to_dict()["model"]["config"]
    given: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": config["hidden_size"],
        "max_seq_len": config["max_position_embeddings"],
        "intermediate_dim": config["intermediate_size"],
    }
    build: Callable[..., Any] = builders.llama2
    method: Any = request.method
    if method.name == "lora":
        build = builders.lora_llama2
        targets = method.target_modules
        given |= {
            "lora_attn_modules": [name for name in targets if name.endswith("_proj")],
            "apply_lora_to_mlp": "w1" in targets,
            "apply_lora_to_output": "output" in targets,
            "lora_rank": method.r,
            "lora_alpha": method.lora_alpha,
            "lora_dropout": method.lora_dropout,
            "quantize_base": request.quantization is not None,
        }
    stored = torch.float32 if request.precision == "fp32" else torch.bfloat16
    torch.set_default_dtype(stored)
    try:
        with torch.device(device):
            model = build(**given)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method.name == "full" or "lora_" in name)
    return model


def _checkpoint_layers(model: Any) -> None:
    """Follow set_activation_checkpointing of torchtune."""
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(model.layers[0])})
    checkpoint_wrapper.apply_activation_checkpointing(model, auto_wrap_policy=policy)


def _place(model: Any) -> None:
    """Give the model fake storage; NF4 tensors part by part, and once more behind `place`."""
    _place_packed(model)
    place(model, "cpu", fake=True)
    _place_packed(model)


def _place_packed(model: Any) -> None:
    """Give NF4 tensors parts whose storages are as large as those of a packed weight.

    On the meta device, and in `place`, a part that is a view has lost what lies behind it.
    """
    nf4 = sys.modules["torchao.dtypes.nf4tensor"]
    for module in model.modules():
        for name, meta in module._parameters.items():
            if not isinstance(meta, nf4.NF4Tensor):
                continue
            names, context = meta.__tensor_flatten__()
            with unset_fake_temporarily():
                fresh = nf4.to_nf4(torch.empty(meta.shape, dtype=meta.dtype, device="meta"))
            parts = {each: _like(getattr(fresh, each)) for each in names}
            about = nf4.SubclassTensorArgs(
                meta.shape, meta.stride(), 0, meta.dtype, torch.device("cpu"), False
            )
            packed = nf4.NF4Tensor.__tensor_unflatten__(
                parts, {**context, "tensor_meta": about}, None, None
            )
            module._parameters[name] = torch.nn.Parameter(packed, requires_grad=False)


def _like(meta: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape on a storage of the same size."""
    size = meta.untyped_storage().nbytes() // meta.element_size()
    whole = torch.empty(size, dtype=meta.dtype)
    return whole.as_strided(meta.shape, meta.stride(), meta.storage_offset())


def _low_bit_classes(old: Path | None) -> LowBitClasses:
    """Return the low-bit optimizers, those of a folder where one is given.

    Their own `__init__` asks for a card or for names that the installed libraries lack.
    """
    if old is None:
        torchao, bitsandbytes = "torchao.optim.adam", "bitsandbytes.optim"
        return _classes(torchao, bitsandbytes)
    with _instead("bitsandbytes", old), _instead("low_bit_optim", old):
        return _classes("low_bit_optim.adam", "bitsandbytes.optim")


def _classes(torchao: str, bitsandbytes: str) -> LowBitClasses:
    adam, optim = importlib.import_module(torchao), importlib.import_module(bitsandbytes)
    return {
        "adamw_8bit": lambda groups: optim.AdamW(groups, optim_bits=8),
        "adamw_torch_8bit": adam.AdamW8bit,
        "adamw_torch_4bit": adam.AdamW4bit,
    }


@contextmanager
def _instead(name: str, folder: Path) -> Iterator[None]:
    """Let a package be that of a folder for a moment, without its own `__init__`."""

    def taken_out() -> dict[str, Any]:
        mine = [each for each in sys.modules if each.partition(".")[0] == name]
        return {each: sys.modules.pop(each) for each in mine}

    installed = taken_out()
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(folder / name)]
    try:
        yield
    finally:
        taken_out()
        sys.modules.update(installed)


def _optimizer(model: Any, request: EstimateRequest, low_bit: LowBitClasses) -> Any:
    """Return the optimizer as the recipes make it: nothing but the parameters is said.

    The steps of low-bit ones are kernels in place, compiled by torchao and foreign to fake tensors
    in bitsandbytes.
    """
    name = request.optimizer.name
    if name not in low_bit:
        return optimizers.build(model, request)
    with unset_fake_temporarily():
        # The code books are computed from data, by bitsandbytes when the optimizer is built.
        optimizer = low_bit[name](list(model.parameters()))
        optimizer.__dict__.setdefault("name2qmap", {})
        books = {key: table.numel() for key, table in optimizer.name2qmap.items()}
    if books:
        optimizer.name2qmap = {key: torch.ones(size) for key, size in books.items()}
        optimizer.update_step = lambda *_: None
    return optimizer


def _measured(
    request: EstimateRequest, model: Any, early: bool, low_bit: LowBitClasses
) -> trace.Reading:
    _place(model)
    optimizer = _optimizer(model, request, low_bit)
    workspace = device_of(None, request).constants.cublas_workspace
    meter = Meter(layers="layers", workspaces=Workspaces(CAPABILITY, MULTIPROCESSORS, workspace))
    optimizers.announce(optimizer, meter)
    sites = {"tok_embeddings": "embeddings", "norm": "final_norm", "output": "head"}
    with meter.watching(model, sites), meter:
        for path, parameter in model.named_parameters():
            for name, tensor in quantized.parts(parameter).items():
                meter.adopt(tensor, f"{path}{name}", "parameter", "weights")
        for path, buffer in model.named_buffers():
            meter.adopt(buffer, path, "buffer", "buffers")
        _step(request, model, optimizer, meter, early)
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if not isinstance(value, torch.Tensor):
                    continue
                if optimizers.is_on_host(optimizer, parameter, name) or optimizers.is_managed(
                    optimizer, parameter, name
                ):
                    meter.drop(value)
                else:
                    for part in quantized.parts(value).values():
                        meter.own(part, parameter, "optimizer_states")
        meter.begin_steady_step()
        _step(request, model, optimizer, meter, early)
    return trace.read(meter.recorded())


def _step(request: EstimateRequest, model: Any, optimizer: Any, meter: Meter, early: bool) -> None:
    """Follow `train` of the single-device recipes; from the second micro-batch on all are alike."""
    shape = (request.micro_batch_size, request.seq_len)
    for _ in range(min(request.gradient_accumulation_steps, 2)):
        meter.phase(trace.BATCH)
        tokens = torch.ones(shape, dtype=torch.int64)
        labels = torch.ones(shape, dtype=torch.int64)
        meter.phase(trace.FORWARD)
        logits = model(tokens)
        meter.phase(trace.LOSS_FORWARD)
        if early:
            logits = logits[..., :-1, :].contiguous()
            labels = labels[..., 1:].contiguous()
            logits = logits.transpose(1, 2)
            loss = torch.nn.CrossEntropyLoss()(logits, labels)
        else:
            ignored = torch.full((shape[0], 1), -100)
            labels = torch.hstack((labels[..., 1:], ignored))
            losses = importlib.import_module("torchtune.modules.loss")
            loss = losses.CEWithChunkedOutputLoss(CHUNKS)(logits, labels)
            del logits
        meter.phase(trace.BACKWARD)
        torch.autograd.backward(loss)
        if early:
            del logits
    meter.phase(trace.OPTIMIZER_STEP)
    with (
        patch.object(torch, "compile", lambda *_, **__: lambda *_: None),
        patch.object(torch.cuda, "synchronize", lambda *_: None),
    ):
        optimizer.step()
    meter.phase(trace.OPTIMIZER_STEP)
    optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
