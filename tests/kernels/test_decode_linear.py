"""Linear layers with what stands around them: what they join, rows by themselves, and bad input."""

import pytest
import torch

import vlkern
from vlkern.ops import decode_linear, geglu, linear, rms_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_is_the_ops_that_it_joins(backend):
    torch.manual_seed(0)
    x, gate, up, before = draw(3, 33), draw(40, 33), draw(40, 33), draw(33)
    with vlkern.backend(f"decode_linear={backend}"):
        got = decode_linear(x, gate, up, before=before, geglu=True, eps=1e-3, offset=0.5)
        u = rms_norm(x, before, eps=1e-3, offset=0.5)
        torch.testing.assert_close(got, geglu(linear(u, gate), linear(u, up)))
        down, after, residual = draw(7, 40), draw(7), draw(3, 7)
        back = decode_linear(got, down, after=after, residual=residual, offset=1.0)
        torch.testing.assert_close(back, residual + rms_norm(linear(got, down), after, offset=1.0))
        parts = [draw(n, 33) for n in (5, 1, 9)]
        torch.testing.assert_close(decode_linear(x, *parts), linear(x, torch.cat(parts)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 33, 130])
def test_a_row_among_few_has_the_bits_that_it_has_alone(dtype, k):
    """So what batched decoding gives does not depend on the batch."""
    torch.manual_seed(0)
    x, gate, up = draw(16, k, dtype=dtype), draw(41, k, dtype=dtype), draw(41, k, dtype=dtype)
    residual, norms = draw(16, 41, dtype=dtype), {"before": draw(k), "after": draw(41)}

    def call(part):
        return decode_linear(x[part], gate, up, residual=residual[part], **norms, geglu=True)

    with vlkern.backend("decode_linear=cpu"):
        alone = torch.cat([call(slice(i, i + 1)) for i in range(16)])
        for rows in (2, 3, 16):
            assert torch.equal(call(slice(rows)), alone[:rows])


def test_weights_of_norms_may_have_another_dtype():
    torch.manual_seed(0)
    x, weight, norm = draw(2, 8).bfloat16(), draw(8, 8).bfloat16(), draw(8)
    exact = decode_linear(x, weight, before=norm.bfloat16().float(), after=norm.bfloat16().float())
    assert torch.equal(decode_linear(x, weight, before=norm.bfloat16(), after=norm.bfloat16()), exact)


def test_autocast_takes_autocasts_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert decode_linear(draw(2, 8), draw(8, 8), residual=draw(2, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": draw(17, 6)}, ValueError, r"x must have shape \[M, K\] with M <= 16 and K >= 1, got \[17, 6\]"),
        ({"x": draw(6)}, ValueError, r"got \[6\]"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"weights": ()}, ValueError, "weights must be at least one, got none"),
        ({"weights": (draw(0, 6),)}, ValueError, "weights must have at least one row"),
        ({"weights": (draw(7, 5),)}, ValueError, r"weights must have shape \[N, 6\], got \[7, 5\]"),
        ({"weights": (draw(7, 6).half(),)}, TypeError, "weights must have the dtype of x"),
        ({"weights": (draw(7, 6), draw(6, 6)), "geglu": True}, ValueError, "two of one shape with geglu"),
        ({"before": draw(7)}, ValueError, r"before must have shape \[6\], got \[7\]"),
        ({"before": torch.ones(6, dtype=torch.int32)}, TypeError, "before must be float64"),
        ({"after": draw(6)}, ValueError, r"after must have shape \[7\], got \[6\]"),
        ({"residual": draw(1, 7)}, ValueError, r"residual must have shape \[2, 7\], got \[1, 7\]"),
        ({"residual": draw(2, 7).half()}, TypeError, "residual must have the dtype of x"),
        ({"eps": 0.0}, ValueError, "eps must be a positive finite number, got 0.0"),
        ({"offset": "1"}, TypeError, "offset must be a number, got str"),
        ({"weights": (draw(7, 6).requires_grad_(),)}, ValueError, r"weights\[0\] must not require a gradient"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"x": draw(2, 6), "weights": (draw(7, 6),), **change}
    x, weights = arguments.pop("x"), arguments.pop("weights")
    with pytest.raises(error, match=message):
        decode_linear(x, *weights, **arguments)
