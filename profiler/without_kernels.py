"""Libraries of Triton kernels where there is no GPU: their Python runs, their kernels do not.

What such a library allocates, saves and frees is written in Python around its kernels: an autograd
function makes its outputs and then launches a kernel that fills them. So the library's own code is
run here, with a stand-in for Triton whose launches do nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any, Final
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from estimator.errors import MissingDependencyError

# Packages that these libraries import for other work than a training step.
_UNUSED: Final = ("pandas", "datasets")


class Library:
    """A library in this process's own copy, made with the stand-in for Triton.

    Args:
        package: what the library is imported as.
        modules: dotted names below the package that are needed.
    """

    def __init__(self, package: str, modules: tuple[str, ...]) -> None:
        missing = [name for name in _UNUSED if importlib.util.find_spec(name) is None]
        self._package = package
        self._finder = _Finder(("triton", *missing))
        self._own: dict[str, ModuleType] = {}
        # Libraries name the back ends that they do not find; none is looked for here.
        logging.getLogger(package).setLevel(logging.ERROR)
        with self.present():
            for name in modules:
                importlib.import_module(f"{package}.{name}")

    def __getitem__(self, name: str) -> Any:
        return self._own[f"{self._package}.{name}"]

    def holding(self, name: str) -> list[ModuleType]:
        """Return the library's modules that have a global of this name."""
        return [each for each in self._own.values() if name in vars(each)]

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Let this copy be what is imported; other copies come back at the end."""
        names = (self._package, *self._finder.packages)
        others = {each: module for each, module in sys.modules.items() if _is_of(each, names)}
        for each in others:
            del sys.modules[each]
        sys.modules.update(self._own)
        sys.meta_path.insert(0, self._finder)
        try:
            # `torch.compile` would compile for a device that is not there.
            with (
                mock.patch.object(torch, "compile", _uncompiled),
                mock.patch.object(torch.compiler, "disable", _uncompiled),
                mock.patch("transformers.utils.is_triton_available", _is_there),
            ):
                yield
        finally:
            sys.meta_path.remove(self._finder)
            self._own = {
                each: sys.modules[each] for each in list(sys.modules) if _is_of(each, names)
            }
            for each in self._own:
                del sys.modules[each]
            sys.modules.update(others)


class Installed:
    """A library as it is installed, kernels and all, for tensors that have values.

    Args:
        package: what the library is imported as.
        modules: dotted names below the package that are needed.

    Raises:
        MissingDependencyError: something that the library imports is not installed.
    """

    def __init__(self, package: str, modules: tuple[str, ...]) -> None:
        self._package = package
        try:
            for name in modules:
                importlib.import_module(f"{package}.{name}")
        except ImportError as error:
            raise MissingDependencyError(f"{package} cannot be imported: {error}") from error

    def __getitem__(self, name: str) -> Any:
        return importlib.import_module(f"{self._package}.{name}")

    def holding(self, name: str) -> list[ModuleType]:
        """Return the library's imported modules that have a global of this name."""
        found = [each for key, each in sys.modules.items() if _is_of(key, (self._package,))]
        return [each for each in found if name in vars(each)]

    def present(self) -> contextlib.AbstractContextManager[None]:
        """Change nothing: it is what is imported anyway."""
        return contextlib.nullcontext()


@cache
def library(package: str, *modules: str, fake: bool = True) -> Library | Installed:
    """Import a library: for fake tensors without its kernels, for a device as it is.

    Raises:
        MissingDependencyError: the library is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"this request needs {package!r}, which is not installed; "
            f"run: pip install --no-deps {package.replace('_', '-')}"
        )
    return Library(package, modules) if fake else Installed(package, modules)


class OnCuda(TorchFunctionMode):  # type: ignore[misc]  # torch is not typed here
    """Let tensors tell a library that they lie on a GPU, where it chooses its path by that.

    Args:
        package: the library; nobody else is told so.
        compute_capability: of the GPU.
    """

    def __init__(self, package: str, compute_capability: tuple[int, int]) -> None:
        super().__init__()
        self._package = package
        self._patches = contextlib.ExitStack()
        self._capability = compute_capability

    def __enter__(self) -> Any:
        enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
        for owner, name, answer in (
            (FakeTensor, "device", property(self._device)),
            (torch.cuda, "get_device_capability", lambda *_: self._capability),
            (torch, "is_autocast_enabled", lambda *_: enabled("cpu")),
            (torch, "get_autocast_dtype", lambda *_: dtype("cpu")),
            # A gradient of the loss that is not 1 is multiplied in, by a kernel, in place.
            (torch, "equal", lambda *_: False),
        ):
            self._patches.enter_context(mock.patch.object(owner, name, answer))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def _device(self, tensor: FakeTensor) -> torch.device:
        if _is_of(sys._getframe(1).f_globals["__name__"], (self._package,)):
            return torch.device("cuda", 0)
        return torch.device("meta") if tensor.fake_mode.in_kernel_invocation else tensor.fake_device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.addmm and "out" in kwargs:
            # In place, and into another type than that of the factors: cuBLAS does, CPU does not.
            return kwargs["out"]
        moved = [torch.device("cpu") if isinstance(each, torch.device) else each for each in args]
        if isinstance(kwargs.get("device"), torch.device):
            kwargs["device"] = torch.device("cpu")
        return func(*moved, **kwargs)


def _is_of(name: str, packages: tuple[str, ...]) -> bool:
    return name.partition(".")[0] in packages


def _is_there(*_: Any, **__: Any) -> bool:
    return True


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return function if function is not None else _uncompiled


class _Finder:
    """Finds a stand-in for every module of some packages."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not _is_of(name, self.packages):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave a stand-in empty: it makes what it is asked for."""


class _Module(ModuleType):
    """A module that has everything."""

    __version__ = "3.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _FUNCTIONS.get(name, _Anything)


class _Everything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _Anything(metaclass=_Everything):
    """What the code of a kernel refers to; nobody runs it."""

    def __init__(self, value: Any = None, *_: Any, **__: Any) -> None:
        # `tl.constexpr` carries a number.
        self.value = value

    def all_kwargs(self) -> dict[str, Any]:
        """Return nothing: a `triton.Config` tunes no kernel here."""
        return {}


class _Kernel:
    """A kernel whose launch does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn = function

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *_: Any, **__: Any) -> None:
        """Fill what the caller allocated: it holds no values here."""


def _jit(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return _Kernel(function) if function is not None else _jit


def _tuned(*_: Any, **__: Any) -> Callable[[Any], Any]:
    """Stand for a decorator that tunes a kernel."""
    return lambda kernel: kernel


def _cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


_FUNCTIONS: Final[dict[str, Any]] = {
    "jit": _jit,
    "autotune": _tuned,
    "heuristics": _tuned,
    "cdiv": _cdiv,
    "next_power_of_2": _next_power_of_2,
}
