"""`pilotfish bench throughput`: many prompts submitted at once, timed to the last token."""

from __future__ import annotations

import argparse
import statistics

from .bench_rows import Rows
from .bench_session import bench_session

_MOST_SEQUENCES = 512
_WARMUP_TOKENS = 32


def run(args: argparse.Namespace, rows: Rows) -> int:
    num_engines = args.data_parallel or 1
    num_prompts = -(-args.num_prompts // num_engines)  # of the engine that gets most
    with bench_session(args, rows, max_num_seqs=min(num_prompts, _MOST_SEQUENCES)) as session:
        engine = session.engine
        concurrency = min(args.num_prompts, engine.info.max_num_seqs * num_engines)
        rows.say(f"Warm-up with {concurrency} prompts")
        warmup_len = args.warmup_output_len or min(args.output_len, _WARMUP_TOKENS)
        engine.run(concurrency, input_len=args.input_len, output_len=warmup_len)
        runs = []
        for number in range(args.repeat):
            rows.say(f"Run {number + 1} of {args.repeat}: {args.num_prompts} prompts")
            runs.append(engine.run(args.num_prompts, input_len=args.input_len, output_len=args.output_len))
        elapsed_s = statistics.median(run.elapsed_s for run in runs)
        num_output = runs[-1].num_output_tokens
        roofline_s = session.roofline.run_s(
            args.num_prompts, input_len=args.input_len, output_len=args.output_len, concurrency=concurrency
        )
        rows.write(
            {
                **session.facts,
                "num_prompts": args.num_prompts,
                "max_num_seqs": engine.info.max_num_seqs,
                "max_num_batched_tokens": engine.info.max_num_batched_tokens,
                "elapsed_s": elapsed_s,
                "output_tok_s": num_output / elapsed_s,
                "total_tok_s": (num_output + args.num_prompts * args.input_len) / elapsed_s,
                "num_preemptions": runs[-1].num_preemptions,
                "roofline_elapsed_s": roofline_s,
                "fraction": roofline_s / elapsed_s,
            },
            token_times=runs[-1].token_times,
        )
    return 0
