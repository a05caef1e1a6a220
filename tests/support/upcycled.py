"""A real mixture of experts without a model hub: a dense checkpoint whose every MLP stands several times as an expert.

A Mixtral's weights of the chosen experts add up to one, so whatever its routers choose, the model says what the dense one says.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def upcycle(dense: Path, target: Path, *, num_experts: int, seed: int = 0) -> Path:
    """Writes a Mixtral of the Llama in `dense`, with random routers and top 2, and returns its directory."""
    target.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for file in dense.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, target / file.name)
    config = json.loads((dense / "config.json").read_text())
    config |= {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": num_experts,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    (target / "config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(dense.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
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
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
