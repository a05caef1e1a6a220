"""Which call comes next for a request for text: its first one, or a Resume behind what has arrived."""

from __future__ import annotations

import uuid

from ..common.errors import RequestNotFound
from ..proto import inference_pb2 as pb
from .results import CompletionBuilder


class Continuation:
    """Begins with the request, which gets a name where it has none, and is marked resumable.

    Attributes:
        request_id: the request's.
        is_resuming: the next call, or the one that runs, is a Resume.
    """

    def __init__(self, method: str, request: pb.GenerateRequest | pb.ChatRequest, builder: CompletionBuilder) -> None:
        self._method = method
        self._builder = builder
        self._request = type(request)()
        self._request.CopyFrom(request)  # type: ignore[arg-type]
        self._request.request_id = request.request_id or f"sdk-{uuid.uuid4().hex}"
        self._request.resumable = True
        self.is_resuming = False

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def has_begun(self) -> bool:
        """The server has taken the request."""
        return bool(self._builder.request_id)

    def next(self) -> tuple[str, pb.GenerateRequest | pb.ChatRequest | pb.ResumeRequest]:
        """The method's name and its message."""
        if not self.is_resuming:
            return self._method, self._request
        return "Resume", pb.ResumeRequest(request_id=self.request_id, choices=self._builder.received())

    def can_begin_anew(self, error: Exception) -> bool:
        """The server does not know the request, and nothing of an answer was handed out."""
        return self.is_resuming and isinstance(error, RequestNotFound) and not self._builder.has_delta
