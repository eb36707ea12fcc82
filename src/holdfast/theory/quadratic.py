r"""Two tasks with quadratic losses: what each lever does to both, in closed form.

    L_pre(theta) = 1/2 (theta - theta_0)^T F (theta - theta_0)            the base's own loss, risen
    L_sft(theta) = 1/2 (theta - theta_sft)^T F_sft (theta - theta_sft)    the lesson's loss

Both losses are 0 at their optimum, so `L_pre` is the forgetting. With replay r, KL beta, L2-SP
lambda and EWC mu, training descends

    (1 - r) L_sft + (r + beta) L_pre + lambda/2 |delta|^2 + mu/2 delta^T diag(F_hat) delta

with `delta = theta - theta_0`. Its gradient is affine, `A delta - b`, so fixed point and path have
closed forms: in A's eigenbasis each coordinate is `gain(a) b`, where

    fixed point        gain = 1 / a
    gradient flow      gain = (1 - exp(-t a)) / a
    gradient descent   gain = (1 - (1 - lr a)^s) / a

A low-rank restriction `delta = U z` replaces A by `U^T A U` and b by `U^T b`. docs/theory.md says
what follows, and what the model cannot know.

Source: the second-order expansion of the loss at the base's optimum, F the Fisher information
(Kirkpatrick et al. 2017); L2-SP: Li et al. 2018 (arXiv 1802.01483).

Shape suffixes: N parameters, R directions of the low-rank restriction, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.errors import RequestError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TwoTasks:
    """The base's loss, the lesson's loss, and what the levers know of them.

    Raises:
        RequestError: shapes do not fit, or a matrix is not symmetric positive semidefinite.
    """

    theta_0_N: Array
    """Optimum of the base's loss: where training starts."""
    theta_sft_N: Array
    """Optimum of the lesson's loss."""
    F_NN: Array
    """Curvature of the base's loss: the Fisher information on text of the base's kind."""
    F_sft_NN: Array
    """Curvature of the lesson's loss."""
    fisher_N: Array = None  # type: ignore[assignment]
    """EWC's estimate of F's diagonal, right or wrong. None: the exact diagonal."""
    basis_NR: Array = None  # type: ignore[assignment]
    """Directions of the low-rank restriction, the first k of which rank k may use; made orthonormal
    here. None: N random directions from seed 0, as LoRA's A is random."""

    def __post_init__(self) -> None:
        n = _array("theta_0", self.theta_0_N, (None,)).shape[0]
        F_NN = _curvature("F", self.F_NN, n)
        fisher = np.diag(F_NN) if self.fisher_N is None else self.fisher_N
        basis = random_basis(n, seed=0) if self.basis_NR is None else self.basis_NR
        checked = {
            "theta_0_N": _array("theta_0", self.theta_0_N, (n,)),
            "theta_sft_N": _array("theta_sft", self.theta_sft_N, (n,)),
            "F_NN": F_NN,
            "F_sft_NN": _curvature("F_sft", self.F_sft_NN, n),
            "fisher_N": _array("fisher", fisher, (n,)),
            "basis_NR": _orthonormal(_array("basis", basis, (n, None))),
        }
        if (checked["fisher_N"] < 0).any():
            raise RequestError("fisher: an entry is negative; a squared gradient is at least 0")
        for name, value in checked.items():
            value.setflags(write=False)
            object.__setattr__(self, name, value)

    @property
    def start(self) -> float:
        """The lesson's loss at `theta_0`, before anything is learnt."""
        return self.task_loss(self.theta_0_N)

    def task_loss(self, theta_N: ArrayLike) -> float:
        """`L_sft`, in nats; 0 is all of the lesson."""
        return _half_square(np.asarray(theta_N) - self.theta_sft_N, self.F_sft_NN)

    def pretraining_rise(self, theta_N: ArrayLike) -> float:
        """`L_pre`, in nats: how much the base's own loss has risen."""
        return _half_square(np.asarray(theta_N) - self.theta_0_N, self.F_NN)


@dataclass(frozen=True)
class Strengths:
    """How hard each lever pulls. The defaults are naive fine-tuning."""

    replay: float = 0.0
    """r, share of the tokens that are replayed, 0..1: the lesson's loss has weight 1 - r."""
    kl_anchor: float = 0.0
    """beta, weight of KL to the base on text of its kind; to second order KL is `L_pre`."""
    l2_sp: float = 0.0
    """lambda: lambda/2 |delta|^2."""
    ewc: float = 0.0
    """mu: mu/2 delta^T diag(F_hat) delta."""
    rank: int | None = None
    """Directions of the basis that may be used, from 1. None: no restriction."""
    rewind: float = 1.0
    """Scale of the displacement after training, 0..1. 1: not rewound."""

    def __post_init__(self) -> None:
        for name in ("replay", "kl_anchor", "l2_sp", "ewc", "rewind"):
            value, share = getattr(self, name), name in ("replay", "rewind")
            if not 0 <= value <= (1 if share else math.inf) or math.isinf(value):
                allowed = "from 0 to 1, such as 0.1" if share else "of at least 0, such as 0.5"
                raise RequestError(f"{name}: {value} is not allowed; give a number {allowed}")


# ---- where training goes


def fixed_point(tasks: TwoTasks, levers: Strengths) -> Array:
    """Where training ends. A direction without curvature stays where it was. `[n]`"""
    return _solve(tasks, levers, lambda a: 1 / a)


def flow(tasks: TwoTasks, levers: Strengths, time: float) -> Array:
    """Where gradient flow is at `time`, which is lr x steps at a small lr. `[n]`"""
    if not 0 <= time < math.inf:
        raise RequestError(f"time: {time} is not allowed; give lr x steps, such as 10")
    return _solve(tasks, levers, lambda a: -np.expm1(-time * a) / a)


def descend(tasks: TwoTasks, levers: Strengths, lr: float, steps: int) -> Array:
    """Where gradient descent is after `steps` steps, in closed form. `[n]`

    Raises:
        RequestError: this `lr` diverges: it is not below 2 / (A's largest eigenvalue).
    """
    _check_steps(lr, steps)

    def gain(a_R: Array) -> Array:
        """`(1 - (1 - lr a)^s) / a`, the difference from 1 without cancellation where lr a < 1."""
        x_R = lr * a_R
        if x_R.max(initial=0) >= 2:
            raise RequestError(
                f"lr: {lr} diverges on these losses; give less than {2 / a_R.max():.3g}, "
                f"such as {1 / a_R.max():.2g}"
            )
        slow = x_R < 1
        learnt_R = np.where(
            slow, -np.expm1(steps * np.log1p(-np.where(slow, x_R, 0))), 1 - (1 - x_R) ** steps
        )
        return np.asarray(learnt_R / a_R)

    return _solve(tasks, levers, gain)


def simulate(tasks: TwoTasks, levers: Strengths, lr: float, steps: int) -> Array:
    """The same path walked step by step, from the losses' gradients alone. `[steps + 1, n]`"""
    _check_steps(lr, steps)
    U_NR = _directions(tasks, levers)
    theta_N = tasks.theta_0_N
    path = [theta_N]
    for _ in range(steps):
        theta_N = theta_N - lr * (U_NR @ (U_NR.T @ gradient(tasks, levers, theta_N)))
        path.append(theta_N)
    return tasks.theta_0_N + levers.rewind * (np.array(path) - tasks.theta_0_N)


def gradient(tasks: TwoTasks, levers: Strengths, theta_N: ArrayLike) -> Array:
    """Gradient of the training loss, not restricted to the low-rank directions. `[n]`"""
    theta = np.asarray(theta_N, dtype=np.float64)
    delta_N = theta - tasks.theta_0_N
    return np.asarray(
        (1 - levers.replay) * (tasks.F_sft_NN @ (theta - tasks.theta_sft_N))
        + (levers.replay + levers.kl_anchor) * (tasks.F_NN @ delta_N)
        + levers.l2_sp * delta_N
        + levers.ewc * tasks.fisher_N * delta_N
    )


def _solve(tasks: TwoTasks, levers: Strengths, gain: Callable[[Array], Array]) -> Array:
    """`theta_0 + rewind U Q gain(a) Q^T U^T b`, where `U^T A U = Q diag(a) Q^T`.

    Where a is 0 but for rounding, so is b, which lies in A's range: nothing moves there.
    """
    r, U_NR = levers.replay, _directions(tasks, levers)
    A_NN = (
        (1 - r) * tasks.F_sft_NN
        + (r + levers.kl_anchor) * tasks.F_NN
        + levers.l2_sp * np.eye(len(tasks.theta_0_N))
        + levers.ewc * np.diag(tasks.fisher_N)
    )
    b_N = (1 - r) * (tasks.F_sft_NN @ (tasks.theta_sft_N - tasks.theta_0_N))
    a_R, Q_RR = np.linalg.eigh(U_NR.T @ A_NN @ U_NR)
    felt = a_R > len(a_R) * np.finfo(np.float64).eps * a_R.max()
    a_R, Q_RR = a_R[felt], Q_RR[:, felt]
    delta_N = U_NR @ (Q_RR @ (gain(a_R) * (Q_RR.T @ (U_NR.T @ b_N))))
    return np.asarray(tasks.theta_0_N + levers.rewind * delta_N)


def _directions(tasks: TwoTasks, levers: Strengths) -> Array:
    """Where training may move: everywhere, or the first `rank` directions of the basis."""
    if levers.rank is None:
        return np.eye(len(tasks.theta_0_N))
    basis_NR = tasks.basis_NR
    if levers.rank not in range(1, basis_NR.shape[1] + 1):
        raise RequestError(
            f"low_rank: {levers.rank} is not a rank of this basis; give 1 to {basis_NR.shape[1]}"
        )
    return basis_NR[:, : int(levers.rank)]


# ---- checks


def _check_steps(lr: float, steps: int) -> None:
    if not 0 < lr < math.inf:
        raise RequestError(f"lr: {lr} is not allowed; give a number above 0, such as 0.1")
    if steps < 0:
        raise RequestError(f"steps: {steps} is not allowed; give 0 or more, such as 100")


def _array(name: str, value: ArrayLike | None, shape: tuple[int | None, ...]) -> Array:
    """A float64 copy of finite numbers whose shape fits; None in `shape` stands for any size."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name}: not numbers in one shape; give a plain array") from error
    fits = array.ndim == len(shape) and array.size > 0
    if not fits or any(
        want not in (None, got) for want, got in zip(shape, array.shape, strict=True)
    ):
        wanted = " x ".join("any" if want is None else str(want) for want in shape)
        raise RequestError(f"{name}: has shape {array.shape}; give one of {wanted}")
    if not np.isfinite(array).all():
        raise RequestError(f"{name}: holds a value that is not finite; give finite numbers")
    return array


def _curvature(name: str, value: ArrayLike, n: int) -> Array:
    """A symmetric positive semidefinite matrix."""
    matrix = _array(name, value, (n, n))
    scale = np.abs(matrix).max()
    if np.abs(matrix - matrix.T).max() > 1e-9 * scale:
        raise RequestError(f"{name}: is not symmetric; give ({name} + {name}^T) / 2")
    matrix = (matrix + matrix.T) / 2
    lowest = float(np.linalg.eigvalsh(matrix)[0])
    if lowest < -1e-9 * scale:
        raise RequestError(
            f"{name}: has the negative curvature {lowest:.3g}; give a positive "
            "semidefinite matrix, such as a Fisher matrix"
        )
    return matrix


def _orthonormal(basis_NR: Array) -> Array:
    """The basis made orthonormal from the left, so that its first k columns span what they did."""
    q_NR, r_RR = np.linalg.qr(basis_NR)
    lengths = np.abs(np.diag(r_RR))
    if basis_NR.shape[1] > basis_NR.shape[0] or lengths.min() <= 1e-10 * np.abs(basis_NR).max():
        raise RequestError("basis: its columns are linearly dependent; leave out those that repeat")
    return np.asarray(q_NR)


def _half_square(delta_N: Array, F_NN: Array) -> float:
    return float(0.5 * delta_N @ F_NN @ delta_N)


# ---- examples


def random_basis(n: int, seed: int) -> Array:
    """N orthonormal directions, uniformly distributed. `[n, n]`."""
    q_NN, r_NN = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return np.asarray(q_NN * np.sign(np.diag(r_NN)))


def random_tasks(
    n: int, *, seed: int, overlap: float = 0.5, decay: float = 1.0, fisher_noise: float = 0.0
) -> TwoTasks:
    """Two tasks drawn at random.

    Args:
        n: parameters.
        seed: of everything drawn; `overlap` and `fisher_noise` change no other draw.
        overlap: `F_sft = overlap F + (1 - overlap) G`, with G drawn as F is. 1: the same curvature.
        decay: the i-th eigenvalue of F and of G is `i^-decay`, in random directions.
        fisher_noise: EWC's diagonal is off by factors `exp(fisher_noise * normal)`.
    """
    if n < 1:
        raise RequestError(f"dim: {n} is too few parameters; give at least 1, such as 16")
    if not 0 <= overlap <= 1:
        raise RequestError(f"overlap: {overlap} is not a share; give 0 to 1, such as 0.5")
    if not 0 <= fisher_noise < 10:
        raise RequestError(f"fisher_noise: {fisher_noise} is not allowed; give 0 to 10, such as 1")
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(4)]
    eigenvalues_N = np.arange(1.0, n + 1) ** -decay
    F_NN, G_NN = (
        (q_NN * eigenvalues_N) @ q_NN.T for q_NN in (random_basis(n, s) for s in seeds[:2])
    )
    rng = np.random.default_rng(seeds[2])
    theta_sft_N, noise_N = rng.standard_normal(n), rng.standard_normal(n)
    return TwoTasks(
        theta_0_N=np.zeros(n),
        theta_sft_N=theta_sft_N,
        F_NN=F_NN,
        F_sft_NN=overlap * F_NN + (1 - overlap) * G_NN,
        fisher_N=np.diag(F_NN) * np.exp(fisher_noise * noise_N),
        basis_NR=random_basis(n, seeds[3]),
    )


EXAMPLE = TwoTasks(
    np.array([1.0, 0.0]), np.array([1.0, 2.5]), np.diag([2.5, 0.25]), np.diag([2.5, 0.25])
)
"""The textbook case. The optima differ in theta[1] alone ("coordinate 1", counted from 0: the
second entry, of curvature 0.25), so theta[0] stays 1 whatever one does."""

REGIMES = {
    "naive": Strengths(),
    "replay": Strengths(replay=0.1),
    "kl_anchor": Strengths(kl_anchor=0.5),
    "both": Strengths(replay=0.1, kl_anchor=0.5),
}
"""The four regimes that are usually shown on `EXAMPLE`."""
