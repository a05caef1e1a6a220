"""Steps that have not left go together in one message, whole and in order."""

from pilotfish.common.requests import FinishReason, SequenceOutput, StepOutput
from pilotfish.proto import worker_pb2
from pilotfish.proto.codec import step_from_proto
from pilotfish.workers import outbox
from pilotfish.workers.outbox import StepOutbox


def step(step_id: int) -> StepOutput:
    last = FinishReason.LENGTH if step_id == 5 else None
    return StepOutput(
        step_id=step_id,
        sequences=(SequenceOutput(request_id="a", offset=step_id - 1, token_ids=(10 + step_id,), finish_reason=last),),
    )


def read(data: bytes) -> list[StepOutput]:
    return list(map(step_from_proto, worker_pb2.WorkerMessage.FromString(data).steps))


def test_what_has_not_left_goes_together() -> None:
    box = StepOutbox(max_bytes=10_000)
    for step_id in range(1, 6):
        box.append(step(step_id), ("a",) if step_id == 5 else ())
    data, num_steps = box.message_from(0)
    assert (read(data), num_steps) == ([step(step_id) for step_id in range(1, 6)], 5)
    assert box.acknowledge(3) == []
    data, num_steps = box.message_from(box.first_position)
    assert (read(data), num_steps) == ([step(4), step(5)], 2)
    assert box.message_from(box.first_position + 2) == (b"", 0)
    assert box.acknowledge(5) == ["a"]
    assert box.num_bytes == 0


def test_a_message_has_a_bound_and_a_large_step_goes_alone(monkeypatch) -> None:
    box = StepOutbox(max_bytes=10_000)
    for step_id in range(1, 6):
        box.append(step(step_id), ())
    size = len(box.message_from(0)[0]) // 5
    for bound, expected in ((2 * size + 1, [2, 2, 1]), (size - 1, [1] * 5)):
        monkeypatch.setattr(outbox, "_MAX_JOINED_BYTES", bound)
        position, nums = 0, []
        while position < 5:
            nums.append(box.message_from(position)[1])
            position += nums[-1]
        assert nums == expected
