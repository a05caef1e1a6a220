"""What ranks of a RankGroup do in tests: here, because new processes must be able to import it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from pilotfish.common.errors import InternalError
from pilotfish.kernels.all_reduce import all_reduce_norm_ref, all_reduce_ref
from pilotfish.kernels.reduce_scatter import reduce_scatter_ref
from pilotfish.kernels.rms_norm import TOLERANCE, rms_norm_ref
from pilotfish.models.dummy import build_dummy
from pilotfish.models.paged_sequences import PagedSequences
from pilotfish.workers.comm import RankGroup
from pilotfish.workers.peer_collectives import MAX_GATHERED_BYTES, MAX_ONE_SHOT_SENT_BYTES, PeerCollectives
from pilotfish.workers.peer_memory import CAPACITY_BYTES, exchange_descriptors
from pushed_turns import PushedTurns

EPS = 1e-6
DTYPE = torch.bfloat16


def collect(group: RankGroup, device: torch.device) -> dict[str, object]:
    """One of each collective."""
    rank, size = group.place.rank, group.place.size
    x = torch.arange(4.0, device=device).view(2, 2)
    answers: dict[str, object] = {"sum": group.all_reduce(x + rank).tolist()}
    residual, weight = x * 2 - 1, torch.tensor([0.5, 2.0], device=device)
    y, new_residual = group.parallel.sum_and_norm(x + rank, residual, weight, EPS)
    parts = [x + other for other in range(size)]
    expected_y, expected_residual = all_reduce_norm_ref(parts, residual, weight, EPS)
    answers["norm_error"] = float(max((y - expected_y).abs().max(), (new_residual - expected_residual).abs().max()))
    answers["gathered"] = group.all_gather(torch.tensor([[0.0], [10.0]], device=device) + rank).tolist()
    answers["gathered_flat"] = group.all_gather(torch.full((2,), float(rank), device=device)).tolist()
    told = torch.tensor([7.0 + rank], device=device)
    group.broadcast(told)
    answers["broadcast"] = told.tolist()
    answers["least"] = group.agree_on_least(-rank)
    return answers


def exchange_pipes(group: RankGroup, device: torch.device) -> dict[str, str]:
    """Each rank gives the others an end of a pipe; into those that it got it writes, and it reads what came out of its own."""
    read_end, write_end = os.pipe()
    rank, size = group.place.rank, group.place.size
    received = exchange_descriptors(group.place, group, write_end, name="test")
    os.close(write_end)
    for other, descriptor in received.items():
        os.write(descriptor, f"from {rank} to {other}\n".encode())
        os.close(descriptor)
    with os.fdopen(read_end) as pipe:  # ends when all have closed theirs
        lines = pipe.read().splitlines()
    assert len(lines) == size - 1
    return {line.split()[1]: line for line in sorted(lines)}


def exchange_with_a_rank_that_left(group: RankGroup, device: torch.device) -> str:
    if group.place.rank == 0:
        group.tell("test-descriptors-0", "/nonexistent/rank")
        return ""
    try:
        exchange_descriptors(group.place, group, 0, name="test")
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# --- on GPUs


def _random(seed: int, *shape: int, device: torch.device) -> torch.Tensor:
    """The same on every rank."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    values[values.abs() < 0.02] = -0.0
    return values.to(DTYPE).to(device)


def check_sums(group: RankGroup, device: torch.device) -> list[str]:
    """What is wrong with sums of many shapes, whatever way they take; small ones go through shared memory, large ones with the
    norm behind them by copies."""
    group.open_large_sums(8192 * 4096 * DTYPE.itemsize)
    problems = [] if group.peers is not None and group.pushed is not None else ["no shared memory"]
    size, rank = group.place.size, group.place.rank
    for seed, rows in enumerate([1, 3, 128, 1, 257, 64, 8192, 2, 5, 0, 31]):
        for hidden in (4096, 576, 2048):
            torch.cuda._sleep(seed * 7919 * (rank + 1) % 200_000)  # cycles: now one rank is late, now the other
            parts = [_random(seed * size + other, rows, hidden, device=device) for other in range(size)]
            residual, weight = _random(100 + seed, rows, hidden, device=device), _random(200 + seed, hidden, device=device)
            total = group.all_reduce(parts[rank].clone())
            y, new_residual = group.parallel.sum_and_norm(parts[rank].clone(), residual, weight, EPS)
            expected = all_reduce_ref(parts)
            exact = torch.stack(parts).double().sum(0)
            expected_y, expected_residual = rms_norm_ref(expected, weight, EPS, residual_TH=residual)
            relative, absolute = TOLERANCE[DTYPE]
            checks = {
                "sum": torch.equal(total, expected),
                "float64": torch.allclose(total.double(), exact, rtol=2.0**-8, atol=1e-6),
                "residual": torch.equal(new_residual, expected_residual),
                "norm": torch.allclose(y.float(), expected_y.float(), rtol=relative, atol=absolute),
            }
            problems += [f"{name} of {rows} x {hidden}" for name, is_right in checks.items() if not is_right]
    group.check()
    return problems


def check_rows(group: RankGroup, device: torch.device) -> list[str]:
    """What is wrong with rows that data ranks gather and scatter, whatever way they take."""
    assert group.data is not None
    data = group.data.parallel
    problems = [] if device.type == "cpu" or group.data.peers is not None else ["no shared memory"]
    for seed, rows in enumerate([1, 64, 3, 1024, 16, 2, 5]):
        words = [_random(seed * data.size + other, rows, 2080, device=device).view(torch.int32) for other in range(data.size)]
        if not torch.equal(data.all_gather_rows(words[data.rank]), torch.cat(words)):
            problems.append(f"gather of {rows}")
        parts = [_random(seed * data.size + other, data.size * rows, 2048, device=device) for other in range(data.size)]
        if not torch.equal(data.reduce_scatter_rows(parts[data.rank]), reduce_scatter_ref(parts, data.rank)):
            problems.append(f"sum of {rows}")
    group.check()
    return problems


def replay_often(group: RankGroup, device: torch.device, num_replays: int) -> tuple[float, str]:
    """(the largest error, why it failed) of a captured chain whose inputs change with each replay, the ranks out of step."""
    size, rank = group.place.size, group.place.rank
    assert group.peers is not None
    shapes = [(1, 4096), (128, 4096), (5, 576), (1, 64), (300, 1024)]
    inputs = [[_random(10 * i + other, *shape, device=device) for other in range(size)] for i, shape in enumerate(shapes)]
    weights = [_random(90 + i, shape[1], device=device) for i, shape in enumerate(shapes)]
    count, worst = torch.zeros(1, dtype=DTYPE, device=device), torch.zeros(1, device=device)

    def chain() -> None:
        count.add_(1).remainder_(128)  # so that last time's numbers would be wrong ones
        for of_ranks, weight in zip(inputs, weights, strict=True):
            parts = [part + count for part in of_ranks]
            expected = all_reduce_ref(parts)
            total = group.all_reduce(parts[rank].clone())
            y, new_residual = group.all_reduce_norm(parts[rank], parts[0], weight, EPS)
            expected_y, expected_residual = rms_norm_ref(expected, weight, EPS, residual_TH=parts[0])
            error = (y - expected_y).abs().float() - 0.02 * expected_y.abs().float() - 0.01  # beyond the tolerance
            differences = ((total != expected).float().max(), (new_residual != expected_residual).float().max())
            gathered = group.all_gather(parts[rank].view(-1))
            differences += ((gathered.view(size, -1) != torch.stack(parts).view(size, -1)).float().max(),)
            worst.copy_(torch.maximum(worst, torch.stack([*differences, error.max().clamp(min=0)]).max()))

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        chain()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        chain()
    group.agree_on_least(0)
    for replay in range(num_replays):
        if replay % 3 == rank:
            torch.cuda._sleep(replay * 7919 % 100_000)
        graph.replay()
        if replay % 50 == 0:
            chain()  # launched one by one between replays
    torch.cuda.synchronize()
    return float(worst), group.peers.buffers.failure


def wait_in_vain(group: RankGroup, device: torch.device, timeout_s: float) -> tuple[str, float]:
    """As `_call_in_vain`, of sums through shared memory."""
    assert group.peers is not None
    peers = PeerCollectives(replace(group.peers.buffers, timeout_s=timeout_s))
    x = torch.ones(4, 4096, dtype=DTYPE, device=device)
    return _call_in_vain(group, lambda: peers.all_reduce_norm(x, x, x[0], EPS), peers.check)


def push_in_vain(group: RankGroup, device: torch.device, timeout_s: float) -> tuple[str, float]:
    """As `_call_in_vain`, of sums by copy engine."""
    group.open_large_sums(8 << 20)
    assert group.pushed is not None
    group.pushed.peers = PeerCollectives(replace(group.pushed.peers.buffers, timeout_s=timeout_s))
    x = torch.ones(64, 4096, dtype=DTYPE, device=device)
    return _call_in_vain(group, lambda: group.start_sum(x).finish(), group.check)


def _call_in_vain(group: RankGroup, call: Callable[[], object], check: Callable[[], None]) -> tuple[str, float]:
    """(what the first rank says that calls again where no other does, the seconds that it waited)."""
    call()  # all come
    torch.cuda.synchronize()
    check()
    group.agree_on_least(0)
    if group.place.rank > 0:
        return "", 0.0
    start_s = time.monotonic()
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    waited_s = time.monotonic() - start_s
    try:
        check()
    except InternalError as error:
        return error.message, waited_s
    return "no error", waited_s


def compare_halves(group: RankGroup, device: torch.device, model_name: str, pushes: bool) -> tuple[list[float], float]:
    """(how far each prompt's hidden states, computed in halves, are off those of the whole batch, relative, in norms; how far
    those of another prompt)."""
    is_sparse = "moe" in model_name
    dtype = "float32" if is_sparse else "bfloat16"  # in bfloat16 some tokens would choose other experts
    num_tokens = 1001 if is_sparse else 2 * MAX_ONE_SHOT_SENT_BYTES // (1024 * 2) + 301  # each half's sum is a large one
    prompts = {row: [token % 500 for token in tokens] for row, tokens in enumerate((range(num_tokens - 700), range(5, 705)))}
    halved = replace(group.parallel, min_sparse_half_tokens=0, **({"min_started_bytes": 0} if is_sparse else {}))
    hidden = []
    for parallel in (halved, replace(halved, start_sum=None)):
        model = build_dummy(model_name, device=device, dtype=dtype, parallel=parallel)
        if pushes and not hidden:
            group.open_large_sums(32 << 20)
            assert group.pushed is not None
        paged = PagedSequences(model, num_sequences=2, max_len=num_tokens)
        hidden.append(paged.append(prompts).float())
        del model, paged
    halved, whole = hidden
    errors = [_difference(halved[rows], whole[rows]) for rows in (slice(num_tokens - 700), slice(num_tokens - 700, None))]
    return errors, _difference(whole[:700], whole[-700:])


def _difference(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


def push_sums_often(group: RankGroup, device: torch.device, num_replays: int) -> tuple[float, bool, str]:
    """(the largest error, whether the ranks have the same bits, why it failed), captured and replayed, and one by one."""
    turns = PushedTurns(group.start_sum, rank=group.place.rank, device=device)
    group.open_large_sums(turns.MAX_BYTES)
    assert group.pushed is not None
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        turns.run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = turns.run()
    group.agree_on_least(0)
    for replay in range(num_replays):
        if replay % 3 == turns.rank:
            torch.cuda._sleep(replay * 7919 % 1_000_000)
        graph.replay()
        if replay % 5 == 0:
            turns.run()  # launched one by one between replays
    graph.replay()
    bits = torch.cat(outputs).view(torch.int16).int()
    of_ranks = group.all_gather(bits).chunk(group.place.size, -1)
    same = all(torch.equal(of_rank, bits) for of_rank in of_ranks)
    torch.cuda.synchronize()
    return float(turns.worst), same, group.pushed.peers.buffers.failure


def capture_group_collectives(group: RankGroup, device: torch.device) -> list[str]:
    """What is wrong with NCCL's in a graph: of messages that are too large for shared memory."""
    rank, size, rows = group.place.rank, group.place.size, CAPACITY_BYTES // 8192 + 1
    x = torch.ones(rows, 4096, dtype=DTYPE, device=device)
    logits, token = torch.zeros(4, MAX_GATHERED_BYTES // 4, device=device), torch.zeros(4, dtype=torch.int64, device=device)

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        started = group.start_sum(x * (rank + 1))
        gathered = group.all_gather(logits + rank)
        total = group.all_reduce(x * (rank + 1))
        started.finish()
        total = total + started.x
        token.fill_(rank + 5)
        group.broadcast(token)
        return total, gathered

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        total, gathered = work()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    checks = {
        "sum": bool((total == size * (size + 1)).all()),
        "gather": torch.equal(gathered.view(4, size, -1).mean(-1), torch.arange(size, device=device).float().expand(4, -1)),
        "broadcast": token.tolist() == [5] * 4,
    }
    return [name for name, is_right in checks.items() if not is_right]
