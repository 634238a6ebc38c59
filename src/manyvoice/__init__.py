"""Speech models that are trained once, fit every device and every voice, and prove it."""

__version__ = "0.1.0"
