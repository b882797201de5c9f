"""Process groups: ranks, sub-groups, and the operations that are under way in a group."""

from mpidist.group.group import ProcessGroup

__all__ = ["ProcessGroup"]
