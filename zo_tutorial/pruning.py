"""Lottery tickets at initialisation: which weights to keep before any training. Chapter 5 derives the score.

Every method gives masks: {parameter name: bool tensor of its shape, True = kept} over the prunable parameters, the
weights and cores of all supported layers, or of those in some modules. Biases are never pruned. int(target_ratio · N)
of these N weights are removed. Where a mask keeps nothing of a parameter, a warning names it.

`inputs` are a tuple or list for `model(*inputs)`, a dict for `model(**inputs)`, or anything else for `model(inputs)`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zo_tutorial.estimators import finite_difference
from zo_tutorial.queries import LossQueries, call
from zo_tutorial.randomness import seeded
from zo_tutorial.selection import names_within, select_parameters
from zo_tutorial.substitution import Slot, slots_of, substituted
from zo_tutorial.temperature import divided


def grasp(
    model: nn.Module,
    criterion: Callable,
    inputs,
    targets,
    target_ratio: float,
    temperature: float = 200.0,
    modules: list[str] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """GraSP (Wang, Zhang and Grosse, 2020): remove the weights with the largest scores, under one global threshold.

    Args:
        model: scored at its present weights, the ones that will be trained; left as it is.
        criterion: a callable from (outputs, targets) to one number that autograd can differentiate twice.
        inputs, targets: a class-balanced batch.
        target_ratio: fraction of the weights that is removed, 0 ≤ target_ratio < 1.
        temperature: T, by which the logits are divided.
        modules: names of modules, such as "blocks"; only their weights can be removed. None: those of all layers.
        seed: of the model's own draws, such as dropout. The global generators stay as they are.

    Raises:
        ValueError: impossible `target_ratio`, an unknown module, no supported layer, no logits in the outputs, or a
            loss without the derivatives.
        FloatingPointError: a score is NaN or infinite.
    """
    scores = grasp_scores(model, criterion, inputs, targets, temperature, seed=seed)  # of all, as all will be trained
    return _warned(_remove_lowest({name: -scores[name] for name in _prunable(model, modules)}, target_ratio))


def grasp_scores(
    model: nn.Module, criterion: Callable, inputs, targets, temperature: float = 200.0, *, seed: int = 0
) -> dict[str, Tensor]:
    """S(θ) = −θ ⊙ Hg: half the first-order change of ‖g‖² when a weight is removed (δ = −θ_i e_i, Δ‖g‖² ≈ 2 δᵀHg)."""
    with _loss_at_weights(model, criterion, inputs, targets, temperature, seed) as (theta, loss):
        g = _slopes(loss, theta, create_graph=True)
        # Hg is the gradient of gᵀc with c, a copy of g, held constant.
        product: Any = sum((gradient * gradient.detach()).sum() for gradient in g)
        hg = _second_slopes(product, theta)
    return _finite({name: -weight.detach() * h for (name, weight), h in zip(theta.items(), hg, strict=True)})


def grasp_scores_from_losses(
    model: nn.Module,
    criterion: Callable,
    inputs,
    targets,
    h: float,
    query_mode: str = "auto",
    temperature: float = 200.0,
    *,
    seed: int = 0,
) -> tuple[dict[str, Tensor], int]:
    """The scores of `grasp_scores` from loss queries alone: 4d + 3 for d prunable weights. Chapter 5 derives the plan.

    2d losses L(θ ± h e_i) and L(θ) give g by two-sided differences, so v = g / ‖g‖. From L(θ ± h v) and 2d more::

        (Hv)_i ≈ [L(θ+hv+he_i) + L(θ−hv−he_i) − L(θ+he_i) − L(θ−he_i)
                  − L(θ+hv) − L(θ−hv) + 2 L(θ)] / 2h²

    Both err by O(h²) on a smooth loss. Rounding errs by about ε L / h² in (Hv)_i, itself of order 1 / temperature. At a
    high temperature use double precision, with h near 1e-3; in single precision ask for a loss that is linear in the
    outputs in place of the temperature, with an h of a few hundredths. Where a unit of ReLU bends between the points,
    the difference sees the kink, which second derivatives do not: there h must be small, or the scores are others.

    Args:
        model: put back bit for bit, whatever happens.
        criterion: a callable from (outputs, targets) to one number; nobody differentiates it.
        inputs, targets: a class-balanced batch.
        h: how far a query moves from θ, along a coordinate and along v.
        query_mode: see `LossQueries`.
        temperature: T, by which the logits are divided.
        seed: of the model's own draws, such as dropout, the same in every query.

    Returns:
        (scores, queries): {parameter name: tensor of its shape}, and how many losses were asked.

    Raises:
        ValueError: h not above 0, an unknown `query_mode`, no supported layer, or no logits in the outputs.
        FloatingPointError: a loss or a score is NaN or infinite.
    """
    if not h > 0:
        raise ValueError(f"h must be above 0, not {h}")
    theta = _prunable(model)
    queries = LossQueries(model, lambda outputs, y: criterion(divided(outputs, temperature), y), theta, query_mode)

    def losses(*shifts: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss where θ stands, and {name: (len(shifts), size)} with one coordinate shifted at a time."""
        _, here = queries.start(inputs, targets, seed=seed)
        every = {name: torch.arange(w.numel(), device=w.device) for name, w in theta.items()}
        return here, {name: queries.coordinates(name, index, list(shifts)) for name, index in every.items()}

    base, sides = losses(h, -h)  # 1 + 2d
    g = {name: finite_difference(plus, minus, 2 * h) for name, (plus, minus) in sides.items()}
    norm = torch.stack([slope.square().sum() for slope in g.values()]).sum().sqrt()
    v = {name: (slope / norm.clamp_min(torch.finfo(norm.dtype).tiny)).view_as(theta[name]) for name, slope in g.items()}
    before = {name: weight.detach().clone() for name, weight in theta.items()}
    ends = []
    try:
        for shift in (h, -h):
            _move(theta, before, v, shift)
            ends.append(losses(shift))  # 1 + d
    finally:
        _move(theta, before, v, 0)
    (ahead, plus), (behind, minus) = ends
    scores = {}
    for name, (plus_only, minus_only) in sides.items():
        bend = plus[name][0] + minus[name][0] - plus_only - minus_only - ahead - behind + 2 * base  # (size,)
        scores[name] = -before[name] * (norm * bend / (2 * h * h)).view_as(before[name])
    return _finite(scores), queries.count


def snip(
    model: nn.Module,
    criterion: Callable,
    inputs,
    targets,
    target_ratio: float,
    modules: list[str] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """SNIP (Lee, Ajanthan and Torr, 2019): keep the weights with the largest `|θ ⊙ g|`. Arguments as for `grasp`."""
    with _loss_at_weights(model, criterion, inputs, targets, 1.0, seed) as (theta, loss):
        g = _slopes(loss, theta)
    scores = {name: (w.detach() * gradient).abs() for (name, w), gradient in zip(theta.items(), g, strict=True)}
    _finite(scores)
    return _warned(_remove_lowest({name: scores[name] for name in _prunable(model, modules)}, target_ratio))


def magnitude(model: nn.Module, target_ratio: float, modules: list[str] | None = None) -> dict[str, Tensor]:
    """Keep the weights with the largest `|θ|`. Raises FloatingPointError where one is NaN or infinite."""
    scores = {name: weight.detach().abs() for name, weight in _prunable(model, modules).items()}
    return _warned(_remove_lowest(_finite(scores), target_ratio))


def random(
    model: nn.Module, target_ratio: float, generator: torch.Generator, modules: list[str] | None = None
) -> dict[str, Tensor]:
    """Keep weights at random, the same share in every layer (to within one weight)."""
    _check_ratio(target_ratio)
    masks, seen, removed = {}, 0, 0
    for name, weight in _prunable(model, modules).items():
        seen += weight.numel()
        now = int(target_ratio * seen) - removed  # rounded on the running total, so the whole is int(ratio · N)
        masks[name] = torch.ones_like(weight, dtype=torch.bool)
        masks[name].view(-1)[torch.randperm(weight.numel(), generator=generator)[:now]] = False
        removed += now
    return _warned(masks)


def shuffle(masks: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The control for any mask: the same number kept in each parameter, at random places."""
    order = {name: torch.randperm(mask.numel(), generator=generator) for name, mask in masks.items()}
    return {name: mask.flatten()[order[name]].view_as(mask) for name, mask in masks.items()}


@torch.no_grad()
def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Set the removed weights to zero."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask, 0)


def table(masks: dict[str, Tensor]) -> str:
    """Kept and removed weights of each parameter and in all, as text."""
    rows = [(name, int(mask.sum()), mask.numel()) for name, mask in masks.items()]
    rows.append(("all", sum(kept for _, kept, _ in rows), sum(size for _, _, size in rows)))
    width = max(len("parameter"), *(len(name) for name, _, _ in rows))
    lines = [f"{'parameter':{width}} {'weights':>10} {'kept':>10} {'removed':>10} {'kept %':>7}"]
    for name, kept, size in rows:
        lines.append(f"{name:{width}} {size:>10,} {kept:>10,} {size - kept:>10,} {100 * kept / size:>7.2f}")
    return "\n".join(lines)


def _prunable(model: nn.Module, modules: list[str] | None = None) -> dict[str, Tensor]:
    trained = select_parameters(model).trained
    inside = trained if modules is None else names_within(model, modules)
    weights = {name: p for name, p in trained.items() if name in inside and name.rpartition(".")[2] != "bias"}
    if not weights:
        raise ValueError(f"modules: no weight to prune in {', '.join(modules or [])}")
    return weights


@torch.no_grad()
def _move(theta: dict[str, Tensor], start: dict[str, Tensor], direction: dict[str, Tensor], distance: float) -> None:
    """Put the weights at start + distance · direction."""
    for name, weight in theta.items():
        weight.copy_(start[name] + distance * direction[name] if distance else start[name])


@contextmanager
def _loss_at_weights(
    model: nn.Module, criterion: Callable, inputs, targets, temperature: float, seed: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Copies of the prunable weights that autograd follows, and the loss at them, logits divided by `temperature`.

    Within it the model has these copies, and copies of its buffers; afterwards it is what it was. Fused attention has
    no second derivatives, so attention is written out.
    """
    theta = {name: weight.detach().clone().requires_grad_() for name, weight in _prunable(model).items()}
    pairs: list[tuple[list[Slot], Tensor | None]]
    pairs = [(slots_of(model, p), theta.get(name, p.detach())) for name, p in model.named_parameters()]
    copies: dict[Tensor | None, Tensor | None] = {None: None} | {buffer: buffer.clone() for buffer in model.buffers()}
    for module in model.modules():
        pairs += [([(module._buffers, key)], copies[buffer]) for key, buffer in module._buffers.items()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with substituted(pairs), seeded(seed), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            loss = criterion(divided(call(model, inputs), temperature), targets)
            if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
                raise ValueError(
                    "the criterion should return one number that autograd can follow back to the weights; "
                    "grasp_scores_from_losses asks for nothing but the number"
                )
            yield theta, loss
    finally:
        for module, training in modes:
            module.training = training


def _slopes(value: Tensor, theta: dict[str, Tensor], create_graph: bool = False) -> list[Tensor]:
    """The derivatives of a number by each weight, 0 by those that have no effect on it."""
    if not value.requires_grad:
        return [torch.zeros_like(weight) for weight in theta.values()]
    weights = list(theta.values())
    slopes = torch.autograd.grad(value, weights, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return list(slopes)


def _second_slopes(value: Tensor, theta: dict[str, Tensor]) -> list[Tensor]:
    """The same for a number made of derivatives. Raises ValueError where these cannot be differentiated."""
    seen, ahead = set(), [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
    try:
        # What is once_differentiable ends in such a node, which is off the way to the weights and would pass for 0.
        if any(node.name() == "torch::autograd::Error" for node in seen):
            raise RuntimeError("a function of the model is once_differentiable")
        return _slopes(value, theta)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"GraSP needs second derivatives, snip only first ones; torch says: {reason}") from error


def _finite(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scores themselves. Raises FloatingPointError where one cannot be ranked."""
    for name, score in scores.items():
        if not score.isfinite().all():
            raise FloatingPointError(f"the scores of {name!r} are NaN or infinite: look at the weights and the loss")
    return scores


def _remove_lowest(scores: dict[str, Tensor], target_ratio: float) -> dict[str, Tensor]:
    """Masks that drop the int(target_ratio · N) lowest scores of all parameters together."""
    _check_ratio(target_ratio)
    flat = torch.cat([score.flatten() for score in scores.values()])  # (N,)
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[flat.argsort(stable=True)[: int(target_ratio * len(flat))]] = False
    pieces = kept.split([score.numel() for score in scores.values()])
    return {name: piece.view_as(score) for (name, score), piece in zip(scores.items(), pieces, strict=True)}


def _warned(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The masks themselves. Warns where one keeps nothing."""
    gone = [name for name, mask in masks.items() if not mask.any()]
    if gone:
        warnings.warn(f"pruning keeps no weight of {', '.join(gone)}", stacklevel=3)
    return masks


def _check_ratio(target_ratio: float) -> None:
    if not 0 <= target_ratio < 1:
        raise ValueError(f"target_ratio is the fraction removed: 0 <= target_ratio < 1, not {target_ratio}")
