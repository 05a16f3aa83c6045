"""Published figures of ZeRO-Infinity and DeepSpeed beside what the cluster simulation computes.

    python benchmarks/published.py

The simulation is ``lightning_zinf/simulator``: its assumptions are at the top of ``strategies.py``, the sources of the
published numbers in ``published.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from lightning_zinf.simulator.published import figures, sensitivity


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="", help="write the results to this file")
    args = parser.parse_args()
    found = figures()
    group = ""
    for figure in found:
        if figure.group != group:
            group = figure.group
            print(f"\n{group:<52} {'published':>10} {'computed':>10}            error  source")
        bound = ">" if figure.least else " "
        print(
            f"  {figure.what:<50} {bound}{figure.published:>9.4g} {figure.computed:>10.4g} {figure.unit:<8} "
            f"{100 * figure.error:>+7.1f} %  {figure.source}{'' if figure.agrees else '  DISAGREES'}"
        )
    print("\nerrors of Fig. 5 in % with disks of")
    for text, errors in sensitivity().items():
        print(
            f"  {text:<17} "
            + ", ".join(f"{what.split(' on ')[0]}/{what.split()[-2]} {100 * e:+.1f}" for what, e in errors)
        )
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(f) for f in found], indent=1) + "\n")
    return 0 if all(f.agrees for f in found) else 1


if __name__ == "__main__":
    sys.exit(main())
