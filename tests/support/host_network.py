"""Several hosts on one machine: Linux namespaces joined by a bridge, with an ssh server in each.

A host has its own network, process ids, host name, /tmp, /run, /dev/shm and home: what runs there finds nothing of the others
but through the network. They share this machine's cache of pilotfish, so that its C++ kernels are compiled once. A process
that leads the host's process ids holds it; when that is killed, every process of the host is, and its network goes with it. The
bridge lives in the operator's namespace (the place to run `ray up` from), so nothing is ever added to the network of the
machine itself, and all is gone when the test process is, however it ends.

Needs root and the programs of `PROGRAMS`; `why_not()` says what is missing. /tmp/shared is one directory on all hosts.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from pilotfish.kernels.cpu.library import cache_dir

PROGRAMS = {  # and the packages that have them
    **dict.fromkeys(["ip", "bridge"], "iproute2"),
    **dict.fromkeys(["unshare", "nsenter", "setpriv"], "util-linux"),
    **dict.fromkeys(["ssh", "ssh-keygen"], "openssh-client"),
    "sshd": "openssh-server",
    "rsync": "rsync",
}
SHARED = Path("/tmp/shared")
_CHECKOUT = Path(__file__).resolve().parents[2]
_CACHE = cache_dir().parent.resolve()
_OPERATOR = "operator"
_NAMESPACES = ["--net", "--mount", "--uts", "--ipc", "--pid"]
_SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_READY_TIMEOUT_S = 20.0
_END_WITH_PARENT = ["setpriv", "--pdeathsig=KILL"]

# $1: the host's directory, $2: its name, $3: the shared directory, $4: sshd, $5: this checkout, which may lie below /tmp,
# $6: the cache.
_BOOT = """
set -e
mount --bind "$3" "$1/tmp/shared"
mount --bind "$6" "$1/tmp/home/.cache/pilotfish"
case "$5" in /tmp/*) mkdir -p "$1$5"; mount --bind "$5" "$1$5" ;; esac
mount --rbind "$1/tmp" /tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
for name in passwd hosts; do mount --bind "/tmp/etc/$name" "/etc/$name"; done
hostname "$2"
ip link set lo up
touch /tmp/up
if [ "$2" = operator ]; then exec sleep infinity; fi
exec "$4" -D -e -f /tmp/etc/sshd_config 2>/tmp/sshd.log
"""


def why_not() -> str:
    """Why this machine cannot make hosts; "" if it can."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    if os.geteuid() != 0:
        return "only root makes network namespaces: run it as root"
    if missing := [name for name in PROGRAMS if _program(name) is None]:
        packages = sorted({PROGRAMS[name] for name in missing})
        return f"{', '.join(missing)} not found: apt-get install {' '.join(packages)}"
    bridge = [str(_program("ip")), "link", "add", "pf-probe", "type", "bridge"]
    probe = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", *bridge], capture_output=True, text=True, timeout=20, check=False
    )
    return f"no namespaces or bridges here: {probe.stderr.strip()}" if probe.returncode else ""


class Host:
    """One of them. `pid` leads its processes."""

    def __init__(self, name: str, address: str, directory: Path) -> None:
        self.name, self.address, self.directory = name, address, directory
        self.pid = 0
        self._holder: subprocess.Popen[str] | None = None

    def boot(self, shared: Path) -> None:
        sshd = _program("sshd") or "sshd"
        command = [*_END_WITH_PARENT, "unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        command += ["sh", "-c", _BOOT, "sh", str(self.directory), self.name, str(shared), sshd, str(_CHECKOUT), str(_CACHE)]
        log = (self.directory / "boot.log").open("w")
        self._holder = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            text=True,
            env=_environment(),
        )
        _wait(lambda: (self.directory / "tmp/up").exists() or self._holder.poll() is not None, f"{self.name} to boot")
        if self._holder.poll() is not None:
            raise RuntimeError(f"{self.name} did not boot: {(self.directory / 'boot.log').read_text()}")
        self.pid = int(Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()[0])

    def command(self, *words: str) -> list[str]:
        """The command, to be run inside."""
        return ["nsenter", f"--target={self.pid}", *_NAMESPACES, "--wd=/tmp", *_END_WITH_PARENT, *words]

    def popen(self, *words: str, **options: object) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command(*words), text=True, env=_environment() | {"HOME": "/tmp/home"}, **options)

    def run(self, *words: str, timeout_s: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs to its end inside; stdout and stderr are joined.

        Raises:
            AssertionError: it failed, with what it said.
        """
        done = subprocess.run(
            self.command("timeout", "--kill-after=5", f"{timeout_s:g}", *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment() | {"HOME": "/tmp/home"},
            check=False,
            timeout=timeout_s + 10,
        )
        assert not check or done.returncode == 0, (
            f"{shlex.join(words)} on {self.name} ended with {done.returncode}: {done.stdout}"
        )
        return done

    def processes(self) -> dict[int, str]:
        """Command lines by process id (of this machine): what lives in the host but its leader."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and int(entry.name) != self.pid and os.readlink(entry / "ns/pid") == space:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has ended
                continue
        return {pid: line for pid, line in found.items() if line}

    def kill(self) -> None:
        """Ends every process at once."""
        for pid in self.processes():
            _kill(pid)
        self.remove()

    def remove(self) -> None:
        if self.pid:
            _kill(self.pid)
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait(_READY_TIMEOUT_S)
        self.pid, self._holder = 0, None


class HostNetwork:
    """A block with hosts of these names, at 10.213.7.2 and up; `operator` is at .1 and has no ssh server."""

    def __init__(self, *names: str) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="pf-hosts-", dir="/tmp"))
        self.shared = self._directory / "shared"
        self.key = SHARED / "client_key"
        addresses = {name: f"10.213.7.{number}" for number, name in enumerate((_OPERATOR, *names), start=1)}
        every = [Host(name, address, self._directory / name) for name, address in addresses.items()]
        self.operator, self.hosts = every[0], {host.name: host for host in every[1:]}

    def __enter__(self) -> HostNetwork:
        try:
            self.shared.mkdir()
            _make_key(self.shared / "client_key")
            for host in (self.operator, *self.hosts.values()):
                self._furnish(host)
                host.boot(self.shared)
            self._join()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for host in (*self.hosts.values(), self.operator):
            host.remove()
        shutil.rmtree(self._directory, ignore_errors=True)

    def cut_off(self, name: str) -> None:
        """The host's cable is out: packets vanish, and nobody is told."""
        self._port(name, "state", "0")

    def cut_between(self, *names: str) -> None:
        """These hosts do not reach each other, and all others do."""
        for name in names:
            self._port(name, "isolated", "on")

    def heal(self) -> None:
        for name, host in self.hosts.items():
            if host.pid:
                self._port(name, "isolated", "off")
                self._port(name, "state", "3")

    def _port(self, name: str, *setting: str) -> None:
        self._in_network(self.operator, "bridge", "link", "set", "dev", f"to-{name}", *setting)

    def _join(self) -> None:
        hub = self.operator
        self._in_network(hub, "ip", "link", "add", "lan", "type", "bridge")
        self._in_network(hub, "ip", "address", "add", f"{hub.address}/24", "dev", "lan")
        self._in_network(hub, "ip", "link", "set", "lan", "up")
        for name, host in self.hosts.items():
            port = f"to-{name}"
            peer = ["type", "veth", "peer", "name", "eth0", "netns", str(host.pid)]
            self._in_network(hub, "ip", "link", "add", port, *peer)
            self._in_network(hub, "ip", "link", "set", port, "master", "lan", "up")
            self._in_network(host, "ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            self._in_network(host, "ip", "link", "set", "eth0", "up")

    @staticmethod
    def _in_network(host: Host, program: str, *words: str) -> None:
        command = ["nsenter", "--target", str(host.pid), "--net", str(_program(program)), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()}")

    def _furnish(self, host: Host) -> None:
        """The host's files: its own home, keys and /etc, and a /tmp in which all of them are."""
        etc, home = host.directory / "tmp/etc", host.directory / "tmp/home"
        for directory in (etc, home / ".ssh", home / ".cache/pilotfish", host.directory / "tmp/shared"):
            directory.mkdir(parents=True)
        _CACHE.mkdir(parents=True, exist_ok=True)
        _make_key(etc / "host_key")
        (etc / "passwd").write_text(
            "root:x:0:0:root:/tmp/home:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
            "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        )
        names = [f"{other.address} {other.name}" for other in (self.operator, *self.hosts.values())]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        (etc / "sshd_config").write_text(
            "ListenAddress 0.0.0.0\nHostKey /tmp/etc/host_key\nAuthorizedKeysFile /tmp/home/.ssh/authorized_keys\n"
            "PidFile none\nUsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nStrictModes no\n"
            "UseDNS no\nMaxStartups 50\n"
        )
        shutil.copy(self.shared / "client_key.pub", home / ".ssh/authorized_keys")
        variables = {name: _environment()[name] for name in ("PATH", "PYTHONPATH") if name in _environment()}
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
        for name in (".bashrc", ".bash_profile"):
            (home / name).write_text(exports)


def _environment() -> dict[str, str]:
    """Of commands in hosts: this Python and its packages first, and nothing of a Ray outside."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{_SEARCH}", "LC_ALL": "C.UTF-8"}


def _make_key(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True, timeout=20)


def _program(name: str) -> str | None:
    return shutil.which(name, path=_SEARCH)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _wait(condition: object, what: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {_READY_TIMEOUT_S:g} s for {what}")
        time.sleep(0.05)
