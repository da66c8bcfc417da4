"""Model cards of what the recipes made, and their templates. Imported as `hf_moe.model_cards`."""
