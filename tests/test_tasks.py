"What people come to do, each in ten lines or fewer of their own; every task ends in what they came for."
import json

import pytest
import torch
from torch import nn

from gated_symile import (audit, fit, generator, make_objective, mfeat, rank_dataset, register, retrieve, top_k, unit,
                          GatedSymile, MissingError, MLP, ModalityGate, MultimodalDataset, MultimodalModel, Objective,
                          Symile)
from gated_symile.runs.plan import Plan, run_part
from gated_symile.runs.record import accuracy_table, run_all
from gated_symile.runs.spec import make_specs


def digits(rows=400): return mfeat(("pix", "fou", "zer"))[torch.randperm(2000, generator=generator(0))[:rows]]


def small_model(dataset, objective):
    torch.manual_seed(0)
    return MultimodalModel({name: MLP(x.shape[1], 16, width=32) for name, x in dataset.modalities.items()}, objective)


def test_embeddings_of_ones_own_in_a_plain_loop():
    rows = [torch.randn(32, 6, generator=generator(0))] * 3
    encoders, objective = nn.ModuleList(nn.Linear(6, 8) for _ in rows), Symile("candidates")
    optimiser = torch.optim.Adam([*encoders.parameters(), *objective.parameters()], 1e-2)
    for _ in range(100):
        loss = objective([unit(encode(x)) for encode, x in zip(encoders, rows)])
        optimiser.zero_grad(); loss.backward(); optimiser.step()
    embeddings = [unit(encode(x)) for encode, x in zip(encoders, rows)]
    found = top_k(objective, embeddings, target=0, k=1)[1][:, 0]
    assert (found == torch.arange(32)).float().mean() > 0.9


def test_in_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self): super().__init__(); self.model = small_model(data, Symile("candidates"))
        def training_step(self, batch, _):
            loss = self.model.loss(dict(zip(data.names, batch)))
            self.log("loss", loss)
            return loss
        def configure_optimizers(self): return torch.optim.Adam(self.parameters(), 3e-3)

    data = digits(256)
    module, rows = Module(), torch.utils.data.TensorDataset(*data.modalities.values())
    module.model.standardiser.fit(data)
    trainer = lightning.Trainer(max_epochs=12, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                                enable_model_summary=False, default_root_dir=tmp_path, accelerator="cpu")
    trainer.fit(module, torch.utils.data.DataLoader(rows, 64, shuffle=True))
    assert rank_dataset(module.model, data, "pix")[0].top(1).mean() > 0.5


def test_a_gate_of_ones_own():
    class Bilinear(nn.Module):
        def __init__(self, M, D): super().__init__(); self.maps = nn.Parameter(torch.eye(D).repeat(M, 1, 1))
        def ask(self, candidates, targets): return unit(candidates @ self.maps[targets]), None
        def answer(self, e, modalities): return unit(e)

    data = digits()
    model = small_model(data, GatedSymile(ModalityGate(3, 16, fit=Bilinear(3, 16))))
    fit(model, data[:300], data[300:], "pix", epochs=8, learning_rate=3e-3, warmup_steps=5, progress=False)
    assert rank_dataset(model, data[300:], "pix")[0].top(1).mean() > 0.1
    assert (model.objective.gate.fit.maps.grad != 0).any()


def test_an_objective_of_ones_own_in_template_audit_and_sweep(tmp_path):
    @register
    class Closest(Objective):
        def _score(self, embeddings, target, present):
            return torch.stack([e @ embeddings[target].T for m, e in enumerate(embeddings) if m != target]).amax(0)

    specs = make_specs(objectives=["Closest"], p=0.5, epochs=1, dim=8)
    assert "Closest" in accuracy_table(run_all(specs, tmp_path/"runs", progress=False)).to_string()
    assert len(audit(small_model(digits(), Closest()), digits(), "pix", generator=generator(0))) == 6
    settings = {"mfeat": {"epochs": 1}}
    stage = dict(objectives=["Closest"], data=["mfeat"], p=[0.5], seeds=[0], settings=settings, tuned=False)
    plan = Plan.load(dict(space={}, stages={"tuning": stage | {"seeds": [9]}, "report": stage}))
    assert len(run_part(plan, "report", "mfeat", "Closest", tmp_path/"sweep", tmp_path/"record", progress=False))


def test_save_move_to_an_empty_folder_load_rank(tmp_path):
    data = digits()
    model = small_model(data, GatedSymile(ModalityGate(3, 16)))
    fit(model, data[:300], data[300:], "pix", epochs=2, progress=False)
    model.save(tmp_path/"model.safetensors", about={"from": "the digits"})
    (tmp_path/"elsewhere").mkdir(); (tmp_path/"model.safetensors").rename(tmp_path/"elsewhere"/"m.safetensors")
    loaded = MultimodalModel.load(tmp_path/"elsewhere"/"m.safetensors")
    queries = {name: data.modalities[name][:5] for name in ("fou", "zer")}
    ask = lambda model: retrieve(model, queries, data.modalities["pix"], "pix", k=3, progress=False)
    assert ask(loaded).equals(ask(model))


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("name", ["PairwiseCLIP", "GRAM", "Symile", "GatedSymile", "SubsetSymile"])
def test_five_modalities_with_holes(name):
    data = mfeat(("pix", "fou", "zer", "kar", "mor"))[torch.randperm(2000, generator=generator(0))[:400]]
    data = MultimodalDataset(data.modalities, present=torch.rand(400, 5, generator=generator(1)) < 0.7)
    model = small_model(data, make_objective(name, 5, 16))
    fit(model, data[:300], data[300:], "pix", epochs=20, learning_rate=3e-3, warmup_steps=5, progress=False)
    ranks, rows = rank_dataset(model, data[300:], "pix")
    assert len(rows) == len(ranks) < 100 and ranks.top(10).mean() > 0.2               # chance: 0.13


def test_a_data_loader_of_ones_own():
    data = digits()
    names, rows = data.names, torch.utils.data.TensorDataset(*data[:300].modalities.values())
    def together(rows): return dict(zip(names, map(torch.stack, zip(*rows)))), None
    batches = torch.utils.data.DataLoader(rows, 64, shuffle=True, generator=generator(0), collate_fn=together)
    model = small_model(data, Symile("candidates"))
    model.standardiser.fit(data[:300])
    history = fit(model, batches, data[300:], "pix", epochs=8, learning_rate=3e-3, warmup_steps=5, progress=False)
    assert history["valid_top1"].max() > 0.1


def test_a_logger(tmp_path):
    data = digits()
    with (tmp_path/"log.jsonl").open("w") as file:
        log = lambda line: print(json.dumps(line), file=file)
        fit(small_model(data, Symile()), data[:300], data[300:], "pix", epochs=3, callbacks=[log], progress=False)
    lines = [json.loads(line) for line in (tmp_path/"log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert {"train_loss", "valid_top1", "log_scale"} <= lines[0].keys()


def test_what_is_missing_is_said_before_an_hour_has_passed():
    data = digits()
    model = small_model(data, Symile())
    with pytest.raises(MissingError, match="lacks 'zer'"): model(data.select(["pix", "fou"]))
