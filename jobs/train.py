"""Train a detection model on Ray while preprocess actors make the next batches.

    # a tiny SSD on 450 generated photos, on CPUs
    python jobs/train.py --input demo --storage out-train
    # SSD300 on COCO, on four GPUs
    python jobs/train.py --input coco/train2017 \\
        --annotations coco/annotations/instances_train2017.json \\
        --holdout-input coco/val2017 \\
        --holdout-annotations coco/annotations/instances_val2017.json \\
        --model ssd300_vgg16 --epochs 65 --batch-size 128 --optimizer sgd --lr 0.01 \\
        --schedule step --gpu --workers 4 --actors 48 --checkpoint-every 500 \\
        --storage s3://bucket/ssd
    # images that were preprocessed before
    python jobs/train.py --input 'train/*.parquet' --recipe ssd-300-val --storage out-train
    # a model of your own
    python jobs/train.py --input demo --model mymodels:make --model-arguments '{"width": 64}' \\
        --storage out-own
    # on a cluster
    ray job submit --working-dir . -- python jobs/train.py --input demo --storage /shared/out-train

Run it again with the same --storage to go on after Ctrl-C, a crash or a lost node, also with other
numbers of workers and actors.

Exit status: 0 when every row is accounted for and rejects stay within --max-reject-fraction,
1 when not, 2 for bad arguments.
"""

import sys

from raypipe.train.command import train

if __name__ == "__main__":
    sys.exit(train(description=__doc__))
