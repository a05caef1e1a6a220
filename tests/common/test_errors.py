import grpc
from pilotfish.common import errors


def test_every_class_is_in_the_table_once_and_survives_the_wire() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.PilotfishError)]
    assert {row.error for row in errors.STATUS_TABLE} == {c for c in classes if c is not errors.PilotfishError}
    for row in errors.STATUS_TABLE:
        error = errors.error_from_code(row.error.code, "why", retry_after_s=2.0)
        assert type(error) is row.error
        assert (error.message, error.retry_after_s) == ("why", 2.0)
        assert errors.status_row(error) is row
        assert hasattr(grpc.StatusCode, row.grpc)


def test_a_code_of_a_newer_peer_is_an_internal_error_that_names_it() -> None:
    error = errors.error_from_code("quota", "no")
    assert type(error) is errors.InternalError
    assert "quota" in error.message
