"""Products of activations and weights, at which decoding spends its time. Single-device code.

While decoding, a pass has few rows, and on a processor what a product of few rows takes depends on how the weight lies in
memory: as rows it is read at half the speed that memory gives, laid out anew for oneDNN at nearly all of it. A model whose
weights do not change for a while can be laid out once (`NAR.pack`).

Shape suffixes: O outputs and I inputs of a linear map.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

THIN_ROWS = 512
FULL_ROWS = 8  # of which a multiple up to four takes up to a third less time than somewhat fewer rows


def product(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x [..., I] times the transposed weight: [..., O], as `F.linear`.

    Without gradients on a processor it is computed as weight times columns, which takes 0.4 to 0.9 of the time for up to
    `THIN_ROWS` rows, and comes with the strides of that. Few rows are filled up to a multiple of `FULL_ROWS`; up to as many
    are laid out one after the other, as they may come from another product: else they take two to three times as long.
    """
    thin = x.device.type == "cpu" and x.dtype == torch.float32 and math.prod(x.shape[:-1]) <= THIN_ROWS
    if torch.is_grad_enabled() or not thin:
        return F.linear(x, weight_OI)
    rows = x.flatten(0, -2)
    n_rows = len(rows)
    if n_rows <= FULL_ROWS:
        rows = rows.contiguous()
    elif n_rows < 4 * FULL_ROWS:
        rows = F.pad(rows, (0, 0, 0, -n_rows % FULL_ROWS))
    return (weight_OI @ rows.t()).t()[:n_rows].unflatten(0, x.shape[:-1])


def packed_operator() -> Callable[..., Any] | None:
    """oneDNN's product with a packed weight, or None in a build without it."""
    operators = torch.ops.mkldnn
    return operators._linear_pointwise.default if hasattr(operators, "_linear_pointwise") else None


def packed_product(x: Tensor, packed_OI: Tensor) -> Tensor:
    """As `product`, with a weight that `pack_weight` has laid out."""
    operator = packed_operator()
    assert operator is not None
    result: Tensor = operator(x, packed_OI, None, "none", [], "")
    return result


def pack_weight(weight_OI: Tensor) -> Tensor:
    """A copy of a weight as oneDNN lays it out; opaque, of the same shape."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), 2 * FULL_ROWS)
    return packed


@cache
def can_pack() -> bool:
    """Whether this torch multiplies with packed weights. These are the operators that torch's compiler writes into models
    with frozen weights; no promise is made of them, so they are tried before they are used."""
    x = torch.linspace(-1, 1, 3 * 64, dtype=torch.float32, device="cpu").reshape(3, 64)
    weight_OI = torch.linspace(-2, 1, 32 * 64, dtype=torch.float32, device="cpu").reshape(32, 64)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return torch.allclose(packed_product(x, pack_weight(weight_OI)), F.linear(x, weight_OI), atol=1e-3)
    except (AssertionError, AttributeError, RuntimeError, TypeError):  # none, or another signature
        return False


def _state(weight: Tensor) -> tuple[int, int | None]:
    """What changes when a weight is replaced or written to, but through `data` or in inference mode."""
    return weight.data_ptr(), None if weight.is_inference() else weight._version


class Multiplies(nn.Module):
    """A module that multiplies by its weight, and can keep it packed while that does not change."""

    weight: Tensor
    _packed: Tensor | None = None
    _packed_state: tuple[int, int | None] | None = None

    def matrix(self) -> Tensor:
        """The weight [O, I], if it has more axes the further ones side by side."""
        return self.weight.flatten(1)

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., I] times the transposed weight: [..., O]."""
        if self._packed is None or torch.is_grad_enabled() or self._packed_state != _state(self.weight):
            return product(x, self.matrix())
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return product(x, self.matrix())
        return packed_product(x, self._packed)

    def pack(self) -> None:
        """Keep the weight packed from now on, once more in memory, where that is of use: in float32 on a processor.

        Changes to the weight put it out of use until the next call, but for those through `data` (as DeepSpeed's optimizers
        make them) and in inference mode, which are not seen: switching to training or evaluation mode ends it.
        """
        state = _state(self.weight)
        if self._packed is not None and self._packed_state == state:
            return
        self._packed = None
        if self.weight.device.type == "cpu" and self.weight.dtype == torch.float32 and can_pack():
            self._packed, self._packed_state = pack_weight(self.matrix()), state

    def train(self, mode: bool = True) -> Self:
        self._packed = None
        return super().train(mode)

    def _apply(self, *args: Any, **options: Any) -> Self:
        self._packed = None
        return super()._apply(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed weight, which cannot be copied or pickled."""
        return self.__dict__ | {"_packed": None}
