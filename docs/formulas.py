"""docs/formulas.md: the engine's tables, and what running them on a model family gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Final

from estimator.catalog import Access, CatalogModel, find_model, models
from estimator.dtypes import DType
from estimator.eager import attention, ops
from estimator.eager.attention import Heads
from estimator.eager.engine import backward
from estimator.eager.size import BATCH, MONOMIALS, ONE, SEQ, Dim, Shape, dim
from estimator.eager.tensor import ENGINE, Edge, Param, Regime, Tape, Tensor, TensorKind
from estimator.memory.standing import standing, step_entries
from estimator.memory.trace import trace
from estimator.model.families import FAMILIES
from estimator.model.forward import Forward, Settings
from estimator.model.spec import Linear, Module, Norm
from estimator.optimizer import Optimizer
from estimator.render.text import thin
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.run import OptimizerChoice, Run
from estimator.techniques.methods.lora import LoraAdapter
from estimator.techniques.optimizers import OPTIMIZERS, Trained, states, temporaries
from estimator.techniques.precision import PRECISIONS
from estimator.techniques.quantizations.four_bit import FourBit

EXAMPLE: Final = "meta-llama/Llama-3.1-8B"
BF16, FP32 = DType.BFLOAT16, DType.FLOAT32
_PER_TOKEN: Final = MONOMIALS.index((1, 1, 0))

INTRODUCTION: Final = """\
# Formulas

Written by `docs/generate.py` from the tables of the estimator; a test fails when this page is out
of date. Sizes are bytes. Letters: b micro-batch, s length, h hidden size, H query heads, KV key and
value heads, d head width, f width of the feed-forward network, V vocabulary.

What a citation such as `torch-derivatives` stands for is in [sources.md](sources.md). The tables
give the parts; `estimate --explain` gives every row of one run with its numbers and its source.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join(
        (
            INTRODUCTION,
            _optimizers(),
            _precisions(),
            _quantization(),
            _operators(),
            _recipes(),
            _families(),
        )
    )


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table."""
    head = list(columns)
    cells = [[str(each).replace("|", "\\|") for each in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# -- optimizers, precisions, quantization ------------------------------------------------------

_LARGE: Final = 4096
_SMALL: Final = 1024


def _trained(dtype: DType) -> tuple[Trained, ...]:
    """Return matrices of two sizes, so that a share of all differs from one of the largest."""
    return tuple(
        Trained("linear.weight", rows * _LARGE, dtype, rows, _LARGE, keeps_32bit=False, count=3)
        for rows in (_LARGE, _SMALL)
    )


def _optimizers() -> str:
    rows = []
    for name, row in OPTIMIZERS.items():
        for implementation in row.updates:
            default = ", the default" if implementation == row.default else ""
            choice = OptimizerChoice(Optimizer(name), implementation, master_weights=False)
            kept_states = states(choice)
            kept = " + ".join(f"`{state.name}`" for state in kept_states) or "none"
            sources = [*(str(state.source) for state in kept_states), str(row.source)]
            rows.append(
                (
                    f"`{name}`",
                    f"{implementation}{default}",
                    kept,
                    *(_state_bytes(kept_states, dtype) for dtype in (BF16, FP32)),
                    _temporaries(partial(temporaries, choice)),
                    "; ".join(dict.fromkeys(sources)),
                )
            )
    matrix = _trained(FP32)[0]
    extra = [
        (
            f"`{name}`: `{state.name}`",
            _number(state.bytes(matrix) / matrix.elements),
            thin(state.bytes(matrix)),
            str(state.source),
        )
        for name, row in OPTIMIZERS.items()
        if not callable(row.states)
        for state in row.states
        if state not in states(OptimizerChoice(Optimizer(name), row.default, master_weights=False))
    ]
    return f"""\
## Optimizers

States per parameter of a {_LARGE} x {_LARGE} matrix, and what the step holds beside them at its
worst moment. States follow the type of the weight that is updated: fp32 where the optimizer
holds master copies.

{
        table(
            (
                "optimizer",
                "implementation",
                "states",
                "B per bf16 parameter",
                "B per fp32 parameter",
                "temporaries of the step",
                "source",
            ),
            rows,
        )
    }
Small tensors and embeddings have fp32 states under the 8-bit optimizers. Beside the table:

{
        table(
            ("kept with a knob", "B per fp32 parameter", f"B for {_LARGE} x {_LARGE}", "when"),
            extra,
        )
    }"""


def _state_bytes(states: Iterable[Any], dtype: DType) -> str:
    matrix = _trained(dtype)[0]
    return _number(sum(state.bytes(matrix) for state in states) / matrix.elements)


def _temporaries(peak: Callable[[tuple[Trained, ...]], tuple[int, ...]]) -> str:
    """Say what the step allocates, from what it asks for two sets of matrices."""
    said = {dtype: _share(sum(peak(_trained(dtype))), dtype) for dtype in (BF16, FP32)}
    bf16, fp32 = said[BF16], said[FP32]
    return bf16 if bf16 == fp32 else f"bf16: {bf16}; fp32: {fp32}"


def _share(size: int, dtype: DType) -> str:
    tensors = _trained(dtype)
    everything = sum(each.elements * each.count for each in tensors)
    largest = max(each.elements for each in tensors)
    if not size:
        return "none"
    if size % everything == 0:
        return f"{size // everything} B for each trained parameter"
    return f"{_number(size / largest)} B for each parameter of the largest tensor"


def _number(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _run(model: str = EXAMPLE, **fields: Any) -> Run:
    """Return the run of a catalogue model under a recipe."""
    config = find_model(model, Access.CATALOGUE).config
    return resolve(parse_request({"model": model, **fields}), config, model)


def _precisions() -> str:
    rows = []
    for name, regime in PRECISIONS.items():
        run = _run(precision=name, optimizer={"name": "adamw", "implementation": "foreach"})
        parameters = run.spec.total_parameters()
        sizes: Counter[str] = Counter()
        for entry in (*standing(run).entries, *step_entries(run)):
            row = entry.row
            part: str = "temporary" if "temporaries" in row.name else row.component
            part = "master" if "master copy" in row.name else part
            sizes[part] += row.size[0] * entry.count
        kept = ("weights", "gradients", "master", "optimizer_states")
        per = {part: sizes[part] / parameters for part in kept}
        rows.append(
            (
                f"`{name}`",
                regime.storage.label,
                regime.autocast.label if regime.autocast else "none",
                *(_number(per[part]) for part in kept),
                _number(sum(per.values())),
            )
        )
    return f"""\
## Precisions

Bytes per parameter that full fine-tuning with AdamW keeps from the second step on, gradients
at the end of the step included, as the rows of {EXAMPLE} add up.

{
        table(
            (
                "precision",
                "weights stored as",
                "autocast",
                "weights",
                "gradients",
                "fp32 master copy",
                "AdamW states",
                "sum",
            ),
            rows,
        )
    }"""


def _quantization() -> str:
    width = dim("n", _LARGE)
    linear = Linear(name="linear", fan_in=width, fan_out=width, dtype=BF16)
    parameters = _LARGE * _LARGE
    rows = []
    for double_quant in (False, True):
        label = "with" if double_quant else "without"
        parts = FourBit(double_quant, BF16, BF16).weights(linear)
        rows += [
            (
                f"{label} double quantization",
                f"`{part.name}`",
                thin(prod(each.value for each in part.shape)),
                part.dtype.label,
                thin(part.bytes),
                str(part.source),
            )
            for part in parts
        ]
        total = sum(part.bytes for part in parts)
        share = f"{_number(total / parameters)} B per parameter"
        rows.append((f"{label} double quantization", "sum", "", "", thin(total), share))
    return f"""\
## 4-bit weights

How bitsandbytes stores one {_LARGE} x {_LARGE} matrix.

{table(("layout", "tensor", "elements", "type", "bytes", "source"), rows)}"""


# -- operators ---------------------------------------------------------------------------------

_H, _O, _F, _V = dim("h", 64), dim("o", 48), dim("f", 96), dim("V", 80)
_HEADS: Final = attention.heads(8, 8, 16)
_GROUPED: Final = attention.heads(8, 2, 16)


@dataclass(frozen=True, slots=True)
class _Bench:
    """A tape, and what an operator can be called on."""

    tape: Tape
    dtype: DType

    def input(self, *dims: Dim, name: str = "input", wanted: bool = True) -> Tensor:
        """Return an activation; `wanted` says whether backward wants its gradient."""
        shape = (BATCH, SEQ, *dims)
        made = self.tape.new(name, shape, self.dtype, ENGINE)
        if wanted:
            made.edge = Edge(Param(name, shape, self.dtype, requires_grad=True))
        return made

    def weight(self, *dims: Dim, name: str = "weight", trainable: bool = True) -> Param:
        """Return a parameter."""
        return Param(name, dims, self.dtype, trainable)

    def heads(self, which: Heads) -> tuple[Tensor, Tensor, Tensor, Heads]:
        """Return query, key and value as projections give them."""
        query = self.input(which.query, which.width, name="query")
        key, value = (
            self.input(which.key_value, which.width, name=name) for name in ("key", "value")
        )
        return query, key, value, which

    def forward(self, *modules: Module) -> Forward:
        """Return what runs these modules by name."""
        forward = Forward(self.tape, _run().spec, Settings(), self.dtype)
        forward.enter(self.tape.site, modules)
        return forward

    def mask(self, dtype: DType) -> Tensor:
        """Return an attention mask."""
        return self.tape.new("mask", attention.MASK, dtype, ENGINE)

    def ids(self) -> Tensor:
        """Return token ids or labels."""
        return self.tape.new("ids", (BATCH, SEQ), DType.INT64, ENGINE)


@dataclass(frozen=True, slots=True)
class _Case:
    """One operator, or a few that belong together, as it is shown."""

    label: str
    run: Callable[[_Bench], Tensor]
    dtype: DType = BF16
    autocast: DType | None = None


def _linear(bench: _Bench, *, trainable: bool = True) -> Tensor:
    weight = bench.weight(_O, _H, trainable=trainable)
    return ops.linear(bench.input(_H), weight, None, _O)


def _four_bit(bench: _Bench) -> Tensor:
    linear = Linear(name="linear", fan_in=_H, fan_out=_O, format=FourBit(True, BF16, BF16))
    return bench.forward(linear).linear(bench.input(_H), "linear")


def _lora(bench: _Bench) -> Tensor:
    linear = Linear(
        name="linear",
        fan_in=_H,
        fan_out=_O,
        dtype=bench.dtype,
        trainable=False,
        adapter=LoraAdapter(r=4, dropout=0.0, dtype=FP32),
    )
    return bench.forward(linear).linear(bench.input(_H), "linear")


def _rms_norm(bench: _Bench, *, trainable: bool = True) -> Tensor:
    norm = Norm(name="norm", width=_H, dtype=bench.dtype, trainable=trainable)
    return bench.forward(norm).rms_norm(bench.input(_H), "norm")


def _rotary(bench: _Bench) -> Tensor:
    query, key, _, heads = bench.heads(_HEADS)
    forward = bench.forward()
    forward.prepare_rotary(heads.width.value)
    rotated, _ = forward.rotate(query, key)
    return rotated


CASES: Final = (
    _Case("cast to fp32", lambda on: ops.cast(on.input(_H), FP32)),
    _Case("SiLU", lambda on: ops.silu(on.input(_F))),
    _Case("GELU", lambda on: ops.gelu(on.input(_F))),
    _Case("ReLU", lambda on: ops.relu(on.input(_F))),
    _Case("tanh", lambda on: ops.tanh(on.input(_H))),
    _Case("negation", lambda on: ops.neg(on.input(_H))),
    _Case("times a number", lambda on: ops.scale(on.input(_H))),
    _Case("plus a number", lambda on: ops.shift(on.input(_H))),
    _Case("power", lambda on: ops.power(on.input(_H)), FP32),
    _Case("reciprocal root", lambda on: ops.rsqrt(on.input(ONE)), FP32),
    _Case("mean of the last dimension", lambda on: ops.mean_last(on.input(_H)), FP32),
    _Case("product of two activations", lambda on: ops.mul(on.input(_F), on.input(_F, name="up"))),
    _Case("product with a weight", lambda on: ops.mul(on.weight(_H), on.input(_H))),
    _Case(
        "product with a frozen weight",
        lambda on: ops.mul(on.weight(_H, trainable=False), on.input(_H)),
    ),
    _Case("sum of two activations", lambda on: ops.add(on.input(_H), on.input(_H, name="other"))),
    _Case("dropout", lambda on: ops.dropout(on.input(_H), 0.1)),
    _Case("contiguous copy", lambda on: ops.copy(on.input(_H))),
    _Case("slice", lambda on: ops.narrow(on.input(_H), _O)),
    _Case("concatenation", lambda on: ops.cat_last((on.input(_H), on.input(_O, name="b")), _F)),
    _Case("linear", _linear),
    _Case("linear, frozen weight", lambda on: _linear(on, trainable=False)),
    _Case("linear under autocast", _linear, FP32, BF16),
    _Case("linear, 4-bit weight", _four_bit),
    _Case("linear, frozen, with a LoRA adapter in fp32", _lora),
    _Case(
        "LayerNorm",
        lambda on: ops.layer_norm(on.input(_H), on.weight(_H), on.weight(_H, name="bias")),
    ),
    _Case(
        "LayerNorm under autocast", lambda on: ops.layer_norm(on.input(_H), None, None), BF16, BF16
    ),
    _Case("RMSNorm", _rms_norm),
    _Case("RMSNorm, frozen weight", lambda on: _rms_norm(on, trainable=False)),
    _Case("rotary positions", _rotary),
    _Case("softmax in fp32", lambda on: ops.softmax(on.input(_HEADS.query, SEQ), FP32)),
    _Case("FlashAttention", lambda on: attention.flash(*on.heads(_HEADS))),
    _Case("FlashAttention, grouped heads", lambda on: attention.flash(*on.heads(_GROUPED))),
    _Case(
        "memory-efficient attention with a mask",
        lambda on: _efficient(on, on.mask(DType.BOOL)),
    ),
    _Case("attention in separate operators", lambda on: _eager(on, on.mask(on.dtype))),
    _Case("embedding", lambda on: ops.embedding(on.ids(), on.weight(_V, _H), _H)),
    _Case("log-softmax", lambda on: ops.log_softmax(on.input(_V)), FP32),
    _Case("negative log-likelihood", lambda on: ops.nll_loss(on.input(_V), on.ids()), FP32),
)


def _efficient(bench: _Bench, mask: Tensor) -> Tensor:
    query, key, value, heads = bench.heads(_HEADS)
    return attention.efficient(query, key, value, mask, heads)


def _eager(bench: _Bench, mask: Tensor) -> Tensor:
    query, key, value, heads = bench.heads(_HEADS)
    out, _ = attention.eager(query, key, value, mask, heads)
    return out


def _operators() -> str:
    rows = [(_label(case), *_observed(case)) for case in CASES]
    return f"""\
## Operators

What an operator keeps for backward and what its backward allocates, one after another or at once,
as running it shows. Views cost nothing and are left out, and so are parameters, which are there
anyway. For more than 3072 tokens in several rows; inputs want a gradient.

{table(("operator", "result", "saved for backward", "allocated in backward", "source"), rows)}"""


def _label(case: _Case) -> str:
    return f"{case.label} ({case.dtype.label})"


class _CountingTape(Tape):
    """A tape that remembers every birth."""

    def __init__(self, autocast: DType | None) -> None:
        self.births: list[int] = []
        super().__init__(autocast)

    def born(self, kind: int) -> int:
        self.births.append(kind)
        return super().born(kind)


def _observed(case: _Case) -> tuple[str, str, str, str]:
    """Run an operator with nothing but its graph left alive, then its backward."""
    tape = _CountingTape(case.autocast)
    tape.autocast_enabled = case.autocast is not None
    out = case.run(_Bench(tape, case.dtype))
    assert out.storage is not None
    assert out.edge is not None
    kind = tape.kinds[out.storage.kind]
    graph = Tensor(tape, out.shape, out.dtype, None, out.edge)
    del out
    tape.cast_cache.clear()
    saved = [tape.kinds[each] for each, count in tape.live.items() for _ in range(count)]
    tape.births.clear()
    backward(graph)
    # The first is the gradient that comes in: another operator's backward allocates it.
    made = [tape.kinds[each] for each in tape.births[1:]]
    is_view = kind.source is ENGINE
    return (
        "a view" if is_view else _shown(kind),
        _listed((kind.name, _shown(kind)) for kind in saved),
        _listed((_told(kind), _shown(kind)) for kind in made),
        str(made[0].source if is_view else kind.source),
    )


def _told(kind: TensorKind) -> str:
    """Name what backward makes where the name says something: gradients and workspaces."""
    if kind.component == "workspace":
        return kind.name.rpartition(": ")[2]
    return f"gradient of {kind.name.split('.')[-2]}" if kind.component == "gradients" else ""


def _listed(named: Iterable[tuple[str, str]]) -> str:
    counts = Counter(f"{name} {shown}".strip() for name, shown in named)
    return ", ".join(f"{n} x {each}" if n > 1 else each for each, n in counts.items()) or "nothing"


def _shown(kind: TensorKind) -> str:
    return f"{_letters(kind.shape)} x {kind.dtype.width} B"


def _letters(shape: Shape) -> str:
    return f"[{', '.join(each.letter for each in shape)}]"


# -- layers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """What one inner layer keeps until its backward.

    Args:
        kinds: each kind of tensor and how many of it are alive.
    """

    name: str
    kinds: tuple[tuple[TensorKind, int], ...]

    def bytes_per_token(self) -> dict[int, int]:
        """Sum the bytes by the power of the length that a token pays, 0 or 1."""
        total: Counter[int] = Counter()
        for kind, count in self.kinds:
            coefficient, index = kind.size
            batch, length, _ = MONOMIALS[index]
            if batch:
                total[length - 1] += coefficient * count
        return dict(total)

    def once(self) -> int:
        """Sum the bytes that do not depend on the batch, such as cast weights."""
        return sum(
            kind.size[0] * count for kind, count in self.kinds if not MONOMIALS[kind.size[1]][0]
        )

    def closed_form(self) -> str:
        """Write the bytes per token in letters."""
        terms: Counter[str] = Counter()
        for kind, count in self.kinds:
            if MONOMIALS[kind.size[1]][0]:
                terms[_product(kind.shape)] += kind.dtype.width * count
        return " + ".join(_term(terms[letters], letters) for letters in sorted(terms, key=_place))


_FIRST: Final = ("h", "H·d", "KV·d", "f")


def _place(letters: str) -> tuple[bool, bool, int, str]:
    """Order terms as papers do: widths first, then heads, what grows with the length, the rest."""
    known = _FIRST.index(letters) if letters in _FIRST else len(_FIRST)
    return letters == "", letters.endswith("s"), known, letters


def _term(factor: int, letters: str) -> str:
    if not letters:
        return str(factor)
    return f"{factor}·({letters})" if letters[0].isdigit() else f"{factor}·{letters}"


def _product(shape: Shape) -> str:
    """Name the size of a shape without its batch and its first length.

    Example:
        >>> _product((BATCH, SEQ, dim("H", 8), dim("d", 16)))
        'H·d'
    """
    letters = [each.letter for each in shape if each not in (BATCH, ONE)]
    letters.remove("s")
    return "·".join(letters)


def layers(run: Run) -> tuple[Layer, ...]:
    """Return the inner layers of a model, one of each kind."""
    seen = trace(run, Regime())
    inner = dict.fromkeys(seen.chain[1:-1])
    return tuple(
        Layer(
            seen.sites[site],
            tuple(
                (seen.kinds[kind], count)
                for kind, count in seen.backward_saved.items()
                if seen.kinds[kind].site == site and seen.kinds[kind].component == "activations"
            ),
        )
        for site in inner
    )


RECIPES: Final[dict[str, Mapping[str, Any]]] = {
    "full, bf16": {},
    "full, fp32": {"precision": "fp32"},
    "full, amp_bf16": {"precision": "amp_bf16"},
    "full, bf16, padded batch": {"padding": True},
    "full, bf16, eager attention": {"attention": "eager"},
    "full, bf16, full checkpointing": {"activation_checkpointing": "full"},
    "full, amp_bf16, full checkpointing": {
        "precision": "amp_bf16",
        "activation_checkpointing": "full",
    },
    "LoRA r=16 on q_proj and v_proj, bf16": {
        "method": {"name": "lora", "target_modules": ["q_proj", "v_proj"]}
    },
    "LoRA r=16, all-linear, bf16, fp32 adapters": {"method": "lora"},
    "LoRA r=16, all-linear, bf16, bf16 adapters": {
        "method": {"name": "lora", "adapter_dtype": "base"}
    },
    "QLoRA r=16, all-linear, prepared, autocast": {"method": "qlora", "autocast": "bf16"},
    "QLoRA r=16, all-linear, not prepared, autocast": {
        "method": "qlora",
        "autocast": "bf16",
        "quantization": {"name": "nf4", "prepare_kbit": False},
    },
}


def _recipes() -> str:
    rows = []
    for label, recipe in RECIPES.items():
        (layer,) = layers(_run(**recipe))
        rows.append((label, f"`{layer.closed_form()}`", *_amounts(layer)))
    return f"""\
## One layer under different recipes

What one inner layer of {EXAMPLE} keeps until its backward, for each token. Under
autocast the half-precision copies of its weights are kept beside it, once.

{table(("recipe", "bytes per token", f"for {EXAMPLE}", "once per layer"), rows)}"""


def _amounts(layer: Layer) -> tuple[str, str]:
    per_token = layer.bytes_per_token()
    said = [thin(per_token.get(0, 0))]
    if per_token.get(1):
        said.append(f"{thin(per_token[1])} s")
    return " + ".join(said), thin(layer.once())


def examples() -> dict[str, CatalogModel]:
    """Return one catalogue model for each family: the smallest, but the one above for Llama."""
    chosen: dict[str, CatalogModel] = {}
    for model in sorted(models(), key=lambda each: (each.parameters.computed, each.id)):
        if model.family in FAMILIES and (model.family not in chosen or model.id == EXAMPLE):
            chosen[model.family] = model
    return {family: chosen[family] for family in sorted(chosen)}


def _families() -> str:
    parts = [
        """\
## One layer of each family

What one inner layer keeps until its backward: full fine-tuning in bf16 with `sdpa`, no padding, no
checkpointing, dropout as in the configuration. No formula here was written down: each is the sum of
the rows below it, which running the family's layers on the operators above leaves alive.
"""
    ]
    for family, model in examples().items():
        run = _run(model.id)
        for layer in layers(run):
            parts.append(_family(family, model.id, layer, run))
    return "\n".join(parts)


def _family(family: str, model_id: str, layer: Layer, run: Run) -> str:
    sizes: Counter[tuple[str, str, str]] = Counter()
    factors: Counter[tuple[str, str, str]] = Counter()
    for kind, count in layer.kinds:
        row = (kind.name, _shown(kind), str(kind.source))
        coefficient, index = kind.size
        sizes[row] += coefficient * count
        factors[row] = index
    rows = [
        (name, shown, _per_token(size, factors[name, shown, source]), source)
        for (name, shown, source), size in sizes.most_common()
    ]
    per_token, once = _amounts(layer)
    beside = f", and {once} bytes once" if once != "0" else ""
    shape = ", ".join(f"{each.letter} = {each.value}" for each in _dims(layer))
    return f"""\
### {family}: {layer.name} of {model_id}

`{layer.closed_form()}` = {per_token} bytes per token{beside}, with {shape}.

{table(("tensor", "shape and width", "bytes per token", "source"), rows)}"""


def _per_token(size: int, index: int) -> str:
    batch, length, _ = MONOMIALS[index]
    shown = thin(size)
    if not batch:
        return f"{shown} once" if not length else f"{shown}{' s' * length} once"
    return shown if index == _PER_TOKEN else f"{shown} s"


def _dims(layer: Layer) -> tuple[Dim, ...]:
    """Return the dimensions of a layer's tensors, each once."""
    found = dict.fromkeys(each for kind, _ in layer.kinds for each in kind.shape)
    return tuple(each for each in found if each not in (BATCH, SEQ, ONE))
