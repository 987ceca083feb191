"""submitit's launchers, tolerant: a job that is killed does not end the wait for the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher

log = logging.getLogger("prunekit")
AT_START = ("max_num_timeout",)
"""Parameters that submitit takes when the executor is made, not with the job's resources."""


class TolerantLauncher(BaseSubmititLauncher):
    """Launches like its parent (hydra-submitit-launcher 1.2), but waits for every job; the parent
    raises at the first that was killed.
    """

    def executor(self) -> Any:
        """submitit's executor with the resources that the YAML asks for."""
        import submitit

        params = {k: v for k, v in self.params.items() if k != "submitit_folder"}
        first = {f"{self._EXECUTOR}_{k}": params.pop(k) for k in AT_START if k in params}
        executor = submitit.AutoExecutor(
            folder=self.params["submitit_folder"], cluster=self._EXECUTOR, **first
        )
        shared = BaseQueueConf.__dataclass_fields__
        executor.update_parameters(
            **{k if k in shared else f"{self._EXECUTOR}_{k}": v for k, v in params.items()}
        )
        return executor

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        state = Singleton.get_state()
        calls = [
            (list(said), "hydra.sweep.dir", i, f"job_{i}", state)
            for i, said in zip(numbers, job_overrides, strict=True)
        ]
        jobs = self.executor().map_array(self, *zip(*calls, strict=True))
        return [result_of(job) for job in jobs]


def result_of(job: Any) -> JobReturn:
    """What a job returned; an empty return, and a line of the log, for one that died without
    returning.
    """
    import submitit

    try:
        return job.results()[0]
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as e:
        log.error("job %s ended without a result: %s", job.job_id, str(e).strip().splitlines()[0])
        return JobReturn()


class TolerantLocal(TolerantLauncher):
    """Processes of this machine."""

    _EXECUTOR = "local"


class TolerantSlurm(TolerantLauncher):
    """Jobs of a Slurm cluster."""

    _EXECUTOR = "slurm"
