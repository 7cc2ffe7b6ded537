"""A device of real tensors in host memory: everything that a GPU runs but torch.cuda itself."""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from estimator.record import Environment, Meters
from estimator.request import EstimateRequest
from profiler import real_run


class Host:
    """Counts the bytes of every storage that an operator returns, for as long as it lives."""

    name = "cpu"
    origin = "simulated"
    capability = (8, 0)
    multiprocessors = 108

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.idle_bytes: int | None = None
        self.live = self.peak = 0
        self.seen: dict[int, weakref.ref[Any]] = {}
        self.limit = fails_at
        self.ids: list[torch.Tensor] = []

    def check(self) -> None: ...

    @contextlib.contextmanager
    def prepared(self, request: EstimateRequest, config: dict[str, Any]) -> Any:
        with real_run.prepared(request, config, self) as train:

            def counted(gauge: Any, steps: int) -> None:
                with _Counting(self):
                    train(gauge, steps)

            yield counted

    def open(self, limit_bytes: int | None) -> None:
        self.limit = limit_bytes

    def meters(self) -> Meters:
        return Meters(allocated_bytes=self.peak)

    def reset_peaks(self) -> None:
        self.peak = self.live

    def synchronize(self) -> None: ...

    def ran_out(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)

    def record_history(self) -> None: ...

    def write_history(self, path: Path) -> None: ...

    def bench(self) -> Any:
        raise NotImplementedError

    def environment(self) -> Environment:
        return Environment(gpu="host")

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen or not storage.nbytes():
            return
        size = storage.nbytes()

        def died(_: Any) -> None:
            self.seen.pop(key, None)
            self.live -= size

        self.seen[key] = weakref.ref(storage, died)
        self.live += size
        self.peak = max(self.peak, self.live)
        if self.limit is not None and self.live > self.limit:
            raise MemoryError("no room")


class _Counting(TorchDispatchMode):
    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.embedding.default:
            self.host.ids.append(args[1])
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor):
                self.host.add(each)
        return out
