"""The optimizer of a request: one row for each name, built as the Trainer builds it."""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from estimator.errors import (
    InvalidRequestError,
    MissingDependencyError,
    UnsupportedCombinationError,
)
from estimator.optimizer import Optimizer
from estimator.request import EstimateRequest
from estimator.techniques.optimizers.bitsandbytes import BITSANDBYTES
from profiler import (
    cpu_offload,
    low_rank,
    lowmem,
    methods,
    real_optimizers,
    small_libraries,
    together,
)
from profiler.badam import Blocks
from profiler.optimizer_library import LEARNING_RATE, library, refuse_implementation
from profiler.unroll import Shortening

if TYPE_CHECKING:
    from profiler.instrument import Meter

# bitsandbytes/optim/optimizer.py, get_state_buffer: smaller states are never paged.
_SMALLEST_PAGED: Final = 100_000
# The same file, Optimizer8bit.__init__, min_8bit_size.
_SMALLEST_8BIT: Final = 4096
_IMPLEMENTATIONS: Final = ("foreach", "fused", "single")


def build(model: Any, request: EstimateRequest, *, fake: bool = True) -> Any:
    """Return the optimizer over the parameters that it is given, in the Trainer's two groups.

    Args:
        model: with its storage.
        request: what was asked.
        fake: whether the parameters are fake tensors; some libraries need a hand with these.

    Raises:
        InvalidRequestError: the optimizer, or the implementation of it, is not known.
        MissingDependencyError: bitsandbytes is needed and not installed.
        UnsupportedCombinationError: the optimizer takes every weight that requires a gradient,
            and shall not have all of them.
    """
    asked = request.optimizer
    if asked.name not in _BUILDERS:
        known = ", ".join(sorted(_BUILDERS))
        raise InvalidRequestError(f"unknown optimizer {asked.name!r}; known: {known}")
    build_one = _BUILDERS[asked.name]
    if not fake:
        build_one = real_optimizers.BUILDERS.get(asked.name, build_one)
    ratio = getattr(request.method, "loraplus_lr_ratio", None)
    groups = (
        parameter_groups(model, methods.updated(model, request))
        if ratio is None
        else _loraplus_groups(model, ratio)
    )
    if request.method.leaves_gradients and asked.name in ("lomo", "adalomo"):
        raise UnsupportedCombinationError(
            f"optimizer {asked.name!r} updates every weight that requires a gradient; leave out "
            "method.freeze_others=false"
        )
    if asked.name in ("lomo", "adalomo"):
        return _lomo(model, groups, asked, fake=fake)
    if request.method.name == "badam":
        badam = library("badam.block_optim", "badam", asked)
        return Blocks(badam, model, build_one(model, groups, asked))
    if asked.in_backward:
        return InBackward(groups, lambda alone: build_one(model, alone, asked))
    if request.precision == "master_bf16":
        return MasterCopies(groups, lambda masters: build_one(model, masters, asked))
    if request.precision == "megatron_bf16":
        return MainGradients(groups, lambda masters: build_one(model, masters, asked))
    return build_one(model, groups, asked)


def parameter_groups(model: Any, updated: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Return the parameters with and without weight decay, as `Trainer.create_optimizer` does.

    Args:
        model: as it is trained.
        updated: what the optimizer is given: names and parameters.
    """
    import torch
    from transformers.trainer_pt_utils import get_parameter_names

    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], patterns))
    return [
        {"params": [p for name, p in updated if name in decayed], "weight_decay": 0.0},
        {"params": [p for name, p in updated if name not in decayed], "weight_decay": 0.0},
    ]


def _loraplus_groups(model: Any, ratio: float) -> list[dict[str, Any]]:
    """Return the groups that PEFT's LoRA+ makes: A, embeddings, B, and what is not decayed."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    optimizer = create_loraplus_optimizer(
        model, torch.optim.SGD, lr=LEARNING_RATE, loraplus_lr_ratio=ratio
    )
    return [
        {"params": group["params"], "lr": group["lr"], "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
    ]


class MasterCopies:
    """fp32 copies of 16-bit parameters, in the order of events of Megatron-LM.

    The gradients are copied to fp32 one by one and dropped, the optimizer steps on the copies, and
    the result is copied back.

    Source: megatron/core/optimizer/optimizer.py, Float16OptimizerWithFloat16Params.
    """

    def __init__(
        self, groups: list[dict[str, Any]], build_inner: Callable[[list[dict[str, Any]]], Any]
    ) -> None:
        import torch

        self.masters: list[tuple[Any, Any]] = []
        copied = []
        for group in groups:
            mains = []
            for parameter in group["params"]:
                main = parameter
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    main = torch.nn.Parameter(parameter.detach().float())
                    self.masters.append((parameter, main))
                mains.append(main)
            copied.append({**group, "params": mains})
        self.inner = build_inner(copied)

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of the optimizer inside."""
        settings: dict[str, Any] = self.inner.defaults
        return settings

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """States by model parameter, the fp32 copy among them."""
        models = {id(main): parameter for parameter, main in self.masters}
        states = {
            models.get(id(parameter), parameter): state
            for parameter, state in self.inner.state.items()
        }
        return {
            **states,
            **{
                parameter: {"master": main, **states.get(parameter, {})}
                for parameter, main in self.masters
            },
        }

    def step(self) -> None:
        """Copy gradients over, update, copy parameters back."""
        import torch

        for parameter, main in self.masters:
            if parameter.grad is not None:
                main.grad = parameter.grad.float()
                parameter.grad = None
        self.inner.step()
        with torch.no_grad():
            for parameter, main in self.masters:
                parameter.copy_(main)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the copies and of the parameters that need none."""
        self.inner.zero_grad(set_to_none=set_to_none)
        for parameter, _ in self.masters:
            parameter.grad = None


class MainGradients(MasterCopies):
    """fp32 copies of 16-bit parameters, and fp32 gradients that are allocated once.

    Megatron-LM puts the gradients of all parameters into one buffer; here each has its own piece.

    Source: megatron/core/distributed/distributed_data_parallel.py, _make_backward_post_hook,
    without gradient_accumulation_fusion; param_and_grad_buffer.py, _ParamAndGradBuffer.
    """

    def __init__(
        self, groups: list[dict[str, Any]], build_inner: Callable[[list[dict[str, Any]]], Any]
    ) -> None:
        import torch

        super().__init__(groups, build_inner)
        copies = dict(self.masters)
        self.updated = [(p, copies.get(p, p)) for group in groups for p in group["params"]]
        for parameter, _ in self.updated:
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.register_post_accumulate_grad_hook(self._hook)

    @staticmethod
    def _hook(parameter: Any) -> None:
        import torch

        with torch.no_grad():
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    def step(self) -> None:
        """Update the copies by the gradients where they lie, copy parameters back."""
        import torch

        for parameter, main in self.updated:
            main.grad = parameter.main_grad.float()
        self.inner.step()
        with torch.no_grad():
            for parameter, main in self.masters:
                parameter.copy_(main)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients in place; they stay."""
        for parameter, main in self.updated:
            main.grad = None
            parameter.main_grad.zero_()


class InBackward:
    """An optimizer for each parameter, which steps and drops the gradient as soon as it is there.

    Source: PyTorch's tutorial `optimizer_step_in_backward_tutorial`, and torchtune,
    training/memory.py, register_optim_in_bwd_hooks.
    """

    def __init__(
        self, groups: list[dict[str, Any]], build_one: Callable[[list[dict[str, Any]]], Any]
    ) -> None:
        self.update: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self.optimizers: dict[Any, Any] = {}
        for group in groups:
            for parameter in group["params"]:
                self.optimizers[parameter] = build_one([{**group, "params": [parameter]}])
                parameter.register_post_accumulate_grad_hook(self._hook)

    def _hook(self, parameter: Any) -> None:
        with self.update():
            self.optimizers[parameter].step()
            self.optimizers[parameter].zero_grad()

    @property
    def any(self) -> Any:
        """One of the optimizers; they differ by their parameter alone."""
        return next(iter(self.optimizers.values()))

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings that all of them have."""
        settings: dict[str, Any] = self.any.defaults
        return settings

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """States by parameter."""
        return {
            parameter: state
            for each in self.optimizers.values()
            for parameter, state in each.state.items()
        }

    def step(self) -> None:
        """Do nothing: the parameters are updated already."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the gradients are gone."""


class FusedBackward:
    """LOMO or AdaLomo: hooks that update the model inside the backward pass that it runs itself.

    The hooks of lomo-optim are as they are; around each of them the meter knows that the optimizer
    works. AdaLomo's statistics are kept by name, and go to CUDA by themselves.
    """

    def __init__(self, model: Any, name: str, *, fake: bool) -> None:
        import torch
        from lomo_optim import AdaLomo, Lomo  # type: ignore[import-untyped]  # it has no types

        owner = self
        self.model = model
        self.update: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

        class Watched(AdaLomo if name == "adalomo" else Lomo):  # type: ignore[misc]
            def fuse_update(self) -> Any:
                hook = super().fuse_update()

                def watched(gradient: Any) -> Any:
                    with owner.update():
                        return hook(gradient)

                return watched

        on_device = _patched(torch.Tensor, "cuda", lambda tensor: tensor)
        with on_device if fake else contextlib.nullcontext():
            self.inner = Watched(model, lr=LEARNING_RATE)
        self.defaults: dict[str, Any] = self.inner.defaults

    def backward(self, loss: Any) -> None:
        """Run backward, with all updates in it, as `Accelerator.lomo_backward` does."""
        self.inner.fused_backward(loss, LEARNING_RATE)

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """AdaLomo's statistics by parameter."""
        kinds = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
        kept = {kind: getattr(self.inner, kind, {}) for kind in kinds}
        return {
            parameter: {kind: kept[kind][path] for kind in kinds if path in kept[kind]}
            for path, parameter in self.model.named_parameters()
        }

    def step(self) -> None:
        """Do nothing: the parameters are updated already."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the gradients are gone."""


def leaves_gradients(optimizer: Any) -> bool:
    """Whether there are gradients after backward that `clip_grad_norm_` clips.

    Inside backward none is left; beside master copies, Megatron-LM clips with kernels of its own.
    """
    return not isinstance(optimizer, (InBackward, FusedBackward, MasterCopies))


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def announce(optimizer: Any, meter: Meter) -> None:
    """Have the optimizer say for which model parameter it works whenever it looks up its states."""
    if isinstance(optimizer, (InBackward, FusedBackward)):
        optimizer.update = meter.updating
        return
    work_for = meter.work_for
    inner = getattr(optimizer, "inner", optimizer)
    models = {id(main): parameter for parameter, main in getattr(optimizer, "masters", ())}

    class States(defaultdict[Any, Any]):
        def __getitem__(self, parameter: Any) -> Any:
            work_for(models.get(id(parameter), parameter))
            return super().__getitem__(parameter)

    for each in getattr(inner, "parts", (inner,)):
        each.state = States(dict, each.state)


def kept_on_host(optimizer: Any) -> Iterator[Any]:
    """Yield what an optimizer keeps in host memory beside states."""
    if isinstance(optimizer, cpu_offload.Offloaded):
        yield from optimizer.on_host


def is_on_host(optimizer: Any, parameter: Any, name: str) -> bool:
    """Whether an optimizer keeps this state in host memory: the step count, unless fused."""
    if isinstance(optimizer, cpu_offload.Offloaded) and optimizer.moves(parameter):
        return True
    return name == "step" and not optimizer.defaults.get("fused")


def is_managed(optimizer: Any, parameter: Any, name: str) -> bool:
    """Whether an optimizer keeps this state in CUDA managed memory, outside torch's counters."""
    inner = optimizer.any if isinstance(optimizer, InBackward) else optimizer
    inner = getattr(inner, "inner", inner)
    paged = getattr(inner, "is_paged", False) and parameter.numel() >= _SMALLEST_PAGED
    return paged and name in ("state1", "state2")


def managed_bytes(model: Any, optimizer: Any, layers: str | None, how: Shortening | None) -> int:
    """Return the managed memory of all states of the whole model [bytes]."""
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    total = 0
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if is_managed(optimizer, parameter, name):
                size = value.numel() * value.element_size()
                total += size * (how.weight(paths[id(parameter)], layers) if how else 1)
    return total


def _torch_flags(asked: Optimizer, default: str) -> dict[str, bool]:
    chosen = asked.implementation or default
    return {"foreach": chosen == "foreach", "fused": chosen == "fused"}


def _nadam(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    import torch

    return torch.optim.NAdam(groups, lr=LEARNING_RATE, foreach=_foreach(asked))


def _radam(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    """Return torch's RAdam, with its steps counted from 5 on: before, it takes a shorter way."""
    import torch

    class Aged(torch.optim.RAdam):  # type: ignore[misc]  # torch is not typed here
        def step(self, closure: Any = None) -> Any:
            for state in self.state.values():
                state["step"].add_(5.0)
            return super().step(closure)

    return Aged(groups, lr=LEARNING_RATE, foreach=_foreach(asked))


def _rmsprop(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    import torch

    return torch.optim.RMSprop(
        groups,
        lr=LEARNING_RATE,
        momentum=asked.momentum,
        centered=asked.centered,
        foreach=_foreach(asked),
    )


def _adagrad(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    import torch

    return torch.optim.Adagrad(groups, lr=LEARNING_RATE, **_torch_flags(asked, "foreach"))


def _torch_adafactor(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    import torch

    foreach = _torch_flags(asked, "single")["foreach"]
    return torch.optim.Adafactor(groups, lr=LEARNING_RATE, foreach=foreach)


def _foreach(asked: Optimizer) -> bool:
    """Whether foreach runs: torch's own choice on CUDA, unless another was asked for."""
    if asked.implementation == "fused":
        raise InvalidRequestError(f"optimizer {asked.name!r} has no fused implementation")
    return _torch_flags(asked, "foreach")["foreach"]


def _adamw(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    """Return what `TrainingArguments.optim` means by adamw_torch_fused and adamw_torch."""
    import torch

    flags = _torch_flags(asked, "fused")
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, amsgrad=asked.amsgrad, **flags)


def _adam(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    import torch

    flags = _torch_flags(asked, "foreach")
    return torch.optim.Adam(groups, lr=LEARNING_RATE, amsgrad=asked.amsgrad, **flags)


def _sgd(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    """Return torch's SGD; on CUDA it takes foreach by itself."""
    import torch

    flags = _torch_flags(asked, "foreach")
    return torch.optim.SGD(
        groups, lr=LEARNING_RATE, momentum=asked.momentum, nesterov=asked.nesterov, **flags
    )


def _adafactor(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    from transformers.optimization import Adafactor

    refuse_implementation(asked)
    return Adafactor(
        groups, lr=LEARNING_RATE, beta1=asked.beta1, scale_parameter=False, relative_step=False
    )


def _lowmem_adafactor(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    refuse_implementation(asked)
    return lowmem.optimizer(groups, LEARNING_RATE)


def _lion(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    refuse_implementation(asked)
    lion = library("lion_pytorch", "lion-pytorch", asked)
    return lion.Lion(groups, lr=LEARNING_RATE)


def _sophia(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    """Return the authors' SophiaG; sophia-opt holds their file as it is."""
    refuse_implementation(asked)
    return library("sophia_opt", "sophia-opt", asked).SophiaG(groups, lr=LEARNING_RATE)


def _schedule_free(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    """Return an optimizer of schedulefree in train mode, as the Trainer puts it; it is foreach."""
    refuse_implementation(asked)
    classes = {"adamw": "AdamW", "radam": "RAdam", "sgd": "SGD"}
    kind = classes[asked.name.removeprefix("schedule_free_")]
    schedulefree = library("schedulefree", "schedulefree", asked)
    optimizer = getattr(schedulefree, f"{kind}ScheduleFree")(groups, lr=LEARNING_RATE)
    optimizer.train()
    for group in optimizer.param_groups:
        # In its first steps RAdam takes a shorter way.
        group["k"] = 10
    return optimizer


def _galore(model: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    refuse_implementation(asked)
    galore = library("galore_torch", "galore-torch", asked)
    builders = {
        "galore_adamw": low_rank.galore,
        "galore_adamw_8bit": low_rank.galore_8bit,
        "galore_adafactor": low_rank.galore_adafactor,
    }
    return builders[asked.name](galore, model, groups, asked, LEARNING_RATE)


def _apollo(model: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    refuse_implementation(asked)
    apollo = library("apollo_torch", "apollo-torch", asked)
    return low_rank.apollo(apollo, model, groups, asked, LEARNING_RATE)


def _torchao(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    """Return torchao's AdamW with the Trainer's block; its compiled step allocates nothing here."""
    refuse_implementation(asked)
    adam = library("torchao.optim.adam", "torchao", asked)
    kind = {"8bit": "AdamW8bit", "4bit": "AdamW4bit", "fp8": "AdamWFp8"}
    name = kind.get(asked.name.removeprefix("adamw_torch_"), "_AdamW")
    blocks = {} if name == "_AdamW" else {"block_size": 256}

    class Compiled(getattr(adam, name)):  # type: ignore[misc]  # torch is not typed here
        def step(self, closure: Any = None) -> Any:
            with _patched(adam.torch, "compile", lambda *_, **__: lambda *_: None):
                return super().step(closure)

    return Compiled(
        groups, lr=LEARNING_RATE, bf16_stochastic_round=asked.bf16_stochastic_round, **blocks
    )


def _torchao_cpu_offload(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    refuse_implementation(asked)
    library("torchao.optim.cpu_offload", "torchao", asked)
    return cpu_offload.Offloaded(groups, asked, LEARNING_RATE)


def _muon(model: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    import torch

    flags = _torch_flags(asked, "foreach")
    return together.muon(
        model, groups, lambda rest: torch.optim.AdamW(rest, lr=LEARNING_RATE, **flags)
    )


def _stable_adamw(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    optimi = library("optimi", "torch-optimi", asked)
    chosen = asked.implementation or "fused"
    return small_libraries.stable_adamw(optimi, groups, LEARNING_RATE, chosen)


def _grokadamw(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    refuse_implementation(asked)
    # It sets up the logging of the whole process when it is imported.
    with _patched(logging, "basicConfig", lambda **_: None):
        grok = library("grokadamw", "grokadamw", asked)
    return small_libraries.grokadamw(grok, groups, LEARNING_RATE)


def _lamb(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    pytorch_optimizer = library("pytorch_optimizer", "pytorch_optimizer", asked)
    return pytorch_optimizer.Lamb(groups, lr=LEARNING_RATE, foreach=_foreach(asked))


def _soap(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    """Return SOAP; its eigenbases are renewed at every step."""
    refuse_implementation(asked)
    return library("pytorch_optimizer", "pytorch_optimizer", asked).SOAP(
        groups,
        lr=LEARNING_RATE,
        precondition_frequency=1,
        max_precondition_dim=asked.max_precondition_dim,
    )


def _shampoo(_: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    refuse_implementation(asked)
    pytorch_optimizer = library("pytorch_optimizer", "pytorch_optimizer", asked)
    return pytorch_optimizer.Shampoo(groups, lr=LEARNING_RATE)


def _adam_mini(model: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    """Return Adam-mini over the named parameters, with the sizes that its manual asks for."""
    refuse_implementation(asked)
    chosen = {id(each) for group in groups for each in group["params"]}
    if model.config.hidden_size**2 % model.config.num_attention_heads:
        raise InvalidRequestError("Adam-mini asserts that the heads divide hidden_size squared")
    adam_mini: Any = library("adam_mini", "adam-mini", asked)
    original = adam_mini.Adam_mini

    class Named(original):  # type: ignore[misc, valid-type]  # it is not typed here
        def step(self, closure: Any = None) -> Any:
            try:
                return super().step(closure)
            except IndexError as error:
                raise InvalidRequestError(
                    f"Adam-mini takes a vector for a matrix: {error}"
                ) from None

    return Named(
        [(name, each) for name, each in model.named_parameters() if id(each) in chosen],
        lr=LEARNING_RATE,
        dim=model.config.hidden_size,
        n_heads=model.config.num_attention_heads,
        n_kv_heads=getattr(model.config, "num_key_value_heads", None),
        verbose=False,
    )


def _lomo(model: Any, _: list[dict[str, Any]], asked: Optimizer, *, fake: bool = True) -> Any:
    """Return LOMO or AdaLomo as the Trainer builds it: no gradient norm is computed before."""
    refuse_implementation(asked)
    try:
        return FusedBackward(model, asked.name, fake=fake)
    except ImportError as error:
        raise MissingDependencyError(
            f"optimizer {asked.name!r} needs lomo-optim; run: pip install lomo-optim"
        ) from error


# bitsandbytes/backends/cuda/ops.py, str2optimizer32bit: those without a kernel for bf16 gradients.
_NO_BF16: Final = ("rmsprop", "rmsprop_bnb", "adagrad", "sgd", "lars")


def _refuse_bf16(model: Any, groups: list[dict[str, Any]], bits: int) -> None:
    """Refuse what the CUDA kernel refuses; fake tensors never come to it."""
    import torch

    tables = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    for parameter in (each for group in groups for each in group["params"]):
        small = parameter.numel() < _SMALLEST_8BIT or id(parameter) in tables
        if parameter.dtype is torch.bfloat16 and (bits == 32 or small):  # as `optim_bits` is
            raise InvalidRequestError("bitsandbytes has no such kernel for bf16 and 32-bit states")


def _read_norms(optimizer: Any) -> None:
    """Have the norm of a parameter read as a number, as the call of the operator itself does."""
    import torch

    update, norm = optimizer.update_step, torch.norm

    def update_step(*args: Any) -> None:
        with _patched(torch, "norm", lambda tensor: norm(tensor).item()):
            update(*args)

    optimizer.update_step = update_step


def _bitsandbytes(model: Any, groups: list[dict[str, Any]], asked: Optimizer) -> Any:
    """Return bitsandbytes' optimizer; with 8-bit states, embeddings keep 32-bit ones (Trainer)."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise MissingDependencyError(
            f"optimizer {asked.name!r} needs bitsandbytes; run: pip install bitsandbytes"
        ) from error
    refuse_implementation(asked)
    kind = asked.name.removeprefix("paged_")
    bits = 8 if kind.endswith("_8bit") else 32
    kind = kind.removesuffix("_8bit").removesuffix("_32bit")
    settings: dict[str, Any] = {"lr": LEARNING_RATE}
    if kind in ("sgd", "lars"):
        settings["momentum"] = asked.momentum
    if asked.name.startswith("paged_"):
        settings["is_paged"] = True
    if kind in _NO_BF16:
        _refuse_bf16(model, groups, bits)
    with unset_fake_temporarily():
        # Its code books are computed from data when it is built.
        optimizer = getattr(optim, real_optimizers.BITSANDBYTES_CLASSES[kind])(
            groups, optim_bits=bits, **settings
        )
    if kind in ("lamb", "lars"):
        _read_norms(optimizer)
    if kind == "ademamix":
        # Its own buffers would be asked of CUDA; the size is that of any other.
        optimizer._get_state_double_buffer = lambda p, dtype=torch.float32: torch.zeros(
            (2, *p.size()), dtype=dtype
        )
    optimizer.name2qmap = {
        name: torch.ones(table.numel()) for name, table in optimizer.name2qmap.items()
    }
    # The manager is one for the whole process and remembers parameters by their address.
    manager = object.__new__(optim.GlobalOptimManager)
    manager.initialize()
    optimizer.mng = manager
    if bits == 8:  # as `optim_bits` is written
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


_BUILDERS: Final[dict[str, Callable[[Any, list[dict[str, Any]], Optimizer], Any]]] = {
    "adam": _adam,
    "nadam": _nadam,
    "radam": _radam,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
    "torch_adafactor": _torch_adafactor,
    "adamw": _adamw,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "lion": _lion,
    "sophia": _sophia,
    "muon": _muon,
    "adam_mini": _adam_mini,
    "lamb": _lamb,
    "soap": _soap,
    "shampoo": _shampoo,
    "stable_adamw": _stable_adamw,
    "grokadamw": _grokadamw,
    "schedule_free_adamw": _schedule_free,
    "schedule_free_radam": _schedule_free,
    "schedule_free_sgd": _schedule_free,
    "galore_adamw": _galore,
    "galore_adamw_8bit": _galore,
    "galore_adafactor": _galore,
    "apollo_adamw": _apollo,
    "lowmem_adafactor": _lowmem_adafactor,
    "torchao_adamw": _torchao,
    "torchao_cpu_offload": _torchao_cpu_offload,
    "adamw_torch_8bit": _torchao,
    "adamw_torch_4bit": _torchao,
    "adamw_torch_fp8": _torchao,
    "lomo": _lomo,
    "adalomo": _lomo,
    **dict.fromkeys(BITSANDBYTES, _bitsandbytes),
}
