"""One checkpoint tensor, the part of it that this rank reads, and where that part goes.

Layers list their sources by the checkpoint's exact names; the loader fills them. This is all that either knows of the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .parallel import Parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """`target`, a view of a parameter, becomes `tensor name`[region].

    Attributes:
        shape: of the whole tensor, which the checkpoint must have.
        must_equal: the target is filled from another name already, and this tensor has to repeat its values.
    """

    name: str
    shape: tuple[int, ...]
    region: tuple[slice, ...]
    target: torch.Tensor
    must_equal: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where and in which dtypes a model is built.

    Attributes:
        weight_dtype: of matrices and their biases. On a CPU they stay as stored (bfloat16 or float32).
        compute_dtype: of activations and norms.
    """

    device: torch.device
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype
    parallel: Parallel

    def matrix(self, *shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(shape, dtype=self.weight_dtype, device=self.device), requires_grad=False)

    def bias(self, *shape: int) -> torch.nn.Parameter:
        """Of matrices: linear layers want it in the dtype of its matrix."""
        return self.matrix(*shape)

    def exact_vector(self, size: int) -> torch.nn.Parameter:
        """float32 whatever is computed in."""
        return torch.nn.Parameter(torch.empty(size, dtype=torch.float32, device=self.device), requires_grad=False)

    def vector(self, size: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(size, dtype=self.compute_dtype, device=self.device), requires_grad=False)
