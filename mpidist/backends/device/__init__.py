"""Transports of device arrays: NCCL, and staging through host memory."""
