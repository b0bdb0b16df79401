"""The messages of the Open Inference Protocol's gRPC service, without generated code.

The declarations below are the published interface in one table: package ``inference``, service
``GRPCInferenceService``, of https://github.com/kserve/open-inference-protocol
(specification/protocol/open_inference_grpc.proto, Apache-2.0) and, for the two repository calls, of KServe 0.21's
grpc_predict_v2.proto. A test compares the descriptor that they make with that of the kserve package, field by field.

The file is put into a pool of its own, so that a process that also holds somebody else's generated code for the same
package has no conflict.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

__all__ = ["FILE", "METHODS", "SERVICE", "message"]

SERVICE = "inference.GRPCInferenceService"
METHODS = (
    "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer",
    "RepositoryModelLoad", "RepositoryModelUnload",
)  # fmt: skip
"""Each takes ``<method>Request`` and gives ``<method>Response``."""

# Message: its fields, numbered from 1. A type after "*" is repeated; "%" is the map that all parameters are.
_MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready bool",
    "ModelReadyRequest": "name string, version string",
    "ModelReadyResponse": "ready bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name string, version string, extensions *string",
    "ModelMetadataRequest": "name string, version string",
    "ModelMetadataResponse": "name string, versions *string, platform string, inputs *.TensorMetadata, "
                             "outputs *.TensorMetadata",
    "ModelMetadataResponse.TensorMetadata": "name string, datatype string, shape *int64",
    "ModelInferRequest": "model_name string, model_version string, id string, parameters %, "
                         "inputs *.InferInputTensor, outputs *.InferRequestedOutputTensor, raw_input_contents *bytes",
    "ModelInferRequest.InferInputTensor": "name string, datatype string, shape *int64, parameters %, "
                                          "contents InferTensorContents",
    "ModelInferRequest.InferRequestedOutputTensor": "name string, parameters %",
    "ModelInferResponse": "model_name string, model_version string, id string, parameters %, "
                          "outputs *.InferOutputTensor, raw_output_contents *bytes",
    "ModelInferResponse.InferOutputTensor": "name string, datatype string, shape *int64, parameters %, "
                                            "contents InferTensorContents",
    "InferParameter": "bool_param bool, int64_param int64, string_param string",
    "InferTensorContents": "bool_contents *bool, int_contents *int32, int64_contents *int64, uint_contents *uint32, "
                           "uint64_contents *uint64, fp32_contents *float, fp64_contents *double, "
                           "bytes_contents *bytes",
    "RepositoryModelLoadRequest": "model_name string",
    "RepositoryModelLoadResponse": "model_name string, isLoaded bool",
    "RepositoryModelUnloadRequest": "model_name string",
    "RepositoryModelUnloadResponse": "model_name string, isUnloaded bool",
}  # fmt: skip
_ONE_OF = {"InferParameter": "parameter_choice"}
_FieldType = descriptor_pb2.FieldDescriptorProto


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="open_inference_grpc.proto", package="inference", syntax="proto3"
    )  # fmt: skip
    made: dict[str, descriptor_pb2.DescriptorProto] = {}
    for path, fields in _MESSAGES.items():
        outer, _, name = path.rpartition(".")
        message = made[outer].nested_type.add(name=name) if outer else file.message_type.add(name=name)
        made[path] = message
        if path in _ONE_OF:
            message.oneof_decl.add(name=_ONE_OF[path])
        for number, text in enumerate(filter(None, fields.split(", ")), 1):
            _field(message, path, number, *text.split())
    service = file.service.add(name=SERVICE.rpartition(".")[2])
    for method in METHODS:
        service.method.add(
            name=method, input_type=f".inference.{method}Request", output_type=f".inference.{method}Response"
        )
    return file


def _field(message: descriptor_pb2.DescriptorProto, path: str, number: int, name: str, kind: str) -> None:
    field = message.field.add(name=name, number=number, label=_FieldType.LABEL_OPTIONAL)
    if path in _ONE_OF:
        field.oneof_index = 0
    if kind == "%":
        kind = "*.ParametersEntry"
        entry = message.nested_type.add(name="ParametersEntry")
        entry.options.map_entry = True
        _field(entry, "", 1, "key", "string")
        _field(entry, "", 2, "value", "InferParameter")
    if kind.startswith("*"):
        field.label = _FieldType.LABEL_REPEATED
        kind = kind[1:]
    if kind.islower():
        field.type = _FieldType.Type.Value(f"TYPE_{kind.upper()}")
    else:
        field.type = _FieldType.TYPE_MESSAGE
        field.type_name = f".inference.{path}{kind}" if kind.startswith(".") else f".inference.{kind}"


FILE = _file()
_pool = descriptor_pool.DescriptorPool()
_pool.Add(FILE)


def message(name: str) -> type[Any]:
    """The class of a message of the package, such as ``ModelInferRequest``."""
    found: type[Any] = message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"inference.{name}"))
    return found
