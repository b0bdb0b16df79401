"""The package's graph behind KServe's ModelServer, as its documentation shows. Run in our own environment."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import onnxruntime as ort  # type: ignore[import-untyped]
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer  # type: ignore[import-untyped]


class OnnxModel(Model):  # type: ignore[misc]
    def __init__(self, name: str, graph: str) -> None:
        super().__init__(name)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.ready = True

    async def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        found = self._session.run(None, {tensor.name: tensor.as_numpy() for tensor in payload.inputs})
        outputs = []
        for name, value in zip(self._outputs, found, strict=True):
            output = InferOutput(name, list(value.shape), "INT64" if value.dtype.kind == "i" else "FP32")
            output.set_data_from_numpy(value, binary_data=False)
            outputs.append(output)
        return InferResponse(payload.id, self.name, outputs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for flag in ("--name", "--graph", "--port", "--grpc-port"):
        parser.add_argument(flag, required=True)
    given = parser.parse_args()
    logging.disable(logging.INFO)  # it would write two lines a request
    ModelServer(http_port=int(given.port), grpc_port=int(given.grpc_port), workers=1,
                enable_latency_logging=False).start([OnnxModel(given.name, given.graph)])  # fmt: skip
