"""The Hub: publishing whole models, and single experts."""
