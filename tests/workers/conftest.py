"""A tiny random Llama with a byte tokenizer, made once a session, and helpers to run engines on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pilotfish.common.config import EngineConfig, ModelConfig
from pilotfish.common.errors import ModelNotFound
from pilotfish.common.requests import EngineRequest, FinishReason, SequenceOutput, StepOutput, TokenLogprob, TokenSampling
from pilotfish.models.store import resolve
from pilotfish.scheduler.scheduler_config import SchedulerConfig
from pilotfish.scheduler.step_scheduler import StepScheduler
from pilotfish.workers.runner_setup import set_up_runner
from pilotfish.workers.step_loop import StepLoop
from small_model import save_for_workers, save_tiny_mixtral
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
from upcycled import shorten

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Of the real model. `make test` sets it up first; only a pytest typed by hand can be without, and no test downloads."""
    try:
        return resolve("smollm2-135m", allow_download=False).path
    except ModelNotFound:
        pytest.skip("smollm2-135m is not set up: run `pilotfish pull smollm2-135m`")


@pytest.fixture(scope="session")
def short_smollm2_path(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first layers, for what a whole one would say no more of."""
    return shorten(smollm2_path, tmp_path_factory.mktemp("short") / "smollm2", num_layers=6)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A checkpoint whose logits are far apart, so that greedy text does not hang on rounding."""
    path = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(20)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=None,
    )
    save_for_workers(LlamaForCausalLM(config).to(torch.float32), path)
    _write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("tiny_mixtral"))


def _write_tokenizer(path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def request(request_id: str, prompt: list[int], *, outputs: tuple[int, ...] = (), max_tokens: int = 16, **sampling):
    """An engine request; greedy unless told otherwise."""
    settings = {"temperature": 0.0, "seed": 7, **sampling}
    beside = {name: settings.pop(name) for name in ("priority", "deadline_ms", "tenant") if name in settings}
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        output_token_ids=outputs,
        sampling=TokenSampling(max_tokens=max_tokens, **settings),
        **beside,
    )


@pytest.fixture
def make_request():
    return request


class Collector:
    """An `on_step` that joins outputs and checks what every reader relies on: steps, offsets and event ids without gaps."""

    def __init__(self) -> None:
        self.steps: list[StepOutput] = []
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprob]] = {}
        self.ended: dict[str, SequenceOutput] = {}
        self.cached_tokens: dict[str, int] = {}
        self.first_offset: dict[str, int] = {}
        self._next_event_id: int | None = None

    def __call__(self, step: StepOutput) -> None:
        assert step.step_id == len(self.steps) + 1
        assert self._next_event_id in (None, step.first_event_id)
        self._next_event_id = step.first_event_id + len(step.kv_events)
        for output in step.sequences:
            assert output.request_id not in self.ended
            tokens = self.tokens.setdefault(output.request_id, [])
            start = self.first_offset.setdefault(output.request_id, output.offset)
            assert output.offset == start + len(tokens)
            tokens += output.token_ids
            self.logprobs.setdefault(output.request_id, []).extend(output.logprobs)
            self.cached_tokens[output.request_id] = self.cached_tokens.get(output.request_id, 0) + output.cached_tokens
            if output.finish_reason is not None:
                self.ended[output.request_id] = output
        self.steps.append(step)

    def reason(self, request_id: str) -> FinishReason | None:
        return self.ended[request_id].finish_reason


@pytest.fixture
def collector():
    return Collector()


@pytest.fixture
def make_loop(tiny_llama):
    """A step loop over the tiny model or `model`, on this thread; `wrap` may replace it, and `prepare` change the runner."""

    def make(
        on_step,
        *,
        model=tiny_llama,
        dtype: str = "float32",
        max_in_flight: int = 1,
        wrap=lambda model: model,
        prepare=lambda runner: None,
        prefix_caching: bool = True,
        **options,
    ) -> StepLoop:
        config = EngineConfig(**{"device": "cpu", "num_threads": 1, "num_kv_blocks": 256, "max_num_seqs": 32, **options})
        runner, info = set_up_runner(ModelConfig(model=str(model), dtype=dtype), config)
        runner.model = wrap(runner.model)
        prepare(runner)
        scheduler = StepScheduler(
            SchedulerConfig(
                num_blocks=info.num_blocks,
                block_size=info.block_size,
                max_num_seqs=info.max_num_seqs,
                max_num_batched_tokens=info.max_num_batched_tokens,
                max_model_len=info.max_model_len,
                prefix_caching=prefix_caching,
            )
        )
        return StepLoop(runner, scheduler, on_step=on_step, max_in_flight=max_in_flight)

    return make


@pytest.fixture
def run_requests(make_loop):
    """Runs requests to their ends and returns the collector; invariants are checked after every turn."""

    def run(*requests: EngineRequest, **options) -> Collector:
        collector = Collector()
        loop = make_loop(collector, **options)
        for request in requests:
            loop.scheduler.add(request)
        while loop.has_work:
            loop.advance()
            loop.scheduler.check_invariants()
        loop.finish()
        assert set(collector.ended) == {request.request_id for request in requests}
        assert loop.scheduler.load().num_used_blocks == 0
        return collector

    return run
