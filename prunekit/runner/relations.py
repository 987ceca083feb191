"""Options that are each fine and together are not: lengths against the model's positions, tokens to
skip against the length, two evals of one key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from prunekit.architecture.streaming import will_stream
from prunekit.errors import ConfigError
from prunekit.registry import Component


def check_lengths(model: nn.Module, *components: Component | None) -> None:
    """Raises ConfigError for a component that puts more tokens side by side than `model` has
    positions. A component names the options that add up to so many as `context` when it registers.
    """
    positions = positions_of(model)
    for component in components:
        for part in parts_of(component):
            names = part.meta.get("context", ())
            tokens = sum(part.options[name] for name in names)
            if positions is not None and tokens > positions:
                raise ConfigError(
                    f"{part.name}: {' + '.join(names)} = {tokens} tokens, and the model has "
                    f"{positions} positions"
                )


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a model can tell apart; None where its config sets no bound."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def parts_of(node: Any) -> Iterator[Component]:
    """A component, and those in its options."""
    if isinstance(node, Component):
        yield node
        node = node.options
    if isinstance(node, Mapping):
        for value in node.values():
            yield from parts_of(value)


def check_skip(calib: Component, *readers: Component | None) -> None:
    """Raises ConfigError for `skip`, tokens left out at the start of each sample, that leaves none
    of the calibration's `length`.
    """
    lengths = [p.options["length"] for p in parts_of(calib) if "length" in p.options]
    for component in readers:
        skip = component.options.get("skip", 0) if component else 0
        if component and lengths and skip >= min(lengths):
            raise ConfigError(
                f"{component.name}: skip={skip} leaves nothing of samples of {min(lengths)} tokens"
            )


def check_samples(calib: Component, pruner: Component) -> None:
    """Raises ConfigError where a pruner shares the samples out among more steps than there are."""
    steps, samples = pruner.options.get("steps"), calib.options.get("samples")
    if not pruner.options.get("redraw") or not isinstance(steps, int):
        return
    if isinstance(samples, int) and samples < steps:
        raise ConfigError(
            f"{pruner.name}: redraw=true shares calib.samples={samples} out among steps={steps}; "
            f"give calib.samples={steps} or more"
        )


def check_streamed(
    model: Component,
    criterion: Component | None,
    pruner: Component | None,
    recovery: Component | None,
) -> None:
    """Raises ConfigError for what trains a model, or takes its gradients as a whole, where its
    blocks come to the device in turn.
    """
    if not will_stream(model.options):
        return
    wrong = None
    if pruner and (pruner.meta.get("needs") == "gradients" or pruner.meta.get("trains")):
        wrong = f"pruner={pruner.name}"
    elif criterion and criterion.meta.get("needs") == "gradients":
        if criterion.options.get("by_block", False) is False:
            wrong = f"criterion={criterion.name} (by_block=false)"
    elif recovery:
        wrong = f"recovery={recovery.name}"
    if wrong:
        raise ConfigError(
            f"model.weights={model.options['weights']} brings one block at a time to the device, "
            f"and {wrong} needs the whole model on it: give model.weights=memory, or take another"
        )


def check_keys(evals: Mapping[str, Component]) -> None:
    """Raises ConfigError for two evals that report under one key."""
    seen: dict[str, str] = {}
    for name, evaluate in evals.items():
        options = sorted(evaluate.options.items(), key=lambda item: item[0])
        make = evaluate.meta.get("key")
        key = make(**evaluate.options) if make else f"{evaluate.name} {options}"
        if key in seen:
            raise ConfigError(
                f"eval.{seen[key]} and eval.{name} both report {key if make else 'the same'}: give "
                "one of them another window, dataset or label"
            )
        seen[key] = name
