"""Token positions, on the word pieces of Stable Diffusion's own vocabulary (it comes with open_clip)."""

import gzip
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import open_clip
import pytest
from open_clip.tokenizer import bytes_to_unicode
from transformers import CLIPTokenizer

from mifo.backbones.clip import prompt_words
from mifo.errors import MifoError
from mifo.method.prompts.function_words import is_function_word
from mifo.method.prompts.instances import PromptTokens, check_instances, check_placeholders, find_instances


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """Stable Diffusion's tokenizer with three instance tokens."""
    packed = (Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = [
        tuple(line.split()) for line in gzip.decompress(packed).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    ]
    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    tokenizer.add_tokens(["<asset0>", "<asset1>", "<asset2>"])
    return tokenizer


def found_in(tokenizer: CLIPTokenizer, prompt: str, keys: Sequence[str] = ()) -> PromptTokens:
    return find_instances(prompt, keys, partial(prompt_words, tokenizer))


def test_positions_in_a_prompt_of_instances(tokenizer):
    found = found_in(tokenizer, "a photo of <asset2> and <asset0>", ["<asset0>", "<asset2>"])
    assert list(found.subjects.items()) == [("<asset0>", (6,)), ("<asset2>", (4,))]
    assert found.filter_indices == (1, 3, 5)
    assert (found.eos_index, found.length) == (7, 77)


def test_every_occurrence_counts_and_case_and_punctuation_do_not_matter(tokenizer):
    prompt = "<asset1>, a photo of <asset1> at The Beach!"
    found = found_in(tokenizer, prompt, ["<asset1>", "the  beach"])
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"])
    assert [pieces[position] for position in found.subjects["<asset1>"]] == ["<asset1>"] * 2
    assert [pieces[position] for position in found.subjects["the  beach"]] == ["the</w>", "beach</w>"]
    assert [pieces[position] for position in found.filter_indices] == ["a</w>", "of</w>", "at</w>"]


def test_words_of_several_pieces_are_found_whole_and_lead_by_their_last(tokenizer):
    prompt = "a photo of a chameleonic dachshund's cafe"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"])
    assert pieces[5:7] == ["chamele", "onic</w>"]
    found = found_in(tokenizer, prompt, ["chameleonic dachshund"])
    assert found.subjects["chameleonic dachshund"] == (5, 6, 7)
    assert [pieces[position] for position in found.filter_indices] == ["a</w>", "of</w>", "a</w>", "'s</w>"]


def test_a_word_is_not_found_inside_another(tokenizer):
    assert found_in(tokenizer, "a scar on a car", ["car"]).subjects["car"] == (5,)
    with pytest.raises(MifoError, match="'car'"):
        found_in(tokenizer, "a scar on a carpet", ["car"])


def test_a_longer_phrase_keeps_its_words_from_a_shorter_one(tokenizer):
    found = found_in(tokenizer, "a car and a red car", ["car", "red car"])
    assert found.subjects == {"car": (2,), "red car": (5, 6)}
    with pytest.raises(MifoError, match="'car'"):
        found_in(tokenizer, "a red car", ["car", "red car"])


def test_function_words_inside_a_boxed_phrase_stay_open(tokenizer):
    found = found_in(tokenizer, "a cup of tea on a table", ["cup of tea"])
    assert found.subjects["cup of tea"] == (2, 3, 4)
    assert found.filter_indices == (1, 5, 6)


def test_numbers_in_digits_are_function_words_and_nouns_are_not(tokenizer):
    found = found_in(tokenizer, "25 chairs in front of two walls")
    assert found.filter_indices == (1, 2, 4, 6, 7)
    assert not any(
        is_function_word(word) for word in ("photo", "red", "beach", "front", "striped", "<asset0>")
    )


@pytest.mark.parametrize(
    ("prompt", "keys", "reason"),
    [
        ("a photo of <asset7>", [], "<asset7>.*<asset0>, <asset1>, <asset2>"),
        ("a photo of <asset0>", ["<asset3>"], "<asset3> is not one of the learned"),
        ("a photo of <asset0>", ["<asset1>"], "'<asset1>'.*name it in the prompt"),
        ("a photo of <asset0>", ["dog"], "'dog'"),
        ("a photo of <asset0>", [""], "''"),
        ("a photo of <asset0>" + " very" * 80, ["<asset0>"], "86 tokens, 77 fit"),
    ],
)
def test_what_a_prompt_cannot_mean_is_refused(tokenizer, prompt, keys, reason):
    with pytest.raises(MifoError, match=reason):
        check_instances(prompt, keys, ["<asset0>", "<asset1>", "<asset2>"])
        found_in(tokenizer, prompt, keys)


def test_the_longest_prompt_that_fits_is_taken(tokenizer):
    assert found_in(tokenizer, "a photo of <asset0>" + " very" * 71).eos_index == 76


def test_instances_are_checked_without_a_tokenizer():
    check_instances("a <asset0> on a Red  Table", ["<asset0>", "red table"], ["<asset0>"])
    with pytest.raises(MifoError, match=r"<asset1>.*no instances"):
        check_instances("a photo of <asset1>", [], [])


@pytest.mark.parametrize(
    "prompt",
    ["a photo of asset0", "<ASSET0> at sea", "a photo of < asset0 >", "[asset0]", "a <asset 0>", "<asset0"],
)
def test_instances_written_otherwise_are_refused_with_the_fix(prompt):
    for text, keys in ((prompt, []), (f"<asset0> {prompt}", []), ("a photo of <asset0>", [prompt])):
        with pytest.raises(MifoError, match=r"which is no instance; write <asset0>"):
            check_instances(text, keys, ["<asset0>"])
    check_instances(prompt.replace("<asset0>", ""), [], [])  # where there are none, these are words
    check_instances("assets in a vase, <asset0><asset1>", ["<asset1>"], ["<asset0>", "<asset1>"])


@pytest.mark.parametrize("text", ["a {instance}", "{Instances}", "{}", "{instances", "{ ending }", "{class}"])
def test_unknown_placeholders_are_refused_with_the_known_ones(text):
    with pytest.raises(MifoError, match=r"layout\.prompt=.*take \{instances\} or \{ending\}"):
        check_placeholders("layout.prompt", f"a photo of {text}", ("instances", "ending"))
    with pytest.raises(MifoError, match=r"negative_prompt=.*take it out"):
        check_placeholders("negative_prompt", text)
    check_placeholders("layout.prompt", "{instances} {ending}", ("instances", "ending"))
