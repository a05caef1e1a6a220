import pytest
from pilotfish.client import Client, RetryPolicy, TlsOptions
from pilotfish.client.attempts import Attempts
from pilotfish.client.doors import Doors
from pilotfish.client.options import ChannelOptions, parse_address
from pilotfish.common.errors import ConfigError, InternalError, InvalidRequest, Overloaded, Unavailable

UNAVAILABLE = Unavailable("x")


def delay(policy, error=UNAVAILABLE, *, num_attempts=1, remaining_s=None, random_unit=0.0):
    return policy.delay_s(error, num_attempts=num_attempts, remaining_s=remaining_s, random_unit=random_unit)


def test_waits_grow_up_to_their_bound():
    policy = RetryPolicy(max_attempts=9, initial_backoff_s=0.5, multiplier=3, max_backoff_s=10, jitter=False)
    assert [delay(policy, num_attempts=k) for k in (1, 2, 3, 4, 8)] == [0.5, 1.5, 4.5, 10, 10]
    assert delay(policy, num_attempts=9) is None


def test_jitter_shortens_by_up_to_a_half():
    policy = RetryPolicy(initial_backoff_s=1.0)
    assert [delay(policy, random_unit=unit) for unit in (0.0, 0.5, 1.0)] == [1.0, 0.75, 0.5]


def test_retry_after_is_the_least_wait():
    policy = RetryPolicy(initial_backoff_s=0.1, jitter=False)
    assert delay(policy, Overloaded("x", retry_after_s=7)) == 7
    assert delay(policy, Overloaded("x", retry_after_s=0.01)) == 0.1
    assert delay(policy, Overloaded("x", retry_after_s=7), remaining_s=6) is None


def test_what_is_worth_another_attempt():
    assert delay(RetryPolicy(), InternalError("x")) is None
    assert delay(RetryPolicy(retry_on=(InternalError,), jitter=False), InternalError("x")) == 0.1
    assert delay(RetryPolicy(max_attempts=1)) is None


@pytest.mark.parametrize("wrong", [{"max_attempts": 0}, {"initial_backoff_s": -1}, {"multiplier": 0.5}, {"max_backoff_s": -1}])
def test_wrong_policies(wrong):
    with pytest.raises(ConfigError, match="RetryPolicy"):
        RetryPolicy(**wrong)


@pytest.mark.parametrize(
    ("address", "parsed"),
    [("host:1", "host:1"), ("10.0.0.7", "10.0.0.7:50051"), ("[::1]:80", "[::1]:80"), ("a-b.c", "a-b.c:50051")],
)
def test_addresses(address, parsed):
    assert parse_address(address) == parsed


@pytest.mark.parametrize(
    "address", ["", "http://host:8000", "host:0", "host:65536", "host:", "a b", "::1", "host:port", "a:1:2"]
)
def test_wrong_addresses(address):
    with pytest.raises(ConfigError, match="must be host:port"):
        Client(address)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine():
    options = ChannelOptions()
    for address, expected in (
        ("127.0.0.1:1", 0),
        ("localhost:1", 0),
        ("[::1]:1", 0),
        ("10.0.0.7:1", None),
        ("gpu.lan:1", None),
    ):
        assert dict(options.arguments(address=address, tls=None)).get("grpc.enable_http_proxy") == expected


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_wrong_timeouts(timeout_s):
    with pytest.raises(InvalidRequest, match="timeout_s must be a positive number"):
        Attempts(doors=Doors.parse("x"), policy=RetryPolicy(), timeout_s=timeout_s, is_closed=bool)


def test_tls_files_and_tokens_are_checked_at_once(tmp_path):
    with pytest.raises(ConfigError, match="both cert and key"):
        TlsOptions(cert="a.pem")
    with pytest.raises(ConfigError, match=r"cannot read the TLS file .*ca\.pem: No such file"):
        Client(tls=TlsOptions(ca=tmp_path / "ca.pem"))
    with pytest.raises(ConfigError, match="printable ASCII"):
        Client(api_key="a\nb")
