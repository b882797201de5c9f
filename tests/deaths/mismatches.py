"""Ranks that call something else than the others."""

from __future__ import annotations

from dataclasses import replace

from tests.deaths.case import Case

__all__ = ["CASES"]

DIFFERENT = "[Tt]he ranks called different things"
CALLED = r"rank <guilty> called {}"
ONE_PER_NODE = {"MPIDIST_RANKS_PER_NODE": "1"}
DEBUG = {"MPIDIST_DEBUG": "1"}


def _calls(theirs: str, others: str) -> str:
    """Return a program in which one rank makes another call than the others, and all go on."""
    return f"""
it_happens()
if world.rank == guilty:
    mpidist.{theirs}  # at: guilty
else:
    mpidist.{others}  # at: others
mpidist.barrier(world)
"""


def _different(name: str, theirs: str, called: str, others: str = "reduce(small, world)") -> Case:
    """Return a case in which the ranks of one node compare what they call."""
    return Case(
        name=name,
        fault="calls another verb, or gives another op, dtype, shape or root",
        body=_calls(theirs, others),
        sees=(DIFFERENT, "CollectiveMismatchError"),
        blames=CALLED.format(called),
    )


ON_ONE_NODE = (
    _different("verb", "gather(small, world)", "gather"),
    _different("op", "reduce(small, world, op=mpidist.PROD)", "reduce PROD"),
    _different("dtype", "reduce(small.astype('f4'), world)", "reduce SUM float32"),
    _different("shape", "reduce(small[1:], world)", r"reduce SUM float64\[999\]"),
    _different("root", "reduce(small, world, root=guilty)", "reduce .* root <guilty>"),
)
_, OP, _, SHAPE, ROOT = ON_ONE_NODE


def _over_nodes(case: Case) -> Case:
    """Return the case with each rank on a node of its own."""
    return replace(case, name=f"{case.name}-nodes", environment=ONE_PER_NODE, dumps=False)


def _immediate(case: Case, theirs: str, called: str, others: str) -> Case:
    """Return the case with immediate calls."""
    return replace(
        case,
        name=f"immediate-{case.name}",
        fault="the same, in an immediate call",
        body=_calls(f"{theirs}.wait()", f"{others}.wait()"),
        blames=CALLED.format(called),
    )


IMMEDIATE = (
    _immediate(SHAPE, "iall_reduce(small[1:], world)", "iall_reduce", "iall_reduce(small, world)"),
    _immediate(ROOT, "igather(small, world, root=guilty)", "igather", "igather(small, world)"),
)


def _debugged(case: Case) -> Case:
    """Return the case over nodes, with the calls of all ranks compared before they begin."""
    return replace(
        case,
        name=f"{case.name}-nodes-debug",
        fault="any of these, with MPIDIST_DEBUG=1",
        environment=ONE_PER_NODE | DEBUG,
        dumps=False,
    )


CASES = (
    *ON_ONE_NODE,
    _different("verb-arrival", "barrier(world)", "barrier", "all_reduce(small, world)"),
    _different(
        "op-direct",
        "all_reduce(large, world, op=mpidist.MAX)",
        "all_reduce .*MAX",
        "all_reduce(large, world)",
    ),
    *map(_over_nodes, ON_ONE_NODE),
    *IMMEDIATE,
    *map(_over_nodes, IMMEDIATE),
    *map(_debugged, (OP, IMMEDIATE[0])),
    Case(
        name="one-too-many",
        fault="calls one collective too many",
        body="""
mpidist.all_reduce(small, world)  # at: others
it_happens()
if world.rank == guilty:
    mpidist.all_reduce(small, world)  # at: guilty
""",
        sees=("PeerLostError",),
        blames=r"^\[world <guilty>/<size>\].* called at <at:guilty>: rank 0 left",
    ),
    Case(
        name="two-groups",
        fault="uses two groups in another order",
        body="""
groups = [world.duplicate("a"), world.duplicate("b")]
it_happens()
if world.rank == guilty:
    groups.reverse()
    mpidist.all_reduce(small, groups[0])  # at: guilty
else:
    mpidist.all_reduce(small, groups[0])  # at: others
mpidist.all_reduce(small, groups[1])
""",
        sees=("CollectiveTimeoutError",),
        blames="^ *<guilty> .* of b +<at:guilty>",
    ),
)
