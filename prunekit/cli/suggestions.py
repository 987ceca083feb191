"""What somebody may have meant who typed a name that is not there: near ones, and the same one in
another place.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from prunekit.cli.paths import PACKAGES, conf_dirs
from prunekit.source import components


def chosen_wrong(group: str, name: Any) -> str:
    """In words: no YAML `name` in `group`, what there is, and where that name is at home."""
    names = yaml_names(group)
    if name is None:
        hint = f"\n  hint: did you mean {group}=none?" if "none" in names else ""
        return f"{group}=null must be a name; possible: {', '.join(names)}{hint}"
    if not isinstance(name, str):
        return (
            f"{group}={name} must be a name; possible: {', '.join(names)}\n  hint: numbers go to "
            f"options, such as {group}.KEY={name}"
        )
    near = get_close_matches(name, names, n=3) or [n for n in names if name in n.split("/")]
    meant = homes(name) + [f"{group}={n}" for n in near]
    if "/" in name or not meant:
        meant = by_path(group, name) + meant
    hint = f"\n  hint: did you mean {' or '.join(meant[:3])}?" if meant else ""
    if group in PACKAGES and name in components(PACKAGES[group]):
        hint = f"\n  hint: a file registers {name}, and conf/{group}/{name}.yaml is missing"
    return f"no {group} called {name!r}; possible: {', '.join(names)}{hint}"


def key_wrong(cfg: Any, path: str, step: str, node: Any) -> str:
    """A hint on a key that `node` lacks: a near one, another component that has it, or nothing."""
    group, _, rest = path.partition(".")
    keys = [k for k in node if k != "name"] if isinstance(node, dict) else []
    parent = path.removesuffix(step) if path.endswith(step) else ""
    near = [parent + k for k in get_close_matches(step, keys, n=2)]
    below = [f"{k}.{step}" for k in cfg if not rest and isinstance(cfg[k], dict) and step in cfg[k]]
    others = [n for n in yaml_names(group) if rest and has(group, n, rest)]
    if meant := near or below or (homes(step)[:3] if not others else []):
        return f"\n  hint: did you mean {' or '.join(meant)}?"
    others.sort(key=lambda n: not has(group, n, "name"))  # components before YAMLs built on them
    said = ", ".join(f"{group}={n}" for n in others[:4])
    return f"\n  hint: {said} {'have' if len(others) > 1 else 'has'} it" if others else ""


def by_path(group: str, name: str) -> list[str]:
    """What is typed for a model on the hub, or a file of text, that has no YAML."""
    if group == "model":
        return [f"model=hf model.path={name}"]
    text = group == "calib" and ("/" in name or "." in name)
    return [f"calib=text calib.path={name}"] if text else []


def homes(name: str) -> list[str]:
    """`kind=name` of every kind that has a YAML of that name."""
    return [f"{kind}={name}" for kind in kinds() if name in yaml_names(kind)]


def kinds() -> list[str]:
    """What is chosen by name: `model`, `criterion` and so on."""
    folders = [p.name for top in conf_dirs() for p in top.iterdir() if p.is_dir()]
    return sorted({*folders} - {"accelerate", "hydra"})  # files for their own commands


def yaml_names(group: str) -> list[str]:
    """The YAMLs of a group, those in folders of their own as `folder/name`."""
    folders = [top / group for top in conf_dirs()]
    return sorted(
        p.relative_to(f).with_suffix("").as_posix() for f in folders for p in f.rglob("*.yaml")
    )


def has(group: str, name: str, path: str) -> bool:
    """Whether a YAML has a key of that dotted path."""
    import yaml

    file = next(f for top in conf_dirs() if (f := top / group / f"{name}.yaml").is_file())
    node = yaml.safe_load(file.read_text(encoding="utf-8"))
    for step in path.split("."):
        if not isinstance(node, dict) or step not in node:
            return False
        node = node[step]
    return True
