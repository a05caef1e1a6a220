from pilotfish.proto import common_pb2 as _common_pb2
from pilotfish.proto import inference_pb2 as _inference_pb2
from pilotfish.proto import journal_pb2 as _journal_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GatewayHello(_message.Message):
    __slots__ = ("name", "version", "grpc_address", "http_address", "pid")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    grpc_address: str
    http_address: str
    pid: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., grpc_address: _Optional[str] = ..., http_address: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class ChoiceSoFar(_message.Message):
    __slots__ = ("token_ids", "finish_reason", "stop_reason")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: _common_pb2.FinishReason
    stop_reason: str
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., stop_reason: _Optional[str] = ...) -> None: ...

class GatewaySubmit(_message.Message):
    __slots__ = ("number", "entry", "prompt_hashes", "timeout_s", "age_s", "resumable", "retry_key", "trace_headers", "again", "choices", "model_version", "is_more")
    class TraceHeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_HASHES_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    RESUMABLE_FIELD_NUMBER: _ClassVar[int]
    RETRY_KEY_FIELD_NUMBER: _ClassVar[int]
    TRACE_HEADERS_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    IS_MORE_FIELD_NUMBER: _ClassVar[int]
    number: int
    entry: _journal_pb2.JournalEntry
    prompt_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    timeout_s: float
    age_s: float
    resumable: bool
    retry_key: str
    trace_headers: _containers.ScalarMap[str, str]
    again: bool
    choices: _containers.RepeatedCompositeFieldContainer[ChoiceSoFar]
    model_version: str
    is_more: bool
    def __init__(self, number: _Optional[int] = ..., entry: _Optional[_Union[_journal_pb2.JournalEntry, _Mapping]] = ..., prompt_hashes: _Optional[_Iterable[bytes]] = ..., timeout_s: _Optional[float] = ..., age_s: _Optional[float] = ..., resumable: _Optional[bool] = ..., retry_key: _Optional[str] = ..., trace_headers: _Optional[_Mapping[str, str]] = ..., again: _Optional[bool] = ..., choices: _Optional[_Iterable[_Union[ChoiceSoFar, _Mapping]]] = ..., model_version: _Optional[str] = ..., is_more: _Optional[bool] = ...) -> None: ...

class GatewayResume(_message.Message):
    __slots__ = ("number", "request_id", "tenant", "choices")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    number: int
    request_id: str
    tenant: str
    choices: _containers.RepeatedCompositeFieldContainer[ChoiceSoFar]
    def __init__(self, number: _Optional[int] = ..., request_id: _Optional[str] = ..., tenant: _Optional[str] = ..., choices: _Optional[_Iterable[_Union[ChoiceSoFar, _Mapping]]] = ...) -> None: ...

class ChoiceStopped(_message.Message):
    __slots__ = ("number", "choice", "num_tokens", "stop_reason")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    number: int
    choice: int
    num_tokens: int
    stop_reason: str
    def __init__(self, number: _Optional[int] = ..., choice: _Optional[int] = ..., num_tokens: _Optional[int] = ..., stop_reason: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "retry_after_s")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    retry_after_s: float
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class StreamEnded(_message.Message):
    __slots__ = ("number", "failure", "left")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    number: int
    failure: Failure
    left: bool
    def __init__(self, number: _Optional[int] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., left: _Optional[bool] = ...) -> None: ...

class GatewayMessage(_message.Message):
    __slots__ = ("hello", "submits", "resumes", "stopped", "ended", "refused")
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    RESUMES_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    hello: GatewayHello
    submits: _containers.RepeatedCompositeFieldContainer[GatewaySubmit]
    resumes: _containers.RepeatedCompositeFieldContainer[GatewayResume]
    stopped: _containers.RepeatedCompositeFieldContainer[ChoiceStopped]
    ended: _containers.RepeatedCompositeFieldContainer[StreamEnded]
    refused: _containers.ScalarMap[str, int]
    def __init__(self, hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., submits: _Optional[_Iterable[_Union[GatewaySubmit, _Mapping]]] = ..., resumes: _Optional[_Iterable[_Union[GatewayResume, _Mapping]]] = ..., stopped: _Optional[_Iterable[_Union[ChoiceStopped, _Mapping]]] = ..., ended: _Optional[_Iterable[_Union[StreamEnded, _Mapping]]] = ..., refused: _Optional[_Mapping[str, int]] = ...) -> None: ...

class OutputColumns(_message.Message):
    __slots__ = ("numbers", "choices", "offsets", "num_tokens", "token_ids", "finish_reasons", "details")
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASONS_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    numbers: _containers.RepeatedScalarFieldContainer[int]
    choices: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reasons: _containers.RepeatedScalarFieldContainer[_common_pb2.FinishReason]
    details: _containers.RepeatedCompositeFieldContainer[OutputDetail]
    def __init__(self, numbers: _Optional[_Iterable[int]] = ..., choices: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reasons: _Optional[_Iterable[_Union[_common_pb2.FinishReason, str]]] = ..., details: _Optional[_Iterable[_Union[OutputDetail, _Mapping]]] = ...) -> None: ...

class OutputDetail(_message.Message):
    __slots__ = ("row", "logprobs", "run")
    ROW_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    row: int
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprob]
    run: ChoiceRun
    def __init__(self, row: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprob, _Mapping]]] = ..., run: _Optional[_Union[ChoiceRun, _Mapping]] = ...) -> None: ...

class ChoiceRun(_message.Message):
    __slots__ = ("replica", "num_attempts", "cached_tokens", "queue_ms")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    replica: str
    num_attempts: int
    cached_tokens: int
    queue_ms: float
    def __init__(self, replica: _Optional[str] = ..., num_attempts: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., queue_ms: _Optional[float] = ...) -> None: ...

class StreamTaken(_message.Message):
    __slots__ = ("number", "entry", "timeout_s", "age_s")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    number: int
    entry: _journal_pb2.JournalEntry
    timeout_s: float
    age_s: float
    def __init__(self, number: _Optional[int] = ..., entry: _Optional[_Union[_journal_pb2.JournalEntry, _Mapping]] = ..., timeout_s: _Optional[float] = ..., age_s: _Optional[float] = ...) -> None: ...

class GatewayLimits(_message.Message):
    __slots__ = ("max_model_len", "vocab_size", "kv_capacity_tokens")
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_model_len: int
    vocab_size: int
    kv_capacity_tokens: int
    def __init__(self, max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ...) -> None: ...

class ClusterView(_message.Message):
    __slots__ = ("status", "is_serving", "limits", "unavailable")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    IS_SERVING_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    status: _inference_pb2.ClusterStatusResponse
    is_serving: bool
    limits: GatewayLimits
    unavailable: Failure
    def __init__(self, status: _Optional[_Union[_inference_pb2.ClusterStatusResponse, _Mapping]] = ..., is_serving: _Optional[bool] = ..., limits: _Optional[_Union[GatewayLimits, _Mapping]] = ..., unavailable: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class ControllerTick(_message.Message):
    __slots__ = ("taken", "outputs", "ended", "cluster")
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    taken: _containers.RepeatedCompositeFieldContainer[StreamTaken]
    outputs: OutputColumns
    ended: _containers.RepeatedCompositeFieldContainer[StreamEnded]
    cluster: ClusterView
    def __init__(self, taken: _Optional[_Iterable[_Union[StreamTaken, _Mapping]]] = ..., outputs: _Optional[_Union[OutputColumns, _Mapping]] = ..., ended: _Optional[_Iterable[_Union[StreamEnded, _Mapping]]] = ..., cluster: _Optional[_Union[ClusterView, _Mapping]] = ...) -> None: ...

class GatewayAbortRequest(_message.Message):
    __slots__ = ("request_id", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class MetricsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MetricsResponse(_message.Message):
    __slots__ = ("content", "media_type")
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    media_type: str
    def __init__(self, content: _Optional[bytes] = ..., media_type: _Optional[str] = ...) -> None: ...
