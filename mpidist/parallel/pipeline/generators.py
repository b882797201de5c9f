"""The schedules of the literature, as functions of the numbers of ranks and micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from mpidist.errors import ScheduleError
from mpidist.parallel.pipeline.fitting import fitted
from mpidist.parallel.pipeline.schedule import Action, Pass, Schedule
from mpidist.parallel.pipeline.timeline import Costs, simulate

__all__ = ["SCHEDULES", "gpipe", "interleaved", "one_f_one_b", "zb_h1", "zbv"]


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """Return the schedule that runs all forward passes, and then all backward passes.

    Parameters
    ----------
    ranks : int
        One stage is on each.
    micro_batches : int
        How many parts a batch is cut into.

    Returns
    -------
    Schedule
        Each rank keeps the contexts of all micro-batches. Bubble ``(ranks - 1) / micro_batches``.

    Raises
    ------
    ScheduleError
        If a number is below 1.

    References
    ----------
    Huang et al. (2019), GPipe: Efficient Training of Giant Neural Networks using Pipeline
    Parallelism, section 2.2.
    """

    def actions(rank: int) -> Iterator[Action]:
        for kind in (Pass.FORWARD, Pass.BACKWARD):
            yield from (Action(rank, kind, m) for m in range(micro_batches))

    return _schedule("gpipe", ranks, micro_batches, actions)


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """Return the schedule that alternates one forward and one backward pass.

    Parameters
    ----------
    ranks : int
        One stage is on each.
    micro_batches : int
        How many parts a batch is cut into.

    Returns
    -------
    Schedule
        Rank `r` keeps at most ``ranks - r`` contexts. Bubble ``(ranks - 1) / micro_batches``, as
        with `gpipe`.

    Raises
    ------
    ScheduleError
        If a number is below 1.

    References
    ----------
    Narayanan et al. (2019), PipeDream: Generalized Pipeline Parallelism for DNN Training, section
    3.2; with a flush, Narayanan et al. (2021), Efficient Large-Scale Language Model Training on GPU
    Clusters Using Megatron-LM, section 2.2.1.
    """

    def actions(rank: int) -> Iterator[Action]:
        ahead = min(ranks - rank, micro_batches)
        yield from (Action(rank, Pass.FORWARD, m) for m in range(ahead))
        for m in range(micro_batches):
            yield Action(rank, Pass.BACKWARD, m)
            if m + ahead < micro_batches:
                yield Action(rank, Pass.FORWARD, m + ahead)

    return _schedule("1f1b", ranks, micro_batches, actions)


def interleaved(ranks: int, micro_batches: int, *, chunks: int = 2) -> Schedule:
    """Return the 1F1B schedule of several stages on each rank.

    Parameters
    ----------
    ranks : int
        Stage `s` is on rank ``s % ranks``.
    micro_batches : int
        How many parts a batch is cut into; a multiple of `ranks`.
    chunks : int, optional
        Stages on each rank.

    Returns
    -------
    Schedule
        Bubble ``(ranks - 1) / (chunks * micro_batches)``, for `chunks` times as many messages.

    Raises
    ------
    ScheduleError
        If a number is below 1, or `micro_batches` no multiple of `ranks`, naming the next ones.

    References
    ----------
    Narayanan et al. (2021), Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM, section 2.2.2.
    """
    _check_positive("interleaved", ranks=ranks, micro_batches=micro_batches, chunks=chunks)
    if micro_batches % ranks:
        below = micro_batches // ranks * ranks
        fitting = f"{below} or {below + ranks}" if below else str(ranks)
        raise ScheduleError(
            f"schedule 'interleaved': expected a multiple of the {ranks} ranks as the number of "
            f"micro-batches, got {micro_batches}; take {fitting}"
        )
    passes = chunks * micro_batches

    def action(rank: int, kind: Pass, k: int) -> Action:
        """Return the k-th pass of a kind: `ranks` micro-batches through each chunk in turn."""
        round_, within = divmod(k, ranks * chunks)
        chunk, micro = divmod(within, ranks)
        chunk = chunk if kind is Pass.FORWARD else chunks - 1 - chunk
        return Action(chunk * ranks + rank, kind, round_ * ranks + micro)

    def actions(rank: int) -> Iterator[Action]:
        ahead = min(2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1, passes)
        yield from (action(rank, Pass.FORWARD, k) for k in range(ahead))
        for k in range(passes):
            yield action(rank, Pass.BACKWARD, k)
            if k + ahead < passes:
                yield action(rank, Pass.FORWARD, k + ahead)

    return _schedule("interleaved", ranks, micro_batches, actions, chunks=chunks)


def zb_h1(ranks: int, micro_batches: int) -> Schedule:
    """Return the 1F1B schedule whose ranks do the second halves of backward while they would wait.

    Parameters
    ----------
    ranks : int
        One stage is on each.
    micro_batches : int
        How many parts a batch is cut into.

    Returns
    -------
    Schedule
        Each rank keeps at most `ranks` contexts. Bubble ``(ranks - 1) / (3 * micro_batches)`` where
        forward and both halves of backward take equally long.

    Raises
    ------
    ScheduleError
        If a number is below 1.

    References
    ----------
    Qi, Wan, Huang, Lin (2024), Zero Bubble Pipeline Parallelism, section 2.1.
    """

    def actions(rank: int) -> Iterator[Action]:
        ahead, delay = min(ranks - rank, micro_batches), rank
        yield from (Action(rank, Pass.FORWARD, m) for m in range(ahead))
        for m in range(micro_batches):
            yield Action(rank, Pass.BACKWARD_INPUT, m)
            if m >= delay:
                yield Action(rank, Pass.BACKWARD_WEIGHT, m - delay)
            if m + ahead < micro_batches:
                yield Action(rank, Pass.FORWARD, m + ahead)
        for m in range(max(micro_batches - delay, 0), micro_batches):
            yield Action(rank, Pass.BACKWARD_WEIGHT, m)

    return _schedule("zb-h1", ranks, micro_batches, actions)


def zbv(ranks: int, micro_batches: int) -> Schedule:
    """Return the zero-bubble schedule of two stages per rank, the first and the last on rank 0.

    Parameters
    ----------
    ranks : int
        Stages `r` and ``2 * ranks - 1 - r`` are on rank `r`.
    micro_batches : int
        How many parts a batch is cut into.

    Returns
    -------
    Schedule
        Each rank keeps at most ``2 * ranks`` contexts, of stages that are half as large as those of
        `zb_h1`. Bubble ``(ranks - 1) / (6 * micro_batches)`` from ``2 * ranks - 1`` micro-batches
        on, where forward and both halves of backward take equally long.

    Raises
    ------
    ScheduleError
        If a number is below 1.

    Notes
    -----
    The rule of the paper; with fewer than ``2 * ranks - 1`` micro-batches what `fitted` makes for
    equal costs and as many contexts, if that is shorter.

    References
    ----------
    Qi, Wan, Amar, Lin (2024), Pipeline Parallelism with Controllable Memory, section 3.
    """
    _check_positive("zbv", ranks=ranks, micro_batches=micro_batches)
    stages = 2 * ranks
    rank_of_stage = (*range(ranks), *reversed(range(ranks)))
    full = max(micro_batches, stages - 1)  # the rule needs so many; those that are not are left out

    def actions(rank: int) -> Iterator[Action]:
        numbers: Counter[tuple[int, Pass]] = Counter()
        for stage, kind in _v_rule(rank, stages - 1 - rank, ranks - rank, full - ranks):
            micro = numbers[stage, kind]
            numbers[stage, kind] += 1
            if micro < micro_batches:
                yield Action(stage, kind, micro)

    by_rule = Schedule(
        "zbv", rank_of_stage, micro_batches, tuple(tuple(actions(r)) for r in range(ranks))
    )
    if micro_batches == full:
        return by_rule
    costs = Costs.unit(stages)
    greedy = fitted(rank_of_stage, micro_batches, costs, limit=stages, name="zbv")
    return min(by_rule, greedy, key=lambda schedule: simulate(schedule).span)


def _v_rule(down: int, up: int, below: int, steady: int) -> Iterator[tuple[int, Pass]]:
    """Yield the passes of a rank, whose first stage is `down` (also its number) and last is `up`.

    `below` ranks are from this one to the last, itself included.
    """
    forward = {stage: (stage, Pass.FORWARD) for stage in (down, up)}
    halves = {
        stage: ((stage, Pass.BACKWARD_INPUT), (stage, Pass.BACKWARD_WEIGHT)) for stage in (down, up)
    }
    yield from [forward[down]] * (2 * below - 1)
    yield from [forward[up], forward[down]] * down
    yield from [forward[up], *halves[up]] * below
    yield from [forward[down], *halves[down], forward[up], *halves[up]] * steady
    yield from [halves[down][0], halves[up][0]] * down
    yield from [*halves[down]] * below
    yield from [halves[up][1], halves[down][1]] * down


SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zbv": zbv,
}
"""By the name that a `Pipeline` takes."""


def _schedule(
    name: str,
    ranks: int,
    micro_batches: int,
    actions: Callable[[int], Iterator[Action]],
    *,
    chunks: int = 1,
) -> Schedule:
    _check_positive(name, ranks=ranks, micro_batches=micro_batches)
    rank_of_stage = tuple(range(ranks)) * chunks
    return Schedule(
        name, rank_of_stage, micro_batches, tuple(tuple(actions(r)) for r in range(ranks))
    )


def _check_positive(name: str, **numbers: int) -> None:
    for what, number in numbers.items():
        if number < 1:
            raise ScheduleError(f"schedule '{name}': expected {what} of at least 1, got {number}")
