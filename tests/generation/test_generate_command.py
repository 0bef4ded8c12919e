"""`vlkern generate` as a user meets it."""

import json
from dataclasses import replace

import pytest
import shards
import torch
from PIL import Image

from vlkern import boxes, data, models
from vlkern.cli import main
from vlkern.generation import Completion, cli
from vlkern.generation.untrained import numbers_of, random_model
from vlkern.layers.init import shapes_only
from vlkern.models.gemma import Gemma, GemmaConfig
from vlkern.models.paligemma import PRESETS, PaliGemma

SMALL = GemmaConfig(
    width=32, depth=1, heads=2, kv_heads=1, head_dim=16, mlp=32, query_scalar=16, version=1, vocabulary=64, context=100
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny PaliGemma and its tokenizer, untrained."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    models.save_pretrained(PaliGemma(PRESETS["paligemma-tiny"]), folder)
    data.load_vocabulary("bytes").save(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "a.png"
    path.write_bytes(shards.picture("red", size=(60, 40)))
    return path


def call(*arguments):
    return main(["generate", *map(str, arguments)])


def fails(capfd, *arguments):
    """One line on stderr, status 2, nothing generated."""
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    out, err = capfd.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith("vlkern: error: ") and err.count("\n") == 1, err
    return err


def test_it_streams_an_answer(folder, picture, capfd):
    asked = ["--model", folder, "--prompt", "caption en", "--image", picture, "--image", picture]
    drawn = ["--temperature", 2, "--seed", 3, "--max-new-tokens", 9]
    assert call(*asked, *drawn) == 0
    first = capfd.readouterr()
    assert first.err.startswith("prefill 141 tokens in ") and ", decode 8 tokens in " in first.err
    assert call(*asked, *drawn) == 0
    assert capfd.readouterr().out == first.out and first.out.endswith("\n")
    assert call(*asked, *drawn, "--cache-dtype", "int8", "--dtype", "bfloat16") == 0
    stop = first.out.rstrip("\n")[2:4]
    capfd.readouterr()
    assert call(*asked, *drawn, "--stop", stop, "--stop", "never") == 0
    assert capfd.readouterr().out == first.out[: first.out.index(stop)] + "\n"


@pytest.mark.parametrize("preset", ["gemma3-tiny", "gemma3-tiny-vision", "paligemma2-tiny"])
def test_random_weights(preset, picture, capfd):
    look = [] if preset == "gemma3-tiny" else ["--image", picture]
    assert call("--random-weights", preset, "--prompt", "Hello", *look, "--max-new-tokens", 3) == 0
    assert "decode 2 tokens in " in capfd.readouterr().err
    assert call("--random-weights", preset, "--prompt-tokens", 50, "--max-new-tokens", 1, "--dtype", "float32") == 0
    assert capfd.readouterr().err.startswith("prefill 50 tokens in ")


def test_untrained_models():
    """Activations of ordinary size, the same for the same seed, and a vocabulary for every id."""
    model = random_model("paligemma-tiny", seed=1)
    again = random_model("paligemma-tiny", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    ids = torch.tensor([model.config.image_token] * 64 + [2, 40])
    hidden = model.hidden(model.embed(ids, torch.randn(1, 3, 64, 64)), torch.tensor([0, 66], dtype=torch.int32))
    assert hidden.std().item() == pytest.approx(1, abs=0.3) and model.logits(hidden).isfinite().all()
    with shapes_only():
        words = numbers_of(models.create("gemma-3-270m"))
    assert (words.size, words.piece(100_000), words.piece(35)) == (262_144, b" 100000", b" ")
    assert words.encode("a<loc0001>") == data.load_vocabulary("bytes").encode("a<loc0001>")


def test_boxes_are_drawn(folder, picture, tmp_path, monkeypatch, capfd):
    said = "<loc0000><loc0000><loc0512><loc0512> red ; <loc0001> none"

    def pretend(model, prompts, *, callback, **options):
        callback(0, said)
        return [Completion(said, (1,), (0.0,), "end")]

    monkeypatch.setattr(cli, "generate", pretend)
    out = tmp_path / "drawn" / "out.png"
    assert call("--model", folder, "--prompt", "detect red", "--image", picture, "--draw", out) == 0
    printed = capfd.readouterr()
    assert printed.out == said + "\n"
    assert "not drawn: object 2 ('none') has 1 location tokens instead of 4" in printed.err
    assert f"wrote {out}: 1 boxes" in printed.err
    wanted = boxes.draw(Image.open(picture), boxes.parse(said).objects)
    assert Image.open(out).tobytes() == wanted.tobytes()


def test_a_turn_of_a_talk(tmp_path, monkeypatch, capfd):
    """--chat wraps the prompt in the marks that tuned models know."""
    models.save_pretrained(Gemma(replace(SMALL, vocabulary=1344)), tmp_path)
    seen = []
    monkeypatch.setattr(cli, "prompt_of", lambda model, text, *rest: seen.append(text) or data.Prompt((2,), None, 1))
    chat = ["--model", tmp_path, "--tokenizer", "bytes", "--prompt", "Hi", "--chat", "--max-new-tokens", 1]
    assert call(*chat) == 0
    assert seen == ["<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"]


def test_what_is_said_before_anything_is_loaded(picture, tmp_path, capfd):
    (tmp_path / "file").touch()
    (tmp_path / "bad.png").write_bytes(b"nothing")
    drawn = ["--image", picture, "--draw", tmp_path / "a.png"]
    asked = ["--model", "/nowhere", "--prompt", "a"]
    for more, message in (
        (["--top-p", 2], "--top-p must be from 0 to 1, got 2.0"),
        (["--temperature", -1], "--temperature must be at least 0, got -1"),
        (["--top-k", 0], "argument --top-k: must be at least 1, got 0"),
        (["--max-new-tokens", "many"], "argument --max-new-tokens: expected a whole number, got 'many'"),
        (["--temperature", "warm"], "argument --temperature: expected a number, got 'warm'"),
        (["--draw", tmp_path / "a.png"], "--draw: needs one --image, got 0"),
        (["--image", "/nowhere.png"], "--image /nowhere.png: cannot read (No such file or directory)"),
        (["--image", "/nowhere.png", "--draw", tmp_path / "file" / "a.png"], "--draw"),
        (["--image", tmp_path / "bad.png"], f"--image {tmp_path / 'bad.png'}: no readable picture"),
        (["--image", picture, "--draw", tmp_path / "a.jpg"], "a.jpg: expected a name that ends in .png"),
        (["--masks", "vae.npz"], "--masks: only with --draw"),
        ([*drawn, "--masks", "/nowhere.npz"], "--masks /nowhere.npz: cannot read"),
        (["--stop", ""], "--stop must be strings that are not empty, got ''"),
        (["--prompt", "b"], "--prompt: expected one text, got 2"),
        (["--prompt-tokens", 5], "not both"),
        (["--random-weights", "gemma3-tiny"], "not allowed with argument --model"),
        ([], "--model: /nowhere: no such file or directory"),
        (["--device", "abacus"], "--device abacus: not available"),
    ):
        assert message in fails(capfd, *asked, *more), message
    assert "--prompt: expected a text" in fails(capfd, "--model", "/nowhere")
    assert "one of the arguments --model --random-weights is required" in fails(capfd, "--prompt", "a")
    assert "--random-weights siglip-tiny: expected a model that generates" in fails(
        capfd, "--random-weights", "siglip-tiny", "--prompt", "a"
    )
    assert "--random-weights gemma4: expected one of gemma-2-27b" in fails(
        capfd, "--random-weights", "gemma4", "--prompt", "a"
    )


@pytest.mark.parametrize("rows", [1282, 1283, 1343])
def test_a_tokenizer_of_nearly_the_models_size(rows, folder, tmp_path, capfd):
    """Tables are padded; and Gemma 3's tokenizer has one id more than the sizes without eyes."""
    models.save_pretrained(Gemma(replace(SMALL, vocabulary=rows)), tmp_path)
    asked = ["--model", tmp_path, "--tokenizer", folder, "--max-new-tokens", 2]
    assert call(*asked, "--prompt", "Hi") == 0
    capfd.readouterr()
    if rows == 1282:
        assert "prompts must have tokens from 0 to 1281, got 2 to 1282" in fails(capfd, *asked, "--prompt", "<loc1023>")


def test_an_answer_that_cannot_be_written(folder, picture, monkeypatch, capfd):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    asked = ["--model", folder, "--image", picture, "--prompt", "a", "--max-new-tokens", 1]
    assert "the answer cannot be written (No space left on device)" in fails(capfd, *asked)


def test_what_does_not_fit(folder, picture, tmp_path, capfd):
    asked = ["--image", picture, "--prompt", "a"]
    text = ["--random-weights", "gemma3-tiny", "--prompt", "a"]
    assert "--prompt: has 3 tokens; with 600 more (--max-new-tokens)" in fails(capfd, *text, "--max-new-tokens", 600)
    assert "more than 512, for which" in fails(capfd, *text[:3], "word " * 200, "--max-new-tokens", 5)
    assert "--image: a Gemma sees no pictures, got 1" in fails(capfd, *text, "--image", picture)
    assert "--image: PaliGemma was trained to speak about pictures" in fails(capfd, "--model", folder, "--prompt", "a")
    assert "<image> in the prompt, 2, got 1" in fails(
        capfd, "--model", folder, "--prompt", "<image><image>a", "--image", picture
    )
    (tmp_path / "other").mkdir()
    data.BytePieces(data.learn_merges(["abc abd"] * 99, 900)).save(tmp_path / "other")
    (tmp_path / "pieces.json").write_text(json.dumps({"merges": [[2 + i, 3 + i] for i in range(99)]}))
    assert "the tokenizer must have 1283 ids" in fails(
        capfd, "--model", folder, *asked, "--tokenizer", tmp_path / "pieces.json"
    )
    models.save_pretrained(models.create("gemma3-tiny"), tmp_path / "gemma")
    other = ["--model", tmp_path / "gemma", "--tokenizer", "bytes", "--prompt", "a"]
    assert "the tokenizer must have about the 2048 ids of the model, got 1283" in fails(capfd, *other)
    siglip = tmp_path / "siglip"
    models.save_pretrained(models.create("siglip-tiny"), siglip)
    assert "expected a Gemma or a PaliGemma, got Siglip" in fails(capfd, "--model", siglip, "--prompt", "a")
    bare = tmp_path / "bare"
    models.save_pretrained(PaliGemma(PRESETS["paligemma-tiny"]), bare)
    assert "no tokenizer there" in (said := fails(capfd, "--model", bare, *asked))
    assert said.endswith("give one with --tokenizer\n")
    assert f"--tokenizer: {tmp_path / 'no'}" in fails(capfd, "--model", bare, *asked, "--tokenizer", tmp_path / "no")
