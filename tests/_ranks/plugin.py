"""The pytest hooks of the outer run: one item per rank count, each answered by a job."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from _pytest._code.code import ReprFileLocation, TerminalRepr

from tests._ranks.direct import DirectPlugin, Ranks, deadline_of, ranks_of
from tests._ranks.records import Outcome, Result

# `hosts`, `job` and `launcher` are imported where a job starts: a run of one unit test starts none.
if TYPE_CHECKING:
    from _pytest._io import TerminalWriter

    from mpidist.group import ProcessGroup
    from tests._ranks.hosts import HostPool
    from tests._ranks.job import Job, Launch

NO_MPIRUN = "no mpirun: pip install 'mpidist[mpich]', or load the cluster's MPI"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the deadlines of a test on ranks."""
    parser.addini(
        "ranks_timeout", "seconds for a test on ranks without a timeout mark", default="60"
    )
    parser.addini("ranks_grace", "seconds to end a test that failed on another rank", default="10")
    parser.addini("leftover_runs", "jobs of tests/test_leftovers.py", default="6")
    parser.addini("deaths_sizes", "numbers of ranks for all of tests/deaths", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks and, in the outer run, whatever starts jobs."""
    config.addinivalue_line(
        "markers",
        "ranks(*counts, full=()): run the test on that many real ranks, one item per count; "
        "on the counts of `full` with --full only",
    )
    config.addinivalue_line(
        "markers", "hosts(*counts, ranks=2): run it on that many pretended hosts, of 2 ranks each"
    )
    config.addinivalue_line("markers", "mpirun: the test starts mpirun itself; see fixture mpirun")
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): the deadline of a test on ranks")
    if not _on_ranks(config):
        config.pluginmanager.register(OuterPlugin(config), "ranks-outer")
        return
    from tests._ranks.launcher import MARK

    if MARK not in os.environ:
        config.pluginmanager.register(DirectPlugin(), "ranks-direct")


def _on_ranks(config: pytest.Config) -> bool:
    """Whether this pytest was itself started by mpirun, as pytest-mpi's options say."""
    return bool(config.getoption("with_mpi", False) or config.getoption("only_mpi", False))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail, tests that start mpirun themselves where there is none."""
    if item.get_closest_marker("mpirun") is None:
        return
    from tests._ranks.launcher import find_mpirun

    if find_mpirun() is None:
        if mpirun_is_required():
            pytest.fail(NO_MPIRUN, pytrace=False)
        raise pytest.skip.Exception(NO_MPIRUN, _use_item_location=True)


def mpirun_is_required() -> bool:
    """Whether a missing mpirun is a failure; set by .ci/run."""
    return os.environ.get("MPIDIST_TEST_REQUIRE_MPI") == "1"


def hosts_are_required() -> bool:
    """Whether it is a failure that there can be no pretended hosts; set by .ci/run."""
    return os.environ.get("MPIDIST_TEST_REQUIRE_HOSTS") == "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one item per rank count, and per number of hosts."""
    asked: dict[str, Any] = {}
    if mark := metafunc.definition.get_closest_marker("ranks"):
        asked |= {f"{n}ranks": Ranks(n) for n in _counts(metafunc, mark)}
        for n in mark.kwargs.get("full", ()):
            asked[f"{n}ranks"] = pytest.param(Ranks(n), marks=pytest.mark.full)
    if mark := metafunc.definition.get_closest_marker("hosts"):
        on_each = mark.kwargs.get("ranks", 2)
        asked |= {f"{n}hosts": Ranks(n * on_each, hosts=n) for n in _counts(metafunc, mark)}
    if asked:
        if "rank_count" not in metafunc.fixturenames:
            metafunc.fixturenames.append("rank_count")
        metafunc.parametrize("rank_count", asked.values(), ids=asked.keys(), indirect=True)


def _counts(metafunc: pytest.Metafunc, mark: pytest.Mark) -> tuple[int, ...]:
    if not mark.args or not all(isinstance(n, int) and n > 0 for n in mark.args):
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: {mark.name}() takes positive counts, got {mark.args}"
        )
    return mark.args


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On ranks, give the tests on ranks the mark by which pytest-mpi knows them."""
    if _on_ranks(config):
        for item in items:
            if ranks_of(item) is not None:
                item.add_marker(pytest.mark.mpi)


@pytest.fixture(scope="session")
def mpirun() -> list[str]:
    """The start of an mpirun command line, for a test marked ``mpirun``."""
    from tests._ranks.launcher import find_mpirun, vendor_arguments

    found = find_mpirun()
    assert found is not None, "mark the test: @pytest.mark.mpirun"
    return [str(found), *vendor_arguments(found)]


@pytest.fixture(scope="session")
def hosts_mpirun(request: pytest.FixtureRequest) -> Callable[[int, int], list[str]]:
    """The start of an mpirun command line for so many hosts, and ranks on each: (2, 2)."""
    from tests._ranks.hosts import HostsUnavailableError

    runner = request.config.pluginmanager.get_plugin("ranks-outer")
    assert isinstance(runner, OuterPlugin), "mark the test: @pytest.mark.mpirun"

    def start(hosts: int, ranks: int) -> list[str]:
        try:
            return runner.hosts.of(hosts).mpirun(ranks)
        except HostsUnavailableError as error:
            if hosts_are_required():
                pytest.fail(str(error), pytrace=False)
            pytest.skip(str(error))

    return start


@pytest.fixture
def rank_count(request: pytest.FixtureRequest) -> int:
    """The number of ranks that the test was asked to run on."""
    if not hasattr(request, "param"):
        pytest.fail("this test needs a mark: @pytest.mark.ranks(2, 3, 4)")
    ranks: Ranks = request.param
    return ranks.count


@pytest.fixture
def world(request: pytest.FixtureRequest, rank_count: int) -> Iterator[ProcessGroup]:
    """All ranks of the job as a group of this test's own."""
    import mpidist

    ranks = ranks_of(request.node)
    with mpidist.init() as group:
        if group.size != rank_count:
            pytest.fail(f"expected a group of {rank_count} ranks, got {group.size}")
        if ranks is not None and ranks.hosts not in (0, group.num_nodes):
            pytest.fail(f"expected a group on {ranks.hosts} hosts, got {group.num_nodes}")
        yield group


class RanksFailedError(Exception):
    """A test failed on ranks; carries the result to show."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.message)
        self.result = result


class _RanksRepr(TerminalRepr):
    """What pytest shows of a test that failed on ranks."""

    def __init__(self, result: Result, location: tuple[str, int]) -> None:
        self._text = result.text
        self.reprcrash = ReprFileLocation(location[0], location[1], result.message)

    def toterminal(self, tw: TerminalWriter) -> None:
        tw.line(self._text)


class RanksItem(pytest.Item):
    """A test that runs elsewhere, on ranks; stands where the test function stood."""

    def __init__(self, *, function: pytest.Function, ranks: Ranks, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ranks = ranks
        self.obj = function.obj
        self.own_markers = list(function.own_markers)
        self.keywords.update(function.keywords)
        self.extra_keyword_matches.update(function.extra_keyword_matches)
        self.deadline = deadline_of(function)
        # Not `duration`: pytest takes whatever has one for a report, deselected items too.
        self.seconds: float | None = None
        self._place = function.reportinfo()
        # pytest-timeout would count the whole job's time as this item's.
        self.add_marker(pytest.mark.timeout(0), append=False)

    def runtest(self) -> None:
        """Wait for the ranks' result and take it over."""
        runner = self.config.pluginmanager.get_plugin("ranks-outer")
        assert isinstance(runner, OuterPlugin)
        result = runner.result(self)
        self.seconds = result.duration
        for title, content in result.sections:
            self.add_report_section("call", title, content)
        if result.outcome is Outcome.FAILED:
            raise RanksFailedError(result)
        if result.outcome is Outcome.XFAILED:
            pytest.xfail(result.message)
        if result.outcome is Outcome.SKIPPED:
            raise pytest.skip.Exception(result.message, _use_item_location=True)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:  # type: ignore[override]
        """Show the ranks' tracebacks instead of this plugin's."""
        if isinstance(excinfo.value, RanksFailedError):
            return _RanksRepr(
                excinfo.value.result, (str(self._place[0]), (self._place[1] or 0) + 1)
            )
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        """Return the place of the test function."""
        return self._place


class OuterPlugin:
    """Put a RanksItem in the place of each test on ranks, and run the jobs that answer them."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._hosts: HostPool | None = None
        self._plan: dict[Ranks, dict[str, float]] = {}
        self._modules: dict[Ranks, list[Path]] = {}
        self._results: dict[str, Result] = {}
        self._job: Job | None = None
        self._launch: Launch | None = None

    @property
    def hosts(self) -> HostPool:
        """The pretended hosts of this run."""
        if self._hosts is None:
            from tests._ranks.hosts import HostPool

            self._hosts = HostPool()
        return self._hosts

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Swap the items, and bring those of the same ranks together, at the end."""
        items[:] = [_swapped(item) for item in items]
        first_of = {item.path: index for index, item in reversed(list(enumerate(items)))}
        items.sort(key=lambda item: (getattr(item, "ranks", Ranks(0)), first_of[item.path]))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note which tests were selected: no others are run on the ranks."""
        for item in session.items:
            if isinstance(item, RanksItem):
                self._plan.setdefault(item.ranks, {})[item.nodeid] = item.deadline
                modules = self._modules.setdefault(item.ranks, [])
                if item.path not in modules:
                    modules.append(item.path)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Report the time a test took on the ranks, not the time its job took."""
        report = yield
        if isinstance(item, RanksItem) and call.when == "call" and item.seconds is not None:
            report.duration = item.seconds
        return report

    def pytest_unconfigure(self) -> None:
        """End a job that an interrupted run left behind."""
        if self._job is not None:
            self._job.close()
        if self._launch is not None:
            shutil.rmtree(self._launch.directory, ignore_errors=True)
        if self._hosts is not None:
            self._hosts.close()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say if the network between hosts was not what the tests asked for."""
        if self._hosts is not None and self._hosts.without_rate:
            terminalreporter.write_line(f"hosts without a limited rate: {self._hosts.without_rate}")

    def result(self, item: RanksItem) -> Result:
        """Return the item's result, starting and watching jobs until there is one."""
        if self._launch is None:
            from tests._ranks.launcher import find_mpirun

            mpirun = find_mpirun()
            if mpirun is None:
                return _without_mpirun()
            self._launch = self._make_launch(mpirun)
        try:
            while item.nodeid not in self._results:
                self._advance(self._launch, item)
        except BaseException:
            if self._job is not None:
                self._job.close()
            raise
        return self._results[item.nodeid]

    def _advance(self, launch: Launch, item: RanksItem) -> None:
        from tests._ranks.hosts import HostsUnavailableError
        from tests._ranks.job import Job

        if self._job is None or self._job.ended:
            plan = self._plan[item.ranks]
            left = {test: t for test, t in plan.items() if test not in self._results}
            try:
                modules = self._modules[item.ranks]
                self._job = Job(launch, modules, ranks=item.ranks, deadlines=left)
            except HostsUnavailableError as error:
                self._results.update(dict.fromkeys(left, _without_hosts(str(error))))
                return
        new = self._job.watch()
        self._results.update(new)
        if self._job.ended and not self._job.began:
            # Starting it again for every test would fail as often, and slowly.
            (why,) = new.values()
            for test in self._plan[item.ranks]:
                self._results.setdefault(test, why)

    def _make_launch(self, mpirun: Path) -> Launch:
        from tests._ranks.job import Launch
        from tests._ranks.launcher import vendor_arguments

        config = self._config
        arguments = ["--with-mpi", "--rootdir", str(config.rootpath), "--capture=tee-sys"]
        if config.inipath is not None:
            arguments += ["-c", str(config.inipath)]
        arguments += [f"--import-mode={config.getoption('importmode')}"]
        arguments += [f"--tb={config.getoption('tbstyle')}", "-q", "--no-header", "--no-summary"]
        arguments += ["-p", "no:cacheprovider", "-o", "addopts="]
        arguments += ["--full"] if config.getoption("full", default=False) else []
        directory = Path(tempfile.mkdtemp(prefix="mpidist-tests-"))
        here = [str(mpirun), *vendor_arguments(mpirun)]

        def start(ranks: Ranks) -> list[str]:
            if not ranks.hosts:
                return here
            return self.hosts.of(ranks.hosts).mpirun(ranks.count // ranks.hosts)

        return Launch(
            mpirun=start,
            pytest_arguments=arguments,
            directory=directory,
            grace=float(config.getini("ranks_grace")),
        )


def _swapped(item: pytest.Item) -> pytest.Item:
    ranks = ranks_of(item)
    if ranks is None or item.parent is None or not isinstance(item, pytest.Function):
        return item
    swapped: RanksItem = RanksItem.from_parent(
        item.parent, name=item.name, function=item, ranks=ranks
    )
    return swapped


def _without_mpirun() -> Result:
    outcome = Outcome.FAILED if mpirun_is_required() else Outcome.SKIPPED
    return Result(outcome, NO_MPIRUN, NO_MPIRUN)


def _without_hosts(why: str) -> Result:
    return Result(Outcome.FAILED if hosts_are_required() else Outcome.SKIPPED, why, why)
