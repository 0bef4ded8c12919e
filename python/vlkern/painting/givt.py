"""Pictures of a GIVT: tokens drawn from its densities, decoded by its autoencoder."""

from pathlib import Path

import torch

from vlkern import data, models
from vlkern.errors import UserError
from vlkern.generation import givt, masked_givt
from vlkern.generation.givt import Sampler
from vlkern.models.givt import Givt
from vlkern.models.vae import Vae
from vlkern.painting.base import Measures, Options, Pictures
from vlkern.painting.sheet import to_bytes
from vlkern.recipes.autoencoders import psnr
from vlkern.recipes.givt import MOST_SHOWN
from vlkern.recipes.pictures import AUTOENCODER

#: Temperature and guidance of causal and of masked models unless the options say otherwise, the paper's; and steps.
CAUSAL, MASKED, STEPS = (0.95, 0.4), (1.0, 0.1), 16
#: The temperature of the choice is 35 for the paper's 16 channels, and confidence is a sum over channels.
CHOICE = 35 / 16
#: Pictures that are made together.
_CHUNK = 64
_SHOWN = 32


def _autoencoder(model: Givt, folder: Path) -> Vae:
    autoencoder = models.load_pretrained(folder / AUTOENCODER, dtype=torch.float32)
    c = model.config
    if not isinstance(autoencoder, Vae) or (autoencoder.config.tokens, autoencoder.config.dim) != (
        c.length,
        c.channels,
    ):
        raise UserError(f"{folder / AUTOENCODER}: expected a Vae with {c.length} tokens of {c.channels} channels")
    return autoencoder.to(model.position_embedding.device).eval()


def _paint(model: Givt, autoencoder: Vae, labels: torch.Tensor, sampler: Sampler, steps: int) -> torch.Tensor:
    """A picture for each label, [n, 3, S, S] uint8."""
    found = []
    for part in labels.split(_CHUNK):
        if model.config.masked:
            tau = CHOICE * model.config.channels
            tokens = masked_givt.sample(model, part, sampler, count=steps, choice_temperature=tau)
        else:
            tokens = givt.sample(model, part, sampler)
        with torch.no_grad():
            found.append(to_bytes(autoencoder.decode(model.latents_of(tokens))).cpu())
    return torch.cat(found)


def paint(model: Givt, folder: Path, options: Options) -> torch.Tensor:
    """Pictures of `label`, or of one class after the other.

    Raises:
        UserError: an option is given that the model has no use for, the class is unknown, or there is no autoencoder.
    """
    c, device = model.config, model.position_embedding.device
    options.only(f"a {c.style} GIVT", "label", "temperature", "guidance", *(["steps"] if c.masked else []))
    if c.labels == 0:
        raise UserError(f"{folder}: expected a GIVT with classes, got one for pixels")
    classes = data.Classes.load(folder)
    labels = torch.arange(options.count, device=device) % c.labels
    if options.label is not None:
        labels = torch.full_like(labels, classes.number(options.label))
    temperature, guidance = MASKED if c.masked else CAUSAL
    seed = int(torch.randint(2**62, (), generator=options.generator))
    try:
        sampler = Sampler(
            temperature=temperature if options.temperature is None else options.temperature,
            guidance=(guidance if c.unlabelled else 0.0) if options.guidance is None else options.guidance,
            generator=torch.Generator(device).manual_seed(seed),
        )
    except ValueError as error:
        raise UserError(f"--{error}") from error
    return _paint(model, _autoencoder(model, folder), labels, sampler, options.steps or STEPS)


def _labels(classes: data.Classes, names: list[str | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each class, and whether it is unknown: then it has none."""
    numbers, unknown = [], []
    for name in names:
        try:
            numbers.append(0 if name is None else classes.number(name))
            unknown.append(name is None)
        except UserError:
            numbers.append(0)
            unknown.append(True)
    return torch.tensor(numbers), torch.tensor(unknown)


def _nll(model: Givt, tokens: torch.Tensor, labels: torch.Tensor, drop: torch.Tensor, mask: torch.Tensor) -> float:
    """Nats of a token; of masked models of those where the `mask` is."""
    total, count = 0.0, 0
    for t, label, d, m in zip(*(x.split(_CHUNK) for x in (tokens, labels, drop, mask)), strict=True):
        nll = model.nll(t, label, drop=d, mask=m if model.config.masked else None)
        total, count = total + float(nll[m].sum()), count + int(m.sum())
    return total / count


def measure(model: Givt, folder: Path, pictures: Pictures) -> Measures:
    """Nats of a token with its class and without, the autoencoder's PSNR, samples with guidance and without."""
    c, device = model.config, model.position_embedding.device
    autoencoder, generator = _autoencoder(model, folder), torch.Generator().manual_seed(0)
    means, again = [], []
    for part in data.to_unit(pictures.pixels).split(_CHUNK):
        mean, logvar = autoencoder.encode(part.to(device))
        again.append(autoencoder.decode(mean).cpu())
        noise = torch.randn(mean.shape, generator=generator).to(device)
        means.append(mean + (logvar / 2).exp() * noise)
    tokens, reconstructions = model.tokens_of(torch.cat(means)), torch.cat(again)
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device)
    if c.masked:
        keep, order = torch.rand(len(mask), generator=generator), torch.rand(mask.shape, generator=generator)
        mask = masked_givt.training_mask(keep * MOST_SHOWN, order).to(device)
    classes = data.Classes.load(folder)
    labels, unknown = (x.to(device) for x in _labels(classes, list(pictures.classes)))
    hidden = f" ({float(mask.float().mean()):.0%} of the tokens hidden)" if c.masked else ""
    numbers = {f"nats a token{hidden}": _nll(model, tokens, labels, unknown, mask)}
    if c.unlabelled:
        numbers[f"nats a token without its class{hidden}"] = _nll(model, tokens, labels, torch.ones_like(unknown), mask)
    error = (reconstructions - data.to_unit(pictures.pixels)).square().mean()
    numbers["PSNR of the autoencoder, dB"] = psnr(float(error))
    shown = torch.arange(_SHOWN, device=device) % c.labels
    temperature, guidance = MASKED if c.masked else CAUSAL
    sheets = {}
    for w in (guidance, 0.0) if c.unlabelled else (0.0,):
        drawn = torch.Generator(device).manual_seed(0)
        sampler = Sampler(temperature=temperature, guidance=w, generator=drawn)
        sheets[f"samples, class by class, temperature {temperature:g}, guidance {w:g}"] = _paint(
            model, autoencoder, shown, sampler, STEPS
        )
    pairs = torch.cat([pictures.pixels[:8], to_bytes(reconstructions[:8])])
    return Measures(numbers, {**sheets, "pictures, and what the autoencoder makes of them": pairs})
