"""What some exercises' checks ask of SAM, of the language model and of results, made up: small, and quickly there."""

import numpy as np


class Teller:
    """A language model that knows dogs, and takes everything else for a cake beside one."""

    name, follows_instructions = "teller", False

    def answer(self, prompts):
        for prompt in prompts:
            if "dog" in prompt:
                yield "1. a dog\n2. the small dog"
            else:
                yield "1. a cake\n2. the cake beside the dog"


def asked(seed):
    """The ground, which SAM hardly trusts; a thing; a part of it, which it trusts most; and a speck."""
    rng, masks = np.random.default_rng(seed), np.zeros((4, 20, 20), bool)
    masks[0] = True
    masks[1, 4:16, 2:14] = masks[2, 6:12, 5:10] = masks[3, 7:9, 6:8] = True
    order = rng.permutation(4)
    trusted = np.array([0.3, 0.85, 0.9, 0.5])[order]
    return masks[order], trusted, rng.random((20, 20)), masks[1]
