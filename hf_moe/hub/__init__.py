"""The Hub: publishing whole models, and single experts."""

from .publish import Published, make_card, publish

__all__ = ["Published", "make_card", "publish"]
