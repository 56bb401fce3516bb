"""What tests share: recorded numbers of the authors' code, data, and small real models."""

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

from retouch.core.data import TensorData
from retouch.worlds import digits

torch.set_num_threads(1)  # tests run in several processes
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden():
    """golden("ssd") gives its arrays as attributes, and `close(name, value)` that compares within its tolerance."""

    def load(name):
        notes = json.loads((GOLDEN / f"{name}.json").read_text())
        arrays = dict(np.load(GOLDEN / f"{name}.npz", allow_pickle=False))

        def close(key, value):
            actual = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
            np.testing.assert_allclose(actual, arrays[key], rtol=notes["rtol"], atol=notes["atol"], err_msg=key)

        return SimpleNamespace(**arrays, close=close, keys=list(arrays))

    return load


@pytest.fixture(scope="session")
def digits_small():
    """240 training digits, 24 of each class, and 100 test digits."""
    data, test = digits.data("train"), digits.data("test")
    rows = torch.cat([(data.targets == c).nonzero()[:24, 0] for c in range(10)])
    return SimpleNamespace(train=TensorData(data.inputs[rows], data.targets[rows]), test=TensorData(*test[:100]))


@pytest.fixture(scope="session")
def trained_cnn():
    """The shipped CNN; copy it before changing it."""
    return digits.reference("cnn")


@pytest.fixture
def tiny_vit():
    """A real ViT, untrained, with two layers of width 16."""
    from transformers import ViTConfig, ViTForImageClassification

    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **settings)
    return ViTForImageClassification(config).eval()


@pytest.fixture
def tiny_llama():
    """A real Llama, untrained, with two layers of width 16 and 40 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, pad_token_id=0, max_position_embeddings=64, **settings)).eval()


@pytest.fixture
def global_rng_untouched():
    """Fails the test if the global generators of torch, numpy or random were drawn from or seeded in it."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    yield
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
