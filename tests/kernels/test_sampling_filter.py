import pytest
import torch
from pilotfish.kernels import sampling
from pilotfish.kernels.sampling import draw_triton
from pilotfish.kernels.sampling_filter import keep_threshold_ref
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

# (temperature, top_k, top_p, min_p)
FILTERS = {
    "off": (1.0, 0, 1.0, 0.0),
    "top_k": (1.0, 5, 1.0, 0.0),
    "top_k_one": (0.7, 1, 1.0, 0.0),
    "top_k_beyond": (1.0, 10_000, 1.0, 0.0),
    "top_p": (1.3, 0, 0.8, 0.0),
    "top_p_zero": (1.0, 0, 0.0, 0.0),
    "min_p": (0.6, -1, 1.0, 0.1),
    "min_p_one": (1.0, 0, 1.0, 1.0),
    "all": (0.9, 20, 0.7, 0.05),
    "cold": (0.01, 50, 0.99, 0.001),
    "hot": (50.0, 50, 0.9, 0.5),
}
SMALL = {name: (60, options) for name, options in FILTERS.items()} | {
    "two_blocks": (300, FILTERS["all"]),
    "top_p_of_chunks": (5001, FILTERS["top_p"]),
    "cold_top_p_of_chunks": (5001, (0.01, 0, 0.9, 0.0)),
    "hot_top_p_of_chunks": (5001, (50.0, 0, 0.9, 0.0)),
}
LARGE = {name: (151936, options) for name, options in FILTERS.items()}


def arguments(options, num_rows, device="cpu"):
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    return [torch.full((num_rows,), value, dtype=dtype, device=device) for value, dtype in zip(options, dtypes, strict=True)]


def keep_threshold_triton(logits, *parameters):
    zeros = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    slots = torch.arange(len(logits), device=logits.device)
    return draw_triton(logits, (*parameters, zeros), slots, zeros)[1]


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS.keys())
def test_reference_keeps_what_the_warpers_of_transformers_keep(options):
    temperature, top_k, top_p, min_p = options
    logits = torch.randn(20, 200) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    for warper in (TopKLogitsWarper(top_k) if top_k > 0 else None, TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)):
        expected = warper(None, expected) if warper else expected
    threshold = keep_threshold_ref(logits, *arguments(options, 20))
    assert torch.equal(logits >= threshold[:, None], expected > -float("inf"))


def test_kernel_keeps_what_the_reference_keeps(device, case):
    """But for a token so near to the border that float32 sums can put it on either side."""
    vocab, options = case
    logits = torch.randn(4, vocab, device=device) * 4
    logits[1, ::2] = -float("inf")
    logits[2] = logits[2].round()
    temperature, top_k, top_p, min_p = arguments(options, 4, device)
    kept = logits >= keep_threshold_triton(logits, temperature, top_k, top_p, min_p)[:, None]
    assert (kept & (logits == logits.amax(-1, keepdim=True))).any(-1).all()
    below, above = (
        logits >= keep_threshold_ref(logits, temperature, top_k, border_p, border_min_p)[:, None]
        for border_p, border_min_p in (
            (top_p * (1 - 1e-4 * (top_p < 1)), min_p * (1 + 1e-4)),
            (top_p * (1 + 1e-4 * (top_p < 1)), min_p * (1 - 1e-4)),
        )
    )
    assert not (below & ~kept).any()
    assert not (kept & ~above).any()


@pytest.mark.parametrize("options", [FILTERS["top_k"], FILTERS["top_p"], FILTERS["all"]])
def test_where_candidates_do_not_fit_the_whole_row_is_searched(device, options, monkeypatch):
    logits = torch.randn(4, 3000, device=device)
    parameters = arguments(options, 4, device)
    monkeypatch.setattr(sampling, "_CAPACITY", 4)
    kept = logits >= keep_threshold_triton(logits, *parameters)[:, None]
    assert torch.equal(kept, logits >= keep_threshold_ref(logits, *parameters)[:, None])


def test_a_greedy_row_and_a_row_without_filters_have_no_threshold(device):
    logits = torch.randn(3, 50, device=device)
    temperature, top_k, top_p, min_p = arguments((1.0, 3, 0.5, 0.5), 3, device)
    temperature[0] = 0
    top_k[1], top_p[1], min_p[1] = -1, 1.0, 0.0
    for run in (keep_threshold_ref, keep_threshold_triton):
        threshold = run(logits, temperature, top_k, top_p, min_p)
        assert threshold[:2].tolist() == [-float("inf")] * 2
        assert threshold[2] > -float("inf")


def test_ties_are_kept_together(device):
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]], device=device)
    for options in ((1.0, 2, 1.0, 0.0), (1.0, 0, 0.5, 0.0)):
        for run in (keep_threshold_ref, keep_threshold_triton):
            assert run(logits, *arguments(options, 1, device)).tolist() == [2.0]
