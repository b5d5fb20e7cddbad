"What a user writes, with types: mypy finds no error in it, and it runs (`test_types.py`)."
from pathlib import Path

import torch
from torch import Tensor, nn

from gated_symile import (
    GRAM, MLP, TRIANGLE, Bank, GatedSymile, ModalityGate, MultimodalDataset, MultimodalModel, PairwiseCLIP, Ranks,
    SubsetSymile,
    CoMM, CrossSelf, Fusion, ProjectionHead, Symile, TwoCopies, accuracy_by_corruption, audit, encode_bank, fit,
    generator, info_nce, load_bank, minus_loss, mip, nt_xent, rank_dataset,
    rank_true, retrieve,
    save_bank, synthetic_xnor, top_k, unit, verdict,
)
from gated_symile import (
    Augment, BitViews, Chain, Noise, Views, bits_labels, default_augment, register_augment, synthetic_bits,
    trifeature,
    BagOfTokens, Encoder, Frozen, LinearGaussian, MaskedMLP, ResidualMLP, SmallCNN, emoji, nhanes, probe,
    register_encoder, split_by_ids, symile_mimic, SymileMIMIC, tcga_brca, ukb, ukb_splits, Vocabulary,
    write_symile_mimic,
)
from gated_symile.data.xor import xor_information
from gated_symile.model import read_about
from gated_symile.objectives.base import Objective, make_objective, register, registered
from gated_symile.statistics import bootstrap_interval, metrics

DIM, NAMES = 16, ["A", "B", "C"]


@register
class Softest(Objective):
    "An objective of one's own: a soft maximum of the dot products with the queries."
    def __init__(self, log_scale: float = 0., softness: float = 0.5) -> None:
        super().__init__(log_scale)
        self.softness = softness

    def _score(self, embeddings: list[Tensor], target: int, present: Tensor | None) -> Tensor:
        pairs = [e @ embeddings[target].T for m, e in enumerate(embeddings) if m != target]
        return self.softness * torch.stack(pairs).div(self.softness).logsumexp(0)


class Small(nn.Module):
    "An encoder of one's own."
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, DIM)

    def forward(self, x: Tensor) -> Tensor: return self.linear(x)


@register_encoder
class Rooted(Encoder):
    "An encoder of one's own that is loaded by its name."
    standardise = "columns"

    def __init__(self, in_features: int, dim: int) -> None:
        super().__init__()
        self.in_features, self.dim, self.linear = in_features, dim, nn.Linear(in_features, dim)

    def forward(self, x: Tensor) -> Tensor: return self.linear(x.abs().sqrt())


@register_augment
class Turned(Augment):
    "A change of one's own."
    def _change(self, x: Tensor, generator: torch.Generator | None) -> Tensor: return -x


def copies(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    own: Augment = Turned(p=0.5)
    views = Views({"A": default_augment(16), "B": Chain([Noise(std=0.2), own])})
    return views(batch, generator(0))


def kinds() -> dict[str, Tensor]:
    bits = synthetic_bits(20, n_modalities=3, generator=generator(0))
    twin: dict[str, Tensor] = BitViews(together=False)(bits.modalities, generator(1))
    assert list(twin) == bits.names
    pictures: MultimodalDataset = trifeature(pairs=20, size=8, views=1, generator=generator(0))["test"].rows
    assert pictures.names == ["image1", "image2"]
    return bits_labels(bits)


def many_kinds() -> list[nn.Module]:
    tables: list[nn.Module] = [Rooted(4, 8), ResidualMLP(4, 8), MaskedMLP(4, 8, widths=[16, 32])]
    frozen = Frozen(nn.Linear(4, 4), Rooted(4, 8))
    return [*tables, SmallCNN(8, channels=1, spatial_dims=1), BagOfTokens(100, 8), frozen]


def captioned(texts: list[str | None]) -> MultimodalDataset:
    words: Vocabulary = Vocabulary.of(texts, least=1)
    ids: Tensor = words(texts)
    assert words.unknown("an owl") == ["owl"] and len(words) > int(ids.max())
    data = MultimodalDataset({"caption": ids, "x": torch.ones(len(ids), 2)}, present={"caption": ids.any(1)})
    return data.transformed("x", torch.neg)


def admissions(folder: Path) -> float:
    found: SymileMIMIC = symile_mimic(write_symile_mimic(folder, rows=(24, 10, 10)), "test")
    x_rays: MultimodalDataset = found.rows
    ten_each: Tensor | None = found.candidates
    assert ten_each is not None and ten_each.shape == (len(x_rays), 10)
    share: float = found.labels["Edema"].mean()
    return share


def biobank(folder: Path) -> dict[str, MultimodalDataset]:
    return split_by_ids(ukb(folder, join="intersect"), ukb_splits(folder), unknown="leave out")


def packaged() -> dict[str, float]:
    people: MultimodalDataset = nhanes(("metals",), log=False)
    tumours: MultimodalDataset = tcga_brca(columns=None)
    found: MultimodalDataset = emoji(flat=True)
    assert min(map(len, (people, tumours, found))) > 700
    return xor_information(5, 0.5)


def make(data: MultimodalDataset, objective: Objective) -> MultimodalModel:
    encoders = {name: MLP(x.shape[1], dim=DIM) for name, x in data.modalities.items()}
    return MultimodalModel(encoders, objective, standardise=False)


def train(model: MultimodalModel, first: MultimodalDataset, valid: MultimodalDataset) -> float:
    lines: list[dict] = []
    history = fit(model, first, valid, target="A", epochs=2, batch_size=64, progress=False, callbacks=[lines.append],
                  optimiser=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3))
    assert len(lines) == len(history)
    batches = [({name: x[rows] for name, x in first.modalities.items()}, None)
               for rows in torch.arange(len(first)).split(64)]
    history = fit(model, batches, valid, target="A", epochs=1, progress=False)
    best: float = history["valid_mrr"].max()
    return best


def judge(model: MultimodalModel, test: MultimodalDataset) -> str:
    ranks, rows = rank_dataset(model, test, target="A")
    top: Tensor = ranks.top(1)
    rank: Tensor = ranks.rank()
    reciprocal: Tensor = ranks.reciprocal()
    some: Ranks = ranks[rank < 3]
    low, high = bootstrap_interval(top)
    assert 0 <= low <= high <= 1 and len(some) <= len(ranks) and len(reciprocal) == len(rows)
    assert test.corrupted is not None
    print(metrics(ranks, ks=(1, 5)), accuracy_by_corruption(ranks, test.corrupted[rows], test.names))
    said: str = verdict(audit(model, test, target="A"))
    return said


def keep(model: MultimodalModel, test: MultimodalDataset, folder: Path) -> list[str]:
    model.save(folder/"model.safetensors", about={"by": "me"})
    again = MultimodalModel.load(folder/"model.safetensors")
    about: dict = read_about(folder/"model.safetensors")
    embeddings: list[Tensor] = again.embed(test)
    one: Tensor = again.encode_modality("A", test.modalities["A"])
    assert about["by"] == "me" and torch.equal(one.detach(), embeddings[0])
    bank: Bank = encode_bank(again, test, "A")
    save_bank(again, test, "A", folder/"bank.npy")
    queries = test.select(["B", "C"])[:3]
    answer = retrieve(again, queries, load_bank(folder/"bank.npy"), target="A", k=2)
    loss: Tensor = again.loss(test.modalities, test.present)
    scores: Tensor = again.score(embeddings, 0)
    assert loss.isfinite() and scores.shape == (len(test), len(test)) and len(bank) == len(test)
    values, found = top_k(again.objective, embeddings, target=0, k=2, progress=False)
    assert found.shape == values.shape
    return [str(candidate) for candidate in answer["candidate"]]


def gates() -> list[Objective]:
    gate = ModalityGate(3, dim=DIM, weighting="sigmoid", null=True, strength=2.)
    strength: Tensor = gate.strength()
    temperature: Tensor = gate.temperature()
    objective = GatedSymile(gate, log_scale=2.)
    embeddings = [unit(torch.randn(5, DIM, generator=generator(m))) for m in range(3)]
    weights, null = objective.weights(embeddings, 0)
    by_gate, _ = objective.gate.weights(embeddings, 0)
    assert weights.shape == by_gate.shape == (5, 5, 2) and null.shape == (5, 5)
    assert strength.dim() == temperature.dim() == 0
    settings: dict = objective.settings()
    return [objective, make_objective("GatedSymile", 3, DIM, strength=settings["strength"])]


class SimCLR(TwoCopies):
    "An objective of one's own that learns from two copies of each row."
    def _loss_of_two(self, one: list[Tensor], two: list[Tensor], present: Tensor | None) -> Tensor:
        return torch.stack([nt_xent(a, b, temperature=0.5) for a, b in zip(one, two)]).mean()


class Jiggle(nn.Module):
    "An augmentation of one's own."
    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=generator)


def fused(first: MultimodalDataset, valid: MultimodalDataset) -> Tensor:
    encoders = {name: MLP(x.shape[1], dim=DIM) for name, x in first.modalities.items()}
    for objective in (SimCLR(), CrossSelf(3, DIM)): assert MultimodalModel(encoders, objective).loss(first[:9]) > 0
    model = MultimodalModel(encoders, CoMM(3, dim=DIM, retrieval=1.), augment={name: Jiggle() for name in NAMES})
    history = fit(model, first, valid, epochs=1, progress=False, validate=minus_loss)
    assert history["valid"].notna().all()
    found: Tensor = ProjectionHead(DIM)(Fusion(3, DIM)(model.embed(valid), subsets=[(0, 1), (2,)]))
    assert found.shape == (2, len(valid), DIM)
    return model.represent(valid, names=["A", "B"])


def loop(x: Tensor, y: Tensor, z: Tensor, present: Tensor | None = None) -> Tensor:
    "Embeddings of one's own in a plain loop."
    encoders = nn.ModuleList([Small(x.shape[1]), Small(y.shape[1]), Small(z.shape[1])])
    objective = Symile("all", log_scale=1.)
    optimiser = torch.optim.Adam([*encoders.parameters(), *objective.parameters()])
    for _ in range(2):
        embeddings = [unit(encoder(rows)) for encoder, rows in zip(encoders, (x, y, z))]
        loss: Tensor = objective(embeddings, present)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    score: Tensor = objective.score([e.detach() for e in embeddings], 0, present)
    product: Tensor = mip(embeddings)
    assert len(product) == len(x) and info_nce(score).isfinite()
    return rank_true(objective.score, [e.detach() for e in embeddings], 0).rank()


def main(folder: Path) -> None:
    data = synthetic_xnor(300, p=0.5, dim=64, generator=generator(0))
    first, valid, test = data.split((.6, .2, .2), generator(0))
    for objective in [*gates(), Softest(softness=0.3), PairwiseCLIP(), GRAM(), TRIANGLE(), SubsetSymile()]:
        assert make(data, objective).loss(first[:9]).isfinite()
    model = make(data, Softest())
    assert 0 < train(model, first, valid) <= 1
    assert judge(model, test).startswith("-")
    assert len(keep(model, test, folder)) == 6
    assert len(loop(*first.modalities.values())) == len(first) and "Softest" in registered()
    assert all(isinstance(encoder, nn.Module) for encoder in many_kinds()) and len(packaged()) > 2
    assert fused(first, valid).shape == (len(valid), DIM)
    assert 0 <= admissions(folder/"look_alike") <= 1
    assert len(kinds()) == 5 and list(copies(dict(first.modalities))) == first.names
    assert len(captioned(["an elk", None])) == 2
    floor = make(data, LinearGaussian(ridge=None))
    fit(floor, first, valid, target="A", progress=False)
    labels = [i % 2 for i in range(len(first))], [i % 2 for i in range(len(test))]
    values = probe(floor, first, test, *labels)["value"]
    assert len(values)
