"""Values that cross parts on a request's way: what an engine is asked, and what each of its steps answers.

Text lives outside the engine: everything here is in tokens. Offsets are absolute positions in a request's output, so that a
reader can drop what it has seen and notice what it has missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from .tenants import ANONYMOUS, Tenant


class FinishReason(StrEnum):
    """Why a sequence ended. STOP: an end token or stop string; LENGTH: max_tokens or the model's context."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSampling:
    """Sampling in token terms, with nothing left to default: what the engine obeys. See `SamplingParams` for meanings."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    end_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int
    seed: int
    logprobs: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """One sequence to run.

    `output_token_ids` are tokens generated elsewhere (a replica that was lost): they are known, count towards
    max_tokens, penalties and random positions, and are not reported again. `deadline_ms` is the time left when the request is
    handed over. A higher `priority` is served first. `salt` separates prefix caches (model version, adapter, tenant). Of the
    sequences that may give way to others, those of the tenant go first that holds most of the cache for its weight.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: TokenSampling
    output_token_ids: tuple[int, ...] = ()
    priority: int = 0
    deadline_ms: float | None = None
    salt: bytes = b""
    tenant: Tenant = ANONYMOUS


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability (natural) of a produced token, its rank (1 = likeliest) and the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True, slots=True)  # one a token, and a frozen one takes three times as long to make
class SequenceOutput:
    """What one step produced for one sequence; `offset` is the output position of `token_ids[0]`.

    `cached_tokens` are prompt tokens that a prefix hit saved, set on the first output. `error` explains ERROR.
    """

    request_id: str
    offset: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class BlockStored:
    """A full block became matchable in the prefix cache."""

    block_hash: bytes
    parent_hash: bytes


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """A block left the prefix cache."""

    block_hash: bytes


KvEvent = BlockStored | BlockRemoved


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimings:
    """Where a step's time went, in milliseconds of wall clock.

    Attributes:
        plan_ms: may have passed while the step before it ran.
        total_ms: from the start of its planning, or from the end of the step before it where that is later: the times of steps
            add up to the time in which there was any.
    """

    plan_ms: float = 0.0
    forward_ms: float = 0.0
    sample_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertBalance:
    """How evenly ranks that may move experts are loaded: a balance is the fullest rank's tokens over the mean's, at best 1.

    Attributes:
        measured: by the last reading of the loads; 0 before the first.
        expected: after the last round of moves, by the loads that led to it.
        num_moves: experts written into a slot since the engine's start.
        last_step_id: the step that ended the last round; 0 before the first.
    """

    measured: float = 0.0
    expected: float = 0.0
    num_moves: int = 0
    last_step_id: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLoad:
    """How full an engine is after a step. Block counts: free + cached + used = total.

    `expert_balance` is None where experts do not move.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_used_blocks: int = 0
    queued_tokens: int = 0
    num_preemptions: int = 0
    expert_balance: ExpertBalance | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """One step's message: all sequences' new tokens, cache changes, timings.

    `kv_events[i]` has the id `first_event_id + i`; ids grow by one without gaps for the life of an engine.
    """

    step_id: int
    sequences: tuple[SequenceOutput, ...] = ()
    first_event_id: int = 0
    kv_events: tuple[KvEvent, ...] = ()
    num_batched_tokens: int = 0
    timings: StepTimings = StepTimings()
    load: EngineLoad = EngineLoad()


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerInfo:
    """Facts a worker found at start: what it serves and how much fits. `kernels` maps device kind to backend.

    Of several ranks that compute one model together, parameters and bytes are those of the first.
    """

    model_name: str
    model_path: str
    architecture: str
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_parameters: int
    weight_bytes: int
    kv_cache_bytes: int
    load_seconds: float
    kernels: Mapping[str, str] = field(default_factory=dict)
    epoch: int = 0
    pid: int = 0
    model_version: str = ""
    num_ranks: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingWorker:
    """A worker that serves: its gRPC address, the node it is on, its facts, and which of the replica's ranks it is."""

    address: str
    node: str
    info: WorkerInfo
    rank: int = 0
