"""The transport between threads of one process, with injected faults."""
