"""Measure here what the talk measured, and judge its claims: time and CPU over actors and writers.

    # the talk's grid: 1 to 20 actors
    python jobs/sweep.py --input demo:1000 --output out-sweep
    # as to a slow store: about half an hour on 2 cores
    python jobs/sweep.py --input photos/ --output out-sweep --actors 1 2 4 8 --store-ms 10
    # what OpenCV's thread pool does
    python jobs/sweep.py --input photos/ --output out-threads --writers none --threads 1 8
    # training too
    python jobs/sweep.py --input coco/train2017 \\
        --annotations coco/annotations/instances_train2017.json --train --output out-train

Run it again with the same --output to go on after Ctrl-C, or to add points to the grid. The
results are in --output: sweep.html with a figure for each claim, results.parquet and results.csv.

Exit status: 0 when all points were measured that there is memory for, 1 when one failed or lost
images, 2 for bad arguments.
"""

import sys

from raypipe.sweep.command import sweep

if __name__ == "__main__":
    sys.exit(sweep(description=__doc__))
