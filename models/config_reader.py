"""Reads a checkpoint's config.json through transformers, and keeps account of which fields were understood.

A field that changes the result and that nobody read is an error, never ignored: `check_all_read` compares every field that the
config's class declares with what was read while the model's shape was made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..common.errors import ModelLoadError
from .config_fields import read_fields, transformers_version

# Declared by the config classes, without effect on what inference computes.
_WITHOUT_EFFECT = frozenset(
    {
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "initializer_range",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "use_cache",
        # The config classes fold these into sliding_window and layer_types.
        "max_window_layers",
        "use_sliding_window",
    }
)


def read_architecture(path: Path) -> str:
    """The architecture that `path`/config.json names.

    Raises:
        ModelLoadError: no config.json, not JSON, or no architecture in it.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"{file}: {error.strerror}; a model directory needs its config.json") from error
    except ValueError as error:
        raise ModelLoadError(f"{file} is not valid JSON ({error}); download it again") from error
    architectures = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise ModelLoadError(f'{file} must name one architecture, such as "architectures": ["LlamaForCausalLM"]')
    return architectures[0]


class ConfigReader:
    """The config of one checkpoint directory. Remote code is never run."""

    def __init__(self, path: Path) -> None:
        self.file = path / "config.json"
        try:
            self._fields = read_fields(self.file)
        # transformers raises classes of its own and of its libraries.
        except Exception as error:
            raise ModelLoadError(f"{self.file}: transformers {transformers_version()} refuses it: {error}") from error
        self._read: set[str] = set()
        quantization = self.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            raise self.error(f"quantized checkpoints ({method}) are not supported: use the unquantized one")
        if self.get("is_heterogeneous"):
            raise self.error("per_layer_config is not supported")

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value; `default` where it is absent or null."""
        self._read.add(name)
        value = self._fields.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A field that must be a positive whole number."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{name} must be a positive whole number, not {value!r}")
        return value

    def error(self, message: str) -> ModelLoadError:
        return ModelLoadError(f"{self.file}: {message}")

    def check_all_read(self) -> None:
        """ModelLoadError that names declared fields which were not read and do not have their default value."""
        for name in self._fields.changed:
            if name not in _WITHOUT_EFFECT | self._read:
                value = self._fields.values[name]
                raise self.error(f"{name} = {value!r} is not supported by this architecture's family file")
