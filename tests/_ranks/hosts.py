"""Pretended hosts on this machine, and jobs over them.

A pretended host is a set of namespaces: a network with one interface, `eth0`, on a bridge that all
hosts of a run share, a host name, and a /dev/shm of its own. MPI and mpidist take it for another
node, and nothing but the network connects it with the others. File systems and process numbers are
the machine's.

    python -m tests._ranks.hosts --hosts 2 --ranks 2 -- python -m mpidist bench all_reduce

[Note: nothing to clean up] The namespaces have no names that another run could meet: each is kept
by a process that ends at the end of its input, a pipe from the process that made the hosts. However
that one ends, the kernel removes the bridge and the interfaces with the last process inside. What a
killed run can leave is its job and a directory, which the next run finds: whoever lives holds a
lock on it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests._ranks.launcher import clean_environment, find_mpirun, marked_processes, vendor_arguments

__all__ = ["NO_HOSTS", "HostPool", "Hosts", "HostsUnavailableError", "remove_dead"]

NO_HOSTS = (
    "no pretended hosts: they need root with CAP_NET_ADMIN and CAP_SYS_ADMIN, and the programs ip "
    "and nsenter (apt-get install iproute2 util-linux)"
)

MARK = "MPIDIST_TEST_HOSTS"
"""Every process on the hosts carries this variable; its value is their directory."""

_PREFIX = "mpidist-hosts-"
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_NETWORK = "10.77.1"  # exists inside the namespaces only, so that every run can have the same

# sh -c _ENTER PID COMMAND...: entering another mount namespace forgets the current directory.
_ENTER = 'exec nsenter -t $0 -n -u -m -i sh -c \'cd "$0"; exec "$@"\' "$PWD" "$@"'

# What a launcher calls as rsh: hostsh ADDRESS COMMAND...
_REMOTE_SHELL = """\
#!/bin/sh
case "$1" in
{cases}
    *) echo "there is no host $1" >&2; exit 255;;
esac
shift
exec nsenter -t $pid -n -u -m -i sh -c 'cd "$0"; eval "$*"' "$PWD" "$@"
"""


class HostsUnavailableError(Exception):
    """This machine does not let us make hosts."""


class Hosts:
    """Some pretended hosts, until `close`. Use them as a context manager.

    Parameters
    ----------
    count : int
        Number of hosts.
    rate : str, optional
        What each can send, and receive, as tc spells it.

    Attributes
    ----------
    names, addresses : list of str
        Host names, and what the launcher calls the hosts.
    without_rate : str
        Why the network is not limited to `rate`; empty where it is.

    Raises
    ------
    HostsUnavailableError
        If there can be none here; its message begins with `NO_HOSTS`.
    """

    def __init__(self, count: int, *, rate: str = "1gbit") -> None:
        if shutil.which("ip", path=_PATH) is None or shutil.which("nsenter") is None:
            raise HostsUnavailableError(NO_HOSTS)
        self.without_rate = ""
        self._holders: list[subprocess.Popen[bytes]] = []
        self._directory, self._lock = _make_directory()
        self._environment = {**os.environ, "PATH": _PATH, MARK: str(self._directory)}
        tag = self._directory.name.removeprefix(_PREFIX).replace("_", "x")
        self.names = [f"h{index}-{tag}" for index in range(count)]
        self.addresses = [f"{_NETWORK}.{index + 1}" for index in range(count)]
        try:
            self._make(rate)
        except BaseException as error:
            self.close()
            if isinstance(error, subprocess.CalledProcessError):
                detail = error.stderr.decode(errors="replace").strip()
                raise HostsUnavailableError(f"{NO_HOSTS}: {detail}") from None
            raise

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process on the hosts, and remove them."""
        for holder in self._holders:
            holder.communicate()
        _end_marked(self._directory)
        shutil.rmtree(self._directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)

    def on(self, host: int, *command: str) -> list[str]:
        """Return a command line that runs a command on a host, in its current directory."""
        settings = [f"{MARK}={self._directory}", "UCX_NET_DEVICES=eth0"]  # or UCX tries `lo`
        return ["sh", "-c", _ENTER, str(self._holders[host].pid), "env", *settings, *command]

    def mpirun(self, ranks: int) -> list[str]:
        """Return the start of an mpirun command line that puts so many ranks on each host.

        Notes
        -----
        What follows is ``-n N`` and the program. The first rank is on the first host.
        """
        mpirun = find_mpirun()
        assert mpirun is not None, "there is no mpirun"
        shell, arguments = str(self._directory / "hostsh"), vendor_arguments(mpirun)
        if arguments:  # Open MPI
            slots = ",".join(f"{address}:{ranks}" for address in self.addresses)
            arguments += ["--prtemca", "plm_ssh_agent", shell, "--host", slots]
        else:
            arguments = ["-iface", "eth0", "-hosts", ",".join(self.addresses), "-ppn", str(ranks)]
            arguments += ["-launcher", "rsh", "-launcher-exec", shell]
        return self.on(0, str(mpirun), *arguments)

    def _make(self, rate: str) -> None:
        bridge = self._hold(["--net"], "ip link add br0 type bridge; ip link set br0 up")
        for name in self.names:
            own = f"hostname {name}; mount -t tmpfs tmpfs /dev/shm; ip link set lo up"
            self._hold(["--net", "--uts", "--mount", "--ipc"], own)
        self._holders.append(self._holders.pop(0))  # the hosts by their number, then the bridge
        cases = []
        for index, (address, holder) in enumerate(zip(self.addresses, self._holders, strict=False)):
            port = f"port{index}"
            link = f"ip link add {port} type veth peer name eth0 netns {holder.pid}"
            self._inside(bridge, f"{link}; ip link set {port} master br0 up")
            self._inside(holder, f"ip addr add {address}/24 dev eth0; ip link set eth0 up")
            self._limit(bridge, port, rate)
            self._limit(holder, "eth0", rate)
            cases.append(f"    {address}) pid={holder.pid};;")
        shell = self._directory / "hostsh"
        shell.write_text(_REMOTE_SHELL.format(cases="\n".join(cases)))
        shell.chmod(0o700)

    def _hold(self, namespaces: Sequence[str], script: str) -> subprocess.Popen[bytes]:
        """Start the process that keeps new namespaces, in which the script has run."""
        holder = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-ec", f"{script}; echo ready; exec cat"],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for those who use the hosts
        )
        self._holders.append(holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            _, why = holder.communicate()
            raise subprocess.CalledProcessError(holder.returncode, holder.args, stderr=why)
        return holder

    def _inside(self, holder: subprocess.Popen[bytes], script: str) -> None:
        subprocess.run(
            ["nsenter", "-t", str(holder.pid), "-n", "sh", "-ec", script],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )

    def _limit(self, holder: subprocess.Popen[bytes], device: str, rate: str) -> None:
        """Limit what a device sends; a kernel without tbf makes hosts all the same."""
        try:
            limit = f"root tbf rate {shlex.quote(rate)} burst 128kb latency 50ms"
            self._inside(holder, f"tc qdisc add dev {device} {limit}")
        except subprocess.CalledProcessError as error:
            self.without_rate = error.stderr.decode(errors="replace").strip()


class HostPool:
    """The hosts of one run of tests, made when they are first asked for."""

    def __init__(self) -> None:
        self._made: dict[int, Hosts] = {}

    @property
    def without_rate(self) -> str:
        """Why a network is not limited; empty where all are, or where there are no hosts."""
        return next((hosts.without_rate for hosts in self._made.values()), "")

    def of(self, count: int) -> Hosts:
        """Return so many hosts, always the same ones."""
        if count not in self._made:
            self._made[count] = Hosts(count)
        return self._made[count]

    def close(self) -> None:
        """Remove all hosts."""
        for hosts in self._made.values():
            hosts.close()
        self._made.clear()


def remove_dead() -> None:
    """Remove what killed runs have left: their processes on the hosts, and their directory."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _end_marked(directory)
                    shutil.rmtree(directory)
            finally:
                os.close(lock)


def _make_directory() -> tuple[Path, int]:
    """Return a new directory, and the descriptor whose lock says that its run is alive."""
    remove_dead()
    new = Path(tempfile.mkdtemp(prefix="mpidist-new-"))
    lock = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # It gets the name by which others find it when it is locked, never before.
    directory = new.with_name(new.name.replace("mpidist-new-", _PREFIX))
    new.rename(directory)
    return directory, lock


def _end_marked(directory: Path) -> None:
    deadline = time.monotonic() + 5.0
    while (left := marked_processes(str(directory), name=MARK)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make hosts, and run a command on ranks of theirs; return mpirun's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests._ranks.hosts",
        description="Make pretended hosts, and run a command on ranks of theirs.",
    )
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts (default: 2)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks on each host (default: 2)")
    parser.add_argument("--rate", default="1gbit", help="of the network (default: 1gbit)")
    parser.add_argument("command", nargs="+", help="what each rank runs, after --")
    options = parser.parse_args(arguments)
    try:
        hosts = Hosts(options.hosts, rate=options.rate)
    except HostsUnavailableError as error:
        parser.exit(1, f"{error}\n")
    with hosts:
        if hosts.without_rate:
            print(f"the network is not limited to {options.rate}: {hosts.without_rate}")
        size = ["-n", str(options.hosts * options.ranks)]
        start = [*hosts.mpirun(options.ranks), *size, *options.command]
        return subprocess.run(start, env=clean_environment(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
