"""A weight matrix as a chain of small cores: the TT and the TTM format, as functions on lists of cores.

A matrix W of shape (M, N) has sizes M = m_1···m_p and N = n_1···n_p. Its entry at row (i_1..i_p), column (j_1..j_p) is

    TTM:  W = G_1[i_1, j_1] G_2[i_2, j_2] ··· G_p[i_p, j_p]             p cores of shape (r_{k-1}, m_k, n_k, r_k)
    TT:   W = G_1[j_1] ··· G_p[j_p] G_{p+1}[i_1] ··· G_{2p}[i_p]        2p cores of shape (r_{k-1}, mode, r_k)

each factor being a matrix of shape (r_{k-1}, r_k), with rank 1 at both ends. A mode is what a core has between its two
ranks: (m_k, n_k) in TTM; (n_k,) for the first p cores of TT and (m_k,) for the last p. FLOPs are multiply-adds.

Sources: Oseledets (2011), "Tensor-train decomposition", for TT, its ranks and TT-SVD; Novikov et al. (2015),
"Tensorizing neural networks", for TTM layers. Chapters 6 and 7 derive what is here.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from math import prod
from operator import index
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Mode = tuple[int, ...]
Shape = tuple[int, ...]


def whole_numbers(values: Iterable) -> list[int]:
    """The values as Python's own integers, whatever integer types they have: numpy's too.

    Raises:
        ValueError: a value that is no whole number; True and False are none.
    """
    values = list(values)
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        return [index(value) for value in values]
    except TypeError:
        raise ValueError(f"{values} should be whole numbers") from None


def attainable_ranks(max_rank: int | Sequence[int], modes: Sequence[Mode]) -> list[int]:
    """Lower each rank to what a tensor of these modes can need, given the other ranks.

    r_k is at most r_{k-1} times the mode on its left and r_{k+1} times the mode on its right.

    Args:
        max_rank: a bound for all ranks, or the list of all len(modes) + 1 ranks with 1 at both ends.
        modes: the mode of each core.

    Raises:
        ValueError: a rank below 1, a list of the wrong length, or ends that are not 1.
    """
    sizes = [prod(mode) for mode in modes]
    try:
        given: Any = max_rank if np.ndim(max_rank) else [1, *[max_rank] * (len(sizes) - 1), 1]
        ranks = whole_numbers(given)
    except ValueError:
        ranks = []
    if len(ranks) != len(sizes) + 1 or min(ranks) < 1 or ranks[0] != 1 or ranks[-1] != 1:
        raise ValueError(
            f"rank must be a positive integer, or the list of all {len(sizes) + 1} with 1 at both ends; got {max_rank}"
        )
    for k, size in enumerate(sizes):  # r_k <= r_{k-1} size_k, from the left
        ranks[k + 1] = min(ranks[k + 1], ranks[k] * size)
    for k, size in reversed(list(enumerate(sizes))):  # r_{k-1} <= size_k r_k, from the right
        ranks[k] = min(ranks[k], size * ranks[k + 1])
    return ranks


def core_shapes(modes: Sequence[Mode], ranks: Sequence[int]) -> list[Shape]:
    """The shape (r_{k-1}, *mode_k, r_k) of each core."""
    return [(left, *mode, right) for left, mode, right in zip(ranks[:-1], modes, ranks[1:], strict=True)]


def parameter_count(shapes: Sequence[Shape]) -> int:
    """The number of entries of all cores together."""
    return sum(prod(shape) for shape in shapes)


def dense_flops(rows: int, in_features: int, out_features: int) -> int:
    """Multiply-adds of x W^T with x (rows, in_features)."""
    return rows * in_features * out_features


# TTM: one core a factor pair.


def ttm_modes(in_factors: Sequence[int], out_factors: Sequence[int]) -> list[Mode]:
    """The mode (m_k, n_k) of each of the p cores."""
    return list(zip(out_factors, in_factors, strict=True))


def ttm_in_turn(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """x W^T core by core: the last core first, each as one matrix of shape (m_k r_{k-1}, n_k r_k).

    A core takes (n_k, r_k) out of the state and puts (r_{k-1}, m_k) in the same place, so the state after one core is,
    without moving a number, the state before the next. The rows of x come last, where they make each product long.

    Args:
        x: (B, N).
        cores: p tensors of shape (r_{k-1}, m_k, n_k, r_k).

    Returns:
        (B, M).
    """
    rows, n_left = x.shape
    m_right, state = 1, x.T  # (N, B)
    for core in reversed(cores):
        r, m, n, s = core.shape
        n_left //= n
        state = core.reshape(r * m, n * s) @ state.reshape(n_left, n * s, m_right * rows)  # (N_<k, r m, M_>k B)
        m_right *= m
    return state.reshape(m_right, rows).T  # (B, M)


def ttm_in_turn_flops(rows: int, shapes: Sequence[Shape]) -> int:
    """Multiply-adds of `ttm_in_turn`: the sum over k of B N_<k M_>k r_{k-1} m_k n_k r_k."""
    flops, n_left, m_right = 0, prod(n for _, _, n, _ in shapes), 1
    for r, m, n, s in reversed(shapes):
        n_left //= n
        flops += rows * n_left * m_right * r * m * n * s
        m_right *= m
    return flops


def ttm_halves(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same matrix as a TTM of two cores: each half of the chain multiplied out (one core stays one)."""
    return [reduce(_join, half) for half in _in_half(cores)]


def ttm_to_matrix(cores: Sequence[Tensor]) -> Tensor:
    """Multiply the cores out to the matrix W (M, N): each half, then both together."""
    return reduce(_join, ttm_halves(cores))[0, :, :, 0]


def ttm_matrix_flops(shapes: Sequence[Shape]) -> int:
    """Multiply-adds of `ttm_to_matrix`."""
    halves, flops = _joined_halves(shapes)
    return flops + _joined(halves)[1]


def ttm_contract(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """x W^T without forming W: the two halves in turn.

    Two long products take the place of p short ones, each of which would read and write a state larger than x. On a
    batch, for the shapes of the MNIST nets, it is fewer multiply-adds too. Shapes as in `ttm_in_turn`.
    """
    return ttm_in_turn(x, ttm_halves(cores))


def ttm_contract_flops(rows: int, shapes: Sequence[Shape]) -> int:
    """Multiply-adds of `ttm_contract`: those of building the halves, whatever the rows, and of applying them."""
    halves, flops = _joined_halves(shapes)
    return flops + ttm_in_turn_flops(rows, halves)


def ttm_svd(
    matrix: Tensor, in_factors: Sequence[int], out_factors: Sequence[int], ranks: Sequence[int]
) -> list[Tensor]:
    """The cores of the TTM that TT-SVD finds for a matrix (M, N), exact if the ranks allow it.

    The squared error is at most the sum, over the p - 1 cuts, of the squared singular values dropped there
    (Oseledets 2011, theorem 2.2).
    """
    import tensorly
    from tensorly.decomposition import tensor_train_matrix

    wide = _wide(matrix).reshape(*out_factors, *in_factors)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return [core.to(matrix.dtype) for core in tensor_train_matrix(wide, rank=list(ranks))]


# TT: one core a factor, those of the input first.


def tt_modes(in_factors: Sequence[int], out_factors: Sequence[int]) -> list[Mode]:
    """The modes (n_1,)..(n_p,), (m_1,)..(m_p,) of the 2p cores."""
    return [(factor,) for factor in (*in_factors, *out_factors)]


def tt_halves(cores: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The cores of the input multiplied out to A (N, r_p), those of the output to C (r_p, M): W^T = A C.

    Each half is built from its outer end, where the rank is 1.
    """
    p = len(cores) // 2
    a = cores[0][0]  # (n_1, r_1)
    for core in cores[1:p]:
        a = (a @ core.flatten(1)).reshape(-1, core.shape[2])  # (N_<=k, r_k)
    c = cores[-1][:, :, 0]  # (r_{2p-1}, m_p)
    for core in reversed(cores[p:-1]):
        c = (core.flatten(0, 1) @ c).reshape(core.shape[0], -1)  # (r_{k-1}, M_>=k)
    return a, c


def tt_halves_flops(shapes: Sequence[Shape]) -> int:
    """Multiply-adds of `tt_halves`: N_<k r_{k-1} n_k r_k for each core of the input but the first, and so mirrored."""
    p = len(shapes) // 2
    flops = 0
    for half in (shapes[:p], shapes[: p - 1 : -1]):
        entries = half[0][1]
        for r, mode, s in half[1:]:
            flops += entries * r * mode * s
            entries *= mode
    return flops


def tt_to_matrix(cores: Sequence[Tensor]) -> Tensor:
    """Multiply the cores out to the matrix W = (A C)^T of shape (M, N)."""
    a, c = tt_halves(cores)
    return (a @ c).T


def tt_matrix_flops(shapes: Sequence[Shape]) -> int:
    """Multiply-adds of `tt_to_matrix`: those of the halves, and N r_p M."""
    n, r, m = _tt_sizes(shapes)
    return tt_halves_flops(shapes) + n * r * m


def tt_contract(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """x W^T = (x A) C without forming W: a layer of rank r_p whose two thin matrices are compressed once more.

    Args:
        x: (B, N).
        cores: 2p tensors of shape (r_{k-1}, mode, r_k).

    Returns:
        (B, M).
    """
    a, c = tt_halves(cores)
    return x @ a @ c


def tt_contract_flops(rows: int, shapes: Sequence[Shape]) -> int:
    """Multiply-adds of `tt_contract`: those of the halves, and B r_p (N + M)."""
    n, r, m = _tt_sizes(shapes)
    return tt_halves_flops(shapes) + rows * r * (n + m)


def tt_svd(matrix: Tensor, in_factors: Sequence[int], out_factors: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """The cores of the TT that TT-SVD finds for a matrix (M, N), exact if the ranks allow it; error as in `ttm_svd`."""
    import tensorly
    from tensorly.decomposition import tensor_train

    wide = _wide(matrix).T.reshape(*in_factors, *out_factors)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return [core.to(matrix.dtype) for core in tensor_train(wide, rank=list(ranks))]


class Format(NamedTuple):
    """What a layer asks of a format; the functions above say what each one does."""

    modes: Callable[..., list[Mode]]
    to_matrix: Callable[..., Tensor]
    matrix_flops: Callable[..., int]
    contract: Callable[..., Tensor]
    contract_flops: Callable[..., int]
    svd: Callable[..., list[Tensor]]


FORMATS = {
    "TensorTrainMatrix": Format(ttm_modes, ttm_to_matrix, ttm_matrix_flops, ttm_contract, ttm_contract_flops, ttm_svd),
    "TensorTrain": Format(tt_modes, tt_to_matrix, tt_matrix_flops, tt_contract, tt_contract_flops, tt_svd),
}


def _wide(matrix: Tensor) -> Tensor:
    """The matrix in single precision at least: below it there is no singular value decomposition."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _in_half(chain: Sequence) -> list[Sequence]:
    """A list cut in the middle; a list of one is not cut."""
    middle = (len(chain) + 1) // 2
    return [half for half in (chain[:middle], chain[middle:]) if half]


def _join(a: Tensor, b: Tensor) -> Tensor:
    """Two neighbours in a TTM as one core: (r, m, n, s) and (s, m', n', t) to (r, m m', n n', t)."""
    return torch.einsum("rmns,sMNt->rmMnNt", a, b).flatten(3, 4).flatten(1, 2)


def _joined(shapes: Sequence[Shape]) -> tuple[Shape, int]:
    """The shape of TTM cores joined from the left to one, and the multiply-adds it takes: r m n s m' n' t a join."""
    shape, flops = shapes[0], 0
    for following in shapes[1:]:
        flops += prod(shape) * prod(following[1:])
        shape = (shape[0], shape[1] * following[1], shape[2] * following[2], following[3])
    return shape, flops


def _joined_halves(shapes: Sequence[Shape]) -> tuple[list[Shape], int]:
    """The shapes of `ttm_halves`, and the multiply-adds it takes to build them."""
    halves = [_joined(half) for half in _in_half(shapes)]
    return [shape for shape, _ in halves], sum(flops for _, flops in halves)


def _tt_sizes(shapes: Sequence[Shape]) -> tuple[int, int, int]:
    """(N, r_p, M)"""
    p = len(shapes) // 2
    return prod(n for _, n, _ in shapes[:p]), shapes[p][0], prod(m for _, m, _ in shapes[p:])
