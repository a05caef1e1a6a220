import pytest
import torch
from pilotfish.kernels.penalties import _apply_penalties_triton, apply_penalties, apply_penalties_ref, record_tokens
from transformers import RepetitionPenaltyLogitsProcessor

# (rows, vocabulary, table rows)
SMALL = {"one": (1, 50, 1), "odd": (4, 333, 6), "empty": (0, 20, 2), "two_blocks": (2, 2100, 2)}
LARGE = {"batch": (256, 151936, 40)}
RUN = {"cpu": _apply_penalties_triton, "cuda": apply_penalties}


def make(case, device="cpu"):
    num_rows, vocab, num_table_rows = case
    logits = torch.randn(num_rows, vocab + 3, device=device)[:, 3:]
    table_rows = torch.arange(num_rows, device=device) % num_table_rows
    table_rows[1::3] = -1
    return logits, {
        "prompt_mask_RV": torch.rand(num_table_rows, vocab, device=device) < 0.3,
        "output_counts_RV": torch.randint(-3, 5, (num_table_rows, vocab), dtype=torch.int32, device=device).clamp(min=0),
        "table_rows_S": table_rows,
        "repetition_S": torch.rand(num_rows, device=device) + 0.5,
        "presence_S": torch.randn(num_rows, device=device),
        "frequency_S": torch.randn(num_rows, device=device),
    }


def test_repetition_equals_transformers_over_prompt_and_output():
    logits = torch.randn(2, 40)
    prompt, output = torch.randint(0, 40, (2, 6)), torch.randint(0, 40, (2, 9))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.cat([prompt, output], 1), logits)
    counts, rows = torch.zeros(2, 40, dtype=torch.int32), torch.arange(2)
    for step in range(output.shape[1]):
        record_tokens(counts, rows, output[:, step])
    mask = torch.zeros(2, 40, dtype=torch.bool).scatter(1, prompt, True)
    apply_penalties_ref(
        logits,
        prompt_mask_RV=mask,
        output_counts_RV=counts,
        table_rows_S=rows,
        repetition_S=torch.full((2,), 1.3),
        presence_S=torch.zeros(2),
        frequency_S=torch.zeros(2),
    )
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=0)


def test_presence_and_frequency_count_the_output_alone():
    """OpenAI: mu[j] - count[j] * frequency - (count[j] > 0) * presence; repetition comes first."""
    logits = torch.tensor([[2.0, 2.0, -1.0, 5.0]])
    tables = {
        "prompt_mask_RV": torch.tensor([[True, False, True, False]]),
        "output_counts_RV": torch.tensor([[0, 3, 1, 0]], dtype=torch.int32),
        "table_rows_S": torch.tensor([0]),
        "presence_S": torch.tensor([0.5]),
        "frequency_S": torch.tensor([0.25]),
    }
    without = logits.clone()
    apply_penalties_ref(without, repetition_S=torch.tensor([1.0]), **tables)
    assert without.tolist() == [[2.0, 2.0 - 0.5 - 0.75, -1.0 - 0.5 - 0.25, 5.0]]
    apply_penalties_ref(logits, repetition_S=torch.tensor([2.0]), **tables)
    assert logits.tolist() == [[1.0, 1.0 - 0.5 - 0.75, -2.0 - 0.5 - 0.25, 5.0]]


def test_kernel_equals_reference(device, case):
    logits, tensors = make(case, device)
    expected = logits.clone()
    untouched = expected[tensors["table_rows_S"] < 0]
    RUN[device](logits, **tensors)
    apply_penalties_ref(expected, **tensors)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits[tensors["table_rows_S"] < 0], untouched)


def test_forbidden_tokens_stay_forbidden(device):
    logits, tensors = make((3, 30, 3), device)
    logits[:, ::2] = -float("inf")
    RUN[device](logits, **tensors)
    assert (logits[:, ::2] == -float("inf")).all()
    assert logits[:, 1::2].isfinite().all()


def test_record_tokens_counts_and_skips(device):
    counts = torch.zeros(2, 5, dtype=torch.int32, device=device)
    rows = torch.tensor([1, -1, 0, 1], device=device)
    record_tokens(counts, rows, torch.tensor([4, 2, 3, 4], device=device))
    assert counts.tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 2]]


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("prompt_mask_RV", torch.zeros(6, 333)),
        ("prompt_mask_RV", torch.zeros(6, 300, dtype=torch.bool)),
        ("output_counts_RV", torch.zeros(6, 333, dtype=torch.int64)),
        ("table_rows_S", torch.zeros(4, dtype=torch.int32)),
        ("presence_S", torch.zeros(3)),
    ],
)
def test_misfits_are_refused(change, value):
    logits, tensors = make(SMALL["odd"])
    with pytest.raises(ValueError, match="apply_penalties"):
        apply_penalties(logits, **(tensors | {change: value}))
    with pytest.raises(ValueError, match="apply_penalties"):
        apply_penalties(logits.half(), **tensors)
