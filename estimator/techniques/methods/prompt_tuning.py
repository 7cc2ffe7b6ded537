"""Prompt tuning: trained vectors before the embedded text, so that every layer sees more tokens."""

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import BATCH, ONE, SEQ, Dim, dim
from estimator.eager.tensor import Tensor
from estimator.model.forward import Forward
from estimator.model.spec import VirtualTokens, Weight
from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.method import Method, frozen

CALL: Final = Cite("peft", "peft_model.py, PeftModelForCausalLM.forward")
ENCODER: Final = "prompt_encoder"


class Prompt(VirtualTokens, frozen=True, eq=False, kw_only=True):
    """Virtual tokens in front of the text.

    Args:
        tokens: how many.
        width: of the embeddings.
    """

    tokens: Dim
    width: Dim

    def prepare(self, run: Forward, layers: int) -> None:
        """Put ones before the padding mask, which makes the whole of it fp32.

        Shapes:
            mask of the virtual tokens  [b, P]  4 bytes
            mask                        [b, s]  4 bytes; s is the text and the virtual tokens

        Source: peft, peft_model.py, PeftModelForCausalLM.forward.
        """
        for name, shape in (
            ("mask of the virtual tokens", (BATCH, self.tokens)),
            ("mask of all tokens", (BATCH, SEQ)),
        ):
            run.caller_names[name] = run.tape.new(name, shape, DType.FLOAT32, CALL)

    def join(self, run: Forward, embedded: Tensor) -> Tensor:
        """Return virtual tokens and text in one tensor; the labels are lengthened alike.

        Shapes:
            labels of the virtual tokens  [b, P]     8 bytes
            labels                        [b, s]     8 bytes
            virtual tokens                [b, P, h]  width of the embeddings
            input of the layers           [b, s, h]  width of the embeddings

        Source: peft, peft_model.py, PeftModelForCausalLM.forward and PeftModel.get_prompt.
        """
        tape, names = run.tape, run.caller_names
        names["prefix_labels"] = tape.new(
            "labels of the virtual tokens", (BATCH, self.tokens), DType.INT64, CALL
        )
        names["labels"] = tape.new("labels of all tokens", (BATCH, SEQ), DType.INT64, CALL)
        with tape.module(ENCODER):
            rows = (BATCH, self.tokens, self.width)
            prompts = ops.repeat(self.encoded(run), rows, "a row for each sequence")
            prompts = ops.cast(prompts, embedded.dtype)
        names["prompts"] = prompts
        joined = ops.cat((prompts, embedded), (BATCH, SEQ, self.width), "virtual tokens and text")
        names["inputs_embeds"] = joined
        return joined

    def encoded(self, run: Forward) -> Tensor:
        """Return the virtual tokens of one row in fp32."""
        return self.looked_up(run)

    def looked_up(self, run: Forward) -> Tensor:
        """Look all virtual tokens up in their table."""
        ids = run.tape.new("prompt_tokens", (ONE, self.tokens), DType.INT64, CALL)
        return ops.embedding(ids, run.param(ENCODER, self.weights()[0]), self.width)

    def weights(self) -> tuple[Weight, ...]:
        """Return the table, which is fp32 whatever the model is.

        Shapes:
            embedding  [P, h]  4 bytes

        Source: lester2021, section 2; peft, tuners/prompt_tuning/model.py, PromptEmbedding.
        """
        source = Cite("peft", "tuners/prompt_tuning/model.py, PromptEmbedding")
        shape = (self.tokens, self.width)
        return (Weight("embedding.weight", shape, DType.FLOAT32, True, source=source),)


class PromptTuning(Method, frozen=True, tag="prompt_tuning"):
    """Train vectors that are put before the embedded text (PEFT's PromptTuningConfig)."""

    peft: ClassVar[str | None] = "PromptTuningConfig"
    source: ClassVar[Cite] = Cite("lester2021", "section 2, prompt tuning")

    num_virtual_tokens: Annotated[
        int, Meta(ge=1, le=65_536, description="virtual tokens before the text")
    ] = 20
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB"] = "RANDOM"

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and the virtual tokens in front."""
        prompt = Prompt(
            name=ENCODER, tokens=dim("P", self.num_virtual_tokens), width=run.spec.hidden
        )
        return prompted(run, prompt)


def prompted(run: Run, prompt: Prompt) -> Run:
    """Freeze every weight, and run the layers at the length of virtual tokens and text."""
    spec = frozen(run.spec)
    spec = replace(spec, embeddings=(*spec.embeddings, prompt))
    return replace(run, spec=spec, prompt_tokens=prompt.tokens.value)
