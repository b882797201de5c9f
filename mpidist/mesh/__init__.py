"""Who owns which part of an array: meshes of ranks, placements, and the arrays placed on them."""

from __future__ import annotations

from mpidist.mesh.dtensor import DTensor
from mpidist.mesh.mesh import DeviceMesh
from mpidist.mesh.placements import Partial, Placement, Replicate, Shard, box_at

__all__ = ["DTensor", "DeviceMesh", "Partial", "Placement", "Replicate", "Shard", "box_at"]
