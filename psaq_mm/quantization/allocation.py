"""Bits for each layer under a budget: an integer linear program, solved by SciPy's HiGHS."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UserError


class InfeasibleError(UserError):
    """Even the cheapest choice for each layer exceeds the budget."""


@dataclass(frozen=True)
class Choice:
    """One way to quantize one layer: what it costs of the budget, and the error that it adds."""
    value: object
    cost: float
    error: float


def allocate(layers: dict[str, list[Choice]], budget: float) -> dict[str, Choice]:
    """One choice for each layer, so that the sum of errors is least and that of costs within the budget.

    That errors add up is the usual assumption: rounding noise of different layers is hardly correlated.

    Args:
        layers (dict[str, list[Choice]]): Choices by layer, at least one each.
        budget (float): In the unit of the costs.

    Returns:
        dict[str, Choice]: By layer. Source: the multiple-choice knapsack of mixed-precision work (HAWQ-V3).

    Raises:
        InfeasibleError: If no choice fits, saying what the least is, in the unit of the costs.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    least = sum(min(choice.cost for choice in choices) for choices in layers.values())
    if least > budget * (1 + 1e-9):
        raise InfeasibleError(f'the budget is {budget:g}, the cheapest choices cost {least:g}')
    flat = [(name, choice) for name, choices in layers.items() for choice in choices]
    owners = np.array([list(layers).index(name) for name, _ in flat])
    errors = np.array([choice.error for _, choice in flat])
    costs = np.array([choice.cost for _, choice in flat])
    one_each = (owners[None] == np.arange(len(layers))[:, None]).astype(float)
    scale = max(costs.max(), 1e-30)
    solved = milp(errors / max(errors.max(), 1e-30), integrality=np.ones(len(flat)), bounds=Bounds(0, 1), constraints=[
        LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None] / scale, -np.inf, budget / scale)])
    if solved.x is None:
        raise InfeasibleError(f'no choice of bits was found for a budget of {budget:g} (the cheapest cost {least:g})')
    return {name: choice for (name, choice), taken in zip(flat, solved.x) if taken > 0.5}
