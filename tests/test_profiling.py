from __future__ import annotations

import pytest
import torch
from waiting import until

from prunekit import profiling
from prunekit.profiling import Peak, Stages


def hold(mib: int) -> None:
    torch.ones(mib * 2**18).sum()  # float32, every page touched, freed on return


def test_a_stage_records_seconds_and_peak():
    stages = Stages()
    with stages("a"):
        hold(200)
    with stages("b"):
        pass
    assert set(stages.results) == {"a", "b"}
    assert set(stages.results["a"]) == {"seconds", "peak_memory_mib"}
    assert stages.results["a"]["seconds"] > 0
    a, b = (stages.results[x]["peak_memory_mib"] for x in "ab")
    assert a > b + 150, "the second stage must not inherit the first one's peak"


def test_an_inner_stage_does_not_hide_the_outer_peak():
    stages = Stages()
    with stages("outer"):
        hold(200)
        with stages("inner"):
            hold(50)
    assert (
        stages.results["outer"]["peak_memory_mib"]
        > stages.results["inner"]["peak_memory_mib"] + 100
    )


def test_an_outer_stage_sees_the_inner_peak():
    with Peak() as outer, Peak() as inner:
        hold(200)
    assert outer.mib >= inner.mib > inner.start_mib + 150


def test_a_repeated_name_adds_up_and_a_failure_is_recorded():
    stages = Stages()
    with stages("a"):
        hold(1)
    first = stages.results["a"]["seconds"]
    with pytest.raises(KeyError), stages("a"):
        raise KeyError
    assert stages.results["a"]["seconds"] > first
    assert not Peak._open


def test_sampling_where_the_kernel_counter_cannot_be_reset(monkeypatch):
    monkeypatch.setattr(profiling, "_reset_high_water", lambda: False)
    with Peak() as peak:
        x = torch.ones(200 * 2**18)
        until(lambda: peak.mib > peak.start_mib + 150)
        del x
    assert peak.mib > peak.start_mib + 150
