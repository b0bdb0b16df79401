"""The package's graph as a custom runtime of MLServer, as its documentation shows. Loaded by MLServer, in its own
environment (``.venv-mlserver``)."""

import logging

import onnxruntime as ort  # type: ignore[import-untyped]
from mlserver import MLModel  # type: ignore[import-not-found, unused-ignore]
from mlserver.codecs import NumpyCodec  # type: ignore[import-not-found, unused-ignore]
from mlserver.types import InferenceRequest, InferenceResponse  # type: ignore[import-not-found, unused-ignore]


class OnnxModel(MLModel):  # type: ignore[misc, unused-ignore]
    async def load(self) -> bool:
        logging.disable(logging.INFO)  # it would write a line a request
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(self.settings.parameters.uri, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        inputs = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        found = self._session.run(None, inputs)
        outputs = [NumpyCodec.encode_output(name, value) for name, value in zip(self._outputs, found, strict=True)]
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=outputs)
