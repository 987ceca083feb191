"""A small GPT-NeoX that has learned something: a second family for experiments/generalisation.

    python benchmarks/trained_neox.py --data-root FOLDER        # at most 20 minutes on two cores

Attention and a plain GELU feed-forward side by side, LayerNorm and biases: all that SmolLM2 lacks.
It reads what benchmarks/trained_moe.py reads: dialogues, instructions and Wikipedia, by a
vocabulary of 1024. It goes to outputs/trained_neox, never committed.
"""

from __future__ import annotations

import argparse
import json

import torch
from trained_moe import DOMAINS, LENGTH, OUT, VOCAB, rows_of, split_text, tokenizer_of, train

FOLDER = OUT.parent / "trained_neox"
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": 4 * LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def main() -> None:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--minutes", type=float, default=20, help="the schedule ends by then")
    parser.add_argument("--batch", type=int, default=12)
    asked = parser.parse_args()
    torch.manual_seed(0)
    corpus = [split_text(d, asked.data_root, held_out=False) for d in DOMAINS]
    tokenizer = tokenizer_of(corpus)
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**SIZES)).float().train()
    data = [rows_of(tokenizer, text) for text in corpus]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    loss = train(model, data, asked.steps, asked.batch, asked.minutes)
    model.save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    (FOLDER / "training.json").write_text(json.dumps({"loss": loss} | vars(asked)))


if __name__ == "__main__":
    main()
