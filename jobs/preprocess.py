"""Preprocess images on Ray, and report what each stage cost and which one limits.

    # 500 generated photos, nothing written
    python jobs/preprocess.py --input demo
    # your own photos: JPEGs of 300x300, names kept
    python jobs/preprocess.py --input photos/ --output out/
    # MLPerf's upscale_coco, in parallel
    python jobs/preprocess.py --input coco/val2017 \\
        --annotations coco/annotations/instances_val2017.json \\
        --recipe coco-1200 --format png --output coco-1200/
    # tars to Parquet, for training
    python jobs/preprocess.py --input 'shards/{000..009}.tar' --recipe ssd-300-train \\
        --format parquet --output train/
    # from a store to a store
    python jobs/preprocess.py --input s3://bucket/photos --output s3://bucket/photos-300 \\
        --actors 16 --writers 4
    # on a cluster
    ray job submit --working-dir . -- python jobs/preprocess.py --input demo

Run it again with the same --output to go on after Ctrl-C, a crash or a lost node.

Exit status: 0 when every image is accounted for and rejects stay within --max-reject-fraction,
1 when not, 2 for bad arguments.
"""

import sys

from raypipe.run.command import preprocess

if __name__ == "__main__":
    sys.exit(preprocess(description=__doc__))
