"""SmolLM2 on this machine's CPU: pilotfish's Pipeline against transformers' generate, in one process, turn by turn.

One stream: tokens a second after a chat prompt. Sixteen requests of mixed lengths: useful tokens a second, against a
left-padded batch of sixteen that runs until its longest row is done. transformers runs in float32 and in bfloat16; the better
one counts.

    python benchmarks/bench_vs_transformers.py [--rounds 3] [--model smollm2-135m]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from pilotfish import Pipeline, SamplingParams
from pilotfish.models.store import resolve

PROMPT = "What is the capital of France? Explain gravity in one sentence."
NUM_TOKENS = 48
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    num_threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(num_threads)
    path = resolve(args.model).path
    references = {
        name: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    with Pipeline(str(path), num_threads=num_threads, prefix_caching=False) as pipeline:
        prompt = pipeline.tokenizer.encode(PROMPT)
        requests = mixed_requests(prompt)
        contenders: dict[str, dict[str, Callable[[], float]]] = {
            "one stream": {
                "pilotfish": lambda: pipeline_rate(pipeline, [(prompt, NUM_TOKENS)]),
                **{f"transformers {n}": lambda m=m: generate_rate(m, [(prompt, NUM_TOKENS)]) for n, m in references.items()},
            },
            f"{BATCH} mixed requests": {
                "pilotfish": lambda: pipeline_rate(pipeline, requests),
                **{f"transformers {n}": lambda m=m: generate_rate(m, requests) for n, m in references.items()},
            },
        }
        for workload, runs in contenders.items():
            print(json.dumps(compare(workload, runs, rounds=args.rounds)), flush=True)


def mixed_requests(prompt: list[int]) -> list[tuple[list[int], int]]:
    """Token ids and output lengths: prompts of 16 to 128 tokens, outputs of 8 to 64."""
    rng = random.Random(0)
    return [((prompt * 20)[: rng.randrange(16, 129)], rng.randrange(8, 65)) for _ in range(BATCH)]


def compare(workload: str, runs: dict[str, Callable[[], float]], *, rounds: int) -> dict[str, object]:
    """Medians over rounds that take turns, and the ratio to the better reference."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            rates[name].append(run())
    medians = {name: round(statistics.median(values), 2) for name, values in rates.items()}
    best = max(value for name, value in medians.items() if name != "pilotfish")
    return {"workload": workload, "useful_tok_s": medians, "ratio": round(medians["pilotfish"] / best, 2)}


def pipeline_rate(pipeline: Pipeline, requests: list[tuple[list[int], int]]) -> float:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in requests]
    start = time.perf_counter()
    completions = pipeline([prompt for prompt, _ in requests], params, progress=False)
    elapsed_s = time.perf_counter() - start
    assert [len(c.token_ids) for c in completions] == [n for _, n in requests]
    return sum(n for _, n in requests) / elapsed_s


@torch.inference_mode()
def generate_rate(model: transformers.PreTrainedModel, requests: list[tuple[list[int], int]]) -> float:
    longest_prompt = max(len(prompt) for prompt, _ in requests)
    longest_output = max(n for _, n in requests)
    ids = torch.tensor([[0] * (longest_prompt - len(prompt)) + prompt for prompt, _ in requests])
    mask = torch.tensor([[0] * (longest_prompt - len(prompt)) + [1] * len(prompt) for prompt, _ in requests])
    start = time.perf_counter()
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=longest_output, min_new_tokens=longest_output, pad_token_id=0
    )
    elapsed_s = time.perf_counter() - start
    assert output.shape[1] == longest_prompt + longest_output
    return sum(n for _, n in requests) / elapsed_s


if __name__ == "__main__":
    main()
