"""Say what is in images with a model that jobs/train.py trained, on Ray.

    # boxes as JSON and Parquet, and drawn on the images
    python jobs/predict.py --checkpoint out-train --input photos/ --draw --output out-predict
    # photos that the model never saw, and its precision on them
    python jobs/predict.py --checkpoint out-train --input demo:200 --seed 1 --output out-demo
    # four models on GPUs
    python jobs/predict.py --checkpoint s3://bucket/ssd --input coco/val2017 \\
        --annotations coco/annotations/instances_val2017.json \\
        --gpu --predictors 4 --actors 24 --output s3://bucket/val2017
    # every box that the model is 0.3 sure of
    python jobs/predict.py --checkpoint out-train --input 'shards/{000..099}.tar' \\
        --min-score 0.3 --output out-shards
    # a model of your own
    python jobs/predict.py --checkpoint out-own --trust mymodels:make --input photos/ \\
        --output out-own-found
    # on a cluster
    ray job submit --working-dir . -- python jobs/predict.py --checkpoint /shared/out-train \\
        --input /shared/photos --output /shared/found

Where boxes are known, the mean average precision is reported too. The recipe is the one in the
checkpoint, without its random ops. Boxes are in pixels of the original images.
Run it again with the same --output to go on after Ctrl-C, a crash or a lost node.

Exit status: 0 when every image is accounted for and rejects stay within --max-reject-fraction,
1 when not, 2 for bad arguments.
"""

import sys

from raypipe.run.command import predict

if __name__ == "__main__":
    sys.exit(predict(description=__doc__))
