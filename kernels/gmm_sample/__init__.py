"""Draws from mixtures of Gaussians, plain and guided; the maths is in README.md."""

import math
from typing import Any

import torch

from vlkern import _checks, _mixture
from vlkern._op import Op
from vlkern.kernels.gmm_sample import reference, samples

#: Rounds of rejection of a guided draw.
ROUNDS = 32


def _not_negative(name: str, value: Any) -> float:
    number = _checks.number(name, value)
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {number}")
    return number


def _noise(value: Any, like: torch.Tensor, shapes: dict[str, tuple[int, ...]]) -> tuple[torch.Tensor, ...]:
    if not isinstance(value, tuple) or len(value) != len(shapes):
        raise TypeError(f"noise must be a tuple ({', '.join(shapes)}) or None, got {type(value).__name__}")
    for t, (name, shape) in zip(value, shapes.items(), strict=True):
        _checks.shape(f"noise: {name}", _checks.floating(f"noise: {name}", t), shape)
        _checks.on_device(f"noise: {name}", t, "params", like)
    return tuple(t.to(torch.promote_types(like.dtype, torch.float32)) for t in value)


def _normal(shape: tuple[int, ...], truncation: float | None, **like: Any) -> torch.Tensor:
    """Standard normal numbers, those beyond +-truncation excluded: the inverse of the distribution function."""
    if truncation is None:
        return torch.randn(shape, **like)
    inside = math.erf(truncation / math.sqrt(2))
    eps = torch.erfinv((2 * torch.rand(shape, **like) - 1) * inside) * math.sqrt(2)
    return eps.clamp(-truncation, truncation)


def _bind(
    params: Any,
    *,
    dims: Any,
    layout: Any = "joint",
    temperature: Any = 1.0,
    mixture_temperature: Any = 1.0,
    truncation: Any = None,
    min_scale: Any = 1e-6,
    noise: Any = None,
    generator: Any = None,
) -> tuple[Any, ...]:
    _mixture.components(params, dims, layout)
    joint, lead = layout == "joint", tuple(params.shape[:-1])
    scaling = (
        _not_negative("temperature", temperature),
        _checks.number("mixture_temperature", mixture_temperature, positive=True),
        _checks.number("min_scale", min_scale, positive=True),
    )
    if truncation is not None:
        truncation = _checks.number("truncation", truncation, positive=True)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    each = lead if joint else (*lead, dims)
    if noise is None:
        like = {
            "dtype": torch.promote_types(params.dtype, torch.float32), "device": params.device, "generator": generator
        }  # fmt: skip
        noise = torch.rand(each, **like), _normal((*lead, dims), truncation, **like)
    else:
        if truncation is not None or generator is not None:
            raise ValueError("noise must be None where truncation or generator is given: it stands for what they draw")
        noise = _noise(noise, params, {"uniform": each, "normal": (*lead, dims)})
    uniform = noise[0].reshape(-1) if joint else noise[0].reshape(-1, dims)
    return params.reshape(-1, params.shape[-1]), uniform, noise[1].reshape(-1, dims), dims, joint, *scaling


_NOISE = "Tensor uniform, Tensor eps"
_SCALING = "float temperature, float mixture_temperature, float min_scale"

_op = Op(
    "gmm_sample",
    public="gmm_sample",
    schemas={
        "gmm_sample": f"(Tensor params, {_NOISE}, int dims, bool joint, {_SCALING}) -> Tensor",
        "gmm_guided_sample": f"(Tensor params, Tensor unconditional, {_NOISE}, Tensor tries, Tensor chances,"
        f" int dims, bool joint, float guidance, {_SCALING}) -> Tensor",
    },
    reference=reference,
    backends=("cpu", "triton"),
    bind=_bind,
    work=samples.work,
    differentiable=False,
)
_sample, _guided = _op.raw["gmm_sample"], _op.raw["gmm_guided_sample"]


def gmm_sample(
    params: torch.Tensor,
    *,
    dims: int,
    layout: str = "joint",
    temperature: float = 1.0,
    mixture_temperature: float = 1.0,
    truncation: float | None = None,
    min_scale: float = 1e-6,
    noise: tuple[torch.Tensor, torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws from mixtures of diagonal Gaussians, the soft tokens of GIVT and JetFormer.

        m ~ softmax(mixture_temperature logits)     z = loc_m + temperature scale_m eps     eps ~ N(0, 1)
        scale = max(squareplus(raw), min_scale)     squareplus(r) = (r + sqrt(r^2 + 4)) / 2

    One component per token ("joint") or per channel ("per_channel"), then one read of its means and scales: nothing of
    the size of the parameters is made. The noise comes from PyTorch's generator, so that every backend draws the same.

    Args:
        params: [..., P], float32, bfloat16 or float16 (float64 on the reference), as `gmm_nll` takes them.
        dims: d. The number of components k follows from P.
        layout: "joint", P = k (1 + 2 d): [k logits][k, 2, d], loc then raw scale; or "per_channel", P = 3 k d:
            [3 d, k], logits, loc and raw scale.
        temperature: multiplies the scales; 0 gives the means. >= 0.
        mixture_temperature: multiplies the logits (above 1 it sharpens). > 0.
        truncation: eps is drawn from the normal distribution between -truncation and truncation; > 0. None: all of it.
        min_scale: the smallest scale, before the temperature; > 0.
        noise: instead of drawing them, uniform numbers in [0, 1) ([...], or [..., d] for "per_channel") and standard
            normal ones [..., d].
        generator: that the noise is drawn from, on the device of params; None: PyTorch's own.

    Returns:
        z [..., d] in float32 (float64 for float64), whatever the dtype of params. It has no gradients.

    Raises:
        TypeError: params is not a floating-point tensor; another argument has a wrong type.
        ValueError: P is none of a mixture of `dims` dimensions, there is no such layout, a number is out of range,
            noise has a wrong shape or device or comes with truncation or a generator, params requires a gradient.

    Source: Tschannen et al., GIVT, 2023; JetFormer, 2024.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> z = vlkern.ops.gmm_sample(torch.randn(4, 256, 16 * 33), dims=16, temperature=0.95, generator=g)
    """
    bound = _bind(
        params, dims=dims, layout=layout, temperature=temperature, mixture_temperature=mixture_temperature,
        truncation=truncation, min_scale=min_scale, noise=noise, generator=generator,
    )  # fmt: skip
    _checks.no_gradient(params=params)
    z: torch.Tensor = _sample[_op.choose(*bound[:3])](*bound)
    return z.view(*params.shape[:-1], dims)


def gmm_guided_sample(
    params: torch.Tensor,
    unconditional: torch.Tensor,
    *,
    dims: int,
    guidance: float,
    layout: str = "joint",
    temperature: float = 1.0,
    mixture_temperature: float = 1.0,
    min_scale: float = 1e-6,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws under density-based classifier-free guidance, towards p_c(z)^(1 + w) / p_u(z)^w in every channel.

    A component m is drawn from the conditional mixture; m of both mixtures gives two Gaussians N_c and N_u for each
    channel. With p~ = N_c^(1 + w) / N_u^w and s = 2 max(scale_c, scale_u), z follows the law of GIVT's sampler,

        p(x) ~ min(p~(x) / max p~, exp(-(x - loc_c)^2 / (2 s^2))),

    by 32 rounds of rejection, with the maximum of p~ within loc_c +- 10 in closed form. A channel in which every round
    fails, as where N_u is much narrower than N_c, is drawn from N_c.

    Args:
        params: [..., P], of the conditional mixture, as `gmm_sample` takes them.
        unconditional: as params, of the mixture without the condition.
        dims: d.
        guidance: w >= 0. 0, and temperature 0 as well, give the numbers of `gmm_sample` from the same generator state.
        layout: "joint" or "per_channel".
        temperature: multiplies the scales of both; >= 0.
        mixture_temperature: multiplies the logits; > 0.
        min_scale: the smallest scale, before the temperature; > 0.
        generator: that the noise is drawn from, on the device of params; None: PyTorch's own.

    Returns:
        z [..., d] in float32 (float64 for float64). It has no gradients.

    Raises:
        TypeError: as `gmm_sample`, or the dtypes of the two differ.
        ValueError: as `gmm_sample`, or the shapes or devices of the two differ.

    Source: Tschannen et al., GIVT, 2023, and its code.

    Example:
        >>> conditional, unconditional = torch.randn(2, 4, 256, 16 * 33)
        >>> z = vlkern.ops.gmm_guided_sample(conditional, unconditional, dims=16, guidance=0.4)
    """
    guidance = _not_negative("guidance", guidance)
    bound = _bind(
        params, dims=dims, layout=layout, temperature=temperature, mixture_temperature=mixture_temperature,
        min_scale=min_scale, generator=generator,
    )  # fmt: skip
    _checks.shape("unconditional", _checks.floating("unconditional", unconditional), tuple(params.shape))
    _checks.same("unconditional", unconditional, "params", params)
    _checks.no_gradient(params=params, unconditional=unconditional)
    flat, uniform, eps = bound[:3]
    backend = _op.choose(flat, uniform, eps)
    if guidance == 0 or temperature == 0:
        z: torch.Tensor = _sample[backend](*bound)
    else:
        shape = (ROUNDS, *eps.shape)
        tries = torch.randn(shape, dtype=eps.dtype, device=eps.device, generator=generator)
        chances = torch.rand(shape, dtype=eps.dtype, device=eps.device, generator=generator)
        without = unconditional.reshape(flat.shape)
        z = _guided[backend](flat, without, uniform, eps, tries, chances, *bound[3:5], guidance, *bound[5:])
    return z.view(*params.shape[:-1], dims)
