"""Two small mixtures of experts that have learned something, for what random experts cannot show.

python benchmarks/trained_moe.py softmax|sigmoid --data-root FOLDER

`softmax` is a Mixtral (weights of the picked experts add up to one, balanced by the auxiliary
loss), `sigmoid` a GLM-4.5 (sigmoid with a correction bias for the choice alone, a shared expert, a
dense first block, balanced by that bias). Both read dialogues, instructions and Wikipedia in equal
parts, by a vocabulary of 1024 made from them. Four to five million parameters each, as many as ten
minutes of one core can teach something; they go to outputs/trained_moe/NAME, never committed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.data.datasets import document, texts

OUT = Path(__file__).resolve().parent.parent / "outputs" / "trained_moe"
DOMAINS = {"dialogue": "dailydialog", "instructions": "alpaca", "wikipedia": "wikitext2"}
VOCAB, LENGTH, HELD_OUT = 1024, 128, 20
"""`HELD_OUT`: every so many rows of a training split are left for tests."""
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
ROUTERS = ("softmax", "sigmoid")


def config_of(router: str) -> Any:
    """Configuration of one of `ROUTERS`: 16 experts of 192 neurons in every routed block."""
    from transformers import Glm4MoeConfig, MixtralConfig

    if router == "softmax":
        own = {"num_local_experts": 16, "intermediate_size": 192, "router_aux_loss_coef": 0.01}
        return MixtralConfig(**SIZES, **own, output_router_logits=True)
    own = {"n_routed_experts": 16, "moe_intermediate_size": 192, "intermediate_size": 384}
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
    return Glm4MoeConfig(**SIZES, **own, **groups, num_nextn_predict_layers=0)


def split_text(domain: str, data_root: str | None, held_out: bool) -> str:
    """Training or test text of one of `DOMAINS`: every twentieth row of the training split is
    held out.
    """
    rows = [t for t in texts(DOMAINS[domain], "train", data_root) if t.strip()]
    return document([t for i, t in enumerate(rows) if (i % HELD_OUT == 0) == held_out])


def tokenizer_of(corpus: list[str]) -> Any:
    """Byte-level BPE of `VOCAB` ids made from the corpus."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    plain = ByteLevelBPETokenizer()
    plain.train_from_iterator(corpus, VOCAB, special_tokens=["<pad>", "<s>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<s>"
    )


def rows_of(tokenizer: Any, text: str) -> Tensor:
    """(N, LENGTH) tokens of a text, without overlap."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def batches(domains: list[Tensor], size: int) -> Iterator[Tensor]:
    """Endless batches `(size, LENGTH)`, each of all domains in equal parts."""
    rng = torch.Generator().manual_seed(0)
    share = size // len(domains)
    while True:
        yield torch.cat([d[torch.randint(len(d), (share,), generator=rng)] for d in domains])


class Balance:
    """GLM and DeepSeek's balancing without a loss: the correction bias of an expert that got less
    than its share rises by `rate` a step, that of the others falls.
    """

    def __init__(self, model: nn.Module, rate: float = 0.001) -> None:
        self.rate, self.loads = rate, dict[nn.Module, Tensor]()
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.register_forward_hook(self._count)

    def _count(self, router: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        bias = router.e_score_correction_bias
        self.loads[router] = output[2].flatten().bincount(minlength=len(bias)).to(bias)

    def step(self) -> None:
        for router, load in self.loads.items():
            router.e_score_correction_bias += self.rate * (load.mean() - load).sign()


def train(model: nn.Module, data: list[Tensor], steps: int, batch: int, minutes: float) -> float:
    """AdamW, a warm-up and a cosine; returns the mean loss of the last 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    start, losses = time.monotonic(), list[float]()
    balance = Balance(model)
    for step, ids in enumerate(itertools.islice(batches(data, batch), steps)):
        done = max(step / steps, (time.monotonic() - start) / 60 / minutes)
        if done >= 1:
            break
        rate = min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * done)) + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step} loss {losses[-1]:.3f} {time.monotonic() - start:.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def main() -> None:
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("router", choices=ROUTERS)
    parser.add_argument("--data-root")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=15, help="the schedule ends by then")
    parser.add_argument("--batch", type=int, default=12)
    asked = parser.parse_args()
    torch.manual_seed(0)
    corpus = [split_text(d, asked.data_root, held_out=False) for d in DOMAINS]
    tokenizer = tokenizer_of(corpus)
    model = AutoModelForCausalLM.from_config(config_of(asked.router)).float().train()
    data = [rows_of(tokenizer, text) for text in corpus]
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, rows {[len(d) for d in data]}"
    )
    loss = train(model, data, asked.steps, asked.batch, asked.minutes)
    model.config.output_router_logits = False
    model.save_pretrained(OUT / asked.router)
    tokenizer.save_pretrained(OUT / asked.router)
    (OUT / asked.router / "training.json").write_text(json.dumps({"loss": loss} | vars(asked)))


if __name__ == "__main__":
    main()
