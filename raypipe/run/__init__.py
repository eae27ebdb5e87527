"""Stages on Ray: settings, execution, and what a run leaves."""

import os

# Ray reads this as it is imported. Otherwise it would warn that more processes start than there are
# cores, which raypipe intends.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started on node"
)
