"""Counters of what moved."""
