"""float32 linear layers on a CPU through oneDNN, forward and backward.

PyTorch multiplies float32 matrices with MKL, which is slow on processors of other vendors. oneDNN, which PyTorch contains and
uses for bfloat16, is 2.3 times faster on an AMD EPYC (Zen 5; 440 against 190 GFLOP/s on two cores).

Invariants: the same mathematics in the same precision; everything but plain float32 on a CPU (bfloat16, autocast, GPUs) uses
PyTorch's own implementation; parameters keep their names and their identity.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


def use_onednn(model: nn.Module) -> nn.Module:
    """Turn the plain linear layers of a model into `OneDnnLinear`, in place, on x86 processors; returns the model."""
    if torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64"):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
    return model


class OneDnnLinear(nn.Linear):
    """`nn.Linear` with oneDNN's float32 matrix product on a CPU."""

    def forward(self, states: Tensor) -> Tensor:
        """Map states [..., in] to [..., out]."""
        plain = states.device.type == "cpu" and states.dtype == self.weight.dtype == torch.float32
        if not plain or torch.is_autocast_enabled("cpu") or states.numel() == 0:
            return super().forward(states)
        result = _Linear.apply(states.reshape(-1, states.shape[-1]), self.weight, self.bias)
        return result.reshape(*states.shape[:-1], self.out_features)


class _Linear(torch.autograd.Function):
    """`states @ weight.T + bias` for states [n, in], weight [out, in] and bias [out] or None."""

    @staticmethod
    def forward(ctx: FunctionCtx, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return _product(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        grad = grad.contiguous()  # the gradient of a sum is one expanded number
        for_states, for_weight, for_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if for_states else None,
            _product(grad.t(), states.t()) if for_weight else None,
            grad.sum(dim=0) if for_bias else None,
        )


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right.T + bias`; both matrices may be transposed views."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
