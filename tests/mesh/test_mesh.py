"""Meshes: who is where, which groups are made and when, and what is refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import mpidist
from mpidist import DeviceMesh
from mpidist.errors import (
    CollectiveTimeoutError,
    InvalidRankError,
    InvalidWorldSizeError,
    UnsupportedOperationError,
)
from mpidist.testing import run_ranks


def test_ranks_stand_in_row_major_order():
    def body(group):
        mesh = DeviceMesh(group, dp=2, tp=-1)
        assert (mesh.names, mesh.sizes, mesh.ndim, mesh.size) == (("dp", "tp"), (2, 2), 2, 4)
        assert [mesh.rank_at(i, j) for i in range(2) for j in range(2)] == [0, 1, 2, 3]
        assert [mesh.coordinate_of(rank) for rank in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert mesh.coordinate == mesh.coordinate_of(group.rank)
        assert mesh.rank_at(np.int64(1), 0) == 2
        assert type(mesh.sizes[0]) is type(mesh.rank_at(0, 0)) is type(mesh.coordinate[0]) is int

    run_ranks(4, body)


def test_sub_meshes_go_through_this_rank_in_the_order_asked_for():
    def body(group):
        mesh = DeviceMesh(group, dp=2, pp=1, tp=3)
        grid = np.arange(6).reshape(2, 1, 3)
        i, _, k = mesh.coordinate
        assert mesh["tp"].ranks == tuple(grid[i, 0])
        assert mesh["dp"].ranks == tuple(grid[:, 0, k])
        assert mesh["pp"].ranks == (group.rank,)
        turned = mesh["tp", "dp"]
        assert turned.ranks == tuple(grid[:, 0].T.ravel())
        assert (turned.names, turned.sizes, turned.coordinate) == (("tp", "dp"), (3, 2), (k, i))
        assert turned["dp"].ranks == mesh["dp"].ranks
        assert mesh["dp", "pp", "tp"].ranks == tuple(range(6))
        assert mesh["pp"]["pp"].coordinate == (0,)

    run_ranks(6, body)


@pytest.mark.parametrize("size", [1, 4])
def test_a_group_is_made_when_it_is_asked_for_and_once(size):
    def body(group):
        with DeviceMesh(group, dp=-1, tp=min(size, 2)) as mesh:
            before = group.operations.begun
            assert mesh.group is group  # the same ranks in the same order
            assert mesh["dp", "tp"].group is group
            sub, turned = mesh["tp"], mesh["tp", "dp"]
            assert group.operations.begun == before
            assert sub.group is mesh["tp"].group is mesh["dp", "tp"]["tp"].group
            assert sub.group.ranks == sub.ranks
            assert turned.group.ranks == turned.ranks
            total = mpidist.all_reduce(np.array(group.rank), sub.group)
            assert total == sum(sub.ranks)
            made = sub.group
        assert mpidist.all_reduce(np.array(1), group) == size  # still open
        if size > 1:
            assert made.name == "mesh/tp"
            with pytest.raises(mpidist.GroupBrokenError, match="closed"):
                mpidist.barrier(made)

    run_ranks(size, body)


def test_a_group_that_one_rank_asks_for_is_named_by_its_mesh():
    def body(group):
        mesh = DeviceMesh(group, dp=2, tp=2)
        if group.rank == 0:
            with pytest.raises(
                CollectiveTimeoutError,
                match=r"new_group\(\[0, 2\]\) of mesh/dp #1 on group 'world'",
            ):
                _ = mesh["dp"].group

    run_ranks(4, body, timeout=0.5)


def test_a_mesh_of_a_sub_group_counts_its_ranks():
    def body(group):
        odd = group.split(group.rank % 2)
        mesh = DeviceMesh(odd, a=2)
        assert mesh.ranks == (0, 1)
        assert [odd.ranks[mesh.rank_at(i)] for i in range(2)] == [
            group.rank % 2,
            group.rank % 2 + 2,
        ]
        odd.close()

    run_ranks(4, body)


def test_by_node_has_a_row_for_each_node():
    def body(group):
        mesh = DeviceMesh.by_node(group)
        assert (mesh.names, mesh.sizes) == (("replicate", "shard"), (3, 2))
        assert mesh.across_nodes == ("replicate",)
        assert mesh["shard"].ranks == (group.rank // 2 * 2, group.rank // 2 * 2 + 1)
        assert mesh["shard"].across_nodes == ()
        other = group.new_group([5, 2, 4, 3])
        if other is not None:
            # Members of a node need not be neighbours: nodes are counted by their first ranks.
            apart = DeviceMesh.by_node(other, across="dp", inside="tp")
            assert apart.ranks == (0, 2, 1, 3)
            assert apart["tp"].group.num_nodes == 1
            apart.close()
            other.close()

    run_ranks(6, body, ranks_per_node=2)


def test_by_node_refuses_nodes_of_different_sizes_by_name():
    def body(group):
        with pytest.raises(InvalidWorldSizeError) as info:
            DeviceMesh.by_node(group)
        return str(info.value)

    for rank, message in enumerate(run_ranks(5, body, ranks_per_node=3)):
        assert message == (
            f"DeviceMesh.by_node on group 'world', rank {rank} of 5: the nodes must have equally "
            "many ranks; node 0 has 3 of the group and node 1 has 2 (rank 3, 4). Start as many on "
            "each, or make the group of equally many with new_group"
        )


def test_a_mesh_says_what_crosses_nodes(caplog):
    caplog.set_level(logging.INFO, "mpidist")

    def body(group):
        mesh = DeviceMesh(group, tp=2, dp=2)
        DeviceMesh(group, dp=2, tp=2)
        return repr(mesh), repr(mesh["dp"])

    meshes = run_ranks(4, body, ranks_per_node=2)
    assert meshes[3] == (
        "DeviceMesh(tp=2 across nodes, dp=2) of group 'world', rank 3 of 4, at (1, 1)",
        "DeviceMesh(dp=2) of group 'world', rank 3 of 4, at (1,)",
    )
    lines = [record.getMessage() for record in caplog.records if "tensor" in record.getMessage()]
    assert len(lines) == 1  # of rank 0, and not of the mesh whose tp stays on a node
    assert "DeviceMesh(tp=2 across nodes, dp=2)" in lines[0]
    assert "make tp the last dimension" in lines[0]


NOT_SIZES = [
    {"dp": 0},
    {"dp": -2, "tp": -2},
    {"dp": -1, "tp": -1},
    {"dp": True, "tp": 4},
    {"dp": 2.0, "tp": 2},
    {"dp": "4"},
    {"dp": None},
]


@pytest.mark.parametrize("sizes", NOT_SIZES, ids=str)
def test_sizes_are_positive_numbers_of_which_one_may_be_left_open(sizes):
    def body(group):
        with pytest.raises(UnsupportedOperationError, match=r"rank 1 of 2: .*may be -1.*got dp="):
            DeviceMesh(group, **sizes)

    run_ranks(2, lambda group: body(group) if group.rank else None)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dp": 3}, r"has 4 ranks\. Expected 3 ranks for dp=3; start as many, or give one size as"),
        ({"dp": 2, "tp": 4}, "has 4 ranks. Expected 8 ranks for dp=2, tp=4; "),
        ({"dp": 2}, "Expected 2 ranks for dp=2"),
        ({"dp": -1, "tp": 3}, "Expected a multiple of 3 ranks for dp=-1, tp=3; start as many$"),
        ({"dp": -1, "tp": 8}, "a multiple of 8 ranks"),
        ({"dp": 2**70}, f"Expected {2**70} ranks"),
    ],
    ids=str,
)
def test_sizes_make_up_the_group(sizes, message):
    def body(group):
        with pytest.raises(InvalidWorldSizeError, match=message):
            DeviceMesh(group, **sizes)

    run_ranks(4, body)


def test_names_are_identifiers_and_come_once():
    def body(group):
        for sizes in ({}, {"d p": 1}, {"": 1}, {"a/b": 1}):
            with pytest.raises(UnsupportedOperationError, match="a name for each dimension"):
                DeviceMesh(group, **sizes)
        with pytest.raises(UnsupportedOperationError, match=r"by_node on .*the same.*'a', 'a'"):
            DeviceMesh.by_node(group, across="a", inside="a")
        mesh = DeviceMesh(group, group=1, self=1)  # whatever a dimension is called
        for names in ("dp", ("group", "group"), (), ("group", 0), 0, ["group"], slice(None)):
            with pytest.raises(UnsupportedOperationError, match=r"names group, self, each once"):
                mesh[names]

    run_ranks(1, body)


def test_a_rank_outside_is_refused():
    def body(group):
        mesh = DeviceMesh(group, dp=2, tp=2)
        for rank in (4, -1, True, 1.0, 2**70, None):
            with pytest.raises(InvalidRankError, match=r"\(dp=2, tp=2\) has .* \[0, 1, 2, 3\]"):
                mesh.coordinate_of(rank)
        with pytest.raises(InvalidRankError, match=r"mesh \(tp=2\) has the ranks .* got "):
            mesh["tp"].coordinate_of((group.rank + 2) % 4)
        for coordinate in ((2, 0), (0, -1), (0,), (0, 0, 0), (True, 0), (0.0, 0), (0, 2**70)):
            with pytest.raises(InvalidRankError, match=r"one index per dimension.*below \(2, 2\)"):
                mesh.rank_at(*coordinate)

    run_ranks(4, body)


def test_a_mesh_is_made_of_a_group():
    for not_a_group in (None, 4, "world"):
        with pytest.raises(UnsupportedOperationError, match="DeviceMesh: the group must be"):
            DeviceMesh(not_a_group, dp=2)
