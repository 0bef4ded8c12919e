"""Evaluation of two-tower models: retrieval, zero-shot classification, and the embeddings that both need."""

from vlkern.evaluation.encoder import Encoder, load_encoder
from vlkern.evaluation.pictures import FolderPictures, ShardPictures
from vlkern.evaluation.retrieval import Retrieval, recall, retrieval
from vlkern.evaluation.zeroshot import TEMPLATES, Classification, canonical, class_embeddings, classify, prompts

__all__ = [
    "TEMPLATES",
    "Classification",
    "Encoder",
    "FolderPictures",
    "Retrieval",
    "ShardPictures",
    "canonical",
    "class_embeddings",
    "classify",
    "load_encoder",
    "prompts",
    "recall",
    "retrieval",
]
