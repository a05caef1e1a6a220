"""What `tune` measures for the norm, router and choice before experts: one kernel against three."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from .cuda import loader
from .graph_timing import MAX_CALLS
from .norm_and_route import EXPERTS, HIDDENS, MAX_ROUTER_NUMBERS, MAX_TOKENS, fused_norm_and_route, separate_norm_and_route
from .tune_moe import MOE_SHAPES
from .tuning import Config

ROUTE_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
EPS = 1e-6


@dataclass(frozen=True)
class RouteCase:
    """One layer's, of `sizes` (experts, choices, hidden) and so many tokens, in bfloat16."""

    sizes: tuple[int, int, int]
    num_rows: int
    op: str = "norm_and_route"

    @property
    def read_bytes(self) -> int:
        return 2 * self.sizes[0] * self.sizes[2]

    @property
    def baseline(self) -> Config:
        return {"kernel": "separate"}

    @property
    def keeps_twin(self) -> bool:
        return False

    def neighbour(self) -> None:
        """Calls follow each other."""

    def candidates(self) -> list[Config]:
        num_experts, _, hidden = self.sizes
        is_on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == loader.CAPABILITY
        fits = num_experts in EXPERTS and hidden in HIDDENS and num_experts * hidden <= MAX_ROUTER_NUMBERS
        return [{"kernel": "fused"}] if is_on_hopper and fits and self.num_rows <= MAX_TOKENS else []

    def calls(self, config: Config | None, *, num_weights: int | None = None) -> list[Callable[[], torch.Tensor]]:
        """Calls on routers in turn."""
        num_experts, top_k, hidden = self.sizes
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(self.num_rows, hidden, device="cuda", generator=generator).bfloat16()
        residual = torch.randn(self.num_rows, hidden, device="cuda", generator=generator).bfloat16()
        gain = torch.randn(hidden, device="cuda", generator=generator).bfloat16()
        routers = torch.empty(MAX_CALLS, num_experts, hidden, device="cuda", dtype=torch.bfloat16)
        routers.normal_(0, hidden**-0.5, generator=generator)
        is_fused = config is not None and config["kernel"] == "fused"
        run = partial(_run, is_fused, x, residual, gain, top_k)
        return [partial(run, router) for router in routers[: num_weights or MAX_CALLS]]


def _run(
    is_fused: bool, x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, top_k: int, router: torch.Tensor
) -> torch.Tensor:
    """The choice's weights: they differ where the norm, the logits or the order of experts do."""
    op = fused_norm_and_route if is_fused else separate_norm_and_route
    return op(x, residual, gain, EPS, router, top_k, renormalize=True)[2]


def route_cases(shapes: Iterable[str], rows: Iterable[int] = ROUTE_ROWS) -> list[RouteCase]:
    """Of the sparse layers of the named models; none for models that have none."""
    sizes = [(MOE_SHAPES[name][0], MOE_SHAPES[name][1], MOE_SHAPES[name][2]) for name in shapes if name in MOE_SHAPES]
    return [RouteCase(size, num_rows) for size in dict.fromkeys(sizes) for num_rows in rows if num_rows <= MAX_TOKENS]
