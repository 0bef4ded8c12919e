"""Pictures of a JetFormer: of captions or classes, and how many bits pictures cost that it never saw."""

from pathlib import Path
from typing import Any

import torch

from vlkern import data, flows
from vlkern.data.classes import CLASSES
from vlkern.errors import UserError
from vlkern.generation.jetformer import sample
from vlkern.models.jetformer import JetFormer
from vlkern.painting.base import Measures, Options, Pictures

#: Pictures that are made or measured together.
_CHUNK = 64
_SHOWN = 16
#: Unless options say otherwise.
TEMPERATURE, GUIDANCE = 1.0, 1.0


def words_of(model: JetFormer, folder: Path) -> Any:
    """The classes or the tokenizer in the folder of a model."""
    if (folder / CLASSES).exists():
        return data.Classes.load(folder)
    return data.load_tokenizer(folder, model.config.text_length)


def _samples(
    model: JetFormer, ids: torch.Tensor, temperature: float, guidance: float, generator: torch.Generator | None
) -> torch.Tensor:
    """[n, 3, S, S] uint8 for texts [n, L]; `generator` of the CPU."""
    device = model.image_head.weight.device
    seed = int(torch.randint(2**62, (), generator=generator))
    own = torch.Generator(device).manual_seed(seed)
    parts = [
        sample(model, part.to(device), guidance=guidance, temperature=temperature, generator=own)
        for part in ids.split(_CHUNK)
    ]
    return flows.quantise(torch.cat(parts)).cpu()


def paint(model: JetFormer, folder: Path, options: Options) -> torch.Tensor:
    """Pictures of a caption (`prompt`) or of a class, or of anything.

    Raises:
        UserError: a model of captions is given a class, or one of classes a caption; another option is given.
    """
    words = words_of(model, folder)
    of_classes = isinstance(words, data.Classes)
    options.only(
        f"a JetFormer of {'classes' if of_classes else 'captions'}", "label" if of_classes else "prompt", "temperature",
        "guidance",
    )  # fmt: skip
    text = options.label if of_classes else options.prompt
    guidance = GUIDANCE if options.guidance is None else options.guidance
    if guidance < 0:
        raise UserError(f"--guidance: must be at least 0, got {guidance}")
    if text is None:
        ids, guidance = model.unlabelled(options.count), 0.0  # there is nothing to be guided to
    else:
        ids = words([text]).expand(options.count, -1)
    temperature = TEMPERATURE if options.temperature is None else options.temperature
    return _samples(model, ids, temperature, guidance, options.generator)


def measure(model: JetFormer, folder: Path, pictures: Pictures) -> Measures:
    """Bits per sub-pixel without and with the text, error of the flow forth and back, samples of the texts."""
    device, d = model.image_head.weight.device, model.config.modelled
    words = words_of(model, folder)
    if isinstance(words, data.Classes):
        texts = [name or "" for name in pictures.classes]
        known = [i for i, text in enumerate(texts) if text and text.partition("/")[0].replace("_", " ") in words.names]
    else:
        texts, known = list(pictures.captions), list(range(len(pictures.captions)))
    ids = words([texts[i] for i in known])
    pixels = flows.dequantise(pictures.pixels, torch.Generator().manual_seed(0))
    free, given, worst = [], [], 0.0
    for some in torch.arange(len(pixels)).split(_CHUNK):
        x = pixels[some].to(device)
        tokens, logdet = model.encode(x)
        worst = max(worst, float((model.decode(tokens) - x.clamp(-1, 1)).abs().max()))
        out = model.outputs(tokens[..., :d], model.unlabelled(len(x)))
        free.append(model.image_bits(out.image, tokens, logdet))
        rows = [(row, known.index(i)) for row, i in enumerate(some.tolist()) if i in known]
        if rows:
            at, of = (torch.tensor(column) for column in zip(*rows, strict=True))
            out = model.outputs(tokens[at, :, :d], ids[of].to(device))
            given.append(model.image_bits(out.image, tokens[at], logdet[at]))
    numbers = {"largest error of the flow forth and back": worst}
    sheets = {}
    if given:
        numbers["bits per sub-pixel, given the text"] = float(torch.cat(given).mean())
        shown = ids[:_SHOWN]
        title = f"samples of: {', '.join(texts[i] for i in known[: len(shown)])}"
        sheets[title] = _samples(model, shown, TEMPERATURE, GUIDANCE, None)
    sheets["samples without a text"] = _samples(model, model.unlabelled(_SHOWN), TEMPERATURE, 0.0, None)
    return Measures(numbers, sheets, float(torch.cat(free).mean()))
