"""Arithmetic of low-rank changes, in fp64 and without the dense matrix: sums, norms, angles, best approximations.

Shapes as in the contract: left `(..., n_out, k)`, right `(..., k, n_in)`, with a leading `experts` dimension where they
are fused. With left = Q R and right^T = P S, the product is Q (R S^T) P^T, whose middle is a k x k matrix with the same
singular values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from adapters._contract import Factors

ZERO = 1e-6  # singular values below this share of the largest are rounding: adapters are fp32, and often bf16


def wide(tensor: Tensor) -> Tensor:
    """In fp64, on its own device where that has such numbers."""
    here = tensor.detach()
    return (here.cpu() if here.device.type == "mps" else here).double()


def widened(low: Factors) -> Factors:
    """The same change in fp64, with the scale in `left` and `bias`."""
    bias = None if low.bias is None else low.scale * wide(low.bias)
    return Factors(low.scale * wide(low.left), wide(low.right), 1.0, bias)


def summed(terms: Iterable[tuple[float, Factors]]) -> Factors:
    """sum_i w_i L_i R_i = [w_1 L_1, w_2 L_2, ...] [R_1; R_2; ...], exactly, and the biases likewise."""
    held = [(weight, widened(low)) for weight, low in terms]
    biases = [weight * low.bias for weight, low in held if low.bias is not None]
    return Factors(
        torch.cat([weight * low.left for weight, low in held], -1),
        torch.cat([low.right for _, low in held], -2),
        bias=torch.stack(biases).sum(0) if biases else None,
    )


def norm(change: Factors | Tensor) -> float:
    """The Frobenius norm, of all experts together."""
    if isinstance(change, Tensor):
        return float(torch.linalg.vector_norm(change))
    return float(torch.linalg.vector_norm(_split(widened(change))[1]))


def inner(a: Factors, b: Factors) -> float:
    """<A, B> = tr(A^T B) = sum((L_a^T L_b) * (R_a R_b^T)), of all experts together."""
    a, b = widened(a), widened(b)
    return float(((a.left.mT @ b.left) * (a.right @ b.right.mT)).sum())


def error(exact: Factors | Tensor, stored: Factors) -> float:
    """|exact - stored| / |exact|; 0 where both are 0."""
    if isinstance(exact, Tensor):
        difference = norm(exact - widened(stored).dense())
    else:
        difference = norm(summed([(1.0, exact), (-1.0, stored)]))
    size = norm(exact)
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def leading(change: Factors | Tensor, rank: int) -> Factors:
    """The best approximation of a rank (Eckart and Young, 1936), L = U sqrt(S), R = sqrt(S) V^T; the bias stays.

    The rank is no larger than the sides or the factors of the change allow. From the eigenvectors of the smaller Gram
    matrix, six times as fast as a decomposition into singular values; what that loses, directions below 1e-8 of the
    largest, is less than an fp32 tensor holds.
    """
    if isinstance(change, Tensor):
        return _leading(change, rank)
    low = widened(change)
    left, middle, right = _split(low)
    found = _leading(middle, rank)
    return Factors(left @ found.left, found.right @ right.mT, bias=low.bias)


def spaces(low: Factors) -> list[tuple[Tensor, Tensor]]:
    """For each expert, or once: orthonormal bases of the column and the row space, `(n_out, r)` and `(n_in, r)`."""
    left, middle, right = _split(widened(replace(low, bias=None)))
    u, s, vh = torch.linalg.svd(middle, full_matrices=False)
    flat = [part.reshape(-1, *part.shape[-2:]) for part in (left @ u, right @ vh.mT)]
    ranks = (s > ZERO * s[..., :1]).sum(-1).reshape(-1)
    return [(p[:, : int(r)], q[:, : int(r)]) for p, q, r in zip(*flat, ranks, strict=True)]


def overlap(p: Tensor, q: Tensor) -> float:
    """|P^T Q|^2 / min(i, j), the mean squared cosine of the angles between two spaces (LoRA, section 7.2); else NaN."""
    smaller = min(p.shape[-1], q.shape[-1])
    return float((p.mT @ q).square().sum()) / smaller if smaller else float("nan")


def _split(low: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal columns Q, the small middle matrix, and orthonormal columns P: Q middle P^T."""
    q, r = torch.linalg.qr(low.left)
    p, s = torch.linalg.qr(low.right.mT)
    return q, r @ s.mT, p


def _leading(matrix: Tensor, rank: int) -> Factors:
    if matrix.shape[-2] > matrix.shape[-1]:
        turned = _leading(matrix.mT, rank)
        return Factors(turned.right.mT, turned.left.mT)
    _, vectors = torch.linalg.eigh(matrix @ matrix.mT)  # in ascending order
    u = vectors[..., -rank:].flip(-1)
    projected = u.mT @ matrix
    root = torch.linalg.vector_norm(projected, dim=-1, keepdim=True).sqrt()
    return Factors(u * root.mT, projected / root.masked_fill(root == 0, 1))
