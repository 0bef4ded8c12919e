"""Text from models: prompts of any lengths in one batch, sampling, streaming."""

from vlkern.generation.generate import Completion, Times, best_of, generate
from vlkern.generation.prompts import prompt_of
from vlkern.generation.sampling import GREEDY, Sampler
from vlkern.generation.session import Session
from vlkern.generation.stream import TextStream

__all__ = ["GREEDY", "Completion", "Sampler", "Session", "TextStream", "Times", "best_of", "generate", "prompt_of"]
