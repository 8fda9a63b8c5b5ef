"""Data to calibrate on, what layers see of it, and the walk through a model one block at a time."""

from sparsekit.calibration.samples import Samples, load_samples
from sparsekit.calibration.statistics import ColumnNorms, Hessian, Statistics
from sparsekit.calibration.walk import Walk

__all__ = ["ColumnNorms", "Hessian", "Samples", "Statistics", "Walk", "load_samples"]
