from pilotfish.proto import common_pb2 as _common_pb2
from pilotfish.proto import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JournalEntry(_message.Message):
    __slots__ = ("request_id", "model", "created_unix_s", "deadline_unix_s", "choices", "text", "continues_text", "prompt_text", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CONTINUES_TEXT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TEXT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    created_unix_s: int
    deadline_unix_s: float
    choices: _containers.RepeatedCompositeFieldContainer[_worker_pb2.Submit]
    text: _common_pb2.SamplingParams
    continues_text: bool
    prompt_text: str
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., created_unix_s: _Optional[int] = ..., deadline_unix_s: _Optional[float] = ..., choices: _Optional[_Iterable[_Union[_worker_pb2.Submit, _Mapping]]] = ..., text: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., continues_text: _Optional[bool] = ..., prompt_text: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...
