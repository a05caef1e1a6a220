"""What `tune` measures for a language model's head: the race in it, against all logits and a race over them; the draw too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from .cuda import loader
from .graph_timing import num_calls, num_copies
from .head_race import race_head, race_head_by
from .linear import linear
from .race import HeadScores, RaceRows
from .rms_norm import rms_norm
from .sampling import sample
from .skinny_linear import fits_race
from .streaming_linear import MAX_STREAMING_ROWS
from .tune_linear import ROWS, SHAPES, WHOLE_SHARED_BYTES, skinny_configs, streaming_config, streaming_configs
from .tuning import Config

MIN_ROWS_OF_ALONE = 64  # a CTA with a multiprocessor of its own: wide tiles, so that x is read less often
NORMED = 1024  # numbers of a row that the layer before norms
# temperature, top_k, top_p, min_p: the rows of a step take them in turn
SAMPLING = {
    "greedy": [(0.0, 0, 1.0, 0.0)],
    "sampled": [(1.0, 0, 1.0, 0.0)],
    "top_p": [(1.0, 0, 0.95, 0.0)],
    "mixed": [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.0)],
}


@dataclass(frozen=True)
class HeadCase:
    """A head of `sizes` (vocabulary, inputs) and so many rows in bfloat16, all of which draw; `kind` is one of SAMPLING."""

    sizes: tuple[int, int]
    num_rows: int
    kind: str = "sampled"
    op: str = "head_race"

    @property
    def read_bytes(self) -> int:
        return 2 * self.sizes[0] * self.sizes[1]

    @property
    def baseline(self) -> Config:
        return {"kernel": "logits"}

    @property
    def keeps_twin(self) -> bool:
        return True

    def neighbour(self) -> Callable[[], object]:
        """The norm before it."""
        x_MK = torch.randn(self.num_rows, NORMED, device="cuda").bfloat16()
        return partial(rms_norm, x_MK, torch.ones(NORMED, device="cuda").bfloat16(), 1e-6, residual_TH=x_MK)

    def candidates(self) -> list[Config]:
        vocab, num_inputs = self.sizes
        configs = list(skinny_configs(vocab, num_inputs, self.num_rows, gated=False))
        if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
            configs += [{**config, "early_start": True} for config in configs]
        if loader.can_run_on(torch.device("cuda", 0)):
            configs += streaming_configs(vocab, num_inputs, self.num_rows, gated=False)
            if self.num_rows >= MIN_ROWS_OF_ALONE:
                alone = [(tile_n, x_stages) for tile_n in (128, 192, 256) for x_stages in (None, 3)]
                configs += [
                    streaming_config(tile_n, 1, WHOLE_SHARED_BYTES, x_stages, num_inputs, self.num_rows, gated=False)
                    for tile_n, x_stages in alone
                ]
        fitting = [config for config in configs if fits_race(config, self.num_rows, num_inputs)]
        return [config for i, config in enumerate(fitting) if config not in fitting[:i]]

    def calls(self, config: Config | None, *, num_weights: int | None = None) -> list[Callable[[], torch.Tensor]]:
        """A step's head and draw, on weights in turn; the drawn tokens' logits."""
        vocab, num_inputs = self.sizes
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(self.num_rows, num_inputs, device="cuda", generator=generator).bfloat16()
        copies = num_weights or num_copies(self.read_bytes)
        weights = torch.empty(copies, vocab, num_inputs, device="cuda", dtype=torch.bfloat16)
        weights.normal_(0, 3 * num_inputs**-0.5, generator=generator)
        parameters = [SAMPLING[self.kind][row % len(SAMPLING[self.kind])] for row in range(self.num_rows)]
        temperature, top_k, top_p, min_p = (torch.tensor(column, device="cuda") for column in zip(*parameters, strict=True))
        slots = torch.arange(self.num_rows, device="cuda")
        tables = {
            "temperature_M": temperature,
            "top_k_M": top_k.int(),
            "top_p_M": top_p,
            "min_p_M": min_p,
            "seeds_M": slots,
            "slots_S": slots,
            "positions_S": slots,
        }
        has_filter = (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
        rows = RaceRows(temperature, slots, slots, slots, has_filter.long())
        times = 1 if num_weights else num_calls(self.read_bytes)
        return [partial(_run, config, x, weights[i % copies], rows, tables) for i in range(times)]


def _run(
    config: Config | None, x: torch.Tensor, weight: torch.Tensor, rows: RaceRows, tables: dict[str, torch.Tensor]
) -> torch.Tensor:
    if config is None:
        scores = race_head(x, weight, rows)
    elif config["kernel"] in ("skinny", "streaming"):
        scores = race_head_by(x, weight, rows, config)
    else:
        scores = HeadScores(linear(x, weight, out_dtype=torch.float32))
    return sample(scores.logits_SV, **tables, bests=scores.bests).logits_S


def head_cases(shapes: Iterable[str], rows: Iterable[int] = ROWS, *, num_ranks: int = 1) -> list[HeadCase]:
    """The heads of the named models on one of `num_ranks` ranks. ValueError where the ranks do not share one evenly."""
    heads = [layer.on_rank(num_ranks) for name in shapes for layer in SHAPES[name] if layer.op == "linear_float32"]
    sizes = dict.fromkeys((layer.num_outputs, layer.num_inputs) for layer in heads)
    return [HeadCase(size, num_rows) for size in sizes for num_rows in rows if num_rows <= MAX_STREAMING_ROWS]
