"""Benchmarks of kvmpy against the same work in C. Never shipped: run from a checkout."""
