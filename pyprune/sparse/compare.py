"""Whether two checkpoints can be timed side by side, and in what their models differ."""

from __future__ import annotations

from pyprune.checkpoint.source import load_tokenizer
from pyprune.errors import UserError
from pyprune.sparse.stored import StoredCheckpoint


def differences(stored: StoredCheckpoint, other: StoredCheckpoint) -> str:
    """In what the model of `stored` differs from that of `other`, beyond its weights' values: its
    architecture and the shapes of its parameters; empty if in nothing.

    Raises UserError where a token of one is not a token of the other, so that tokens/s of the two
    say nothing of each other: other tokenizers, or where one has none other vocabulary sizes.
    """
    here, there = stored.checkpoint(), other.checkpoint()
    sizes = [int(c.config.get_text_config().vocab_size) for c in (here, there)]
    words = [_vocabulary(c) for c in (stored, other)]
    if None in words:
        same, what = sizes[0] == sizes[1], f"vocabularies of {sizes[0]} and {sizes[1]} tokens"
    else:
        same, what = words[0] == words[1], "other tokenizers"
    if not same:
        raise UserError(
            f"{stored.path}, {other.path}: expected models of one vocabulary, so that tokens/s can "
            f"be compared, got {what}"
        )
    kinds = [str(c.config.model_type) for c in (here, there)]
    models = (here.build_model(), there.build_model())
    shapes, others = ({n: list(p.shape) for n, p in m.named_parameters()} for m in models)
    found = [] if kinds[0] == kinds[1] else [f"{kinds[0]} instead of {kinds[1]}"]
    changed = [n for n in shapes.keys() & others.keys() if shapes[n] != others[n]]
    if changed:
        first = min(changed)
        example = f"{first} {shapes[first]} instead of {others[first]}"
        found.append(f"{len(changed)} parameters of other shapes ({example})")
    if more := shapes.keys() - others.keys():
        found.append(f"{len(more)} parameters more ({min(more)})")
    if fewer := others.keys() - shapes.keys():
        found.append(f"{len(fewer)} parameters fewer ({min(fewer)})")
    return "; ".join(found)


def _vocabulary(stored: StoredCheckpoint) -> dict[str, int] | None:
    """Of the tokenizer; None where there is none."""
    try:
        return dict(load_tokenizer(stored.path).get_vocab())
    except UserError:
        return None
