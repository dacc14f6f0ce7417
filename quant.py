"""Rounding, as Python uses it: a face of low_precision for scripts that import from here."""

from low_precision.wrap import *  # noqa: F403
