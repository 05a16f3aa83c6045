"""A user's script, for test_processes.py: strategy and folder are its arguments."""

from __future__ import annotations

import sys
from pathlib import Path

import contracts

if __name__ == "__main__":
    contracts.script(sys.argv[1], Path(sys.argv[2]))
