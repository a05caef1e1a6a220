"""The serving configuration: one frozen section a part, parsed from TOML or flags, never changed afterwards.

Facts found on a machine (sizes that fit, the dtype in use) are not written back: they come in `WorkerInfo`.
"""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from .api_keys import KeyRing, check_hash_line
from .errors import ConfigError
from .tenants import ANONYMOUS_NAME

T = TypeVar("T")

DEFAULT_KV_MEMORY_FRACTION = {"cuda": 0.9, "cpu": 0.5}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model, and how its checkpoint is read.

    Attributes:
        model: a local directory, a Hub id, a .gguf file or an alias.
        served_name: the name clients use; default is `model` as given.
        model_version: what these weights are called; what prefix caches hold is of one version.
        dtype: of the computation; auto is float32 on a CPU (weights stay as stored) and the checkpoint's own on a GPU.
        max_model_len: most tokens in one sequence; None is the model's own limit.
        generation_config: whose sampling defaults apply where a request is silent: "openai" or the checkpoint's ("model").
    """

    model: str
    served_name: str | None = None
    model_version: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None
    generation_config: Literal["openai", "model"] = "openai"

    @property
    def name(self) -> str:
        return self.served_name or self.model


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """One worker's engine.

    Attributes:
        device: auto takes a GPU where there is one.
        block_size: tokens in a KV block, a power of two from 16.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: token budget of one step; None is 2048 on a GPU and 512 on a CPU, where a step of more would
            keep running requests waiting for seconds (or max_num_seqs, where that is more).
        kv_memory_fraction: share of the memory measured free after the profiling run that the KV cache takes; None is 0.9 of a
            GPU's and 0.5 of a CPU's, which is not the worker's alone.
        num_kv_blocks: an exact number of blocks instead of the measured one.
        cuda_graphs: replay steps on a GPU as CUDA graphs; off saves recording them at the start, and their memory.
        prefix_caching: reuse KV blocks between requests with equal prefixes.
        num_threads: CPU threads of the computation; None is all cores that the process may use.
        stall_timeout_s: a step longer than this makes the worker unhealthy.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    kv_memory_fraction: float | None = None
    num_kv_blocks: int | None = None
    prefix_caching: bool = True
    cuda_graphs: bool = True
    num_threads: int | None = None
    stall_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two from 16, not {self.block_size}")
        _require(self, "max_num_seqs", 1)
        if self.max_num_batched_tokens is not None:
            _require(self, "max_num_batched_tokens", self.max_num_seqs)
        if self.kv_memory_fraction is not None and not 0 < self.kv_memory_fraction <= 1:
            raise ConfigError(f"kv_memory_fraction must be in (0, 1], not {self.kv_memory_fraction}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """The doors: gRPC and HTTP.

    Attributes:
        host: address both listen on.
        grpc_port, http_port: 0 takes a free port, which `status` and the start message show.
        max_queued_requests: while so many choices of requests wait for a replica, others are refused at once with OVERLOADED.
        max_body_bytes: larger requests are refused with REQUEST_TOO_LARGE.
        max_connections: to each of the two; over HTTP one that only waits gives way to a new one.
        client_timeout_s: how long a client may take to send a request once it has begun, or to take some of what is sent to it.
        default_timeout_s: deadline of a request that brings none.
        isolate_cache: every tenant's prompts meet only its own in the prefix caches; else those of tenants that ask for it.
        resume_window_s: how long a resumable request (the SDK's are) runs on while its client is away, and its end is kept.
        num_gateways: processes that have the doors, with tokenizer and text, all at the same ports (each at its own, where a
            port is 0); 0: the controller's process has the doors.
        link_port: where the controller listens for its gateways; 0 takes a free port.
    """

    host: str = "127.0.0.1"
    grpc_port: int = 50051
    http_port: int = 8000
    max_queued_requests: int = 1024
    max_body_bytes: int = 4 * 1024 * 1024
    max_connections: int = 4096
    client_timeout_s: float = 30.0
    default_timeout_s: float = 600.0
    isolate_cache: bool = False
    resume_window_s: float = 15.0
    num_gateways: int = 0
    link_port: int = 0

    def __post_init__(self) -> None:
        for name in ("grpc_port", "http_port", "link_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name} must be in [0, 65535], not {getattr(self, name)}")
        _require(self, "max_queued_requests", 1)
        _require(self, "num_gateways", 0)
        _require(self, "max_body_bytes", 1024)
        _require(self, "max_connections", 1)
        for name in ("client_timeout_s", "resume_window_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """The replicas and how they are watched.

    Attributes:
        num_replicas: copies of the model, at the start where min_replicas or max_replicas let their number change.
        min_replicas, max_replicas: the number follows the load between these; None is num_replicas. With min_replicas 0 the
            last one goes too when nothing was asked for, and the next request waits until one has started.
        target_wait_s: replicas are added while a request waits longer than this before its prompt is computed.
        shrink_after_s: a replica is removed when one fewer would have been enough for so long.
        idle_timeout_s: without any request for so long the last replica goes, where min_replicas is 0.
        drain_timeout_s: streams of a replica that is to go may end there for so long, then they go on on others.
        start_timeout_s: a worker that is not ready by then is reported and ended.
        heartbeat_timeout_s: a replica silent for longer is treated as lost.
        max_attempts: a request ends with an error that was on so many replicas when they died, without progress between; on
            up to twice as many where others died without it meanwhile.
        max_restarts: restarts of one replica in a row without a completed step before the fleet gives it up.
    """

    num_replicas: int = 1
    min_replicas: int | None = None
    max_replicas: int | None = None
    target_wait_s: float = 1.0
    shrink_after_s: float = 120.0
    idle_timeout_s: float = 300.0
    drain_timeout_s: float = 30.0
    start_timeout_s: float = 600.0
    heartbeat_timeout_s: float = 10.0
    max_attempts: int = 3
    max_restarts: int = 3

    def __post_init__(self) -> None:
        for name in ("num_replicas", "max_attempts"):
            _require(self, name, 1)
        if self.min_replicas is not None and self.min_replicas > self.most:
            raise ConfigError(f"min_replicas ({self.min_replicas}) is more than max_replicas ({self.most}): change one of them")
        if not 0 <= self.fewest <= self.num_replicas <= self.most:
            raise ConfigError(
                f"num_replicas must lie between min_replicas and max_replicas, but {self.num_replicas} is not in "
                f"[{self.fewest}, {self.most}]"
            )
        for name in ("target_wait_s", "shrink_after_s", "idle_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        _require(self, "drain_timeout_s", 0)

    @property
    def fewest(self) -> int:
        return self.num_replicas if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        return self.num_replicas if self.max_replicas is None else self.max_replicas

    @property
    def is_elastic(self) -> bool:
        return self.fewest < self.most


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How many workers compute one replica together.

    Attributes:
        tensor_parallel: ranks that share every layer of a replica, a GPU each (or a process on CPUs).
        data_parallel: that many times as many ranks make a replica, in groups of tensor_parallel. Each group has requests and a
            KV cache of its own; they share nothing but the experts of sparse layers. Needs expert_parallel.
        expert_parallel: each rank keeps whole experts of sparse layers, not a slice of each of them.
        redundant_experts: slots of each sparse layer for second copies of the experts that get the most tokens.
        rebalance_interval_steps: after so many steps experts are moved and copied by the tokens they got, if that evens out the
            ranks; 0 is never. 3000 is a good value for traffic that drifts.
        cpus_per_rank: CPUs that Ray sets aside for each rank on its node. Where ranks have no GPU, Ray can know by this alone
            how many go on a node, and that one more node is needed.
        placement: of a replica's ranks: pack puts them on as few nodes as they fit, spread on as many as there are. Of several
            data ranks each has its tensor ranks on one node, if one is large enough.
        collective_timeout_s: a collective that takes longer ends the replica, whose requests go on elsewhere. While ranks load
            and compile, one may take longer than another: then the limit is that of the start.
    """

    tensor_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False
    redundant_experts: int = 0
    rebalance_interval_steps: int = 0
    cpus_per_rank: float = 0.0
    placement: Literal["pack", "spread"] = "pack"
    collective_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "data_parallel"):
            _require(self, name, 1)
        for name in ("redundant_experts", "rebalance_interval_steps"):
            _require(self, name, 0)
        if self.expert_parallel and self.num_ranks == 1:
            raise ConfigError(
                "expert_parallel needs tensor_parallel or data_parallel of 2 or more: one rank keeps all experts anyway"
            )
        if self.data_parallel > 1 and not self.expert_parallel:
            raise ConfigError(
                "data_parallel needs expert_parallel, for its ranks share nothing but the experts of sparse layers: set it, or "
                "use num_replicas for whole copies of a model"
            )
        if self.redundant_experts and not self.rebalance_interval_steps:
            raise ConfigError("redundant_experts needs rebalance_interval_steps, 3000 for instance: what to copy is measured")
        if self.rebalance_interval_steps and not self.expert_parallel:
            raise ConfigError("rebalance_interval_steps needs expert_parallel: without it every rank has a part of each expert")
        if not 0 <= self.cpus_per_rank < 1e4:
            raise ConfigError(f"cpus_per_rank must be from 0 up, not {self.cpus_per_rank}")
        if not self.collective_timeout_s > 0:
            raise ConfigError(f"collective_timeout_s must be above 0, not {self.collective_timeout_s}")

    @property
    def num_ranks(self) -> int:
        """Of a replica."""
        return self.tensor_parallel * self.data_parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What the controller and its workers log, on their standard error.

    Attributes:
        log_level: from which level on; auto is PILOTFISH_LOG_LEVEL's, else info.
        log_format: text for people, json for a log store, an object a line; auto is PILOTFISH_LOG_FORMAT's, else text.
    """

    log_level: Literal["auto", "debug", "info", "warning", "error"] = "auto"
    log_format: Literal["auto", "text", "json"] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantConfig:
    """One who shares the cluster with others; the section's name is the tenant's.

    Attributes:
        keys: hashes of its API keys, as `pilotfish keys new NAME` prints them. Only the tenant `anonymous` has none.
        weight: its part of the cluster while others want it too.
        max_requests: requests in flight at a time; None is no limit.
        max_tokens_per_minute: prompt and output tokens; None is no limit.
        operator: its keys also open what concerns the whole cluster: status, metrics, the live page, every request's route.
        isolate_cache: its prompts meet only its own in the prefix caches, so that no timing tells who else sent one.
    """

    keys: tuple[str, ...] = ()
    weight: float = 1.0
    max_requests: int | None = None
    max_tokens_per_minute: int | None = None
    operator: bool = False
    isolate_cache: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1e6:
            raise ConfigError(f"weight must be above 0 and below a million, not {self.weight}")
        for name in ("max_requests", "max_tokens_per_minute"):
            if getattr(self, name) is not None:
                _require(self, name, 1)
        for line in self.keys:
            check_hash_line(line)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Everything `pilotfish serve` needs, a section a part."""

    model: ModelConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    log: LogConfig = field(default_factory=LogConfig)
    tenants: Mapping[str, TenantConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        KeyRing({name: tenant.keys for name, tenant in self.tenants.items()})  # raises for a key given twice
        for name, tenant in self.tenants.items():
            if name == ANONYMOUS_NAME:
                if tenant.keys or len(self.tenants) > 1:
                    raise ConfigError(
                        f"tenants.{name} is who comes without a key, which is allowed only where no tenant has one: remove its "
                        "section, or all others"
                    )
            elif not tenant.keys:
                raise ConfigError(f"tenants.{name} has no keys, so nobody could be it: `pilotfish keys new {name}` makes one")


def load_toml(path: str | Path) -> dict[str, Any]:
    """The sections of a TOML file.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def parse(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """A config dataclass from nested mappings.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing one, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else name
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"unknown key {path!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
            )
        hint = hints[name]
        if is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path} must be a section, not {value!r}")
            arguments[name] = parse(typing.cast(type[Any], hint), value, where=path)
        elif typing.get_origin(hint) is Mapping:  # sections with names of the user's
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path} must be sections [{path}.NAME], not {value!r}")
            section = typing.get_args(hint)[1]
            arguments[name] = {}
            for key, entry in value.items():
                if not isinstance(entry, Mapping):
                    raise ConfigError(f"{path}.{key} must be a section, not {entry!r}")
                arguments[name][key] = parse(section, entry, where=f"{path}.{key}")
        else:
            arguments[name] = _checked(value, hint, path)
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where or cls.__name__}: {error}".replace("__init__() ", "")) from error


def _checked(value: Any, hint: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{path} must be one of {', '.join(map(repr, typing.get_args(hint)))}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
            raise ConfigError(f"{path} must be a list of texts")
        return tuple(value)
    choices = typing.get_args(hint) if origin in (types.UnionType, typing.Union) else (hint,)
    if float in choices and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not any(isinstance(value, choice) and not (choice in (int, float) and isinstance(value, bool)) for choice in choices):
        names = " or ".join("nothing" if choice is type(None) else choice.__name__ for choice in choices)
        raise ConfigError(f"{path} must be {names}, not {value!r}")
    return value


def _require(config: object, name: str, lowest: int) -> None:
    if getattr(config, name) < lowest:
        raise ConfigError(f"{name} must be at least {lowest}, not {getattr(config, name)}")
