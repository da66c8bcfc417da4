"""Training from a recipe: Transformers' Trainer, with what mixtures need beside it."""

from .freezing import freeze, what_trains
from .recipe import TrainRecipe
from .run import Trained, train
from .trainer import MoeTrainer

__all__ = ["MoeTrainer", "TrainRecipe", "Trained", "freeze", "train", "what_trains"]
