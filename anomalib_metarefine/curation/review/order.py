"""The order of the images that nobody has looked at, made anew from a person's answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import rankdata
from sklearn.isotonic import IsotonicRegression

if TYPE_CHECKING:
    from collections.abc import Mapping

# On five real families, 90 % of the dirty images were found with 0.84 times the looks of the first order at penalties
# of 1 and 3 (0.88 at 0.5, 0.97 at 0.2), and about the same at exponents of 2 and 4.
_STEEPNESS = 3  # exponent of the first guess over the ranks: the highest fifth of the scores starts above one half
_NOISE = 2.0  # ridge penalty where features have length one: answers err, and look-alikes differ
_LEAST_LEFT = 0.5  # Jeffreys' half image: where nothing was found lately, the estimate is small and not zero


class Order(NamedTuple):
    """Suspicion after the answers.

    Attributes:
        values (np.ndarray): ``[N]``, higher is more suspicious.
        about (float): Estimated number of dirty images among those without an answer.
    """

    values: np.ndarray
    about: float


def reorder(scores: np.ndarray, features: np.ndarray | None, answers: Mapping[int, bool]) -> Order:
    """Order the images by scores and answers: look-alikes of dirty images rise, those of clean ones fall.

    Ridge regression of the answers, less a first guess from the ranks of the scores, on the features; in its dual form,
    so that it costs a matrix of the answers only. The number left is read from an isotonic regression of the answers on
    leave-one-out predictions, which does not see an image's own answer.

    Args:
        scores (np.ndarray): ``[N]``, higher is more suspicious; those that are not finite count as the lowest.
        features (np.ndarray | None): ``[N x D]``; ``None`` orders by the scores alone.
        answers (Mapping[int, bool]): Whether an image is dirty, by its index.

    References:
        Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, section 5.4.2 (leave-one-out).
        Zadrozny and Elkan, "Transforming classifier scores into accurate multiclass probability estimates", KDD 2002.
    """
    guess = (rankdata(np.nan_to_num(scores, nan=-np.inf)) / len(scores)) ** _STEEPNESS
    asked = np.fromiter(answers.keys(), dtype=int, count=len(answers))
    dirty = np.fromiter(answers.values(), dtype=float, count=len(answers))
    values, unaware = guess, guess[asked]
    if features is not None and len(asked):
        x = _unit_rows(features)
        inverse = np.linalg.inv(x[asked] @ x[asked].T + _NOISE * np.eye(len(asked)))
        weights = inverse @ (dirty - guess[asked])
        values = guess + x @ (x[asked].T @ weights)
        unaware = dirty - weights / np.diag(inverse)
    return Order(values, _left(values, unaware, asked, dirty))


def _unit_rows(features: np.ndarray) -> np.ndarray:
    """Centred rows of length one; a row without any deviation stays zero."""
    x = np.asarray(features, dtype=np.float32)
    x = x - x.mean(0)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)


def _left(values: np.ndarray, unaware: np.ndarray, asked: np.ndarray, dirty: np.ndarray) -> float:
    rest = np.ones(len(values), dtype=bool)
    rest[asked] = False
    if not rest.any():
        return 0.0
    if not len(asked):
        return float(values[rest].sum())
    calibrated = IsotonicRegression(out_of_bounds="clip").fit(unaware, dirty)
    return max(float(calibrated.predict(values[rest]).sum()), min(_LEAST_LEFT, float(rest.sum())))
