"""A token embedding whose table is a tensor-train matrix: each token's row is a product of small matrices."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from zo_tutorial.tensor.formats import attainable_ranks, core_shapes, ttm_modes, ttm_to_matrix, whole_numbers


class TensorizedEmbedding_module(nn.Module):
    """A table (words, width) in TTM format, with entries of mean square near 1 at the start (chapter 11).

    With word i written as digits (i_1..i_p) to the mixed base (n_1..n_p), its row is, before it is flattened::

        E[i, j_1..j_p] = G_1[:, j_1, i_1, :] G_2[:, j_2, i_2, :] ... G_p[:, j_p, i_p, :]

    Args:
        words: rows that are used; the factors may make more.
        width: columns.
        shape: the factors, [[n_1..n_p], [m_1..m_p]], of the rows and of the width.
        max_rank: a bound for all ranks, or the list of all ranks with 1 at both ends; lowered to the attainable.
        generator: where the initial cores are drawn from; None: torch's global generator.

    Raises:
        ValueError: factors that make fewer rows than words or another width, or are no whole numbers.
    """

    def __init__(
        self,
        words: int,
        width: int,
        shape: Sequence[Sequence[int]],
        max_rank: int | Sequence[int] = 30,
        *,
        generator: Generator | None = None,
    ):
        super().__init__()
        word_factors, width_factors = map(whole_numbers, shape)
        if len(word_factors) != len(width_factors) or prod(word_factors) < words or prod(width_factors) != width:
            raise ValueError(f"the factors {word_factors} and {width_factors} do not make a table of {words} × {width}")
        modes = ttm_modes(word_factors, width_factors)
        self.words, self.width = whole_numbers([words, width])
        self.word_factors, self.ranks = word_factors, attainable_ranks(max_rank, modes)
        # Var E = r_1 ... r_{p-1} s^(2p) = 1
        std = prod(self.ranks) ** (-1 / (2 * len(modes)))
        self.cores = nn.ParameterList()
        for core_shape in core_shapes(modes, self.ranks):  # (r_{k-1}, m_k, n_k, r_k)
            core = torch.randn(core_shape, generator=generator)
            self.cores.append(nn.Parameter(core * std / core.square().mean().sqrt()))

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows (..., width) of tokens (...). Raises IndexError for a token outside of 0 .. words - 1."""
        known = torch.arange(self.words, device=tokens.device)[:, None]
        index = F.embedding(tokens.flatten(), known)[:, 0]  # (B,), the tokens again: torch checks their range
        digits: list[Tensor] = []
        for n in reversed(self.word_factors):
            digits.insert(0, index % n)
            index = index // n
        rows = torch.ones(len(index), 1, 1, dtype=self.cores[0].dtype, device=tokens.device)  # (B, M_<k, r_{k-1})
        for core, digit in zip(self.cores, digits, strict=True):
            chosen = core.movedim(2, 0)[digit]  # (B, r_{k-1}, m_k, r_k)
            rows = torch.einsum("bar,brms->bams", rows, chosen).flatten(1, 2)  # (B, M_<=k, r_k)
        return rows.reshape(*tokens.shape, self.width)

    def to_matrix(self) -> Tensor:
        """The table of all n_1 ... n_p rows, (rows, width)."""
        return ttm_to_matrix(list(self.cores)).T
