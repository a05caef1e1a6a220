"""What the whole path costs: SDK -> gRPC -> controller -> gRPC -> worker, against the Pipeline in one process.

Sixteen streams: output tokens a second of both, in turns. One stream: time to the first token at the reader. Both sides run
the same model with the same number of threads, and each is idle in the other's turn.

    python benchmarks/bench_path.py [--rounds 5] [--model smollm2-135m]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time

from pilotfish import AsyncClient, Pipeline, SamplingParams
from pilotfish.cli.ray_session import ray_session
from pilotfish.cli.serve import deployed
from pilotfish.common.config import EngineConfig, GatewayConfig, ModelConfig, ServeConfig
from pilotfish.models.store import resolve

NUM_STREAMS = 16
NUM_TOKENS = 128
PROMPT = "Write a long story about a fish that travels with a ray across the sea."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    path = str(resolve(args.model).path)
    num_threads = len(os.sched_getaffinity(0))
    engine = EngineConfig(num_threads=num_threads, kv_memory_fraction=0.2, prefix_caching=False)
    config = ServeConfig(model=ModelConfig(model=args.model), engine=engine, gateway=GatewayConfig(grpc_port=0, http_port=0))
    options = {"num_threads": num_threads, "kv_memory_fraction": 0.2, "prefix_caching": False}
    with (
        Pipeline(path, **options) as pipeline,
        ray_session(address="local", namespace="pilotfish-bench", show_logs=False),
        deployed(config, model_path=path) as (_, addresses),
    ):
        asyncio.run(measure(pipeline, addresses.grpc, rounds=args.rounds))


async def measure(pipeline: Pipeline, address: str, *, rounds: int) -> None:
    async with AsyncClient(address, timeout_s=300) as client:
        rates: dict[str, list[float]] = {"pipeline": [], "path": []}
        ttfts_ms: dict[str, list[float]] = {"pipeline": [], "path": []}
        for number in range(rounds + 1):
            rate = {"pipeline": await asyncio.to_thread(pipeline_rate, pipeline), "path": await path_rate(client)}
            pairs = [(await asyncio.to_thread(pipeline_ttft_ms, pipeline), await path_ttft_ms(client)) for _ in range(5)]
            if number == 0:
                continue  # warm-up
            for name, values in rates.items():
                values.append(rate[name])
            ttfts_ms["pipeline"] += [pair[0] for pair in pairs]
            ttfts_ms["path"] += [pair[1] for pair in pairs]
        ratios = [path / pipeline for path, pipeline in zip(rates["path"], rates["pipeline"], strict=True)]
        added = [path - pipeline for path, pipeline in zip(ttfts_ms["path"], ttfts_ms["pipeline"], strict=True)]
        print(
            json.dumps(
                {
                    "streams": NUM_STREAMS,
                    "output_tok_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
                    "ratio": round(statistics.median(ratios), 3),
                    "ratios": [round(ratio, 3) for ratio in ratios],
                }
            )
        )
        print(
            json.dumps(
                {
                    "ttft_ms": {name: round(statistics.median(values), 1) for name, values in ttfts_ms.items()},
                    "added_ms": round(statistics.median(added), 1),
                }
            )
        )


def prompts() -> list[str]:
    return [f"{number}. {PROMPT}" for number in range(NUM_STREAMS)]


def pipeline_rate(pipeline: Pipeline) -> float:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    start = time.perf_counter()
    completions = pipeline(prompts(), params, progress=False)
    assert isinstance(completions, list)
    assert all(len(completion.token_ids) == NUM_TOKENS for completion in completions)
    return NUM_STREAMS * NUM_TOKENS / (time.perf_counter() - start)


async def path_rate(client: AsyncClient) -> float:
    async def one(prompt: str) -> None:
        stream = client.stream_generate(prompt, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        async for _ in stream:
            pass
        assert len(stream.completion.token_ids) == NUM_TOKENS

    start = time.perf_counter()
    await asyncio.gather(*map(one, prompts()))
    return NUM_STREAMS * NUM_TOKENS / (time.perf_counter() - start)


def pipeline_ttft_ms(pipeline: Pipeline) -> float:
    """Read to the end, so that no step is left running beside what is measured next."""
    start = time.perf_counter()
    arrived = [
        time.perf_counter() for _ in pipeline.stream(PROMPT, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    ]
    return (arrived[0] - start) * 1000


async def path_ttft_ms(client: AsyncClient) -> float:
    start = time.perf_counter()
    stream = client.stream_generate(PROMPT, temperature=0, max_tokens=4, ignore_eos=True)
    arrived = [time.perf_counter() async for _ in stream]
    return (arrived[0] - start) * 1000


if __name__ == "__main__":
    main()
