"""What a model of two quadratic losses predicts about forgetting; numpy and scipy only.

quadratic.py    the two losses; where training with any levers ends, and its path
ordering.py     what each lever forgets at an equal amount of learning
"""

from holdfast.theory.ordering import (
    LEVERS,
    Place,
    Point,
    forgetting_at,
    frontier,
    point_at,
    predicted_ordering,
)
from holdfast.theory.quadratic import (
    EXAMPLE,
    REGIMES,
    Strengths,
    TwoTasks,
    descend,
    fixed_point,
    flow,
    gradient,
    random_basis,
    random_tasks,
    simulate,
)

__all__ = [
    "EXAMPLE",
    "LEVERS",
    "REGIMES",
    "Place",
    "Point",
    "Strengths",
    "TwoTasks",
    "descend",
    "fixed_point",
    "flow",
    "forgetting_at",
    "frontier",
    "gradient",
    "point_at",
    "predicted_ordering",
    "random_basis",
    "random_tasks",
    "simulate",
]
