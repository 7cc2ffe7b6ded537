"""The request document `v1`: one description of a run for the CLI, the API and all engines.

Names follow HF, TRL, PEFT and DeepSpeed. Everything but `model` has a default. A value that the
field knows but this version cannot answer is refused by name in `resolve.py`, not here.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta

from estimator.errors import (
    InvalidRequestError,
    MalformedDocumentError,
    UnsupportedCombinationError,
    did_you_mean,
)
from estimator.optimizer import Optimizer
from estimator.section import Count, Names, Section, SizeBytes
from estimator.techniques.fp8 import Fp8 as AnyFp8
from estimator.techniques.fp8_backends.torchao import Torchao
from estimator.techniques.fp8_backends.transformer_engine import TransformerEngine
from estimator.techniques.method import Method as AnyMethod
from estimator.techniques.methods.adalora import AdaLora
from estimator.techniques.methods.adaption_prompt import AdaptionPromptTuning
from estimator.techniques.methods.badam import Badam
from estimator.techniques.methods.boft import Boft
from estimator.techniques.methods.fourierft import FourierFt
from estimator.techniques.methods.full import Full
from estimator.techniques.methods.houlsby_adapter import HoulsbyAdapter
from estimator.techniques.methods.ia3 import Ia3
from estimator.techniques.methods.lisa import Lisa
from estimator.techniques.methods.llama_adapter import LlamaAdapter, LlamaAdapterV2
from estimator.techniques.methods.ln_tuning import LnTuning
from estimator.techniques.methods.loha import Loha
from estimator.techniques.methods.lokr import Lokr
from estimator.techniques.methods.lora import Lora
from estimator.techniques.methods.loreft import LoReft
from estimator.techniques.methods.mezo import Mezo
from estimator.techniques.methods.oft import Oft
from estimator.techniques.methods.p_tuning import PTuning
from estimator.techniques.methods.partial import Partial
from estimator.techniques.methods.pfeiffer_adapter import PfeifferAdapter
from estimator.techniques.methods.prefix_tuning import PrefixTuning
from estimator.techniques.methods.prompt_tuning import PromptTuning
from estimator.techniques.methods.trainable_tokens import TrainableTokens
from estimator.techniques.methods.vblora import VbLora
from estimator.techniques.methods.vera import Vera
from estimator.techniques.qat import Torchao as Qat
from estimator.techniques.quantization import Quantization as AnyQuantization
from estimator.techniques.quantizations.awq import AwqQuantization
from estimator.techniques.quantizations.four_bit import Fp4, Nf4
from estimator.techniques.quantizations.gptq import GptqQuantization
from estimator.techniques.quantizations.hqq import HqqQuantization
from estimator.techniques.quantizations.int8 import Int8
from estimator.techniques.quantizations.torchao_int8 import TorchaoInt8
from estimator.techniques.software import PROFILES

MAX_REQUEST_BYTES: Final = 1024 * 1024
MAX_MICRO_BATCH_SIZE: Final = 65_536
MAX_SEQ_LEN: Final = 16_777_216
DEFAULT_SEQ_LEN: Final = 2048
MAX_SAMPLES: Final = 10_000

# Of the training data, or of a part of it; their order does not count.
SampleLengths = Annotated[
    tuple[Annotated[int, Meta(ge=1, le=MAX_SEQ_LEN)], ...], Meta(max_length=MAX_SAMPLES)
]


class InlineModel(Section, frozen=True):
    """A model given by its own configuration instead of a name."""

    config: dict[str, Any]


Method = (
    Full
    | Lora
    | Partial
    | LlamaAdapter
    | LlamaAdapterV2
    | PromptTuning
    | PTuning
    | PrefixTuning
    | Ia3
    | LnTuning
    | Loha
    | Lokr
    | Oft
    | Boft
    | FourierFt
    | HoulsbyAdapter
    | PfeifferAdapter
    | LoReft
    | Vera
    | AdaLora
    | TrainableTokens
    | AdaptionPromptTuning
    | VbLora
    | Mezo
    | Lisa
    | Badam
)
METHODS: Final[tuple[type[AnyMethod], ...]] = get_args(Method)

Quantization = Nf4 | Fp4 | Int8 | TorchaoInt8 | GptqQuantization | AwqQuantization | HqqQuantization
QUANTIZATIONS: Final[tuple[type[AnyQuantization], ...]] = get_args(Quantization)

Fp8 = Torchao | TransformerEngine
FP8_LIBRARIES: Final[tuple[type[AnyFp8], ...]] = get_args(Fp8)


class Loop(Section, frozen=True):
    """What the training loop keeps alive; the defaults are those of the Trainer.

    The Trainer clips the norm of the gradients where `max_grad_norm` is above 0. `logits_to_keep`
    is the argument of transformers' models: logits of the last so many positions, 0 for all; the
    labels are cut to them. With `own_loss` the loop calls the model without labels under
    `torch.autocast` and computes the cross entropy of a shifted copy of its logits itself, outside;
    its names for both live until the next step binds them.
    """

    keep_outputs: bool = False
    use_cache: bool = False
    set_to_none: bool = True
    neftune_noise_alpha: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    label_smoothing_factor: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    max_grad_norm: Annotated[float, Meta(ge=0, le=1e9)] = 1.0
    ema: Literal["cuda", "cpu"] | None = None
    logits_to_keep: Annotated[int, Meta(ge=0, le=MAX_SEQ_LEN)] = 0
    own_loss: bool = False


class CpuOffload(Section, frozen=True):
    """What is kept in host memory between its uses."""

    params: bool = False
    optimizer: bool = False


class Parallelism(Section, frozen=True):
    """How the work is divided over GPUs; the degrees multiply to the number of GPUs."""

    strategy: Literal["none", "ddp", "fsdp", "zero"] = "none"
    dp_replicate: Count = 1
    dp_shard: Count = 1
    tp: Count = 1
    sequence_parallel: bool = False
    cp: Count = 1
    pp: Count = 1
    ep: Count = 1
    zero_stage: Annotated[int, Meta(ge=0, le=3)] | None = None
    reshard_after_forward: bool = True
    cpu_offload: CpuOffload = CpuOffload()


class Hardware(Section, frozen=True):
    """The GPU that the answer is judged against."""

    gpu: Annotated[str, Meta(min_length=1, max_length=100)] | None = None
    num_gpus: Count = 1
    memory_bytes: Annotated[int, Meta(ge=1, le=2**60)] | None = None
    reserved_by_others_bytes: SizeBytes = 0
    host_memory_bytes: SizeBytes | None = None


class Software(Section, frozen=True):
    """The training stack; bytes depend on it.

    Of transformers, version 5 holds from 4.54 on, and from 4.49 on where every query head has a
    key head of its own; 4 for 4.46 to 4.48, 4.45 for that and older ones. A framework named
    without a version means the newest that is known here.
    """

    framework: Literal["transformers", "trl", "litgpt", "torchtune"] = "transformers"
    version: Annotated[str, Meta(min_length=1, max_length=20)] = "5"


class EstimateRequest(Section, frozen=True):
    """One fine-tuning run on one kind of GPU."""

    model: Annotated[str, Meta(min_length=1, max_length=512)] | InlineModel
    task: Literal[
        "sft", "pretrain", "dpo", "reward", "grpo", "ppo", "classification", "embedding"
    ] = "sft"
    method: Method = Full()
    quantization: Quantization | None = None
    precision: Literal[
        "fp32", "tf32", "bf16", "fp16", "master_bf16", "megatron_bf16", "amp_bf16", "amp_fp16"
    ] = "bf16"
    autocast: Literal["bf16", "fp16"] | None = None
    fp8: Fp8 | None = None
    qat: Qat | None = None
    optimizer: Optimizer = Optimizer()
    micro_batch_size: Annotated[int, Meta(ge=1, le=MAX_MICRO_BATCH_SIZE)] = 1
    seq_len: Annotated[int, Meta(ge=1, le=MAX_SEQ_LEN)] = DEFAULT_SEQ_LEN
    sample_lengths: SampleLengths = ()
    gradient_accumulation_steps: Count = 1
    padding: bool = False
    packing: bool = False
    activation_checkpointing: Annotated[str, Meta(min_length=1, max_length=40)] = "none"
    attention: Literal[
        "eager",
        "sdpa",
        "sdpa_math",
        "sdpa_efficient",
        "sdpa_flash",
        "sdpa_cudnn",
        "flash_attention_2",
        "flash_attention_3",
        "flex_attention",
    ] = "sdpa"
    loss: Literal["standard", "chunked", "fused_linear", "cut_cross_entropy", "vocab_parallel"] = (
        "standard"
    )
    kernels: Names = ()
    loop: Loop = Loop()
    parallelism: Parallelism = Parallelism()
    hardware: Hardware = Hardware()
    software: Software = Software()
    confidence: Annotated[float, Meta(ge=0.5, le=0.9999)] = 0.95
    waterfall: bool = False


# HF's `TrainingArguments.optim` names, and what each is in our words.
OPTIM_ALIASES: Final[dict[str, dict[str, Any]]] = {
    "adamw_torch": {"name": "adamw", "implementation": "foreach"},
    "adamw_torch_fused": {"name": "adamw", "implementation": "fused"},
    "adamw_bnb_8bit": {"name": "adamw_8bit"},
    "adamw8bit": {"name": "adamw_8bit"},
    "adam_8bit": {"name": "adamw_8bit"},
    "adam8bit": {"name": "adamw_8bit"},
    "paged_adamw": {"name": "paged_adamw_32bit"},
    "paged_lion": {"name": "paged_lion_32bit"},
    "galore_adamw_layerwise": {"name": "galore_adamw", "in_backward": True},
    "galore_adamw_8bit_layerwise": {"name": "galore_adamw_8bit", "in_backward": True},
    "apollo_adamw_layerwise": {"name": "apollo_adamw", "in_backward": True},
    "apollo_mini": {"name": "apollo_adamw", "rank": 1, "scale_type": "tensor"},
    "rmsprop_bnb": {"name": "rmsprop_bnb_32bit"},
    "paged_adamw8bit": {"name": "paged_adamw_8bit"},
    "lamb32bit": {"name": "lamb_32bit"},
    "lamb8bit": {"name": "lamb_8bit"},
    "lars": {"name": "lars_32bit"},
    "lars32bit": {"name": "lars_32bit"},
    "lars8bit": {"name": "lars_8bit"},
    "stableadamw": {"name": "stable_adamw"},
    "adammini": {"name": "adam_mini"},
    "adam-mini": {"name": "adam_mini"},
    "sophiag": {"name": "sophia"},
    "scalableshampoo": {"name": "scalable_shampoo"},
    "sgd_momentum": {"name": "sgd", "momentum": 0.9},
}


class Alias(NamedTuple):
    """A word for a method that says more than its name: knobs, or a quantization beside it."""

    method: str
    knobs: Mapping[str, Any] = {}
    quantization: str | None = None


METHOD_ALIASES: Final[dict[str, Alias]] = {
    "qlora": Alias("lora", quantization="nf4"),
    "bitfit": Alias("partial", {"biases": True}),
    "freeze": Alias("partial"),
    "double_seq_bn": Alias("houlsby_adapter"),
    "seq_bn": Alias("pfeiffer_adapter"),
    "rslora": Alias("lora", {"use_rslora": True}),
    "pissa": Alias("lora", {"init_lora_weights": "pissa"}),
    "olora": Alias("lora", {"init_lora_weights": "olora"}),
    "loftq": Alias("lora", {"init_lora_weights": "loftq"}, quantization="nf4"),
    "lora+": Alias("lora", {"loraplus_lr_ratio": 16.0}),
    "dora": Alias("lora", {"use_dora": True}),
    "qdora": Alias("lora", {"use_dora": True}, quantization="nf4"),
}

# Methods of the literature that have no sourced answer here yet, and what is near to each.
UNANSWERED_METHODS: Final[dict[str, str]] = {
    "badam_ratio": "method 'badam' is its layer mode; the ratio mode has sparse gradients",
    "galore": "ask for optimizer 'galore_adamw'",
    "q_galore": "ask for optimizer 'galore_adamw_8bit'; q-galore-torch 1.0 does not run with "
    "bitsandbytes 0.50",
    "apollo": "ask for optimizer 'apollo_adamw'",
    "lomo": "ask for optimizer 'lomo'",
    "adalomo": "ask for optimizer 'adalomo'",
    # What else PEFT 0.21.2 has: utils/peft_types.py, PeftType.
    **dict.fromkeys(
        (
            "adamss",
            "beft",
            "bone",
            "c3a",
            "cartridge",
            "cpt",
            "deft",
            "delora",
            "frod",
            "glora",
            "gralora",
            "hira",
            "hra",
            "lily",
            "miss",
            "multitask_prompt_tuning",
            "osf",
            "peanut",
            "poly",
            "psoft",
            "pvera",
            "randlora",
            "road",
            "shadow",
            "shira",
            "supertuning",
            "tinylora",
            "unilora",
            "waveft",
            "xlora",
        ),
        "no dry run of it was compared; method 'lora' or `estimate --help` for the others",
    ),
}

# Formats of the base weights that have no sourced answer here yet, and what is near to each.
UNANSWERED_QUANTIZATIONS: Final[dict[str, str]] = {
    # PEFT 0.21.2, tuners/lora/torchao.py, TorchaoLoraLinear._check_dtype_supported; the product
    # of torchao's other packing, _weight_int4pack_mm, has no derivative.
    **dict.fromkeys(
        ("int4", "torchao_int4"),
        "PEFT's LoRA layer refuses torchao's int4 tensors, and the kernels of its other int4 "
        "packings have no backward pass; use 'torchao_int8' or 'nf4'",
    ),
    **dict.fromkeys(
        ("fp8", "float8"),
        "to train with products in 8-bit floats ask for field fp8 ('torchao'); to store the base "
        "in 8 bits use 'int8'",
    ),
    **dict.fromkeys(("mxfp8", "nvfp4"), "use 'int8' or 'nf4', or none"),
}

# Accelerate's spelling of the libraries that train in 8-bit floats.
FP8_ALIASES: Final[dict[str, str]] = {"ao": "torchao", "transformer_engine": "te"}

# Ways to train in few bits that have no sourced answer here yet, and what is near to each.
UNANSWERED_FP8: Final[dict[str, str]] = {
    "msamp": "Accelerate advises against it; use 'torchao'",
    **dict.fromkeys(
        ("mxfp8", "nvfp4"),
        "its kernels run on Blackwell only and cast in Triton and CUDA; use 'torchao', recipe "
        "'rowwise'",
    ),
}

# What TRL's SFTTrainer does where nobody says otherwise: trl 1.16.0, trainer/base_config.py
# (gradient_checkpointing, bf16), trainer/utils.py (create_model_from_path: dtype float32),
# trainer/sft_trainer.py (add_fused_lm_head), and the Trainer's own `optim`.
TRL_DEFAULTS: Final[dict[str, Any]] = {
    "loss": "chunked",
    "activation_checkpointing": "full",
    "optimizer": {"name": "adamw", "implementation": "fused"},
}
TRL_WITHOUT_HEAD: Final = ("1.3", "0.27", "0.22")
TRL_PRECISION: Final[dict[str, Any]] = {"precision": "fp32", "autocast": "bf16"}

# Frameworks whose collators pass a mask with a padded batch; None is the default one.
MASKING: Final = (None, "transformers", "trl")

# torchtune makes adapters of the weights' own type, and quantizes without PEFT's preparation.
TORCHTUNE_DEFAULTS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "method": ("lora", {"adapter_dtype": "base"}),
    "quantization": ("nf4", {"prepare_kbit": False}),
}

# Other spellings of `activation_checkpointing`; a boolean means full or none.
CHECKPOINTING_ALIASES: Final = ("gradient_checkpointing", "recompute")

# Sections that may be given as one word, and the field that the word fills.
SHORT_FORMS: Final[dict[str, str]] = {
    "method": "name",
    "quantization": "name",
    "fp8": "name",
    "qat": "name",
    "optimizer": "name",
    "parallelism": "strategy",
    "hardware": "gpu",
    "software": "framework",
}


def expand_short_forms(value: dict[str, Any]) -> dict[str, Any]:
    """Write out `"method": "qlora"`, `"optimizer": "adamw_torch_fused"` and their like.

    `gradient_checkpointing` and `recompute` are accepted for `activation_checkpointing`.

    Example:
        >>> expand_short_forms({"model": "gpt2", "optimizer": "adamw_torch"})["optimizer"]
        {'name': 'adamw', 'implementation': 'foreach'}
    """
    out = dict(value)
    for field, key in SHORT_FORMS.items():
        if isinstance(out.get(field), str):
            out[field] = {key: out[field]}
    method = out.get("method")
    alias = method.get("name") if isinstance(method, dict) else None
    if isinstance(method, dict) and isinstance(alias, str) and alias in METHOD_ALIASES:
        meant = METHOD_ALIASES[alias]
        out["method"] = {**meant.knobs, **method, "name": meant.method}
        if out.get("quantization") is None and meant.quantization is not None:
            out["quantization"] = {"name": meant.quantization}
    fp8 = out.get("fp8")
    if isinstance(fp8, dict) and isinstance(fp8.get("name"), str):
        library = fp8["name"].lower()
        out["fp8"] = {**fp8, "name": FP8_ALIASES.get(library, library)}
    optimizer = out.get("optimizer")
    if isinstance(optimizer, dict) and isinstance(optimizer.get("name"), str):
        name = optimizer["name"].lower()
        rest = {key: item for key, item in optimizer.items() if key != "name"}
        out["optimizer"] = {**OPTIM_ALIASES.get(name, {"name": name}), **rest}
    software = out.get("software")
    framework = software.get("framework") if isinstance(software, dict) else None
    if isinstance(software, dict) and isinstance(framework, str) and framework in PROFILES:
        newest = next(iter(PROFILES[framework]))
        out["software"] = {"version": newest, **software}
    kernels = out.get("kernels")
    if isinstance(kernels, (list, tuple)) and "liger" in kernels and "loss" not in out:
        # `use_liger_kernel` brings its loss; whoever wants another one names it.
        out["loss"] = "fused_linear"
    for alias in CHECKPOINTING_ALIASES:
        if alias in out and "activation_checkpointing" not in out:
            given = out.pop(alias)
            if isinstance(given, bool):
                given = "full" if given else "none"
            out["activation_checkpointing"] = given
    return {**_defaults_of(framework, out), **out, **_sections_of(framework, out)}


def _defaults_of(framework: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return what a framework fills in otherwise than we do, where the request says nothing."""
    defaults: dict[str, Any] = {}
    alone = given.get("micro_batch_size", 1) == 1
    if _differ(given) and framework in MASKING and not (alone or given.get("packing")):
        # Samples of different lengths in one batch are padded.
        defaults["padding"] = True
    if framework != "trl":
        return defaults
    defaults |= TRL_DEFAULTS
    if given["software"].get("version") in TRL_WITHOUT_HEAD:
        defaults["loss"] = "standard"
    if "precision" not in given and "autocast" not in given:
        defaults |= TRL_PRECISION
    return defaults


def _differ(given: dict[str, Any]) -> bool:
    """Say whether some samples are shorter than what all are cut to."""
    lengths, longest = given.get("sample_lengths"), given.get("seq_len", DEFAULT_SEQ_LEN)
    if not isinstance(lengths, list | tuple) or not isinstance(longest, int):
        return False
    return any(isinstance(each, int) and each < longest for each in lengths)


def _sections_of(framework: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the sections that a framework fills in otherwise than we do."""
    if framework != "torchtune":
        return {}
    return {
        field: {**defaults, **given[field]}
        for field, (name, defaults) in TORCHTUNE_DEFAULTS.items()
        if isinstance(given.get(field), dict) and given[field].get("name") == name
    }


def parse_request(document: str | bytes | dict[str, Any]) -> EstimateRequest:
    """Read a request document.

    Args:
        document: JSON text, or the dictionary it would hold.

    Raises:
        MalformedDocumentError: not JSON, or too large.
        InvalidRequestError: a field is unknown, missing, of the wrong type or out of range.

    Example:
        >>> parse_request({"model": "gpt2"}).seq_len
        2048
    """
    return convert_request(decode_document(document))


def decode_document(document: str | bytes | dict[str, Any]) -> Any:
    """Return what a JSON document holds, as long as it is no larger than a request may be.

    Raises:
        MalformedDocumentError: not JSON, or too large.
    """
    try:
        size = len(json.dumps(document)) if isinstance(document, dict) else len(document)
        value = document if isinstance(document, dict) else msgspec.json.decode(document)
    except (TypeError, ValueError, RecursionError) as error:
        reason = _PLACE.sub("", str(error))
        raise MalformedDocumentError(f"the request is not JSON: {reason}") from None
    if size > MAX_REQUEST_BYTES:
        raise MalformedDocumentError(
            f"the request is larger than {MAX_REQUEST_BYTES} bytes; send one run at a time"
        )
    return value


def convert_request(value: Any) -> EstimateRequest:
    """Return the request that a decoded document holds, short forms written out.

    Raises:
        InvalidRequestError: a field is unknown, missing, of the wrong type or out of range.
        UnsupportedCombinationError: a known method that has no answer here yet, by name.
    """
    expanded = expand_short_forms(value) if isinstance(value, dict) else value
    _refuse_unanswered(expanded)
    try:
        request = msgspec.convert(expanded, EstimateRequest)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), expanded) from None
    _check_sample_lengths(request)
    return request


def _check_sample_lengths(request: EstimateRequest) -> None:
    """Refuse samples that never make a batch of `seq_len`, and packing, which knows no samples."""
    longest = max(request.sample_lengths, default=request.seq_len)
    detail = ""
    if longest < request.seq_len:
        detail = (
            f"no sample is as long as seq_len {request.seq_len}; give seq_len {longest}, the "
            "length of the longest, or less to cut it"
        )
    elif request.sample_lengths and request.packing:
        detail = "packed batches are all of one length; leave out sample_lengths or packing"
    if detail:
        raise InvalidRequestError(f"sample_lengths: {detail}", (("/sample_lengths", detail),))


def _refuse_unanswered(document: Any) -> None:
    """Refuse by name what the field is known to have and this version cannot answer."""
    tables = {
        "method": UNANSWERED_METHODS,
        "quantization": UNANSWERED_QUANTIZATIONS,
        "fp8": UNANSWERED_FP8,
    }
    for field, table in tables.items():
        section = document.get(field) if isinstance(document, dict) else None
        name = section.get("name") if isinstance(section, dict) else None
        if isinstance(name, str) and name in table:
            raise UnsupportedCombinationError(
                f"{field} {name!r} has no sourced answer here yet; {table[name]}"
            )


_PLACE: Final = re.compile(r" - at `\$(?P<path>[^`]*)`$")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>.*)`")
_SHOWN_CHARACTERS: Final = 60
_MEANING: Final = {"confidence": "; 0.95 stands for 95 %"}


def _refusal(message: str, document: Any) -> InvalidRequestError:
    """Turn msgspec's sentence into the JSON pointer of the field and what is wrong with it."""
    found = _PLACE.search(message)
    path = found["path"] if found else ""
    detail = message[: found.start()] if found else message
    steps = [each for each in re.split(r"[.\[\]]+", path) if each]
    unknown, missing = _UNKNOWN.fullmatch(detail), _MISSING.fullmatch(detail)
    if unknown:
        steps.append(unknown["name"])
        detail = _unknown_field(unknown["name"])
    elif missing:
        steps.append(missing["name"])
        detail = "this field is required"
    else:
        detail = f"{detail[0].lower()}{detail[1:].replace('`', '')}{_given(document, steps)}"
        detail += _MEANING.get("/".join(steps), "")
    pointer = "".join(f"/{each.replace('~', '~0').replace('/', '~1')}" for each in steps)
    text = f"{pointer.strip('/') or 'request'}: {detail}"
    return InvalidRequestError(text, ((pointer, detail),))


def _given(document: Any, steps: list[str]) -> str:
    """Return the refused value in words, unless it is missing or long."""
    value = document
    for step in steps:
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, (list, tuple)) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return ""
    shown = repr(value)
    return f" (given {shown})" if len(shown) <= _SHOWN_CHARACTERS else ""


def _unknown_field(name: str) -> str:
    hint = did_you_mean(name, known_fields())
    return f"unknown field {name!r}{hint or '; see `estimate --help` for the fields'}"


def known_fields() -> set[str]:
    """Return the name of every field of the request, at any depth."""
    sections: list[type[Section]] = [
        EstimateRequest, *METHODS, *QUANTIZATIONS, *FP8_LIBRARIES, Qat, Optimizer, Loop,
        Parallelism, Hardware, Software, CpuOffload,
    ]  # fmt: skip
    return {name for section in sections for name in section.__struct_fields__} | {"name"}
