"""What the report says about tokens and attention, measured on a finished run of transformer.py.

    python report/measure.py runs/transformer         leaves measured.json there

Attention is not asked whether it looks sensible, but whether it matters: the tokens that it rests on most are deleted
from each held-out text, or as many random ones instead, and the two drops in the probability of the predicted
class are compared. Deleted words are gone, not masked. The naive Bayes vote is left out: it does not attend.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import transformer as t  # noqa: E402

DRAWS = 5  # random deletions a text


def padding_share(tokens: list[torch.Tensor], batches: list[list[int]]) -> float:
    """How much of the padded batches (B, T) is padding."""
    cells = sum(len(batch) * max(len(tokens[row]) for row in batch) for batch in batches)
    return 1 - sum(map(len, tokens)) / cells


@torch.no_grad()
def probability(model: t.TransformerClassifier, texts: list[torch.Tensor]) -> torch.Tensor:
    """Class probabilities (N, C) by the encoder alone."""
    return model(pad_sequence(texts, batch_first=True, padding_value=t.PAD)).softmax(-1)


@torch.no_grad()
def delete_tokens(model: t.TransformerClassifier, text: torch.Tensor, share: float) -> list[float]:
    """Probability of `text`'s predicted class, text (T, 3): whole, without its most attended, without random tokens."""
    count = max(1, round(share * len(text)))
    _, attn = model(text[None], return_attn=True)
    received = attn[0].mean((0, 1))  # (T,), over heads and over the tokens that look
    most = torch.ones(len(text), dtype=torch.bool)
    most[received.argsort(descending=True)[:count]] = False
    kept = [text, text[most]]
    kept += [text[torch.randperm(len(text))[count:].sort().values] for _ in range(DRAWS)]
    p = probability(model, kept)
    p = p[:, p[0].argmax()]
    return [p[0].item(), p[1].item(), p[2:].mean().item()]


def measure(folder: Path, share: float) -> dict:
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))["arguments"]
    args = argparse.Namespace(**saved | {"data": Path(saved["data"]) if saved["data"] else None})
    news = t.load_news(args)
    state = t.load_checkpoint(folder / "checkpoint.pt", "transformer", news.hashes)  # the rows that it was trained on
    tokenize = t.make_tokenizer(args.tokenizer)
    words = [t.split_text(text, state["columns"], tokenize) for text in news.texts]
    tokens = t.encode(words, {word: i for i, word in enumerate(state["words"])}, state["max_length"])

    torch.manual_seed(args.seed)
    triples = []
    for member, model in zip(state["members"], t.load_members(state), strict=True):
        triples += [delete_tokens(model, tokens[row], share) for row in member["rows"] if len(tokens[row]) >= 10]
    full, attended, random = torch.tensor(triples).T
    difference = random - attended  # > 0: the attended tokens mattered more than random ones
    rows = torch.randperm(len(tokens)).tolist()
    size = args.batch_size
    unknown = sum(int((text[:, 0] == t.UNK).sum()) for text in tokens)
    return {
        "texts": len(tokens),
        "tokens": sum(map(len, tokens)),
        "vocabulary": len(state["words"]),
        "unknown_share": unknown / sum(map(len, tokens)),
        "longest": max(map(len, tokens)),
        "median_length": sorted(map(len, tokens))[len(tokens) // 2],
        "padding_share_random": padding_share(tokens, [rows[i : i + size] for i in range(0, len(rows), size)]),
        "padding_share_by_length": padding_share(
            tokens, t.length_batches(list(map(len, tokens)), rows, size, t.seed_all(args.seed))
        ),
        "deleted_share": share,
        "deletion_texts": len(triples),
        "probability": full.mean().item(),
        "drop_attended": (full - attended).mean().item(),
        "drop_random": (full - random).mean().item(),
        "difference": difference.mean().item(),
        "difference_se": difference.std().item() / math.sqrt(len(triples)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/transformer"))
    parser.add_argument("--share", type=float, default=0.1, help="of a text's tokens that are deleted")
    args = parser.parse_args()
    if not 0 < args.share < 1:
        parser.error(f"--share {args.share}: give a number between 0 and 1")
    result = measure(args.folder, args.share)
    t.write_json(args.folder / "measured.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
