"""The C++ kernels against torch on this machine, shape by shape, in one run: `python benchmarks/bench_cpu_kernels.py`.

Each line gives the best of several repetitions (other programs only ever add time) of torch and of pilotfish. The shapes are
those of SmolLM2-135M; weights rotate through all 30 layers, so that they come from memory as they do in a model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pilotfish.kernels.linear import linear

NUM_LAYERS, HIDDEN, INTERMEDIATE, QKV, VOCAB = 30, 576, 1536, 960, 49152
LAYER_SHAPES = [(QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]


def best_ms(run: Callable[[], object], repetitions: int) -> float:
    best = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def report(name: str, repetitions: int, **runs: Callable[[], object]) -> None:
    figures = {label: best_ms(run, repetitions) for label, run in runs.items()}
    print(f"{name:<44}" + "  ".join(f"{label} {ms:9.3f} ms" for label, ms in figures.items()), flush=True)


def bench_linear() -> None:
    bf16 = [[torch.randn(shape).bfloat16() for shape in LAYER_SHAPES] for _ in range(NUM_LAYERS)]
    f32 = [[weight.float() for weight in layer] for layer in bf16]
    head = torch.randn(VOCAB, HIDDEN).bfloat16()
    wide_head = head.float()

    def layers(op: Callable[..., torch.Tensor], weights: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> None:
        for layer in weights:
            for x, weight in zip(inputs, layer, strict=True):
                op(x, weight)

    for num_tokens in (1, 2, 4, 8, 16, 32, 64, 256):
        inputs = [torch.randn(num_tokens, columns) for _, columns in LAYER_SHAPES]
        narrow = [x.bfloat16() for x in inputs]
        repetitions = 15 if num_tokens <= 64 else 4
        report(
            f"linear, 30 layers, {num_tokens} tokens",
            repetitions,
            torch_f32=lambda inputs=inputs: layers(F.linear, f32, inputs),
            torch_bf16=lambda narrow=narrow: layers(F.linear, bf16, narrow),
            ours_f32=lambda inputs=inputs: layers(linear, f32, inputs),
            ours_bf16_weights=lambda inputs=inputs: layers(linear, bf16, inputs),
        )
        report(
            f"linear, LM head, {num_tokens} tokens",
            repetitions,
            torch_f32=lambda x=inputs[0]: F.linear(x, wide_head),
            torch_bf16=lambda x=narrow[0]: F.linear(x, head),
            ours_f32=lambda x=inputs[0]: linear(x, wide_head),
            ours_bf16_weights=lambda x=inputs[0]: linear(x, head),
        )


BENCHMARKS = {"linear": bench_linear}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which ones; all without a name")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads")
    with torch.inference_mode():
        for name in arguments.names or BENCHMARKS:
            BENCHMARKS[name]()


if __name__ == "__main__":
    main()
