"""Recipes that run as they stand: `hf-moe upcycle --recipe FILE`. Imported as `hf_moe.recipes`."""
