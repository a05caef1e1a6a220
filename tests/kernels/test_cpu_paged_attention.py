"""The C++ paged attention against its reference, and the same bits whatever the batch, the tiles and the threads."""

from contextlib import contextmanager

import pytest
import torch
from pilotfish.kernels.cpu import ops as cpu_ops
from pilotfish.kernels.paged_attention import TOLERANCE, paged_attention, paged_attention_ref

KV_HEADS = 2


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


class Batch:
    """Random queries and a cache whose unused slots hold NaN, in pages scattered at random."""

    def __init__(self, rows, *, group=3, head_dim=64, page_len=16, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        query_lens, context_lens = [q for q, _ in rows], [c for _, c in rows]
        width = max(-(-c // page_len) for c in context_lens) + 1
        num_blocks = len(rows) * width + 3
        self.q = self.randn(sum(query_lens), KV_HEADS * group, head_dim)
        self.k = torch.full((num_blocks, page_len, KV_HEADS, head_dim), float("nan"))
        self.v = self.k.clone()
        order = torch.randperm(num_blocks, generator=self.generator).int()
        self.tables = order[: len(rows) * width].view(len(rows), width)
        for row, length in enumerate(context_lens):
            for start in range(0, length, page_len):
                count = min(page_len, length - start)
                block = self.tables[row, start // page_len]
                self.k[block, :count] = self.randn(count, KV_HEADS, head_dim)
                self.v[block, :count] = self.randn(count, KV_HEADS, head_dim)
        self.starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
        self.lens = torch.tensor(context_lens, dtype=torch.int32)
        self.keywords = {"max_query_len": max(query_lens), "scale": head_dim**-0.5}

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def arguments(self):
        return self.q, self.k, self.v, self.tables, self.starts, self.lens

    def run(self, **changed):
        return paged_attention(*self.arguments(), **{**self.keywords, **changed})

    def reference(self, **changed):
        with threads(1):  # torch's many small calls would wait for a second thread on a busy machine
            return paged_attention_ref(*self.arguments(), **{**self.keywords, **changed})

    def row(self, index, **changed):
        """The same row as a batch of its own."""
        start, end = self.starts[index], self.starts[index + 1]
        return paged_attention(
            self.q[start:end],
            self.k,
            self.v,
            self.tables[index : index + 1],
            torch.tensor([0, end - start], dtype=torch.int32),
            self.lens[index : index + 1],
            **{**self.keywords, **changed},
        )


def assert_right(batch, **keywords):
    assert cpu_ops.supports("paged_attention", batch.q.dtype, batch.k.dtype)
    relative, absolute = TOLERANCE[torch.float32]
    expected = batch.reference(**keywords)
    assert not expected.isnan().any()
    torch.testing.assert_close(batch.run(**keywords), expected, rtol=relative, atol=absolute)


# (query_len, context_len) of each row: decode, whole prompts, chunks of prompts, lengths on and beside chunk borders.
MIXED = [(1, 1), (5, 5), (1, 300), (17, 145), (0, 20), (1, 128), (1, 129), (130, 257), (40, 40), (1, 16)]


@pytest.mark.parametrize("head_dim", [8, 16, 64, 72, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_mixed_rows(head_dim, group):
    assert_right(Batch(MIXED, group=group, head_dim=head_dim))


@pytest.mark.parametrize("page_len", [16, 32, 128, 256])
def test_page_lengths(page_len):
    assert_right(Batch(MIXED, page_len=page_len))


@pytest.mark.parametrize("window", [1, 7, 100, 128, 1000])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_window_soft_cap_and_sinks(window, soft_cap, sinks):
    batch = Batch(MIXED, head_dim=32)
    batch.q *= 4
    assert_right(batch, window=window, soft_cap=soft_cap, sinks_N=batch.randn(6) * 3 if sinks else None)


def test_pages_that_left_the_window_are_not_read():
    batch = Batch([(1, 300), (9, 270)], group=2)
    expected = batch.reference(window=40)
    batch.tables[:, : (270 - 9 - 40) // 16] = 2**30
    torch.testing.assert_close(batch.run(window=40), expected)


def test_large_scores_do_not_overflow():
    batch = Batch([(3, 200), (1, 200)])
    batch.q *= 1e3
    assert_right(batch)


def test_views_of_packed_tensors():
    batch = Batch(MIXED, head_dim=32)
    expected = batch.reference()
    packed = torch.zeros(batch.q.shape[0], 10, 32)
    packed[:, 1:7] = batch.q
    batch.q = packed[:, 1:7]
    kv = torch.stack([batch.k, batch.v], dim=1)
    batch.k, batch.v = kv[:, 0], kv[:, 1]
    torch.testing.assert_close(batch.run(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keywords", [{}, {"window": 50}, {"soft_cap": 10.0}])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(keywords):
    batch = Batch([(1, 40 + 11 * i) for i in range(33)] + [(50, 400), (7, 300)])
    together = batch.run(**keywords)
    for index in (0, 7, 32, 33, 34):
        start, end = batch.starts[index], batch.starts[index + 1]
        assert torch.equal(batch.row(index, **keywords), together[start:end])


def test_a_token_has_the_same_bits_decoded_and_prefilled():
    batch = Batch([(300, 300)])
    prefilled = batch.run()
    for position in (0, 127, 128, 199, 299):
        decoded = paged_attention(
            batch.q[position : position + 1],
            batch.k,
            batch.v,
            batch.tables,
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([position + 1], dtype=torch.int32),
            **batch.keywords,
        )
        assert torch.equal(decoded[0], prefilled[position])


@pytest.mark.parametrize("num_threads", [1, 2, 3, 16])
def test_the_number_of_threads_changes_no_bit(num_threads):
    batch = Batch(MIXED)
    expected = batch.run()
    with threads(num_threads):
        assert torch.equal(batch.run(), expected)


@pytest.mark.parametrize("rows", [[(0, 1)], [(0, 1), (0, 30)]])
def test_rows_without_queries(rows):
    assert Batch(rows).run().shape == (0, 6, 64)
