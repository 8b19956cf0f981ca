"""transformer.py with one thing changed for which it has no flag: tokenizer, optimizer, activation.

    python report/variant.py spacy --data DIR --out DIR

The flags are those of transformer.py; basic_english changes nothing.
"""

import sys
from functools import partial
from pathlib import Path

import spacy
import torch
import torch.nn.functional as F
from nltk.tokenize import TreebankWordTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import transformer

PIPELINE = spacy.blank("en")  # its rules alone, no model to download


def spacy_tokens(text: str) -> list[str]:
    return [token.lower_ for token in PIPELINE(text) if not token.is_space]


def treebank_tokens(text: str) -> list[str]:
    return TreebankWordTokenizer().tokenize(text.lower())


def whitespace_tokens(text: str) -> list[str]:
    return text.lower().split()


TOKENIZERS = {
    "basic_english": transformer.TOKENIZE,
    "spacy": spacy_tokens,
    "nltk": treebank_tokens,
    "whitespace": whitespace_tokens,
}
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": partial(torch.optim.SGD, momentum=0.9)}


def parse_args(argv: list[str]):
    """The arguments of transformer.py, which follow the name of a change."""
    if not argv or argv[0] not in {*TOKENIZERS, *OPTIMIZERS, "relu"}:
        transformer.fail(f"give first one of {', '.join([*TOKENIZERS, *OPTIMIZERS, 'relu'])}")
    return transformer.parse_args(argv[1:])


def main(argv: list[str]) -> dict:
    """Run transformer.py with the change that the first argument names; return its metrics."""
    parse_args(argv)
    name, *rest = argv
    transformer.TOKENIZE = TOKENIZERS.get(name, transformer.TOKENIZE)
    transformer.OPTIMIZER = OPTIMIZERS.get(name, transformer.OPTIMIZER)
    transformer.ACTIVATION = F.relu if name == "relu" else transformer.ACTIVATION
    return transformer.main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
