"Encoders: what goes in, what comes out, how they are made again, and how they live in a model and a training."
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gated_symile.bank import retrieve
from gated_symile.core import DtypeError, MissingError, RangeError, ShapeError, UnknownNameError, generator
from gated_symile.data.dataset import MultimodalDataset
from gated_symile.encoders import (ENCODERS, MLP, BagOfTokens, EmbeddedMLP, Encoder, Frozen, GentleMLP, ImageEncoder,
                                   MaskedMLP, ResidualMLP, SmallCNN, TransformersEncoder, Vocabulary,
                                   register_encoder)
from gated_symile.model import MultimodalModel, read_about
from gated_symile.objectives.symile import Symile
from gated_symile.training import fit

DIM, ROWS = 8, 6


def floats(*shape): return torch.randn(ROWS, *shape, generator=generator(0))


def ids(high=12, length=5): return torch.randint(1, high, (ROWS, length), generator=generator(0))


class States(nn.Module):
    "Stands for a language model of `transformers`."
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids, attention_mask): return SimpleNamespace(last_hidden_state=self.table(input_ids))


@pytest.fixture
def transformers(monkeypatch):
    "A stand-in for the library, whether it is there or not."
    configs = SimpleNamespace(for_model=lambda model_type, **sizes: SimpleNamespace(**sizes))
    monkeypatch.setitem(sys.modules, "transformers",
                        SimpleNamespace(AutoConfig=configs, AutoModel=SimpleNamespace(from_config=States)))


CASES = { # name -> a function that makes the encoder, rows for it, the extra it needs
    "MLP": (lambda: MLP(7, DIM, width=16), floats(7), None),
    "ResidualMLP": (lambda: ResidualMLP(7, DIM, width=16, input_dropout=0.1), floats(7), None),
    "GentleMLP": (lambda: GentleMLP((7,), DIM, width=16, input_dropout=0.1), floats(7), None),
    "MaskedMLP": (lambda: MaskedMLP(7, DIM, [16, 32], 0.1), floats(7).masked_fill(floats(7) > 1, torch.nan), None),
    "EmbeddedMLP": (lambda: EmbeddedMLP(7, DIM, width=16, bins=4), floats(7), "rtdl_num_embeddings"),
    "SmallCNN": (lambda: SmallCNN(DIM, 3, widths=[8, 16]), floats(3, 12, 12), None),
    "ImageEncoder": (lambda: ImageEncoder(DIM, 2, 1, "resnet10"), floats(2, 40), "monai"),
    "BagOfTokens": (lambda: BagOfTokens(12, DIM, width=16), ids(), None),
    "TransformersEncoder": (lambda: TransformersEncoder(
        {"model_type": "bert", "vocab_size": 12, "hidden_size": 16}, DIM), ids(), None)}


@pytest.fixture(params=CASES)
def case(request, transformers):
    make, rows, needed = CASES[request.param]
    if needed: pytest.importorskip(needed)
    torch.manual_seed(0)
    return make().eval(), rows


def test_every_encoder_of_the_library_is_tried():
    ours = {name for name, encoder in ENCODERS.items() if encoder.__module__.startswith("gated_symile.")}
    assert set(CASES) == ours - {"Flat"} # which has no weights: test_linear.py


def test_rows_become_vectors_one_by_one(case):
    encoder, rows = case
    whole = encoder(rows)
    assert whole.shape == (ROWS, encoder.dim) == (ROWS, DIM) and whole.isfinite().all()
    assert torch.allclose(whole[2:4], encoder(rows[2:4]), atol=1e-5)


def test_every_weight_learns(case):
    "Each has a gradient, those behind a layer that starts at zero after a step."
    encoder, rows = case
    encoder.train()
    steps = torch.optim.SGD(encoder.parameters(), 0.1)
    for _ in range(2):
        steps.zero_grad()
        (encoder(rows) - torch.arange(ROWS)[:, None]).square().mean().backward()
        steps.step()
    lost = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert lost == [] and all(p.isfinite().all() for p in encoder.parameters())


def test_an_encoder_is_made_again_from_json(case):
    encoder, rows = case
    settings = json.loads(json.dumps(encoder.settings()))
    again = ENCODERS[type(encoder).__name__](**settings).eval()
    assert again.settings() == encoder.settings() == settings
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(rows), encoder(rows))


def test_a_model_with_it_is_saved_and_loaded_without_code(case, tmp_path):
    encoder, rows = case
    model = MultimodalModel({"a": encoder, "b": MLP(3, DIM)}, Symile(), standardise=False).eval()
    batch = {"a": torch.nan_to_num(rows) if rows.is_floating_point() else rows, "b": floats(3)}
    model.save(tmp_path/"model.safetensors")
    again = MultimodalModel.load(tmp_path/"model.safetensors")
    assert type(again.encoders["a"]) is type(encoder) and again.encoders["a"].settings() == encoder.settings()
    assert all(torch.equal(x, y) for x, y in zip(again(batch), model(batch)))


def test_each_says_how_its_rows_are_standardised(case):
    encoder, rows = case
    expected = "channels" if rows.dim() > 2 else "columns" if rows.is_floating_point() else None
    assert encoder.standardise == expected and encoder.holes == rows.is_floating_point() * bool(rows.isnan().any())


def test_absent_rows_which_are_zero_have_an_embedding(case):
    encoder, rows = case
    assert encoder(torch.zeros_like(rows)).isfinite().all()


def test_pictures_words_and_a_table_learn_together():
    "Whatever is there: an absent row of zeros has no say, and everything that is not absent has."
    torch.manual_seed(0)
    model = MultimodalModel({"picture": SmallCNN(DIM, widths=[8]), "words": BagOfTokens(12, DIM, 16),
                             "table": MaskedMLP(7, DIM, [16])}, Symile(), standardise=False)
    batch, present = {"picture": floats(3, 8, 8), "words": ids(), "table": floats(7)}, torch.ones(ROWS, 3).bool()
    present[0, 0] = present[1, 1] = False
    def loss(batch): return model.loss(batch, present, generator(0))
    whole = loss(batch)
    whole.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.encoders.parameters())
    absent = {"picture": batch["picture"].index_fill(0, torch.tensor([0]), torch.nan),
              "words": batch["words"].index_fill(0, torch.tensor([1]), 99), "table": batch["table"]}
    assert torch.equal(loss(absent), whole)


def test_bytes_token_ids_and_holes_are_trained_on_as_they_are(tmp_path):
    "Pictures by channel, ids untouched, holes in sight: chosen by the encoders, and the same after loading."
    torch.manual_seed(0)
    draws, kind = generator(1), torch.arange(64) % 4
    pictures = torch.randint(60, (64, 3, 8, 8), generator=draws, dtype=torch.uint8)
    pictures[torch.arange(64), kind % 3] += 40 * kind[:, None, None].byte()
    table = torch.randn(64, 5, generator=draws) + kind[:, None]
    data = MultimodalDataset({"picture": pictures, "words": torch.stack([kind + 1, 5 + kind % 2], 1),
                              "table": table.masked_fill(torch.rand(64, 5, generator=draws) < 0.2, torch.nan)})
    encoders = {"picture": SmallCNN(DIM, widths=[8]), "words": BagOfTokens(8, DIM, 16),
                "table": MaskedMLP(5, DIM, [16])}
    model, seen = MultimodalModel(encoders, Symile()), {}
    for name, encoder in encoders.items():
        encoder.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
    fit(model, data, data, target="picture", epochs=1, batch_size=32, seed=0, progress=False)
    model.embed(data)
    assert seen["picture"].is_floating_point() and seen["picture"].mean((0, 2, 3)).abs().max() < 1e-3
    assert torch.equal(seen["words"], data.modalities["words"])
    assert torch.equal(seen["table"].isnan(), data.modalities["table"].isnan())
    model.save(tmp_path/"m.safetensors")
    again = MultimodalModel.load(tmp_path/"m.safetensors")
    assert all(torch.equal(x, y) for x, y in zip(again.embed(data), model.embed(data)))


# Names

def test_a_name_of_the_library_is_never_taken():
    own = type("MLP", (Encoder,), {"__module__": "__main__"})
    with pytest.warns(UserWarning, match="MLP is the library's own, and stays"): assert register_encoder(own) is own
    with pytest.raises(UnknownNameError, match="MLP is known already, from gated_symile.encoders.mlp"):
        register_encoder(type("MLP", (Encoder,), {"__module__": "mine"}))
    assert ENCODERS["MLP"] is MLP
    for wrong in (nn.Linear, MLP(2, 3), "MLP"):
        with pytest.raises(DtypeError, match="must be a class with `settings`"): register_encoder(wrong)


def test_a_class_of_ones_own_is_loaded_by_name_once_it_is_known(tmp_path, monkeypatch):
    class Scaled(Encoder):
        def __init__(self, dim, scale):
            super().__init__()
            self.dim, self.scale, self.linear = dim, scale, nn.Linear(3, dim)

        def forward(self, x): return self.linear(x * self.scale)

    model = MultimodalModel({"a": Scaled(DIM, 2.), "b": MLP(3, DIM)}, Symile(), standardise=False)
    model.save(tmp_path/"m.safetensors")
    monkeypatch.delitem(ENCODERS, "Scaled", raising=False)
    with pytest.raises(ValueError, match="of class Scaled: pass a module of that class"):
        MultimodalModel.load(tmp_path/"m.safetensors")
    monkeypatch.setitem(ENCODERS, "Scaled", Scaled)
    assert MultimodalModel.load(tmp_path/"m.safetensors").encoders["a"].scale == 2.


def test_nothing_extra_is_imported_before_it_is_used():
    code = ("import sys; from gated_symile.encoders import ImageEncoder, EmbeddedMLP; "
            "assert not {'monai', 'rtdl_num_embeddings', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module, extra, make", [
    ("monai.networks", "imaging", lambda: ImageEncoder(DIM)),
    ("rtdl_num_embeddings", "tables", lambda: EmbeddedMLP(7, DIM)),
    ("transformers", "text", lambda: TransformersEncoder({"model_type": "bert"}, DIM))])
def test_an_extra_that_lacks_is_named(monkeypatch, module, extra, make):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingError, match=rf"pip install gated_symile\[{extra}\]"): make()


def test_a_model_whose_extra_lacks_says_so_on_loading(monkeypatch, tmp_path):
    pytest.importorskip("rtdl_num_embeddings")
    MultimodalModel({"a": EmbeddedMLP(7, DIM), "b": MLP(3, DIM)}, Symile(), False).save(tmp_path/"m.safetensors")
    monkeypatch.setitem(sys.modules, "rtdl_num_embeddings", None)
    with pytest.raises(ValueError, match=r"encoder of 'a' can't be made: .*gated_symile\[tables\]"):
        MultimodalModel.load(tmp_path/"m.safetensors")


# Tables

def test_the_residual_part_starts_at_zero_and_learns():
    torch.manual_seed(0)
    encoder, x = ResidualMLP(2, 1, width=32), torch.randn(256, 2, generator=generator(1))
    assert torch.equal(encoder(x), encoder.linear(x))
    product, steps = x.prod(1, keepdim=True), torch.optim.Adam(encoder.parameters(), 0.02)
    def error(): return (encoder(x) - product).square().mean()
    start = error().item()
    for _ in range(60): steps.zero_grad(); loss = error(); loss.backward(); steps.step()
    assert start > 0.5 and error() < 0.2 * start                      # no linear map knows a product


def test_a_hole_is_told_from_a_zero_and_its_value_is_never_seen():
    torch.manual_seed(0)
    encoder, x = MaskedMLP(3, DIM, [16]).eval(), torch.zeros(1, 3)
    holed = x.index_fill(1, torch.tensor([1]), torch.nan)
    assert encoder.holes and not torch.allclose(encoder(x), encoder(holed))
    plain = MaskedMLP(3, DIM, [16], mask=False)
    assert not plain.holes and plain.layers[0].in_features == 3 and plain(holed).isnan().all()


def test_what_bins_have_to_be():
    pytest.importorskip("rtdl_num_embeddings")
    with pytest.raises(ShapeError, match="edges for 3 features, got 2"): EmbeddedMLP(3, DIM, bins=[[0, 1], [0, 1]])
    with pytest.raises(RangeError, match="bins must lie"): EmbeddedMLP(3, DIM, bins=1)
    with pytest.raises(UnknownNameError, match="embedding: 'periodical'.*did you mean 'periodic'"):
        EmbeddedMLP(3, DIM, "periodical")
    with pytest.raises(DtypeError, match="bins"): EmbeddedMLP(3, DIM, bins="16")


@pytest.mark.parametrize("make", [lambda: ResidualMLP(7, DIM), lambda: MaskedMLP(7, DIM), lambda: EmbeddedMLP(7, DIM)])
@pytest.mark.parametrize("shape", [(ROWS, 6), (7,), (ROWS, 7, 1)])
def test_a_table_of_another_width_is_refused(make, shape):
    pytest.importorskip("rtdl_num_embeddings")
    with pytest.raises(ShapeError, match=r"rows of 7 features, got shape"): make()(torch.zeros(shape))


# Pictures and signals

@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("make", [SmallCNN, lambda *args: ImageEncoder(*args, network="resnet10")],
                         ids=["SmallCNN", "ImageEncoder"])
def test_one_two_and_three_dimensions(make, dims):
    if make is not SmallCNN: pytest.importorskip("monai")
    encoder, rows = make(DIM, 2, dims), torch.zeros(2, 2, *[9, 8, 7][:dims])
    assert encoder(rows).shape == (2, DIM)
    wrong = [(rows[:, :1], "2 channels"), (rows[0], "got shape"), (rows[..., None], "got shape")]
    for x, words in [*wrong, (torch.zeros(2, *rows.shape[2:], 2), "channels come first: `rows.movedim")]:
        with pytest.raises(ShapeError, match=words): encoder(x)
    with pytest.raises(DtypeError, match=r"`rows.float\(\)`, got torch.uint8"): encoder(rows.byte())


def test_group_norm_keeps_no_statistics_and_rows_apart():
    pytest.importorskip("monai")
    rows = floats(3, 32, 32)
    for network in ("resnet10", "densenet121"):
        torch.manual_seed(0)
        encoder = ImageEncoder(DIM, network=network).train()
        assert list(encoder.buffers()) == []
        apart = (encoder(rows)[:2] - encoder(rows[:2])).abs().max()
        assert apart < 1e-3
        assert torch.equal(encoder(rows), encoder.eval()(rows))               # training and evaluation are one


def folded(encoder): return nn.Sequential(nn.Unflatten(1, (1, 6, 6)), encoder)


def test_batch_norms_of_a_picture_encoder_are_estimated_for_the_averaged_weights():
    pytest.importorskip("monai")
    torch.manual_seed(0)
    rows = torch.randn(48, 36, generator=generator(1))
    train = MultimodalDataset({"a": rows, "b": rows[:, :5] + 0.1, "c": rows[:, 5:9]})
    encoder = ImageEncoder(DIM, 1, 2, "resnet10", norm="batch")
    model = MultimodalModel({"a": folded(encoder), "b": MLP(5, DIM), "c": MLP(4, DIM)}, Symile())
    fit(model, train, train, target="b", epochs=1, batch_size=48, seed=0, progress=False)
    with torch.no_grad():
        seen = encoder.layers.conv1(model.standardiser("a", rows).unflatten(1, (1, 6, 6)))
    assert torch.allclose(encoder.layers.bn1.running_mean, seen.mean((0, 2, 3)), atol=1e-5)


# Text

def test_an_id_that_there_isnt_is_named():
    encoder = BagOfTokens(12, DIM)
    for wrong in (12, -1):
        rows = ids()
        rows[3, 2] = wrong
        with pytest.raises(RangeError, match=rf"token id {wrong} \(row 3, place 2\) must lie in \[0, 11\]"):
            encoder(rows)
    with pytest.raises(DtypeError, match="must be whole numbers.*got torch.float32"): encoder(ids().float())
    with pytest.raises(ShapeError, match=r"must have shape \(rows, length\), got \(5,\)"): encoder(ids()[0])


def test_padding_says_nothing(transformers):
    torch.manual_seed(0)
    for name in ("BagOfTokens", "TransformersEncoder"):
        encoder = CASES[name][0]().eval()
        assert torch.allclose(encoder(ids()), encoder(nn.functional.pad(ids(), (0, 4))), atol=1e-6)


# A network that is kept

def test_a_frozen_network_is_the_same_after_training(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
    before = {key: x.clone() for key, x in network.state_dict().items()}
    frozen = Frozen(network, MLP(16, DIM))
    rows = torch.randn(64, 7, generator=generator(1))
    train = MultimodalDataset({"a": rows, "b": rows[:, :5], "c": rows[:, 3:]})
    model = MultimodalModel({"a": frozen, "b": MLP(5, DIM), "c": MLP(4, DIM)}, Symile())
    head = frozen.head.layers[0].weight.clone()
    fit(model, train, train, target="b", epochs=1, batch_size=32, seed=0, progress=False)
    assert not torch.equal(head, frozen.head.layers[0].weight)
    assert frozen.train().head.training and not any(m.training for m in network.modules())
    assert all(torch.equal(before[key], x) for key, x in network.state_dict().items())
    model.save(tmp_path/"m.safetensors")
    with pytest.raises(ValueError, match="of class Frozen: pass a module of that class"):
        MultimodalModel.load(tmp_path/"m.safetensors")
    again = MultimodalModel.load(tmp_path/"m.safetensors", {"a": Frozen(network, MLP(16, DIM))})
    assert torch.equal(again.encode_modality("a", rows), model.encode_modality("a", rows))


def test_words_are_saved_with_their_model_and_unknown_ones_are_told(tmp_path):
    "From captions with a hole to the same list by a typed question, before and after saving; nonsense is refused."
    captions = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("ring", "cross")] * 3 + [float("nan")]
    vocabulary = Vocabulary.of(captions)
    ids = vocabulary(captions)
    assert vocabulary.words == ["a", "blue", "cross", "red", "ring"] and ids.shape == (13, 3) and not ids[-1].any()
    data = MultimodalDataset({"x": torch.randn(13, 4, generator=generator(0)), "caption": ids},
                             present={"caption": ids.any(1)})
    model = MultimodalModel({"x": MLP(4, DIM), "caption": BagOfTokens(len(vocabulary), DIM, 16)}, Symile())
    with pytest.warns(UserWarning, match="1 of 13 rows left out"):
        fit(model, data, data[:12], target="x", epochs=1, progress=False)
    model.save(tmp_path/"m.safetensors", about={"words": vocabulary.words})
    again = Vocabulary(read_about(tmp_path/"m.safetensors")["words"])
    models = model, MultimodalModel.load(tmp_path/"m.safetensors")
    asked = [retrieve(m, {"caption": v("A red, red ring!")}, data, "x", progress=False)
             for m, v in zip(models, (vocabulary, again))]
    assert asked[0].equals(asked[1]) and again.unknown("a crimson ring") == ["crimson"]
    with pytest.warns(UserWarning, match="1 of 2 texts have no word that is known, such as 'crimson'"):
        lost = again(["crimson", None])
    queries = MultimodalDataset({"caption": lost}, present={"caption": lost.any(1)})
    with pytest.raises(MissingError, match="2 of 2 rows have nothing"): retrieve(model, queries, data, "x")
