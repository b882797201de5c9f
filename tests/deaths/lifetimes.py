"""What goes wrong before `init`, after the exit handler, and in processes that a rank starts."""

from __future__ import annotations

from tests.deaths.case import EARLY, SOON, Case, Ending

__all__ = ["CASES"]

TIMEOUT = 2.0  # seconds: the deadline of these jobs
ALL = (2, 3, 4)

NEVER = "never comes to ``init``, or too late"
BLOCKS = "blocks at its end: in an exit handler registered before ``init``, or in a finaliser"
WORKER = "is killed while it has a daemonic worker that was forked"
FORKED = "ends while it has such a worker, or after it has forked children that have ended"
EXITS = "ends by ``os._exit(0)``"

WAITED = r"mpidist: this rank has waited 2 s in mpidist.init for MPI to start"
ENDED_BY_LAUNCHER = "prterun has exited due to process rank <guilty>"  # if it comes to know first
LEFT = r"\[world <guilty>/<size>\] mpidist: this rank has left, and its process has not ended"

CASES = (
    Case(
        name="before-init-exit",
        fault=NEVER,
        before="""
if rank == guilty:
    it_happens()
    sys.exit(0)
""",
        body="",
        sees=(rf"{WAITED}.*It is rank \d of <size>, [^ ]+:\d+\.|{ENDED_BY_LAUNCHER}",),
        sites=(),
        dumps=False,
        timeout=TIMEOUT,
        sizes=ALL,
    ),
    Case(
        name="before-init-late",
        fault=NEVER,
        before="""
if rank == guilty:
    it_happens()
    time.sleep(8)
""",
        body="",
        sees=(WAITED,),
        sites=(),
        dumps=False,
        timeout=TIMEOUT,
        within=7.0,
        sizes=ALL,
    ),
    Case(
        name="exit-handler",
        fault=BLOCKS,
        before="""
from mpi4py import MPI
import mpidist.job.end
import atexit


def block():
    if rank == guilty:
        it_happens()
        time.sleep(1000)  # at: guilty


atexit.register(block)
""",
        body="",
        sees=(LEFT,),
        blames=LEFT,
        sites=("guilty",),
        dumps=False,
        timeout=TIMEOUT,
        sizes=ALL,
    ),
    Case(
        name="finaliser",
        fault=BLOCKS,
        before="""
import atexit


class Blocks:
    def __del__(self):
        if rank == guilty:
            it_happens()
            time.sleep(1000)  # at: guilty


def leave_garbage():  # after the exit handler of mpidist: the collector comes no sooner
    blocks = [Blocks()]
    blocks.append(blocks)


atexit.register(leave_garbage)
"""
        + EARLY,
        body="",
        sees=(LEFT, "in __del__"),
        blames=LEFT,
        sites=("guilty",),
        dumps=False,
        timeout=TIMEOUT,
        sizes=ALL,
    ),
    Case(
        name="worker-kill",
        fault=WORKER,
        body="""
import multiprocessing

multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=True).start()
if rank == guilty:
    it_happens()
    os.kill(os.getpid(), signal.SIGKILL)
work_for_ever()
""",
        launcher=True,
        dumps=False,
        sites=(),
        sizes=ALL,
    ),
    Case(
        name="worker-end",
        fault=FORKED,
        body='''
import multiprocessing
import subprocess

from mpidist.job import end
from mpidist.train import StopSignal


def refused(call, error, words):
    try:
        call()
    except error as found:
        assert words in str(found), found
        return
    raise AssertionError(f"not refused: {call}")


part = world.duplicate("part")
if rank != guilty:
    mpidist.recv(part, src=guilty)  # its sum is under way until it has tried it in a child
work = mpidist.iall_reduce(large, world)


def use_the_rank():
    no_rank = f"forked from rank {rank}"
    refused(lambda: mpidist.barrier(world), mpidist.GroupBrokenError, no_rank)
    refused(lambda: mpidist.send(small, part, dst=0), mpidist.GroupBrokenError, no_rank)
    refused(work.wait, mpidist.GroupBrokenError, no_rank)
    refused(part.progress, mpidist.GroupBrokenError, no_rank)
    refused(mpidist.init, mpidist.LaunchError, f"a rank (process {os.getppid()}, ")
    with mpidist.init("simulated") as alone:
        assert mpidist.all_reduce(small, alone).sum() == 1000
    world.close()
    os.kill(os.getpid(), signal.SIGUSR2)


def ending(act):
    """Return the exit code of a child that comes to its end as a program does."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    act()
    sys.exit()


with StopSignal():
    fork = multiprocessing.get_context("fork")
    fork.Process(target=time.sleep, args=(1000,), daemon=True).start()
    terminated = fork.Process(target=time.sleep, args=(1000,))
    terminated.start()
    if rank == guilty:
        assert ending(use_the_rank) == 0
        for other in range(size):
            if other != guilty:
                mpidist.send(small, part, dst=other)
        assert ending(lambda: sys.exit(3)) == 3
        assert ending(lambda: 1 / 0) == 1
        program = "import mpidist; mpidist.init()"
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert f"a rank (process {os.getpid()}, " in ended.stderr, ended.stderr
    terminated.terminate()
    terminated.join()
    assert terminated.exitcode == -signal.SIGTERM
    assert work.wait()[0] == size
    # What is kept for the last words takes no memory.
    spare = np.frombuffer(end._installed._spare, np.uint8)
    resident = np.ones(spare.size >> 12, np.uint8)
    start = ctypes.c_void_p(spare.ctypes.data + 4095 & -4096)
    end = ctypes.c_size_t(spare.size - 4096)
    assert ctypes.CDLL(None).mincore(start, end, ctypes.c_void_p(resident.ctypes.data)) == 0
    assert resident[:-1].sum() == 0
    mpidist.barrier(part)
    if rank == guilty:
        it_happens()
''',
        sees=("ZeroDivisionError",),
        dumps=False,
        sites=(),
        timeout=30.0,  # the others wait for one that starts many processes
        sizes=ALL,
        within=SOON + 2.0,
        ending=Ending.GOOD,
    ),
    Case(
        name="os-exit",
        fault=EXITS,
        body="""
if rank == guilty:
    it_happens()
    os._exit(0)
work_for_ever()
""",
        dumps=False,
        sites=(),
        within=SOON + 2.0,
        ending=Ending.ANY,
    ),
)
