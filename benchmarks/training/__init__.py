"""Our transformer beside RecBole's SASRec: the same split, the same ranking, side by side, one core each."""
