"""What inductor's written code asks the allocator for (codegen/wrapper.py, AllocateLine.plan)."""

from __future__ import annotations

from estimator.dtypes import DType
from estimator.eager.size import dim
from estimator.eager.tensor import Event, Section, TensorKind
from estimator.memory.buffer_reuse import planned
from estimator.sources import Cite

MADE = Cite("torch-inductor", "scheduler.py")
CALLED = Cite("torch-derivatives", "_scaled_dot_product_efficient_attention")
HALF, WIDE, OTHER, ATTENTION = range(4)
SIZES = (100, 400, 100, 100)


def kind(name: str, dtype: DType, source: Cite = MADE) -> TensorKind:
    return TensorKind("activations", 1, name, dtype, (dim("n", 50),), source)


KINDS = (
    kind("half", DType.BFLOAT16),
    kind("wide", DType.FLOAT32),
    kind("other", DType.FLOAT16),
    kind("attention output", DType.BFLOAT16, CALLED),
)


def left(*events: Event, outside: frozenset[int] = frozenset()) -> list[Event]:
    log = planned([Section("forward", 1, events)], KINDS, SIZES, outside).log
    return [event for section in log for event in section.events]


def test_a_buffer_takes_the_place_of_the_last_one_of_its_type_and_size():
    found = left((1, HALF), (2, HALF), (1, None), (2, None), (3, HALF), (3, None))
    assert found == [(1, HALF), (2, HALF), (1, None), (2, None)]
    assert left((1, HALF), (1, None), (2, OTHER)) == [(1, HALF), (1, None), (2, OTHER)]


def test_a_buffer_is_made_anew_where_keeping_the_old_one_would_raise_the_highest_point():
    peak: list[Event] = [(2, WIDE), (2, None), (3, HALF)]
    assert left((1, HALF), (1, None), *peak) == [(1, HALF), (1, None), *peak]


def test_what_a_kernel_makes_for_itself_takes_no_place_and_leaves_one():
    found = left((1, HALF), (1, None), (2, ATTENTION), (2, None), (3, HALF))
    assert found == [(1, HALF), (1, None), (2, ATTENTION)]


def test_nothing_passes_from_the_forward_graph_to_the_backward_graph():
    forward = Section("forward", 1, ((1, HALF), (1, None)))
    backward = Section("backward", 1, ((2, HALF), (2, None)))
    assert planned([forward, backward], KINDS, SIZES, ()).log == (forward, backward)


def test_a_loss_outside_the_graphs_is_left_as_it_is():
    events: tuple[Event, ...] = ((1, HALF), (1, None), (2, HALF), (2, None))
    assert left(*events, outside=frozenset({1})) == list(events)
