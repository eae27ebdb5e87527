"""Say what is in images with a model that jobs/train.py trained, on Ray; and how good that is, where boxes are known.

    python jobs/predict.py --checkpoint out-train --input photos/ --output out-predict --draw      # boxes as JSON, Parquet, and drawn
    python jobs/predict.py --checkpoint out-train --input demo:200 --seed 1 --output out-demo      # photos it never saw, and its precision
    python jobs/predict.py --checkpoint s3://bucket/ssd --input coco/val2017 \\
        --annotations coco/annotations/instances_val2017.json --gpu --predictors 4 --actors 24 --output s3://bucket/val2017
    python jobs/predict.py --checkpoint out-train --input 'shards/{000..099}.tar' --min-score 0.3 --output out-shards
    python jobs/predict.py --checkpoint out-own --trust mymodels:make --input photos/ --output out-own-found   # a model of your own
    ray job submit --working-dir . -- python jobs/predict.py --checkpoint /shared/out-train --input /shared/photos --output /shared/found

The recipe is the one in the checkpoint, without its random ops. Boxes are in pixels of the original images.
Run it again with the same --output to go on after Ctrl-C, a crash or a lost node.
Exit status: 0 when every image is accounted for and rejects stay within --max-reject-fraction,
1 when not, 2 for bad arguments.
"""

import sys

from raypipe.run.command import predict

if __name__ == "__main__":
    sys.exit(predict(description=__doc__))
