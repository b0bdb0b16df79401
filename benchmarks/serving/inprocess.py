"""What onnxruntime itself does: batches of the same requests in one thread, no server. Prints rows a second as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from benchmarks.serving.packages import inputs_of


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--graph", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(given.graph), options, providers=["CPUExecutionProvider"])
    requests = inputs_of(given.name, given.count, seed=given.seed)
    batches = []
    for begin in range(0, given.count, given.batch):
        part = requests[begin : begin + given.batch]
        longest = max(next(iter(one.values())).shape[1] for one in part)
        batches.append(
            {
                name: np.concatenate([np.pad(one[name], ((0, 0), (0, longest - one[name].shape[1]))) for one in part])
                for name in part[0]
            }
        )
    session.run(None, batches[0])
    rows, begun_s, begun_cpu_s = 0, time.monotonic(), time.process_time()
    while time.monotonic() - begun_s < given.seconds:
        for batch in batches:
            session.run(None, batch)
            rows += len(next(iter(batch.values())))
    found = {"rows_per_s": rows / (time.monotonic() - begun_s),
             "rows_per_cpu_s": rows / (time.process_time() - begun_cpu_s)}  # fmt: skip
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
