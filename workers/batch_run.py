"""A list of prompts on its way through an engine: started as there is room, completed in any order, returned in their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..common.errors import PilotfishError
from ..common.requests import SequenceOutput
from ..text.prepare import PreparedRequest
from .completion import Completion, CompletionBuilder
from .engine_calls import EngineCall


class BatchRun:
    """Runs prompts 0 to `num_prompts` - 1 once.

    Args:
        prepare: makes a prompt ready, by its number; a PilotfishError that it raises is that prompt's own.
        max_running: no further prompt is started while this many requests run.
        on_completed: called after each prompt.
    """

    def __init__(
        self,
        call: EngineCall,
        *,
        num_prompts: int,
        prepare: Callable[[int], tuple[PreparedRequest, CompletionBuilder]],
        max_running: int,
        on_completed: Callable[[], object],
    ) -> None:
        self._call = call
        self._prepare = prepare
        self._max_running = max_running
        self._on_completed = on_completed
        self._completions: list[Completion | None] = [None] * num_prompts
        self._next_number = 0
        self._builders: dict[int, CompletionBuilder] = {}
        self._owners: dict[str, tuple[int, int]] = {}  # request id -> number of its prompt, of its choice

    def run(self) -> Sequence[Completion]:
        """The completions in the order of the prompts. If the engine fails, those not yet complete have that error."""
        self._start_prompts()
        while self._builders:
            try:
                outputs = self._call.wait()
            except PilotfishError as error:
                return [completion or Completion(error=error) for completion in self._completions]
            for output in outputs:
                self._take(output)
            self._start_prompts()
        return [completion for completion in self._completions if completion is not None]

    def _start_prompts(self) -> None:
        while self._next_number < len(self._completions) and self._call.num_running < self._max_running:
            number = self._next_number
            self._next_number += 1
            try:
                prepared, builder = self._prepare(number)
                for index, request in enumerate(prepared.sequences):
                    self._call.submit(request)
                    self._owners[request.request_id] = (number, index)
            except PilotfishError as error:
                self._complete(number, Completion(error=error))
            else:
                self._builders[number] = builder

    def _take(self, output: SequenceOutput) -> None:
        number, index = self._owners[output.request_id]
        builder = self._builders.get(number)
        if builder is None:
            return  # the rest of a choice that a stop string ended
        builder.add(index, output)
        if builder.should_abort(index):
            self._call.abort(output.request_id)
        if builder.is_complete:
            del self._builders[number]
            self._complete(number, builder.build())

    def _complete(self, number: int, completion: Completion) -> None:
        self._completions[number] = completion
        self._on_completed()
