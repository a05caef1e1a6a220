"""A GGUF file's tensors as one safetensors file in bfloat16, streamed: memory holds one slice of one tensor at a time.

Names follow llama.cpp's gguf-py (constants.py, TENSOR_NAMES). A file is refused if it has a tensor that has no name here, or a
layer that lacks a tensor of its neighbours. Rounding: dequantized to float32 as ggml does, then to bfloat16, nearest even.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, ReaderTensor, dequantize, quant_shape_from_byte_shape, quantize

from ..common.errors import ModelLoadError
from .gguf_config import USE_CHECKPOINT, GgufArchitecture
from .store_progress import Progress

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERT_PARTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
ROPE_FACTORS = "rope_freqs.weight"  # becomes rope_scaling in config.json
_SLICE_VALUES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """One tensor to write: where its (possibly quantized) rows lie in the mapped file, and the order to take them in."""

    name: str
    rows: np.ndarray
    quantization: GGMLQuantizationType
    row_order: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.quantization in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            return tuple(self.rows.shape)
        return tuple(quant_shape_from_byte_shape(self.rows.shape, self.quantization))

    @property
    def num_bytes(self) -> int:
        return 2 * int(np.prod(self.shape))

    def bfloat16_slices(self) -> Iterator[bytes]:
        values_per_row = int(np.prod(self.shape[1:]))
        step = max(1, _SLICE_VALUES // values_per_row)
        for start in range(0, self.shape[0], step):
            chosen = slice(start, start + step)
            rows = self.rows[chosen if self.row_order is None else self.row_order[chosen]]
            yield quantize(dequantize(rows, self.quantization), GGMLQuantizationType.BF16).tobytes()


def plan_tensors(
    tensors: Sequence[ReaderTensor], *, architecture: GgufArchitecture, config: dict[str, Any]
) -> list[OutputTensor]:
    """What to write for the tensors of a file, in the file's order.

    Raises:
        ModelLoadError: a tensor is unknown, or missing.
    """
    outputs: list[OutputTensor] = []
    leaves: dict[int, set[str]] = {layer: set() for layer in range(config["num_hidden_layers"])}
    for tensor in tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        if tensor.name in _GLOBAL_NAMES:
            outputs.append(OutputTensor(name=_GLOBAL_NAMES[tensor.name], rows=tensor.data, quantization=tensor.tensor_type))
            continue
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
        layer_outputs = _layer_outputs(tensor, *match.groups(), architecture=architecture, config=config) if match else []
        if not match or not layer_outputs or int(match[1]) not in leaves:
            raise ModelLoadError(
                f"the GGUF file has a tensor {tensor.name!r}, unknown in a {architecture.class_name} of {len(leaves)} layers; "
                f"{USE_CHECKPOINT}"
            )
        leaves[int(match[1])].add(f"{match[2]}.{match[3]}")
        outputs += layer_outputs
    _check_complete({output.name for output in outputs}, leaves)
    return outputs


def _layer_outputs(
    tensor: ReaderTensor, layer: str, leaf: str, kind: str, *, architecture: GgufArchitecture, config: dict[str, Any]
) -> list[OutputTensor]:
    """The tensors made from one of a layer's; empty if it is unknown."""
    prefix = f"model.layers.{layer}"
    quantization = tensor.tensor_type
    if leaf in _LAYER_NAMES:
        order = None
        if architecture.interleaved_rotary and leaf in ("attn_q", "attn_k"):
            heads = "num_attention_heads" if leaf == "attn_q" else "num_key_value_heads"
            order = half_split_order(config[heads], config["head_dim"])
        name = f"{prefix}.{_LAYER_NAMES[leaf]}.{kind}"
        return [OutputTensor(name=name, rows=tensor.data, quantization=quantization, row_order=order)]
    if architecture.experts is None:
        return []
    block, *parts = architecture.experts
    if leaf == "ffn_gate_inp":
        return [OutputTensor(name=f"{prefix}.{block}.gate.{kind}", rows=tensor.data, quantization=quantization)]
    if leaf not in _EXPERT_PARTS:
        return []
    part = parts[_EXPERT_PARTS.index(leaf)]
    return [
        OutputTensor(name=f"{prefix}.{block}.experts.{expert}.{part}.{kind}", rows=rows, quantization=quantization)
        for expert, rows in enumerate(tensor.data)
    ]


def half_split_order(num_heads: int, head_dim: int) -> np.ndarray:
    """Which of llama.cpp's rows is each of Hugging Face's: [num_heads * head_dim].

    llama.cpp keeps the two rows of a rotary pair side by side (2i, 2i + 1); Hugging Face keeps them half a head apart.
    """
    return np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _check_complete(written: set[str], leaves: dict[int, set[str]]) -> None:
    missing = [name for name in list(_GLOBAL_NAMES.values())[:2] if name not in written]
    every_leaf = set().union(*leaves.values())
    missing += [f"blk.{layer}.{leaf}" for layer, found in leaves.items() for leaf in sorted(every_leaf - found)]
    if missing or not every_leaf:
        raise ModelLoadError(f"the GGUF file lacks the tensors {', '.join(missing[:4]) or 'of its layers'}; get it again")


def write_safetensors(path: Path, outputs: Sequence[OutputTensor], *, progress: Progress) -> None:
    """Write one safetensors file: the header's length (8 bytes, little endian), the JSON header, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in outputs:
        start, end = end, end + output.num_bytes
        header[output.name] = {"dtype": "BF16", "shape": output.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for done, output in enumerate(outputs):
            progress("Converting tensors", done, len(outputs), unit="tensors")
            for chunk in output.bfloat16_slices():
                file.write(chunk)
    progress("Converting tensors", len(outputs), len(outputs), unit="tensors")
