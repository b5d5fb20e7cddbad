"""Time and memory of one case in a process of its own: `python tools/measure.py CASE [name=value ...]` prints one line of JSON.

A fresh process, because memory that an earlier case has touched and freed would hide what a later one needs. `python tools/measure.py`
lists the cases. The benchmark notebooks call this through `measure`.
"""
import json, resource, subprocess, sys
from functools import partial
from pathlib import Path


def embeddings(rows, dim, M, requires_grad=True, target=None, candidates=None):
    import torch
    from gated_symile import generator, unit
    sizes = [candidates if m == target else rows for m in range(M)]
    return [unit(torch.randn(n, dim, generator=generator(m))).requires_grad_(requires_grad) for m, n in enumerate(sizes)]


def step(objective, e):
    "A loss and all its gradients."
    import torch
    leaves = [*e, *(p for p in objective.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(objective(e), leaves, allow_unused=True)


def symile(B=128, D=256, M=3, negatives="candidates"):
    "Symile's loss and gradients"
    from gated_symile import Symile
    return step(Symile(negatives), embeddings(B, D, M))


def gated(B=128, D=256, M=3, compile=False):
    "Gated Symile's loss and gradients"
    from gated_symile import GatedSymile, ModalityGate
    import torch
    torch.manual_seed(0)
    return step(GatedSymile(ModalityGate(M, D)), embeddings(B, D, M))


def written_out(B=128, D=256, M=3):
    "the same, with the gated embeddings written out as the definition has them"
    import torch
    from gated_symile import dvs, GatedSymile, ModalityGate
    from gated_symile.contrastive import mean_over_targets
    torch.manual_seed(0)
    objective, e = GatedSymile(ModalityGate(M, D)), embeddings(B, D, M)
    def scores(t): return dvs(M, D) * torch.einsum("jd,ijd->ij", e[t], objective.gate.gated(e, t).prod(2))
    def loss(): return mean_over_targets(lambda t: objective.logit_scale() * scores(t), M)
    return lambda: torch.autograd.grad(loss(), [*e, *objective.parameters()])


def package(B=128, D=256, M=3):
    "the PyPI package symile with all combinations (n_squared)"
    import torch
    from gated_symile import dvs
    from symile import Symile
    e, scale, loss = embeddings(B, D, M), torch.tensor(dvs(M, D)), Symile("n_squared")
    return lambda: torch.autograd.grad(loss(e, scale), e)


def search(N=100_000, B=256, D=256, M=3, k=10, gate=True, memory_mapped=""):
    "top-k of B queries in a bank of N candidates, with a gate or without"
    import numpy as np, torch
    from gated_symile import GatedSymile, ModalityGate, Symile, top_k
    torch.manual_seed(0)
    objective = GatedSymile(ModalityGate(M, D)) if gate else Symile()
    if memory_mapped:
        e = embeddings(B, D, M, requires_grad=False, target=0, candidates=1)
        e[0] = torch.from_numpy(np.load(memory_mapped, mmap_mode="c"))
    else: e = embeddings(B, D, M, requires_grad=False, target=0, candidates=N)
    return torch.no_grad()(lambda: top_k(objective.score, e, 0, k))


def product(B=512, D=256):
    "a matrix product alone, the machine's own ceiling"
    import torch
    a, b = torch.randn(B, D), torch.randn(B, D)
    return lambda: a @ b.T


CASES = {f.__name__: f for f in (symile, gated, written_out, package, search, product)}


def peak():
    "Largest resident memory of this process so far, in MiB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def main(case, seconds=1., threads=2, **options):
    import torch
    from torch.utils.benchmark import Timer
    torch.set_num_threads(int(threads))
    small = {**options, **{name: 16 for name in ("B",)}}
    if case != "search": CASES[case](**small)()                           # what torch needs once is not what the case needs
    run = CASES[case](**options)
    before = peak()
    run()
    memory = peak() - before
    times = Timer("run()", globals={"run": run}, num_threads=int(threads)).blocked_autorange(min_run_time=seconds)
    print(json.dumps(dict(case=case, **options, ms=1e3*times.median, spread_ms=1e3*times.iqr, runs=len(times.times), MiB=memory)))


def measure(case, **options):
    "The measurement of one case in a process of its own, as a dict."
    words = [sys.executable, str(Path(__file__).resolve()), case, *(f"{k}={json.dumps(v)}" for k, v in options.items())]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"{' '.join(words)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in CASES: sys.exit(__doc__ + "\n" + "\n".join(f"  {n:12} {f.__doc__}" for n, f in CASES.items()))
    def value(text):
        try: return json.loads(text)
        except ValueError: return text
    main(sys.argv[1], **{k: value(v) for k, v in (w.split("=", 1) for w in sys.argv[2:])})
