"""Run tests on real ranks from a plain `pytest`.

A test marked ``@pytest.mark.ranks(2, 3, 4)`` becomes one item per rank count. The outer pytest
starts one ``mpirun -n N python -m pytest --with-mpi`` per rank count, reads what every rank
reports, and shows each test as an item of its own. ``@pytest.mark.hosts(2, 4)`` does the
same on pretended hosts, with two ranks on each.

launcher
    Which mpirun, with which arguments and environment, and how to end a job with all it started.
hosts
    Pretended hosts: namespaces on this machine that nothing but a network connects.
records
    What one rank reports about one test, and how the reports of all ranks become one result.
job
    One mpirun: watched for deadlines, for ranks that differ, and for ranks that are gone.
plugin
    The pytest hooks of the outer run, and the fixture `world`.
child
    The pytest hooks inside a rank that `job` started.
direct
    The pytest hooks inside a rank that the user started: ``mpirun -n 4 pytest --with-mpi``.

[Note: the gate] A rank that fails early must not run on into the next test while the others still
wait in a collective of this one: its next collective would match theirs. So after each test every
rank writes its outcome into a small shared file and waits for the outcomes of all. Equal outcomes
open the gate. Different ones never do, and the outer run ends the job and starts the remaining
tests in a new one.
"""
