"""Ranks that end, or come no further."""

from __future__ import annotations

from tests.deaths.case import SOON, Case

__all__ = ["CASES"]

RAISED = r"^\[world <guilty>/<size>\] mpidist: this rank raised [\w.]*{}"
LEFT = r"rank <guilty> left after operation \d+"
MISSING = r"Missing: rank <guilty> \([^)]*{}\)"

CASES = (
    Case(
        name="raise",
        fault="raises an exception",
        body="""
if world.rank == guilty:
    it_happens()
    raise ValueError("no such luck")  # at: guilty
work_for_ever()
""",
        sees=("ValueError: no such luck",),
        blames=RAISED.format("ValueError"),
    ),
    Case(
        name="exit-0",
        fault="leaves early",
        body="""
if world.rank == guilty:
    it_happens()
    sys.exit(0)
work_for_ever()
""",
        sees=("PeerLostError",),
        blames=LEFT,
        sites=("others",),
    ),
    Case(
        name="exit-1",
        fault="leaves early",
        body="""
if world.rank == guilty:
    it_happens()
    sys.exit(1)
work_for_ever()
""",
        sees=("PeerLostError",),
        blames=LEFT,
        sites=("others",),
    ),
    Case(
        name="kill",
        fault="is killed (SIGKILL)",
        body="""
if world.rank == guilty:
    it_happens()
    os.kill(os.getpid(), signal.SIGKILL)
work_for_ever()
""",
        launcher=True,
        dumps=False,
        sites=(),
    ),
    Case(
        name="stop",
        fault="is stopped (SIGSTOP)",
        body="""
if world.rank == guilty:
    it_happens()
    os.kill(os.getpid(), signal.SIGSTOP)
work_for_ever()
""",
        sees=("CollectiveTimeoutError",),
        blames=MISSING.format(", stopped"),
        sites=("others",),
    ),
    Case(
        name="stop-inside",
        fault="is stopped in the middle of a collective",
        body="""
def stop(call, waiter):
    it_happens()
    os.kill(os.getpid(), signal.SIGSTOP)


if world.rank == guilty:
    world.transport._call = stop
while True:
    mpidist.reduce(large, world)  # at: others
""",
        sees=("is stuck in the MPI library's part of reduce",),
        blames=r"Stopped: rank <guilty>|rank <guilty> \([^)]*, stopped\)",
        sites=("others",),
    ),
    Case(
        name="memory",
        fault="runs out of memory",
        body="""
if world.rank == guilty:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
    it_happens()
    np.ones(1 << 30)  # at: guilty
work_for_ever()
""",
        sees=("Unable to allocate 8.00 GiB",),
        blames=RAISED.format("MemoryError"),
    ),
    Case(
        name="memory-full",
        fault="runs out of memory",
        body="""
if world.rank == guilty:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20),) * 2)
    it_happens()
    taken = []
    while True:
        taken.append(bytes(100))  # at: guilty
work_for_ever()
""",
        sees=("MemoryError",),
        blames=RAISED.format("MemoryError"),
        dumps=False,
        within=SOON,
    ),
    Case(
        name="disk",
        fault="writes to a full disk",
        body="""
if world.rank == guilty:
    it_happens()
    Path("/dev/full").write_text("a checkpoint")  # at: guilty
work_for_ever()
""",
        sees=(r"OSError: \[Errno 28\] No space left on device",),
        blames=RAISED.format("OSError"),
    ),
    Case(
        name="disk-report",
        fault="raises while the disk for reports or output is full",
        body="""
if world.rank == guilty:
    it_happens()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file may get any longer
    raise ValueError("no such luck")  # at: guilty
work_for_ever()
""",
        sees=("ValueError: no such luck", "could not be written to .*: .*File too large"),
        blames=RAISED.format("ValueError"),
        dumps=False,
    ),
    Case(
        name="disk-output",
        fault="raises while the disk for reports or output is full",
        body="""
if world.rank == guilty:
    it_happens()
    for stream in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), stream)
    print("a line")
    raise ValueError("no such luck")
work_for_ever()
""",
        sites=(),
        dumps=False,
        within=SOON,
    ),
    Case(
        name="foreign",
        fault="is stuck in foreign code",
        body="""
if world.rank == guilty:
    it_happens()
    ctypes.CDLL(None).sleep(1000)  # at: guilty
work_for_ever()
""",
        sees=("CollectiveTimeoutError",),
        blames=MISSING.format(""),
    ),
    Case(
        name="foreign-holds-python",
        fault="is stuck in foreign code that holds the interpreter (the GIL)",
        body="""
if world.rank == guilty:
    it_happens()
    ctypes.PyDLL(None).sleep(1000)
work_for_ever()
""",
        sees=(
            "CollectiveTimeoutError",
            r"(?m)^ *<guilty> .* silent ",
            r"Silent: rank <guilty>: .* foreign code holds Python's lock",
        ),
        blames=MISSING.format(""),
        sites=("others",),
    ),
    Case(
        name="immediate-raise",
        fault="raises an exception",
        body="""
work = mpidist.iall_reduce(large, world)  # at: others
if world.rank == guilty:
    it_happens()
    raise ValueError("no such luck")  # at: guilty
work.wait()
work_for_ever()
""",
        sees=("ValueError: no such luck",),
        blames=RAISED.format("ValueError"),
    ),
    Case(
        name="immediate-exit",
        fault="leaves early",
        body="""
work = mpidist.iall_reduce(large, world)
if world.rank == guilty:
    it_happens()
    sys.exit(0)
work.wait()
work_for_ever()
""",
        sees=("PeerLostError",),
        blames=LEFT,
        sites=("others",),
    ),
    Case(
        name="immediate-kill",
        fault="is killed (SIGKILL)",
        body="""
work = mpidist.iall_reduce(large, world)
if world.rank == guilty:
    it_happens()
    os.kill(os.getpid(), signal.SIGKILL)
work.wait()
work_for_ever()
""",
        launcher=True,
        dumps=False,
        sites=(),
    ),
)
