"""Software: what the version of the training stack changes, as a table of switches."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.errors import InvalidRequestError
from estimator.run import Block, LowBit, Run
from estimator.sources import Cite
from estimator.techniques.litgpt import litgpt_formats
from estimator.techniques.stage import Stage
from estimator.techniques.torchtune import fitted, fitted_early, fitted_middle


class Described(Struct, frozen=True):
    """What a framework's own model code is described for; everything else is refused by name.

    Args:
        methods: names of methods.
        precisions: words of the request's `precision`.
        checkpointing: words of its `activation_checkpointing`.
        quantizations: names of formats.
        adapter_dtypes: words of the method's `adapter_dtype`.
    """

    methods: tuple[str, ...]
    precisions: tuple[str, ...]
    checkpointing: tuple[str, ...]
    quantizations: tuple[str, ...]
    adapter_dtypes: tuple[str, ...] = ("base", "float32", "bfloat16")


_NOTHING: Final = Described((), (), (), ())


class SoftwareProfile(Struct, frozen=True):
    """What is known to differ from the newest stack.

    Args:
        loss: the loss of `estimator/memory/loss.py` that runs.
        loading: the way of `estimator/memory/loading.py` in which the model is made.
        not_modelled: what differs too and is not accounted for.
        model_code: the module that reads a configuration, where the framework has a model of its
            own instead of transformers', and behind a colon the function, if it is not `read`.
        described: what that model is described for.
        formats: what the profile makes of a run whose weights have got their formats.
        reentrant: activation checkpointing is reentrant where nothing else is said.
        clips: the loop clips gradients where `max_grad_norm` says so.
        keeps_outputs: the loop holds the logits until backward has ended.
        asks_inputs: checkpointed layers make the embeddings' output want a gradient.
        repeats_heads: keys and values are written out for every query head before SDPA.
        low_bit: what low-bit states of optimizers look like.
    """

    loss: str
    not_modelled: tuple[str, ...] = ()
    model_code: str | None = None
    described: Described = _NOTHING
    formats: Callable[[Run], Run] | None = None
    reentrant: bool = False
    clips: bool = True
    keeps_outputs: bool = False
    asks_inputs: bool = True
    repeats_heads: bool = False
    low_bit: LowBit = LowBit()
    loading: str = "one by one"


# Loops of their own tell bitsandbytes nothing about embeddings, and leave torchao its own blocks:
# optim/adam.py of 0.18, AdamW4bit.__init__ (8-bit: 256, as for the Trainer).
_OWN_LOOP: Final = LowBit(
    torchao_4bit=Block(128, Cite("torchao", "optim/adam.py, AdamW4bit.__init__")),
    tables_in_32bit=False,
)
# torchao changed its 8-bit block on 25 September 2024 (#927) to match bitsandbytes 0.44, of the
# same month; its optimizers are of July.
_BEFORE_256: Final = LowBit(
    bitsandbytes=Block(2048, Cite("bitsandbytes-0-43", "optim/optimizer.py, init_state")),
    torchao_8bit=Block(2048, Cite("torchao-2024-09", "low_bit_optim/adam.py, AdamW8bit.__init__")),
    torchao_4bit=Block(128, Cite("torchao-2024-09", "low_bit_optim/adam.py, AdamW4bit.__init__")),
    tables_in_32bit=False,
)

_OLD_ATTENTION: Final = (
    "attention code of transformers before 4.46: rotary tables made in every layer, dense masks of "
    "the eager and sdpa implementations"
)

# Its recipes refuse fp16, and make adapters of the weights' own type.
_TORCHTUNE: Final = Described(
    methods=("full", "lora"),
    precisions=("bf16", "fp32"),
    checkpointing=("none", "full"),
    quantizations=("nf4",),
    adapter_dtypes=("base",),
)

# transformers 4.45.2 and 4.48.1: modeling_utils.py, gradient_checkpointing_enable begins with
# `gradient_checkpointing_kwargs = {"use_reentrant": True}`.
# transformers: "5" holds from 4.49 on, "4" for 4.46 to 4.48, "4.45" for it and what came before.
# 4.45.2, models/llama/modeling_llama.py, LlamaSdpaAttention, and 4.48.1 to 4.53.3,
# integrations/sdpa_attention.py: repeat_kv before SDPA, mask or not; 4.54.0 has use_gqa_in_sdpa.
# So of 4.49 to 4.53 "5" holds but for grouped heads with SDPA.
# The first version of a framework is the one that is meant when none is named.
PROFILES: Final[dict[str, dict[str, SoftwareProfile]]] = {
    "transformers": {
        "5": SoftwareProfile("transformers-5", loading="transformers-5"),
        "4": SoftwareProfile(
            "transformers-4", reentrant=True, repeats_heads=True, loading="transformers-4"
        ),
        "4.45": SoftwareProfile(
            "transformers-4.45",
            (_OLD_ATTENTION,),
            reentrant=True,
            repeats_heads=True,
            loading="transformers-4",
        ),
    },
    # SFTTrainer trains transformers' models; its loss and other defaults are in `request.py`.
    # Read at each tag: 1.3 holds for 1.3 to 1.5, 0.27 for 0.27 to 1.2 (trainer/base_config.py from
    # 0.27 on: use_reentrant False), 0.22 for 0.22 to 0.25 (before create_model_from_path had a
    # default type: transformers 4's, fp32). In 0.26 the type was that of the checkpoint. 1.6 to
    # 1.15 have another chunked loss.
    "trl": {
        "1.16": SoftwareProfile(
            "transformers-5",
            (
                "the metrics that SFTTrainer computes from log-probabilities and entropies between "
                "forward and backward: a few numbers for each token",
            ),
            loading="trl",
        ),
        "1.3": SoftwareProfile("transformers-5-trl-1.3", loading="trl"),
        "0.27": SoftwareProfile("transformers-5-trl-0.27", loading="device map"),
        "0.22": SoftwareProfile("transformers-5-trl-0.27", reentrant=True),
    },
    "litgpt": {
        "2023.10": SoftwareProfile(
            "litgpt",
            (
                "the adapters' targets of litgpt: LoRA on `attn` means queries and values, its "
                "default, and other choices among the three are not told apart",
            ),
            model_code="estimator.model.litgpt",
            described=Described(
                methods=("lora", "llama_adapter", "llama_adapter_v2"),
                precisions=("bf16", "fp16"),
                checkpointing=("none",),
                quantizations=("nf4", "fp4"),
            ),
            formats=litgpt_formats,
            # finetune/lora.py and its neighbours: `train` has no clipping.
            clips=False,
            low_bit=_BEFORE_256,
        ),
    },
    # 0.6 is 0.6.1; 0.3 is the main branch of September 2024, 0.1 from March to May of that year.
    "torchtune": {
        "0.6": SoftwareProfile(
            "torchtune-0-6",
            ("clip_grad_norm of torchtune's configurations, which is off by default",),
            model_code="estimator.model.torchtune",
            described=_TORCHTUNE,
            formats=fitted,
            loading="torchtune",
            asks_inputs=False,
            clips=False,
            low_bit=_OWN_LOOP,
        ),
        "0.3": SoftwareProfile(
            "torchtune-0-6",
            (
                "a second packed copy of each layer without an adapter, in QLoRA with adapters on "
                "some layers only: torchtune 0.3 keeps it under the name nf4_weight",
            ),
            model_code="estimator.model.torchtune:read_middle",
            described=_TORCHTUNE,
            formats=fitted_middle,
            loading="torchtune-0-3",
            asks_inputs=False,
            clips=False,
            low_bit=_BEFORE_256,
        ),
        "0.1": SoftwareProfile(
            "torchtune-0-1",
            model_code="estimator.model.torchtune:read_early",
            described=_TORCHTUNE,
            formats=fitted_early,
            loading="torchtune-0-1",
            keeps_outputs=True,
            asks_inputs=False,
            clips=False,
            low_bit=_BEFORE_256,
        ),
    },
}


def profile(framework: str, version: str) -> SoftwareProfile:
    """Return what a framework's version is known to do.

    Raises:
        InvalidRequestError: the framework has no such version here.
    """
    versions = PROFILES[framework]
    if version not in versions:
        raise InvalidRequestError(
            f"software: {framework} has no version {version!r} here; it has {', '.join(versions)}"
        )
    return versions[version]


class Software(Struct, frozen=True):
    """The versions that train."""

    stage: ClassVar[Stage] = Stage.KERNEL
    profile: SoftwareProfile

    def apply(self, run: Run) -> Run:
        """Set the loss, the formats of the framework's own layers, what checkpointing is."""
        run = replace(
            run,
            loss=self.profile.loss,
            reentrant=self.profile.reentrant,
            keeps_outputs=self.profile.keeps_outputs,
            asks_inputs=self.profile.asks_inputs,
            loading=self.profile.loading,
            settings=replace(run.settings, repeats_heads=self.profile.repeats_heads),
        )
        return self.profile.formats(run) if self.profile.formats is not None else run
