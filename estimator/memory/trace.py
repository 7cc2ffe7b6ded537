"""One training step on the tape, with each kind of layer run once.

The trace holds a chain of sites: the embeddings, the first layer, one layer of every kind, the
final norm, the head and the loss. Layers of one kind are alike, so `timeline.py` puts the chain
back together for the real number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Final, NamedTuple

from msgspec import Struct, structs

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.checkpoint import checkpoint
from estimator.eager.engine import backward
from estimator.eager.host import SaveOnHost
from estimator.eager.size import BATCH, SECOND, SEQ, SHIFTED, dim
from estimator.eager.tensor import (
    Instant,
    Live,
    RecordingTape,
    Regime,
    Section,
    Tape,
    Tensor,
    TensorKind,
    view,
)
from estimator.memory.chunked_loss import ChunkedHead
from estimator.memory.fused_loss import FusedLoss
from estimator.memory.loss import LOSSES, MeasuredLoss
from estimator.memory.outside_loss import OutsideLoss
from estimator.memory.sampled_loss import SampledLabels
from estimator.memory.smoothed_loss import LabelSmoothing
from estimator.memory.unroll import NotPeriodicError, shorten, unroll
from estimator.memory.updates import inside_backward
from estimator.model.compiled_layer import checkpointed
from estimator.model.forward import Forward, Given
from estimator.model.spec import LayerKind
from estimator.model.torchtune import RecipeLoss
from estimator.run import Run
from estimator.sources import Assumption, Cite

_NAMES = Assumption(
    "the loop binds its names for logits and shifted logits anew in each step, as a loop in the "
    "body of a function does, so that those of the step before live through the forward pass"
)
INPUTS = Cite("hf-trainer", "Trainer._prepare_inputs: input_ids, attention_mask, labels")


class Trace(Struct, frozen=True):
    """What one step of the chain showed.

    Args:
        kinds: the kinds of tensor, by index.
        sites: the name of each site of the chain.
        chain: for each real layer, the site of the chain that stands for it.
        forward, backward: for each site its local maxima, in the order of time.
        metrics: the same of what the loop computes between them.
        forward_saved: what is alive when the forward pass of the model has ended.
        backward_saved: what is alive when backward begins.
        left: what backward has left when it reaches the embeddings.
        end: what is alive after backward.
        host: tensors in pinned host memory when backward begins, by site and size.
        named: the kinds of tensor that the loop has names for until the next step.
    """

    kinds: tuple[TensorKind, ...]
    sites: tuple[str, ...]
    chain: tuple[int, ...]
    forward: tuple[tuple[int, list[Instant]], ...]
    metrics: tuple[tuple[int, list[Instant]], ...]
    backward: tuple[tuple[int, list[Instant]], ...]
    forward_saved: Live
    backward_saved: Live
    left: Live
    end: Live
    host: Mapping[tuple[int, tuple[int, int]], int]
    named: frozenset[int] = frozenset()


def trace(run: Run, regime: Regime) -> Trace:
    """Run one steady-state training step of the chain and record what was alive when."""
    kinds, chain = _chain(run)
    tape = Tape(run.autocast, regime)
    forward_saved, backward_saved = _execute(run, tape, kinds)
    tape.enter(0)
    end = dict(tape.live)
    left = tape.left_behind if tape.left_behind is not None else end
    named = frozenset(each.storage.kind for each in tape.names if each.storage is not None)
    tape.drop_step()
    return Trace(
        kinds=tuple(tape.kinds),
        sites=site_names(run, kinds),
        chain=chain,
        forward=tuple(tape.instants("forward")),
        metrics=tuple(tape.instants("metrics")),
        backward=tuple(tape.instants("backward")),
        forward_saved=forward_saved,
        backward_saved=backward_saved,
        left=left,
        end=end,
        host=tape.host,
        named=named,
    )


class Recording(Struct, frozen=True, dict=True):
    """Every birth and death of one step through all layers; gradients and batch outlive it.

    Args:
        kinds: the kinds of tensor, by index.
        sites: the name of each site.
        log: what happens, in the order of time.
        kept: the kinds of tensor that outlive the step itself.
        outside: sites that no compiled graph holds: a loss that the loop computes itself.
        first_product: the number of the first product's result.
    """

    kinds: tuple[TensorKind, ...]
    sites: tuple[str, ...]
    log: tuple[Section, ...]
    kept: frozenset[int] = frozenset()
    outside: frozenset[int] = frozenset()
    first_product: int | None = None

    @cached_property
    def left(self) -> dict[int, int]:
        """Return the tensors that outlive the log, and not the step, by number: their kinds."""
        alive: dict[int, int] = {}
        for section in self.log:
            for serial, kind in section.events:
                if kind is None:
                    del alive[serial]
                else:
                    alive[serial] = kind
        return {serial: kind for serial, kind in alive.items() if kind not in self.kept}


def record(
    run: Run, regime: Regime, *, first_step: bool = False, makes_gradients: bool = False
) -> Recording:
    """Return every birth and death of one step through all layers, in order.

    Only as many layers are run as it takes to know what the others do.

    Args:
        first_step: no gradient is there yet of those that the optimizer does not have.
        makes_gradients: it is the first micro-batch of several, which the others add to.
    """
    now = Now(first_step, makes_gradients)
    cut = shorten(run.spec.pattern)
    if not cut.copies:
        return record_layers(run, regime, run.spec.pattern, now)
    short = record_layers(run, regime, cut.pattern, now)
    try:
        log = unroll(short.log, [kind.size for kind in short.kinds], cut)
    except NotPeriodicError:
        return record_layers(run, regime, run.spec.pattern, now)
    return structs.replace(short, log=log)


class Now(NamedTuple):
    """Which step it is, and which micro-batch."""

    first_step: bool = False
    makes_gradients: bool = False


LATER: Final = Now()


def record_layers(
    run: Run, regime: Regime, pattern: tuple[int, ...], now: Now = LATER
) -> Recording:
    """Run one step through the layers of a pattern."""
    kinds = tuple(run.spec.kinds[index] for index in pattern)
    tape = RecordingTape(run.autocast, regime)
    tape.first_step = now.first_step
    _execute(run, tape, kinds, makes_gradients=now.makes_gradients)
    log = tape.sections()
    kept = frozenset(each.storage.kind for each in tape.kept.values() if each.storage is not None)
    tape.drop_step()
    sites = site_names(run, kinds)
    in_loop = isinstance(LOSSES[run.loss], (OutsideLoss, LabelSmoothing, SampledLabels))
    outside = frozenset((len(sites) - 1,) if in_loop else ())
    return Recording(tuple(tape.kinds), sites, log, kept, outside, tape.first_product)


def site_names(run: Run, kinds: tuple[LayerKind, ...]) -> tuple[str, ...]:
    """Name the sites of a step through layers of these kinds; a compiled loss is no phase."""
    loss = "loss, compiled" if run.loss == "compiled" else "loss"
    return ("embeddings", *(kind.name for kind in kinds), "final_norm", "head", loss)


def _execute(
    run: Run, tape: Tape, kinds: tuple[LayerKind, ...], *, makes_gradients: bool = False
) -> tuple[Live, Live]:
    """Run forward, loss and backward through some layers.

    Returns:
        What is alive when the model's forward pass has ended, and when backward begins.
    """
    tape.grads_exist = run.accumulates and not makes_gradients
    tape.gathers_gradients = run.settings.compiled and tape.grads_exist
    tape.trains = not run.forward_only
    tape.caches_casts = not run.settings.compiled
    tape.update = inside_backward(run)
    forward = Forward(tape, run.spec, run.settings, _activation_dtype(run))
    forward.input_requires_grad = run.input_requires_grad
    forward.checkpointing = run.checkpointing
    second = "position_ids" if run.settings.packing else "attention_mask"
    names = ("input_ids", second, "labels") if run.spec.trainers_batch else ("input_ids", "labels")
    batch = [_input(tape, name, run) for name in names[:-1]]
    batch.append(_input(tape, "labels", run, run.kept_logits))
    if run.settings.packing:
        forward.names["position_ids"] = batch[1]
    if isinstance(LOSSES[run.loss], OutsideLoss) and not tape.first_step:
        tape.names_before = _names_before(run, tape, len(kinds))
    tape.autocast_enabled = run.autocast is not None
    if run.checkpointing is not None and run.checkpointing.scope == "none":
        tape.frame = SaveOnHost(tape)
    loss, outputs = _forward(run, forward, kinds, batch)
    tape.frame = None
    tape.cast_cache.clear()
    tape.autocast_enabled = False
    how = LOSSES[run.loss]
    if isinstance(how, MeasuredLoss):
        tape.phase = "metrics"
        how.measure(outputs.held[0])
    if not run.keeps_outputs:
        outputs.held.clear()
    if not run.keeps_outputs or not run.settings.keeps_cache:
        forward.cache.clear()
    backward_saved = dict(tape.live)
    tape.phase = "backward"
    if tape.trains:
        backward(loss)
        tape.results.clear()
    if tape.update is not None:
        tape.update.finish(tape)
    outputs.held.clear()
    outputs.names.clear()
    forward.cache.clear()
    tape.batch += [*batch, loss]
    return outputs.alive, tape.reached or backward_saved


def _chain(run: Run) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    """Return the layers of the chain, and for each real layer its site in the chain.

    The first and the last layer stand for themselves alone: the input of the one may want no
    gradient, and the output of the other is saved by the final norm, not by a next layer.
    """
    pattern = run.spec.pattern
    if run.checkpointing is not None and run.checkpointing.every > 1:
        return _periodic_chain(run)
    inner = tuple(dict.fromkeys(pattern[1:-1]))
    chosen = (pattern[0], *inner, *pattern[-1:]) if len(pattern) > 1 else pattern
    kinds = tuple(run.spec.kinds[index] for index in chosen)
    if len(pattern) == 1:
        return kinds, (1,)
    return kinds, (1, *(2 + inner.index(index) for index in pattern[1:-1]), 2 + len(inner))


def _periodic_chain(run: Run) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    """Return a chain in which every layer has the neighbours that it has in the model.

    Whether a layer's output is kept depends on whether the next layer is checkpointed.
    """
    cut = shorten(run.spec.pattern)
    sites = tuple(range(1, len(cut.pattern) + 1))
    first, behind = cut.period + 1, 2 * cut.period + 1
    template = sites[first:behind] * cut.copies
    kinds = tuple(run.spec.kinds[index] for index in cut.pattern)
    return kinds, (*sites[:behind], *template, *sites[behind:])


def _activation_dtype(run: Run) -> DType:
    """Return the type of the hidden states: that of the embedding table."""
    return run.spec.embeddings[0].dtype


def _input(tape: Tape, name: str, run: Run, kept: int = 0) -> Tensor:
    """Return one input of this micro-batch; the Trainer fetches those of a whole step at once."""
    shape = (BATCH, SECOND if run.prompt_tokens else SEQ)
    if kept:
        shape = (BATCH, dim("kept", kept))
    if run.micro_batches == 1 or not run.spec.trainers_batch:
        return tape.new(name, shape, DType.INT64, INPUTS, "buffers")
    of_step = tape.new(name, (dim("n", run.micro_batches), *shape), DType.INT64, INPUTS, "buffers")
    return view(of_step, shape)


class _Outputs:
    """What the model's output object refers to, and what was alive when it was made.

    Args:
        names: what the loop's own names keep until backward has ended.
    """

    def __init__(self, held: list[Tensor], alive: Live, names: list[Tensor] | None = None) -> None:
        self.held = held
        self.alive = alive
        self.names = names or []


def _forward(
    run: Run, forward: Forward, kinds: tuple[LayerKind, ...], batch: list[Tensor]
) -> tuple[Tensor, _Outputs]:
    """Run the model and its loss; local names live as long as they do in transformers.

    Under autocast Accelerate hands out fp32 logits in place of the model's own.

    Source: accelerate, Accelerator.prepare_model, convert_outputs_to_fp32.
    """
    spec, family, tape = run.spec, run.spec.family, forward.tape
    last = len(kinds) + 1
    hidden = _model(run, forward, kinds, batch[0])
    forward.enter(last + 1, (spec.head,))
    if spec.tied:
        forward.tie(spec.head.name, spec.embeddings[0].name)
    how = LOSSES[run.loss]
    if isinstance(how, FusedLoss):
        alive = dict(tape.live)
        tape.enter(last + 2)
        with tape.module("loss"):
            loss = how(forward, hidden, forward.caller_names.get("labels", batch[-1]))
            # TRL makes this loss outside the model, which then adds nothing to it.
            if not isinstance(how, ChunkedHead):
                loss = _with_term(forward, kinds, loss)
        forward.caller_names.clear()
        return loss, _Outputs([], alive)
    logits = how.outputs(family.logits(forward, _last_positions(run, hidden)))
    if isinstance(how, RecipeLoss):
        del hidden
    if isinstance(how, OutsideLoss):
        del hidden
        return _outside(how, forward, logits, batch[-1], last + 2)
    if isinstance(how, (LabelSmoothing, SampledLabels)):
        # The model has returned, out of autocast, before the loop computes this loss.
        tape.cast_cache.clear()
        tape.autocast_enabled = False
        del hidden
        if run.autocast is not None:
            logits = ops.cast(logits, DType.FLOAT32, "logits of the outputs in fp32")
        alive = dict(tape.live)
        tape.enter(last + 2)
        with tape.module("loss"):
            if isinstance(how, SampledLabels):
                loss, distribution = how.sampled(logits)
                return loss, _Outputs([], alive, [logits, *distribution])
            return how(logits, batch[2], spec.vocab), _Outputs([logits], alive)
    if run.settings.compiled:
        # Names keep nothing in a compiled graph.
        del hidden
    alive = dict(tape.live)
    tape.enter(last + 2)
    with tape.module("loss"):
        loss = how(logits, forward.caller_names.get("labels", batch[-1]), spec.vocab)
        loss = _with_term(forward, kinds, loss)
    forward.caller_names.clear()
    held = [logits]
    if run.autocast is not None:
        held = [ops.cast(logits, DType.FLOAT32, "logits of the outputs in fp32")]
    return loss, _Outputs(held, alive)


def _outside(
    how: OutsideLoss, forward: Forward, logits: Tensor, labels: Tensor, site: int
) -> tuple[Tensor, _Outputs]:
    """Compute the loss in the loop, whose names still hold what the step before has left."""
    tape = forward.tape
    tape.cast_cache.clear()
    tape.autocast_enabled = False
    before = tape.names_before
    if before:
        before.pop()
    alive = dict(tape.live)
    tape.enter(site)
    with tape.module("loss"):
        shifted = how.shifted(logits)
        before.clear()
        loss = how(shifted, labels, forward.spec.vocab)
    tape.names += [logits, shifted]
    return loss, _Outputs([], alive)


def _names_before(run: Run, tape: Tape, layers: int) -> list[Tensor]:
    """Return what a loop of one's own still has names for: the copy, and the logits."""
    dtype = run.autocast or _activation_dtype(run)
    held = ((layers + 3, SHIFTED, "shifted logits"), (layers + 2, SEQ, "logits"))
    return [
        tape.new(
            f"{what} of the step before", (BATCH, tokens, run.spec.vocab), dtype, _NAMES, site=site
        )
        for site, tokens, what in held
    ]


def _with_term(forward: Forward, kinds: tuple[LayerKind, ...], loss: Tensor) -> Tensor:
    """Return the loss with what the method adds to it."""
    term = forward.spec.loss_term
    return loss if term is None else term.added(forward, kinds, loss)


def _last_positions(run: Run, hidden: Tensor) -> Tensor:
    """Return the hidden states that get logits, contiguous, as the head's product wants them.

    Of one row the last positions are a view. Autocast's cast writes its copy anew as it is.

    Source: hf-loading, slice_logits_to_keep.
    """
    if not run.kept_logits:
        return hidden
    kept = ops.part(hidden, (BATCH, dim("kept", run.kept_logits), hidden.shape[-1]))
    casts = run.autocast is not None and not hidden.dtype.is_half
    if casts or not hidden.tape.regime.several_rows:
        return kept
    return ops.copy(kept, name="last positions")


def _model(run: Run, forward: Forward, kinds: tuple[LayerKind, ...], ids: Tensor) -> Tensor:
    """Run embeddings, layers and final norm."""
    spec, family, how = run.spec, run.spec.family, run.checkpointing
    forward.enter(0, spec.embeddings)
    if spec.virtual_tokens is not None:
        spec.virtual_tokens.prepare(forward, len(kinds))
    hidden = family.embed(forward, ids)
    forward.prepare_masks(spec.kinds)
    given = forward.given()
    for site, kind in enumerate(kinds, start=1):
        forward.enter(site, kind.modules)
        region = _region(forward, site, kind, given.to(kind))
        if kind.checkpointed and run.settings.compiled:
            last = site == len(kinds)
            hidden = checkpointed(forward, kind, hidden, first=site == 1, final=last)
            if last:
                forward.names.clear()
                return hidden
        elif kind.checkpointed and how is not None:
            hidden = checkpoint(how, region, hidden)
        else:
            hidden = region(hidden)
        hidden = forward.intervene(hidden)
    hidden = _final(run, forward, len(kinds) + 1)(hidden)
    forward.names.clear()
    return hidden


def _final(run: Run, forward: Forward, site: int) -> Callable[[Tensor], Tensor]:
    """Return the final norm as a function of its input."""

    def norm(hidden: Tensor) -> Tensor:
        forward.enter(site, run.spec.final)
        return run.spec.family.final(forward, hidden)

    return norm


def _region(
    forward: Forward, site: int, kind: LayerKind, given: Given
) -> Callable[[Tensor], Tensor]:
    """Return one layer as a function of its input, to be run now and maybe again in backward.

    It keeps what the layer is given beside its input for as long as it may be run.
    """

    def layer(hidden: Tensor) -> Tensor:
        forward.enter(site, kind.modules)
        forward.rotary, forward.masks = given.rotary, given.masks
        try:
            return forward.spec.family.layer(forward, kind, hidden)
        finally:
            forward.attention_weights = None
            forward.rotary, forward.masks = {}, {}

    return layer
