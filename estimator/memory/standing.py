"""What stays on the GPU through the whole step: weights, buffers, optimizer states, gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from estimator.dtypes import DType
from estimator.memory.ledger import Entry, Ledger, constant_row, tensor_row
from estimator.model.spec import Module, Weight
from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.optimizers import (
    OPTIMIZERS,
    Trained,
    cpu_offload,
    spent_gradients,
    states,
    temporaries,
    trained,
)
from estimator.techniques.optimizers.row import State, layout

_MASTER = Cite("micikevicius2018", "section 3.1, fp32 master copy of weights")
_MAIN_GRADS = Cite("megatron-optimizer", "_copy_model_grads_to_main_grads")
_MAIN_GRAD_BUFFER = Cite("megatron-ddp", "_ParamAndGradBuffer, grad_reduce_in_fp32")
_IMPORTANCE = Cite("peft", "tuners/adalora/layer.py, RankAllocator.update_ipt")
IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_GRAD = Cite("torch-autograd", "functions/accumulate_grad.h, AccumulateGrad")
_BUFFER = Cite("hf-modeling", "buffers of the model class")


def standing(run: Run) -> Ledger:
    """Return the entries that are alive at every moment from the second step on."""
    entries = [*_weights(run), *_buffers(run), *_states(run), *_importance(run)]
    if run.optimizer.main_gradients:
        entries += _main_gradients(run)
    elif run.accumulates:
        entries += _gradients(run)
    entries += _kept_gradients(run)
    if run.scales_loss:
        entries += _loss_scale()
    return Ledger(tuple(entries))


def model_entries(run: Run) -> tuple[Entry, ...]:
    """Return the weights and buffers of the model."""
    return (*_weights(run), *_buffers(run))


def site_of(run: Run, module: Module) -> str:
    """Return the site that a module belongs to."""
    spec = run.spec
    if module is spec.head:
        return "head"
    if any(module is each for each in spec.final):
        return "final_norm"
    for kind in spec.kinds:
        if any(module is each for each in kind.modules):
            return kind.name
    return "embeddings"


def trained_tensors(run: Run) -> tuple[Trained, ...]:
    """Return what the optimizer updates."""
    return _described(run, lambda weight: weight.trained)


def tensors_with_gradients(run: Run) -> tuple[Trained, ...]:
    """Return what has a gradient after backward, whether or not the optimizer has the weight."""
    return _described(run, lambda weight: weight.trainable)


def tensors_with_states(run: Run) -> tuple[Trained, ...]:
    """Return what the optimizer keeps states of: what it updates, or has updated before."""
    return _described(run, lambda weight: weight.trained or run.keeps_every_state)


def _described(run: Run, chosen: Callable[[Weight], bool]) -> tuple[Trained, ...]:
    master, model = run.optimizer.master_weights, layout(run)
    return tuple(
        trained(module, weight, count, master=master, layout=model)
        for module, weight, count in run.spec.tensors()
        if chosen(weight)
    )


def _weights(run: Run) -> list[Entry]:
    entries = []
    for module, weight, count in run.spec.tensors():
        name, site = f"{module.name}.{weight.name}", site_of(run, module)
        row = tensor_row(name, "weights", site, weight.shape, weight.dtype, weight.source)
        entries.append(Entry(row, count))
        if run.optimizer.master_weights and weight.trained and weight.dtype.is_half:
            master = tensor_row(
                f"{name}, fp32 master copy", "optimizer_states", site, weight.shape,
                DType.FLOAT32, _MASTER,
            )  # fmt: skip
            entries.append(Entry(master, count))
    return entries


def _buffers(run: Run) -> list[Entry]:
    return [
        Entry(tensor_row(each.name, "buffers", "embeddings", each.shape, each.dtype, _BUFFER), 1)
        for each in run.spec.buffers
    ]


def _loss_scale() -> list[Entry]:
    """Return the two numbers that a GradScaler keeps; what a step makes beside them is as small.

    Shapes:
        scale           []  fp32
        growth tracker  []  int32

    Source: torch-amp, GradScaler._lazy_init_scale_growth_tracker.
    """
    source = Cite("torch-amp", "GradScaler._lazy_init_scale_growth_tracker")
    numbers = (("loss scale", DType.FLOAT32), ("growth tracker of the loss scale", DType.INT32))
    return [
        Entry(tensor_row(name, "buffers", "loss", (), dtype, source), 1) for name, dtype in numbers
    ]


def kept_states(run: Run) -> tuple[State, ...]:
    """Return the states of the run's optimizer; without a backward pass it never steps."""
    return () if run.forward_only else states(run.optimizer)


def _states(run: Run) -> list[Entry]:
    """Return one entry for each state of each trained tensor, managed memory left out."""
    return [
        Entry(
            constant_row(
                f"{each.name}.{state.name}", "optimizer_states", "optimizer", state.bytes(each),
                f"{each.elements} parameters", state.source,
            ),
            each.count,
        )
        for each in tensors_with_states(run)
        for state in kept_states(run)
        if not state.managed(each) and state.bytes(each)
    ]  # fmt: skip


def importance_sizes(run: Run) -> tuple[tuple[str, int, int], ...]:
    """Return name, bytes and count of each adapter weight whose importance AdaLoRA keeps."""
    if not run.keeps_importance:
        return ()
    return tuple(
        (f"{module.name}.{weight.name}", weight.bytes, count)
        for module, weight, count in run.spec.tensors()
        if weight.trained and weight.name.startswith("lora_")
    )


def _importance(run: Run) -> list[Entry]:
    """Return AdaLoRA's scores, each of the size of the weight: its own, and two averages.

    Source: peft, tuners/adalora/layer.py, RankAllocator.update_ipt.
    """
    return [
        Entry(
            constant_row(
                f"{name}.{score}", "optimizer_states", "optimizer", size, f"{size} B", _IMPORTANCE
            ),
            count,
        )
        for name, size, count in importance_sizes(run)
        for score in IMPORTANCE
    ]


def managed_bytes(run: Run) -> int:
    """Bytes of paged optimizer states: CUDA managed memory, in none of torch's counters."""
    return sum(
        state.bytes(each) * each.count
        for each in tensors_with_states(run)
        for state in kept_states(run)
        if state.managed(each)
    )


def _gradients(run: Run) -> list[Entry]:
    return _gradients_of(run, lambda weight: weight.trained)


def _kept_gradients(run: Run) -> list[Entry]:
    """Return the gradients that no optimizer clears: those of weights that none was given."""
    return _gradients_of(run, lambda weight: weight.keeps_gradient)


def _gradients_of(run: Run, chosen: Callable[[Weight], bool]) -> list[Entry]:
    return [
        Entry(
            tensor_row(
                f"{module.name}.{weight.name}.grad", "gradients", site_of(run, module),
                weight.shape, weight.dtype, _GRAD,
            ),
            count,
        )
        for module, weight, count in run.spec.tensors()
        if chosen(weight)
    ]  # fmt: skip


def _left_on_the_device(run: Run) -> tuple[Entry, ...]:
    """Return the gradients of tensors too small to be moved to the host.

    Source: torchao, optim/cpu_offload.py, CPUOffloadOptimizer (minimal_size).
    """
    left = zip(trained_tensors(run), _gradients(run), strict=True)
    return tuple(
        entry for each, entry in left if not cpu_offload.moves(run.optimizer, each.elements)
    )


def _main_gradients(run: Run) -> list[Entry]:
    """Return the fp32 gradients that Megatron-LM allocates once, in one buffer for all.

    Shapes:
        main_grad  as the parameter  4 bytes, for each trained parameter

    Source: megatron-ddp, core/distributed/param_and_grad_buffer.py, _ParamAndGradBuffer.
    """
    return [
        Entry(
            tensor_row(
                f"{module.name}.{weight.name}.main_grad", "gradients", site_of(run, module),
                weight.shape, DType.FLOAT32, _MAIN_GRAD_BUFFER,
            ),
            count,
        )
        for module, weight, count in run.spec.tensors()
        if weight.trained
    ]  # fmt: skip


def step_entries(run: Run) -> tuple[Entry, ...]:
    """Return what the optimizer's step holds beside the standing entries at its worst moment.

    Gradients are there until `zero_grad`. With master weights they have been copied to fp32 one
    by one, each original freed at once. An optimizer in backward has done its work already.
    """
    if run.optimizer.asked.offload_gradients:
        return _left_on_the_device(run)
    if run.optimizer.in_backward:
        return ()
    if run.forward_only:
        return _perturbation(run)
    gradients = [*step_gradients(run), *_spent(run)]
    sizes = step_temporaries(run)
    copying = _last_copy(run)
    if _bytes(copying) > _bytes(gradients) + sum(sizes):
        return copying
    if not sizes:
        return tuple(gradients)
    name = f"{run.optimizer.name} {run.optimizer.implementation}, temporaries of the step"
    source = OPTIMIZERS[run.optimizer.name].source
    alike = Counter(sizes)
    scratch = [
        Entry(constant_row(name, "optimizer_states", "optimizer", size, f"{size} B", source), count)
        for size, count in alike.items()
    ]
    return (*gradients, *scratch)


def step_gradients(run: Run) -> list[Entry]:
    """Return the gradients that are there in the step and were not all the time."""
    if run.optimizer.main_gradients:
        return []
    if not run.optimizer.master_weights:
        return [] if run.accumulates else _gradients(run)
    copied = [_main_gradient(each, each.count, half=False) for each in trained_tensors(run)]
    return [*copied, *_no_longer_standing(run)]


def _no_longer_standing(run: Run) -> Iterator[Entry]:
    """Yield the gradients of several micro-batches that a copy in fp32 replaces, counted off."""
    if run.accumulates:
        yield from (Entry(each.row, -each.count) for each in _gradients(run))


def _spent(run: Run) -> Iterator[Entry]:
    """Yield the gradients that the step has dropped by its worst moment, counted off."""
    tensors = trained_tensors(run)
    spent = spent_gradients(run.optimizer, tensors)
    if not spent:
        return
    alive = _gradients(run) if run.accumulates else step_gradients(run)
    for each, entry in zip(tensors, alive, strict=True):
        dropped = min(spent.get(each, 0), entry.count)
        if dropped:
            spent[each] -= dropped
            yield Entry(entry.row, -dropped)


def _main_gradient(each: Trained, count: int, *, half: bool) -> Entry:
    """Return the gradients of some alike tensors, in fp32 or not copied yet."""
    width, name = (2, "gradient not copied yet") if half else (4, "fp32 gradient")
    return Entry(
        constant_row(
            f"{each.name}, {name}", "gradients", "optimizer", each.elements * width,
            f"{each.elements} parameters x {width} B", _MAIN_GRADS,
        ),
        count,
    )  # fmt: skip


def _last_copy(run: Run) -> tuple[Entry, ...]:
    """Return the gradients when that of the last matrix is copied to fp32: it is there twice.

    Nothing is copied with main gradients of Megatron's kind, or where a weight is fp32 itself.
    Matrices come first, as in the Trainer's groups, so that vectors have not been copied yet.

    Source: megatron-optimizer, _copy_model_grads_to_main_grads.
    """
    copies = run.optimizer.master_weights and not run.optimizer.main_gradients
    updated = [weight for _, weight, _ in run.spec.tensors() if weight.trained]
    if not copies or not all(each.dtype.is_half for each in updated):
        return ()
    tensors = trained_tensors(run)
    entries = [_main_gradient(each, each.count, half=not each.rows) for each in tensors]
    matrices = [each for each in tensors if each.rows]
    entries += [_main_gradient(each, 1, half=True) for each in matrices[-1:]]
    return (*entries, *_no_longer_standing(run))


def _bytes(entries: Iterable[Entry]) -> int:
    return sum(each.row.size[0] * each.count for each in entries)


def _perturbation(run: Run) -> tuple[Entry, ...]:
    """Return what MeZO's update holds beside the largest tensor: four more of its size.

    The noise, its product with the projected gradient, the decayed weight, and their sum. Biases
    and layer norms are not decayed.

    Source: mezo, large_models/trainer.py, zo_update.
    """
    decayed = [
        each
        for each in trained_tensors(run)
        if not any(part in each.name for part in ("bias", "layer_norm", "layernorm"))
    ]
    largest = max((each.bytes for each in decayed), default=0)
    row = constant_row(
        "MeZO, temporaries of the update", "optimizer_states", "optimizer", largest,
        f"{largest} B", Cite("mezo", "large_models/trainer.py, zo_update"),
    )  # fmt: skip
    return (Entry(row, 4),)


def step_temporaries(run: Run) -> tuple[int, ...]:
    """Return the sizes of what the optimizer's step allocates at its worst moment [bytes]."""
    if run.optimizer.in_backward:
        return ()
    if run.forward_only:
        return tuple(each.row.size[0] for each in _perturbation(run) for _ in range(each.count))
    update = temporaries(run.optimizer, trained_tensors(run))
    # When the optimizer is done, an average is made anew of two products for each weight.
    largest = max((size for _, size, _ in importance_sizes(run)), default=0)
    averaging = (largest,) * 3 if largest else ()
    return max(update, averaging, copied_back(run), key=sum)


def copied_back(run: Run) -> tuple[int, ...]:
    """Return the half copy that BAdam makes of an fp32 one before it is written back [bytes].

    Source: badam, block_optim.py, BlockOptimizer._update_param.
    """
    if not run.optimizer.of_blocks:
        return ()
    return (max(each.elements for each in trained_tensors(run)) * DType.BFLOAT16.width,)
