"""Every code block of the documentation and every docstring example runs and prints what it says.

A block fenced as `python` is run, all blocks of a page in one namespace; with `>>>` its output is compared. What cannot
run here says so in its fence: `python gpu`, `python network` or `python torchrun`.
"""

import contextlib
import doctest
import inspect
import io
import re
import traceback

import pytest
import torch
from rooms import ROOT

import vlkern

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels").rglob("*.md")])
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
LANGUAGES = {"", "python", "python gpu", "python network", "python torchrun", "sh", "text", "cpp", "json"}
CHECKER, FLAGS = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_examples(examples, names, where, must_print=True):
    """Like doctest; `must_print=False` compares only what is written there."""
    for example in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                exec(compile(example.source, where, "single"), names)
            except Exception as error:
                if example.exc_msg is None:
                    raise
                printed.write("".join(traceback.format_exception_only(error)))
        want = example.exc_msg or example.want
        if want or must_print:
            assert CHECKER.check_output(want, printed.getvalue(), FLAGS), (
                f"{where}: {example.source}{printed.getvalue()}"
            )


def relative(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "__page__"}
    for block in FENCE.finditer(page.read_text()):
        language, code = block.groups()
        assert language in LANGUAGES, f"{relative(page)}: fence {language!r}"
        line = page.read_text()[: block.start()].count("\n") + 2
        where = f"{relative(page)}:{line}"
        if language != "python":
            continue
        if ">>>" in code:
            run_examples(doctest.DocTestParser().get_examples(code, where), names, where)
        else:
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page):
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]


PUBLIC = [getattr(module, name) for module in (vlkern, vlkern.ops) for name in module.__all__]


@pytest.mark.parametrize("thing", [thing for thing in PUBLIC if callable(thing)], ids=lambda thing: thing.__name__)
def test_docstring_example_runs(thing):
    """The names that the examples use stand for what a reader would have at hand."""
    image = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    names = {
        "torch": torch,
        "vlkern": vlkern,
        "x": torch.randn(4, 8),
        "weight": torch.ones(8),
        "image": image,
        "text": image.clone(),
        "log_scale": torch.tensor(2.3, requires_grad=True),
        "bias": torch.tensor(-10.0, requires_grad=True),
    }
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(thing))
    run_examples(examples, names, thing.__name__, must_print=False)
