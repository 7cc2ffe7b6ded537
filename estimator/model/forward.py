"""The forward pass of one step: modules by name, and the blocks that families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from msgspec import Struct

from estimator.dtypes import DType
from estimator.eager import attention, compiled, foak, liger, ops, unsloth
from estimator.eager.attention import MASK, PREFIXED_MASK, Heads
from estimator.eager.checkpoint import Checkpointing, checkpoint
from estimator.eager.ops import F32
from estimator.eager.size import BATCH, ONE, SECOND, SEQ, Dim, Shape, dim
from estimator.eager.tensor import Edge, Param, Tape, Tensor, view
from estimator.errors import UnsupportedCombinationError, UnsupportedModelError
from estimator.model.spec import Embedding, LayerKind, Linear, ModelSpec, Module, Norm, Weight
from estimator.sources import Cite

M = TypeVar("M", bound=Module)
POSITIONS: Final = Cite("hf-modeling", "llama/modeling_llama.py, LlamaModel.forward")
# Wider heads need cuDNN 9.22 on Hopper or Blackwell (torch-sdpa, check_cudnn_tensor_shapes).
MAX_CUDNN_WIDTH: Final = 128
MASKING: Final = Cite("hf-masking", "sdpa_mask, eager_mask")


class Settings(Struct, frozen=True):
    """What the request says about how the forward pass runs.

    Args:
        attention: `eager`, `sdpa`, `flash_attention_2`, `flash_attention_3` or `flex_attention`.
        kernel: the one that SDPA has to take (`math`, `efficient`, `flash`, `cudnn`); None: the
            first that accepts the inputs.
        padding: some rows of the micro-batch end in padding, so that masks are built.
        packing: the sequences are one row, and `position_ids` say where each begins.
        keeps_cache: keys and values stay alive until the outputs do (use_cache).
        liger: Liger's kernels run norms, rotary positions and gated MLPs.
        foak: fms-acceleration's run norms and rotary positions.
        unsloth: Unsloth's run norms, rotary positions and whole MLPs with their adapters.
        neftune: noise is added to what the embeddings have looked up.
        compiled: torch.compile has compiled the model as a whole.
        cuda_graphs: the compiled graphs are recorded, in a pool of memory of their own.
        repeats_heads: keys and values are written out for every query head before SDPA.
    """

    attention: str = "sdpa"
    kernel: str | None = None
    padding: bool = False
    packing: bool = False
    keeps_cache: bool = False
    liger: bool = False
    foak: bool = False
    unsloth: bool = False
    neftune: bool = False
    compiled: bool = False
    cuda_graphs: bool = False
    repeats_heads: bool = False

    @property
    def is_flash(self) -> bool:
        """Whether a package of FlashAttention runs, and not a kernel of torch."""
        return self.attention in ("flash_attention_2", "flash_attention_3")


class Given(Struct, frozen=True, eq=False):
    """What the model's forward hands to every layer beside the hidden states.

    Args:
        rotary: the tables of cosines and sines, by name.
        masks: the attention masks, by name.
        positions: the numbers of the positions, which most layers are given and few read.
    """

    rotary: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, Tensor]
    positions: Tensor | None

    def to(self, kind: LayerKind) -> Given:
        """Return what layers of one kind are given: their mask, and their pair of tables."""
        other = "full" if kind.sliding_window is not None else "sliding"
        tables = kind.facts.get("rotary")
        return Given(
            {name: each for name, each in self.rotary.items() if tables in (None, name)},
            {name: each for name, each in self.masks.items() if name != other},
            self.positions,
        )


class Forward:
    """Runs modules on the tape; parameters are made once and shared by forward and recompute."""

    def __init__(self, tape: Tape, spec: ModelSpec, settings: Settings, dtype: DType) -> None:
        self.tape = tape
        self.spec = spec
        self.settings = settings
        self.dtype = dtype
        self.modules: dict[str, Module] = {}
        self.rotary: dict[str, tuple[Tensor, Tensor]] = {}
        self.masks: dict[str, Tensor] = {}
        self.cache: list[Tensor] = []
        # Outputs that a fused function has made before their layer was called, by its name.
        self.fused: dict[str, Tensor] = {}
        # Keys and values of a prefix, by the site of their layer.
        self.prefixes: dict[int, list[Tensor]] = {}
        # Local names of the model's forward that live until it returns.
        self.names: dict[str, Tensor] = {}
        # Those of the forward that called the model's, which live until the loss is made.
        self.caller_names: dict[str, Tensor] = {}
        # A name in the layer's forward, though nobody reads them.
        self.attention_weights: Tensor | None = None
        self.input_requires_grad = False
        self.checkpointing: Checkpointing | None = None
        self.attends_by_products = False
        # The mask that a compiled backward makes in the last layer and lets go of in the first.
        self.backward_mask: list[Tensor] = []
        # The one that a compiled forward makes in the first, and what the last layer has added up.
        self.forward_mask: list[Tensor] = []
        self.compiled_terms: list[Tensor] = []
        # What a compiled head has kept for its gradient, if it is tied to the embeddings.
        self.of_tied_head: list[Tensor] = []
        self._params: dict[tuple[int, str, str], Param] = {}
        self._tied: dict[str, str] = {}
        # The last input that a compiled graph has cast for adapters, and its copy.
        self._cast: tuple[Tensor, Tensor] | None = None

    # -- modules ------------------------------------------------------------------------------

    def enter(self, site: int, modules: Iterable[Module]) -> None:
        """Move to a site of the step, whose modules are found by name from now on."""
        self.tape.enter(site)
        self._cast = None
        self.modules = {module.name: module for module in modules}

    def param(self, module: str, weight: Weight, site: int | None = None) -> Param:
        """Return the parameter behind a module's weight at this site, or at another."""
        tied = self._tied.get(module) if weight.name == "weight" else None
        here = self.tape.site if site is None else site
        site, name = (0, tied) if tied else (here, module)
        key = (site, name, weight.name)
        if key not in self._params:
            self._params[key] = Param(
                f"{name}.{weight.name}",
                weight.shape,
                weight.dtype,
                weight.trainable,
                keeps_gradient=weight.keeps_gradient,
            )
        return self._params[key]

    def given(self) -> Given:
        """Hand over what embeddings and masks have prepared; the caller's name keeps it alive."""
        given = Given(self.rotary, self.masks, self.names.get("position_ids"))
        self.rotary, self.masks = {}, {}
        return given

    def tie(self, module: str, to: str) -> None:
        """Let a module use the weight of one of the embeddings."""
        self._tied[module] = to

    def has(self, name: str) -> bool:
        """Whether this site has a module of that name."""
        return name in self.modules

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Run a linear layer, with its adapter and its weight format if it has them."""
        module = self._find(name, Linear)
        with self.tape.module(name):
            if module.adapter is not None:
                return module.adapter.forward(self, module, x)
            return self.base_linear(x, module)

    def cast_for_adapter(self, x: Tensor, dtype: DType, layer: str) -> Tensor:
        """Cast an adapter's input: each layer anew, but once for all layers of a compiled graph.

        Under autocast a compiled graph casts to fp32 and back in one kernel: the one that made the
        input, or, behind attention, one that copies it.
        """
        if not self.settings.compiled:
            return ops.cast(x, dtype, "input cast for the adapter")
        if self._cast is None or self._cast[0] is not x:
            self._cast = None
            if self.tape.autocast is None or not self.tape.autocast_enabled:
                copy = ops.cast(x, dtype, "input cast for the adapters")
            elif layer == "self_attn.o_proj":
                copy = ops.copy(x, name="input cast for the adapter and back")
            else:
                copy = x
            self._cast = (x, copy)
        return self._cast[1]

    def base_linear(self, x: Tensor, module: Linear, weight: ops.Operand | None = None) -> Tensor:
        """Run a linear layer without its adapter, or with another weight in place of its own."""
        if module.format is not None:
            return module.format.forward(self, module, x)
        weight = self.param(module.name, module.weight()) if weight is None else weight
        bias = module.bias_weight()
        vector = self.param(module.name, bias) if bias else None
        if module.product is not None:
            if isinstance(weight, Tensor):
                raise UnsupportedCombinationError(
                    f"another product of {module.name} with a weight that is made anew has no "
                    "sourced answer here yet; leave out target_parameters or the fp8 kernels"
                )
            return module.product.forward(self, weight, vector, x, module.fan_out)
        if self.settings.compiled and module.name in self._tied and isinstance(weight, Param):
            return compiled.tied_head(x, weight, self._row(module), self.of_tied_head)
        if self.settings.compiled:
            return ops.linear(x, weight, vector, self._row(module))
        if not module.spelled_out:
            return ops.linear(x, weight, vector, module.fan_out)
        product = ops.linear(x, weight, None, module.fan_out, caches=False)
        return product if vector is None else ops.add(product, vector, "sum with the bias")

    def _row(self, module: Linear) -> Dim:
        """Return the width of a compiled product's rows; what is handed out has no padding."""
        if module.name == self.spec.head.name:
            return module.fan_out
        return compiled.padded(module.fan_out, self.tape.autocast or self.dtype)

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm as Llama writes it: statistics in fp32, the weight applied in the input's type.

        Source: hf-modeling, llama/modeling_llama.py, LlamaRMSNorm.forward.
        """
        with self.tape.module(name):
            if self.settings.liger:
                return liger.rms_norm(x, self.norm_weight(name), in_place=True)
            if self.settings.foak:
                return foak.rms_norm(x, self.norm_weight(name))
            if self.settings.unsloth:
                return foak.rms_norm(x, self.norm_weight(name), unsloth.NORM)
            if self.settings.compiled:
                return compiled.rms_norm(x, self.norm_weight(name))
            hidden = ops.cast(x, F32)
            variance = ops.mean_last(ops.power(hidden))
            hidden = ops.mul(hidden, ops.rsqrt(ops.shift(variance)), "normalized")
            return ops.mul(self.norm_weight(name), ops.cast(hidden, x.dtype))

    def centered_rms_norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm as Gemma writes it: one is added to the weight, and all of it is in fp32.

        Source: hf-modeling, gemma/modeling_gemma.py, GemmaRMSNorm.forward.
        """
        with self.tape.module(name):
            if self.settings.liger:
                # Gemma 1 alone has no norm whose gradient a residual needs as well.
                in_place = self.spec.model_type == "gemma"
                return liger.rms_norm(x, self.norm_weight(name), in_place=in_place)
            output = _over_rms(ops.cast(x, F32))
            output = ops.mul(output, ops.one_plus(self.tape, self.norm_weight(name)), "weighted")
            return ops.cast(output, x.dtype)

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        """Run torch's LayerNorm."""
        weights = [self.param(name, each) for each in self._find(name, Norm).used()]
        weight, bias = (*weights, None, None)[:2]
        with self.tape.module(name):
            return ops.layer_norm(x, weight, bias)

    def embedding(self, ids: Tensor, name: str, *, scaled: bool = False) -> Tensor:
        """Look rows up in a table; the model's forward keeps a name on those of the first table.

        Args:
            scaled: the module multiplies what it looked up, as Gemma's does.
        """
        module = self._find(name, Embedding)
        with self.tape.module(name):
            table: ops.Operand = self.param(name, module.weights()[0])
            if module.rows_trained is not None:
                table = module.rows_trained.merged(self, module)
            if self.settings.compiled:
                out = compiled.embedding(ids, table, module.width, self.of_tied_head)
            else:
                out = ops.embedding(ids, table, module.width)
            if scaled:
                out = ops.scale(out, "scaled rows")
            del table
        if name == self.spec.embeddings[0].name:
            # Dynamo ends a graph where a hook makes its output want a gradient.
            if self.input_requires_grad and not out.requires_grad:
                leaf = Param("inputs_embeds", out.shape, out.dtype, True)
                leaf.held = view(out, out.shape)
                out.edge = Edge(leaf)
            if self.settings.neftune:
                out = self._with_noise(out)
            if self.spec.virtual_tokens is not None:
                out = self.spec.virtual_tokens.join(self, out)
            self.names["inputs_embeds"] = out
        return out

    def _with_noise(self, rows: Tensor) -> Tensor:
        """Add uniform noise to the rows that were looked up.

        Shapes:
            noise, dies with the sum  [b, s, h]  width of the rows
            sum                       [b, s, h]

        Source: hf-library, integrations/neftune.py, neftune_post_forward_hook.
        """
        source = Cite("hf-library", "integrations/neftune.py, neftune_post_forward_hook")
        noise = self.tape.new("noise", rows.shape, rows.dtype, source)
        return ops.add(rows, noise, "rows with noise")

    def norm_weight(self, name: str) -> Param:
        """Return a norm's weight."""
        return self.param(name, self._find(name, Norm).used()[0])

    def _find(self, name: str, kind: type[M]) -> M:
        module = self.modules[name]
        if not isinstance(module, kind):
            raise TypeError(f"{name} is no {kind.__name__}")
        return module

    def add_residual(self, hidden: Tensor, residual: Tensor, adapter: str) -> Tensor:
        """Add a sublayer's output to its residual, through the adapter that this site may have."""
        module = self.modules.get(adapter)
        if module is None and self.settings.compiled:
            first = self.tape.site == 1 and adapter == "attention_adapters"
            return compiled.residual(hidden, residual, again=first)
        if module is None:
            return ops.add(hidden, residual, "residual")
        joined: Tensor = module.join(self, hidden, residual)  # type: ignore[attr-defined]
        return joined

    def prompted(self, kind: LayerKind, hidden: Tensor, output: Tensor) -> Tensor:
        """Return attention's output as the learned tokens of this site, if it has any, leave it."""
        for module in self.modules.values():
            add = getattr(module, "prompted", None)
            if add is not None:
                output = add(self, kind, hidden, output)
        return output

    def intervene(self, hidden: Tensor) -> Tensor:
        """Return a layer's output as the interventions of this site, if it has any, leave it."""
        for module in self.modules.values():
            edit = getattr(module, "intervene", None)
            if edit is not None:
                hidden = edit(self, hidden)
        return hidden

    # -- attention ----------------------------------------------------------------------------

    def prepare_rotary(self, width: int, name: str = "rotary") -> None:
        """Make the cosine and sine tables that all layers share.

        Shapes:
            position_ids  [1, s]     8 bytes
        cos, sin      [1, s, d]  width of the hidden states

        Source: hf-modeling, llama/modeling_llama.py, LlamaRotaryEmbedding.forward.
        """
        if self.settings.compiled:
            return
        shape = (ONE, SEQ, dim("d", width))
        source = Cite("hf-modeling", "llama/modeling_llama.py, LlamaRotaryEmbedding.forward")
        if "position_ids" not in self.names:
            numbers = self.tape.new("position_ids", (ONE, SEQ), DType.INT64, POSITIONS)
            self.names["position_ids"] = numbers
        cos = self.tape.new(f"{name} cos", shape, self.dtype, source)
        sin = self.tape.new(f"{name} sin", shape, self.dtype, source)
        self.rotary[name] = (cos, sin)

    def heads(self, x: Tensor, shape: Shape) -> Tensor:
        """Return queries or keys as heads that will be rotated: [b, s, H, d].

        Source: hf-modeling, llama/modeling_llama.py, LlamaAttention.forward; torch-autograd, the
        gradient of a view is reshaped.
        """
        how = self.settings
        in_place = how.compiled or how.liger or how.foak or how.unsloth
        return view(x, shape) if in_place or shape[2].value == 1 else ops.split_heads(x, shape)

    def value_heads(self, x: Tensor, shape: Shape) -> Tensor:
        """Return values as heads; their gradient lies head by head behind plain products only."""
        if self.settings.compiled or shape[2].value == 1:
            return view(x, shape)
        return ops.split_heads(x, shape, lambda: self.attends_by_products)

    def rotate(self, q: Tensor, k: Tensor, name: str = "rotary") -> tuple[Tensor, Tensor]:
        """Apply rotary positions to queries and keys.

        Source: hf-modeling, llama/modeling_llama.py, apply_rotary_pos_emb and rotate_half.
        """
        if self.settings.compiled:
            return compiled.rotated(q), compiled.rotated(k)
        cos, sin = self.rotary[name]
        with self.tape.module(name):
            if self.settings.liger or self.settings.foak:
                return liger.rope(q, k, cos, sin)
            if self.settings.unsloth:
                return unsloth.rope(q, k, cos, sin)
            rotated_q = rotated(q, cos, sin)
            rotated_k = rotated(k, cos, sin)
        return rotated_q, rotated_k

    def prepare_masks(self, kinds: Iterable[LayerKind]) -> None:
        """Build the masks that the model builds once for all layers.

        SDPA needs none while attention is plainly causal; padding, packed sequences, a prefix in
        the cache, and a window that the length exceeds, need one. Eager attention always adds a
        float mask. FlashAttention takes the padding mask itself, and flex attention a block mask.

        Shapes:
            mask  [b, 1, s, s]  1 byte for sdpa, the width of the model for eager; with a prefix
                                [b, 1, s, t]

        Source: hf-masking, sdpa_mask, eager_mask and _ignore_causal_mask_sdpa.
        """
        if self.settings.is_flash or self.settings.attention == "flex_attention":
            return
        if self.settings.compiled:
            if self.checkpointing is None:
                self.masks["full"] = self._compiled_mask()
            return
        eager = self.settings.attention == "eager"
        for kind in kinds:
            windowed = kind.sliding_window is not None
            masked = self.settings.padding or self.settings.packing
            needed = eager or masked or (windowed and self.exceeds(kind))
            shape = PREFIXED_MASK if self.prefixes else MASK
            needed = needed or bool(self.prefixes)
            key = "sliding" if windowed else "full"
            if needed and key not in self.masks:
                mask = self.tape.new(f"{key} attention mask", shape, DType.BOOL, MASKING)
                if eager:
                    mask = self.tape.new(f"{key} attention mask", shape, self.dtype, MASKING)
                self.masks[key] = mask

    def _compiled_mask(self) -> Tensor:
        return compiled.mask(self.tape, self.tape.autocast or self.dtype)

    def exceeds(self, kind: LayerKind) -> bool:
        """Whether the length is beyond this kind's window."""
        return self.tape.regime.exceeds_window and kind.sliding_window is not None

    def attend(self, kind: LayerKind, q: Tensor, k: Tensor, v: Tensor, p: float = 0.0) -> Tensor:
        """Run attention as the chosen implementation does, and return [b, s, H*d].

        Args:
            q: [b, s, H, d], or [b, H, s, d] where it lies head by head in memory
            k: [b, s, KV, d], or head by head like q
            v: [b, s, KV, d]
            p: dropout on the attention weights.

        Source: korthikanti2022, section 5: attention alone is recomputed, where that is asked for.
        """
        k, v = self.through_cache(kind, k, v)
        mask = self.masks.get("sliding" if kind.sliding_window is not None else "full")
        if self.settings.compiled and mask is None:
            mask = self._compiled_mask()
        if self.checkpointing is not None and self.checkpointing.scope == "attention":

            def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return self._kernel(kind, q, k, v, mask, p)

            out = checkpoint(self.checkpointing, kernel, q, k, v)
            self.attention_weights = None
        else:
            out = self._kernel(kind, q, k, v, mask, p)
        if out.shape[1] is not SEQ:
            if self.tape.regime.several_rows:
                # Its gradient lies by token, and what it is multiplied with, head by head.
                out = ops.split_heads(out, out.shape)
            out = ops.copy(out, (BATCH, SEQ, kind.heads.query, kind.heads.width), "output by token")
        return view(out, (BATCH, SEQ, dim("H·d", kind.heads.query.value * kind.heads.width.value)))

    def through_cache(self, kind: LayerKind, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values as the cache hands them back: appended to what it held, nothing.

        Source: hf-library, cache_utils.py, DynamicLayer.update.
        """
        before = self.prefixes.pop(self.tape.site, None)
        if before is not None:
            shape = (BATCH, kind.heads.key_value, SECOND, kind.heads.width)
            named = ((before.pop(0), k, "keys"), (before.pop(0), v, "values"))
            k, v = (ops.cat((old, new), shape, f"prefix and {name}") for old, new, name in named)
            self.cache += [k, v]
            return k, v
        if not self.settings.keeps_cache or kind.checkpointed:
            return k, v
        shape = (BATCH, kind.heads.key_value, SEQ, kind.heads.width)
        k, v = (ops.copy(each, shape, "copy in the cache") for each in (k, v))
        self.cache += [k, v]
        return k, v

    def _kernel(
        self, kind: LayerKind, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float
    ) -> Tensor:
        heads = kind.heads
        if self.settings.attention == "eager":
            self.attends_by_products = True
            out, self.attention_weights = kind.eager(q, k, v, mask, heads, p)
            return out
        if self.settings.attention == "flex_attention":
            return attention.flex(q, k, v, heads)
        if self.settings.repeats_heads and not (
            self.settings.is_flash or self.spec.broadcasts_keys
        ):
            k, v = (attention.repeat_heads(each, heads) for each in (k, v))
            heads = attention.Heads(heads.query, heads.query, heads.width)
        if self.settings.kernel is not None:
            return self._chosen(self.settings.kernel, q, k, v, mask, heads, p)
        if mask is not None and heads.groups > 1 and self.spec.broadcasts_keys:
            return attention.math_broadcast(q, k, v, mask, heads)
        if mask is not None:
            keys, values = (attention.repeat_heads(each, heads) for each in (k, v))
            return attention.efficient(q, keys, values, mask, heads)
        half = self.tape.autocast if self.tape.autocast_enabled else None
        if self.settings.is_flash:
            return self._flash(half or q.dtype, q, k, v, heads)
        if (half or q.dtype).is_half:
            return attention.flash(q, k, v, heads)
        if heads.groups == 1:
            return attention.efficient(q, k, v, None, heads)
        self.attends_by_products = True
        return attention.math_causal(q, k, v, heads, p)

    def _flash(self, dtype: DType, q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
        """Run the flash-attn package, which takes half precision only.

        Raises:
            UnsupportedCombinationError: the inputs are fp32.
        """
        if not dtype.is_half:
            raise UnsupportedCombinationError(
                f"{self.settings.attention} takes fp16 and bf16 only, and the queries of this run "
                "are fp32; choose a half precision, autocast, or attention sdpa"
            )
        kernel = attention.flash_3 if self.settings.attention.endswith("3") else attention.flash
        if self.settings.padding:
            return attention.flash_unpadded(q, k, v, heads, kernel)
        return kernel(q, k, v, heads)

    def _chosen(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        heads: Heads,
        p: float,
    ) -> Tensor:
        """Run the kernel of SDPA that the training script allows, and no other.

        transformers repeats keys and values for a mask, and hands grouped heads over without one.

        Raises:
            UnsupportedCombinationError: the kernel does not accept the inputs.

        Source: torch-sdpa, cuda/sdp_utils.cpp, can_use_flash_attention,
        can_use_mem_efficient_attention and can_use_cudnn_attention; cudnn-frontend,
        CompositeSDPABackwardNode: cuDNN's buffers have the sizes of FlashAttention's.
        """
        half = self.tape.autocast if self.tape.autocast_enabled else None
        is_half = (half or q.dtype).is_half
        if mask is not None:
            k, v = (attention.repeat_heads(each, heads) for each in (k, v))
        if name == "math":
            self.attends_by_products = True
            return attention.math(q, k, v, mask, heads, p)
        if name == "efficient" and (mask is not None or heads.groups == 1):
            return attention.efficient(q, k, v, mask, heads)
        wide = name == "cudnn" and heads.width.value > MAX_CUDNN_WIDTH
        if name != "efficient" and mask is None and is_half and not wide:
            return attention.flash(q, k, v, heads)
        given = "fp16 or bf16" if is_half else "fp32"
        raise UnsupportedCombinationError(
            f"sdpa_{name} does not take these inputs: {given}, {heads.groups} query heads for each "
            f"key head of width {heads.width.value}, {'a' if mask is not None else 'no'} mask; use "
            "attention sdpa, which takes the first kernel that does"
        )

    # -- feed-forward -------------------------------------------------------------------------

    def gated_mlp(self, x: Tensor, activation: str, names: tuple[str, str, str]) -> Tensor:
        """Run `down(act(gate(x)) * up(x))`.

        Source: hf-modeling, llama/modeling_llama.py, LlamaMLP.forward.
        """
        gate, up, down = names
        if self.settings.unsloth:
            # The adapter of the first layer runs all three.
            return self.linear(x, gate)
        if self.settings.liger:
            return self.linear(liger.gated(self.linear(x, gate), self.linear(x, up)), down)
        if self.settings.compiled:
            adapted = any(self._find(name, Linear).adapter is not None for name in (gate, up))
            product = compiled.gated(self.linear(x, gate), self.linear(x, up), adapted=adapted)
            return self.linear(product, down)
        # Nothing gets a name, as upstream: the activated gate dies with the product.
        return self.linear(
            ops.mul(
                activate(self.linear(x, gate), activation), self.linear(x, up), "gated product"
            ),
            down,
        )

    def plain_mlp(
        self, x: Tensor, activation: str, names: tuple[str, str], p: float = 0.0
    ) -> Tensor:
        """Run `dropout(down(act(up(x))))`.

        Source: hf-modeling, gpt2/modeling_gpt2.py, GPT2MLP.forward.
        """
        up, down = names
        hidden = activate(self.linear(x, up), activation)
        hidden = self.linear(hidden, down)
        return ops.dropout(hidden, p)


def _over_rms(x: Tensor) -> Tensor:
    """Return `x / rms(x)`; the mean is freed before the product."""
    return ops.mul(x, ops.rsqrt(ops.shift(ops.mean_last(ops.power(x)))), "normalized")


def head_by_head(x: Tensor) -> Tensor:
    """Name the layout that cat writes: it is given [b, H, s, d], which lies token by token."""
    batch, tokens, heads, width = x.shape
    return view(x, (batch, heads, tokens, width))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x * cos + rotate_half(x) * sin`."""
    return ops.add(ops.mul(x, cos), ops.mul(rotate_half(x), sin))


def rotate_half(x: Tensor) -> Tensor:
    """Return `cat(-x2, x1)` of the two halves of the last dimension."""
    width = x.shape[-1]
    half = dim("d/2", width.value // 2)
    first, second = ops.narrow(x, half), ops.narrow(x, half)
    return ops.cat_last((ops.neg(second), first), width)


def activate(x: Tensor, name: str) -> Tensor:
    """Run an activation by the name that `config.json` gives it."""
    try:
        return ACTIVATIONS[name](x)
    except KeyError:
        raise UnsupportedModelError(
            f"activation {name!r} has no source here yet; known: {', '.join(sorted(ACTIVATIONS))}"
        ) from None


def gelu_new(x: Tensor) -> Tensor:
    """GELU by tanh, written out in separate operators (NewGELUActivation).

    Source: hf-library, activations.py, NewGELUActivation.forward.
    """
    half = ops.scale(x, "half the input")
    # One expression, as there: a name would keep its temporary alive to the end.
    return ops.mul(
        half,
        ops.shift(ops.tanh(ops.scale(ops.add(x, ops.scale(ops.power(x, "cube")), "inner sum")))),
        "gelu_new",
    )


def gelu_fast(x: Tensor) -> Tensor:
    """GELU by tanh without a power, written out in separate operators (FastGELUActivation).

    Source: hf-library, activations.py, FastGELUActivation.forward.
    """
    half = ops.scale(x, "half the input")
    return ops.mul(
        half,
        ops.shift(
            ops.tanh(
                ops.mul(
                    ops.scale(x, "scaled input"),
                    ops.shift(ops.mul(ops.scale(x, "small multiple"), x, "scaled square")),
                    "inner product",
                )
            )
        ),
        "gelu_fast",
    )


ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": ops.silu,
    "swish": ops.silu,
    "gelu": ops.gelu,
    "gelu_pytorch_tanh": ops.gelu,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
    "relu": ops.relu,
}
