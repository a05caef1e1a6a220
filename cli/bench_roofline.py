"""The least time that a model's shape needs on a machine, from what must be read and computed. Arithmetic only.

A decode step reads every weight it touches once and the keys and values of every sequence, so it takes at least

    max(weight bytes / bandwidth, FLOP of the matrix products / FLOP rate) + KV bytes at the mean length / bandwidth.

Under random routing, a step of B tokens is expected to touch E * (1 - (1 - k / E)^B) of a layer's E experts, k for each token.
The input embedding is not counted: a step reads one row of it for each token.

Of several ranks each has its even share of all of that (but at least one kv head, and the whole router), and the machine is one
rank's device. What they tell each other is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..models.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a device was measured to reach."""

    read_bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """The limits of one shape on one machine.

    Attributes:
        weight_bytes, kv_bytes: of one element of a weight matrix and of the KV cache.
        num_ranks: devices that share the work, of one data rank.
        num_data_ranks: each has its part of the sequences; all devices share the experts.
    """

    shape: ModelShape
    machine: Machine
    weight_bytes: float
    kv_bytes: float
    num_ranks: int = 1
    num_data_ranks: int = 1

    def experts_touched(self, num_tokens: int) -> float:
        """Expected number of distinct experts of one layer in a step of so many tokens; 0 for a dense model."""
        moe = self.shape.moe
        return 0.0 if moe is None else moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** num_tokens)

    def decode_step_s(self, batch: int, *, context: float) -> float:
        """One step of `batch` sequences that see `context` tokens each."""
        layers_read = self._layer_weights(self.experts_touched(batch))
        batch_here = batch / self.num_data_ranks
        flop = 2 * batch_here * (self._token_weights + self._head_weights)
        kv_read = batch_here * self._kv_elements(context) * self.kv_bytes
        read_s = (layers_read + self._head_weights) * self.weight_bytes / self.machine.read_bytes_per_s
        return max(read_s, flop / self.machine.flop_per_s) + kv_read / self.machine.read_bytes_per_s

    def prefill_s(self, num_sequences: int, *, length: int) -> float:
        """The first token of so many sequences of `length` prompt tokens: matrix products and causal attention."""
        num_tokens = num_sequences / self.num_data_ranks * length
        layers_flop = 2 * num_tokens * self._token_weights
        head_flop = 2 * num_sequences / self.num_data_ranks * self._head_weights
        # A score and a weighted sum, two FLOP each, for every head, dimension and pair of positions.
        num_heads = self.shape.num_heads / self.num_ranks
        attention_flop = num_tokens * 4 * num_heads * self.shape.head_dim * self._seen_tokens((length + 1) / 2)
        experts = self.experts_touched(num_sequences * length)
        read = (self._layer_weights(experts) + self._head_weights) * self.weight_bytes
        flop_s = (layers_flop + head_flop + attention_flop) / self.machine.flop_per_s
        return max(flop_s, read / self.machine.read_bytes_per_s)

    def run_s(self, num_sequences: int, *, input_len: int, output_len: int, concurrency: int) -> float:
        """A whole workload, decoding `concurrency` sequences a step; prefill gives each its first token."""
        batch = min(concurrency, num_sequences)
        step_s = self.decode_step_s(batch, context=input_len + output_len / 2)
        return self.prefill_s(num_sequences, length=input_len) + step_s * num_sequences * (output_len - 1) / batch

    @property
    def _token_weights(self) -> float:
        """Elements of the layers that one device multiplies for one of its own tokens, or as many for others' tokens."""
        top_k = 0.0 if self.shape.moe is None else float(self.shape.moe.top_k)
        return self._layer_weights(top_k * self.num_data_ranks)

    @property
    def _head_weights(self) -> float:
        return self.shape.vocab_size * self.shape.hidden_size / self.num_ranks

    @property
    def _num_kv_heads(self) -> float:
        return max(1, self.shape.num_kv_heads / self.num_ranks)

    def _layer_weights(self, num_experts: float) -> float:
        """Elements of one rank's matrices of all layers, with so many experts of the whole model in each sparse one."""
        shape, moe, num_ranks = self.shape, self.shape.moe, self.num_ranks
        heads = 2 * shape.num_heads / num_ranks + 2 * self._num_kv_heads  # q and output, k and v
        attention = shape.num_layers * shape.hidden_size * heads * shape.head_dim
        dense_mlp = 3 * shape.hidden_size * shape.intermediate_size / num_ranks
        if moe is None:
            return attention + shape.num_layers * dense_mlp
        experts_here = num_experts / (num_ranks * self.num_data_ranks)
        sparse = shape.hidden_size * (moe.num_experts + 3 * moe.intermediate_size * experts_here)
        return attention + (shape.num_layers - len(moe.layers)) * dense_mlp + len(moe.layers) * sparse

    def _kv_elements(self, context: float) -> float:
        return 2 * self._num_kv_heads * self.shape.head_dim * self._seen_tokens(context)

    def _seen_tokens(self, context: float) -> float:
        """Tokens that attention looks at, summed over the layers."""
        return sum(context if window is None else min(window, context) for window in self.shape.windows)
