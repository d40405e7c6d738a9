"""Few-shot learning: learning to start, to adapt, and to remember."""

from fmeta.fewshot._anil import anil
from fmeta.fewshot._baselines import fine_tune, from_scratch, nearest_neighbour
from fmeta.fewshot._config import FewShotConfig
from fmeta.fewshot._contract import Episode, Examples, MetaLearner
from fmeta.fewshot._conv4 import conv4
from fmeta.fewshot._estimator import estimator
from fmeta.fewshot._evaluate import Scores, evaluate
from fmeta.fewshot._glyphs import Glyphs, contact_sheet, glyphs, load_glyphs
from fmeta.fewshot._gradient_based import Adapted, Inner, gradient_based
from fmeta.fewshot._image_folder import image_folder, omniglot
from fmeta.fewshot._imaml import imaml
from fmeta.fewshot._job import few_shot
from fmeta.fewshot._llama import llama
from fmeta.fewshot._load import Trained, load_run
from fmeta.fewshot._losses import LOSSES
from fmeta.fewshot._maml import first_order_maml, maml
from fmeta.fewshot._maml_plus_plus import maml_plus_plus
from fmeta.fewshot._meta_batch import Piece, Seen, shown
from fmeta.fewshot._meta_lstm import meta_lstm
from fmeta.fewshot._meta_sgd import meta_sgd
from fmeta.fewshot._model import Model
from fmeta.fewshot._protonet import Prototypes, protonet
from fmeta.fewshot._reptile import reptile
from fmeta.fewshot._sinusoid import sinusoid
from fmeta.fewshot._snail import Read, snail
from fmeta.fewshot._source import Source, draw, from_classes

__all__ = [
    "LOSSES",
    "Adapted",
    "Episode",
    "Examples",
    "FewShotConfig",
    "Glyphs",
    "Inner",
    "MetaLearner",
    "Model",
    "Piece",
    "Prototypes",
    "Read",
    "Scores",
    "Seen",
    "Source",
    "Trained",
    "anil",
    "contact_sheet",
    "conv4",
    "draw",
    "estimator",
    "evaluate",
    "few_shot",
    "fine_tune",
    "first_order_maml",
    "from_classes",
    "from_scratch",
    "glyphs",
    "gradient_based",
    "image_folder",
    "imaml",
    "llama",
    "load_glyphs",
    "load_run",
    "maml",
    "maml_plus_plus",
    "meta_lstm",
    "meta_sgd",
    "nearest_neighbour",
    "omniglot",
    "protonet",
    "reptile",
    "shown",
    "sinusoid",
    "snail",
]
