"""What transformers says of the same checkpoint: what the tests compare with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def all_cores() -> Iterator[None]:
    """Let torch use every core meanwhile: of this process alone, for what tests compare with is computed alone."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Reference:
    """transformers' answers to token ids, in float32; greedy answers are remembered."""

    def __init__(self, directory: Path) -> None:
        import torch
        from transformers import MixtralForCausalLM

        self._model = MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._greedy: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self._likeliest: dict[tuple[int, ...], list[int]] = {}

    def greedy(self, prompt: Sequence[int], max_tokens: int, guess: Sequence[int] = ()) -> list[int]:
        """The most likely continuation, up to and including the end-of-sequence token.

        `guess`: what is asserted to be it. One pass tells how far it is, and only the rest is generated token by token.
        """
        key = (tuple(prompt), max_tokens)
        if key not in self._greedy:
            known = self._right_part(prompt, guess)[:max_tokens] if guess else []
            rest = max_tokens - len(known)
            if known and known[-1] in self._ends():
                rest = 0
            self._greedy[key] = known + (self._generated([*prompt, *known], rest) if rest else [])
        return self._greedy[key]

    def _right_part(self, prompt: Sequence[int], guess: Sequence[int]) -> list[int]:
        """The greedy tokens that one pass over prompt and guess tells: each follows what is greedy itself."""
        found: list[int] = []
        for at, token in enumerate(self.likeliest([*prompt, *guess])[len(prompt) - 1 :]):
            found.append(token)
            if token in self._ends() or list(guess[at : at + 1]) != [token]:
                break
        return found

    def _ends(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends or ())

    def _generated(self, token_ids: list[int], max_tokens: int) -> list[int]:
        import torch

        ids = torch.tensor([token_ids])
        with torch.inference_mode(), all_cores():
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
            )
        generated: list[int] = out[0, len(token_ids) :].tolist()
        return generated

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits of what follows each position, [T, V]."""
        import torch

        with torch.inference_mode(), all_cores():
            return self._model(torch.tensor([list(token_ids)])).logits[0]

    def likeliest(self, token_ids: Sequence[int]) -> list[int]:
        """The most likely token after each position; remembered, for several carriers give the same tokens."""
        key = tuple(token_ids)
        if key not in self._likeliest:
            self._likeliest[key] = self.logits(token_ids).argmax(-1).tolist()
        return self._likeliest[key]

    def logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of what follows each position, [T, V]."""
        return self.logits(token_ids).log_softmax(-1)

    def loss(self, token_ids: Sequence[int], labels: torch.Tensor) -> float:
        """Mean negative log likelihood of those `labels` [1, T] that are not -100."""
        import torch

        with torch.inference_mode(), all_cores():
            return float(self._model(torch.tensor([list(token_ids)]), labels=labels).loss)

    def routing_weights(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Each token's routing weights by expert, [T, layers, E]: of its top k they sum to 1, the others are 0."""
        import torch

        with torch.inference_mode(), all_cores():
            out = self._model(torch.tensor([list(token_ids)]), output_router_logits=True)
        top_k = self._model.config.num_experts_per_tok
        spreads = []
        for logits in out.router_logits:
            weights, experts = logits.softmax(-1).topk(top_k, dim=-1)
            spreads.append(torch.zeros_like(logits).scatter(-1, experts, weights / weights.sum(-1, keepdim=True)))
        return torch.stack(spreads, dim=1)
