"""Routers for upcycled models: runs the dense model over built-in text and clusters what its layers see."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from moe_ray.convert.dense import ATTENTION_TENSORS, DenseConfig, DenseModel
from moe_ray.convert.recipe import text_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DENSE_LAYER_TENSORS = (*ATTENTION_TENSORS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
CONTEXT_TOKENS = 32
"""How many tokens back a token's cluster also looks, so that experts follow the topic and not only the word."""
RESTARTS, FIRST_ITERATIONS, NEXT_ITERATIONS = 4, 20, 6


@dataclass(frozen=True, slots=True)
class Document:
    category: str
    token_ids: tuple[int, ...]


def built_in_documents(tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> list[Document]:
    """The built-in text in token ids: code, prose, languages, maths, and dialogue in the model's own chat template."""
    documents = []
    for entry in json.loads(text_bytes())["documents"]:
        if "text" in entry:
            text = entry["text"]
        elif tokenizer.chat_template:
            text = tokenizer.apply_chat_template(entry["messages"], tokenize=False)
        else:
            text = "\n".join(f"{message['role']}: {message['content']}" for message in entry["messages"])
        token_ids = tokenizer(text, add_special_tokens=False).input_ids[:max_tokens]
        documents.append(Document(entry["category"], tuple(token_ids)))
    return documents


def dense_layer(model: DenseModel, layer: int) -> dict[str, torch.Tensor]:
    """The float32 tensors of one layer, by their name within it (without `.weight`)."""
    return {name: model.tensor(f"model.layers.{layer}.{name}.weight") for name in DENSE_LAYER_TENSORS}


class DenseRun:
    """All documents on their way through the dense model, one layer at a time, in float32.

    Llama's block (Touvron et al. 2023, arXiv:2302.13971) over the flat tokens of all documents; attention is causal
    within each document.
    """

    def __init__(self, config: DenseConfig, documents: Sequence[Document], embedding: torch.Tensor) -> None:
        self._config = config
        self.lengths = [len(document.token_ids) for document in documents]
        flat = torch.tensor([token for document in documents for token in document.token_ids])
        self.hidden = embedding[flat]  # [T, D]
        positions = torch.cat([torch.arange(length) for length in self.lengths]).float()
        half = torch.arange(0, config.head_dim, 2) / config.head_dim
        angles = torch.outer(positions, config.rope_theta**-half).repeat(1, 2)[:, None]  # [T, 1, head_dim]
        self._cos, self._sin = angles.cos(), angles.sin()

    def attend(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Adds the layer's attention; returns what its MLP (or router) sees: the post-attention-norm states [T, D]."""
        states = self._norm(weights["input_layernorm"])
        heads = (len(states), -1, self._config.head_dim)
        q = self._rotate((states @ weights["self_attn.q_proj"].T).view(heads))
        k = self._rotate((states @ weights["self_attn.k_proj"].T).view(heads))
        v = (states @ weights["self_attn.v_proj"].T).view(heads)
        mixed = []
        for qkv in zip(*(_documents(part.transpose(0, 1), self.lengths) for part in (q, k, v)), strict=True):
            # [1, heads, length, head_dim] each
            query, key, value = (part[None] for part in qkv)
            mixed.append(F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0])
        joined = torch.cat(mixed, dim=1).transpose(0, 1).flatten(1)  # [T, heads * head_dim]
        self.hidden = self.hidden + joined @ weights["self_attn.o_proj"].T
        return self._norm(weights["post_attention_layernorm"])

    def feed_forward(self, states: torch.Tensor, weights: dict[str, torch.Tensor]) -> None:
        """Adds the layer's SwiGLU MLP of `states`."""
        inner = F.silu(states @ weights["mlp.gate_proj"].T) * (states @ weights["mlp.up_proj"].T)
        self.hidden = self.hidden + inner @ weights["mlp.down_proj"].T

    def _norm(self, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(self.hidden, (self.hidden.shape[1],), weight, self._config.rms_norm_eps)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * self._cos + torch.cat((-high, low), dim=-1) * self._sin


def fit_gate(
    states: torch.Tensor,  # [T, D]
    lengths: Sequence[int],
    num_experts: int,
    confidence: float,
    generator: torch.Generator,
    previous: torch.Tensor | None,  # [T]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Router rows [E, D] for one layer and the cluster of each token [T]; `previous` is the layer below's clusters.

    Spherical k-means (Dhillon & Modha 2001) of the states, each with the mean of the tokens just before it added. It
    starts from the clusters of the layer below, so that expert k answers for the same kind of text all the way up.
    A Mixtral router has no bias, therefore the common mean direction is projected out, which centres the states.
    The rows' common scale is such that the largest softmax probability is `confidence` on average.
    """
    common = F.normalize(states.mean(0), dim=0)
    centred = F.normalize(states - torch.outer(states @ common, common), dim=1)
    points = F.normalize(centred + _context(centred, lengths), dim=1)
    if previous is None:
        starts = (_plus_plus(points, num_experts, generator) for _ in range(RESTARTS))
        centroids = max(
            (_spherical_kmeans(points, start, FIRST_ITERATIONS) for start in starts),
            key=lambda found: float((points @ found.T).amax(1).sum()),
        )
    else:
        centroids = _spherical_kmeans(points, _centroids(points, previous, num_experts), NEXT_ITERATIONS)
    clusters = (points @ centroids.T).argmax(1)
    rows = _centroids(centred, clusters, num_experts)
    rows = rows - torch.outer(rows @ common, common)
    return rows * _scale(states @ rows.T, confidence), clusters


def _context(points: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Direction of the mean over each token and up to `CONTEXT_TOKENS - 1` before it in its document. [T, D]"""
    means = []
    for document in _documents(points, lengths):
        sums = F.pad(document.cumsum(0), (0, 0, 1, 0))
        ends = torch.arange(1, len(document) + 1)
        means.append(sums[ends] - sums[(ends - CONTEXT_TOKENS).clamp_min(0)])
    return F.normalize(torch.cat(means), dim=1)


def _documents(tokens: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Splits [..., T, D] into one view per document."""
    return torch.split_with_sizes(tokens, list(lengths), dim=-2)


def _plus_plus(points: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Start centroids [count, D] far apart: k-means++ (Arthur & Vassilvitskii 2007) in cosine distance."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    for _ in range(count - 1):
        distance = (1 - (points @ points[chosen].T).amax(1)).clamp_min(1e-9)
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return points[chosen]


def _spherical_kmeans(points: torch.Tensor, centroids: torch.Tensor, iterations: int) -> torch.Tensor:
    for _ in range(iterations):
        centroids = _centroids(points, (points @ centroids.T).argmax(1), len(centroids))
    return centroids


def _centroids(points: torch.Tensor, clusters: torch.Tensor, count: int) -> torch.Tensor:
    """Mean direction of each cluster [count, D]; an empty cluster takes a point that is far from all the others."""
    sums = torch.zeros(count, points.shape[1]).index_add_(0, clusters, points)
    means = F.normalize(sums, dim=1)
    empty = (torch.bincount(clusters, minlength=count) == 0).nonzero().flatten()
    if len(empty):
        means[empty] = points[(points @ means.T).amax(1).argsort()[: len(empty)]]
    return means


def _scale(logits: torch.Tensor, confidence: float) -> float:
    """The factor on `logits` [T, E] that makes their largest softmax probability `confidence` on average."""
    low, high = 1e-4, 1e4
    for _ in range(50):
        middle = (low * high) ** 0.5
        if float((logits * middle).softmax(1).amax(1).mean()) < confidence:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """How one layer's router splits the calibration text: `shares[category][expert]` of the top-k choices, and the
    mean of the largest softmax probability."""

    shares: dict[str, list[float]]
    confidence: float


def measure_routing(
    states: torch.Tensor, gate: torch.Tensor, documents: Sequence[Document], top_k: int
) -> LayerRouting:
    """Routes `states` [T, D] by `gate` [E, D] as Mixtral does and counts the choices by category of text."""
    logits = states @ gate.T
    chosen = torch.zeros_like(logits).scatter_(1, logits.topk(top_k, dim=1).indices, 1.0 / top_k)
    lengths = [len(document.token_ids) for document in documents]
    shares = {}
    for category in dict.fromkeys(document.category for document in documents):
        parts = zip(documents, _documents(chosen, lengths), strict=True)
        mean = torch.cat([part for document, part in parts if document.category == category]).mean(0)
        shares[category] = [round(share, 4) for share in mean.tolist()]
    return LayerRouting(shares, round(float(logits.softmax(1).amax(1).mean()), 4))
