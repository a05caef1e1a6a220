"""Each sampling parameter's effect, against transformers' logits processors where one exists (exactly equal there)."""

from __future__ import annotations

import math

import pytest
import torch
from pilotfish.common.requests import EngineRequest, TokenSampling
from pilotfish.models.parallel import whole
from pilotfish.scheduler.step_plan import AdmittedSequence
from pilotfish.workers.batch_state import BatchState, DrawRows, SamplingRows
from pilotfish.workers.sampler import Sampler
from transformers.generation import logits_process as hf

VOCAB = 64
END = 5


class Bench:
    """A sampler with its batch state; `draw` admits one sequence a row and draws once for all of them."""

    def __init__(self, *, num_slots: int = 600) -> None:
        self.state = BatchState(
            max_num_seqs=num_slots, max_model_len=64, block_size=16, num_blocks=64, device=torch.device("cpu")
        )
        self.sampler = Sampler(self.state, vocab=whole(VOCAB))

    def admit(self, slot: int, sampling: TokenSampling, prompt: list[int], outputs: list[int]) -> None:
        request = EngineRequest(request_id=str(slot), prompt_token_ids=tuple(prompt), sampling=sampling)
        sequence = AdmittedSequence(request, slot, (*prompt, *outputs), (), 0, len(outputs))
        self.state.admit(sequence)
        self.sampler.admit(sequence)

    def rows(self, slots: list[int], lengths: list[int], positions: list[int]) -> SamplingRows:
        slots, positions, lengths = (torch.tensor(column, dtype=torch.int64) for column in (slots, positions, lengths))
        return SamplingRows(slots.numpy(), DrawRows(slots, positions, lengths, torch.ones_like(slots)))

    def draw(self, logits: torch.Tensor, sequences: list[tuple[TokenSampling, list[int], list[int]]], *, slots=None):
        """Sequences are (sampling, prompt, outputs); the logits are changed in place."""
        slots = slots or list(range(len(sequences)))
        for slot, sequence in zip(slots, sequences, strict=True):
            self.admit(slot, *sequence)
        lengths = [len(prompt) + len(outputs) for _, prompt, outputs in sequences]
        rows = self.rows(slots, lengths, [len(outputs) for _, _, outputs in sequences])
        return self.sampler.draw(logits, rows)


def sampling(**values) -> TokenSampling:
    return TokenSampling(**{"temperature": 0.0, "max_tokens": 32, "seed": 1, "end_token_ids": (END,), **values})


@pytest.fixture
def bench():
    return Bench()


@pytest.fixture
def logits():
    return torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3)) * 3


PROMPT, OUTPUTS = [3, 4, 3, 9, 20], [7, 7, 8, 9]


def assert_rules_equal(bench, logits, values, expected):
    """The rule changes its own row exactly as expected, and not the rows beside it."""
    changed = logits.clone()
    bench.draw(changed, [(sampling(), [1], []), (sampling(**values), PROMPT, OUTPUTS), (sampling(), [2], [END])])
    assert torch.equal(changed[1], expected)
    assert not torch.equal(changed[1], logits[1])
    assert torch.equal(changed[[0, 2]], logits[[0, 2]])


def apply_hf(processor, row: torch.Tensor) -> torch.Tensor:
    return processor(torch.tensor([PROMPT + OUTPUTS]), row[None].clone())[0]


def test_repetition_penalty_covers_prompt_and_output_as_in_transformers(bench, logits):
    expected = apply_hf(hf.RepetitionPenaltyLogitsProcessor(penalty=1.7), logits[1])
    assert_rules_equal(bench, logits, {"repetition_penalty": 1.7}, expected)


def test_presence_penalty_subtracts_once_for_each_token_of_the_output(bench, logits):
    expected = logits[1].clone()
    expected[[7, 8, 9]] -= 1.25
    assert_rules_equal(bench, logits, {"presence_penalty": 1.25}, expected)


def test_frequency_penalty_subtracts_for_each_time_a_token_is_in_the_output(bench, logits):
    expected = logits[1].clone()
    expected[7] -= 2 * 0.75
    expected[[8, 9]] -= 0.75
    assert_rules_equal(bench, logits, {"frequency_penalty": 0.75}, expected)


def test_logit_bias_is_added_as_in_transformers(bench, logits):
    bias = {0: 100.0, 11: -3.5, VOCAB - 1: 0.25}
    expected = apply_hf(hf.SequenceBiasLogitsProcessor({(k,): v for k, v in bias.items()}), logits[1])
    assert_rules_equal(bench, logits, {"logit_bias": bias}, expected)


@pytest.mark.parametrize(
    "words",
    [
        [[30]],
        [[8, 9, 40]],  # about to be completed
        [[9, 9, 40], [8, 41]],  # not about to be; nothing is banned but by the word beside them
        [[*PROMPT, *OUTPUTS, 12]],  # as long as all there is, and one
        [[1, *PROMPT, *OUTPUTS, 13]],  # longer than what there is
        [[30], [9, 31], [8, 9, 32], [END]],
    ],
)
def test_bad_words_are_banned_as_in_transformers(bench, logits, words):
    words = [*words, [9, 50]]
    expected = apply_hf(hf.NoBadWordsLogitsProcessor(words, eos_token_id=END), logits[1])
    assert expected[50] == -math.inf
    assert_rules_equal(bench, logits, {"bad_words_ids": tuple(map(tuple, words))}, expected)


def test_a_bad_word_can_begin_in_the_prompt(bench, logits):
    bench.draw(logits, [(sampling(bad_words_ids=((9, 20, 33),)), PROMPT, [])] * 3)
    assert torch.isinf(logits[0]).nonzero().tolist() == [[33]]


def test_min_tokens_masks_end_tokens_as_in_transformers(bench, logits):
    ends = [END, 6]
    processor = hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, ends, device="cpu")
    values = {"min_tokens": 5, "end_token_ids": tuple(ends)}
    assert_rules_equal(bench, logits, values, apply_hf(processor, logits[1]))


def test_min_tokens_ends_with_the_token_that_reaches_it(bench, logits):
    before = logits.clone()
    outputs = [[], [7], [7, 8]]
    bench.draw(logits, [(sampling(min_tokens=2), PROMPT, output) for output in outputs])
    assert torch.isinf(logits[:, END]).tolist() == [True, True, False]
    assert torch.equal(logits[2], before[2])


def test_all_rules_together_follow_the_order_of_transformers(bench, logits):
    processors = hf.LogitsProcessorList(
        [
            hf.SequenceBiasLogitsProcessor({(7,): 2.5, (30,): 1.0}),
            hf.RepetitionPenaltyLogitsProcessor(penalty=1.3),
            hf.NoBadWordsLogitsProcessor([[9, 22]], eos_token_id=END),
            hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), 9, END, device="cpu"),
        ]
    )
    values = {
        "logit_bias": {7: 2.5, 30: 1.0},
        "repetition_penalty": 1.3,
        "bad_words_ids": ((9, 22),),
        "min_tokens": 9,
    }
    assert_rules_equal(bench, logits, values, apply_hf(processors, logits[1]))


def test_temperature_zero_takes_the_likeliest_token(bench, logits):
    expected = logits.argmax(-1)
    sampled = bench.draw(logits, [(sampling(seed=seed), PROMPT, []) for seed in range(3)])
    assert torch.equal(sampled.tokens_R, expected)


def draw_many(bench, row: torch.Tensor, **values) -> torch.Tensor:
    """512 draws from one row of logits, each with a seed of its own."""
    sequences = [(sampling(seed=seed, **values), PROMPT, []) for seed in range(512)]
    return bench.draw(row.repeat(512, 1), sequences).tokens_R


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_shapes_the_distribution(bench, logits, temperature):
    drawn = draw_many(bench, logits[0], temperature=temperature)
    probs = (logits[0] / temperature).softmax(-1)
    top = int(probs.argmax())
    share = (drawn == top).float().mean().item()
    # Five standard deviations of a binomial share of 512 draws with fixed seeds.
    assert abs(share - probs[top].item()) < 5 * math.sqrt(probs[top].item() * (1 - probs[top].item()) / 512)
    assert len(drawn.unique()) > 3


@pytest.mark.parametrize(
    ("values", "warper"),
    [
        ({"top_k": 5}, hf.TopKLogitsWarper(5)),
        ({"top_p": 0.6}, hf.TopPLogitsWarper(0.6)),
        ({"min_p": 0.2}, hf.MinPLogitsWarper(0.2)),
    ],
)
def test_filters_draw_from_the_tokens_that_transformers_keeps(bench, logits, values, warper):
    row = logits[0] / 3
    kept = torch.isfinite(warper(None, row[None] / 1.5)[0]).nonzero().flatten().tolist()
    drawn = draw_many(bench, row, temperature=1.5, **values).unique().tolist()
    assert set(drawn) <= set(kept) < set(range(VOCAB))
    assert len(drawn) > 1
    assert not set(draw_many(bench, row, temperature=1.5).unique().tolist()) <= set(kept)


def test_a_draw_depends_on_seed_and_position_only(bench, logits):
    row = logits[0]

    def sequence(seed, num_outputs):
        return sampling(temperature=1.0, seed=seed), PROMPT, [7] * num_outputs

    alone = [int(bench.draw(row[None].clone(), [sequence(4, n)]).tokens_R) for n in range(16)]
    assert len(set(alone)) > 3
    others = [sequence(100 + i, 0) for i in range(16)]
    batch = Bench(num_slots=64)
    together = batch.draw(row.repeat(32, 1), [*others, *(sequence(4, n) for n in range(16))], slots=list(range(63, 31, -1)))
    assert together.tokens_R[16:].tolist() == alone
    longer_prompt = [(sampling(temperature=1.0, seed=4), PROMPT * 3, [7] * n) for n in range(16)]
    assert bench.draw(row.repeat(16, 1), longer_prompt).tokens_R.tolist() == alone
    assert bench.draw(row.repeat(16, 1), [sequence(5, n) for n in range(16)]).tokens_R.tolist() != alone


def test_logprobs_are_of_the_raw_logits_whatever_the_parameters(bench, logits):
    raw = logits.clone()
    loud = {"temperature": 1.3, "top_k": 3, "repetition_penalty": 2.0, "logit_bias": {9: 50.0}, "bad_words_ids": ((20,),)}
    sequences = [
        (sampling(logprobs=2, **loud), PROMPT, OUTPUTS),
        (sampling(temperature=1.0), PROMPT, []),
        (sampling(logprobs=0), PROMPT, []),
    ]
    sampled = bench.draw(logits, sequences)
    tokens = sampled.tokens_R.tolist()
    first, second, third = sampled.logprobs.entries(tokens)
    expected = raw.log_softmax(-1)
    assert second is None
    assert (first.token_id, third.token_id) == (tokens[0], tokens[2]) == (9, int(raw[2].argmax()))
    assert first.logprob == pytest.approx(expected[0, 9].item(), abs=1e-5)
    assert first.rank == 1 + int((raw[0] > raw[0, 9]).sum()) > 1
    values, ids = expected[0].topk(2)
    assert [token_id for token_id, _ in first.top] == ids.tolist()
    assert [logprob for _, logprob in first.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert (third.rank, third.top) == (1, ())


def test_a_slot_forgets_the_rules_of_its_last_sequence(bench, logits):
    loud = sampling(logit_bias={1: 9.0}, repetition_penalty=2.0, bad_words_ids=((2,),), min_tokens=9, logprobs=1)
    bench.draw(logits.clone(), [(loud, PROMPT, [])] * 3)
    for slot in range(3):
        bench.sampler.release(slot)
    changed = logits.clone()
    sampled = bench.draw(changed, [(sampling(), PROMPT, [])] * 3)
    assert torch.equal(changed, logits)
    assert sampled.logprobs is None


def test_rules_touch_the_rows_of_their_own_sequences_in_any_step(bench, logits):
    """Some sequences with rules wait, one has gone and left its slot to one without, the others stand in any order."""
    loud = {"bias": 9.0, "words": ((9, 20, 33), (34,)), "min_tokens": 2}
    other = {"bias": -9.0, "words": ((4, 3, 9, 20, 35),), "min_tokens": 1}

    def rules(values):
        bias = {1: values["bias"], 2: values["bias"]}
        return sampling(logit_bias=bias, bad_words_ids=values["words"], min_tokens=values["min_tokens"])

    for slot, values in ((7, loud), (3, other), (5, loud), (2, loud)):
        bench.admit(slot, rules(values), PROMPT, [])
    bench.sampler.release(5)
    bench.admit(5, sampling(), PROMPT, [])
    changed = logits.clone()
    bench.sampler.draw(changed, bench.rows([5, 3, 7], [len(PROMPT)] * 3, [0, 1, 1]))
    expected = logits.clone()
    expected[1, [1, 2]] -= 9
    expected[1, 35] = -math.inf
    expected[2, [1, 2]] += 9
    expected[2, [END, 33, 34]] = -math.inf
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("values", [{"logit_bias": {1: 2.0}}, {"bad_words_ids": ((9, 20, 33),)}, {"min_tokens": 9}])
def test_rules_travel_when_sequences_come_and_go_and_not_in_every_step(monkeypatch, logits, values):
    copied = []
    to_device = BatchState.to_device
    monkeypatch.setattr(BatchState, "to_device", lambda state, array: copied.append(array) or to_device(state, array))
    bench = Bench()
    bench.draw(logits.clone(), [(sampling(**values), PROMPT, [])] * 3)
    del copied[:]
    changed = logits[:2].clone()
    bench.sampler.draw(changed, bench.rows([0, 1], [len(PROMPT)] * 2, [0, 0]))
    assert not copied
    assert not torch.equal(changed[1], logits[1])
    bench.sampler.release(0)
    bench.sampler.draw(logits[:1].clone(), bench.rows([1], [len(PROMPT)], [0]))
    assert copied


def test_drawn_tokens_count_as_if_they_had_been_known_at_admission(bench, logits):
    """Penalties step by step equal those of a sequence admitted with the same output, as after a preemption."""
    settings = sampling(temperature=1.0, frequency_penalty=1.5, repetition_penalty=1.2)
    outputs: list[int] = []
    bench.admit(0, settings, PROMPT, outputs)
    for position in range(12):
        stepwise, replayed = logits[:1].clone(), logits[:1].clone()
        sampled = bench.sampler.draw(stepwise, bench.rows([0], [len(PROMPT) + position], [position]))
        bench.draw(replayed, [(settings, PROMPT, outputs)], slots=[1])
        bench.sampler.release(1)
        assert torch.equal(stepwise, replayed)
        outputs.append(int(sampled.tokens_R))
    assert len(set(outputs)) < len(outputs)


def test_more_penalised_sequences_than_before_keep_what_was_counted(bench, logits):
    settings = sampling(frequency_penalty=2.0)
    expected = logits[:1].clone()
    expected[0, 7] -= 4.0
    bench.admit(0, settings, PROMPT, [7, 7])
    for slot in range(1, 20):
        bench.admit(slot, settings, PROMPT, [8])
    bench.sampler.draw(logits[:1], bench.rows([0], [7], [2]))
    assert torch.equal(logits[:1], expected)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_row_without_a_token_to_draw_is_told_apart(bench, logits, value):
    logits[1] = value
    sampled = bench.draw(logits, [(sampling(temperature=t), PROMPT, []) for t in (0.0, 0.0, 1.0)])
    assert [math.isfinite(logit) for logit in sampled.logits_R.tolist()] == [True, False, True]
