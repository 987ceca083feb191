"""Weights & Biases, and the only file that imports it: a session that no failure of the service can
turn into a lost result.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from prunekit.errors import ConfigError
from prunekit.runner.distributed import first_process

log = logging.getLogger(__name__)

Mode = Literal["offline", "wandb", "silent"]
INIT_SECONDS = 30
"""How long a server may take to answer before the run goes on offline (wandb waits 90 s by
default).
"""
FINISH_SECONDS = 120
"""How long the end of a run may wait for uploads (wandb waits forever by default); what is left
stays on disk for `wandb sync`.
"""


class Track:
    """Where a run's numbers go besides its result file. This one, for `silent` and for all but the
    first process, drops them.
    """

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers, at a step of their own or at the next one."""

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table, one value a column in each row."""

    def artifact(self, name: str, files: Iterable[Path | str]) -> None:
        """Files kept with the run; those that do not exist are named in a warning."""


class WandbTrack(Track):
    """A live wandb run; whatever wandb raises in it becomes a warning."""

    def __init__(self, run: Any):
        self._run = run

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        _warned("log", lambda: self._run.log(dict(metrics), step=step))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        import wandb

        _warned(
            "table",
            lambda: self._run.log(
                {name: wandb.Table(columns=list(columns), data=[list(r) for r in rows])}
            ),
        )

    def artifact(self, name: str, files: Iterable[Path | str]) -> None:
        import wandb

        def send() -> None:
            # W&B takes letters, digits, `-`, `_` and `.` in an artifact's name.
            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type="prunekit")
            for file in map(Path, files):
                if file.is_file():
                    artifact.add_file(str(file))
                else:
                    log.warning("wandb artifact %s: %s is not a file", name, file)
            self._run.log_artifact(artifact)

        _warned("artifact", send)


OPTIONS = {
    "mode": Literal["offline", "wandb", "silent"],
    "project": str,
    "group": str | None,
    "name": str | None,
    "tags": list[str],
}
"""What `track` of a configuration may say."""


@contextmanager
def open_track(
    mode: Mode = "offline",
    *,
    config: Mapping[str, Any],
    folder: Path | str,
    project: str = "prunekit",
    group: str | None = None,
    name: str | None = None,
    tags: Sequence[str] = (),
) -> Iterator[Track]:
    """A session that is closed whatever happens inside, as failed if something was raised.

    `offline` writes a real wandb run into `folder/wandb` without a connection (`wandb sync` sends
    it later), `wandb` talks to the server that WANDB_BASE_URL or the login names, `silent` keeps
    nothing. Where the server is down or nobody is logged in, a warning says so and the run goes on
    offline. Under several processes (RANK) only the first one tracks. Raises ConfigError for
    another mode.
    """
    if mode not in ("offline", "wandb", "silent"):
        raise ConfigError(f"track.mode={mode!r}; possible: offline, wandb, silent")
    if mode == "silent" or not first_process():
        yield Track()
        return
    options = {
        "project": project,
        "group": group,
        "name": name,
        "tags": list(tags),
        "config": dict(config),
        "dir": str(folder),
    }
    run = _start(mode, options)
    code = 1
    try:
        yield WandbTrack(run) if run is not None else Track()
        code = 0
    finally:
        if run is not None:
            _warned("finish", lambda: run.finish(exit_code=code))


def _start(mode: Mode, options: dict[str, Any]) -> Any:
    """A wandb run in the asked mode, else offline, else None."""
    import wandb

    Path(options["dir"]).mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        silent=True,
        console="off",  # Hydra and the runner own the terminal and the log file
        init_timeout=INIT_SECONDS,
        # a question for a key on the terminal must not hold up a batch job for ever
        login_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
    )
    # A sweep runs job after job in one process: each opens a run of its own.
    start = {"settings": settings, "reinit": "create_new", **options}
    run = None
    if mode == "wandb":
        run = _warned("init, going on offline", lambda: wandb.init(mode="online", **start))
    return run or _warned("init, going on without", lambda: wandb.init(mode="offline", **start))


def _warned(doing: str, act: Callable[[], Any]) -> Any:
    """What `act` returns; None and a warning if wandb fails at it.

    wandb's own errors, those of the network, the disk and a killed background process (OSErrors,
    all of them), and the two that waiting on that process can end in, which have no common base.
    """
    import wandb
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    try:
        return act()
    except (wandb.Error, OSError, MailboxClosedError, HandleAbandonedError) as e:
        log.warning("wandb %s: %s: %s", doing, type(e).__name__, " ".join(str(e).split()))
        return None
