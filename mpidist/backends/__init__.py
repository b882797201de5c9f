"""Transports: one contract, several ways to move bytes between ranks."""
