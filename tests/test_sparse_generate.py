"""`pyprune generate`: the same text from a dense and a compressed directory, streamed."""

import json

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from sparse_checkpoints import pruned_checkpoint
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from pyprune import cli
from pyprune.errors import UserError
from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.generate import generate


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    dense = pruned_checkpoint(folder / "dense", vocab_size=258, eos_token_id=257)
    byte_tokenizer().save_pretrained(dense)
    compress_checkpoint(dense, folder / "small")
    return dense, folder / "small"


def test_command(pair, capsys):
    texts = []
    for folder in pair:
        arguments = ["generate", str(folder), "abc", "--max-new-tokens", "6", "--dtype", "float32"]
        assert cli.main([*arguments, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out == result["text"] + "\n"
        texts.append((result["text"], result["tokens"]))
    assert texts[0] == texts[1] and 1 <= texts[0][1] <= 6
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    ids = byte_tokenizer()("abc", return_tensors="pt")["input_ids"]
    want = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 3:]
    assert texts[0][0] == byte_tokenizer().decode(want, skip_special_tokens=True)


def test_sampling_is_seeded(pair):
    def text(seed):
        pieces = []
        generate(pair[1], "abc", max_new_tokens=8, temperature=2.0, seed=seed, write=pieces.append)
        return "".join(pieces)

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])  # learned positions, and rotary ones
def test_the_text_ends_where_positions_do(family, tmp_path):
    tiny_model(family, vocab_size=258, eos_token_id=None).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert generate(tmp_path, "a" * 100, max_new_tokens=500, write=lambda _: None) == 28
    assert generate(tmp_path, "a" * 127, max_new_tokens=500, write=lambda _: None) == 1
    with pytest.raises(UserError, match="positions, 128, got 128"):
        generate(tmp_path, "a" * 128, write=lambda _: None)


@pytest.mark.parametrize("family", ["qwen2", "falcon"])
def test_without_a_tokenizer_it_says_so(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokenizer does not load"):
        generate(tmp_path, "abc", write=lambda _: None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_choose_nothing_are_an_error(temperature, value, tmp_path):
    """The likeliest of NaNs is token 0: where that ends the text, the answer was an empty one."""
    model = tiny_model("llama", vocab_size=258, eos_token_id=0)
    with torch.no_grad():
        model.lm_head.weight[7] = value
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the model gives NaN or infinite logits$"):
        generate(tmp_path, "abc", temperature=temperature, write=lambda _: None)


def test_a_tokenizer_of_another_model(tmp_path):
    tiny_model("llama", vocab_size=64).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"prompt: expected token ids in \[0, 64\), got"):
        generate(tmp_path, "az", write=lambda _: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--max-new-tokens", "2"], "it has no tokens"),
        (["a", "--max-new-tokens", "0"], "at least 1 new token"),
        (["a", "--temperature", "-1"], "temperature of at least 0"),
        (["a", "--chat"], "no chat template"),
        (["a", "--dtype", "int4"], "--dtype: expected one of"),
    ],
)
def test_mistakes_are_one_line(pair, arguments, message, capsys):
    assert cli.main(["generate", str(pair[1]), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
