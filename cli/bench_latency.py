"""`pilotfish bench latency`: a batch submitted at once, once for one token and once for all of them."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from ..common.errors import ConfigError
from ..common.requests import WorkerInfo
from .bench_experts import count_experts
from .bench_rows import Rows
from .bench_session import BenchSession, bench_session


def run(args: argparse.Namespace, rows: Rows) -> int:
    batches = []
    with bench_session(args, rows, max_num_seqs=max(args.batch_sizes)) as session:
        info, roofline = session.engine.info, session.roofline
        if args.count_experts and roofline.shape.moe is None:
            raise ConfigError(f"--count-experts: {session.facts['model']} has none")
        _check_fits(info, max(args.batch_sizes), args.input_len + args.output_len)
        for batch in args.batch_sizes:
            batches.append(_measure(session, args, rows, batch))
    del session  # and with it the engine, whose memory the counting needs
    if args.count_experts:
        rows.say("Counting the experts that the last step of each batch touched")
        for batch, touched in zip(args.batch_sizes, count_experts(info, batches), strict=True):
            expected = roofline.experts_touched(batch)
            rows.write({"model": info.model_name, "batch": batch, "experts_touched": touched, "experts_expected": expected})
    return 0


def _check_fits(info: WorkerInfo, batch: int, length: int) -> None:
    needed, capacity = batch * -(-length // info.block_size), info.num_blocks
    if needed > capacity or batch > info.max_num_seqs:
        raise ConfigError(
            f"a batch of {batch} needs {needed} KV blocks and max_num_seqs {batch}; this engine has {capacity} and "
            f"{info.max_num_seqs}: take smaller --batch-sizes or lengths, or raise --num-kv-blocks and --max-num-seqs"
        )


def _measure(session: BenchSession, args: argparse.Namespace, rows: Rows, batch: int) -> Sequence[tuple[int, ...]]:
    """Writes the batch's row; returns the sequences of its last run, if their experts are to be counted."""
    engine, input_len, output_len = session.engine, args.input_len, args.output_len
    rows.say(f"Batch {batch}: warm-up")
    engine.run(batch, input_len=input_len, output_len=args.warmup_output_len or output_len)
    ttfts_s, tpots_s = [], []
    for _ in range(args.repeat):
        first = engine.run(batch, input_len=input_len, output_len=1)
        whole = engine.run(batch, input_len=input_len, output_len=output_len, keep_sequences=args.count_experts)
        ttfts_s.append(first.elapsed_s)
        tpots_s.append((whole.elapsed_s - first.elapsed_s) / (output_len - 1))
    tpot_s = statistics.median(tpots_s)
    roofline_s = session.roofline.decode_step_s(batch, context=input_len + output_len / 2)
    rows.write(
        {
            **session.facts,
            "batch": batch,
            "ttft_s": statistics.median(ttfts_s),
            "tpot_ms": tpot_s * 1e3,
            "decode_tok_s": batch / tpot_s,
            "roofline_ttft_s": session.roofline.prefill_s(batch, length=input_len),
            "roofline_tpot_ms": roofline_s * 1e3,
            "fraction": roofline_s / tpot_s,
        }
    )
    return whole.sequences
