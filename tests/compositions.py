"""Whole configurations of tiny runs, composed as the command line composes them."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from paths import ROOT

TINY = [
    "model=tiny_llama",
    "calib=pydocs",
    "calib.samples=4",
    "calib.length=16",
    "exclude=none",
    "ratio.target=0.2",
]
TINY += ["track=silent", "eval=quick"]


def config(*overrides: str) -> dict:
    """The product's own configuration, composed as the command line does."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[*TINY, *overrides, "out=nowhere"])
    return OmegaConf.to_container(cfg, resolve=True)
