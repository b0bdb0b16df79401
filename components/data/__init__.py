"""Purchase sequences: where they come from, what form they must have, how they are split."""

from components.data.dataset import Dataset, Dropped, Limits, load_dataset, parse_sequences, save_dataset
from components.data.fetch import BEAUTY, KNOWN_DATA, Obtained, Source, obtain
from components.data.split import IntArray, LeaveOneOut, leave_one_out, load_split, save_split, write_shoppers
from components.data.synthetic import Shop, synthetic_dataset, synthetic_lines

__all__ = [
    "BEAUTY", "KNOWN_DATA", "Dataset", "Dropped", "IntArray", "LeaveOneOut", "Limits", "Obtained", "Shop", "Source",
    "leave_one_out", "load_dataset", "load_split", "obtain", "parse_sequences", "save_dataset", "save_split",
    "synthetic_dataset", "synthetic_lines", "write_shoppers",
]  # fmt: skip
