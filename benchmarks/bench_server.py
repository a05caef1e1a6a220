"""A server as its clients see it: `pilotfish serve` of a model with random weights, under the loads of `pilotfish bench serve`.

The checkpoint, of the named shape and with a word for each token, is written to a scratch directory. Each door serves each rate
twice: prompts that it sees for the first time, then the same ones from the prefix cache. A JSON row each.

    python benchmarks/bench_server.py --shape qwen3-8b --rates 8 24 [--protocols grpc http] [--output-len 128]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
from pilotfish.cli.ray_session import ray_session
from pilotfish.cli.serve import deployed
from pilotfish.common.config import EngineConfig, GatewayConfig, ModelConfig, ServeConfig
from pilotfish.models.dummy import build_dummy
from pilotfish.models.dummy_shapes import DUMMY_PREFIX, SHAPES, dummy_shape
from pilotfish.models.model_shape import ModelShape
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers

SHARD_BYTES = 4_000_000_000
LIMIT_S = 600.0  # of a load
WORDS = 32768  # that prompts are drawn from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--shape", default="tiny", choices=[name for name, shape in SHAPES.items() if "Qwen3" in shape.architecture]
    )
    parser.add_argument(
        "--rates", nargs="+", default=[8.0], type=float, metavar="X", help="mean arrivals a second, one load each"
    )
    parser.add_argument("--protocols", nargs="+", default=["grpc", "http"], choices=["grpc", "http"], help="doors to load")
    parser.add_argument("--num-prompts", type=int, default=160, help="of a load")
    parser.add_argument("--input-len", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=128, help="tokens generated for each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pilotfish-bench-") as directory:
        path = save_checkpoint(args.shape, Path(directory))
        torch.cuda.empty_cache()  # the worker, another process, wants that memory
        max_model_len = args.input_len + args.output_len
        config = ServeConfig(
            model=ModelConfig(model=str(path), max_model_len=max_model_len),
            engine=EngineConfig(kv_memory_fraction=0.9 if torch.cuda.is_available() else 0.1),
            gateway=GatewayConfig(grpc_port=0, http_port=0),
        )
        with (
            ray_session(address="local", namespace="pilotfish-bench", show_logs=False),
            deployed(config, model_path=str(path)) as (_, addresses),
        ):
            for number, protocol in enumerate(args.protocols):
                address = addresses.grpc if protocol == "grpc" else addresses.http
                for rate_number, rate in enumerate(args.rates):
                    for prompts in ("new", "cached"):
                        row = run_load(args, protocol, address, rate, seed=100 * number + rate_number)
                        print(json.dumps({"shape": args.shape, "prompts": prompts, **row}), flush=True)


def run_load(args: argparse.Namespace, protocol: str, address: str, rate: float, *, seed: int) -> dict[str, Any]:
    """What the command prints, run in a process of its own as its user would."""
    command = [sys.executable, "-m", "pilotfish.cli.main", "bench", "serve", f"--address={address}", f"--protocol={protocol}"]
    command += [f"--request-rate={rate}", f"--num-prompts={args.num_prompts}", f"--input-len={args.input_len}"]
    command += [
        f"--output-len={args.output_len}",
        f"--vocab-size={min(WORDS, SHAPES[args.shape].vocab_size)}",
        f"--seed={seed}",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def save_checkpoint(name: str, path: Path) -> Path:
    """As Hugging Face lays one out; the weights are those of `dummy:<name>`."""
    shape = dummy_shape(DUMMY_PREFIX + name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards: list[dict[str, torch.Tensor]] = [{}]
    for source in build_dummy(DUMMY_PREFIX + name, device=device).weight_sources():
        if sum(tensor.nbytes for tensor in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][source.name] = source.target.cpu().clone()
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for file_name, shard in zip(names, shards, strict=True):
        save_file(shard, path / file_name)
    weight_map = {tensor: file_name for file_name, shard in zip(names, shards, strict=True) for tensor in shard}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(hf_config(shape)))
    words = tokenizers.Tokenizer(models.WordLevel({f"w{number}": number for number in range(shape.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


def hf_config(shape: ModelShape) -> dict[str, Any]:
    """Of Qwen3's two architectures."""
    fields: dict[str, Any] = {
        "architectures": [shape.architecture],
        "model_type": "qwen3" if shape.moe is None else "qwen3_moe",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": shape.activation,
        "tie_word_embeddings": shape.tied_embeddings,
        "rope_theta": shape.rotary.theta,
        "torch_dtype": "bfloat16",
    }
    if shape.moe is not None:
        fields |= {
            "num_experts": shape.moe.num_experts,
            "num_experts_per_tok": shape.moe.top_k,
            "moe_intermediate_size": shape.moe.intermediate_size,
            "norm_topk_prob": shape.moe.renormalize,
        }
    return fields


if __name__ == "__main__":
    main()
