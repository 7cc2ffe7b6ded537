"""The command line's flags: one for every field of the request, read from the request's own models.

Types, choices and defaults come from `request.py`; this file adds only the name of the flag, its
place in the help and one line of text. The profiler's commands take the same flags from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import groupby
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin

import click
import msgspec
from click.core import ParameterSource
from msgspec import NODEFAULT, Struct, structs

from estimator.errors import InvalidRequestError, did_you_mean
from estimator.request import (
    METHOD_ALIASES,
    METHODS,
    EstimateRequest,
    InlineModel,
    expand_short_forms,
    parse_request,
)
from estimator.section import Section
from estimator.units import MiB, parse_size

if TYPE_CHECKING:
    # Newer versions of click have generic types here, older ones at run time do not.
    ParamType = click.ParamType[Any, Any]
    ChoiceType = click.Choice[str]
else:
    ParamType = click.ParamType
    ChoiceType = click.Choice


class Flag(Struct, frozen=True):
    """A flag, the JSON pointer of the field that it sets, and its line in the help."""

    option: str
    pointer: str
    help: str

    @property
    def parameter(self) -> str:
        """The name that click gives to the value."""
        return self.option.removeprefix("--").replace("-", "_")


_DECLARED: Final[dict[str, tuple[Flag, ...]]] = {
    "Model and task": (
        Flag("--model", "/model", "Name in the catalogue, Hub id, folder or config.json."),
        Flag("--task", "/task", "What the model is trained for."),
    ),
    "Method": (
        Flag("--method", "/method/name", "Train all weights, or adapters (qlora: over nf4)."),
        Flag("--lora-r", "/method/r", "Rank of the adapters."),
        Flag("--lora-alpha", "/method/lora_alpha", "Scale of the adapters; costs no memory."),
        Flag("--lora-dropout", "/method/lora_dropout", "Dropout before the adapters."),
        Flag("--target-modules", "/method/target_modules", "all-linear, or names: q_proj,v_proj."),
        Flag("--modules-to-save", "/method/modules_to_save", "Modules trained in full: lm_head."),
        Flag("--lora-bias", "/method/bias", "Which biases are trained."),
        Flag("--adapter-dtype", "/method/adapter_dtype", "Type of the adapters; PEFT: float32."),
        Flag("--quantization", "/quantization/name", "How the frozen base weights are stored."),
        Flag("--double-quant", "/quantization/double_quant", "Quantize the scales as well."),
        Flag("--compute-dtype", "/quantization/compute_dtype", "Type of 4-bit multiplications."),
        Flag("--prepare-kbit", "/quantization/prepare_kbit", "PEFT's k-bit preparation step."),
    ),
    "Precision and optimizer": (
        Flag("--precision", "/precision", "Storage of the weights; amp_*: fp32 with autocast."),
        Flag("--autocast", "/autocast", "Autocast over stored weights: Trainer's bf16=True."),
        Flag("--fp8", "/fp8/name", "Products of linear layers in 8-bit floats, by which library."),
        Flag("--qat", "/qat/name", "Train weights that are rounded on the way (QAT)."),
        Flag("--optimizer", "/optimizer/name", "Our name or that of TrainingArguments.optim."),
        Flag(
            "--optimizer-implementation",
            "/optimizer/implementation",
            "Variant; none: torch's own choice.",
        ),
        Flag("--momentum", "/optimizer/momentum", "Momentum of SGD."),
        Flag("--optimizer-in-backward", "/optimizer/in_backward", "Step inside the backward."),
    ),
    "Batch": (
        Flag("--micro-batch-size", "/micro_batch_size", "Sequences per GPU and forward."),
        Flag("--seq-len", "/seq_len", "Tokens in the longest sequence."),
        Flag(
            "--sample-lengths",
            "/sample_lengths",
            "Tokens of samples, padded to the longest of a batch: 80,310,2048. "
            "The seq-len alone: all batches are of that length.",
        ),
        Flag("--gradient-accumulation-steps", "/gradient_accumulation_steps", "Forwards per step."),
        Flag("--padding", "/padding", "Batches hold padding, so a mask is passed."),
        Flag("--packing", "/packing", "Sequences are packed end to end, to batches of one length."),
    ),
    "Kernels and recomputation": (
        Flag(
            "--activation-checkpointing",
            "/activation_checkpointing",
            "none or full: recompute each layer in the backward.",
        ),
        Flag("--attention", "/attention", "Attention implementation, as transformers names it."),
        Flag("--loss", "/loss", "How logits become a loss."),
        Flag("--kernels", "/kernels", "Replacement kernels, separated by commas: liger,compile."),
    ),
    "Training loop": (
        Flag("--own-loss", "/loop/own_loss", "The loop computes the loss of the logits itself."),
        Flag("--keep-outputs", "/loop/keep_outputs", "The loop holds logits through backward."),
        Flag("--use-cache", "/loop/use_cache", "The forward fills a KV cache."),
        Flag("--set-to-none", "/loop/set_to_none", "zero_grad frees the gradients."),
        Flag("--neftune-noise-alpha", "/loop/neftune_noise_alpha", "Noise on the embeddings."),
        Flag("--max-grad-norm", "/loop/max_grad_norm", "Gradients are clipped to it; 0: not."),
        Flag("--ema", "/loop/ema", "Where a moving average of the weights is kept."),
        Flag("--logits-to-keep", "/loop/logits_to_keep", "Last positions with logits; 0: all."),
        Flag(
            "--label-smoothing-factor",
            "/loop/label_smoothing_factor",
            "The Trainer's own smoothed loss.",
        ),
        Flag("--framework", "/software/framework", "The training stack."),
        Flag("--framework-version", "/software/version", "Its major version."),
    ),
    "Parallelism": (
        Flag("--strategy", "/parallelism/strategy", "How data-parallel ranks share the states."),
        Flag("--dp-replicate", "/parallelism/dp_replicate", "Replicas of the whole model."),
        Flag("--dp-shard", "/parallelism/dp_shard", "GPUs that one replica is sharded over."),
        Flag("--tp", "/parallelism/tp", "Degree of tensor parallelism."),
        Flag("--sequence-parallel", "/parallelism/sequence_parallel", "Shard norms along tokens."),
        Flag("--cp", "/parallelism/cp", "Degree of context parallelism."),
        Flag("--pp", "/parallelism/pp", "Degree of pipeline parallelism."),
        Flag("--ep", "/parallelism/ep", "Degree of expert parallelism."),
        Flag("--zero-stage", "/parallelism/zero_stage", "DeepSpeed's stage, 0 to 3."),
        Flag(
            "--reshard-after-forward",
            "/parallelism/reshard_after_forward",
            "FSDP frees gathered weights after the forward.",
        ),
        Flag("--offload-params", "/parallelism/cpu_offload/params", "Weights wait on the host."),
        Flag("--offload-optimizer", "/parallelism/cpu_offload/optimizer", "States stay there."),
    ),
    "Hardware and verdict": (
        Flag("--gpu", "/hardware/gpu", "Card of the catalogue, or auto: the one in this machine."),
        Flag("--num-gpus", "/hardware/num_gpus", "Number of such cards."),
        Flag("--memory", "/hardware/memory_bytes", "Memory of the card, if not its own: 24GiB."),
        Flag(
            "--reserved-by-others",
            "/hardware/reserved_by_others_bytes",
            "Held by other processes: 2GiB.",
        ),
        Flag("--host-memory", "/hardware/host_memory_bytes", "Memory of the host: 64GiB."),
        Flag("--confidence", "/confidence", "Share of runs that the stated interval covers."),
        Flag(
            "--waterfall",
            "/waterfall",
            "Add what each technique saves and costs, from naive full fine-tuning on.",
        ),
    ),
}


# Spellings that the request accepts beside a field's own choices and writes out itself.
_SHORT_CHOICES: Final[dict[str, tuple[str, ...]]] = {"/method/name": tuple(METHOD_ALIASES)}
# Sections that exist in several kinds: the flag that names the kind decides which fields there are.
_KINDS: Final = ("method", "quantization", "fp8", "qat", "optimizer")


class Field(Struct, frozen=True):
    """A leaf of the request: its type without None, whether None is allowed, and its default."""

    types: tuple[Any, ...]
    nullable: bool
    default: Any
    description: str = ""


@cache
def request_fields() -> Mapping[str, Field]:
    """Return every leaf of the request by its JSON pointer.

    A model given by its own configuration is one leaf: it is no flag's business to spell it.
    """
    fields: dict[str, Field] = {}
    for pointer, field in _leaves(EstimateRequest, "", None):
        known = fields.get(pointer)
        # Each kind of a section has its own "name"; together they are the choices of one flag.
        fields[pointer] = (
            field
            if known is None
            else Field(known.types + field.types, known.nullable, known.default, known.description)
        )
    return fields


def _leaves(
    section: type[Section], prefix: str, default: Section | None
) -> Iterator[tuple[str, Field]]:
    tag = section.__struct_config__.tag
    if tag is not None:
        yield f"{prefix}/name", Field((Literal[tag],), False, getattr(default, "name", None))
    for info in structs.fields(section):
        pointer = f"{prefix}/{info.name}"
        members = tuple(_members(info.type))
        inner = [kind for kind in members if _is_section(kind)]
        own = None if info.default is NODEFAULT else info.default
        if info.default_factory is not NODEFAULT:
            own = info.default_factory()
        value = getattr(default, info.name, own)
        if not inner:
            types = tuple(kind for kind in members if kind is not type(None))
            yield pointer, Field(types, type(None) in members, value, _description(info.type))
            continue
        for kind in inner:
            for leaf, field in _leaves(kind, pointer, value if isinstance(value, kind) else None):
                if leaf == f"{pointer}/name" and type(None) in members:
                    yield leaf, Field(field.types, True, value)
                else:
                    yield leaf, field


def _description(annotation: Any) -> str:
    """Return the line that a field's constraints say about it."""
    if get_origin(annotation) is not Annotated:
        return ""
    said = (getattr(each, "description", None) for each in get_args(annotation)[1:])
    return next((each for each in said if each), "")


def _members(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union, at any depth, without their constraints."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section) and kind is not InlineModel


def _with_derived(declared: dict[str, tuple[Flag, ...]]) -> dict[str, tuple[Flag, ...]]:
    """Add a flag for each knob that the table above does not name: `/method/init_r` is
    `--method-init-r`, with the line that the field itself says as its help."""
    named = {flag.pointer for flags in declared.values() for flag in flags}
    groups = {heading: list(flags) for heading, flags in declared.items()}
    for pointer, field in request_fields().items():
        section = pointer.split("/")[1]
        if pointer not in named and section in _DERIVED:
            option = "--" + pointer.strip("/").replace("/", "-").replace("_", "-")
            groups[_DERIVED[section]].append(Flag(option, pointer, field.description))
    return {heading: tuple(flags) for heading, flags in groups.items()}


_DERIVED: Final = {
    "method": "Method",
    "quantization": "Method",
    "fp8": "Precision and optimizer",
    "qat": "Precision and optimizer",
    "optimizer": "Precision and optimizer",
}
FLAG_GROUPS: Final = _with_derived(_DECLARED)
FLAGS: Final[tuple[Flag, ...]] = tuple(flag for flags in FLAG_GROUPS.values() for flag in flags)


class OrNone(ParamType):
    """Another type, or the word `none` for null."""

    def __init__(self, inner: ParamType) -> None:
        self.inner = inner
        self.name = inner.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return None for `none`, and what the inner type makes of anything else."""
        if isinstance(value, str) and value.lower() == "none":
            return None
        return self.inner.convert(value, param, ctx)


class Size(ParamType):
    """A size as a person writes it, such as 24GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the size in bytes."""
        text = str(value).strip()
        try:
            size = parse_size(text)
        except (ValueError, OverflowError) as error:
            self.fail(str(error), param, ctx)
        if text.isdigit() and 0 < size < MiB:
            self.fail(f"{text} is {size} bytes; write a unit, such as {text}GiB", param, ctx)
        return size


class Names(ParamType):
    """Names separated by commas; a word of `whole` stands for itself, not for a list."""

    name = "names"

    def __init__(self, whole: tuple[str, ...]) -> None:
        self.whole = whole

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | list[str]:
        """Return the list, or the one word that stands for a set of modules."""
        if value in self.whole:
            return str(value)
        return [name.strip() for name in str(value).split(",") if name.strip()]


class Numbers(ParamType):
    """Whole numbers separated by commas."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        """Return the list."""
        try:
            return [int(each) for each in str(value).split(",") if each.strip()]
        except ValueError:
            self.fail(f"{value!r} is no list of numbers such as 0,1,2", param, ctx)


class JsonObject(ParamType):
    """A JSON object, written out."""

    name = "json"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        """Return the object."""
        try:
            return msgspec.json.decode(str(value), type=dict[str, Any])
        except msgspec.DecodeError:
            self.fail(f'{value!r} is no JSON object such as {{"q_proj": 8}}', param, ctx)


class Word(ChoiceType):
    """A choice of words; a refusal names the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Return the refusal: the nearest word first, because a long list is cut."""
        refusal = super().get_invalid_choice_message(value, ctx)
        said, _, known = refusal.partition(" is not one of ")
        nearest = did_you_mean(str(value), map(str, self.choices)).removeprefix("; ")
        return f"{said} is not one of {known}{' ' if nearest else ''}{nearest.capitalize()}"


class SwitchOr(Word):
    """A choice of words, `true` and `false` among them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the word, or the boolean."""
        word: str = super().convert(value, param, ctx)
        return {"true": True, "false": False}.get(word, word)


def _click_type(pointer: str, field: Field) -> ParamType:
    literals = tuple(
        str(value)
        for kind in field.types
        if get_origin(kind) is Literal
        for value in get_args(kind)
    )
    kinds = {get_origin(kind) or kind for kind in field.types}
    if dict in kinds:
        return JsonObject()
    if tuple in kinds:
        counts = any(int in _members(each) for kind in field.types for each in get_args(kind))
        return Numbers() if counts else Names(literals)
    if bool in kinds:
        return SwitchOr(("true", "false", *literals), case_sensitive=False)
    if literals:
        choices = dict.fromkeys(literals + _SHORT_CHOICES.get(pointer, ()))
        return Word(tuple(choices), case_sensitive=False)
    if pointer.endswith("_bytes"):
        return Size()
    numbers: dict[Any, ParamType] = {int: click.INT, float: click.FLOAT}
    return numbers.get(next(iter(kinds)), click.STRING)


def _shown_default(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None or value == {} else str(value)


def request_options() -> list[click.Option]:
    """Return one option for each flag, in the order of the help."""
    fields = request_fields()
    return [
        _option(group, flag, fields[flag.pointer])
        for group, flags in FLAG_GROUPS.items()
        for flag in flags
    ]


class GroupedOption(click.Option):
    """An option that knows under which heading of the help it belongs."""

    def __init__(self, *args: Any, heading: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.heading = heading


def _option(heading: str, flag: Flag, field: Field) -> click.Option:
    text = flag.help
    if flag.pointer != "/model":
        text = f"{text}  [default: {_shown_default(field.default)}]"
    if set(field.types) == {bool}:
        names = f"{flag.option}/--no-{flag.option.removeprefix('--')}"
        return GroupedOption([names], heading=heading, default=None, help=text)
    kind = _click_type(flag.pointer, field)
    return GroupedOption(
        [flag.option],
        heading=heading,
        type=OrNone(kind) if field.nullable else kind,
        metavar=_metavar(kind, field.nullable),
        help=text,
    )


def _metavar(kind: ParamType, nullable: bool) -> str:
    """Name the type in the help; `none` among the choices is null."""
    if not isinstance(kind, click.Choice):
        return kind.name.upper()
    choices = [str(choice) for choice in kind.choices]
    return f"[{'|'.join(['none'] * nullable + choices)}]"


class GroupedHelp(click.Command):
    """A command whose help lists its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each heading; what has none comes first."""

        def heading(parameter: click.Parameter) -> str:
            return getattr(parameter, "heading", "Options")

        for title, members in groupby(sorted(self.get_params(ctx), key=self._rank), heading):
            records = [record for member in members if (record := member.get_help_record(ctx))]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    @staticmethod
    def _rank(parameter: click.Parameter) -> int:
        titles = ("Options", *FLAG_GROUPS)
        return titles.index(getattr(parameter, "heading", "Options"))


def given_flags(ctx: click.Context) -> dict[str, Any]:
    """Return the values that the user typed, by JSON pointer; what was left out is not in it."""
    return {
        flag.pointer: ctx.params[flag.parameter]
        for flag in FLAGS
        if ctx.get_parameter_source(flag.parameter) is ParameterSource.COMMANDLINE
    }


def overlay(document: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Write flags over a request document; the flags win.

    A flag that names another kind of method, quantization or optimizer starts that section anew.

    Raises:
        click.UsageError: a flag belongs to a kind of method or quantization that was not chosen.

    Example:
        >>> overlay({"model": "gpt2", "method": {"name": "lora", "r": 4}}, {"/method/r": 8})
        {'model': 'gpt2', 'method': {'name': 'lora', 'r': 8}}
    """
    out = dict(document)
    for section in _KINDS:
        if f"/{section}/name" in given:
            out[section] = _renamed(section, out.get(section), given[f"/{section}/name"])
    out = expand_short_forms(out)
    for pointer, value in given.items():
        section, *inner = pointer.strip("/").split("/")
        if section in _KINDS and inner == ["name"]:
            continue
        if section in ("method", "quantization", "fp8", "qat"):
            _refuse_unless_chosen(pointer, out.get(section))
        _put(out, (section, *inner), value)
    return out


def _renamed(section: str, current: Any, name: str | None) -> dict[str, Any] | None:
    """Return the section under its new name, keeping the other fields of the same kind."""
    if name is None:
        return None
    new = {"name": name}
    if section == "optimizer":
        new = expand_short_forms({section: name})[section]
    old = expand_short_forms({section: current}).get(section)
    kind = expand_short_forms({section: name})[section]["name"]
    if isinstance(old, dict) and old.get("name", kind) == kind:
        return {**old, **new}
    return new


def _refuse_unless_chosen(pointer: str, section: Any) -> None:
    """Refuse `--lora-r` without LoRA, which would otherwise be an unknown field of `full`."""
    (flag,) = (flag for flag in FLAGS if flag.pointer == pointer)
    name = pointer.split("/")[1]
    chosen = section.get("name") if isinstance(section, dict) else None
    if name == "method":
        takers = _methods_with(pointer.split("/")[2])
        if chosen not in takers:
            *others, last = takers
            listed = f"{', '.join(others)} or {last}" if others else last
            raise click.UsageError(f"{flag.option} needs --method {listed}")
    if name == "quantization" and section is None:
        raise click.UsageError(f"{flag.option} needs --quantization nf4, or --method qlora")
    if name in ("fp8", "qat") and section is None:
        raise click.UsageError(f"{flag.option} needs --{name} torchao")


def _methods_with(field: str) -> tuple[str, ...]:
    """Return the methods that have a field, aliases included."""
    having = tuple(
        str(each.__struct_config__.tag) for each in METHODS if field in each.__struct_fields__
    )
    aliases = (alias for alias, meant in METHOD_ALIASES.items() if meant.method in having)
    return (*having, *aliases)


def _put(document: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    head, *rest = path
    if not rest:
        document[head] = value
        return
    inner = document.get(head)
    # A section that is no object stays wrong, for the parser to refuse by its name.
    if inner is None or isinstance(inner, dict):
        document[head] = dict(inner or {})
        _put(document[head], tuple(rest), value)


def parse_flagged(document: dict[str, Any], given: Iterable[str]) -> EstimateRequest:
    """Read the request; a refusal names the flag that the user typed, not the field behind it.

    Args:
        document: the request document with the flags in it.
        given: JSON pointers of the fields that came from flags.

    Raises:
        InvalidRequestError: a field is unknown, missing, of the wrong type or out of range.
        MalformedDocumentError: the document is too large, or holds what JSON cannot.
    """
    try:
        return parse_request(document)
    except InvalidRequestError as error:
        named = {flag.pointer: flag.option for flag in FLAGS if flag.pointer in set(given)}
        lines = (f"{named.get(at, at.strip('/') or 'request')}: {why}" for at, why in error.errors)
        raise InvalidRequestError("; ".join(lines) or str(error), error.errors) from None
