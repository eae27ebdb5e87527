"""raypipe: preprocess images for machine learning on Ray, and see per stage what that costs and what to change."""

from raypipe.errors import UsageError

__all__ = ["UsageError"]
__version__ = "0.1.0"
