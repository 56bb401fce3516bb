"""States and models are written whole or not at all, without pickle, and come back bit for bit."""

import json
import math
from collections import OrderedDict
from types import MappingProxyType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, MultiStepLR, OneCycleLR, SequentialLR

from retouch.core import checkpoints, seeds
from retouch.core.checkpoints import (
    atomic_file,
    atomic_folder,
    load_model,
    load_state,
    load_tensors,
    save_model,
    save_state,
    save_tensors,
)
from retouch.core.errors import InputError
from retouch.worlds.digits import DigitsCNN


def same(first, second):
    """Bit for bit and type for type, in any nesting."""
    if isinstance(first, torch.Tensor):
        same_kind = isinstance(second, torch.Tensor) and first.dtype == second.dtype and first.shape == second.shape
        return same_kind and torch.equal(first.nan_to_num(), second.nan_to_num())
    if isinstance(first, dict):
        return isinstance(second, dict) and same(list(first.items()), list(second.items()))
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and (first == second or (first != first and second != second))


def there_and_back(tmp_path, state):
    save_state(tmp_path / "state", state)
    return load_state(tmp_path / "state")


# --- nested states --------------------------------------------------------------------------------------------------

STATES = {
    "numbers and text": {"a": 1, "b": -2.5, "c": "text é\n", "d": True, "e": None, "f": 2**80},
    "keys that are no text": {0: "a", (1, "x"): "b", True: "c", None: "d", 2.5: "e"},
    "tuples and lists": {"betas": (0.9, 0.999), "nested": [(1, [2, (3,)]), [], ()]},
    "strange floats": [math.inf, -math.inf, math.nan, 1e-310, 0.1, -0.0],
    "empty": {},
    "nothing": None,
    "a number": 3,
    "empty tensors": [torch.empty(0), torch.empty(3, 0, dtype=torch.int64), torch.empty(0)],
    "a scalar tensor": {"step": torch.tensor(7.0)},
    "bf16": torch.randn(3, 2).bfloat16(),
    "half and double": [torch.randn(3).half(), torch.randn(3).double()],
    "bool and integers": [torch.tensor([True, False]), torch.tensor([1], dtype=torch.uint8), torch.tensor([[2]])],
    "not finite": torch.tensor([math.nan, math.inf, -math.inf, 1.0]),
    "not contiguous": [torch.arange(6.0).view(2, 3).T, torch.arange(6.0)[::2], torch.ones(1).expand(4)],
}


@pytest.mark.parametrize("kind", STATES)
def test_every_kind_of_state_comes_back(tmp_path, kind):
    assert same(STATES[kind], there_and_back(tmp_path, STATES[kind]))


@pytest.mark.parametrize("kind", [Adam, lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: Adam(p, amsgrad=True)])
@pytest.mark.parametrize("stepped", [False, True])
def test_optimizer_states_come_back(tmp_path, kind, stepped):
    model = nn.Linear(3, 2)
    optimizer = kind([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}])
    if stepped:
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    loaded = there_and_back(tmp_path, optimizer.state_dict())
    assert same(optimizer.state_dict(), loaded)
    other = kind([{"params": [model.weight]}, {"params": [model.bias]}])
    other.load_state_dict(loaded)
    assert same(optimizer.state_dict(), other.state_dict())


SCHEDULERS = {
    "one cycle": lambda o: OneCycleLR(o, 0.1, total_steps=20),
    "cosine": lambda o: CosineAnnealingLR(o, 20),
    "steps": lambda o: MultiStepLR(o, [2, 2, 5]),
    "function": lambda o: LambdaLR(o, lambda k: 1 / (k + 1)),
    "sequence": lambda o: SequentialLR(o, [LinearLR(o), CosineAnnealingLR(o, 10)], [3]),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_scheduler_states_come_back(tmp_path, kind):
    def make():
        optimizer = SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
        return optimizer, SCHEDULERS[kind](optimizer)

    def rates(optimizer, scheduler, steps):
        seen = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    optimizer, scheduler = make()
    rates(optimizer, scheduler, 4)
    other = make()
    other[0].load_state_dict(there_and_back(tmp_path, optimizer.state_dict()))
    other[1].load_state_dict(there_and_back(tmp_path, scheduler.state_dict()))
    assert rates(*other, 6) == rates(optimizer, scheduler, 6)


def test_tied_tensors_are_written_once_and_come_back_as_one(tmp_path):
    weight, same_values = torch.randn(100, 10), torch.zeros(100, 10)
    state = {"a": weight, "b": [weight], "view": weight[:50], "turned": weight.T, "other": same_values}
    loaded = there_and_back(tmp_path, state)
    assert same(state, loaded)
    assert loaded["a"] is loaded["b"][0]
    assert loaded["a"] is not loaded["other"]
    assert len(load_file(tmp_path / "state")) == 4
    assert same(there_and_back(tmp_path, [torch.zeros(3), torch.zeros(3)]), [torch.zeros(3)] * 2)


def test_mappings_and_numpy_numbers_come_back_as_plain_ones(tmp_path):
    state = {"o": OrderedDict(a=1), "m": MappingProxyType({"b": 2}), "n": np.float64(0.1), "i": np.int64(3)}
    loaded = there_and_back(tmp_path, {**state, "b": np.bool_(True), "s": torch.Size([2, 3])})
    assert same(loaded, {"o": {"a": 1}, "m": {"b": 2}, "n": 0.1, "i": 3, "b": True, "s": (2, 3)})


def test_a_state_is_a_copy(tmp_path):
    weight = torch.zeros(2, requires_grad=True)
    save_state(tmp_path / "state", {"w": weight})
    with torch.no_grad():
        weight.add_(1)
    loaded = load_state(tmp_path / "state")["w"]
    assert torch.equal(loaded, torch.zeros(2))
    assert not loaded.requires_grad


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", lambda: None, np.zeros(2), 1j])
def test_what_is_no_state_is_refused_and_leaves_the_old_one(tmp_path, value):
    save_state(tmp_path / "state", 1)
    with pytest.raises(InputError, match=f"A state holds a {type(value).__name__}, but may hold only"):
        save_state(tmp_path / "state", {"a": [torch.zeros(2), value]})
    assert load_state(tmp_path / "state") == 1
    assert len(list(tmp_path.iterdir())) == 1


DAMAGES = {
    "truncated": lambda content: content[:-40],
    "cut in the header": lambda content: content[:60],
    "empty": lambda content: b"",
    "random": lambda content: bytes(range(256)) * 10,
    "text": lambda content: b'{"a": 1}',
    "length of the header too large": lambda content: b"\xff" * 8 + content[8:],
    "longer than it says": lambda content: content + b"more",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, kind):
    path = tmp_path / "state"
    save_state(path, {"w": torch.randn(100)})
    path.write_bytes(DAMAGES[kind](path.read_bytes()))
    with pytest.raises(InputError, match=f"The checkpoint {path} is damaged or not one of ours"):
        load_state(path)
    with pytest.raises(InputError, match=f"{path} cannot be read as safetensors"):
        load_tensors(path)


def test_a_file_from_elsewhere_is_refused(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "plain")
    save_file({"w": torch.zeros(2)}, tmp_path / "other", metadata={"format": "pt"})
    for name in ("plain", "other"):
        with pytest.raises(InputError, match=f"{name} is not a checkpoint of retouch: its format is"):
            load_state(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path):
    for name in ("nothing", "."):
        with pytest.raises(InputError, match="There is no checkpoint at"):
            load_state(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_tensors(tmp_path / "nothing")


def test_named_tensors_come_back(tmp_path):
    tensors = {"a.weight": torch.randn(3, 2, requires_grad=True), "b": torch.tensor([True]), "c": torch.ones(2, 3).T}
    save_tensors(tmp_path / "new" / "mask.safetensors", tensors)
    loaded = load_tensors(tmp_path / "new" / "mask.safetensors")
    assert same({k: v.detach() for k, v in sorted(tensors.items())}, dict(sorted(loaded.items())))


# --- files and folders at once --------------------------------------------------------------------------------------


def test_a_file_is_there_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "file"
    for text in ("old", "new"):
        with atomic_file(path) as temporary:
            temporary.write_text(text)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("empty_one_is_there", [False, True])
def test_a_folder_is_there_only_when_it_is_whole(tmp_path, empty_one_is_there):
    path = tmp_path / "new" / "folder"
    if empty_one_is_there:
        path.mkdir(parents=True)
    with atomic_folder(path) as temporary:
        (temporary / "file").write_text("whole")
        assert not (path / "file").exists()
    assert (path / "file").read_text() == "whole"
    assert path.stat().st_mode & 0o777 == 0o755
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        refusal = pytest.raises(InputError, match=f"The output folder {tmp_path / name} is in use, but must be new or")
        with refusal, atomic_folder(tmp_path / name):
            raise AssertionError("the block must not be entered")
    assert (tmp_path / "full" / "precious").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_folder(tmp_path):
    """A small DigitsCNN, saved."""
    with seeds.isolated(0):
        model = DigitsCNN(width=3, hidden=5)
    save_model(model, tmp_path / "cnn")
    return tmp_path / "cnn"


@pytest.fixture
def vit_folder(tmp_path, tiny_vit):
    save_model(tiny_vit, tmp_path / "vit")
    return tmp_path / "vit"


def test_a_plain_module_comes_back_with_its_settings(plain_folder, global_rng_untouched):
    with seeds.isolated(0):
        expected = DigitsCNN(width=3, hidden=5).eval()
    with seeds.isolated(1):
        loaded = load_model(plain_folder)
    assert type(loaded) is DigitsCNN
    assert loaded.config == {"width": 3, "hidden": 5}
    assert not loaded.training
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(images), expected(images))
    assert sorted(path.name for path in plain_folder.iterdir()) == ["model.safetensors", "retouch.json"]


def test_a_transformers_model_comes_back(vit_folder, tiny_vit):
    loaded = load_model(str(vit_folder))
    assert type(loaded) is type(tiny_vit)
    assert not loaded.training
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded(images).logits, tiny_vit(images).logits)
    assert loaded.config.num_labels == 10


def test_a_language_model_with_tied_weights_comes_back(tmp_path, tiny_llama):
    tiny_llama.config.tie_word_embeddings = True
    tiny_llama.tie_weights()
    save_model(tiny_llama, tmp_path / "llama")
    loaded = load_model(tmp_path / "llama")
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(tokens).logits, tiny_llama(tokens).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_loading_does_not_touch_global_randomness(plain_folder, vit_folder, global_rng_untouched):
    load_model(plain_folder)
    load_model(vit_folder)


def test_a_module_without_settings_cannot_be_saved(tmp_path):
    with pytest.raises(InputError, match="Linear cannot be saved: it has neither save_pretrained nor a config"):
        save_model(nn.Linear(2, 2), tmp_path / "linear")
    assert not (tmp_path / "linear").exists()


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"There is no model folder at {tmp_path / 'nothing'}"):
        load_model(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="There is no model folder at"):
        load_model(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no model: there is neither config\.json .* nor retouch\.json"):
        load_model(tmp_path / "empty")


def rewrite(name, **changes):
    """A damage: other entries in one of the folder's JSON files."""

    def damage(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return damage


def without(tensor):
    def damage(folder):
        tensors = load_tensors(folder / "model.safetensors")
        tensors.pop(tensor)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garble(folder):
    (folder / "model.safetensors").write_bytes(b"\x93" * 4000)


def unlink(name):
    return lambda folder: (folder / name).unlink()


PLAIN = {
    "truncated weights": truncate,
    "garbled weights": garble,
    "no weights": unlink("model.safetensors"),
    "a tensor is missing": without("head.weight"),
    "other sizes": rewrite("retouch.json", config={"width": 4}),
    "unknown setting": rewrite("retouch.json", config={"depth": 4}),
    "settings of a wrong type": rewrite("retouch.json", config=[3]),
    "no JSON": lambda folder: (folder / "retouch.json").write_text("{"),
    "no class": lambda folder: (folder / "retouch.json").write_text("{}"),
    "unknown class": rewrite("retouch.json", **{"class": "retouch.worlds.digits:DigitsRNN"}),
    "unknown module": rewrite("retouch.json", **{"class": "retouch.worlds.letters:DigitsCNN"}),
    "class from elsewhere": rewrite("retouch.json", **{"class": "torch.nn:Linear"}),
    "class of a look-alike package": rewrite("retouch.json", **{"class": "retouchx.worlds:Linear"}),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_damaged_plain_model_is_refused(plain_folder, kind):
    PLAIN[kind](plain_folder)
    with pytest.raises(InputError, match=str(plain_folder)) as caught:
        load_model(plain_folder)
    assert "\n" not in str(caught.value)


TRANSFORMERS = {
    "truncated weights": truncate,
    "garbled weights": garble,
    "no weights": unlink("model.safetensors"),
    "a tensor is missing": without("classifier.weight"),
    "other sizes": rewrite("config.json", hidden_size=32),
    "no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "no architecture": rewrite("config.json", architectures=None),
    "two architectures": rewrite("config.json", architectures=["ViTModel", "ViTForImageClassification"]),
    "unknown architecture": rewrite("config.json", architectures=["NoSuchModel"]),
    "no model class": rewrite("config.json", architectures=["pipeline"]),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_damaged_transformers_model_is_refused(vit_folder, kind):
    TRANSFORMERS[kind](vit_folder)
    with pytest.raises(InputError, match=str(vit_folder)) as caught:
        load_model(vit_folder)
    assert "\n" not in str(caught.value)


def test_weights_in_pickle_are_not_read(vit_folder):
    torch.save(load_tensors(vit_folder / "model.safetensors"), vit_folder / "pytorch_model.bin")
    (vit_folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no \.safetensors weights"):
        load_model(vit_folder)


def test_a_model_folder_cannot_call_functions(plain_folder, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    call = {"class": f"{checkpoints.__name__}:save_tensors", "config": {"path": str(precious), "tensors": {}}}
    rewrite("retouch.json", **call)(plain_folder)
    with pytest.raises(InputError):
        load_model(plain_folder)
    assert precious.read_text() == "mine"
