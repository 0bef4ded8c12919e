"""A model with its tokenizer, ready to embed pictures and texts in batches."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from vlkern import data, info, models
from vlkern._device import device_of
from vlkern.data.images import Size
from vlkern.errors import UserError
from vlkern.evaluation.pictures import Pictures
from vlkern.layers.patches import pack_pictures
from vlkern.models.naflex import Naflex
from vlkern.models.navit import Navit
from vlkern.models.siglip import Siglip

#: Batches that are read ahead while the model works.
_AHEAD = 2


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings of the pictures that could be read.

    vectors  [n, E] float32, of length 1, on the CPU
    kept     [n] int64, the number of each picture among all that were asked for
    skipped  one line for each picture that could not be read
    """

    vectors: torch.Tensor
    kept: torch.Tensor
    skipped: list[str]


class Encoder:
    """Embeds pictures and texts with the two towers of a model, in evaluation mode and without gradients.

    Args:
        model: any SigLIP, NaFlex or not, or a NaViT; it is put into evaluation mode and onto `device`.
        tokenizer: the one it was trained with.
        device: "cpu", "cuda" or such.
        bfloat16: run the towers in bfloat16 (autocast). Embeddings are float32 either way.
        resample: how pictures are squeezed to the model's size, as in `vlkern.data.decode_image`.
        batch: how many pictures or texts are embedded at once.
        max_patches: the most patches of a picture for a NaFlex model or a NaViT; None is as many as a NaFlex model has
            positions, and 256 for a NaViT.

    Raises:
        ValueError: the tokenizer has ids that the model does not know, or texts of another length; max_patches is below
            1, or given for a model of a fixed size.
    """

    def __init__(
        self,
        model: Siglip | Naflex | Navit,
        tokenizer: data.Tokenizer,
        *,
        device: str = "cpu",
        bfloat16: bool = False,
        resample: str = "bilinear",
        batch: int = 64,
        max_patches: int | None = None,
    ) -> None:
        data.check_vocabulary(tokenizer, model.config.text.vocabulary)
        if tokenizer.length != model.config.text.length:
            raise ValueError(f"the tokenizer must give {model.config.text.length} ids a text, got {tokenizer.length}")
        #: (H, W) of the pictures that the model takes, or what gives it for a picture of H x W pixels
        self.image_size: Size
        if isinstance(model, Naflex):
            vision = model.config.vision
            self.image_size = data.NaflexSize(vision.patch, vision.patches if max_patches is None else max_patches)
        elif isinstance(model, Navit):
            c = model.config.vision
            self.image_size = data.NavitSize(c.patch, 256 if max_patches is None else max_patches, c.longest)
        elif max_patches is not None:
            raise ValueError(f"max_patches must be None for a model of a fixed size, got {max_patches}")
        else:
            self.image_size = model.config.vision.image_size
        self.model = model.to(device).eval()
        self.tokenizer, self.device, self.bfloat16 = tokenizer, torch.device(device), bfloat16
        self.resample, self.batch = resample, batch

    @property
    def width(self) -> int:
        """E, the length of an embedding."""
        return self.model.config.vision.width

    def __str__(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        size = self.image_size
        if isinstance(size, data.NaflexSize | data.NavitSize):
            pixels = f"up to {size.max_patches} patches of {size.patch} x {size.patch} pixels"
        else:
            assert isinstance(size, tuple)
            pixels = f"{size[0]} x {size[1]} pixels"
        number = f"{parameters:.1f}" if parameters < 100 else f"{parameters:.0f}"
        precision = "bfloat16" if self.bfloat16 else "float32"
        return f"{number} M parameters, {pixels}, {precision}, {self.device}"

    @torch.no_grad()
    def images(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        """B pictures [3, H, W] uint8 of the sizes that `image_size` gives -> [B, E] float32 of length 1, on the CPU."""
        batch: tuple[torch.Tensor, ...]
        if isinstance(self.model, Naflex):
            batch = pack_pictures(pictures, self.model.config.vision.patch)
        elif isinstance(self.model, Navit):
            batch = data.pack_images(pictures, self.model.config.vision.patch)
        else:
            batch = (torch.stack(list(pictures)),)
        pixels, *shapes = (part.to(self.device) for part in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.model.encode_image(data.to_unit(pixels), *shapes).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str], *, show: Callable[[int], None] = lambda done: None) -> torch.Tensor:
        """T strings -> [T, E] float32 of length 1, on the CPU. `show(done)` is called after each batch."""
        parts = [torch.empty(0, self.width)]
        for start in range(0, len(texts), self.batch):
            ids = self.tokenizer(texts[start : start + self.batch])
            batch = data.pack_texts(ids, self.tokenizer.end) if isinstance(self.model, Navit) else (ids,)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                parts.append(self.model.encode_text(*(part.to(self.device) for part in batch)).float().cpu())
            show(min(start + self.batch, len(texts)))
        return torch.cat(parts)

    def pictures(
        self,
        pictures: Pictures,
        numbers: Sequence[int] | None = None,
        *,
        show: Callable[[int], None] = lambda done: None,
    ) -> Embedded:
        """Read and embed pictures; threads decode the next batches while the model works.

        Args:
            pictures: a `FolderPictures` or `ShardPictures` of the model's `image_size`.
            numbers: which ones; None is all.
            show: called with the number of pictures done, after each batch.
        """
        wanted = list(range(len(pictures))) if numbers is None else list(numbers)
        vectors, kept, skipped = [torch.empty(0, self.width)], list[int](), list[str]()
        done = 0
        for batch in _read(pictures, wanted, self.batch):
            good = [(i, found) for i, found in batch if isinstance(found, torch.Tensor)]
            skipped += [f"{pictures.name(i)}: {found}" for i, found in batch if isinstance(found, str)]
            if good:
                kept += [i for i, _ in good]
                vectors.append(self.images([pixels for _, pixels in good]))
            done += len(batch)
            show(done)
        return Embedded(torch.cat(vectors), torch.tensor(kept, dtype=torch.int64), skipped)

    def probability(self, cosine: torch.Tensor) -> torch.Tensor:
        """sigmoid(exp(t') cosine + b): how likely the model takes a picture and a text for a pair."""
        scale, bias = self.model.logit_scale.detach().exp().cpu(), self.model.logit_bias.detach().cpu()
        return torch.sigmoid(cosine * scale.float() + bias.float())

    def fingerprint(self) -> str:
        """16 letters that stand for all that makes embeddings of pictures: other weights or settings, other letters."""
        size = self.image_size if isinstance(self.model, Naflex | Navit) else ""  # elsewhere it is in the configuration
        digest = hashlib.sha256(f"{self.model.config.vision} {size}{self.resample} {self.bfloat16}".encode())
        for name, tensor in self.model.vision_model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def _read(pictures: Pictures, numbers: list[int], batch: int) -> Iterator[list[tuple[int, torch.Tensor | str]]]:
    """Batches of (number, pixels or why not), in order."""

    def load(index: int) -> tuple[int, torch.Tensor | str]:
        try:
            return index, pictures.pixels(index)
        except ValueError as error:
            return index, " ".join(str(error).split())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = (numbers[start : start + batch] for start in range(0, len(numbers), batch))
        waiting = [[pool.submit(load, i) for i in part] for part in itertools.islice(parts, _AHEAD)]
        while waiting:
            yield [future.result() for future in waiting.pop(0)]
            waiting += [[pool.submit(load, i) for i in part] for part in itertools.islice(parts, 1)]


def _resample(folder: Path) -> str:
    """How the checkpoint wants pictures resized: what its preprocessor_config.json says (3: bicubic), or bilinear."""
    try:
        config = json.loads((folder / "preprocessor_config.json").read_bytes())
    except (OSError, ValueError):
        return "bilinear"
    return "bicubic" if isinstance(config, dict) and config.get("resample") == 3 else "bilinear"


def load_encoder(
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    bfloat16: bool | None = None,
    batch: int = 64,
    max_patches: int | None = None,
) -> Encoder:
    """An encoder from what `vlkern train` wrote in RUN/model, or from a Hugging Face directory.

    Args:
        folder: with config.json, weights and tokenizer; or one file that `vlkern.models.load_pretrained` reads, with
            the tokenizer beside it.
        tokenizer: as in `vlkern.data.load_tokenizer`, if there is none.
        device: default: the GPU if there is one.
        bfloat16: default: where that is faster.
        batch: how many pictures or texts are embedded at once.
        max_patches: as in Encoder.

    Raises:
        UserError: there is nothing, no SigLIP in it, no tokenizer, or one that does not fit.
    """
    path = Path(folder)
    if not path.exists():
        raise UserError(f"--model {folder}: no such folder or file")
    beside = path if path.is_dir() else path.parent
    device = device_of(device)
    model = models.load_pretrained(path, dtype=torch.float32)
    if not isinstance(model, Siglip | Naflex | Navit):
        raise UserError(f"--model {folder}: expected a SigLIP or a NaViT, got a {type(model).__name__}")
    if max_patches is not None and isinstance(model, Siglip):
        raise UserError(
            f"--max-patches {max_patches}: only for NaFlex models and NaViT, {folder} takes pictures of one size"
        )
    try:
        words = data.load_tokenizer(tokenizer or beside, model.config.text.length)
    except data.DataError as error:
        raise error if tokenizer else UserError(f"{error}; give one with --tokenizer") from error
    return Encoder(
        model,
        words,
        device=device,
        bfloat16=info.fast_bfloat16(device) if bfloat16 is None else bfloat16,
        resample=_resample(beside),
        batch=batch,
        max_patches=max_patches,
    )
