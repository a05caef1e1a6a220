"""A real mixture of experts without a model hub: a dense checkpoint whose every MLP stands several times as an expert.

A Mixtral's weights of the chosen experts add up to one, so whatever its routers choose, the model says what the dense one says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def upcycle(dense: Path, target: Path, *, num_experts: int, seed: int = 0) -> Path:
    """Writes a Mixtral of the Llama in `dense`, with random routers and top 2, and returns its directory."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(dense):
        layer, is_mlp, part = name.partition(".mlp.")
        if not is_mlp:
            tensors[name] = tensor
            continue
        moe = f"{layer}.block_sparse_moe"
        for expert in range(num_experts):
            tensors[f"{moe}.experts.{expert}.{_EXPERT_NAMES[part.split('.')[0]]}.weight"] = tensor.clone()
        if part.startswith("gate_proj"):
            router = torch.randn(num_experts, tensor.shape[1], generator=generator)
            tensors[f"{moe}.gate.weight"] = router.to(tensor.dtype)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": num_experts,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    return _write(dense, target, config, tensors)


def shorten(dense: Path, target: Path, *, num_layers: int) -> Path:
    """Writes the first layers of the Llama in `dense`, whose weights are a real model's still, and returns its directory."""
    later = tuple(f"model.layers.{number}." for number in range(num_layers, _config(dense)["num_hidden_layers"]))
    tensors = {name: tensor for name, tensor in _tensors(dense) if not name.startswith(later)}
    return _write(dense, target, {"num_hidden_layers": num_layers}, tensors)


def _config(directory: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return fields


def _tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(directory.glob("*.safetensors")):
        yield from load_file(file).items()


def _write(dense: Path, target: Path, changes: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    target.mkdir(parents=True)
    for file in dense.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, target / file.name)
    (target / "config.json").write_text(json.dumps(_config(dense) | changes))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
