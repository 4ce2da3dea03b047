"""Predict an archive on Ray, and count the verdicts: `python ray_predict.py best.pt s3://bucket/archive rows`.

A fourth argument is the address of the cluster; without it, Ray starts on this machine. All machines need the same
paths. If the program is interrupted, start it again: it goes on with the parts that are missing.
"""

import sys

import flawmask

if __name__ == "__main__":
    model, archive, output, *cluster = sys.argv[1:]
    done = flawmask.predict_records(
        model=model, input=(archive,), output_dir=output, records="parquet", ray=cluster[0] if cluster else "local"
    )
    print(f"{done.images} images: {done.defective} with defects, {done.good} good, {done.without_verdict} not read")
