"""raypipe: preprocess images for machine learning on Ray, and see per stage what that costs and what to change."""

__version__ = "0.1.0"


class UsageError(ValueError):
    """What the user asked for cannot be done. The message states the value given, the consequence and the remedy.

    Commands print it in one line and exit with status 2.
    """
