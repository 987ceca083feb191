"""What a sweep over ratios costs against one prune, in scoring time.

    python benchmarks/sweep.py                      # smollm2_135m
    python benchmarks/sweep.py model=tiny_llama exclude=none

Prints seconds of scoring and of the whole prune stage for one run without the cache and for eight
ratios with an empty one, and whether the cached and the uncached run of the last ratio kept the
same units with the same scores.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from prunekit.cli.compose import composed
from prunekit.runner.run import run

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
QUIET = ("eval=none", "track=silent", "save=false")


def once(folder: Path, words: list[str], ratio: float, cache: str) -> dict[str, Any]:
    """One run without evaluation."""
    (cfg,) = composed([*QUIET, *words, f"ratio.target={ratio}", f"cache={cache}"])
    return run(cfg, folder)


def main(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        os.environ["PRUNEKIT_CACHE"] = str(top / "cache")
        weights = Path.home() / ".cache" / "prunekit"  # converted models may stay where they are
        (top / "cache").mkdir()
        for entry in weights.iterdir() if weights.is_dir() else ():
            if entry.name != "results":
                (top / "cache" / entry.name).symlink_to(entry)
        once(top / "warm", words, RATIOS[-1], "off")  # libraries load and compile what they compile
        single = once(top / "one", words, RATIOS[-1], "off")
        sweep = [once(top / str(ratio), words, ratio, "on") for ratio in RATIOS]
        same = all(sweep[-1][k] == single[k] for k in ("importance", "kept", "results"))
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"{' '.join(words) or 'smollm2_135m'}"
    )
    for stage in ("score", "prune"):
        one = single["stages"][stage]["seconds"]
        each = [r["stages"][stage]["seconds"] for r in sweep]
        print(
            f"{stage:6s} one run {one:7.2f} s   eight ratios {sum(each):7.2f} s = "
            f"{sum(each) / one:.2f} x"
        )
        print(f"       each {[round(s, 2) for s in each]}")
    print(f"same scores and units with and without the cache: {same}")


if __name__ == "__main__":
    main(sys.argv[1:])
