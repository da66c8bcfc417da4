"""Training: recipes, Trainer, freezing, PEFT, many devices."""
