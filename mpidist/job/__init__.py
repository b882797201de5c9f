"""The start and the end of a job: launch, exit hooks, and processes forked from a rank."""
