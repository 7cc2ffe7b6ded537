"""Unsloth's layers and loss on a real model: its functions, written down without their kernels.

The package does not import without a GPU. Here its autograd functions are written anew from its
source: which tensors they make, save, write over and let go, and when. Matrix products run as torch
runs them; where Unsloth launches a kernel of Triton, only what the kernel fills is made. What
inductor makes of the loss was read from the code that it writes for one chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, Final

import torch

from estimator.request import EstimateRequest
from profiler import trace

BUFFER: Final = "unsloth_dequantized_weight"
# fused_losses/cross_entropy_loss.py, get_chunk_size.
_BYTES_PER_LOGIT: Final = 16.0
_TARGET_GIB: Final = 4.0


def wanted(request: EstimateRequest) -> bool:
    """Whether a request asks for Unsloth's kernels."""
    return "unsloth" in request.kernels


def fit(model: Any) -> None:
    """Patch a model that has its adapters (`patch_peft_model`)."""
    base = model.get_base_model()
    scratch = _scratch(base)
    for layer in base.model.layers:
        layer.input_layernorm.forward = MethodType(_norm, layer.input_layernorm)
        layer.post_attention_layernorm.forward = MethodType(_norm, layer.post_attention_layernorm)
        layer.self_attn.forward = MethodType(_attention, layer.self_attn)
        layer.mlp.forward = MethodType(_mlp, layer.mlp)
    base.model.norm.forward = MethodType(_norm, base.model.norm)
    if scratch is not None:
        base.register_buffer(BUFFER, scratch, persistent=False)
    model.enable_input_require_grads()


def _scratch(base: Any) -> Any:
    """Return the buffer that every packed weight is unpacked into, or None if none is packed."""
    sizes = [
        module.base_layer.in_features * module.base_layer.out_features
        for module in base.modules()
        if hasattr(module, "lora_A") and _is_packed(module)
    ]
    return torch.empty(max(sizes), dtype=torch.bfloat16, device="meta") if sizes else None


def _is_packed(proj: Any) -> bool:
    return any(kind.__name__ == "Linear4bit" for kind in type(proj.base_layer).__mro__)


def _whole(proj: Any) -> Any:
    """Return a weight [out, in] as it is, or a new tensor that it is unpacked into."""
    base = proj.base_layer
    if not _is_packed(proj):
        return base.weight
    return torch.empty(base.out_features, base.in_features, dtype=torch.bfloat16)


def _in_buffer(proj: Any) -> Any:
    """Return a weight [out, in], unpacked into the buffer where it is packed."""
    base = proj.base_layer
    if not _is_packed(proj):
        return base.weight
    scratch = proj.scratch()
    return scratch[: base.out_features * base.in_features].view(base.out_features, base.in_features)


def _pair(proj: Any) -> tuple[Any, Any]:
    return proj.lora_A["default"].weight, proj.lora_B["default"].weight


def _product(x: Any, proj: Any, a: Any, b: Any) -> Any:
    """Return `x W^T + x A^T B^T`, summed in place."""
    out = torch.mm(x, _in_buffer(proj).t())
    low = torch.mm(x, a.t().to(x.dtype))
    out.addmm_(low, b.t().to(x.dtype))
    return out


def _low_rank_gradients(x: Any, dy: Any, dy_b: Any, a: Any, into_a: Any, into_b: Any) -> None:
    """Fill the gradients of A^T and B^T."""
    into_a.addmm_(x.t(), dy_b, beta=0)
    into_b.addmm_(a.t() @ x.t(), dy, beta=0)


class _Norm(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        flat = x.view(-1, x.shape[-1])
        out = torch.empty_like(flat)
        inverse = torch.empty(flat.shape[0], dtype=torch.float32)
        ctx.save_for_backward(flat, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].view(grads[0].shape), None


class _Rope(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, tables: Any) -> Any:
        ctx.tables = tables
        return q.view(q.shape), k.view(k.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k = (
            torch.empty(grad.transpose(1, 2).shape, dtype=grad.dtype).transpose(1, 2)
            for grad in grads
        )
        return q, k, None


class _Lora(torch.autograd.Function):  # type: ignore[misc]
    """One or three adapted layers on the same input."""

    @staticmethod
    def forward(ctx: Any, x: Any, projections: Any, *weights: Any) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        outs = [
            _product(flat, proj, *weights[2 * number : 2 * number + 2]).view(*x.shape[:-1], -1)
            for number, proj in enumerate(projections)
        ]
        ctx.projections = projections
        ctx.save_for_backward(x, *weights)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *weights = ctx.saved_tensors
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        dys = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        turned = [each.to(x.dtype).t() for each in weights]
        made = [torch.empty_like(each) for each in turned]
        low = [dy @ b.t() for dy, b in zip(dys, turned[1::2], strict=True)]
        for dy, dy_b, a, *into in zip(dys, low, turned[::2], made[::2], made[1::2], strict=True):
            _low_rank_gradients(x, dy, dy_b, a, *into)
        into_x: Any = None
        for number, proj in enumerate(ctx.projections):
            whole = _whole(proj)
            if into_x is None and len(dys) > 1:
                into_x = torch.mm(dys[number], whole, out=x)
            elif into_x is None:
                into_x = torch.mm(dys[number], whole)
            else:
                into_x.addmm_(dys[number], whole)
            del whole
            into_x.addmm_(low[number], turned[2 * number].t())
        return into_x.view(shape), None, *(each.t() for each in made)


class _Mlp(torch.autograd.Function):  # type: ignore[misc]
    """Gate, up, SwiGLU and down with their adapters."""

    @staticmethod
    def forward(ctx: Any, x: Any, projections: Any, *weights: Any) -> Any:
        gate_a, gate_b, up_a, up_b, down_a, down_b = weights
        flat = x.view(-1, x.shape[-1])
        gate = _product(flat, projections[0], gate_a, gate_b)
        up = _product(flat, projections[1], up_a, up_b)
        product = torch.empty_like(gate)
        out = _product(product, projections[2], down_a, down_b)
        ctx.projections = projections
        ctx.save_for_backward(*weights, x, gate, up)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *weights, x, gate, up = ctx.saved_tensors
        shape = x.shape
        x, dy = x.view(-1, shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        turned = [each.to(x.dtype).t() for each in weights]
        gate_a, gate_b, up_a, up_b, down_a, down_b = turned
        gate_proj, up_proj, down_proj = ctx.projections
        into_product = torch.mm(dy, _in_buffer(down_proj))
        into_product.addmm_(dy @ down_b.t(), down_a.t())
        # The kernel writes the product over its gradient, and the gradients over gate and up.
        product, into_up, into_gate = into_product, gate, up
        made = [torch.empty_like(each) for each in turned]
        _low_rank_gradients(product, dy, dy @ down_b.t(), down_a, *made[4:])
        up_low, gate_low = into_up @ up_b.t(), into_gate @ gate_b.t()
        _low_rank_gradients(x, into_up, up_low, up_a, *made[2:4])
        _low_rank_gradients(x, into_gate, gate_low, gate_a, *made[:2])
        whole = _whole(up_proj)
        into_x = torch.mm(into_up, whole, out=x)
        del whole
        into_x.addmm_(up_low, up_a.t())
        whole = _whole(gate_proj)
        into_x.addmm_(into_gate, whole)
        del whole
        into_x.addmm_(gate_low, gate_a.t())
        return into_x.view(shape), None, *(each.t() for each in made)


def _norm(self: Any, hidden_states: Any) -> Any:
    return _Norm.apply(hidden_states, self.weight)


def _fused(function: Any, x: Any, projections: tuple[Any, ...]) -> Any:
    weights = [weight for proj in projections for weight in _pair(proj)]
    return function.apply(x, projections, *weights)


def _attention(
    self: Any, hidden_states: Any, position_embeddings: Any, **_: Any
) -> tuple[Any, None]:
    batch, tokens, _width = hidden_states.shape
    projected = _fused(_Lora, hidden_states, (self.q_proj, self.k_proj, self.v_proj))
    q, k, v = (each.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for each in projected)
    del projected
    q, k = _Rope.apply(q, k, position_embeddings)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    out = out.transpose(1, 2).reshape(batch, tokens, -1)
    return _fused(_Lora, out, (self.o_proj,))[0], None


def _mlp(self: Any, hidden_states: Any) -> Any:
    return _fused(_Mlp, hidden_states, (self.gate_proj, self.up_proj, self.down_proj))


# -- the loss --------------------------------------------------------------------------------------


class _ChunkedLoss(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, labels: Any) -> Any:
        shifted = torch.empty_like(labels)
        counted = (shifted != 0).sum()
        gradient = torch.empty_like(hidden)
        loss = torch.zeros(())
        flat, into = hidden.view(-1, hidden.shape[-1]), gradient.view(-1, hidden.shape[-1])
        count = _chunks(flat.shape[0], weight.shape[0], gradient.nbytes)
        for rows, part in zip(flat.chunk(count), into.chunk(count), strict=True):
            part.copy_(_chunk(rows, weight))
        del shifted, counted
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def _chunks(tokens: int, vocab: int, fixed: int) -> int:
    gib = 2**30
    target = _TARGET_GIB - fixed / gib if fixed / gib < _TARGET_GIB else _TARGET_GIB
    exact = tokens * vocab * _BYTES_PER_LOGIT / gib / target
    return 1 if exact <= 1 else min(-int(-exact // 4) * 4, tokens)


def _chunk(rows: Any, weight: Any) -> Any:
    """Make what the compiled code of one chunk makes, in its order."""
    logits = torch.mm(rows, weight.t())
    numbers = [torch.empty(rows.shape[0]) for _ in range(4)]
    of_losses = torch.empty(rows.shape[0])
    numbers.pop()
    into_logits = torch.empty_like(logits)
    del logits, numbers, of_losses
    return torch.mm(into_logits, weight)


class UnslothLoss:
    """The loss that takes hidden states (`CausalLM_fast_forward`)."""

    def fit(self, model: Any) -> None:
        """Let the model hand its hidden states to the loss."""

        def forward(self: Any, labels: Any, **inputs: Any) -> Any:
            hidden = self.model(**inputs)[0]
            self.announce(trace.LOSS_FORWARD)
            return {"loss": _ChunkedLoss.apply(hidden, self.lm_head.weight, labels)}

        model.forward = MethodType(forward, model)

    @contextlib.contextmanager
    def running(
        self, model: Any, phase: Callable[[str], None], compute_capability: tuple[int, int]
    ) -> Iterator[None]:
        """Announce the loss; let the layers find the buffer, wherever the model was moved."""
        base = model.get_base_model()
        base.announce = phase
        for module in base.modules():
            if hasattr(module, "lora_A"):
                module.scratch = lambda: getattr(base, BUFFER)
        yield
