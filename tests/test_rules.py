"""Who may attend to whom in masked attention: the bits against the rules word by word."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mifo.method.backbone import Rule
from mifo.method.prompts.instances import PromptTokens
from mifo.method.regions.grids import rasterise_boxes
from mifo.method.regions.rules import SubjectWords, pixel_rule, region_rules, word_rule

BOXES = [(0.0, 0.0, 0.75, 0.75), (0.375, 0.25, 1.0, 0.625)]  # they overlap
SUBJECTS, FILTER, EOS, LENGTH = {"a": (4,), "b": (6, 7)}, (1, 3, 5), 9, 12


@pytest.fixture
def shapes():
    """Two samples with different overlapping shapes of two subjects, 4×4."""
    boxes = rasterise_boxes(BOXES, 4)
    return torch.stack([boxes, boxes.flip(-1)]).flatten(2)


@pytest.fixture
def words():
    tokens = PromptTokens(SUBJECTS, FILTER, EOS, LENGTH)
    return SubjectWords.of(list(SUBJECTS.values()), tokens, torch.device("cpu"))


def test_subjects_words_and_the_end_are_found_by_their_places(words):
    assert [row.nonzero().flatten().tolist() for row in words.subjects] == [[4], [6, 7]]
    assert words.filtered.nonzero().flatten().tolist() == [1, 3, 5]
    assert words.end.nonzero().flatten().tolist() == [9]
    assert words.leading.tolist() == [4, 7]
    assert [row.nonzero().flatten().tolist() for row in words.context[0]] == [[4, 9], [6, 7, 9]]


def test_who_sees_whom():
    query_bits = torch.tensor([[1, 6, -(2**31)]], dtype=torch.int32)
    key_bits = torch.tensor([[3, 8], [-1, -(2**31)]], dtype=torch.int32)
    expected = [[[1, 0], [1, 0], [0, 0]], [[1, 0], [1, 0], [1, 1]]]
    assert torch.equal(Rule(query_bits, key_bits).allowed(), torch.tensor(expected).bool())


@pytest.mark.parametrize("guidance", [False, True])
def test_words_follow_the_rules(shapes, words, guidance):
    rule = word_rule(shapes, words, guidance)
    assert rule.queries.dtype == rule.keys.dtype == torch.int32
    allowed = rule.allowed()
    for sample in range(2):
        for pixel in range(16):
            inside = [shapes[sample, subject, pixel].item() for subject in range(2)]
            background = not any(inside)
            for token in range(LENGTH):
                is_open = token not in FILTER
                for subject, places in enumerate(SUBJECTS.values()):
                    if token in places:
                        is_open = inside[subject] or (guidance and background)
                if token == EOS and background and not guidance:
                    is_open = False
                assert allowed[sample, pixel, token] == is_open


def test_pixels_follow_the_rules(shapes):
    rule = pixel_rule(shapes)
    assert rule.queries.dtype == rule.keys.dtype == torch.int32
    allowed = rule.allowed()
    for sample in range(2):
        owners = [{s for s in range(2) if shapes[sample, s, pixel]} for pixel in range(16)]
        for query in range(16):
            for key in range(16):
                is_open = not owners[query] or not owners[key] or bool(owners[query] & owners[key])
                assert allowed[sample, query, key] == is_open
    assert any(len(at) == 2 for at in owners)


def test_the_unconditional_half_sees_all_words_and_is_bounded_among_pixels(words):
    sizes = [(4, 4), (8, 8)]

    def shapes_at(size):
        boxes = rasterise_boxes(BOXES, size[0])
        return torch.stack([boxes, boxes.flip(-1)])

    guidance = region_rules(shapes_at, sizes, words, guidance=True)
    denoising = region_rules(shapes_at, sizes, words, guidance=False)
    for size in sizes:
        shapes = shapes_at(size).flatten(2)
        assert torch.equal(guidance.words[size].allowed(), word_rule(shapes, words, True).allowed())
        assert torch.equal(guidance.pixels[size].allowed(), pixel_rule(shapes).allowed())
        unconditional, conditional = denoising.words[size].allowed().chunk(2)
        assert unconditional.all()
        assert torch.equal(conditional, word_rule(shapes, words, False).allowed())
        for half in denoising.pixels[size].allowed().chunk(2):
            assert torch.equal(half, pixel_rule(shapes).allowed())


def test_rules_are_made_of_the_same_bits_without_a_copy_from_the_processor(words):
    """On a GPU each copy would wait for all that is under way, twenty times at each renewal of shapes."""
    seen = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function)
            return function(*args, **(kwargs or {}))

    shapes = torch.stack([rasterise_boxes(BOXES, 4)])
    with Seen():
        rules = region_rules(lambda size: shapes, [(4, 4)], words, guidance=True)
    assert not seen & {torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default}
    first, second = shapes.flatten(2).int()[0]
    own = first + 2 * second
    background = 1 << 30
    assert torch.equal(rules.pixels[4, 4].queries[0], torch.where(own == 0, -1, own + background))
    assert torch.equal(rules.pixels[4, 4].keys[0], torch.where(own == 0, background, own))
    texts = rules.texts[4, 4]
    assert torch.equal(texts.keys, rules.pixels[4, 4].keys)
    bits = {4: 1 + background, 6: 2 + background, 7: 2 + background}
    assert texts.queries[0].tolist() == [bits.get(place, -1) for place in range(LENGTH)]


def test_as_many_subjects_as_there_are_bits_are_told_apart():
    shapes = torch.eye(27, dtype=torch.bool)[None]
    places = {str(i): (i + 1,) for i in range(27)}
    words = SubjectWords.of(list(places.values()), PromptTokens(places, (28,), 29, 31), torch.device("cpu"))
    assert torch.equal(pixel_rule(shapes).allowed()[0], torch.eye(27, dtype=torch.bool))
    allowed = word_rule(shapes, words, guidance=False).allowed()[0]
    assert torch.equal(allowed[:, 1:28], torch.eye(27, dtype=torch.bool))
    assert not allowed[:, 28].any() and allowed[:, [0, 29, 30]].all()
