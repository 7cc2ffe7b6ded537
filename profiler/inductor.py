"""torch.compile where there is no GPU: inductor's own code for CUDA, run without its kernels.

Dynamo, AOTAutograd, the min-cut partitioner and inductor run as they are. Inductor is told that
its graphs lie on a GPU, and writes the Python around its Triton kernels as it would there: which
buffers are made, which are used again, which are let go and when. That Python is then run, with
kernels that do nothing, so every buffer of the compiled step is made and freed in its order.

What needs a GPU is left out: kernels are not tuned, so a padded or a templated matrix product that
would win a race is never taken (`pad_mm`, `max_autotune`).
"""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten

_CUDA: Final = torch.device("cuda", 0)
_STATE_BYTES: Final = 16
# What inductor asks about an A100 when it splits reductions; of another GPU only these differ.
_PROPERTIES: Final = {
    "name": "imitated", "total_memory": 80 * 2**30, "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024, "regs_per_multiprocessor": 65536, "warp_size": 32,
    "shared_memory_per_block": 49152, "shared_memory_per_block_optin": 166912,
    "L2_cache_size": 40 * 2**20, "gcnArchName": "",
}  # fmt: skip


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Let whatever is compiled meanwhile be compiled afresh, and forgotten afterwards."""
    from torch._functorch import config as functorch

    torch._dynamo.reset()
    try:
        with (
            functorch.patch(enable_autograd_cache=False),
            # A step is compiled once for each of a few layers: their number must not stop it.
            torch._dynamo.config.patch(cache_size_limit=64),
        ):
            yield
    finally:
        torch._dynamo.reset()


class Backend:
    """The backend `inductor` for a GPU that is not there."""

    def __init__(self, compute_capability: tuple[int, int], multiprocessors: int) -> None:
        self._gpu = (compute_capability, multiprocessors)

    def __call__(self, graph: Any, inputs: Sequence[Any]) -> Any:
        """Compile one graph of dynamo's."""
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs, inner_compile=functools.partial(_compiled, self._gpu))


def _compiled(
    gpu: tuple[tuple[int, int], int], graph: Any, inputs: Sequence[Any], **kwargs: Any
) -> Callable[[list[Any]], Any]:
    """Return what runs one forward or backward graph (`compile_fx_inner`)."""
    from torch._dynamo.utils import count_calls
    from torch._functorch.aot_autograd import make_boxed_func

    if count_calls(graph.graph) == 0:
        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]
    with _disable_current_modes(), torch.no_grad(), _gpu(*gpu):
        is_backward, is_inference = (
            bool(kwargs.get(name)) for name in ("is_backward", "is_inference")
        )
        source = _code(graph, inputs, is_backward, is_inference)
        call = _runnable(source)
    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _code(graph: Any, inputs: Sequence[Any], is_backward: bool, is_inference: bool) -> str:
    """Return the Python that inductor writes for a graph (`_InProcessFxCompile`)."""
    from torch._guards import detect_fake_mode
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    view_to_reshape(graph)
    compile_fx._recursive_record_original_output_strides(graph)
    # These passes run operators on the nodes' values, which only works for values on the CPU.
    with V.set_fake_mode(detect_fake_mode(inputs)):
        compile_fx._recursive_post_grad_passes(graph, is_inference=is_inference)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with V.set_fake_mode(mode):
        values = _on_cuda(graph, mode)
        lowering = GraphLowering(
            graph,
            example_inputs=values,
            is_backward=is_backward,
            is_inference=is_inference,
        )
        with (
            V.set_graph_handler(lowering),
            V.set_extern_kernel_nodes([]),
            V.set_debug_handler(DebugContext()),
        ):
            lowering.run(*values)
            return str(lowering.codegen()[0].value)


def _on_cuda(graph: Any, mode: FakeTensorMode) -> list[Any]:
    """Say of every value in a graph that it lies on the GPU; return the inputs."""
    made: dict[int, tuple[Any, Any]] = {}

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in made:
            meta = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="meta"
            )
            # The old value is kept, so that its id is not given to another one.
            made[id(value)] = (FakeTensor(mode, meta, _CUDA), value)
        return made[id(value)][0]

    for node in graph.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(moved, node.meta["val"])
        node.args = tuple(_CUDA if isinstance(each, torch.device) else each for each in node.args)
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": _CUDA}
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


# -- running what inductor wrote ---------------------------------------------------------------


def _runnable(source: str) -> Callable[[list[Any]], Any]:
    """Return `call` of a module that inductor wrote, with kernels that do nothing."""
    module = ast.parse(source)
    kept: list[ast.stmt] = []
    names: dict[str, Any] = dict(_NAMES)
    for statement in module.body:
        if not isinstance(statement, ast.Assign):
            if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
                kept.append(statement)
            continue
        target = statement.targets[0]
        if not isinstance(target, ast.Name):
            continue
        if _is_kernel(statement.value):
            names[target.id] = _NOTHING
        elif target.id in ("runner", "call"):
            kept.append(statement)
    # What inductor wrote is what it runs itself.
    exec(compile(ast.Module(kept, []), "<inductor>", "exec"), names)  # noqa: S102
    call: Callable[[list[Any]], Any] = names["call"]
    return lambda args: call(args)


def _is_kernel(value: ast.expr) -> bool:
    """Whether a value is `async_compile.triton(...)`."""
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and isinstance(value.func.value, ast.Name)
        and value.func.value.id == "async_compile"
    )


def _empty(shape: Sequence[int], stride: Sequence[int], dtype: Any) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype)


def _view(tensor: torch.Tensor, shape: Any, stride: Any, offset: int = 0) -> torch.Tensor:
    """View a buffer as another (`reinterpret_tensor`): offsets count in its own elements."""
    return torch.as_strided(tensor, shape, stride, tensor.storage_offset() + offset)


class _Extern:
    """`extern_kernels`: cuBLAS through the operators that write into a given tensor."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name == "_mm_plus_mm":
            return self._mm_plus_mm
        operator = getattr(aten, name)
        return functools.partial(self._call, operator)

    @staticmethod
    def _call(operator: Any, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        return operator.out(*args, out=out, **kwargs) if out is not None else operator(*args)

    @staticmethod
    def _mm_plus_mm(a: Any, b: Any, c: Any, d: Any, out: Any) -> Any:
        aten.mm.out(a, b, out=out)
        return aten.addmm.out(out, c, d, out=out)


class _Cuda:
    """`torch.cuda` to the written code."""

    @staticmethod
    def _DeviceGuard(_: int) -> Any:  # noqa: N802
        return contextlib.nullcontext()

    @staticmethod
    def set_device(_: int) -> None:
        """Do nothing: there is none."""


class _HigherOrder:
    """Operators around operators: the seed and the offset of attention's random numbers.

    CUDA keeps these 16 bytes in host memory; too few to tell them apart here.
    """

    @staticmethod
    def run_and_save_rng_state(operator: Any, *args: Any, **kwargs: Any) -> Any:
        return torch.empty(_STATE_BYTES, dtype=torch.uint8), operator(*args, **kwargs)

    @staticmethod
    def run_with_rng_state(_: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        return operator(*args, **kwargs)


class _Ops:
    """`torch.ops` to the written code."""

    higher_order = _HigherOrder

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops, name)


class _Torch:
    """`torch` to the written code: as it is, but for the device."""

    cuda, ops = _Cuda, _Ops()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _nothing(*_: Any, **__: Any) -> int:
    return 0


_NOTHING: Final = SimpleNamespace(run=_nothing)
_NAMES: Final[dict[str, Any]] = {
    "torch": _Torch(),
    "aten": aten,
    "inductor_ops": torch.ops.inductor,
    "device": lambda *_, **__: torch.device("cpu"),
    "extern_kernels": _Extern(),
    "empty_strided_cuda": _empty,
    "reinterpret_tensor": _view,
    "assert_size_stride": _nothing,
    "assert_alignment": _nothing,
    "get_raw_stream": _nothing,
    "inf": float("inf"),
    "nan": float("nan"),
}


# -- a GPU that is not there -------------------------------------------------------------------


@contextlib.contextmanager
def _gpu(compute_capability: tuple[int, int], multiprocessors: int) -> Iterator[None]:
    """Answer inductor's questions about its GPU, and about Triton, whose kernels nobody runs."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch._inductor.runtime.hints import DeviceProperties

    major, minor = compute_capability
    properties = SimpleNamespace(
        **_PROPERTIES, major=major, minor=minor, multi_processor_count=multiprocessors
    )
    described = DeviceProperties(
        type="cuda", index=0, multi_processor_count=multiprocessors, cc=10 * major + minor,
        major=major, regs_per_multiprocessor=properties.regs_per_multiprocessor,
        max_threads_per_multi_processor=properties.max_threads_per_multi_processor,
        max_threads_per_block=properties.max_threads_per_block, warp_size=properties.warp_size,
    )  # fmt: skip
    answers: tuple[tuple[Any, str, Any], ...] = (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_rng_state", lambda *_: torch.empty(16, dtype=torch.uint8)),
        (torch.cuda, "get_device_capability", lambda *_: compute_capability),
        (torch.cuda, "get_device_properties", lambda *_: properties),
        (DeviceProperties, "create", staticmethod(lambda _: described)),
        (CudaInterface, "get_device_properties", staticmethod(lambda *_: properties)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 10 * major + minor)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: properties)),
        (CudaInterface.Worker, "current_device", staticmethod(lambda *_: 0)),
        (torch.utils._triton, "triton_hash_with_backend", lambda: ""),
        (scheduler, "has_triton", lambda *_: True),
    )
    with contextlib.ExitStack() as patches:
        for owner, name, answer in answers:
            patches.enter_context(mock.patch.object(owner, name, answer))
        yield
