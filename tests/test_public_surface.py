"""What users may rely on, frozen: a change here is a decision, not a side effect."""

import ast
import importlib
import re
import subprocess
import sys

import pytest
from rooms import ROOT

import vlkern
from vlkern._op import REGISTRY

NAMES = {
    "vlkern": ["__version__", "backend", "explain", "ops", "validate"],
    "vlkern.ops": [
        "affine_coupling",
        "affine_coupling_inverse",
        "decode_attention",
        "decode_linear",
        "fsq_dequantize",
        "fsq_quantize",
        "geglu",
        "gmm_guided_sample",
        "gmm_nll",
        "gmm_sample",
        "interval_attention",
        "interval_attention_lse",
        "linear",
        "linear_cross_entropy",
        "linear_gmm_nll",
        "linear_log_probs",
        "masked_decode_step",
        "mixture_bits",
        "mixture_cdf",
        "mixture_window",
        "norm_rope",
        "rms_norm",
        "rope_append",
        "sigmoid_contrastive_loss",
    ],
}
#: What the library reads while it runs, and what its build reads besides.
ENVIRONMENT = {"VLKERN_BACKEND", "TRITON_INTERPRET"}
BUILD_ENVIRONMENT = {"VLKERN_CUDA", "PATH"}
HEAVY = [
    "triton",
    "transformers",
    "open_clip",
    "PIL",
    "matplotlib",
    "webdataset",
    "rich",
    "torch._inductor",
    "torchvision",
]

LIBRARY = [path for folder in ("python", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES = [
    path
    for folder in ("python", "kernels", "csrc", "tests", "bench", "tools")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".cpp", ".h", ".cu"}
]


@pytest.mark.parametrize("module", NAMES)
def test_public_names(module):
    loaded = importlib.import_module(module)
    assert sorted(loaded.__all__) == NAMES[module]
    assert all(hasattr(loaded, name) for name in NAMES[module])


def environment_names(path):
    """The variables that a Python file reads from os.environ, by literal or by a constant of the file."""
    tree = ast.parse(path.read_text())
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            key = node.slice
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"os.environ.get", "os.getenv"}:
            key = node.args[0]
        else:
            continue
        yield key.value if isinstance(key, ast.Constant) else constants.get(ast.unparse(key), ast.unparse(key))


def test_environment_variables():
    found = {name for path in LIBRARY for name in environment_names(path)}
    for path in SOURCES:
        if path.suffix != ".py":
            found.update(re.findall(r"getenv\(([^)]*)\)", path.read_text()))
    assert found == ENVIRONMENT
    assert set(environment_names(ROOT / "setup.py")) <= BUILD_ENVIRONMENT
    assert set(environment_names(ROOT / "tests/rooms.py")) == {"VLKERN_TEST_BACKENDS"}


def test_import_is_light():
    """Optional packages load when they are needed, and nothing is compiled on import."""
    # PyTorch itself may load some of these: only what vlkern adds counts.
    code = (
        f"import sys, torch; before = set(sys.modules); import vlkern; print({{*{HEAVY}}} & {{*sys.modules}} - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("op", REGISTRY.values(), ids=list(REGISTRY))
def test_every_op_has_its_pages(op):
    assert (ROOT / "kernels" / op.name / "README.md").is_file()
    page = ROOT / "docs/ops" / f"{op.public}.md"
    assert page.read_text().startswith(f"# {op.public}\n")


def test_files_stay_small():
    long = {str(path.relative_to(ROOT)): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 450}
    assert not long, "one idea each: split these"


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", vlkern.__version__)
