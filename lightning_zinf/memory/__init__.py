"""Tiers: slots, staging, NVMe files, and the rule of what goes where."""
