"""Observe a job: the flight recorder, the watch over waits with its reports, and named regions."""
