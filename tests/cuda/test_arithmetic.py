"""The arithmetic of the sigmoid loss on the GPU (csrc/cuda/pairs.cuh), compiled for the CPU, against float64."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rooms import ROOT

HERE = Path(__file__).parent
ULP = 2.0**-23
POINTER = ctypes.POINTER(ctypes.c_float)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(dots [8], scale, bias, keep, positive) -> g [8], sums [3]"""
    library = tmp_path_factory.mktemp("pairs") / "pairs.so"
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = ["-I", HERE / "emulator", "-I", ROOT / "csrc"]
    subprocess.run(["g++", *flags, *include, HERE / "pairs.cpp", "-o", library], check=True)
    function = ctypes.CDLL(str(library)).sigmoid_pairs_
    function.argtypes = [POINTER, ctypes.c_float, ctypes.c_float, ctypes.c_uint, ctypes.c_uint, POINTER]
    function.restype = None

    def call(dots, scale, bias, keep=0xFF, positive=0):
        g, sums = np.array(dots, np.float32), np.zeros(3, np.float32)
        function(g.ctypes.data_as(POINTER), scale, bias, keep, positive, sums.ctypes.data_as(POINTER))
        return g, sums

    return call


def exact(s, z):
    """softplus(-z s) and its derivative by s, in float64."""
    u = -z * s.astype(np.float64)
    e = np.exp(-np.abs(u))
    return np.maximum(u, 0) + np.log1p(e), -z * np.where(u >= 0, 1, e) / (1 + e)


def close(ours, expected):
    """Four units in the last place, or less than the smallest normal number."""
    return np.all(np.abs(ours - expected) <= 4 * ULP * np.abs(expected) + 2.0**-126)


LOGITS = np.concatenate([-np.geomspace(1e-30, 1e4, 4000)[::-1], [0.0], np.geomspace(1e-30, 1e4, 4000)]).astype(
    np.float32
)


@pytest.mark.parametrize("z", [-1, 1])
def test_each_pair_over_the_whole_range(pairs, z):
    g, loss = np.zeros_like(LOGITS), np.zeros_like(LOGITS)
    for i, s in enumerate(LOGITS):
        k = i % 8
        out, sums = pairs(np.full(8, s), 1.0, 0.0, 1 << k, (z > 0) << k)
        g[i], loss[i] = out[k], sums[0]
        assert np.count_nonzero(out) <= 1  # the other seven do not count
        assert sums[2] == out[k]
    expected_loss, expected_g = exact(LOGITS, z)
    assert np.isfinite(loss).all() and np.isfinite(g).all()
    assert close(loss, expected_loss)
    assert close(g, expected_g)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("positive", [0, 1 << 5])
def test_eight_pairs_share_one_logarithm(pairs, size, positive):
    generator = np.random.default_rng(0)
    z = np.array([1 if positive >> k & 1 else -1 for k in range(8)])
    for shift in (-1.0, 0.0, 1.0):
        for _ in range(300):
            dots = (size * (generator.uniform(-1, 1, 8) + shift)).astype(np.float32)
            g, sums = pairs(dots, 1.0, 0.0, 0xFF, positive)
            loss, slope = exact(dots, z)
            assert close(g, slope)
            # Eight roundings of a running sum, on top of the pairs' own errors.
            for ours, terms in zip(sums, (loss, slope * dots.astype(np.float64), slope), strict=True):
                assert abs(ours - terms.sum()) <= 8 * ULP * np.abs(terms).sum() + 2.0**-126


def test_scale_and_bias_make_the_logit(pairs):
    dots = np.linspace(-1, 1, 8, dtype=np.float32)
    g, sums = pairs(dots, 10.0, -10.0, 0xFF, 1)
    z = np.array([1, *[-1] * 7])
    loss, slope = exact(10 * dots.astype(np.float64) - 10, z)
    assert np.allclose(g, slope, rtol=2e-6) and np.isclose(sums[0], loss.sum(), rtol=1e-6)


def test_what_does_not_count_is_not_read(pairs):
    dots = np.array([0.5, np.nan, np.inf, -np.inf, 0.25, 3e38, -3e38, np.nan], np.float32)
    g, sums = pairs(dots, 2.0, 0.0, 0b00010001, 0)
    clean = np.where(np.isfinite(dots) & (np.abs(dots) < 1), dots, 0)
    expected_g, expected_sums = pairs(clean, 2.0, 0.0, 0b00010001, 0)
    assert np.array_equal(g, expected_g) and np.array_equal(sums, expected_sums)


def test_nan_is_not_hidden(pairs):
    """fmaxf would turn a NaN into 0."""
    g, sums = pairs([0, 0, np.nan, 0, 0, 0, 0, 0], 1.0, 0.0)
    assert np.isnan(g[2]) and np.isnan(sums).all()
