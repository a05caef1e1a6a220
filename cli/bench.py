"""`pilotfish bench`: latency and throughput of an engine in this process, and of a server under load."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable

from ..models.dummy_shapes import SHAPES
from . import bench_plot, bench_rows, config_flags

# Of the engine, where they differ from its own. A first step that compiles kernels is no stall.
BENCH_DEFAULTS = {"kv_memory_fraction": 0.9, "prefix_caching": False, "stall_timeout_s": 600.0}
# Ranks compile their kernels at their own pace, and meet in the first collective behind them.
PARALLEL_DEFAULTS = {"collective_timeout_s": 120.0}

_WORKLOADS = {
    "latency": "time to first token and time per output token, by batch size, in this process",
    "throughput": "a workload submitted at once, in this process: tokens a second",
    "serve": "a running server under Poisson arrivals: TTFT, TPOT, ITL, goodput",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="workload", metavar="WORKLOAD", required=True)
    add: dict[str, Callable[[argparse.ArgumentParser], None]]
    add = {"latency": _add_latency, "throughput": _add_throughput, "serve": _add_serve}
    for name, summary in _WORKLOADS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", formatter_class=parser.formatter_class
        )
        add[name](subparser)
        subparser.add_argument("--json-out", metavar="FILE", help="write the rows there too")
        subparser.add_argument("--plot", metavar="FILE", help="draw the result, for example out.png")
        subparser.add_argument("--seed", type=int, default=0, help="of the random prompts (and arrivals)")
    parser.epilog = "Rows are JSON objects, one a line, on standard output; what happens is told on standard error."


def run(args: argparse.Namespace) -> int:
    if args.plot is not None:
        bench_plot.require_matplotlib()
    with bench_rows.open_rows(args.json_out) as rows:
        exit_code = int(importlib.import_module(f".bench_{args.workload}", __package__).run(args, rows))
        if args.plot is not None:
            rows.say(f"Drawing {args.plot}")
            bench_plot.draw(args.workload, rows.plotted, args.plot)
    return exit_code


def _add_latency(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--batch-sizes", type=_whole_numbers, default="1,8,32,128", metavar="N,N", help="a row for each")
    _add_lengths(parser)
    parser.add_argument(
        "--count-experts",
        action="store_true",
        help="afterwards, count the experts that the last step of each batch touched; loads the model a second time",
    )
    _add_engine(parser, warmup="as many as --output-len", max_num_seqs="the largest batch")
    parser.epilog = (
        "ttft_s: all sequences of the batch submitted at once, until the last has its first token. tpot_ms = (time for "
        "--output-len tokens - time for 1) / (--output-len - 1). roofline_tpot_ms: the least that reading weights and KV "
        "at the bandwidth measured here allows, of several ranks each its share; fraction = roofline_tpot_ms / tpot_ms."
    )


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--num-prompts", type=_whole_number, default=1024, metavar="N", help="all submitted at once")
    _add_lengths(parser)
    _add_engine(parser, warmup="at most 32", max_num_seqs="--num-prompts, at most 512")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default="127.0.0.1:50051", metavar="HOST:PORT", help="the server's door of that protocol")
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc")
    parser.add_argument(
        "--request-rate", type=_rate, default=math.inf, metavar="X", help="mean arrivals a second; inf sends all at once"
    )
    parser.add_argument("--num-prompts", type=_whole_number, default=128, metavar="N")
    _add_lengths(parser)
    parser.add_argument("--vocab-size", type=_whole_number, default=256, metavar="N", help="prompts are token ids below this")
    parser.add_argument("--slo-ttft-ms", type=float, default=500.0, metavar="X", help="a good request's longest TTFT")
    parser.add_argument("--slo-tpot-ms", type=float, default=50.0, metavar="X", help="and its longest mean time per token")
    parser.add_argument("--timeout-s", type=float, default=600.0, metavar="X", help="of a request")
    parser.epilog = (
        "TPOT is a request's mean time per token after the first; ITL is between two messages of one stream. goodput_req_s "
        "counts requests that met both limits. Exits 1 if a request failed other than by being refused for overload."
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--shape", choices=tuple(SHAPES), help="random weights of this shape, made on the device")
    model.add_argument("--model", metavar="MODEL", help="a local directory, a Hub id, a .gguf file or an alias")


def _add_lengths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input-len", type=_whole_number, default=512, metavar="N", help="tokens of each prompt")
    parser.add_argument("--output-len", type=_at_least_two, default=512, metavar="N", help="tokens generated for each")


def _add_engine(parser: argparse.ArgumentParser, *, warmup: str, max_num_seqs: str) -> None:
    parser.add_argument("--repeat", type=_whole_number, default=1, metavar="N", help="runs; the median counts")
    parser.add_argument(
        "--warmup-output-len", type=_whole_number, metavar="N", help=f"output tokens of the run before (default: {warmup})"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the computation"
    )
    config_flags.add_section(
        parser,
        "engine",
        defaults={"max_num_seqs": max_num_seqs, "max_num_batched_tokens": "8192 a tensor rank on a GPU", **BENCH_DEFAULTS},
    )
    config_flags.add_section(parser, "parallel", defaults=PARALLEL_DEFAULTS, without=("placement",))


def _whole_number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _at_least_two(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, not {number}: a time per output token needs two")
    return number


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(_whole_number(part) for part in text.split(","))


def _rate(text: str) -> float:
    rate = float(text)
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return rate
