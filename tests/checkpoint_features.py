"""What a loaded model is asked for, one function each: the rows of `docs/matrix.md`."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from prunekit.checkpoint import load, save


def words() -> Any:
    """A tokenizer of a hundred words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 101)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@dataclass
class Cell:
    """A pruned model, the folder it was saved in, and the folder as transformers loads it."""

    model: nn.Module
    path: Path
    stock: bool
    ids: torch.Tensor = field(
        default_factory=lambda: torch.randint(
            8, 100, (3, 9), generator=torch.Generator().manual_seed(0)
        )
    )

    def open(self, path: Path | None = None, **kwargs: Any) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            path or self.path, trust_remote_code=not self.stock, **kwargs
        ).eval()

    def says(self, model: nn.Module, **how: Any) -> torch.Tensor:
        how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **how}
        torch.manual_seed(1)
        return model.generate(self.ids, attention_mask=torch.ones_like(self.ids), **how)

    @torch.no_grad()
    def logits(self, model: nn.Module) -> torch.Tensor:
        return model(self.ids, use_cache=False).logits


def close(a: torch.Tensor, b: torch.Tensor, share: float = 1e-4) -> None:
    gap = (a.float() - b.float()).abs().max() / b.float().abs().max()
    assert gap < share, f"{gap:.2e} apart"


def equal(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(a, b)


def same_logits(cell: Cell) -> None:
    equal(cell.logits(cell.open()), cell.logits(cell.model))
    if (cell.path / "pruning.json").exists():
        equal(cell.logits(load(cell.path)[0]), cell.logits(cell.model))


def greedy(cell: Cell) -> None:
    equal(cell.says(cell.open()), cell.says(cell.model))


def sampled(cell: Cell) -> None:
    equal(
        cell.says(cell.open(), do_sample=True, top_p=0.9),
        cell.says(cell.model, do_sample=True, top_p=0.9),
    )


def beam(cell: Cell) -> None:
    equal(cell.says(cell.open(), num_beams=3), cell.says(cell.model, num_beams=3))


def left_padded(cell: Cell) -> None:
    model, short = cell.open(), cell.ids[:1, 4:]
    both = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), cell.ids[1:2]])
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    out = model.generate(both, attention_mask=(both != 0).long(), **how)
    equal(out[0, 9:], model.generate(short, attention_mask=torch.ones_like(short), **how)[0, 5:])
    equal(
        out[1],
        model.generate(cell.ids[1:2], attention_mask=torch.ones(1, 9, dtype=torch.long), **how)[0],
    )


def without_cache(cell: Cell) -> None:
    model = cell.open()
    equal(cell.says(model, use_cache=False), cell.says(model, use_cache=True))


def static_cache(cell: Cell) -> None:
    model = cell.open()
    equal(cell.says(model, cache_implementation="static"), cell.says(model))


def half_types(cell: Cell) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = cell.open().to(dtype)
        assert torch.isfinite(cell.logits(model)).all()
        assert cell.says(model).shape == (3, 15)
        assert cell.open(dtype=dtype).dtype == dtype


def device_maps(cell: Cell) -> None:
    for place in ("cpu", "auto"):
        equal(cell.logits(cell.open(device_map=place)), cell.logits(cell.model))


def gradient_checkpointing(cell: Cell) -> None:
    found = []
    for on in (False, True):
        model = cell.open().train()
        if on:
            model.gradient_checkpointing_enable()
        model(cell.ids, labels=cell.ids, use_cache=False).loss.backward()
        found.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    close(found[1], found[0])


def lora(cell: Cell) -> None:
    from peft import LoraConfig, get_peft_model

    with_lora = get_peft_model(
        cell.open(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    with_lora(cell.ids, labels=cell.ids).loss.backward()
    assert all(
        p.grad is not None
        for n, p in with_lora.named_parameters()
        if "lora" in n and p.requires_grad
    )
    merged = with_lora.eval().merge_and_unload()
    if (cell.path / "pruning.json").exists():
        save(merged, None, cell.path.parent / "merged")
        equal(cell.logits(load(cell.path.parent / "merged")[0]), cell.logits(merged))


def compiled(cell: Cell) -> None:
    torch._dynamo.reset()
    close(cell.logits(torch.compile(cell.open(), backend="aot_eager")), cell.logits(cell.model))


class Plain(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


def exported(cell: Cell) -> None:
    with torch.no_grad():
        program = torch.export.export(Plain(cell.open()), (cell.ids,), strict=False)
        close(program.module()(cell.ids), cell.logits(cell.model))


def saved_again(cell: Cell) -> None:
    cell.open().save_pretrained(cell.path.parent / "again")
    equal(cell.logits(cell.open(cell.path.parent / "again")), cell.logits(cell.model))
    if (cell.path / "pruning.json").exists():
        save(cell.open(), None, cell.path.parent / "resaved")
        equal(cell.logits(load(cell.path.parent / "resaved")[0]), cell.logits(cell.model))


def sharded(cell: Cell) -> None:
    cell.open().save_pretrained(cell.path.parent / "shards", max_shard_size="40KB")
    assert len(list((cell.path.parent / "shards").glob("*.safetensors"))) > 1
    equal(cell.logits(cell.open(cell.path.parent / "shards")), cell.logits(cell.model))


def pushed(cell: Cell) -> None:
    """`push_to_hub` with the upload replaced by a copy into a folder."""
    from transformers.utils.hub import PushToHubMixin

    target = cell.path.parent / "hub"

    def upload(self: Any, working_dir: str, *args: Any, **kwargs: Any) -> None:
        shutil.copytree(working_dir, target)

    here = "transformers.utils.hub.create_and_tag_model_card"
    with (
        mock.patch.object(PushToHubMixin, "_upload_modified_files", upload),
        mock.patch(here),
        mock.patch("huggingface_hub.HfApi.create_repo"),
    ):
        cell.open().push_to_hub("somebody/pruned")
    equal(cell.logits(cell.open(target)), cell.logits(cell.model))


def int8(cell: Cell) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, other = cell.open(), copy.deepcopy(cell.model)
    quantize_(model, Int8WeightOnlyConfig())
    quantize_(other, Int8WeightOnlyConfig())
    close(cell.logits(model), cell.logits(other), 1e-5)
    assert not torch.equal(cell.logits(model), cell.logits(cell.model))


def lm_eval(cell: Cell) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    how = {
        "trust_remote_code": not cell.stock,
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 1,
    }
    judge = HFLM(pretrained=str(cell.path), tokenizer=words(), **how)
    asked = Instance("loglikelihood", {}, ("w11 w12", " w13 w14"), 0)
    found = judge.loglikelihood([asked], disable_tqdm=True)[0][0]
    ids = torch.tensor([[11, 12, 13, 14]])
    with torch.no_grad():
        logs = cell.model(ids).logits.log_softmax(-1)[0]
    close(torch.tensor(found), logs[1, 13] + logs[2, 14])


FEATURES: dict[str, Callable[[Cell], None]] = {
    "same logits, to the bit": same_logits,
    "generate, greedy": greedy,
    "generate, sampled": sampled,
    "generate, beam search": beam,
    "generate, batch with left padding": left_padded,
    "generate, without cache": without_cache,
    "generate, static cache": static_cache,
    "float16 and bfloat16": half_types,
    'device_map "cpu" and "auto"': device_maps,
    "gradient checkpointing": gradient_checkpointing,
    "peft LoRA, merged and saved": lora,
    "torch.compile": compiled,
    "torch.export": exported,
    "saved again, loaded again": saved_again,
    "sharded safetensors": sharded,
    "push_to_hub": pushed,
    "int8 weights (torchao)": int8,
    "lm-eval, hf model": lm_eval,
}
