"""`pilotfish check-model`: the parity proof, on any checkpoint."""

from __future__ import annotations

import argparse
import sys

from ..models.check import CheckRow, check_model
from ..models.store import resolve
from ..models.store_progress import terminal_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a local directory, a Hub id, a .gguf file or an alias")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where pilotfish's side runs")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="prove it over N ranks too: processes on this machine's CPU"
    )
    parser.add_argument("--data-parallel", type=int, default=1, metavar="N", help="N times as many ranks, which share experts")
    parser.add_argument("--expert-parallel", action="store_true", help="ranks keep whole experts of sparse layers")
    parser.epilog = (
        "Loads the weights strictly, then compares logits and greedy tokens with untouched transformers in float32: prefill, "
        "16 decode steps, and a chunked prefill, mixed lengths in one batch, through the paged cache. Exits 1 if a row fails."
    )


def run(args: argparse.Namespace) -> int:
    with terminal_progress() as progress:
        model = resolve(args.model, pull_missing=True, progress=progress)
    print(f"Checking {model.path}", file=sys.stderr)
    rows = check_model(
        model.path,
        device=args.device,
        seed=args.seed,
        tensor_parallel=args.tensor_parallel,
        data_parallel=args.data_parallel,
        expert_parallel=args.expert_parallel,
    )
    print(_table(rows))
    return 0 if all(row.ok for row in rows) else 1


def _table(rows: list[CheckRow]) -> str:
    width = max(len(row.name) for row in rows)
    return "\n".join(f"{'ok' if row.ok else 'FAILED':6}  {row.name:{width}}  {row.detail}" for row in rows)
