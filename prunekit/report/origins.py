"""On which machines and with which packages the numbers of a table came about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from prunekit.report.load import Result

PACKAGES = ("prunekit", "torch", "transformers", "peft", "datasets", "lm_eval")
"""On whose versions a number may hang."""


def origins(results: Sequence[Result]) -> list[str]:
    """Sentences on what the jobs were run on and with, and on what not all have in common; none for
    results that do not tell.
    """
    machines = Counter(filter(None, map(machine, results)))
    lines = []
    if len(machines) == 1:
        lines.append(f"Measured on {next(iter(machines))}.")
    elif machines:
        lines.append(
            f"Measured on {counted(machines)}: compare seconds, latencies and peaks of one machine."
        )
    for package in PACKAGES:
        found = Counter(filter(None, (version(r, package) for r in results)))
        if len(found) > 1:
            lines.append(
                f"Not all with the same {package} ({counted(found)}): numbers may differ by that."
            )
    return lines


def machine(result: Result) -> str | None:
    """The GPUs that a job could use, or its processor and how many threads."""
    hardware = result.record.get("provenance", {}).get("hardware", {})
    if not hardware:
        return None
    gpus = Counter(hardware["gpus"] if result.config["model"].get("device") != "cpu" else ())
    if gpus:
        return " and ".join(f"{n} x {name}" if n > 1 else name for name, n in gpus.items())
    threads = hardware["threads"]
    return f"{hardware['cpu']}, {threads} thread{'s' * (threads > 1)}"


def version(result: Result, package: str) -> str | None:
    """What was installed when the job ran."""
    found: str | None = result.record.get("provenance", {}).get("versions", {}).get(package)
    return found


def counted(found: Counter[str]) -> str:
    """`3 jobs: 5.22.0; 1 job: 5.23.0`."""
    return "; ".join(f"{n} job{'s' * (n > 1)}: {name}" for name, n in found.most_common())
