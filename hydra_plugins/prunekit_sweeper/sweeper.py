"""Hydra's sweeper for tables: rows and value lists become jobs, finished ones are skipped, failed
ones are listed at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from prunekit.cli.overrides import two_lines
from prunekit.errors import ConfigError
from prunekit.runner import parent, progress, resume, sweep
from prunekit.runner.sweep import Plan

log = logging.getLogger("prunekit")


class Job(NamedTuple):
    """Where a job writes, its overrides, and the configuration that they make."""

    folder: Path
    words: list[str]
    cfg: dict[str, Any]


class TableSweeper(Sweeper):
    """`params` are more overrides, swept or not, that hold for every job; what the user types wins
    over them.
    """

    config: DictConfig

    def __init__(self, params: dict[str, Any] | None = None):
        self.params = dict(params or {})

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> list[Any]:
        """Runs what is not finished yet. Failures go to the task's `failures` list, which decides
        the exit status.
        """
        failures: list[str] = getattr(self.task, "failures", [])
        try:
            return self.sweep_jobs(arguments, failures)
        except ConfigError as e:
            failures.append(f"prunekit: ConfigError: {e}")
        except (HydraException, OmegaConfBaseException) as e:
            failures.append(f"prunekit: ConfigError: {two_lines(e)}")
        return []

    def sweep_jobs(self, arguments: list[str], failures: list[str]) -> list[Any]:
        """Expands, skips, launches, and looks at how every job ended."""
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        if self.typed("hydra.run.dir"):
            raise ConfigError(
                "hydra.run.dir is of a single run; a sweep takes hydra.sweep.dir=FOLDER"
            )
        typed = {o.get_key_element() for o in sweep.parse(arguments)}
        words = [
            *arguments,
            *[sweep.override(k, v) for k, v in self.params.items() if k not in typed],
        ]
        plan = sweep.planned(words, self.config)
        top = self.choose_folder(plan)
        jobs = [self.job(top / name, [*said, *self.places(name)]) for name, said in plan.jobs]
        todo = [job for job in jobs if not resume.finished(job.folder, job.cfg)]
        log.info("%s: %d jobs, %d finished before", top, len(jobs), len(jobs) - len(todo))
        result = self.launch(todo)
        # Jobs in this process noted their failures themselves; the folders know those of all, but
        # for what a full disk did not take.
        noted = list(failures)
        failures.clear()
        failures += sweep.badly_ended([job.folder for job in jobs], noted)
        return result

    def choose_folder(self, plan: Plan) -> Path:
        """The folder of all jobs: what the user says in hydra.sweep.dir, else a name that the same
        command finds again.
        """
        config = self.config
        if not self.typed("hydra.sweep.dir"):
            table = config.get("table") or config.hydra.runtime.choices.get("experiment")
            name = sweep.folder_of(plan.key, table, config.get("scale", "full"))
            OmegaConf.set_readonly(config, False)
            with open_dict(config):
                config.hydra.sweep.dir = f"outputs/{name}"
        top = Path(config.hydra.sweep.dir)
        top.mkdir(parents=True, exist_ok=True)
        return top

    def typed(self, key: str) -> bool:
        """Whether the user gives `key` of Hydra's own configuration."""
        return any(o.startswith(f"{key}=") for o in self.config.hydra.overrides.hydra)

    def places(self, name: str) -> list[str]:
        """Overrides that put a job into its folder."""
        top = (
            []
            if self.typed("hydra.sweep.dir")
            else [f"hydra.sweep.dir={sweep.quoted(str(self.config.hydra.sweep.dir))}"]
        )
        return [f"hydra.sweep.subdir={sweep.quoted(name)}", *top]

    def job(self, folder: Path, words: list[str]) -> Job:
        """The job with the configuration that it will see."""
        composed = self.context.config_loader.load_sweep_config(self.config, list(words))
        OmegaConf.set_readonly(composed, False)
        with open_dict(composed):
            del composed["hydra"]
            composed.out = str(folder)
        return Job(folder, words, sweep.plain_config(composed))

    def use_tolerant_launcher(self) -> None:
        """submitit's own launchers give up at the first killed job; ours take their place, with the
        same options.
        """
        target = self.config.hydra.launcher.get("_target_", "")
        if target.startswith("hydra_plugins.hydra_submitit_launcher."):
            OmegaConf.set_readonly(self.config, False)
            ours = "TolerantSlurm" if target.endswith("SlurmLauncher") else "TolerantLocal"
            self.config.hydra.launcher["_target_"] = (
                f"hydra_plugins.prunekit_sweeper.launchers.{ours}"
            )

    def launch(self, todo: Sequence[Job]) -> list[Any]:
        """Hand the jobs to the launcher. What a launcher raises does not hide what its jobs left
        behind.
        """
        if not todo:
            return []
        parent.announce()
        self.use_tolerant_launcher()
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.context,
            task_function=self.task,
            config=self.config,
        )
        here = isinstance(launcher, BasicLauncher)
        if here:  # elsewhere they start at once, and with other files and devices
            warn_of_refused(todo)
        with nullcontext() if here else progress.show_progress([job.folder for job in todo]):
            try:
                return list(launcher.launch([job.words for job in todo], initial_job_idx=0))
            except (
                Exception
            ):  # a worker that was killed must not take the list of the others' ends along
                log.exception(
                    "the launcher stopped; jobs that are not finished can be made up for by the "
                    "same command"
                )
                return []


def warn_of_refused(todo: Sequence[Job]) -> None:
    """Warns, before the first job starts, of those that will fail because their components do not
    take or do not go with their options.
    """
    from prunekit.runner import preflight  # imports torch: not where nothing is to be done

    for job in todo:
        try:
            preflight.check_top(job.cfg)
            preflight.build_components(job.cfg)
        except ConfigError as e:
            log.warning("job %s will fail: %s", job.folder, e)
