import numpy as np
import pytest
import torch

from wris_lib.checking import Wrong, array_of


@pytest.mark.parametrize("value", ["text", [[1, 2], [3]], torch.ones(2, requires_grad=True), [10**400], {1: 2}])
def test_what_is_no_array_of_numbers_gets_the_complaint(value):
    with pytest.raises(Wrong, match="got something else"):
        array_of(value, "got something else")


def test_arrays_keep_their_numbers_or_their_dtype():
    assert np.array_equal(array_of([[1, 2]], ""), [[1.0, 2.0]]) and array_of([1], "").dtype == float
    assert array_of(np.ones(3, bool), "", None).dtype == bool
