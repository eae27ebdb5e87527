"""The rest of the work on Ray: what is done, by how many actors, and what becomes of it."""

import os

# Ray reads it as it is imported. On few cores it would warn on the terminal that more processes start than there are cores: raypipe means them to.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started on node"
)
