"""`vlkern train RECIPE`."""

import argparse
from importlib import import_module

from vlkern.errors import UserError
from vlkern.train import options
from vlkern.train.ranks import join

#: those with two towers, which can be frozen
_TOWERS = ("siglip", "paligemma", "navit")
#: recipe -> (module with add_arguments(parser) and train(args, ranks), what it trains)
RECIPES = {
    "siglip": ("vlkern.train.siglip", "two towers with the sigmoid loss"),
    "paligemma": ("vlkern.train.paligemma", "PaliGemma on captions, classes and boxes"),
    "navit": ("vlkern.train.navit", "NaViT with the sigmoid loss, on pictures at their own aspect ratio"),
    "fsq": ("vlkern.train.fsq", "an autoencoder with finite scalar quantization"),
    "vae": ("vlkern.train.vae", "a beta-VAE, the autoencoder of GIVT"),
    "maskgit": ("vlkern.train.maskgit", "MaskGIT, which fills in the codes of an FSQ autoencoder"),
    "jet": ("vlkern.train.jet", "a Jet, a normalizing flow of pictures"),
    "jetformer": ("vlkern.train.jetformer", "JetFormer, a flow and a decoder of pictures and texts"),
    "m2t": ("vlkern.train.m2t", "the codec M2T (or MT) of `vlkern compress`, on crops of photographs"),
    "givt": ("vlkern.train.givt", "a GIVT on the latents of a beta-VAE, with classes"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A sub-command for each recipe."""
    recipes = parser.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    for name, (module, text) in RECIPES.items():
        recipe = recipes.add_parser(name, help=text, description=f"Train {text}.")
        command = import_module(module)
        command.add_arguments(recipe)
        options.add_learning(recipe, getattr(command, "DEFAULTS", None))
        if name in _TOWERS:
            options.add_tuning(recipe)
        options.add_run(recipe)


def run(args: argparse.Namespace) -> int:
    """Train. Raises UserError for everything that the user can mend."""
    with join(args.device) as ranks:
        try:
            import_module(RECIPES[args.recipe][0]).train(args, ranks)
        except UserError as error:
            if ranks.first:
                raise
            raise UserError(f"rank {ranks.rank}: {error}") from error
        finally:
            if ranks.first and "folder" in args:
                args.folder.leave()
    return 0
