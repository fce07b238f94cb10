"""The floor of a computation: its matrix products alone, at the shapes and strides it needs, one after the other.

What is measured above it is everything that is not a product: norms, rotations, softmax, copies, drawing, Python.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from t2i.products import packed_operator, packed_product

aten = torch.ops.aten
# Inference mode hands these on whole.
_COMPOSED = {aten.matmul.default, aten.linear.default, aten.scaled_dot_product_attention.default}
_PRODUCTS = {
    aten.mm.default, aten.mm.out, aten.addmm.default, aten.addmm_.default, aten.bmm.default, aten.baddbmm.default
}  # fmt: skip
_ATTENTION = {aten._scaled_dot_product_flash_attention_for_cpu.default}
_ATTENTION_BACKWARD = {aten._scaled_dot_product_flash_attention_for_cpu_backward.default}

Product = tuple[Tensor, Tensor]
"""Operands [..., M, K] and [..., K, N], or a packed [N, K]."""


class Products(TorchDispatchMode):
    """Records the matrix products of what runs inside, and repeats them.

    Operands that are parameters (given as `parameters`), packed weights, and keys and values where there are no gradients
    are kept as they are, so that they come from memory as in the run, the latter from its cache; all others are replaced by
    random ones of the same shape and strides, one for all of a kind.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self._parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self._stand_ins: dict[tuple[Any, ...], Tensor] = {}
        self._results: dict[tuple[int, ...], Tensor] = {}
        self.products: list[Product] = []

    @torch.no_grad()
    def _operand(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() in self._parameters:
            return tensor.detach()
        if 0 in tensor.stride():  # one number stands for many, as in the gradient of a sum
            tensor = tensor.contiguous()
        key = (tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._stand_ins:
            stand_in = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            self._stand_ins[key] = stand_in.normal_()
        return self._stand_ins[key]

    def _head_operand(self, tensor: Tensor) -> Tensor:
        """An operand of attention, [..., L, E] as a batch of contiguous matrices: at its best, with nothing to copy."""
        return self._operand(tensor.new_empty(tensor.shape).flatten(0, -3))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _COMPOSED:
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            self.products.append((self._operand(args[-2]), self._operand(args[-1])))
        elif func is packed_operator():
            self.products.append((self._operand(args[0].flatten(0, -2)), args[1]))
        elif func in _ATTENTION:
            kept = not torch.is_grad_enabled()
            q, k, v = (
                self._head_operand(args[0]),
                *(t.flatten(0, -3) if kept else self._head_operand(t) for t in args[1:3]),
            )
            weights = self._head_operand(q.new_empty(*q.shape[:-1], k.shape[-2]))
            self.products += [(q, k.mT), (weights, v)]
        elif func in _ATTENTION_BACKWARD:
            gradient, q, k, v = (self._head_operand(t) for t in args[:4])
            weights = self._head_operand(q.new_empty(*q.shape[:-1], k.shape[-2]))
            # The weights anew, then the gradients of v, weights, q and k.
            self.products += [(q, k.mT), (weights.mT, gradient), (gradient, v.mT), (weights, k), (weights.mT, q)]
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def repeat(self) -> None:
        """Compute all products once, but for those of packed weights into memory that is there already."""
        for left, right in self.products:
            if right.is_mkldnn:
                packed_product(left, right)
                continue
            shape = (*left.shape[:-1], right.shape[-1])
            if shape not in self._results:
                self._results[shape] = left.new_empty(shape)
            torch.matmul(left, right, out=self._results[shape])

    @property
    def flops(self) -> int:
        """Floating-point operations, two for each multiply-add."""
        return sum(2 * left.numel() * right.shape[0 if right.is_mkldnn else -1] for left, right in self.products)
