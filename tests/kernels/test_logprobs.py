import pytest
import torch
from pilotfish.kernels.logprobs import TOLERANCE, _gather_logprobs_triton, gather_logprobs, gather_logprobs_ref

# (rows, vocabulary, num_top)
SMALL = {"one": (1, 30, 5), "none_asked": (3, 100, 0), "empty": (0, 30, 5), "two_blocks": (2, 8200, 20), "all": (2, 7, 7)}
LARGE = {"batch": (64, 151936, 20)}
RUN = {"cpu": _gather_logprobs_triton, "cuda": gather_logprobs}


def test_reference_equals_float64():
    logits = torch.randn(6, 50) * 10
    tokens = torch.randint(0, 50, (6,))
    logprob, top_ids, top_logprobs, rank = gather_logprobs_ref(logits, tokens, 4)
    exact = logits.double().log_softmax(-1)
    order = exact.argsort(-1, descending=True)
    for row in range(6):
        assert abs(logprob[row] - exact[row, tokens[row]]) < 1e-5
        assert top_ids[row].tolist() == order[row, :4].tolist()
        assert order[row, rank[row] - 1] == tokens[row]
    torch.testing.assert_close(top_logprobs.double(), exact.gather(1, top_ids), rtol=1e-5, atol=1e-5)


def test_kernel_equals_reference(device, case):
    num_rows, vocab, num_top = case
    logits = torch.randn(num_rows, vocab + 1, device=device)[:, 1:] * 5
    logits[:, ::7] = -float("inf")
    tokens = torch.randint(0, vocab, (num_rows,), device=device)
    actual, expected = RUN[device](logits, tokens, num_top), gather_logprobs_ref(logits, tokens, num_top)
    for index in (0, 2):
        torch.testing.assert_close(actual[index], expected[index], rtol=TOLERANCE[0], atol=TOLERANCE[1])
    assert torch.equal(actual[3], expected[3])
    assert actual[1].shape == (num_rows, num_top)
    torch.testing.assert_close(logits.gather(1, actual[1]), logits.gather(1, expected[1]), rtol=0, atol=0)


def test_a_row_that_starts_with_forbidden_tokens(device):
    logits = torch.full((1, 20000), -float("inf"), device=device)
    logits[0, -2:] = torch.tensor([1.0, 2.0], device=device)
    logprob, top_ids, _, rank = RUN[device](logits, torch.tensor([19998], device=device), 1)
    assert abs(logprob.item() - -1.3132617) < 1e-5
    assert top_ids.tolist() == [[19999]]
    assert rank.tolist() == [2]


def test_a_row_whose_largest_come_last(device):
    logits = torch.linspace(-3, 3, 20000, device=device)[None]
    tokens = torch.tensor([9], device=device)
    actual, expected = RUN[device](logits, tokens, 1), gather_logprobs_ref(logits, tokens, 1)
    torch.testing.assert_close(actual[0], expected[0], rtol=TOLERANCE[0], atol=TOLERANCE[1])


def test_of_equal_logits_all_have_the_same_rank(device):
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0]], device=device).expand(3, -1)
    assert RUN[device](logits, torch.tensor([1, 3, 0], device=device), 0)[3].tolist() == [1, 1, 4]


def test_misfits_are_refused():
    logits, tokens = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    for arguments in ((logits.half(), tokens, 1), (logits, tokens.int(), 1), (logits, tokens[:1], 1), (logits, tokens, 6)):
        with pytest.raises(ValueError, match="gather_logprobs"):
            gather_logprobs(*arguments)
