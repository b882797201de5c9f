"""The pytest hooks of the outer run: one item per rank count, each answered by a job."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from _pytest._code.code import ReprFileLocation, TerminalRepr

from tests._ranks.direct import DirectPlugin, deadline_of, rank_count_of
from tests._ranks.job import Job, Launch
from tests._ranks.launcher import MARK, find_mpirun, vendor_arguments
from tests._ranks.records import Outcome, Result

if TYPE_CHECKING:
    from _pytest._io import TerminalWriter

    from mpidist.group import ProcessGroup

NO_MPIRUN = "no mpirun: pip install 'mpidist[mpich]', or load the cluster's MPI"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the deadlines of a test on ranks."""
    parser.addini(
        "ranks_timeout", "seconds for a test on ranks without a timeout mark", default="60"
    )
    parser.addini("ranks_grace", "seconds to end a test that failed on another rank", default="10")
    parser.addini("leftover_runs", "jobs of tests/test_leftovers.py", default="6")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks and, in the outer run, whatever starts jobs."""
    config.addinivalue_line(
        "markers", "ranks(*counts): run the test on that many real ranks, one item per count"
    )
    config.addinivalue_line("markers", "mpirun: the test starts mpirun itself; see fixture mpirun")
    config.addinivalue_line(
        "markers", "any_mpi: it is not about the MPI library, and CI runs it under one of them only"
    )
    config.addinivalue_line(
        "markers", "one_python: it is long, and CI runs it under one version of Python only"
    )
    config.addinivalue_line("markers", "slurm: the test submits jobs to a Slurm of its own")
    config.addinivalue_line("markers", "gpu: the test needs a GPU and cupy")
    config.addinivalue_line("markers", "cupy: the test needs the wheel of CuPy, but no GPU")
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): the deadline of a test on ranks")
    if not _on_ranks(config):
        config.pluginmanager.register(OuterPlugin(config), "ranks-outer")
    elif MARK not in os.environ:
        config.pluginmanager.register(DirectPlugin(), "ranks-direct")


def _on_ranks(config: pytest.Config) -> bool:
    """Whether this pytest was itself started by mpirun, as pytest-mpi's options say."""
    return bool(config.getoption("with_mpi", False) or config.getoption("only_mpi", False))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail, tests that start mpirun themselves where there is none."""
    if item.get_closest_marker("mpirun") is not None and find_mpirun() is None:
        if mpirun_is_required():
            pytest.fail(NO_MPIRUN, pytrace=False)
        raise pytest.skip.Exception(NO_MPIRUN, _use_item_location=True)


def mpirun_is_required() -> bool:
    """Whether a missing mpirun is a failure; set by .ci/run."""
    return os.environ.get("MPIDIST_TEST_REQUIRE_MPI") == "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one item per rank count."""
    mark = metafunc.definition.get_closest_marker("ranks")
    if mark is not None:
        if not mark.args or not all(isinstance(n, int) and n > 0 for n in mark.args):
            raise pytest.UsageError(
                f"{metafunc.definition.nodeid}: ranks() takes positive rank counts, got {mark.args}"
            )
        if "rank_count" not in metafunc.fixturenames:
            metafunc.fixturenames.append("rank_count")
        ids = [f"{n}ranks" for n in mark.args]
        metafunc.parametrize("rank_count", mark.args, ids=ids, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On ranks, give the tests on ranks the mark by which pytest-mpi knows them."""
    if _on_ranks(config):
        for item in items:
            if rank_count_of(item) is not None:
                item.add_marker(pytest.mark.mpi)


@pytest.fixture(scope="session")
def mpirun() -> list[str]:
    """The start of an mpirun command line, for a test marked ``mpirun``."""
    found = find_mpirun()
    assert found is not None, "mark the test: @pytest.mark.mpirun"
    return [str(found), *vendor_arguments(found)]


@pytest.fixture
def rank_count(request: pytest.FixtureRequest) -> int:
    """The number of ranks that the test was asked to run on."""
    if not hasattr(request, "param"):
        pytest.fail("this test needs a mark: @pytest.mark.ranks(2, 3, 4)")
    count: int = request.param
    return count


@pytest.fixture
def world(rank_count: int) -> Iterator[ProcessGroup]:
    """All ranks of the job as a group of this test's own."""
    import mpidist

    with mpidist.init() as group:
        if group.size != rank_count:
            pytest.fail(f"expected a group of {rank_count} ranks, got {group.size}")
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

    def __init__(self, *, function: pytest.Function, count: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count = count
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
        self._plan: dict[tuple[Path, int], dict[str, float]] = {}
        self._results: dict[str, Result] = {}
        self._job: Job | None = None
        self._launch: Launch | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Swap the items, and bring those of one module and rank count together."""
        items[:] = [_swapped(item) for item in items]
        first_of = {item.path: index for index, item in reversed(list(enumerate(items)))}
        items.sort(key=lambda item: (first_of[item.path], getattr(item, "count", 0)))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note which tests were selected: no others are run on the ranks."""
        for item in session.items:
            if isinstance(item, RanksItem):
                group = self._plan.setdefault((item.path, item.count), {})
                group[item.nodeid] = item.deadline

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

    def result(self, item: RanksItem) -> Result:
        """Return the item's result, starting and watching jobs until there is one."""
        if self._launch is None:
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
        if self._job is None or self._job.ended:
            group = self._plan[item.path, item.count]
            left = {test: t for test, t in group.items() if test not in self._results}
            self._job = Job(launch, item.path, size=item.count, deadlines=left)
        new = self._job.watch()
        self._results.update(new)
        if self._job.ended and not self._job.began:
            # Starting it again for every test of the module would fail as often, and slowly.
            (why,) = new.values()
            for test in self._plan[item.path, item.count]:
                self._results.setdefault(test, why)

    def _make_launch(self, mpirun: Path) -> Launch:
        config = self._config
        arguments = ["--with-mpi", "--rootdir", str(config.rootpath), "--capture=tee-sys"]
        if config.inipath is not None:
            arguments += ["-c", str(config.inipath)]
        arguments += [f"--import-mode={config.getoption('importmode')}"]
        arguments += [f"--tb={config.getoption('tbstyle')}", "-q", "--no-header", "--no-summary"]
        arguments += ["-p", "no:cacheprovider", "-o", "addopts="]
        directory = Path(tempfile.mkdtemp(prefix="mpidist-tests-"))
        return Launch(
            mpirun=mpirun,
            vendor_arguments=vendor_arguments(mpirun),
            pytest_arguments=arguments,
            directory=directory,
            grace=float(config.getini("ranks_grace")),
        )


def _swapped(item: pytest.Item) -> pytest.Item:
    count = rank_count_of(item)
    if count is None or item.parent is None or not isinstance(item, pytest.Function):
        return item
    swapped: RanksItem = RanksItem.from_parent(
        item.parent, name=item.name, function=item, count=count
    )
    return swapped


def _without_mpirun() -> Result:
    outcome = Outcome.FAILED if mpirun_is_required() else Outcome.SKIPPED
    return Result(outcome, NO_MPIRUN, NO_MPIRUN)
