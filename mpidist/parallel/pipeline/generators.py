"""The schedules of the literature, as functions of the numbers of ranks and micro-batches."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from mpidist.errors import ScheduleError
from mpidist.parallel.pipeline.fitting import fitted
from mpidist.parallel.pipeline.schedule import ASCENDING, Action, Pass, Schedule
from mpidist.parallel.pipeline.timeline import Costs, best_of

__all__ = ["SCHEDULES", "dualpipev", "gpipe", "interleaved", "one_f_one_b", "zb_h1", "zbv"]


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
    return _by_ranks("gpipe", ranks, micro_batches, lambda _: micro_batches)


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
    return _by_ranks("1f1b", ranks, micro_batches, lambda rank: ranks - rank)


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

    def action(rank: int, kind: Pass, k: int) -> Action:
        """Return the k-th pass of a kind: `ranks` micro-batches through each chunk in turn."""
        round_, within = divmod(k, ranks * chunks)
        chunk, micro = divmod(within, ranks)
        chunk = chunk if kind is Pass.FORWARD else chunks - 1 - chunk
        return Action(chunk * ranks + rank, kind, round_ * ranks + micro)

    def actions(rank: int) -> Iterator[Action]:
        ahead = 2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1
        for kind, k in _in_turn(chunks * micro_batches, ahead):
            yield action(rank, kind, k)

    rank_of_stage = tuple(range(ranks)) * chunks
    return Schedule("interleaved", rank_of_stage, micro_batches, _of_ranks(ranks, actions))


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
        forward and both halves of backward take equally long, and there are as many micro-batches
        as ranks or more.

    Raises
    ------
    ScheduleError
        If a number is below 1.

    References
    ----------
    Qi, Wan, Huang, Lin (2024), Zero Bubble Pipeline Parallelism, section 2.1.
    """
    return _by_ranks("zb-h1", ranks, micro_batches, lambda rank: ranks - rank, lambda rank: rank)


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
    full = max(micro_batches, stages - 1)  # the rule needs so many; those that are not are left out

    def passes(rank: int) -> Iterator[tuple[int, Pass]]:
        down, up, after = rank, stages - 1 - rank, ranks - 1 - rank
        forward_up, backward_up = (up, Pass.FORWARD), _halves(up)
        forward_down, backward_down = (down, Pass.FORWARD), _halves(down)
        yield from [forward_down] * (2 * after + 1)
        yield from [forward_up, forward_down] * rank
        yield from [forward_up, *backward_up] * (after + 1)
        yield from [forward_down, *backward_down, forward_up, *backward_up] * (full - ranks)
        yield from [backward_down[0], backward_up[0]] * rank
        yield from [*backward_down] * (after + 1)
        yield from [backward_up[1]] * rank + [backward_down[1]] * rank

    by_rule = _v_shaped("zbv", ranks, micro_batches, passes)
    if micro_batches == full:
        return by_rule
    costs = Costs.unit(stages)
    greedy = fitted(by_rule.rank_of_stage, micro_batches, costs, limit=stages, name="zbv")
    return best_of([by_rule, greedy], costs)


def dualpipev(ranks: int, micro_batches: int) -> Schedule:
    """Return the schedule of two stages per rank that pairs passes of one stage with the other's.

    Parameters
    ----------
    ranks : int
        Stages `r` and ``2 * ranks - 1 - r`` are on rank `r`.
    micro_batches : int
        How many parts a batch is cut into; at least ``2 * ranks``.

    Returns
    -------
    Schedule
        Each rank keeps at most ``2 * ranks + 1`` contexts, of stages that are half as large as
        those of `zb_h1`. Bubble ``(ranks - 1) / (6 * micro_batches)``, as with `zbv`, with fewer
        backward passes cut into halves.

    Raises
    ------
    ScheduleError
        If a number is below 1, or `micro_batches` below ``2 * ranks``.

    Notes
    -----
    DualPipe overlaps the messages of a pass with the computation of the other of its pair; here
    they travel while a rank computes under every schedule, and the pair runs one after the other.

    References
    ----------
    DeepSeek-AI (2024), DeepSeek-V3 Technical Report, section 3.2.1: DualPipe. Sea AI Lab (2025),
    DualPipe could be better without the Dual: its V shape.
    """
    _check_positive("dualpipev", ranks=ranks, micro_batches=micro_batches)
    stages = 2 * ranks
    if micro_batches < stages:
        raise ScheduleError(
            f"schedule 'dualpipev': expected at least {stages} micro-batches, one for each stage, "
            f"got {micro_batches}; take {stages}"
        )

    def passes(rank: int) -> Iterator[tuple[int, Pass]]:
        down, up, after = rank, stages - 1 - rank, ranks - 1 - rank
        forward_up, backward_up = (up, Pass.FORWARD), (up, Pass.BACKWARD)
        forward_down, backward_down = (down, Pass.FORWARD), (down, Pass.BACKWARD)
        yield from [forward_down] * (2 * after)
        yield from [forward_down, forward_up] * (rank + 1)
        yield from [*_halves(up), forward_up] * after
        both = [forward_down, backward_up, forward_up, backward_down]
        yield from both * (micro_batches - stages + rank + 1)
        yield from [backward_up, forward_up, backward_down] * after
        # The second halves are put off from the middle of the last backward passes on.
        left = [up, down] * (rank + 1)
        yield from ((stage, Pass.BACKWARD) for stage in left[: rank + 1])
        put_off = deque(left[rank + 1 :])
        yield from ((stage, Pass.BACKWARD_INPUT) for stage in put_off)
        for _ in range(after):
            yield put_off.popleft(), Pass.BACKWARD_WEIGHT
            yield down, Pass.BACKWARD_INPUT
            put_off.append(down)
        yield from ((stage, Pass.BACKWARD_WEIGHT) for stage in put_off)

    return _v_shaped("dualpipev", ranks, micro_batches, passes)


SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zbv": zbv,
    "dualpipev": dualpipev,
}
"""By the name that a `Pipeline` takes."""


def _by_ranks(
    name: str,
    ranks: int,
    micro_batches: int,
    ahead: Callable[[int], int],
    delay: Callable[[int], int] | None = None,
) -> Schedule:
    """Return a schedule of one stage on each rank, which runs passes as `_in_turn` has them."""
    _check_positive(name, ranks=ranks, micro_batches=micro_batches)

    def actions(rank: int) -> Iterator[Action]:
        put_off = None if delay is None else delay(rank)
        for kind, micro in _in_turn(micro_batches, ahead(rank), put_off):
            yield Action(rank, kind, micro)

    return Schedule(name, tuple(range(ranks)), micro_batches, _of_ranks(ranks, actions))


def _in_turn(count: int, ahead: int, delay: int | None = None) -> Iterator[tuple[Pass, int]]:
    """Yield `ahead` forward passes, and then backward and forward passes in turn, with numbers.

    With a delay backward passes are cut into halves, and the second ones come so many passes later.
    """
    ahead = min(ahead, count)
    yield from ((Pass.FORWARD, k) for k in range(ahead))
    for k in range(count + (delay or 0)):
        if k < count:
            yield Pass.BACKWARD if delay is None else Pass.BACKWARD_INPUT, k
        if delay is not None and k >= delay:
            yield Pass.BACKWARD_WEIGHT, k - delay
        if k + ahead < count:
            yield Pass.FORWARD, k + ahead


def _v_shaped(
    name: str,
    ranks: int,
    micro_batches: int,
    passes: Callable[[int], Iterable[tuple[int, Pass]]],
) -> Schedule:
    """Return a schedule of passes of two stages on each rank, the last one on rank 0.

    Micro-batches are counted here; passes with those that there are not are left out.
    """

    def actions(rank: int) -> Iterator[Action]:
        numbers: Counter[tuple[int, tuple[Pass, ...]]] = Counter()
        for stage, kind in passes(rank):
            of_kind = [(stage, kinds) for kinds in ASCENDING if kind in kinds]
            if numbers[of_kind[0]] < micro_batches:
                yield Action(stage, kind, numbers[of_kind[0]])
            numbers.update(of_kind)

    rank_of_stage = (*range(ranks), *reversed(range(ranks)))
    return Schedule(name, rank_of_stage, micro_batches, _of_ranks(ranks, actions))


def _halves(stage: int) -> tuple[tuple[int, Pass], tuple[int, Pass]]:
    return (stage, Pass.BACKWARD_INPUT), (stage, Pass.BACKWARD_WEIGHT)


def _of_ranks(
    ranks: int, actions: Callable[[int], Iterable[Action]]
) -> tuple[tuple[Action, ...], ...]:
    return tuple(tuple(actions(rank)) for rank in range(ranks))


def _check_positive(name: str, **numbers: int) -> None:
    for what, number in numbers.items():
        if number < 1:
            raise ScheduleError(f"schedule '{name}': expected {what} of at least 1, got {number}")
