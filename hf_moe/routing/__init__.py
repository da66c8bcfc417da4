"""Routing in numbers and pictures: gathered by hooks from any mixture, tested, watched in training, reported."""

from .domains import Specialisation, specialise
from .gather import gather
from .monitor import RoutingMonitor
from .stats import RoutingStats

__all__ = ["RoutingMonitor", "RoutingStats", "Specialisation", "gather", "specialise"]
