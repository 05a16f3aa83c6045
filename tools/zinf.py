#!/usr/bin/env python3
"""The ``zinf`` command for a checkout that is not installed: ``python tools/zinf.py verify last.ckpt``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lightning_zinf.cli import main  # found only now

if __name__ == "__main__":
    sys.exit(main())
