"""A callback for the Trainer: will this run fit, and did the prediction hold?

Source of the order of events: transformers 5.23.0, trainer.py, Trainer._run_epoch.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, Literal

from msgspec.structs import replace
from transformers import TrainerCallback

from estimator.errors import EstimatorError, InvalidRequestError
from estimator.record import Meters, PhasePeak, Run, append
from estimator.request import EstimateRequest, Hardware, parse_request
from estimator.result import Result
from estimator.service import estimate
from estimator.units import gib
from profiler.live import device, weights
from profiler.live.findings import Findings
from profiler.live.forecast import BEFORE_UPDATE, STEP, UPDATE, Forecast, Shape, table
from profiler.live.request import LiveRun, document
from profiler.whole_file import write_whole

logger: Final = logging.getLogger(__name__)

GROUP: Final = "trainer callback"


class DoesNotFitError(EstimatorError):
    """The run does not fit, and the user asked to be stopped then."""

    exit_code = 1
    slug = "does-not-fit"
    title = "The run does not fit"


@dataclass(slots=True)
class _Watch:
    """What was seen of the first steps.

    Args:
        steps: how many are over.
        shapes: the batches of the step that runs.
        largest: the batch with the most tokens so far.
        phases, whole: of the last step.
        peak: over all steps.
        seconds: of each step.
    """

    steps: int = 0
    began: float = 0.0
    shapes: list[Shape] = field(default_factory=list)
    largest: Shape | None = None
    last: Shape | None = None
    phases: tuple[PhasePeak, ...] = ()
    whole: Meters = field(default_factory=Meters)
    peak: Meters = field(default_factory=Meters)
    seconds: tuple[float, ...] = ()
    hook: Any = None


class MemoryPreflight(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Say before the first step whether the run fits, and after some steps how true that was.

    Watching resets the peak statistics of torch for the device at the beginning and within each of
    the first `steps` steps; `peak` keeps the highest values that were read.

    Args:
        on_misfit: `warn` logs a warning when the run does not fit, `stop` raises DoesNotFitError.
        seq_len: the longest sequence, where the data does not tell.
        steps: how many steps are watched; 0 watches none.
        record_to: file that a measurement record is appended to.
        request_to: file that the request document is written to.
        meter: reads the device; a test puts its own in place.
    """

    def __init__(
        self,
        *,
        on_misfit: Literal["warn", "stop"] = "warn",
        seq_len: int | None = None,
        steps: int = 3,
        record_to: str | os.PathLike[str] | None = None,
        request_to: str | os.PathLike[str] | None = None,
        meter: device.Meter | None = None,
    ) -> None:
        if on_misfit not in ("warn", "stop"):
            raise InvalidRequestError(f"on_misfit {on_misfit!r} is neither 'warn' nor 'stop'")
        if steps < 0 or (seq_len is not None and seq_len < 1):
            raise InvalidRequestError("steps may be 0 or more, and seq_len 1 or more")
        self._stops = on_misfit == "stop"
        self._seq_len = seq_len
        self._steps = steps
        self._record_to = Path(record_to) if record_to is not None else None
        self._request_to = Path(request_to) if request_to is not None else None
        self._given_meter = meter
        self._meter: device.Meter | None = None
        self._forecast: Forecast | None = None
        self._watch = _Watch()
        self.result: Result | None = None
        self.peak = Meters()

    def on_train_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Estimate the run that is about to begin.

        Raises:
            DoesNotFitError: it does not fit, and `on_misfit` is `stop`.
        """
        self._let_go()
        self._forecast, self.result, self.peak = None, None, Meters()
        self._meter = None
        if not state.is_world_process_zero:
            return
        try:
            run = LiveRun(
                args=args,
                model=live["model"],
                optimizer=live["optimizer"],
                dataloader=live["train_dataloader"],
                tokenizer=live.get("processing_class"),
                micro_batch_size=state.train_batch_size or args.per_device_train_batch_size,
            )
            self._meter = self._given_meter or device.meter_of(run.model)
            misfit = self._announce(run)
            self._watch = _Watch()
            if self._meter is not None and self._steps and not args.torch_compile:
                self._watch.hook = run.model.register_forward_pre_hook(self._see, with_kwargs=True)
        except Exception as error:
            # Whatever goes wrong here must not cost the user the training.
            self._forecast = None
            reason = str(error) if isinstance(error, EstimatorError) else repr(error)
            logger.warning("memory: cannot estimate: %s; training goes on", reason)
            return
        if misfit is not None and self._stops:
            self._let_go()
            raise DoesNotFitError(misfit)

    def on_step_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Begin to watch a step; its batches are on the device already."""
        if self._watches():
            self._note(self._read())
            self._watch.shapes.clear()
            self._watch.phases = ()
            self._watch.whole = Meters()
            self._watch.began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Read forward, backward and clipping."""
        self._end_phase(BEFORE_UPDATE)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Read the update."""
        self._end_phase(UPDATE)

    def on_step_end(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Compare the step, and record it if it is the last one that is watched."""
        if not self._watches():
            return
        assert self._meter is not None
        watch = self._watch
        self._meter.synchronize()
        watch.seconds = (*watch.seconds, time.perf_counter() - watch.began)
        watch.whole = _highest(watch.whole, self._read())
        watch.peak = _highest(watch.peak, watch.whole)
        self._note(watch.whole)
        watch.steps += 1
        if watch.shapes:
            watch.last = max(watch.shapes, key=_tokens)
            watch.largest = max(filter(None, (watch.largest, watch.last)), key=_tokens)
        try:
            self._compare()
            if watch.steps == self._steps:
                self._finish()
        except Exception as error:
            logger.warning("memory: cannot compare: %r; training goes on", error)
            self._let_go()

    def on_train_end(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Record a run that was over before all steps were watched."""
        if self._watches() and self._watch.steps:
            self._finish()
        self._let_go()

    def _announce(self, run: LiveRun) -> str | None:
        """Log whether the run fits; return why it does not, if that is sure."""
        findings = Findings()
        request = parse_request(document(run, findings, seq_len=self._seq_len))
        how = ""
        if self._meter is not None:
            hardware, how = self._hardware(run, request)
            request = replace(request, hardware=hardware)
        self.result = result = estimate(request)
        self._forecast = Forecast(request)
        if self._request_to is not None:
            _write(self._request_to, request)
        remarks = [*findings.assumed]
        if how:
            remarks.append(how)
        different = _different_counts(run.model, result)
        if different:
            remarks.insert(0, different)
        text = " ".join([f"memory: {result.message}", *(f"({each}.)" for each in remarks)])
        concerns = result.verdict in ("tight", "does_not_fit") or different
        logger.log(logging.WARNING if concerns else logging.INFO, "%s", text)
        if self._meter is None:
            self._say_nothing_is_measured(run)
        return text if result.verdict == "does_not_fit" and not different else None

    def _hardware(self, run: LiveRun, request: EstimateRequest) -> tuple[Hardware, str]:
        """Return the section `hardware`: what this process can hold, and how that was read."""
        assert self._meter is not None
        look = self._meter.look()
        whole = Hardware(gpu=look.name, memory_bytes=look.total)
        peak = estimate(replace(request, hardware=whole)).peak
        # The smallest context that the estimate reckons with.
        context = peak.device_used_bytes.low - peak.reserved_bytes.low
        usable, how = device.capacity(look, context)
        own = [*weights.tensors(run.model), *_states(run.optimizer)]
        others = device.unknown_tensors(look, own, next(run.model.parameters()).device)
        if others:
            how += f"; {gib(others)} that it has allocated belong to neither model nor optimizer"
        return replace(whole, memory_bytes=usable, reserved_by_others_bytes=others), how

    def _say_nothing_is_measured(self, run: LiveRun) -> None:
        place = next(run.model.parameters()).device
        text = f"memory: the model is on {place}, which is no CUDA device: nothing is measured"
        if self._record_to is not None:
            logger.warning("%s, and nothing is recorded to %s", text, self._record_to)
        else:
            logger.info("%s", text)

    def _see(self, module: Any, args: Any, inputs: dict[str, Any]) -> None:
        """Note the shape of a batch on its way into the model."""
        tokens = inputs.get("input_ids")
        if tokens is None or not module.training or tokens.dim() != 2:
            return
        mask = inputs.get("attention_mask")
        padded = mask is not None and mask.dim() == 2 and bool((mask == 0).any())
        self._watch.shapes.append(Shape(tokens.shape[0], tokens.shape[1], padded))

    def _watches(self) -> bool:
        return (
            self._meter is not None
            and self._forecast is not None
            and self._watch.steps < self._steps
        )

    def _read(self) -> Meters:
        """Read the highest values since the last time, and begin anew."""
        assert self._meter is not None
        found = self._meter.peak()
        self._meter.reset()
        return found

    def _note(self, found: Meters) -> None:
        self.peak = _highest(self.peak, found)

    def _end_phase(self, name: str) -> None:
        if self._watches():
            found = self._read()
            self._watch.phases = (*self._watch.phases, PhasePeak(name, found))
            self._watch.whole = _highest(self._watch.whole, found)

    def _expected(self) -> Shape:
        """Return the batch that was reckoned with."""
        assert self._forecast is not None
        request = self._forecast.request
        return Shape(request.micro_batch_size, request.seq_len, request.padding)

    def _compare(self) -> None:
        """Log what was predicted and measured of the step that is over."""
        assert self._forecast is not None
        watch = self._watch
        shape = watch.last or self._expected()
        lines = self._forecast.lines(shape, watch.phases, watch.whole)
        first = "; optimizer states are made in this first step" if watch.steps == 1 else ""
        logger.info(
            "memory: step %d, %d x %d tokens%s\n%s",
            watch.steps,
            shape.rows,
            shape.seq_len,
            first,
            table(lines),
        )
        whole = next((each for each in lines if each.phase == STEP), None)
        # The estimate is of the steady step, in whose forward the optimizer states exist.
        if whole is not None and watch.steps > 1 and not whole.is_inside:
            logger.warning("memory: step %d %s", watch.steps, self._hint(whole.measured))

    def _hint(self, measured: int) -> str:
        where = self._request_to or "REQUEST.json (request_to='REQUEST.json' writes it)"
        return (
            f"read {measured} bytes, which is outside the predicted range; ask why with: "
            f"estimate reconcile --request {where} --measured {measured} --meter allocated"
        )

    def _finish(self) -> None:
        """Write what was asked for, with the largest batch that was seen."""
        assert self._forecast is not None
        assert self._meter is not None
        watch = self._watch
        shape = watch.largest or self._expected()
        request = self._forecast.request_at(shape)
        if self._request_to is not None:
            _write(self._request_to, request)
        if self._record_to is not None:
            record = self._record(request, same=shape == watch.last)
            append(self._record_to, record)
            logger.info("memory: recorded as %s in %s", record.id, self._record_to)
        self._let_go()

    def _record(self, request: EstimateRequest, *, same: bool) -> Run:
        """Return the measurement record; phases only where the last step had the largest batch."""
        assert self._meter is not None
        watch, look = self._watch, self._meter.look()
        now = datetime.now(timezone.utc)
        return Run(
            id=f"callback-{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}",
            origin=self._meter.origin,
            group=GROUP,
            request=request.to_dict(),
            outcome="ok",
            limit_bytes=look.limit,
            steps=watch.steps,
            peak=watch.peak,
            phases=watch.phases if same else (),
            step_seconds=watch.seconds,
            environment=self._meter.environment(),
            recorded_at=now.isoformat(timespec="seconds"),
        )

    def _let_go(self) -> None:
        """Take the hook off the model."""
        if self._watch.hook is not None:
            self._watch.hook.remove()
            self._watch.hook = None


def _tokens(shape: Shape) -> int:
    return shape.rows * shape.seq_len


def _states(optimizer: Any) -> list[Any]:
    """Return the tensors that an optimizer keeps already, as after a resumed checkpoint."""
    import torch

    states = getattr(optimizer, "state", {})
    return [each for state in states.values() for each in state.values() if torch.is_tensor(each)]


def _highest(first: Meters, second: Meters) -> Meters:
    """Return the higher of two readings, meter by meter."""
    return Meters(
        **{
            name: max(values)
            for name in Meters.__struct_fields__
            if (
                values := [
                    each
                    for each in (getattr(first, name), getattr(second, name))
                    if each is not None
                ]
            )
        }
    )


def _different_counts(model: Any, result: Result) -> str:
    """Say it where the estimate counts other parameters than the live model has."""
    live = weights.parameters(model)
    counted = (result.parameters.total, result.parameters.trainable)
    if live == counted:
        return ""
    return (
        f"the estimate is not of this model: it counts {counted[0]} parameters, {counted[1]} of "
        f"them trainable, and the live model has {live[0]} and {live[1]}"
    )


def _write(path: Path, request: EstimateRequest) -> None:
    """Write a request document whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(request.to_dict(), indent=2) + "\n").encode())
