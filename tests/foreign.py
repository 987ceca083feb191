"""Language models that are not transformers': small modules written from the published structure of
well-known code bases.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, INNER, DEPTH, CONTEXT = 97, 48, 6, 60, 3, 32


def causal(scores: Tensor) -> Tensor:
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


# ---- nanoGPT: fused c_attn (Q|K|V), a causal mask in a buffer, GELU, learned positions, tied head;
# `forward(idx, targets)`


class NanoAttention(nn.Module):
    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.n_embd = config.n_head, config.n_embd
        self.register_buffer(
            "bias", torch.tril(torch.ones(config.block_size, config.block_size))[None, None]
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf")).softmax(-1)
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(B, T, self.n_embd))


class NanoBlock(nn.Module):
    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = (
            nn.LayerNorm(config.n_embd),
            NanoAttention(config),
            nn.LayerNorm(config.n_embd),
        )
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(config.n_embd, 4 * config.n_embd),
                "c_proj": nn.Linear(4 * config.n_embd, config.n_embd),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_embd=WIDTH, n_head=HEADS, n_layer=DEPTH, block_size=CONTEXT)
        blocks = nn.ModuleList(NanoBlock(self.config) for _ in range(DEPTH))
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, WIDTH),
                "wpe": nn.Embedding(CONTEXT, WIDTH),
                "h": blocks,
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.transformer["wte"](idx) + self.transformer["wpe"](
            torch.arange(idx.size(1), device=idx.device)
        )
        for block in self.transformer["h"]:
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# ---- ChatGLM-6B: query_key_value interleaved head by head, rotary over positions and over block
# positions (2-D), GELU, LayerNorm, residuals scaled by sqrt(2 * layers)


def rotate(x: Tensor, position: Tensor, inv_freq: Tensor) -> Tensor:
    """x (B, T, H, d), position (B, T)."""
    angle = torch.cat([position[..., None] * inv_freq] * 2, dim=-1)[:, :, None]
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * angle.cos() + turned * angle.sin()


class GLMAttention(nn.Module):
    def __init__(self, layer_id: int):
        super().__init__()
        self.layer_id, self.num_attention_heads = layer_id, HEADS
        self.hidden_size_per_attention_head = WIDTH // HEADS
        self.register_buffer(
            "inv_freq",
            1.0
            / 10000 ** (torch.arange(0, WIDTH // HEADS // 2, 2).float() / (WIDTH // HEADS // 2)),
        )
        self.query_key_value, self.dense = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, position: Tensor, block_position: Tensor) -> Tensor:
        mixed = self.query_key_value(x)
        mixed = mixed.view(
            *mixed.shape[:-1], self.num_attention_heads, 3 * self.hidden_size_per_attention_head
        )
        q, k, v = mixed.chunk(3, dim=-1)
        (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
        q = torch.cat(
            [rotate(q1, position, self.inv_freq), rotate(q2, block_position, self.inv_freq)], dim=-1
        )
        k = torch.cat(
            [rotate(k1, position, self.inv_freq), rotate(k2, block_position, self.inv_freq)], dim=-1
        )
        coefficient = float(self.layer_id + 1)
        q = q / (math.sqrt(self.hidden_size_per_attention_head) * coefficient)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * coefficient
        context = torch.einsum("bhqk,bkhd->bqhd", causal(scores), v)
        return self.dense(
            context.reshape(
                *x.shape[:-1], self.num_attention_heads * self.hidden_size_per_attention_head
            )
        )


class GLMBlock(nn.Module):
    def __init__(self, layer_id: int):
        super().__init__()
        self.layer_id = layer_id
        self.input_layernorm, self.post_attention_layernorm = (
            nn.LayerNorm(WIDTH),
            nn.LayerNorm(WIDTH),
        )
        self.attention = GLMAttention(layer_id)
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor, position: Tensor, block_position: Tensor) -> Tensor:
        alpha = (2 * DEPTH) ** 0.5
        normed = self.input_layernorm(x)
        x = normed * alpha + self.attention(normed, position, block_position)
        normed = self.post_attention_layernorm(x)
        return normed * alpha + self.dense_4h_to_h(
            F.gelu(self.dense_h_to_4h(normed), approximate="tanh")
        )


class ChatGLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(GLMBlock(i) for i in range(DEPTH))
        self.final_layernorm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        n = input_ids.size(1)
        position = torch.arange(n, device=input_ids.device).clamp(max=n - 3)[None].float()
        block_position = (
            (torch.arange(n, device=input_ids.device) - (n - 3)).clamp(min=0)[None].float()
        )
        x = self.word_embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, position, block_position)
        return self.lm_head(self.final_layernorm(x))


# ---- Baichuan: fused W_pack without bias, RMSNorm, SwiGLU, rotary computed in the attention


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class BaichuanLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.head_dim = WIDTH, HEADS, WIDTH // HEADS
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.W_pack, self.o_proj = (
            nn.Linear(WIDTH, 3 * WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.gate_proj, self.up_proj = (
            nn.Linear(WIDTH, INNER, bias=False),
            nn.Linear(WIDTH, INNER, bias=False),
        )
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        inv_freq = 1.0 / 10000 ** (
            torch.arange(0, self.head_dim, 2, device=x.device).float() / self.head_dim
        )
        proj = (
            self.W_pack(x)
            .unflatten(-1, (3, self.hidden_size))
            .unsqueeze(0)
            .transpose(0, -2)
            .squeeze(-2)
        )
        q, k, v = (proj[i].view(b, t, self.num_heads, self.head_dim) for i in range(3))
        position = torch.arange(t, device=x.device)[None].float()
        q, k = (rotate(y, position, inv_freq).transpose(1, 2) for y in (q, k))
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, self.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.input_layernorm(x))
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Baichuan(nn.Module):
    layer: type[nn.Module] = BaichuanLayer

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(self.layer() for _ in range(DEPTH))
        self.norm = RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


# ---- BLOOM: ALiBi made outside the blocks, qkv interleaved head by head, LayerNorm on the
# embedding


class BloomLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.input_layernorm, self.post_attention_layernorm = (
            nn.LayerNorm(WIDTH),
            nn.LayerNorm(WIDTH),
        )
        self.query_key_value, self.dense = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dense_h_to_4h, self.dense_4h_to_h = (
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.Linear(4 * WIDTH, WIDTH),
        )

    def forward(self, x: Tensor, alibi: Tensor) -> Tensor:
        b, t, _ = x.shape
        fused = self.query_key_value(self.input_layernorm(x)).view(
            b, t, self.num_heads, 3, self.head_dim
        )
        q, k, v = (fused[..., i, :].transpose(1, 2) for i in range(3))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim) + alibi
        x = x + self.dense(
            (causal(scores) @ v).transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim)
        )
        return x + self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(self.post_attention_layernorm(x))))


class Bloom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings, self.word_embeddings_layernorm = (
            nn.Embedding(VOCAB, WIDTH),
            nn.LayerNorm(WIDTH),
        )
        self.h = nn.ModuleList(BloomLayer() for _ in range(DEPTH))
        self.ln_f, self.num_heads = nn.LayerNorm(WIDTH), HEADS

    def forward(self, input_ids: Tensor) -> Tensor:
        slopes = 2.0 ** (
            -8.0 * torch.arange(1, self.num_heads + 1, device=input_ids.device) / self.num_heads
        )
        alibi = slopes[:, None, None] * torch.arange(input_ids.size(1), device=input_ids.device)
        x = self.word_embeddings_layernorm(self.word_embeddings(input_ids))
        for block in self.h:
            x = block(x, alibi[None])
        return self.ln_f(x) @ self.word_embeddings.weight.T


# ---- Mixtral as first released: a loop over expert modules, top-2 of a softmax


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (
            nn.Linear(WIDTH, INNER, bias=False),
            nn.Linear(INNER, WIDTH, bias=False),
            nn.Linear(WIDTH, INNER, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MixtralLayer(BaichuanLayer):
    def __init__(self) -> None:
        super().__init__()
        del self.gate_proj, self.up_proj, self.down_proj
        self.num_experts, self.top_k = 5, 2
        self.gate = nn.Linear(WIDTH, self.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(self.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.input_layernorm(x))
        flat = self.post_attention_layernorm(x).flatten(0, 1)
        weights, chosen = torch.topk(self.gate(flat).softmax(-1), self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        hit = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        out = torch.zeros_like(flat)
        for e in range(self.num_experts):
            slot, token = torch.where(hit[e])
            out.index_add_(0, token, self.experts[e](flat[token]) * weights[token, slot, None])
        return x + out.view_as(x)


class Mixtral(Baichuan):
    layer = MixtralLayer


class ListedMixtral(Mixtral):
    """Called as models of transformers are."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self, input_ids: Tensor, use_cache: bool = False, labels: Tensor | None = None
    ) -> Tensor | SimpleNamespace:
        logits = super().forward(input_ids)
        if labels is None:
            return logits
        return SimpleNamespace(loss=F.cross_entropy(logits[:, :-1].mT, labels[:, 1:]))


def with_an_idle_expert(model: Mixtral) -> Mixtral:
    """No token picks the last of five experts, which is called all the same: of the others, two are
    asked for by every token.
    """
    with torch.no_grad():
        for layer in model.layers:
            w = layer.gate.weight
            w.copy_(torch.outer(torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0]), w[0].clone()))
    return model


class SigmoidLayer(MixtralLayer):
    """As DeepSeek-V3's own code has it: sigmoids weigh, a bias chooses, only the experts that got
    tokens are called, and a shared expert adds to them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("correction", torch.linspace(0, 0.2, self.num_experts))
        self.shared = Expert()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.input_layernorm(x))
        flat = self.post_attention_layernorm(x).flatten(0, 1)
        scores = self.gate(flat).sigmoid()
        chosen = torch.topk(scores + self.correction, self.top_k, dim=-1)[1]
        weights = 1.5 * scores.gather(1, chosen)
        out = self.shared(flat)
        for e in chosen.unique().tolist():
            token, slot = torch.where(chosen == e)
            out = out.index_add(0, token, self.experts[e](flat[token]) * weights[token, slot, None])
        return x + out.view_as(x)


class ListedSigmoid(ListedMixtral):
    layer = SigmoidLayer


FOREIGN = {
    "nanogpt": NanoGPT,
    "chatglm": ChatGLM,
    "baichuan": Baichuan,
    "bloom": Bloom,
    "mixtral": Mixtral,
}
