"""P-tuning: virtual tokens before the text that a small network makes out of trained vectors."""

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import Dim, dim
from estimator.eager.tensor import Tensor
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Weight
from estimator.run import Run
from estimator.section import Count
from estimator.sources import Cite
from estimator.techniques.method import Method
from estimator.techniques.methods.prompt_tuning import ENCODER, Prompt, prompted

_MODEL = Cite("peft", "tuners/p_tuning/model.py, PromptEncoder")


class EncodedPrompt(Prompt, frozen=True, eq=False, kw_only=True):
    """Virtual tokens that go through three linear layers before they meet the text.

    Args:
        inner: width between the linear layers.
    """

    inner: Dim

    def weights(self) -> tuple[Weight, ...]:
        """Return the table and the linear layers.

        Shapes:
            embedding         [P, h]         4 bytes
            mlp_head.0        [e, h] + [e]   4 bytes; e is encoder_hidden_size
            mlp_head.2        [e, e] + [e]   4 bytes
            mlp_head.4        [h, e] + [h]   4 bytes

        Source: peft, tuners/p_tuning/model.py, PromptEncoder.
        """
        layers = []
        for number, fan_in, fan_out in self._layers():
            layers += [
                Weight(f"{number}.weight", (fan_out, fan_in), DType.FLOAT32, True, source=_MODEL),
                Weight(f"{number}.bias", (fan_out,), DType.FLOAT32, True, source=_MODEL),
            ]
        return (*super().weights(), *layers)

    def _layers(self) -> tuple[tuple[str, Dim, Dim], ...]:
        return (
            ("mlp_head.0", self.width, self.inner),
            ("mlp_head.2", self.inner, self.inner),
            ("mlp_head.4", self.inner, self.width),
        )

    def encoded(self, run: Forward) -> Tensor:
        """Run the table's rows through the linear layers; one row of virtual tokens for all.

        Source: peft, tuners/p_tuning/model.py, PromptEncoder.forward.
        """
        x = self.looked_up(run)
        weights = {each.name: each for each in self.weights()}
        for position, (name, _, fan_out) in enumerate(self._layers()):
            with run.tape.module(name):
                matrix = run.param(ENCODER, weights[f"{name}.weight"])
                vector = run.param(ENCODER, weights[f"{name}.bias"])
                x = ops.linear(x if position == 0 else ops.relu(x), matrix, vector, fan_out)
        return x


class PTuning(Method, frozen=True, tag="p_tuning"):
    """Train vectors before the text, and the network behind them (PEFT's PromptEncoderConfig)."""

    peft: ClassVar[str | None] = "PromptEncoderConfig"
    source: ClassVar[Cite] = Cite("liu2021", "section 3, P-tuning")

    num_virtual_tokens: Annotated[
        int, Meta(ge=1, le=65_536, description="virtual tokens before the text")
    ] = 20
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: Count | None = None

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and the encoded virtual tokens in front.

        Raises:
            UnsupportedCombinationError: the LSTM, whose buffers cuDNN sizes for itself.
        """
        if self.encoder_reparameterization_type == "LSTM":
            raise UnsupportedCombinationError(
                "p_tuning with encoder_reparameterization_type 'LSTM' has no sourced answer: cuDNN "
                "sizes the buffers of an LSTM for itself; use 'MLP'"
            )
        width = run.spec.hidden
        inner = width if self.encoder_hidden_size is None else dim("e", self.encoder_hidden_size)
        tokens = dim("P", self.num_virtual_tokens)
        return prompted(run, EncodedPrompt(name=ENCODER, tokens=tokens, width=width, inner=inner))
