"""What a user would pick instead of each op, and what limits the op: bandwidth or matmuls.

A rival takes the arguments of the public op and returns its output. One that is not installed raises `Absent`, and
the report says so.
"""

import ast
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from vlkern.bench import couplings, cumulative, decoding, draws, heads, mixtures, tokens

Function = Callable[..., Any]


class Absent(Exception):
    """The contestant cannot take part here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """Something that computes the op. `make` builds it (and is picklable: memory is measured in a fresh process)."""

    name: str
    make: Callable[[], Function]
    ours: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Race:
    """The rivals of one op and the ceiling it is held against.

    ceiling  "copy" (bytes read and written), "read" (bytes read) or "matmul" (FLOPs)
    share    mode -> multiple of the room's work() that this mode does; "forward" alone where there is no gradient
    """

    ceiling: str
    share: dict[str, float]
    rivals: tuple[Contestant, ...]


def rms_norm_formula(x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, offset: float = 0.0) -> torch.Tensor:
    """The lines found in most model files."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y * (offset + weight.float())).to(x.dtype)


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, offset: float = 0.0) -> torch.Tensor:
    """torch.nn.functional.rms_norm; it takes no offset, so the weight is shifted first."""
    return F.rms_norm(x, weight.shape, weight + offset if offset else weight, eps)


def linear_formula(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str | None = None
) -> torch.Tensor:
    """A linear layer and its activation as two calls."""
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if activation else y


def geglu_formula(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The line found in most model files."""
    return F.gelu(gate, approximate="tanh") * up


def cross_entropy_formula(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The lines found in most language models: every logit is materialised, in the end in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def sigmoid_loss_formula(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The loss as the SigLIP paper's pseudocode and open_clip write it: every [B, B] tensor is materialised."""
    logits = scale * image @ text.T + bias
    labels = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - torch.ones_like(logits)
    return -F.logsigmoid(labels * logits).sum() / len(image)


def _compiled(function: Function) -> Function:
    # Imported here: it takes as long as all of torch, and the demo and `vlkern bench --help` do without.
    import torch._inductor.config

    # A pool of compiler processes would outlive the compilation and compete with the measurements.
    torch._inductor.config.compile_threads = 1
    compiled: Function = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled


def _plain(function: Function) -> Function:
    return function


def _liger_rms_norm() -> Function:
    if importlib.util.find_spec("liger_kernel") is None:
        raise Absent("liger_kernel is not installed")
    if not torch.cuda.is_available():
        raise Absent("liger_kernel needs a GPU")
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def run(x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, offset: float = 0.0) -> torch.Tensor:
        y: torch.Tensor = LigerRMSNormFunction.apply(x, weight, eps, offset, "gemma" if offset else "llama", False)
        return y

    return run


def _torch_linear_cross_entropy() -> Function:
    """PyTorch's own chunked loss."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent("F.linear_cross_entropy needs PyTorch 2.13")
    return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def _liger_cross_entropy() -> Function:
    if importlib.util.find_spec("liger_kernel") is None:
        raise Absent("liger_kernel is not installed")
    if not torch.cuda.is_available():
        raise Absent("liger_kernel needs a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()

    def run(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = loss(weight, hidden, target)
        return result

    return run


def _cut_cross_entropy() -> Function:
    if importlib.util.find_spec("cut_cross_entropy") is None:
        raise Absent("cut_cross_entropy is not installed")
    if not torch.cuda.is_available():
        raise Absent("cut_cross_entropy needs a GPU")
    from cut_cross_entropy import linear_cross_entropy

    function: Function = linear_cross_entropy
    return function


def open_clip_version() -> str | None:
    """The version of the installed open_clip, read without importing it."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        return None
    tree = ast.parse(Path(spec.origin).with_name("version.py").read_text())
    return next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))


def _alone(package: str, file: str) -> ModuleType:
    """One file of a package, loaded without the package, which imports what the file does not need."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None
    spec = importlib.util.spec_from_file_location(f"_{package}", Path(found.origin).with_name(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _open_clip_loss(chunk: int) -> Function:
    """open_clip's own SigLipLoss; the package also imports timm and torchvision."""
    version = open_clip_version()
    if version is None:
        raise Absent("open_clip is not installed")
    module = _alone("open_clip", "loss.py")
    if not chunk:
        loss: Any = module.SigLipLoss()
    elif "chunk_size" in inspect.signature(module.SigLipLoss).parameters:
        loss = module.SigLipLoss(chunk_size=chunk)
    else:
        raise Absent(f"SigLipLoss of open_clip {version} has no chunk_size")
    function: Function = loss
    return function


def _lucidrains_fsq() -> Function:
    if importlib.util.find_spec("vector_quantize_pytorch") is None:
        raise Absent("vector_quantize_pytorch is not installed")
    return tokens.lucidrains(_alone("vector_quantize_pytorch", "finite_scalar_quantization.py"))


def _visible(start: torch.Tensor, stop: torch.Tensor, keys: int) -> torch.Tensor:
    j = torch.arange(keys, device=start.device)
    return (j >= start[:, None]) & (j < stop[:, None])


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """PyTorch's attention for [tokens, heads, head dim]."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)
    return out[0].transpose(0, 1)


def masked_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, stop: torch.Tensor
) -> torch.Tensor:
    """One call with a dense boolean mask, made in the call."""
    return _sdpa(q, k, v, attn_mask=_visible(start, stop, len(k)))


def sdpa_loop(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, stop: torch.Tensor
) -> torch.Tensor:
    """A loop over documents, which are full or causal; other masks are none that it could take."""
    lengths = start.unique_consecutive(return_counts=True)[1]
    ends = lengths.cumsum(0).to(start.dtype)
    causal = torch.equal(stop, torch.arange(1, len(stop) + 1, dtype=stop.dtype))
    if not torch.equal(start, (ends - lengths).repeat_interleave(lengths)) or not (
        causal or torch.equal(stop, ends.repeat_interleave(lengths))
    ):
        raise ValueError("these rows are no full or causal documents")
    parts = zip(*(t.split(lengths.tolist()) for t in (q, k, v)), strict=True)
    return torch.cat([_sdpa(*part, is_causal=causal) for part in parts])


def _flex_attention() -> Function:
    """FlexAttention, compiled; its block mask is built once per mask, outside the time of all calls but the first."""
    import torch.nn.attention.flex_attention as flex

    attend = _compiled(flex.flex_attention)
    masks: dict[int, Any] = {}

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        if q.device.type == "cpu" and torch.is_grad_enabled():
            raise ValueError("FlexAttention has no backward on the CPU")
        if id(start) not in masks:

            def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
                return (j >= start[i]) & (j < stop[i])

            masks[id(start)] = flex.create_block_mask(visible, None, None, len(q), len(k), device=str(q.device))
        heads = (t.transpose(0, 1)[None].contiguous() for t in (q, k, v))
        out = attend(*heads, block_mask=masks[id(start)], enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)

    return run


def _flex_decoding() -> Function:
    from torch.nn.attention.flex_attention import flex_attention

    return decoding.flex(_compiled(flex_attention))


RACES: dict[str, Race] = {
    "coupling": Race(
        ceiling="copy",
        # forward: read x, shift and raw, write y. backward: read y, raw and grad, write dx and draw.
        share={"forward": 1.0, "forward+backward": 2.25},
        rivals=(
            Contestant("eager", partial(_plain, couplings.affine_coupling)),
            Contestant("torch.compile", partial(_compiled, couplings.affine_coupling), compiled=True),
        ),
    ),
    "decode_attention": Race(
        ceiling="read",
        share={"forward": 1.0},
        rivals=(
            Contestant("SDPA", partial(_plain, decoding.sdpa)),
            Contestant("matmuls", partial(_plain, decoding.matmuls)),
            Contestant("FlexAttention", _flex_decoding, compiled=True),
        ),
    ),
    "decode_linear": Race(
        ceiling="read",
        share={"forward": 1.0},
        rivals=(
            Contestant("eager", partial(_plain, decoding.linear_parts)),
            Contestant("torch.compile", partial(_compiled, decoding.linear_parts), compiled=True),
        ),
    ),
    "fsq": Race(
        ceiling="copy",
        # forward: read z, write codes and indices. backward: read z and grad, write dz (1.2 in float32, 1 in bfloat16).
        share={"forward": 1.0, "forward+backward": 2.0},
        rivals=(
            Contestant("eager", partial(_plain, tokens.fsq)),
            Contestant("torch.compile", partial(_compiled, tokens.fsq), compiled=True),
            Contestant("vector-quantize-pytorch", _lucidrains_fsq),
        ),
    ),
    "geglu": Race(
        ceiling="copy",
        # forward: read two, write one. backward: read three, write two.
        share={"forward": 1.0, "forward+backward": 8 / 3},
        rivals=(
            Contestant("eager", partial(_plain, geglu_formula)),
            Contestant("torch.compile", partial(_compiled, geglu_formula), compiled=True),
        ),
    ),
    "gmm_nll": Race(
        ceiling="copy",
        # forward: read the parameters. backward: read them again, write their gradient.
        share={"forward": 1.0, "forward+backward": 3.0},
        rivals=(
            Contestant("eager", partial(_plain, mixtures.nll)),
            Contestant("torch.compile", partial(_compiled, mixtures.nll), compiled=True),
            Contestant("torch.distributions", partial(_plain, mixtures.distribution_nll)),
        ),
    ),
    "gmm_sample": Race(
        ceiling="read",
        share={"forward": 1.0},
        rivals=(
            Contestant("eager", partial(_plain, draws.gmm_sample)),
            Contestant("torch.compile", partial(_compiled, draws.gmm_sample), compiled=True),
        ),
    ),
    "interval_attention": Race(
        ceiling="matmul",
        # The backward does five products, the forward two.
        share={"forward": 1.0, "forward+backward": 3.5},
        rivals=(
            Contestant("SDPA loop", partial(_plain, sdpa_loop)),
            Contestant("masked SDPA", partial(_plain, masked_sdpa)),
            Contestant("FlexAttention", _flex_attention, compiled=True),
        ),
    ),
    "linear": Race(
        ceiling="matmul",
        share={"forward": 1.0, "forward+backward": 3.0},
        rivals=(
            Contestant("eager", partial(_plain, linear_formula)),
            Contestant("torch.compile", partial(_compiled, linear_formula), compiled=True),
        ),
    ),
    "linear_gmm_nll": Race(
        ceiling="matmul",
        # Of the three matmuls the forward does one.
        share={"forward": 1 / 3, "forward+backward": 1.0},
        rivals=(
            Contestant("eager", partial(_plain, mixtures.linear_nll)),
            Contestant("torch.compile", partial(_compiled, mixtures.linear_nll), compiled=True),
        ),
    ),
    "linear_cross_entropy": Race(
        ceiling="matmul",
        # Of the three matmuls the forward does one.
        share={"forward": 1 / 3, "forward+backward": 1.0},
        rivals=(
            Contestant("eager", partial(_plain, cross_entropy_formula)),
            Contestant("torch.compile", partial(_compiled, cross_entropy_formula), compiled=True),
            Contestant("F.linear_cross_entropy", _torch_linear_cross_entropy),
            Contestant("liger", _liger_cross_entropy),
            Contestant("cut_cross_entropy", _cut_cross_entropy),
        ),
    ),
    "masked_decode_step": Race(
        ceiling="read",
        share={"forward": 1.0},
        rivals=(
            Contestant("eager", partial(_plain, tokens.masked_decode_step)),
            Contestant("torch.compile", partial(_compiled, tokens.masked_decode_step), compiled=True),
        ),
    ),
    "mixture_bits": Race(
        ceiling="copy",
        # forward: read the parameters. backward: read them again, write their gradient.
        share={"forward": 1.0, "forward+backward": 3.0},
        rivals=(
            Contestant("eager", partial(_plain, mixtures.bits)),
            Contestant("torch.compile", partial(_compiled, mixtures.bits), compiled=True),
        ),
    ),
    "mixture_cdf": Race(
        ceiling="copy",
        share={"forward": 1.0},
        rivals=(
            Contestant("eager", partial(_plain, cumulative.mixture_cdf)),
            Contestant("torch.compile", partial(_compiled, cumulative.mixture_cdf), compiled=True),
        ),
    ),
    "norm_rope": Race(
        ceiling="copy",
        # forward: read x, write y. backward: read x and grad, write dx.
        share={"forward": 1.0, "forward+backward": 2.5},
        rivals=(
            Contestant("eager", partial(_plain, heads.norm_rope)),
            Contestant("torch.compile", partial(_compiled, heads.norm_rope), compiled=True),
        ),
    ),
    "rms_norm": Race(
        ceiling="copy",
        # forward: read x, write y. backward: read x and grad, write dx.
        share={"forward": 1.0, "forward+backward": 2.5},
        rivals=(
            Contestant("eager", partial(_plain, rms_norm_formula)),
            Contestant("F.rms_norm", partial(_plain, torch_rms_norm)),
            Contestant("torch.compile", partial(_compiled, rms_norm_formula), compiled=True),
            Contestant("liger", _liger_rms_norm),
        ),
    ),
    "rope_append": Race(
        ceiling="copy",
        share={"forward": 1.0},
        rivals=(
            Contestant("eager", partial(_plain, heads.rope_append)),
            Contestant("torch.compile", partial(_compiled, heads.rope_append), compiled=True),
        ),
    ),
    "sigmoid_loss": Race(
        ceiling="matmul",
        # Of the three matmuls the forward does one.
        share={"forward": 1 / 3, "forward+backward": 1.0},
        rivals=(
            Contestant("eager", partial(_plain, sigmoid_loss_formula)),
            Contestant("torch.compile", partial(_compiled, sigmoid_loss_formula), compiled=True),
            Contestant("open_clip", partial(_open_clip_loss, 0)),
            Contestant("open_clip chunked", partial(_open_clip_loss, 1024)),
        ),
    ),
}
