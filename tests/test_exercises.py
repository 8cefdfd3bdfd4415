"""The exercises of notebooks 00 and 01: other right answers, and what the library does."""

import numpy as np

from tests.wrong_answers import EXERCISES
from wris_lib.methods.clip_sam import points_from_map


def test_a_border_of_the_rule_with_a_third_object():
    exercise = EXERCISES["two_names"]
    assert exercise.judge(exercise.answer({"[other]": "(other, np.zeros_like(other))"})) is True


def test_the_exercise_is_what_the_library_does():
    response_map = np.random.default_rng(0).random((16, 16), np.float32)
    response_map = (response_map - response_map.min()) / np.ptp(response_map)
    points, labels = points_from_map(response_map, 256, 192)
    np.testing.assert_allclose(EXERCISES["points_from_map"].answer()(response_map, 256, 192), points[labels == 1])
