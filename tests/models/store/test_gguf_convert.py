"""GGUF files become the checkpoints they came from, and what cannot be converted is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from pilotfish.common.errors import ModelLoadError
from pilotfish.models.gguf_convert import plan_conversion
from pilotfish.models.store_progress import no_progress
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def _convert(path: Path, directory: Path) -> Path:
    directory.mkdir()
    plan_conversion(path, progress=no_progress).write(directory, progress=no_progress)
    return directory


def _llama_cpp_rotary_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The permutation that llama.cpp's converter applies to q and k: half-split pairs become neighbours."""
    heads = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def _as_gguf(model: transformers.PreTrainedModel, *, architecture: str) -> dict[str, np.ndarray]:
    """A Hugging Face model's weights as llama.cpp's converter writes them, named by gguf's own table."""
    config = model.config
    enum = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(enum, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            layer = f"blk.{name.split('.')[2]}"
            gate, up = value.chunk(2, dim=1)
            tensors |= {f"{layer}.ffn_gate_exps.weight": gate, f"{layer}.ffn_up_exps.weight": up}
        elif name.endswith("experts.down_proj"):
            tensors[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = value
        elif name.endswith("mlp.gate.weight"):
            tensors[f"blk.{name.split('.')[2]}.ffn_gate_inp.weight"] = value
        else:
            stem, kind = name.rsplit(".", 1)
            leaf = stem.rsplit(".", 1)[-1]
            stored = _llama_cpp_rotary_order(value, heads[leaf]) if architecture == "llama" and leaf in heads else value
            tensors[f"{names.get_name(stem)}.{kind}"] = stored
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def _family(name: str, vocab_size: int) -> tuple[transformers.PreTrainedConfig, str, dict[str, Any]]:
    """A tiny config, llama.cpp's name for its architecture, and the metadata only that architecture has."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    experts = {"expert_count": 4, "expert_used_count": 2}
    match name:
        case "llama":
            return transformers.LlamaConfig(**common, tie_word_embeddings=True), "llama", {}
        case "llama with biases":
            return transformers.LlamaConfig(**common, attention_bias=True), "llama", {}
        case "mixtral":
            return transformers.MixtralConfig(**common, num_local_experts=4), "llama", experts
        case "qwen2":
            return transformers.Qwen2Config(**common), "qwen2", {}
        case "qwen3":
            return transformers.Qwen3Config(**common, head_dim=32), "qwen3", {"attention.key_length": 32}
        case "qwen3-moe":
            config = transformers.Qwen3MoeConfig(
                **common, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
            )
            return config, "qwen3moe", {**experts, "expert_feed_forward_length": 32, "attention.key_length": 16}
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["llama", "llama with biases", "mixtral", "qwen2", "qwen3", "qwen3-moe"])
def test_transformers_loads_the_model_that_was_written(
    name: str, tmp_path: Path, write_gguf, tokenizer_metadata: dict[str, Any], tiny_llama_metadata: dict[str, Any]
) -> None:
    config, architecture, section = _family(name, len(tokenizer_metadata["tokenizer.ggml.tokens"]))
    torch.manual_seed(0)
    original = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for parameter in original.parameters():  # norms and biases start as constants, which would hide a swap
        torch.nn.init.normal_(parameter, std=0.2)
    shared = {key.removeprefix("llama."): value for key, value in tiny_llama_metadata.items() if key.startswith("llama.")}
    shared.pop("rope.dimension_count")
    metadata = {f"{architecture}.{key}": value for key, value in (shared | section).items()} | tokenizer_metadata
    path = write_gguf(tmp_path / "m.gguf", metadata, _as_gguf(original, architecture=architecture), architecture=architecture)

    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        _convert(path, tmp_path / "hf"), dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(loaded) is type(original)
    expected = original.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    ids = torch.arange(20).reshape(1, -1)
    assert torch.equal(loaded.eval()(ids).logits, original(ids).logits)


def test_quantized_rows_are_reordered_and_dequantized(tmp_path: Path, write_gguf, tiny_llama_metadata, tiny_llama_tensors):
    """Integers of a block whose largest is 127 survive Q8_0 exactly, so the stored matrix must come back bit for bit."""
    generator = np.random.default_rng(1)
    matrix = generator.integers(-127, 128, size=(64, 64)).astype(np.float32)
    matrix[:, ::32] = 127
    tensors = tiny_llama_tensors | {"blk.1.attn_q.weight": matrix, "blk.1.ffn_gate.weight": np.tile(matrix, (2, 1))[:96]}
    quantized = dict.fromkeys(["blk.1.attn_q.weight", "blk.1.ffn_gate.weight"], gguf.GGMLQuantizationType.Q8_0)
    path = write_gguf(tmp_path / "m.gguf", tiny_llama_metadata, tensors, quantized=quantized)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(_convert(path, tmp_path / "hf")).state_dict()
    assert np.array_equal(loaded["model.layers.1.mlp.gate_proj.weight"].float().numpy(), tensors["blk.1.ffn_gate.weight"])
    query = loaded["model.layers.1.self_attn.q_proj.weight"].float()
    assert np.array_equal(_llama_cpp_rotary_order(query, 4).numpy(), matrix)


def test_config_and_generation_config(tmp_path: Path, tiny_gguf: Path) -> None:
    directory = _convert(tiny_gguf, tmp_path / "hf")
    config = transformers.AutoConfig.from_pretrained(directory)
    assert config.rms_norm_eps == 1e-5  # the file's float32 is 9.99999974737875e-06
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert (config.head_dim, config.tie_word_embeddings, config.dtype) == (16, True, torch.bfloat16)
    generation = transformers.GenerationConfig.from_pretrained(directory)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert not generation.do_sample


def test_end_of_turn_token_ends_generation_too(tmp_path: Path, write_gguf, tiny_llama_metadata, tiny_llama_tensors) -> None:
    metadata = tiny_llama_metadata | {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 2}
    directory = _convert(write_gguf(tmp_path / "m.gguf", metadata, tiny_llama_tensors), tmp_path / "hf")
    assert transformers.GenerationConfig.from_pretrained(directory).eos_token_id == [0, 2]


def test_llama3_rope_factors_become_rope_scaling(tmp_path: Path, write_gguf, tiny_llama_metadata, tiny_llama_tensors) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(8) / 8)
    tensors = tiny_llama_tensors | {"rope_freqs.weight": (plain / scaled).numpy()}
    metadata = tiny_llama_metadata | {"llama.rope.freq_base": 500000.0}
    directory = _convert(write_gguf(tmp_path / "m.gguf", metadata, tensors), tmp_path / "hf")
    assert transformers.AutoConfig.from_pretrained(directory).rope_parameters == scaling

    tensors["rope_freqs.weight"][3] *= 1.5
    with pytest.raises(ModelLoadError, match="rotary frequencies in an unknown way"):
        plan_conversion(write_gguf(tmp_path / "odd.gguf", metadata, tensors), progress=no_progress)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' cannot be converted .these can: llama, qwen2"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn'"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window = 64"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count = 8"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"llama.attention.head_count_kv = \[2, 1\]"),
        ({"llama.context_length": None}, "does not say llama.context_length"),
        ({"split.count": 2}, "one of 2 parts"),
        ({"tokenizer.ggml.pre": "new-rule"}, "splits text by the rule 'new-rule'"),
        ({"tokenizer.ggml.model": "bert"}, "of kind 'bert'"),
        ({"tokenizer.ggml.merges": None}, "not a whole GGUF file"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_metadata_that_cannot_be_converted(
    change: dict[str, Any], message: str, tmp_path: Path, write_gguf, tiny_llama_metadata, tiny_llama_tensors
) -> None:
    metadata = {key: value for key, value in (tiny_llama_metadata | change).items() if value is not None}
    architecture = metadata.pop("general.architecture", "llama")
    path = write_gguf(tmp_path / "m.gguf", metadata, tiny_llama_tensors, architecture=architecture)
    with pytest.raises(ModelLoadError, match=message) as caught:
        plan_conversion(path, progress=no_progress)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.0.attn_q.lora": np.zeros((2, 2), np.float32)}, r"a tensor 'blk\.0\.attn_q\.lora'"),
        ({"blk.2.attn_norm.weight": np.zeros(64, np.float32)}, r"a tensor 'blk\.2\.attn_norm\.weight'"),
        ({"blk.1.ffn_up.weight": None}, r"lacks the tensors blk\.1\.ffn_up\.weight"),
        ({"output_norm.weight": None}, r"lacks the tensors model\.norm\.weight"),
    ],
)
def test_unknown_and_missing_tensors(
    change: dict[str, Any], message: str, tmp_path: Path, write_gguf, tiny_llama_metadata, tiny_llama_tensors
) -> None:
    tensors = {name: tensor for name, tensor in (tiny_llama_tensors | change).items() if tensor is not None}
    with pytest.raises(ModelLoadError, match=message):
        plan_conversion(write_gguf(tmp_path / "m.gguf", tiny_llama_metadata, tensors), progress=no_progress)


def test_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    generator = np.random.default_rng(2)
    for end in [0, 3, 8, 20, 24, *generator.integers(24, len(whole) - 1, size=30), len(whole) - 4]:
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:end])
        with pytest.raises(ModelLoadError, match="not a whole GGUF file"):
            plan_conversion(path, progress=no_progress)


def test_progress_counts_every_tensor(tmp_path: Path, tiny_gguf: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    record: Callable[..., None] = lambda phase, done, total, *, unit: steps.append((phase, done, total))  # noqa: E731
    conversion = plan_conversion(tiny_gguf, progress=record)
    (tmp_path / "hf").mkdir()
    conversion.write(tmp_path / "hf", progress=record)
    assert [done for phase, done, _ in steps if phase == "Converting tensors"] == list(range(21))
    written = sum(path.stat().st_size for path in (tmp_path / "hf").iterdir())
    assert written < conversion.required_bytes


@pytest.mark.slow
def test_pulled_model_answers_with_untouched_transformers() -> None:
    """The embedded model as `make` sets it up."""
    from pilotfish.models.embedded import EMBEDDED_MODELS

    model = EMBEDDED_MODELS["smollm2-135m"]
    if model.problem is not None:
        pytest.skip(f"run `pilotfish pull {model.alias}` first: {model.problem}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.directory)
    checkpoint = transformers.AutoModelForCausalLM.from_pretrained(model.directory)
    messages = [{"role": "user", "content": "What is the capital of France? Explain gravity in one sentence."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = checkpoint.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
