"""Strict loading: each tensor has one place, each place its tensor, and a rank reads its slices only."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pilotfish.common.errors import ConfigError, ModelLoadError
from pilotfish.models.build import load_model
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.checkpoint import SINGLE_FILE, Checkpoint
from pilotfish.models.loader import load_weights
from pilotfish.models.parallel import Parallel
from pilotfish.models.registry import ARCHITECTURES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

SaveCheckpoint = Callable[..., PreTrainedModel]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def change(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Rewrites the checkpoint's only file with tensors put in, or taken out where None."""
    tensors = load_file(path / SINGLE_FILE) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / SINGLE_FILE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q_PROJ: None}, f"tensor {Q_PROJ} is missing"),
        ({Q_PROJ + "2": torch.zeros(1)}, rf"tensor {Q_PROJ}2 \(model\.safetensors\) has no place"),
        ({"x" + Q_PROJ: torch.zeros(96, 48)}, f"tensor x{Q_PROJ} .* has no place"),
        ({"model.layers.1.self_attn.q_proj.bias": torch.zeros(96)}, r"q_proj\.bias .* has no place"),
        ({"model.layers.3.input_layernorm.weight": torch.zeros(48)}, r"layers\.3\.input_layernorm\.weight .* has no place"),
        ({Q_PROJ: torch.zeros(48, 96)}, rf"{Q_PROJ} .* has shape \(48, 96\), the model needs \(96, 48\)"),
        ({"model.norm.weight": torch.zeros(48, 1)}, r"model\.norm\.weight .* has shape \(48, 1\)"),
        ({Q_PROJ: torch.zeros(96, 48, dtype=torch.int8)}, f"{Q_PROJ} .* is stored as I8"),
        ({"lm_head.weight": None}, r"tensor lm_head\.weight is missing"),
        ({f"extra.{i}": torch.zeros(1) for i in range(9)}, "and 4 more problems"),
    ],
)
def test_every_tensor_has_its_place(changes: dict[str, torch.Tensor | None], message: str, llama: Path) -> None:
    change(llama, changes)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model(llama, device="cpu")
    assert "download both again" in caught.value.message


def test_a_derived_table_of_old_checkpoints_is_left_out(llama: Path) -> None:
    change(llama, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    load_model(llama, device="cpu")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path, save_checkpoint: SaveCheckpoint) -> None:
    save_checkpoint(tmp_path, "Glm4MoeForCausalLM", num_mtp_layers=1)
    change(tmp_path, {"model.layers.3.eh_proj.weight": torch.zeros(4), "model.layers.3.mlp.gate.weight": torch.zeros(4)})
    load_model(tmp_path, device="cpu")
    change(tmp_path, {"model.layers.30.eh_proj.weight": torch.zeros(4), "model.layers.4.eh_proj.weight": torch.zeros(4)})
    with pytest.raises(ModelLoadError, match=r"layers\.30\.eh_proj\.weight .* has no place.*layers\.4\.eh_proj\.weight"):
        load_model(tmp_path, device="cpu")


def test_truncated_checkpoint(llama: Path) -> None:
    content = (llama / SINGLE_FILE).read_bytes()
    (llama / SINGLE_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelLoadError, match="truncated or corrupt"):
        load_model(llama, device="cpu")


def test_tied_head_may_repeat_the_embedding_or_stand_for_it(tmp_path: Path, save_checkpoint: SaveCheckpoint) -> None:
    save_checkpoint(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    embedding = load_file(tmp_path / SINGLE_FILE)["model.embed_tokens.weight"]
    change(tmp_path, {"lm_head.weight": embedding.clone()})
    repeated = load_model(tmp_path, device="cpu")
    change(tmp_path, {"model.embed_tokens.weight": None})
    head_only = load_model(tmp_path, device="cpu")
    for model in (repeated, head_only):
        torch.testing.assert_close(model.embedding.weight, embedding, rtol=0, atol=0)
        assert model.embedding.head_weight.data_ptr() == model.embedding.weight.data_ptr()
    change(tmp_path, {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding + 1})
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        load_model(tmp_path, device="cpu")
    change(tmp_path, {"model.embed_tokens.weight": None, "lm_head.weight": None})
    with pytest.raises(ModelLoadError, match=r"tensor model\.embed_tokens\.weight is missing"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("stored", "in_memory"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)],
)
def test_weights_on_a_cpu_stay_as_stored(
    stored: torch.dtype, in_memory: torch.dtype, tmp_path: Path, save_checkpoint: SaveCheckpoint
) -> None:
    save_checkpoint(tmp_path, "LlamaForCausalLM", dtype=stored)
    model = load_model(tmp_path, device="cpu")
    assert {parameter.dtype for parameter in model.parameters() if parameter.dim() > 1} == {in_memory}
    assert {parameter.dtype for parameter in model.parameters() if parameter.dim() == 1} == {torch.float32}
    assert model.dtype == torch.float32
    assert model.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    with pytest.raises(ConfigError, match="bfloat16 is not computed on a CPU"):
        load_model(tmp_path, device="cpu", dtype="bfloat16")


def test_progress_counts_every_byte(llama: Path) -> None:
    calls: list[tuple[int, int]] = []
    model = load_model(llama, device="cpu", progress=lambda done, total: calls.append((done, total)))
    done, totals = [call[0] for call in calls], {call[1] for call in calls}
    assert done == sorted(done)
    assert totals == {done[-1]} == {4 * model.num_parameters}
    with safe_open(llama / SINGLE_FILE, "pt") as file:
        assert len(calls) == len(file.keys())


def only_loaded(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("loading needs no collective")


def load_ranks(path: Path, size: int, *, whole_experts: bool = False) -> list[CausalLM]:
    shared = {"size": size, "whole_experts": whole_experts, "all_reduce": only_loaded, "all_gather": only_loaded}
    ranks = [Parallel(rank=rank, **shared) for rank in range(size)]
    return [load_model(path, device="cpu", parallel=parallel) for parallel in ranks]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_read_every_byte_once(
    size: int, architecture: str, fused: bool, tmp_path: Path, save_checkpoint: SaveCheckpoint
) -> None:
    biases = {} if architecture in ("LlamaForCausalLM", "MixtralForCausalLM") else {"attention_bias": True}
    save_checkpoint(tmp_path, architecture, save={"save_original_format": not fused}, **biases)
    stored = load_file(tmp_path / SINGLE_FILE)
    assert any("experts.gate_up_proj" in name for name in stored) == (fused and "M" in architecture.removesuffix("LM"))
    num_reads = {name: torch.zeros(tensor.shape, dtype=torch.int64) for name, tensor in stored.items()}
    reports = []
    for model in load_ranks(tmp_path, size):
        with Checkpoint(tmp_path) as checkpoint:
            reports.append(load_weights(checkpoint, model.weight_sources()))
        for source in model.weight_sources():
            num_reads[source.name][source.region] += 1
        assert reports[-1].num_bytes == model.weight_bytes
    for name, count in num_reads.items():
        if any(part in name for part in ("norm", ".gate.weight", "o_proj.bias")):
            assert bool((count == size).all()), name
        elif size == 4 and (".k_proj." in name or ".v_proj." in name):  # two ranks keep the first of three kv heads
            assert count.view(3, -1).unique(dim=1).tolist() == [[2], [1], [1]], name
        else:
            assert bool((count == 1).all()), name
    assert sum(report.num_bytes for report in reports) == sum(
        int(count.sum()) * stored[name].itemsize for name, count in num_reads.items()
    )


@pytest.mark.parametrize("whole_experts", [False, True])
def test_ranks_read_experts_stored_by_columns_once(
    whole_experts: bool, tmp_path: Path, save_checkpoint: SaveCheckpoint
) -> None:
    save_checkpoint(tmp_path, "GptOssForCausalLM")
    experts = {name: tensor for name, tensor in load_file(tmp_path / SINGLE_FILE).items() if ".experts." in name}
    assert len(experts) == 4 * 3  # gate and up, down, and their biases
    num_reads = {name: torch.zeros(tensor.shape, dtype=torch.int64) for name, tensor in experts.items()}
    for model in load_ranks(tmp_path, 3, whole_experts=whole_experts):
        for source in model.weight_sources():
            if source.name in experts:
                num_reads[source.name][source.region] += 1
                torch.testing.assert_close(source.target, experts[source.name][source.region], rtol=0, atol=0)
    for name, count in num_reads.items():
        assert bool((count == (3 if name.endswith("down_proj_bias") and not whole_experts else 1)).all()), name


def test_columns_cost_their_rows(llama: Path) -> None:
    """What the disk reads of a row-parallel weight does not shrink with the number of ranks, and the report says so."""
    model = load_ranks(llama, 3)[1]
    with Checkpoint(llama) as checkpoint:
        report = load_weights(checkpoint, model.weight_sources())
        split_by_columns = sum(
            4 * math.prod(stored.shape)
            for name, stored in checkpoint.tensors.items()
            if name.endswith(("o_proj.weight", "down_proj.weight"))
        )
    assert report.num_disk_bytes - report.num_bytes == split_by_columns * 2 // 3


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts the pages of a mapping, which Linux tells")
def test_a_slice_of_rows_touches_its_own_pages_only(tmp_path: Path) -> None:
    save_file({"w": torch.ones(8192, 1024)}, tmp_path / SINGLE_FILE)  # 32 MiB
    neighbours = 6 << 20  # a touch may map a huge page, 2 MiB, at either end
    with Checkpoint(tmp_path) as checkpoint:
        before = mapped_bytes(tmp_path / SINGLE_FILE)
        part = checkpoint.read("w", (slice(2048, 4096), slice(None))).clone()
        touched = mapped_bytes(tmp_path / SINGLE_FILE) - before
    assert part.nbytes <= touched <= part.nbytes + neighbours


def mapped_bytes(path: Path) -> int:
    """Bytes of the file's mappings in this process that have been touched."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0].islower() or line[0].isdigit():
            is_ours = line.endswith(str(path))
        elif is_ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_element_of_every_parameter_is_filled_once(
    architecture: str, tmp_path: Path, save_checkpoint: SaveCheckpoint
) -> None:
    save_checkpoint(tmp_path, architecture)
    model = load_model(tmp_path, device="cpu")
    for parameter in model.parameters():
        parameter.zero_()
    for source in model.weight_sources():
        source.target.add_(1)
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())
    with Checkpoint(tmp_path) as checkpoint:
        report = load_weights(checkpoint, model.weight_sources())
    assert report.num_bytes == model.weight_bytes
