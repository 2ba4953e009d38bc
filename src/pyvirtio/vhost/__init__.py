"""Queues that the kernel serves."""
