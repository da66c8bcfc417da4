"""From router logits to numbers and pictures."""
