"""What a method may know about the inputs of a layer; gathered in fp32 whatever the model's dtype."""

from abc import ABC, abstractmethod
from copy import copy
from typing import Self

import torch
from torch import Tensor

from sparsekit.nn.side_columns import SideColumns


class Statistics(ABC):
    """Sums over all tokens that a layer saw."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.in_features = in_features
        self.num_tokens = 0

    def add(self, x_MK: Tensor) -> None:
        """Take in M tokens of K features."""
        self.num_tokens += x_MK.shape[0]
        self._add(x_MK.float())

    @abstractmethod
    def _add(self, x_MK: Tensor) -> None: ...

    @property
    @abstractmethod
    def column_norms(self) -> Tensor:
        """Norm of each input feature over the tokens, fp32 [K]: sqrt(sum over tokens of x_k^2)."""

    @abstractmethod
    def reordered(self, order: Tensor) -> Self:
        """Return these statistics of the input features in another order, int64 [K]; those here stay as they are."""

    @abstractmethod
    def extended(self, columns: SideColumns, X: Tensor | None, z_scale: float) -> Self:
        """Return these statistics of x', the inputs of a weight with its side branch behind it; see `SideColumns`.

        Args:
            X: of the branch, [r, K]; None for sums of groups.
            z_scale: what z is multiplied by.
        """

    def is_finite(self) -> bool:
        """Return whether no NaN or infinity came in."""
        return bool(self.column_norms.isfinite().all())


class ColumnNorms(Statistics):
    """Norms of the input features: K numbers."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self._squares = torch.zeros(in_features, dtype=torch.float32, device=device)

    def _add(self, x_MK: Tensor) -> None:
        self._squares += x_MK.square().sum(dim=0)

    def reordered(self, order: Tensor) -> Self:
        other = copy(self)
        other._squares = self._squares[order]
        return other

    def extended(self, columns: SideColumns, X: Tensor | None, z_scale: float) -> Self:
        """As in the base class, of features that are taken to be uncorrelated, for of others their sums say nothing."""
        other = copy(self)
        factor = self._squares.new_tensor(z_scale**2)
        other._squares = columns.extend(self._squares, None if X is None else X.float().square(), factor)
        return other

    @property
    def column_norms(self) -> Tensor:
        return self._squares.sqrt()


class Hessian(Statistics):
    """H = sum over tokens of x x^T, fp32 [K, K]: half the second derivative of |W X - W' X|^2 in each row of W'.

    Attributes:
        matrix: H.
        num_last: features at the end that a walk over the columns is to leave to the end, where they can still make up
            for the errors of all others.
        factors: what was derived from the finished H, by damping and order, for the layers that share it.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.num_last = 0
        self.factors: dict[object, object] = {}

    def _add(self, x_MK: Tensor) -> None:
        self.matrix.addmm_(x_MK.T, x_MK)

    def reordered(self, order: Tensor) -> Self:
        other = copy(self)
        other.matrix, other.factors = self.matrix[order][:, order], {}
        return other

    def scaled(self, scales: Tensor) -> Self:
        """Return H of x / scales, [K]; this one stays as it is."""
        other = copy(self)
        other.matrix, other.factors = self.matrix / scales / scales[:, None], {}
        return other

    def extended(self, columns: SideColumns, X: Tensor | None, z_scale: float) -> Self:
        other = copy(self)
        factor, X = self.matrix.new_tensor(z_scale), None if X is None else X.float()
        other.matrix = columns.extend(columns.extend(self.matrix, X, factor).T, X, factor)
        other.num_last, other.factors = columns.packed_features - columns.first, {}
        return other

    @property
    def column_norms(self) -> Tensor:
        return self.matrix.diagonal().sqrt()

    def is_finite(self) -> bool:
        return bool(self.matrix.diagonal().isfinite().all())
